"""The pose of a head in a clip's frames against its pose in another frame: six values, without a detector.

The face is taken for an ellipsoid that turns, tilts, moves and grows; the values that make a frame look like the
other one are found by least squares on the brightness, coarse to fine (Lucas and Kanade 1981; rigid models of heads:
Basu, Essa and Pentland 1996). Coordinates: x right, y down, -1 to 1 from edge to edge.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from float.config import DataConfig
from float.data.media import to_tensor

VALUES = 6  # yaw, pitch, roll, x, y, size
POSE_WIDTH = VALUES + 1  # as a condition: the values, and 1 where they are known; a row of zeros says nothing
GAINS = torch.tensor([15.0, 20, 30, 80, 80, 80])  # one over the deviations within clips of talking heads
MIRRORED = torch.tensor([-1.0, 1, -1, -1, 1, 1])  # the pose of a mirrored frame is the pose times this
SIDES, ROUNDS = (16, 32, 48), 8  # sizes in which frames are aligned, coarse to fine, and corrections in each
EDGE = 0.35  # share of a part's half width over which its weight fades
FARTHEST = 0.6  # values beyond are not believed
RIDGE = 1e-3  # of the least squares, as a share of its mean curvature


def fading(box: list[float], side: int) -> Tensor:
    """(1, 1, side, side): 1 in the middle of a box, 0 outside it, falling evenly between."""
    left, top, right, bottom = box
    centre = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    x = (2 * centre - left - right) / (right - left)
    y = (2 * centre - top - bottom) / (bottom - top)
    distance = (x[None] ** 4 + y[:, None] ** 4) ** 0.25
    return ((1 - distance) / EDGE).clamp(0, 1)[None, None]


def face_box(data: DataConfig) -> list[float]:
    """Where the clips' faces are: around eyes and mouth."""
    both = data.mouth_box, data.eye_box
    return [f(box[k] for box in both) for k, f in enumerate((min, min, max, max))]


def as_condition(pose: Tensor) -> Tensor:
    """Pose (..., 6) -> what the transformer is given of it, (..., 7)."""
    return torch.cat([GAINS * pose, torch.ones_like(pose[..., :1])], -1)


def from_condition(condition: Tensor) -> Tensor:
    """The pose (..., 6) of such a row."""
    return condition[..., :VALUES] / GAINS.to(condition.device)


class HeadTracker:
    """Frames (T, 3, S, S) in [-1, 1] -> pose (T, 6) against one frame, `rest` (3, S, S).

    face, mouth: their boxes in that frame, left, top, right, bottom as shares of the side.
    """

    def __init__(self, rest: Tensor, face: list[float], mouth: list[float]):
        self.levels = [_Level(rest[None], face, mouth, side) for side in SIDES]

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """yaw, pitch, roll in radians: positive looks to the right of the picture, down, leans clockwise; x, y in half
        sides; size: the logarithm of how much larger it is. Of small turns; the mouth does not count.
        """
        pose = torch.zeros(len(frames), VALUES, dtype=torch.float64)
        for level in self.levels:
            pose = level.align(frames, pose)
        return pose.float()

    @torch.no_grad()
    def aligned(self, frames: Tensor) -> Tensor:
        """The frames with the head where `rest` has it; as they are where that is no better, or far."""
        fine, pose = self.levels[-1], self(frames).double()
        better = fine.error(frames, pose) < (1 - 1e-6) * fine.error(frames, 0 * pose)
        pose = pose * (better & (pose.abs() < FARTHEST).all(1))[:, None]
        coarse = fine.places(pose).float().movedim(-1, 1)
        places = F.interpolate(coarse, frames.shape[-2:], mode="bilinear", align_corners=False).movedim(1, -1)
        moved = F.grid_sample(frames, places, padding_mode="border", align_corners=False)
        return torch.where((pose != 0).any(1)[:, None, None, None], moved, frames)


def clip_tracker(first: np.ndarray, data: DataConfig) -> HeadTracker:
    """Poses of a clip's frames against its first one, uint8 (S, S, 3)."""
    return HeadTracker(to_tensor(first), face_box(data), data.mouth_box)


class _Level:
    def __init__(self, rest: Tensor, face: list[float], mouth: list[float], side: int):
        self.side = side
        self.rest = self._grey(rest)[0]
        axis = (torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        left, top, right, bottom = (2 * edge - 1 for edge in face)
        self.x, self.y = x - (left + right) / 2, y - (top + bottom) / 2
        radius = (right - left) / 2
        ball = 1 - (self.x / (1.2 * radius)) ** 2 - (self.y / (0.6 * (bottom - top))) ** 2
        # by what does not move with speech
        weight = (fading(face, side) * (1 - fading(mouth, side)))[0, 0].double()
        self.weight = weight.flatten()
        depth = radius * ball.clamp(min=0).sqrt()
        self.depth = depth - (depth * weight).sum() / weight.sum()
        self.centre = (left + right) / 2, (top + bottom) / 2
        gy, gx = torch.gradient(self.rest, spacing=2 / side)
        slopes = [gx * self.depth, gy * self.depth, gy * self.x - gx * self.y, gx, gy, gx * self.x + gy * self.y]
        columns = torch.stack([*slopes, torch.ones_like(x), self.rest], -1).flatten(0, 1)  # brightness, contrast
        weighted = columns * self.weight[:, None]
        curvature = columns.T @ weighted
        scale = curvature.diagonal().clamp(min=1e-9).sqrt()
        normed = curvature / (scale * scale[:, None]) + RIDGE * torch.eye(len(scale), dtype=torch.float64)
        self.solve = (torch.linalg.solve(normed, (weighted / scale).T) / scale[:, None])[:VALUES]

    def _grey(self, images: Tensor) -> Tensor:
        return F.interpolate(images, (self.side, self.side), mode="area").mean(1).double()

    def align(self, frames: Tensor, pose: Tensor) -> Tensor:
        """A better pose (T, 6)."""
        grey = self._grey(frames)[:, None]
        for _ in range(ROUNDS):
            pose = (pose - self._differences(grey, pose) @ self.solve.T).clamp(-FARTHEST, FARTHEST)
        return pose

    def error(self, frames: Tensor, pose: Tensor) -> Tensor:
        """(T,): what is left between them, but for brightness."""
        left = self._differences(self._grey(frames)[:, None], pose)
        mean = (left * self.weight).sum(1, keepdim=True) / self.weight.sum()
        return (self.weight * (left - mean).square()).sum(1)

    def _differences(self, grey: Tensor, pose: Tensor) -> Tensor:
        moved = F.grid_sample(grey, self.places(pose), padding_mode="border", align_corners=False)[:, 0]
        return (moved - self.rest).flatten(1)

    def places(self, pose: Tensor) -> Tensor:
        """(T, side, side, 2): where the frames of these poses show what the other frame has at each place."""
        yaw, pitch, roll, right, down, size = (value[:, None, None] for value in pose.unbind(1))
        x, y = self.x + yaw * self.depth, self.y + pitch * self.depth
        cos, sin = roll.cos() * size.exp(), roll.sin() * size.exp()
        return torch.stack([cos * x - sin * y + self.centre[0] + right, sin * x + cos * y + self.centre[1] + down], -1)
