"""Keeping a portrait's head where it is: of every generated frame only a part is used, laid onto the portrait.

Needs no training and works with every checkpoint. Pictures: uint8 (S, S, 3). Coordinates: x right, y down, -1 to 1 from
edge to edge; boxes: left, top, right, bottom as shares of the side.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from float.config import DataConfig
from float.data.face import default_detector, main_face
from float.data.media import to_tensor

MOVING = ("all", "face", "lips")
SIDES, ROUNDS = (24, 48), 12  # sizes in which a frame is aligned, coarse to fine, and corrections in each
FARTHEST = 0.5  # displacement, tilt or change of size from which on an alignment is not believed
EDGE = 0.35  # share of a part's half width over which it fades into the portrait


class StillHead:
    """Generated frame -> the portrait in which only the face, or only the lips, move.

    picture: the portrait as it was encoded. rest: what the decoder makes of it without any change, which generated
    frames resemble. moving: face or lips.
    """

    def __init__(self, picture: np.ndarray, rest: np.ndarray, moving: str, data: DataConfig, *, has_face: bool):
        lips, face = parts_of(picture, data, has_face=has_face)
        self.picture = to_tensor(picture)[None]
        self.mask = fading(lips if moving == "lips" else face, len(picture))
        self.turn = torch.eye(3, dtype=torch.float64)  # of the last frame, where the next one's search begins
        # the head is aligned by what does not move with speech
        self.levels = [_Level(to_tensor(rest)[None], fading(face, s) * (1 - fading(lips, s)), s) for s in SIDES]

    @torch.no_grad()
    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """The portrait with that part of a frame."""
        image = to_tensor(frame)[None]
        turn = self.turn
        for level in self.levels:
            turn = level.align(image, turn)
        first, last = torch.eye(3, dtype=torch.float64), self.levels[-1]
        near = bool(((turn - first).abs() < FARTHEST).all())
        self.turn = turn if near and last.error(image, turn) <= last.error(image, first) else first
        moved = warped(image, self.turn)
        # one colour for both along the seam
        seam = self.mask * (1 - self.mask)
        moved = moved + ((self.picture - moved) * seam).sum((2, 3), keepdim=True) / seam.sum()
        both = self.mask * moved.clamp(-1, 1) + (1 - self.mask) * self.picture
        return ((both[0] + 1) * 127.5).round().byte().movedim(0, -1).numpy()


def parts_of(picture: np.ndarray, data: DataConfig, *, has_face: bool) -> tuple[list[float], list[float]]:
    """Boxes of the lips and of the face: by the detector's points where it finds a face, else where the training clips
    have theirs.
    """
    detector = default_detector() if has_face else None
    found = main_face(detector(picture)) if detector is not None else None
    if found is None:
        both = data.mouth_box, data.eye_box
        return data.mouth_box, [f(box[k] for box in both) for k, f in enumerate((min, min, max, max))]
    corners, side = found.points[3:] / len(picture), len(picture)
    (x, y), width = corners.mean(0), float(np.linalg.norm(corners[1] - corners[0]))
    y = y + 0.15 * width  # a jaw drops
    return [x - width, y - 0.8 * width, x + width, y + 0.8 * width], [edge / side for edge in found.box]


def fading(box: list[float], side: int) -> Tensor:
    """(1, 1, side, side): 1 in the middle of a box, 0 outside it, falling evenly between."""
    left, top, right, bottom = box
    centre = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    x = (2 * centre - left - right) / (right - left)
    y = (2 * centre - top - bottom) / (bottom - top)
    distance = (x[None] ** 4 + y[:, None] ** 4) ** 0.25
    return ((1 - distance) / EDGE).clamp(0, 1)[None, None]


def warped(image: Tensor, turn: Tensor) -> Tensor:
    """The image (1, 3, S, S) whose place x shows what was at turn x; its edge repeated."""
    grid = F.affine_grid(turn[None, :2].float(), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


class _Level:
    """Displacement, tilt and size of a frame against the picture at rest, by Gauss and Newton's method in one size
    (inverse compositional alignment; Baker and Matthews 2004). Brightness may differ.
    """

    def __init__(self, rest: Tensor, weight: Tensor, side: int):
        self.side, self.weight = side, weight[0, 0].double().flatten()
        self.rest = self._grey(rest)
        step = 2 / side
        gy, gx = torch.gradient(self.rest, spacing=step)
        y, x = torch.meshgrid(*[(torch.arange(side, dtype=torch.float64) + 0.5) * step - 1] * 2, indexing="ij")
        columns = [gx, gy, gy * x - gx * y, gx * x + gy * y, torch.ones_like(x)]
        self.slopes = torch.stack([column.flatten() for column in columns], 1)
        weighted = self.slopes * self.weight[:, None]
        self.solve = torch.linalg.pinv(self.slopes.T @ weighted) @ weighted.T

    def _grey(self, image: Tensor) -> Tensor:
        return F.interpolate(image, (self.side, self.side), mode="area").mean((0, 1)).double()

    def _difference(self, image: Tensor, turn: Tensor) -> Tensor:
        small = F.interpolate(image, (self.side, self.side), mode="area")
        return (self._grey(warped(small, turn)) - self.rest).flatten()

    def align(self, image: Tensor, turn: Tensor) -> Tensor:
        """A better turn (3, 3)."""
        for _ in range(ROUNDS):
            x, y, tilt, size, _ = (self.solve @ self._difference(image, turn)).tolist()
            change = torch.tensor([[1 + size, -tilt, x], [tilt, 1 + size, y], [0, 0, 1]], dtype=torch.float64)
            turn = turn @ torch.linalg.inv(change)
        return turn

    def error(self, image: Tensor, turn: Tensor) -> float:
        """What is left between them, but for brightness."""
        left = self._difference(image, turn)
        mean = (left * self.weight).sum() / self.weight.sum()
        return float((self.weight * (left - mean).square()).sum())
