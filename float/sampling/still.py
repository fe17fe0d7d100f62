"""Keeping a portrait's head where it is: of every generated frame only a part is used, laid onto the portrait.

Needs no training and works with every checkpoint. Pictures: uint8 (S, S, 3).
Boxes: left, top, right, bottom as shares of the side.
"""

import numpy as np
import torch

from float.config import DataConfig
from float.data.face import default_detector, main_face
from float.data.media import to_tensor
from float.data.pose import HeadTracker, face_box, fading

MOVING = ("all", "face", "lips")


class StillHead:
    """Generated frame -> the portrait in which only the face, or only the lips, move.

    picture: the portrait as it was encoded. rest: what the decoder makes of it without any change, which generated
    frames resemble. moving: face or lips.
    """

    def __init__(self, picture: np.ndarray, rest: np.ndarray, moving: str, data: DataConfig, *, has_face: bool):
        lips, face = parts_of(picture, data, has_face=has_face)
        self.picture = to_tensor(picture)[None]
        self.mask = fading(lips if moving == "lips" else face, len(picture))
        self.tracker = HeadTracker(to_tensor(rest), face, lips)

    @torch.no_grad()
    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """The portrait with that part of a frame."""
        moved = self.tracker.aligned(to_tensor(frame)[None])
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
        return data.mouth_box, face_box(data)
    corners, side = found.points[3:] / len(picture), len(picture)
    (x, y), width = corners.mean(0), float(np.linalg.norm(corners[1] - corners[0]))
    y = y + 0.15 * width  # a jaw drops
    return [x - width, y - 0.8 * width, x + width, y + 0.8 * width], [edge / side for edge in found.box]
