"""What a run shows of itself while it trains: losses with the right, a wrong and no subject picture, and videos."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opens2v.config import Config, pixel_frames
from opens2v.data.cache import cached_changes, with_cached_features
from opens2v.data.scenes import reference_canvas
from opens2v.data.subjects import clip_pixels, open_picture, picture_tensors
from opens2v.data.video import to_uint8, write_video
from opens2v.dataset import VALIDATION_SEED, collate_opens2v_batch, readable_samples, validation_set
from opens2v.evaluation.subject_use import paired_errors
from opens2v.modules.conditions import Conditions, Encoders
from opens2v.sampling.scheduler import FlowMatchScheduler
from opens2v.sampling.video import VideoSampler, sampler_settings, video_rate
from opens2v.weights.base import latent_shape
from shared.engine.dist import DistInfo
from shared.errors import write_text

VALIDATION_SIGMAS = tuple((place + 0.5) / 10 for place in range(10))  # ten fixed noise levels


def conditions_for(
    config: Config, encoders: Encoders, prompts: list[str], pictures: list[list[Image.Image]]
) -> Conditions:
    """The generator's inputs for prompts, each with its subject pictures."""
    data = config.data
    if data.scenes is not None:  # pictures lie in the frame as those that it was trained with
        side = max(data.ref_height, data.ref_width)
        pictures = [[reference_canvas(picture, side) for picture in row] for row in pictures]
    slots = max(data.max_subjects_per_sample, max((len(row) for row in pictures), default=1), 1)
    size = (data.ref_height, data.ref_width)
    rows = [picture_tensors(row, slots, size, data.ref_clip_size) for row in pictures]
    return encoders.conditions(
        {"prompts": prompts, **{name: torch.stack([row[name] for row in rows]) for name in rows[0]}}
    )


def reference_picture(ref_pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> uint8 (H, W, 3)."""
    return to_uint8(ref_pixels[:, None])[0]


def side_by_side(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The reference picture left of every frame, uint8 (F, H, W', 3)."""
    height = frames.shape[1]
    picture = Image.fromarray(reference)
    picture = picture.resize((max(2, round(picture.width * height / picture.height)), height), Image.Resampling.LANCZOS)
    left = np.broadcast_to(np.array(picture), (len(frames), height, picture.width, 3))
    return np.concatenate([left, frames], 2)


class Preview:
    """The validate and sample hooks of a run, on clips that it is not trained on where there are some."""

    def __init__(self, config: Config, encoders: Encoders, scheduler: FlowMatchScheduler, info: DistInfo):
        self.config, self.encoders, self.scheduler, self.info = config, encoders, scheduler, info
        dataset = validation_set(config, **cached_changes(config))
        self.dataset = with_cached_features(dataset, config, split="val")
        data = config.data
        if data.json_paths and not data.val_json_paths and data.train_share == 1 and info is not None and info.is_main:
            print(
                "validation looks at the training clips: give --val-json-paths, or --train-share below 1, to hold some "
                "back",
                flush=True,
            )
        # What could end the run at its last step ends it now: a broken clip where none may be, a prompt not stored.
        if config.data.strict:
            self._items(validation_count(config))
        if encoders is not None and encoders.text is None:
            encoders.encode_text(["", config.training.negative_prompt, *config.training.val_prompts])
        if config.training.val_prompts and encoders is not None and encoders.image is None:
            for path in config.training.val_ref_images:
                encoders.encode_pictures(clip_pixels(open_picture(path), config.data.ref_clip_size)[None, None])

    def _items(self, count: int) -> list[dict[str, Any]]:
        """The first `count` samples that can be read, from the start again where there are fewer."""
        if count == 0:
            return []
        order = range(len(self.dataset))
        items = readable_samples(self.dataset, order, min(count, len(order)))
        return [items[place % len(items)] for place in range(count)]

    def validate(self, model: Any, step: int) -> dict[str, float]:
        """Flow loss at ten fixed noise levels with the true reference, none, and another clip's; gap = other - true.

        Every rank runs every batch, as a sharded model needs; the mean over ranks is then the same on each.
        """
        size = validation_batch(self.config)
        items = self._items(max(size, min(len(self.dataset), validation_count(self.config))))
        found: list[dict[str, float]] = []
        for number in range(len(items) // size):
            part = items[number * size : (number + 1) * size]
            conditions = self.encoders.conditions(collate_opens2v_batch(part))
            errors = paired_errors(
                model, conditions, None, self.scheduler, self.config.model, self.encoders.codec.variance,
                sigmas=VALIDATION_SIGMAS, seed=VALIDATION_SEED + number, references="next",
                chunk=self.config.training.batch_size,
            )  # fmt: skip
            matrix = errors.whole_BB
            other = torch.tensor([matrix[i, (i + 1) % size] for i in range(size)])
            true = matrix.diagonal()
            found.append(
                {
                    "loss": true.mean().item(),
                    "loss_none": errors.whole_none_B.mean().item(),
                    "loss_other": other.mean().item(),
                    "gap": (other - true).mean().item(),
                }
            )
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def sample(self, model: Any, step: int, folder: Path) -> None:
        """Videos of the configured prompts, or of validation clips, each beside its subject picture; one at a time, as
        a card that trains has room for one. Drawn as generate.py draws by default.
        """
        training = self.config.training
        negative = self.encoders.encode_text([training.negative_prompt])[0]
        sampler = VideoSampler(
            model, None, self.config.model, sampler_settings(self.config, steps=training.val_steps),
            self.encoders.codec.variance,
        )  # fmt: skip
        shape = latent_shape(
            self.config, pixel_frames(self.config), self.config.data.pixel_height, self.config.data.pixel_width
        )
        captions = []
        for place, (caption, conditions, shown) in enumerate(self._to_draw()):
            frames = to_uint8(self.encoders.codec.decode(sampler.sample(conditions, negative, shape, [place]))[0])
            captions.append(caption)
            if self.info.is_main:
                frames = frames if shown is None else side_by_side(shown, frames)
                write_video(folder / f"step_{step:06d}_{place}.mp4", frames, fps=video_rate(self.config))
        if self.info.is_main and captions:
            listed = {f"step_{step:06d}_{place}": text for place, text in enumerate(captions)}
            write_text(folder / f"step_{step:06d}.json", json.dumps(listed, ensure_ascii=False, indent=1))

    def _to_draw(self) -> Iterator[tuple[str, Conditions, np.ndarray | None]]:
        """(caption, conditions, subject picture) of each sample video."""
        training = self.config.training
        if training.val_prompts:
            pictures = [[open_picture(path)] for path in training.val_ref_images] or [[] for _ in training.val_prompts]
            for prompt, row in zip(training.val_prompts, pictures, strict=True):
                conditions = conditions_for(self.config, self.encoders, [prompt], [row])
                yield prompt, conditions, np.array(row[0]) if row else None
            return
        for item in self._items(training.val_num_samples):
            conditions = self.encoders.conditions(collate_opens2v_batch([item]))
            yield item["prompts"], conditions, reference_picture(item["ref_pixels"][0])


def validation_batch(config: Config) -> int:
    """Clips of a validation batch: two at least, since each is also shown with another's reference."""
    return max(2, min(config.training.batch_size, 8))


def validation_count(config: Config) -> int:
    """Clips of a validation."""
    size = validation_batch(config)
    return max(size, config.training.val_batches * max(2, config.training.batch_size) // size * size)
