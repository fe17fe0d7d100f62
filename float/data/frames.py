"""Frames of clips for phase 1: in memory where they fit, else read from the files by seeking.

A frame is uint8 (S, S, 3), cropped to the face and resized to the encoders' side.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from float.config import DataConfig
from float.data.clips import Clip
from float.data.face import FaceBox, prepare_picture
from float.data.media import iterate_frames, resize, scaled
from shared.errors import BadSample
from shared.rng import keyed_generator

MEMORY_LIMIT = 2 << 30  # bytes of decoded frames
_PAIRS = 301  # random stream
JITTER = 0.2  # largest change of contrast, and of brightness on the scale [-1, 1]


def clip_frames(clip: Clip, size: int, data: DataConfig, boxes: dict[str, FaceBox]) -> Iterator[np.ndarray]:
    """All frames of a clip, one after another, ready for the encoder. One box serves the whole clip."""
    for frame in iterate_frames(clip.video, data.video_fps):
        yield _ready(frame, clip, size, data, boxes)


def _ready(frame: np.ndarray, clip: Clip, size: int, data: DataConfig, boxes: dict[str, FaceBox]) -> np.ndarray:
    if not data.face_crop:
        return resize(frame, size)
    return prepare_picture(frame, size, box=boxes.get(clip.clip_id), name=str(clip.video))


class FrameStore:
    """Random access to the frames of clips."""

    def __init__(self, clips: list[Clip], size: int, data: DataConfig, boxes: dict[str, FaceBox]):
        self.clips, self.size, self.data, self.boxes = clips, size, data, boxes
        self.counts = [count_frames(clip, data.video_fps) for clip in clips]
        self.in_memory = sum(self.counts) * size * size * 3 <= MEMORY_LIMIT
        self._frames: dict[int, np.ndarray] = {}

    def frame(self, clip: int, index: int) -> np.ndarray:
        """One frame; BadSample when the file cannot be read so far."""
        if self.in_memory:
            frames = self.all_frames(clip)
            return frames[min(index, len(frames) - 1)]
        return _ready(
            seek_frame(self.clips[clip].video, (index + 0.5) / self.data.video_fps),
            self.clips[clip],
            self.size,
            self.data,
            self.boxes,
        )

    def all_frames(self, clip: int) -> np.ndarray:
        """The whole clip, (T, S, S, 3); kept when all clips fit into memory."""
        if clip in self._frames:
            return self._frames[clip]
        frames = list(clip_frames(self.clips[clip], self.size, self.data, self.boxes))
        if not frames:
            raise BadSample(f"{self.clips[clip].video}: holds no frame")
        stacked = np.stack(frames)
        if self.in_memory:
            self._frames[clip] = stacked
        return stacked


def count_frames(clip: Clip, fps: float) -> int:
    """Frames of a clip at `fps`, from the file's head; 0 when it cannot be read."""
    try:
        with av.open(str(clip.video)) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate
            if stream.frames and rate is not None:
                return max(1, round(stream.frames / float(rate) * fps))
            return max(1, round((container.duration or 0) / 1e6 * fps))
    except (av.FFmpegError, IndexError, FileNotFoundError):
        return 0


def seek_frame(path: Path, seconds: float) -> np.ndarray:
    """The frame shown at a time, uint8 (H, W, 3)."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(int(seconds / stream.time_base), stream=stream)
            picture = None
            for frame in container.decode(stream):
                if picture is not None and frame.time is not None and frame.time > seconds:
                    break
                picture = frame
    except (av.FFmpegError, IndexError) as error:
        raise BadSample(f"{path}: cannot be read as video ({error})") from None
    if picture is None:
        raise BadSample(f"{path}: holds no frame at {seconds:.2f} s")
    return picture.to_ndarray(format="rgb24")


class FramePairs:
    """Pairs (source, driving) of two random frames of one clip, as they are kept: a quarter of the bytes of pictures in
    float32, which `finished` makes of a batch on its device.
    """

    def __init__(self, store: FrameStore, *, pairs_per_second: float, seed: int, augment: bool):
        self.store, self.seed, self.augment = store, seed, augment
        counts = torch.tensor(store.counts)
        self.length = max(1, int(counts.sum() / store.data.video_fps * pairs_per_second))
        self.ends = counts.cumsum(0)
        self.fingerprint = "-".join(str(value) for value in (len(counts), int(counts.sum()), store.size))

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        """The pair of one index in one epoch: source and driving uint8 (S, S, 3), and colour (2, 3), the changes of
        contrast and brightness by channel.
        """
        generator = keyed_generator(self.seed, _PAIRS, epoch, index)
        draws = torch.rand(11, generator=generator, dtype=torch.float64).tolist()
        # stratified over the whole material, so that an epoch touches all of it
        position = (index + draws[0]) / self.length * int(self.ends[-1])
        clip = min(int(torch.searchsorted(self.ends, position, right=True)), len(self.ends) - 1)
        count = self.store.counts[clip]
        first, second = (int(draw * count) for draw in draws[1:3])
        frames = (np.require(self.store.frame(clip, index), requirements="W") for index in (first, second))
        pair = [torch.from_numpy(frame) for frame in frames]  # of the store's memory, where the frames lie there
        colour, data = torch.zeros(2, 3), self.store.data
        if self.augment:  # the same for both pictures
            flip, change, *shares = draws[3:]
            pair = [frame.flip(1) for frame in pair] if flip < data.horizontal_flip_prob else pair
            if change < data.color_jitter_prob:
                colour = JITTER * (2 * torch.tensor(shares).view(2, 3) - 1)
        return {"source": pair[0], "driving": pair[1], "colour": colour}


def collate_pairs(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack a batch of stored pairs."""
    return {name: torch.stack([item[name] for item in items]) for name in ("source", "driving", "colour")}


def finished(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Source and driving pictures, float32 (B, 3, S, S) in [-1, 1], of stored pairs, with their change of colour."""
    contrast, brightness = batch["colour"][..., None, None].unbind(1)
    pictures = (scaled(batch[name]).contiguous() for name in ("source", "driving"))
    source, driving = ((picture * (1 + contrast) + brightness).clamp(-1, 1) for picture in pictures)
    return source, driving
