"""Windows of encoded clips for phase 2 (float/data/features.py makes the cache)."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import default_collate

from float.config import DataConfig
from float.data.pose import MIRRORED, as_condition
from shared.data import BatchPlan, MapStream
from shared.engine.dist import DistInfo
from shared.errors import BadSample, UserError
from shared.rng import keyed_generator

_WINDOWS = 311  # random stream
Transform = Callable[[dict[str, Any]], dict[str, Any]]
BATCH_KEYS = (
    "motion_latent_cur",
    "motion_latent_prev",
    "audio_cur",
    "audio_prev",
    "reference_motion",
    "emotion_features",
    "has_previous",
    "motion_latent_prev_clean",
    "clip_id",
)


# --- rows of the features cached of a clip (float/data/features.py) ---------------------------------------------------
# Read without mapping the file: a window is a few short reads, where a mapping costs page faults and a view object for
# every tensor.

KINDS = {"F32": torch.float32, "F16": torch.float16, "BOOL": torch.bool}
HEADER_BYTES = 4096  # read at first; longer headers are read again
LONGEST_HEADER = 1 << 20  # a clip has a handful of tensors
# what a broken file raises, or one without a tensor; the last three where the header is JSON, but of other things
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class FeatureFile:
    """An open safetensors file: 8 bytes of length, a header in JSON, then the tensors' bytes.

    Raises one of UNREADABLE when it cannot be read or is not whole. A context manager.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._read_header()
        except BaseException:
            os.close(self._file)
            raise

    def _read_header(self) -> None:
        start = os.pread(self._file, HEADER_BYTES, 0)
        self._data = 8 + int.from_bytes(start[:8], "little")  # where the tensors begin
        if self._data > LONGEST_HEADER:
            raise ValueError("it has no header")
        if self._data > HEADER_BYTES:
            start = os.pread(self._file, self._data, 0)
        self._tensors: dict[str, Any] = json.loads(start[8 : self._data])
        self.metadata: dict[str, str] = self._tensors.pop("__metadata__", {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        os.close(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor."""
        return self._tensors[name]["shape"]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start .. stop of a tensor, in its stored type; all rows from `start` on when stop is None."""
        length, *rest = self.shape(name)
        stop = length if stop is None else min(stop, length)
        rows = torch.empty(stop - start, *rest, dtype=KINDS[self._tensors[name]["dtype"]])
        begin = self._data + self._tensors[name]["data_offsets"][0] + start * math.prod(rest) * rows.itemsize
        if os.preadv(self._file, [rows.numpy().data], begin) != rows.nbytes:
            raise ValueError(f"{name} is not whole")
        return rows


# --- windows ----------------------------------------------------------------------------------------------------------


class FLOATDataset:
    """Windows of L frames with the P frames before them.

    An item: motion_latent_cur (L, d), motion_latent_prev (P, d), audio_cur (L, F), audio_prev (P, F), reference_motion
    (d), emotion_features (1, 7), has_previous (bool: False where the window starts the clip and previous values are
    zero), motion_latent_prev_clean (P, d: without the noise that augmentation adds to the previous motion), clip_id;
    numbers are float32, but sample() leaves sound in the cache's type. Where the cache holds poses, also pose
    (P + L, 7), the head's against the reference frame (float/data/pose.py), zeros where there is no previous frame. A
    clip shorter than a window is filled up with its last frame. `transforms`: callables item -> item, run at the end of
    every item. `clips`: the ids that are taken from the folder; None: all.
    """

    def __init__(
        self,
        folder: Path | str,
        data: DataConfig,
        *,
        train: bool,
        seed: int = 0,
        transforms: Sequence[Transform] = (),
        clips: Sequence[str] | None = None,
    ):
        self.folder, self.data, self.train, self.seed = Path(folder), data, train, seed
        self.transforms = list(transforms)
        files = self.folder.glob("*.safetensors")
        self.paths = sorted(files if clips is None else [self.folder / f"{clip}.safetensors" for clip in clips])
        if not self.paths:
            raise UserError(
                f"{folder}: no encoded clips; run float/precompute.py, or give --data-root and let float/train.py do it"
            )
        self.windows: list[tuple[int, int]] = []  # (clip, first frame)
        for clip, path in enumerate(self.paths):
            frames = self._frames(path)
            starts = range(0, max(1, frames - data.sequence_length + 1), data.sequence_length)
            self.windows += [(clip, start) for start in starts]
        self.fingerprint = f"{len(self.paths)} clips, {len(self.windows)} windows of {data.sequence_length}"

    @staticmethod
    def _frames(path: Path) -> int:
        try:
            with FeatureFile(path) as file:
                shape = file.shape("motion")
        except UNREADABLE as error:
            raise UserError(f"{path}: not a readable cache of features ({error}); delete it and run again") from None
        if len(shape) != 2 or shape[0] < 1:
            raise UserError(
                f"{path}: motion has shape {tuple(shape)}, (frames, width) expected; delete it and run again"
            )
        return shape[0]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _in_float32(self.sample(index, 0))

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """One window. Training: start, reference frame, mirror and noise are drawn by (seed, epoch, index); else all
        fixed.
        """
        clip, start = self.windows[index]
        path = self.paths[clip]
        draws = torch.rand(
            5, generator=keyed_generator(self.seed, _WINDOWS, epoch, index), dtype=torch.float64
        ).tolist()
        try:
            with FeatureFile(path) as file:
                item = self._read(file, start, draws)
                item["clip_id"] = file.metadata.get("clip_id", path.stem)
        except UNREADABLE as error:
            raise BadSample(f"{path}: not a readable cache of features ({error}); delete it and run again") from None
        for name, value in item.items():
            # a sum is finite only if all are, and is had in one pass over the numbers
            if isinstance(value, Tensor) and not math.isfinite(value.sum(dtype=torch.float32).item()):
                raise BadSample(
                    f"{path}: {name} holds numbers that are not finite; "
                    "delete the file and run float/precompute.py again"
                )
        if self.train and self.data.use_augmentation and draws[3] < self.data.gaussian_noise_prob:
            item = self._with_noise(item, index, epoch)
        for transform in self.transforms:
            item = transform(_in_float32(item))
        return item

    def _read(self, file: FeatureFile, start: int, draws: list[float]) -> dict[str, Any]:
        length, before = self.data.sequence_length, self.data.prev_frames
        mirrored = (
            self.train
            and self.data.use_augmentation
            and draws[2] < self.data.horizontal_flip_prob
            and "motion_flipped" in file
        )
        motion = "motion_flipped" if mirrored else "motion"
        frames = file.shape(motion)[0]
        reference = 0
        if self.train:
            start = int(draws[0] * (max(0, frames - length) + 1))
            reference = int(draws[1] * frames)
        item = {
            "reference_motion": file.rows(motion, reference, reference + 1)[0].float(),
            "emotion_features": file.rows("emotion").float()[None],
            "has_previous": torch.tensor(start >= before),
        }
        item["motion_latent_prev"], item["motion_latent_cur"] = _around(file, motion, start, before, length)
        item["motion_latent_prev_clean"] = item["motion_latent_prev"]
        item["audio_prev"], item["audio_cur"] = _around(file, "audio_raw", start, before, length)
        if "pose" in file:
            item["pose"] = self._pose(file, start, reference, mirrored=mirrored)
        return item

    def _pose(self, file: FeatureFile, start: int, reference: int, *, mirrored: bool) -> Tensor:
        length, before = self.data.sequence_length, self.data.prev_frames
        own = file.rows("pose", reference, reference + 1)
        previous, current = (
            as_condition((rows - own) * (MIRRORED if mirrored else 1))
            for rows in _around(file, "pose", start, before, length)
        )
        return torch.cat([previous * (start >= before), current])

    def _with_noise(self, item: dict[str, Any], index: int, epoch: int) -> dict[str, Any]:
        """Noise on the previous motion: in sampling it comes from the model itself and is never clean."""
        previous = item["motion_latent_prev"]
        generator = keyed_generator(self.seed, _WINDOWS, epoch, index, 1)
        noise = torch.randn(previous.shape, generator=generator)
        scale = self.data.gaussian_noise_std * item["motion_latent_cur"].std()
        return {**item, "motion_latent_prev": previous + scale * noise * item["has_previous"]}

    def all_motion(self, *, centred: bool = False) -> Tensor:
        """Motion latents of all frames of all clips, (frames, d); centred: minus the mean of each clip."""
        parts = []
        for path in self.paths:
            with FeatureFile(path) as file:
                motion = file.rows("motion").float()
                parts.append(motion - motion.mean(0) if centred else motion)
        return torch.cat(parts)

    def poses(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Motion latents (T, d) and head poses (T, 6) of each clip that has poses."""
        for path in self.paths:
            with FeatureFile(path) as file:
                if "pose" in file:
                    yield file.rows("motion").float(), file.rows("pose")


def _around(file: FeatureFile, name: str, start: int, before: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows start - before .. start and start .. start + count of a stored tensor, from one read.

    Zeros stand for the rows before where they begin before the clip; the last row is repeated where it ends.
    """
    first = start - before if start >= before else start
    rows = file.rows(name, first, start + count)
    missing = start + count - first - len(rows)
    if missing > 0:
        rows = torch.cat([rows, rows[-1:].expand(missing, -1)])
    previous = rows[:before] if start >= before else rows.new_zeros(before, rows.shape[1])
    return previous, rows[-count:]


def _in_float32(item: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in item.items()
    }


def collate_windows(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack a batch; clip ids stay a list."""
    return {
        name: [item[name] for item in items] if name == "clip_id" else default_collate([item[name] for item in items])
        for name in BATCH_KEYS + (("pose",) if all("pose" in item for item in items) else ())
    }


class WindowLoader(MapStream):
    """The stream of batches, which can also be gone through epoch by epoch, as torch's DataLoader."""

    epoch = 0  # that the next iteration reads

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.plan.accumulation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.start(self.epoch * self.plan.steps_per_epoch)
        self.epoch += 1
        try:
            for _ in range(self.plan.steps_per_epoch):
                yield from self.next_step()
        finally:
            self.close()


def create_dataloader(
    dataset: FLOATDataset,
    *,
    batch_size: int = 8,
    info: DistInfo | None = None,
    accumulation: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    shuffle: bool = True,
    drop_last: bool = True,
    bad_samples: Path | None = None,
) -> "WindowLoader":
    """Batches over a data set: cut over ranks, ordered by (seed, epoch), the same with any number of workers. For the
    loop a stream; `for batch in create_dataloader(dataset, batch_size=4)` goes through one epoch.
    """
    info = info or DistInfo()
    plan = BatchPlan(len(dataset), batch_size, info.world, accumulation, seed, drop_last=drop_last, shuffle=shuffle)
    return WindowLoader(
        dataset,
        plan,
        info,
        collate=collate_windows,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        bad_samples=bad_samples,
    )
