"""Frames of clips as the encoders want them, and pairs of them for phase 1.

A frame is uint8 (S, S, 3), cropped to the face and resized to the encoders' side.
"""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from float.config import DataConfig
from float.data.clips import Clip
from float.data.face import MARGIN, FaceBox, common_box, crop_square, default_detector, main_face
from float.data.media import (
    count_frames,
    iterate_frames,
    picture_span,
    read_audio,
    resize,
    scaled,
    seek_frame,
    sound_start,
)
from float.modules.audio import SAMPLE_RATE
from shared.errors import BadSample, UserError
from shared.rng import keyed_generator

MEMORY_LIMIT = 2 << 30  # bytes of decoded frames
LOOKS = 9  # frames of a clip in which the face is looked for
SQUARE = 0.02  # sides that differ by a smaller share count as equal
_PAIRS = 301  # random stream
JITTER = 0.3  # largest change of contrast, and of brightness on the scale [-1, 1]


class ClipReader:
    """Reads clips cropped to the face. One crop serves a whole clip; `notes` collects what a person should know.

    face_crop null: clips whose frames are square are cropped already, others are cropped; true: all are; false: none,
    and what is not square gives its centre square. A crop is by boxes.json, else by the face detector; a clip in which
    no face is found gives its centre square. Nothing is ever squeezed.
    """

    def __init__(self, size: int, data: DataConfig, boxes: dict[str, FaceBox]):
        self.size, self.data, self.boxes = size, data, boxes
        self.notes: list[str] = []
        self._crops: dict[str, FaceBox | None] = {}  # by clip id; None: the centre square

    def first(self, clip: Clip) -> int:
        """The first frame of the clip's clock that has both a picture and sound."""
        fps, picture, sound = self.data.video_fps, picture_span(clip.video).start, sound_start(clip.audio)
        start = max(picture, sound)
        if start * fps > 0.5:
            self.notes.append(
                f"{clip.clip_id}: the picture begins at {picture:.2f} s and the sound at {sound:.2f} s; "
                f"the first {start:.2f} s are left out"
            )
        return max(0, math.ceil(start * fps - 0.5 - 1e-6))

    def frames(self, clip: Clip, first: int = 0) -> Iterator[np.ndarray]:
        """All frames from `first` on, one after another."""
        for frame in iterate_frames(clip.video, self.data.video_fps, start=first / self.data.video_fps):
            yield self._ready(frame, clip)

    def sound(self, clip: Clip, first: int = 0) -> np.ndarray:
        """The sound from the beginning of frame `first` on, (n,), mono, 16 kHz."""
        return read_audio(clip.audio)[round(first / self.data.video_fps * SAMPLE_RATE) :]

    def frame(self, clip: Clip, index: int) -> np.ndarray:
        """One of the frames, by seeking in the file."""
        return self._ready(seek_frame(clip.video, (index + 0.5) / self.data.video_fps), clip)

    def _ready(self, frame: np.ndarray, clip: Clip) -> np.ndarray:
        if clip.clip_id not in self._crops:
            self._crops[clip.clip_id] = self._crop_of(clip, frame.shape)
        box = self._crops[clip.clip_id]
        if box is not None:
            try:
                return resize(crop_square(frame, box, margin=MARGIN), self.size)
            except UserError as error:
                raise BadSample(f"{clip.video}: {error}; mend its entry in boxes.json") from None
        height, width = frame.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return resize(frame[top : top + side, left : left + side], self.size)

    def _crop_of(self, clip: Clip, shape: tuple[int, ...]) -> FaceBox | None:
        """The face's box in a clip; None where the (centre) square is to be taken."""
        height, width = shape[:2]
        is_square = abs(height - width) <= SQUARE * max(height, width)
        wanted = not is_square if self.data.face_crop is None else self.data.face_crop
        if wanted and clip.clip_id in self.boxes:
            return self.boxes[clip.clip_id]
        detector = default_detector() if wanted else None
        reason = "the face is not looked for (face_crop false)" if not wanted else "there is no face detector"
        if detector is not None:
            found = []
            span = picture_span(clip.video)
            for place in range(LOOKS):
                time = span.start + (place + 0.5) / LOOKS * (span.end - span.start)
                face = main_face(detector(seek_frame(clip.video, time)))
                found += [] if face is None else [face.box]
            if len(found) > LOOKS // 3:
                return common_box(found)
            reason = f"a face is found in {len(found)} of {LOOKS} frames only"
        if not is_square:
            self.notes.append(f"{clip.clip_id}: {width} x {height} pixels, and {reason}; its centre square is taken")
        return None


