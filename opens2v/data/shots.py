"""Looking at raw videos: where they are cut, and how good a picture of a subject a frame gives."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opens2v.data.video import fit_frame, frame_times, read_frames

_SMALL = (36, 64)  # a frame as it is compared with the next one
_LEAST_CHANGE = 12.0  # grey levels between two frames of one shot that no cut stays below
_OVER_NEIGHBOURS = 4.0  # how far a cut stands out from the changes around it


@dataclass(frozen=True)
class Shot:
    """Frames [start, end) without a cut."""

    start: int
    end: int


def find_shots(path: str | Path) -> tuple[list[Shot], np.ndarray]:
    """(shots, seconds of each frame). A cut is a change that stands out from those around it, however the camera moves.

    Raises BadSample for a video that cannot be read.
    """
    seconds = frame_times(path)
    small = read_frames(path, range(len(seconds)), lambda frame: fit_frame(frame, *_SMALL)).astype(np.float32)
    grey = small.mean(-1)
    change = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    colours = np.stack([_histogram(frame) for frame in small])
    mixed = 0.5 * np.abs(np.diff(colours, axis=0)).sum(1)  # 0: the same colours, 1: none in common
    cuts = [0]
    for place in range(len(change)):
        around = np.concatenate([change[max(0, place - 4) : place], change[place + 1 : place + 5]])
        usual = float(np.median(around)) if len(around) else 0.0
        if change[place] > _LEAST_CHANGE and change[place] > _OVER_NEIGHBOURS * usual and mixed[place] > 0.25:
            cuts.append(place + 1)
    return [Shot(*ends) for ends in zip(cuts, [*cuts[1:], len(seconds)], strict=True)], seconds


def _histogram(frame: np.ndarray) -> np.ndarray:
    cells = (frame // 64).astype(int)
    index = cells[..., 0] * 16 + cells[..., 1] * 4 + cells[..., 2]
    return np.bincount(index.ravel(), minlength=64) / index.size


def sharpness(picture: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Spread of the Laplacian of the grey picture (H, W, 3), inside a bool mask (H, W): blur brings it towards 0."""
    grey = picture.astype(np.float32).mean(-1)
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    inside = np.ones_like(inner, bool) if mask is None else mask[1:-1, 1:-1].astype(bool)
    return float(laplacian[inside].std()) if inside.any() else 0.0


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, float(width)) * max(0.0, float(height))
    areas = sum(float((box[2] - box[0]) * (box[3] - box[1])) for box in (one, other))
    return both / (areas - both) if areas > both else 0.0
