"""What a run shows of itself while it trains: losses with the right, a wrong and no subject picture, and sample
videos.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opens2v.config import Config, pixel_frames
from opens2v.data.augment import NO_CHANGES
from opens2v.data.cache import with_cached_features
from opens2v.data.subjects import clip_pixels, reference_pixels
from opens2v.data.video import to_uint8, write_video
from opens2v.dataset import collate_opens2v_batch, create_dataset
from opens2v.evaluation.subject_use import paired_errors
from opens2v.modules.conditions import Conditions, Encoders
from opens2v.sampling.scheduler import FlowMatchScheduler
from opens2v.sampling.video import SamplerSettings, VideoSampler
from opens2v.weights.base import latent_shape
from shared.engine.dist import DistInfo
from shared.errors import UserError, write_text
from shared.media.pictures import as_rgb

VALIDATION_SIGMAS = tuple((place + 0.5) / 10 for place in range(10))  # ten fixed noise levels
_VALIDATION_SEED = 551


def open_picture(path: str | Path) -> Image.Image:
    """A reference picture, RGB on white; UserError for what is not one."""
    try:
        return as_rgb(Image.open(path))
    except FileNotFoundError:
        raise UserError(f"reference picture {path}: not found") from None
    except OSError as error:
        raise UserError(f"reference picture {path}: cannot be read ({error}); give a PNG or JPEG") from None


def conditions_for(
    config: Config, encoders: Encoders, prompts: list[str], pictures: list[list[Image.Image]]
) -> Conditions:
    """The generator's inputs for prompts, each with its subject pictures."""
    slots = max(config.data.max_subjects_per_sample, max((len(row) for row in pictures), default=1), 1)
    blank = Image.new("RGB", (8, 8), (255, 255, 255))
    batch: dict[str, Any] = {"prompts": prompts, "ref_pixels": [], "ref_clip_pixels": []}
    for row in pictures:
        filled = [*row, *[blank] * (slots - len(row))]
        size, clip_size = (config.data.ref_height, config.data.ref_width), config.data.ref_clip_size
        batch["ref_pixels"].append(torch.stack([reference_pixels(image, *size) for image in filled]))
        batch["ref_clip_pixels"].append(torch.stack([clip_pixels(image, clip_size) for image in filled]))
    batch["ref_pixels"], batch["ref_clip_pixels"] = (
        torch.stack(batch["ref_pixels"]),
        torch.stack(batch["ref_clip_pixels"]),
    )
    batch["ref_mask"] = torch.tensor([[place < len(row) for place in range(slots)] for row in pictures])
    return encoders.conditions(batch)


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
    """The validate and sample hooks of a run. The clips are the held-back part of each clip, without augmentation."""

    def __init__(self, config: Config, encoders: Encoders, scheduler: FlowMatchScheduler, info: DistInfo):
        self.config, self.encoders, self.scheduler, self.info = config, encoders, scheduler, info
        held_back = (config.data.train_share, 1.0) if config.data.train_share < 1 else (0.0, 1.0)
        dataset = create_dataset(config.data, seed=_VALIDATION_SEED, time_range=held_back, **NO_CHANGES)
        self.dataset = with_cached_features(dataset, config, latents=False)

    def validate(self, model: Any, step: int) -> dict[str, float]:
        """Flow loss at ten fixed noise levels with the true reference, none, and another clip's; gap = other - true."""
        count = min(len(self.dataset), self.config.training.val_batches * max(2, self.config.training.batch_size))
        found: list[dict[str, float]] = []
        size = max(2, min(self.config.training.batch_size, 8))
        for number, first in enumerate(range(0, count, size)):
            # Every rank runs every batch, as a sharded model needs; the mean over ranks is then the same on each.
            items = [self.dataset.sample(index % len(self.dataset), 0) for index in range(first, first + size)]
            conditions = self.encoders.conditions(collate_opens2v_batch(items))
            errors = paired_errors(
                model,
                conditions,
                None,
                self.scheduler,
                self.config.model.prediction,
                self.encoders.codec.variance,
                sigmas=VALIDATION_SIGMAS,
                seed=_VALIDATION_SEED + number,
                references="next",
            )
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
        """Videos of the configured prompts, or of held-back clips, each beside its subject picture."""
        training = self.config.training
        if self.encoders.text is None:
            return  # text is cached: there is no encoder for the negative prompt
        if training.val_prompts:
            pictures = [[open_picture(path)] for path in training.val_ref_images] or [[] for _ in training.val_prompts]
            conditions = conditions_for(self.config, self.encoders, training.val_prompts, pictures)
            captions = training.val_prompts
            shown = [None if not row else np.array(row[0]) for row in pictures]
        elif training.val_num_samples:
            items = [self.dataset.sample(index % len(self.dataset), 0) for index in range(training.val_num_samples)]
            conditions = self.encoders.conditions(collate_opens2v_batch(items))
            captions = [item["prompts"] for item in items]
            shown = [reference_picture(item["ref_pixels"][0]) for item in items]
        else:
            return
        settings = SamplerSettings(
            steps=training.val_steps,
            shift=training.timestep_shift,
            guidance="both",
            guidance_scale=2.0,
            sampler="euler",
            seed=self.config.run.seed,
        )
        shape = latent_shape(
            self.config, pixel_frames(self.config), self.config.data.pixel_height, self.config.data.pixel_width
        )
        negative = self.encoders.encode_text([training.negative_prompt])[0]
        latents = VideoSampler(model, None, self.config.model, settings, self.encoders.codec.variance).sample(
            conditions, negative, shape
        )
        videos = self.encoders.codec.decode(latents)
        if self.info.is_main:
            self._write(folder, step, videos, captions, shown)

    def _write(self, folder: Path, step: int, videos: torch.Tensor, captions: list[str], shown: list) -> None:
        for place, (video, reference) in enumerate(zip(videos, shown, strict=True)):
            frames = to_uint8(video)
            if reference is not None:
                frames = side_by_side(reference, frames)
            write_video(
                folder / f"step_{step:06d}_{place}.mp4", frames, fps=8 if self.config.model.codec == "patch" else 16
            )
        listed = json.dumps(
            {f"step_{step:06d}_{place}": text for place, text in enumerate(captions)}, ensure_ascii=False, indent=1
        )
        write_text(folder / f"step_{step:06d}.json", listed)
