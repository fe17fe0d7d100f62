"""Samples of the OpenS2V layout: a clip, its caption, and pictures of its subjects.

Random choices of a sample are keyed by (seed, epoch, index): the same for any number of ranks, workers and restarts.
"""

import random
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from opens2v.config import Config, pixel_count
from opens2v.data.annotations import Annotations
from opens2v.data.augment import NO_CHANGES, foreground_mask, in_its_place, recolour_subject, show_in_scene
from opens2v.data.clips import (
    UNUSABLE,
    Part,
    caption_of,
    class_names,
    frame_indices,
    generic_caption,
    text_digest,
    usable_range,
)
from opens2v.data.cross_frames import CrossFramePairs
from opens2v.data.scenes import UNSEEN, SceneDataset, read_drawings, scene_set
from opens2v.data.subjects import (
    CLIP_SIZE,
    SELECTIONS,
    Subject,
    SubjectFilter,
    place_in_frame,
    reference_tensors,
    select_subjects,
)
from opens2v.data.video import cover_resize, fit_frame, normalise
from shared.errors import BadSample, UserError
from shared.media.pictures import as_rgb
from shared.rng import keyed_seed

_SAMPLE = 501  # random stream
VALIDATION_SEED = 551


class OpenS2VAdapterDataset(Dataset):
    """Clips of one part. See SampleOptions for **options; `sample(index, epoch)` is the keyed form of `__getitem__`."""

    def __init__(
        self,
        json_path: str | Path,
        video_base_path: str | Path,
        background_base_path: str | Path | None = None,
        num_frames: int = 21,
        height: int = 480,
        width: int = 832,
        sample_stride: int = 3,
        max_subjects_per_sample: int = 1,
        subject_selection: str = "first",
        is_cross_frame: bool = False,
        cross_frames_cluster_path: str | Path | None = None,
        cross_frames_base_path: str | Path | None = None,
        ref_height: int = 256,
        ref_width: int = 256,
        **options: Any,
    ):
        self.options = sample_options(options)
        self.size, self.reference_size = (height, width), (ref_height, ref_width)
        self.num_frames, self.sample_stride = num_frames, sample_stride
        self.max_subjects, self.selection = max_subjects_per_sample, subject_selection
        check_arguments(num_frames, sample_stride, max_subjects_per_sample, subject_selection)
        if not Path(video_base_path).is_dir():
            raise UserError(f"video folder {video_base_path}: not found; check opens2v.video_base_paths")
        background = None if background_base_path is None else Path(background_base_path)
        self.part = Part(
            Path(json_path).stem,
            Annotations(json_path, index_dir=self.options.index_dir),
            Path(video_base_path),
            background,
            self.options.use_bbox,
        )
        self.filter = SubjectFilter(
            **{field.name: getattr(self.options, field.name) for field in fields(SubjectFilter)}
        )
        self.pairs = None
        if is_cross_frame:
            if cross_frames_base_path is None:
                raise UserError(
                    "is_cross_frame needs opens2v.cross_frames_base_path; give .../cross-frames-pairs/final_output"
                )
            limits = dict(
                min_similarity=self.options.cross_min_similarity, max_similarity=self.options.cross_max_similarity
            )
            self.pairs = CrossFramePairs(cross_frames_cluster_path, cross_frames_base_path, **limits)
        self.parts: dict[str, Part] = {self.part.name: self.part}
        self.positions = chosen_positions(self.part.annotations, self.options)
        self.fingerprint = f"{self.part.annotations.digest()}-{len(self)}"
        wants_drawings = self.options.other_subject_probability > 0
        self.drawings = read_drawings(str(self.options.scenes))[:-UNSEEN] if wants_drawings else []
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader processes see set_epoch
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.part.annotations) if self.positions is None else len(self.positions)

    def identity(self, index: int) -> tuple[str, str]:
        """(part, key) of a sample."""
        position = index if self.positions is None else self.positions[index]
        return self.part.name, self.part.annotations.key(position)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that __getitem__ draws for; seen by worker processes as well."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at `index`, or in place of a broken one another, drawn at random, at most max_retries times."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} samples")
        index, epoch = index % len(self), int(self.epoch)
        rng = random.Random(keyed_seed(self.options.seed, _SAMPLE, epoch, index, 1))
        for _ in range(self.options.max_retries + 1):
            try:
                return self.sample(index, epoch)
            except BadSample as error:
                if str(error) not in self._warned:
                    self._warned.add(str(error))
                    warnings.warn(str(error), stacklevel=2)
                reason, index = error, rng.randrange(len(self))
        raise UserError(
            f"{self.options.max_retries} samples in a row cannot be read; the last: {reason}; check the data folders"
        )

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The sample of (index, epoch). Raises BadSample, or with strict UserError, for one that cannot be read."""
        try:
            return self._sample(index, random.Random(keyed_seed(self.options.seed, _SAMPLE, epoch, index)))
        except BadSample as error:
            if self.options.strict:
                raise UserError(f"{error} (strict)") from None
            raise
        except UNUSABLE as error:
            text = f"{'/'.join(self.identity(index))}: a field cannot be used ({type(error).__name__}: {error})"
            if self.options.strict:
                raise UserError(f"{text} (strict)") from None
            raise BadSample(text) from None

    def _sample(self, index: int, rng: random.Random) -> dict[str, Any]:
        options, position = self.options, index if self.positions is None else int(self.positions[index])
        key, entry = self.part.entry(position)
        metadata = entry["metadata"]
        caption = caption_of(metadata, options.caption_key)
        indices, cut = self._frame_indices(metadata, rng)

        # Pixels. What changes them needs whole grey levels; else each frame is scaled as it comes from the decoder.
        changes = options.recolour_probability or options.other_scene_probability or options.other_subject_probability
        background = self._background(position, key, entry) if options.load_background or changes else None
        frames = None
        if options.load_frames or changes:
            frames = self._frames(position, entry, indices, as_uint8=options.uint8_frames or bool(changes))
        where = None
        if changes and background is not None and frames is not None:
            where = foreground_mask(frames, fit_frame(background, *self.size))

        # Subjects: all of the annotated frame, filtered, chosen; their pictures may come from another clip.
        chosen: list[Subject] = []
        sources: list[str] = []
        if options.with_content:
            tags = bool(options.subject_tag_groups)
            sources.append(self.part.content(key, entry, background=bool(changes), tags=tags))
        if options.load_subjects:
            kept = self.filter.apply(self._subjects(position, key, entry), entry.get("word_tags") or {})
            chosen = select_subjects(kept, self.selection, self.max_subjects, rng)
        images = [self._image(key, subject, rng, sources) for subject in chosen]
        places = [place_in_frame(subject.mask, self.size) for subject in chosen]

        noun = ""  # another than the clip's own
        # Changes that keep a small set from being learned by heart. The draws are made in this order whatever is
        # loaded, so that a sample with and without its frames is the same sample.
        if options.other_subject_probability and rng.random() < options.other_subject_probability:
            drawing, shown = rng.choice(self.drawings), None
            if where is not None:
                assert background is not None  # as `where` was made from it
                scene = fit_frame(background, *self.size)
                shown = in_its_place(where, scene, drawing.rgba)
            if shown is not None:
                frames, places = shown[0], [shown[1]]
                where, chosen, noun = foreground_mask(frames, scene), chosen[:1], "subject"
                images = [as_rgb(Image.fromarray(drawing.rgba))] * len(chosen)
                for name in class_names(entry):
                    caption = generic_caption(caption, name)
        if options.recolour_probability and rng.random() < options.recolour_probability and where is not None:
            assert frames is not None  # as `where` was made from them
            frames, images = recolour_subject(frames, images, where, rng)
        if options.other_scene_probability and rng.random() < options.other_scene_probability and where is not None:
            assert frames is not None
            frames, caption = self._in_other_scene(frames, where, caption, noun or class_names(entry)[0], rng, sources)
        if options.generic_caption_probability and rng.random() < options.generic_caption_probability:
            for name in class_names(entry):
                caption = generic_caption(caption, name)
        item: dict[str, Any] = {"key": key, "prompts": caption, "frame_indices": torch.tensor(indices)}
        if frames is not None and options.load_frames:
            tensor = torch.from_numpy(frames).permute(3, 0, 1, 2)
            # A view with other strides: collating copies once anyway, and a clip is large.
            item["frames"] = tensor if options.uint8_frames else normalise(tensor).contiguous()
        if options.load_subjects:
            item |= reference_tensors(
                chosen, images, rng if options.ref_augment else None,
                count=self.max_subjects, size=self.reference_size, clip_size=options.ref_clip_size,
                places=places if options.ref_place == "frame" else None,
            )  # fmt: skip
        item["meta"] = {
            "fps": metadata.get("fps"),
            "num_frames": metadata.get("num_frames"),
            "resolution": metadata.get("resolution"),
            "crop": metadata.get("crop"),
            "cut": list(cut),
            "tech": metadata.get("tech"),
            "motion": metadata.get("motion"),
            "aesthetic": metadata.get("aesthetic"),
            "part": self.part.name,
            "annotation_idx": [one.annotation_idx for one in chosen],
        }
        if options.with_content:
            # What was drawn is part of it: in a list that has grown, a clip has another place and other draws.
            drawn, names = rng.random(), item["meta"]["annotation_idx"]
            item["meta"]["content"] = {
                "vae": text_digest(*(sources if changes else sources[:1]), indices, drawn if changes else None),
                "clip": text_digest(*sources, names, drawn if changes or options.ref_augment else None),
            }
        if options.load_background and background is not None:
            item["background_pixels"] = cover_resize(background[None], *self.size)[:, 0]
        return item

    def _in_other_scene(
        self, frames: np.ndarray, where: np.ndarray, caption: str, noun: str, rng: random.Random, sources: list[str]
    ) -> tuple[np.ndarray, str]:
        """Frames and caption of the subject (the pixels `where`) in the scene of another clip, where that suits."""
        place = rng.randrange(len(self))
        position = place if self.positions is None else int(self.positions[place])
        key, other = self.part.entry(position)
        background = self._background(position, key, other)
        shown = None if background is None else show_in_scene(frames, where, fit_frame(background, *self.size))
        if shown is None:
            return frames, caption
        if self.options.with_content:
            sources.append(self.part.content(key, other, background=True))
        caption = caption_of(other["metadata"], self.options.caption_key)
        for name in class_names(other):
            caption = generic_caption(caption, name, noun)
        return shown, caption

    def _frame_indices(self, metadata: dict, rng: random.Random) -> tuple[list[int], tuple[int, int]]:
        start, end = usable_range(metadata)
        low, high = self.options.time_range
        if (low, high) != (0.0, 1.0):
            start, end = start + round(low * (end - start)), start + round(high * (end - start))
        stride = self.sample_stride
        if self.options.target_fps is not None:
            stride = max(1, round(float(metadata.get("fps") or self.options.target_fps) / self.options.target_fps))
        return frame_indices(start, end, self.num_frames, stride, rng), (start, end)

    # --- what keep_decoded remembers ----------------------------------------------------------------------------------

    def _remembered(self, position: int, what: str, make: Callable[[], Any]) -> Any:
        if not self.options.keep_decoded:
            return make()
        shelf = self.part.memory.setdefault(position, {})
        if what not in shelf:
            shelf[what] = make()
        return shelf[what]

    def _frames(self, position: int, entry: dict, indices: list[int], *, as_uint8: bool) -> np.ndarray:
        """Frames at the training size (F, h, w, 3): uint8, or float32 in [-1, 1]."""
        if not self.options.keep_decoded:
            return self.part.frames(entry, indices, self._fitted if as_uint8 else self._fitted_exactly)
        start, end = usable_range(entry["metadata"])
        whole = self._remembered(position, "frames", lambda: self._small(self.part.frames(entry, range(start, end))))
        return whole[np.array(indices) - start]

    def _background(self, position: int, key: str, entry: dict) -> np.ndarray | None:
        def make() -> np.ndarray | None:
            picture = self.part.background(key, entry)
            return picture if picture is None or not self.options.keep_decoded else self._small(picture[None])[0]

        return self._remembered(position, "background", make)

    def _fitted(self, frame: np.ndarray) -> np.ndarray:
        return fit_frame(frame, *self.size)

    def _fitted_exactly(self, frame: np.ndarray) -> np.ndarray:
        return cover_resize(frame[None], *self.size)[:, 0].permute(1, 2, 0).numpy()

    def _small(self, frames: np.ndarray) -> np.ndarray:
        """Frames at the training size, so that a small data set fits into memory."""
        pixels = (cover_resize(frames, *self.size) + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()

    def _subjects(self, position: int, key: str, entry: dict) -> list[Subject]:
        def make() -> list[Subject]:
            found = self.part.subjects(key, entry)
            for subject in found if self.options.keep_decoded else []:
                subject.image.thumbnail((2 * self.reference_size[1], 2 * self.reference_size[0]))
            return found

        return self._remembered(position, "subjects", make)

    # --- subjects -----------------------------------------------------------------------------------------------------

    def _image(self, key: str, subject: Subject, rng: random.Random, sources: list[str]) -> Image.Image:
        """The subject's picture: its own cut-out, or with cross-frame data that of another clip of the same video."""
        view = None if self.pairs is None else self.pairs.choose(self.part.name, key, subject.annotation_idx, rng)
        if view is None:
            return subject.image
        part = self._other_part(view.part)
        place = None if part is None else part.annotations.find(view.key)
        if part is None or place is None:
            raise BadSample(
                f"cross-frame pair of {self.part.name}/{key}: {view.part}/{view.key} is in none of opens2v.json_paths"
            )
        other_key, other_entry = part.entry(place)
        if self.options.with_content:
            sources.append(part.content(other_key, other_entry))
        found = [
            other for other in part.subjects(other_key, other_entry) if other.annotation_idx == view.annotation_idx
        ]
        return found[0].image if found else subject.image

    def _other_part(self, name: str) -> Part | None:
        """Another part by name: one of the parts given, or one that lies beside this part's files."""
        if name not in self.parts:
            json_path, videos = self.part.annotations.path.with_name(f"{name}.json"), self.part.videos.parent / name
            if not json_path.exists() or not videos.is_dir():
                return None
            annotations = Annotations(json_path, index_dir=self.options.index_dir)
            self.parts[name] = Part(name, annotations, videos, None, self.options.use_bbox)
        return self.parts[name]