def in_batches(frames: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """(n, S, S, 3), up to `count` frames at a time."""
    while part := list(islice(frames, count)):
        yield np.stack(part)


class FrameStore:
    """Random access to the frames of clips: in memory where they fit, else from the files by seeking."""

    def __init__(self, clips: list[Clip], size: int, data: DataConfig, boxes: dict[str, FaceBox]):
        self.clips, self.size, self.data = clips, size, data
        self.reader = ClipReader(size, data, boxes)
        self.counts = [count_frames(clip.video, data.video_fps) for clip in clips]
        self.in_memory = sum(self.counts) * size * size * 3 <= MEMORY_LIMIT
        self._frames: dict[int, np.ndarray] = {}

    def frame(self, clip: int, index: int) -> np.ndarray:
        """One frame; BadSample when the file cannot be read so far."""
        if self.in_memory:
            frames = self.all_frames(clip)
            return frames[min(index, len(frames) - 1)]
        return self.reader.frame(self.clips[clip], index)

    def all_frames(self, clip: int) -> np.ndarray:
        """The whole clip, (T, S, S, 3); kept when all clips fit into memory."""
        if clip in self._frames:
            return self._frames[clip]
        frames = list(self.reader.frames(self.clips[clip]))
        if not frames:
            raise BadSample(f"{self.clips[clip].video}: holds no frame")
        stacked = np.stack(frames)
        if self.in_memory:
            self._frames[clip] = stacked
        return stacked


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
        """The pair of one index in one epoch: source and driving uint8 (S, S, 3), and colour (2, 2, 3), of each the
        changes of contrast and brightness by channel.
        """
        generator = keyed_generator(self.seed, _PAIRS, epoch, index)
        draws = torch.rand(17, generator=generator, dtype=torch.float64).tolist()
        # stratified over the whole material, so that an epoch touches all of it
        position = (index + draws[0]) / self.length * int(self.ends[-1])
        clip = min(int(torch.searchsorted(self.ends, position, right=True)), len(self.ends) - 1)
        count = self.store.counts[clip]
        first, second = (int(draw * count) for draw in draws[1:3])
        frames = (np.require(self.store.frame(clip, index), requirements="W") for index in (first, second))
        pair = [torch.from_numpy(frame) for frame in frames]  # of the store's memory, where the frames lie there
        colour, data = torch.zeros(2, 2, 3), self.store.data
        if self.augment:
            flip, change, *shares = draws[3:]
            pair = [frame.flip(1) for frame in pair] if flip < data.horizontal_flip_prob else pair
            if change < data.color_jitter_prob:
                colour = JITTER * (2 * torch.tensor(shares).view(2, 2, 3) - 1)
        return {"source": pair[0], "driving": pair[1], "colour": colour}


def collate_pairs(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack a batch of pairs."""
    return {name: torch.stack([item[name] for item in items]) for name in ("source", "driving", "colour")}


def finished(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures of collated pairs, float32 (B, 3, S, S) in [-1, 1]: source and driving, each in colours of its own, then
    driving in the source's colours and source in the driving one's, which are to be made of them.

    What a mouth does must be read off any skin, and put on any other: so a pair becomes that of two people.
    """
    source, driving = (scaled(batch[name]).contiguous() for name in ("source", "driving"))
    own, others = batch["colour"].unbind(1)
    changed = _coloured(source, own), _coloured(driving, others)
    return *changed, _coloured(driving, own), _coloured(source, others)


def _coloured(picture: Tensor, colour_B23: Tensor) -> Tensor:
    contrast, brightness = colour_B23[..., None, None].unbind(1)
    return (picture * (1 + contrast) + brightness).clamp(-1, 1)
