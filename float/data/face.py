"""Cropping a picture to the face, as the released inference does.

There is no face detector in this repository. A box comes from `--face-box`, from boxes.json beside the clips, or from
a detector function that the caller hands in; without any of them the centre square is taken, and a warning says so.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from float.data.media import resize
from shared.errors import UserError

DETECTION_HEIGHT = 360
MARGIN = 1.6
MIN_SCORE = 0.95
FaceBox = tuple[float, float, float, float]  # left, top, right, bottom in pixels
# picture -> boxes (n, 5): left, top, right, bottom, score
Detector = Callable[[np.ndarray], np.ndarray]


def detect_face(picture: np.ndarray, detector: Detector, name: str = "picture") -> FaceBox:
    """The first box with a score above 0.95, found at height 360 and mapped back. UserError when there is no face."""
    scale = DETECTION_HEIGHT / picture.shape[0]
    width = max(1, round(picture.shape[1] * scale))
    small = np.asarray(Image.fromarray(picture).resize((width, DETECTION_HEIGHT)))
    for left, top, right, bottom, score in np.asarray(detector(small)).reshape(-1, 5):
        if score > MIN_SCORE:
            return left / scale, top / scale, right / scale, bottom / scale
    raise UserError(f"{name}: no face found; use another picture, give --face-box left,top,right,bottom, or --no-crop")


def crop_to_box(picture: np.ndarray, box: FaceBox, size: int) -> np.ndarray:
    """A square around the box's centre, 1.6 times its longer half side each way, zeros outside, to size x size."""
    left, top, right, bottom = box
    if not (right > left and bottom > top):
        raise UserError(
            f"face box {box}: left, top, right, bottom in pixels expected, with right > left and bottom > top"
        )
    half_w, half_h = int((right - left) / 2), int((bottom - top) / 2)
    centre_x, centre_y = int((left + right) / 2), int((top + bottom) / 2)
    half = int(max(half_w, half_h) * MARGIN)
    if half < 1 or not (0 <= centre_x < picture.shape[1] and 0 <= centre_y < picture.shape[0]):
        raise UserError(
            f"face box {box}: lies outside the picture of {picture.shape[1]} x {picture.shape[0]} pixels, or is empty"
        )
    padded = np.pad(picture, ((half, half), (half, half), (0, 0)))
    # (centre - half) + half: the border moves the origin by as much as the crop reaches back
    square = padded[centre_y : centre_y + 2 * half, centre_x : centre_x + 2 * half]
    return resize(square, size)


def crop_centre(picture: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, resized."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(picture[top : top + side, left : left + side], size)


def prepare_picture(
    picture: np.ndarray,
    size: int,
    *,
    crop: bool = True,
    box: FaceBox | None = None,
    detector: Detector | None = None,
    name: str = "picture",
) -> np.ndarray:
    """The picture as the encoders want it, uint8 (size, size, 3). crop=False: the whole one, squeezed to a square."""
    if not crop:
        return resize(picture, size)
    if box is None and detector is not None:
        box = detect_face(picture, detector, name)
    if box is not None:
        return crop_to_box(picture, box, size)
    warnings.warn(
        f"{name}: no face box and no detector, the centre square is used; give --face-box or --no-crop", stacklevel=2
    )
    return crop_centre(picture, size)


def read_boxes(root: Path) -> dict[str, FaceBox]:
    """boxes.json of a data folder: clip id -> left, top, right, bottom in pixels of its frames; {} without the file."""
    path = root / "boxes.json"
    if not path.exists():
        return {}
    try:
        boxes = json.loads(path.read_text(encoding="utf-8"))
        return {
            clip: (float(left), float(top), float(right), float(bottom))
            for clip, (left, top, right, bottom) in boxes.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected {{clip id: [left, top, right, bottom]}} ({error})") from None