class MultiPartOpenS2VAdapterDataset(Dataset):
    """Several parts in a row. Cross-frame partners are looked up in all of them."""

    def __init__(
        self, json_paths: list, video_base_paths: list, background_base_paths: list | None = None, **settings: Any
    ):
        backgrounds = background_base_paths or [None] * len(json_paths)
        lengths = (len(json_paths), len(video_base_paths), len(backgrounds))
        if len(set(lengths)) != 1 or not json_paths:
            raise UserError(
                f"opens2v.json_paths, video_base_paths and background_base_paths must be equally long and not empty, "
                f"they have {lengths[0]}, {lengths[1]} and {lengths[2]} entries; give one of each per part"
            )
        self.datasets = [
            OpenS2VAdapterDataset(*paths, **settings)
            for paths in zip(json_paths, video_base_paths, backgrounds, strict=True)
        ]
        parts = {dataset.part.name: dataset.part for dataset in self.datasets}
        for dataset in self.datasets:
            dataset.parts.update(parts)
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets))
        self.fingerprint = "+".join(dataset.fingerprint for dataset in self.datasets)

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """(part, index inside the part); negative indices count from the end; IndexError beyond it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} samples")
        index %= len(self)
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, inside = self.locate(index)
        return self.datasets[part][inside]

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The keyed sample, see OpenS2VAdapterDataset.sample."""
        part, inside = self.locate(index)
        return self.datasets[part].sample(inside, epoch)

    def identity(self, index: int) -> tuple[str, str]:
        """(part, key) of a sample."""
        part, inside = self.locate(index)
        return self.datasets[part].identity(inside)

    def set_epoch(self, epoch: int) -> None:
        """See OpenS2VAdapterDataset.set_epoch."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)


def collate_opens2v_batch(items: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Stack tensors, keep texts and dicts as lists. None items are left out; all None is an error."""
    kept = [item for item in items if item is not None]
    if not kept:
        raise ValueError("a batch without any sample; see the warnings about samples that cannot be read")
    names = [name for name in kept[0] if all(name in item for item in kept)]  # a background may be there for some only
    return {
        name: default_collate([item[name] for item in kept])
        if isinstance(kept[0][name], Tensor)
        else [item[name] for item in kept]
        for name in names
    }


class Settings(Protocol):
    """A `data` section: DataConfig, or a mapping with its names."""

    def __getitem__(self, name: str, /) -> Any: ...

    def __contains__(self, name: object, /) -> bool: ...


def create_dataset(data: Settings, **changes: Any) -> MultiPartOpenS2VAdapterDataset:
    """The data set of a `data` section (DataConfig, or a mapping with its names)."""
    names = {field.name for field in fields(SampleOptions)} - CODE_ONLY
    settings = {name: data[name] for name in names if name in data}
    settings |= {
        "num_frames": pixel_count(data["num_training_frames"], data["num_training_frames_unit"])
        if "num_training_frames_unit" in data
        else data["num_training_frames"],
        "height": data["pixel_height"],
        "width": data["pixel_width"],
        "ref_height": data["ref_height"],
        "ref_width": data["ref_width"],
    }
    choices = ("sample_stride", "max_subjects_per_sample", "subject_selection", "is_cross_frame")
    for name in (*choices, "cross_frames_cluster_path", "cross_frames_base_path"):
        settings[name] = data[name]
    settings |= changes
    return MultiPartOpenS2VAdapterDataset(
        data["json_paths"], data["video_base_paths"], data["background_base_paths"] or None, **settings
    )


Samples = MultiPartOpenS2VAdapterDataset | SceneDataset


def training_set(config: Config, **changes: Any) -> Samples:
    """What a run trains on: composed scenes, or the leading train_share of every clip. changes: of SampleOptions."""
    data = config.data
    if data.scenes is not None and not data.json_paths:
        return scene_set(config, "train")
    options = {"seed": config.run.seed, "time_range": (0.0, data.train_share), "load_background": False}
    return create_dataset(data, **{**options, "uint8_frames": True, **changes})


def validation_set(config: Config, **changes: Any) -> Samples:
    """What a run is validated on, without augmentation: scenes of combinations that are never trained, the clips of
    val_json_paths, or the part of every clip that train_share leaves (all of it where it leaves none).
    """
    data = config.data
    if data.scenes is not None and not data.json_paths:
        return scene_set(config, "combinations")
    time_range = (data.train_share, 1.0) if data.train_share < 1 else (0.0, 1.0)
    if data.val_json_paths:
        time_range = (0.0, 1.0)
        own = {"json_paths": data.val_json_paths, "video_base_paths": data.val_video_base_paths}
        data = data.model_copy(update={**own, "background_base_paths": []})
    options = {"seed": VALIDATION_SEED, "time_range": time_range, "load_background": False, **NO_CHANGES}
    return create_dataset(data, **{**options, "uint8_frames": True, **changes})


def readable_samples(dataset: Any, order: Iterable[int], count: int, epoch: int = 0) -> list[dict[str, Any]]:
    """The first `count` samples of `order` that can be read; those that cannot are passed over with a line each.

    UserError when none can: then the data folders are wrong, not a sample.
    """
    found: list[dict[str, Any]] = []
    reason: BadSample | None = None
    for index in order:
        if len(found) == count:
            break
        try:
            found.append(dataset.sample(index, epoch))
        except BadSample as error:
            reason = error
            print(f"passed over: {error}", flush=True)
    if not found:
        raise UserError(f"no sample can be read; the last: {reason}; check the data folders")
    return found


class EpochSampler(DistributedSampler):
    """DistributedSampler whose set_epoch also moves the data set's random choices on."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the order and of the samples' random choices."""
        super().set_epoch(epoch)
        assert isinstance(self.dataset, MultiPartOpenS2VAdapterDataset)
        self.dataset.set_epoch(epoch)


def create_opens2v_dataloader(
    config: Any, rank: int = 0, world_size: int = 1, train: bool = True
) -> tuple[DataLoader, DistributedSampler]:
    """(loader, sampler) for a loop of one's own: shuffled, tail dropped, the same order on every run.

    The training script uses shared/data.py instead, which can also resume inside an epoch.
    """
    training, seed = config.training, config.run.seed
    changes = {} if train else NO_CHANGES
    dataset = create_dataset(config.data, seed=seed, **changes)
    need = world_size * training.batch_size
    if len(dataset) < need:
        raise UserError(
            f"the data set has {len(dataset)} samples, one batch on {world_size} ranks takes {need}; use a smaller "
            "--batch-size or fewer ranks"
        )
    sampler = EpochSampler(dataset, world_size, rank, shuffle=train, seed=seed & 0x7FFFFFFF, drop_last=True)
    workers = training.num_workers

    def seed_worker(worker: int) -> None:
        value = (seed + 1000 * rank + worker) % 2**32
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)
        torch.set_num_threads(1)

    more = (
        {"persistent_workers": True, "prefetch_factor": training.prefetch_factor, "worker_init_fn": seed_worker}
        if workers
        else {}
    )
    loader = DataLoader(
        dataset,
        batch_size=training.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=workers,
        collate_fn=collate_opens2v_batch,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
        **more,
    )
    return loader, sampler


# Options of a sample, and which entries of a part are used.


@dataclass(frozen=True)
class SampleOptions:
    """Everything about a sample beyond paths and sizes, named as in the `data` section of the configuration."""

    target_fps: float | None = None
    min_gme_score: float | None = None
    min_aes_score: float | None = None
    min_crop_ratio: float | None = None
    max_crop_ratio: float | None = None
    subject_tag_groups: tuple[str, ...] | None = None
    dedup_iou: float | None = None
    use_bbox: bool = False
    ref_augment: bool = True
    ref_clip_size: int = CLIP_SIZE
    ref_place: str = "canvas"
    caption_key: str = "face_cap_qwen"
    max_retries: int = 10
    strict: bool = False
    load_background: bool = False
    load_subjects: bool = True
    load_frames: bool = True
    uint8_frames: bool = False  # frames as 0 .. 255: a quarter of the memory; the trainer normalises on the device
    with_content: bool = False  # meta["content"]: by kind of feature, a digest of all that its pixels come from
    cross_min_similarity: float = 0.6
    cross_max_similarity: float = 0.98
    recolour_probability: float = 0.0
    other_scene_probability: float = 0.0
    other_subject_probability: float = 0.0
    scenes: str | None = None
    generic_caption_probability: float = 0.0
    time_range: tuple[float, float] = (0.0, 1.0)
    only_keys: tuple[str, ...] = ()
    without_keys: tuple[str, ...] = ()
    keep_decoded: bool = False
    index_dir: str | None = None
    seed: int = 0


CODE_ONLY = {"seed", "time_range", "load_subjects", "load_frames", "uint8_frames", "with_content"}  # no settings


def as_tuple(value: Any) -> Any:
    """A list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def sample_options(options: dict[str, Any]) -> SampleOptions:
    """The options of a data set from its keyword arguments; TypeError for an unknown name."""
    known = {field.name for field in fields(SampleOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"unknown options {unknown}; known are {sorted(known)}")
    return SampleOptions(**{name: as_tuple(value) for name, value in options.items()})


def check_arguments(num_frames: int, sample_stride: int, max_subjects: int, selection: str) -> None:
    """ValueError for numbers and choices that no sample could be made with."""
    if selection not in SELECTIONS:
        raise ValueError(f"subject_selection {selection!r} is not one of {', '.join(SELECTIONS)}")
    if num_frames < 1 or sample_stride < 1 or max_subjects < 1:
        raise ValueError(
            f"num_frames {num_frames}, sample_stride {sample_stride} and max_subjects_per_sample {max_subjects} must "
            "be at least 1"
        )


def chosen_positions(annotations: Annotations, options: SampleOptions) -> list[int] | None:
    """Positions of the entries whose keys contain one of only_keys and none of without_keys; None for all."""
    if not options.only_keys and not options.without_keys:
        return None
    keys = [annotations.key(position) for position in range(len(annotations))]
    chosen = [
        position for position, key in enumerate(keys)
        if (not options.only_keys or any(text in key for text in options.only_keys)) and not any(text in key for text in
        options.without_keys)
    ]  # fmt: skip
    if not chosen:
        raise UserError(
            f"{annotations.path}: no entry is left by only_keys {list(options.only_keys)} and without_keys "
            f"{list(options.without_keys)}"
        )
    return chosen
