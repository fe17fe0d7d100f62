"""Where in a raw video one face speaks: shots, the face followed through them, parts with sound.

Times are seconds on the file's clock. Frames: uint8 (H, W, 3) RGB.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from float.data.face import Face, FaceBox, FaceDetector, common_box, main_face, turned, upright_turn
from float.data.media import iterate_frames
from float.modules.audio import SAMPLE_RATE

FPS = 25.0
LOOK_EVERY = 5  # frames between looks for the face
THUMBNAIL = (48, 27)  # of a frame, for cuts
CUT, CUT_OVER_MOTION = 9.0, 4.0  # mean grey levels that a cut changes, and over the shot's usual change
BLACK = 12.0  # mean grey level below which there is no picture
LOST_LOOKS = 3  # looks without the face that end a part
SAME_FACE = 0.3  # overlap of a face with itself from look to look
KEPT_LOOKS, TURN_LOOKS = 8, 3  # pictures kept of a shot, and of these turned to see which way is up
QUIET_DB, FLOOR_DB = 35.0, -55.0  # below the loud parts, and of full scale: nobody speaks
PAUSE_SECONDS, PAD_SECONDS = 1.0, 0.2  # a longer pause is left out but for so much at its ends


@dataclass
class Look:
    """The face at one moment; None where none is found."""

    time: float
    face: Face | None


@dataclass
class Shot:
    """A stretch without a cut."""

    start: float
    end: float
    looks: list[Look] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)
    turns: int = 0  # quarter turns, counter-clockwise, that bring the picture upright
    shape: tuple[int, ...] = (0, 0)  # height and width of the upright picture


@dataclass
class Part:
    """One face speaking, as one clip: its time, its box in the (turned) picture, and the faces seen."""

    start: float
    end: float
    faces: list[Face]
    turns: int
    shape: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def box(self) -> FaceBox:
        return common_box(face.box for face in self.faces)


def find_shots(path: Path, detector: FaceDetector) -> Iterator[Shot]:
    """The shots of a video with what the detector sees in them; black stretches are none. Raises BadSample."""
    shot: Shot | None = None
    before: np.ndarray | None = None
    changes: list[float] = []
    for index, frame in enumerate(iterate_frames(path, FPS)):
        time = index / FPS
        grey = np.asarray(Image.fromarray(frame).convert("L").resize(THUMBNAIL, Image.Resampling.BOX), np.float32)
        change = 0.0 if before is None or before.shape != grey.shape else float(np.abs(grey - before).mean())
        usual = float(np.median(changes[-25:])) if changes else 0.0
        is_cut = change > CUT and change > CUT_OVER_MOTION * usual
        before = grey
        changes.append(change)
        if grey.mean() < BLACK or is_cut:
            if shot is not None:
                shot.end = time
                yield _upright(shot, path, detector)
            shot, changes = None, []
            if grey.mean() < BLACK:
                continue
        if shot is None:
            shot = Shot(time, time, shape=frame.shape[:2])
        shot.end = time + 1 / FPS
        if round((time - shot.start) * FPS) % LOOK_EVERY == 0:
            shot.looks.append(Look(time, main_face(detector(frame))))
            _keep(shot, frame)
    if shot is not None:
        yield _upright(shot, path, detector)


def _keep(shot: Shot, frame: np.ndarray) -> None:
    """Keep a few pictures, evenly spread over a shot whose end is not known."""
    stride = 1
    while len(shot.looks) > KEPT_LOOKS * stride:
        stride *= 2
    if (len(shot.looks) - 1) % stride == 0:
        if len(shot.kept) >= KEPT_LOOKS:
            shot.kept = shot.kept[::2]
        shot.kept.append(frame)


def _upright(shot: Shot, path: Path, detector: FaceDetector) -> Shot:
    """The shot; where its faces lie on their side, looked at again in the turn that brings them upright."""
    shot.turns = upright_turn(shot.kept[:: max(1, len(shot.kept) // TURN_LOOKS)][:TURN_LOOKS], detector)
    if shot.turns:
        shot.looks = []
        shot.shape = shot.shape if shot.turns == 2 else shot.shape[::-1]
        for index, frame in enumerate(iterate_frames(path, FPS, start=shot.start, stop=shot.end)):
            if index % LOOK_EVERY == 0:
                face = main_face(detector(turned(frame, shot.turns)))
                shot.looks.append(Look(shot.start + index / FPS, face))
    shot.kept = []
    return shot


def overlap(a: FaceBox, b: FaceBox) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / max(1e-9, sum(areas) - both)


def parts_with_a_face(shot: Shot) -> list[Part]:
    """Where one face is followed without a break."""
    parts: list[Part] = []
    open_part: Part | None = None
    missed = 0
    for look in shot.looks:
        if look.face is None:
            missed += 1
            if open_part is not None and missed >= LOST_LOOKS:
                open_part = None
            continue
        if open_part is None or overlap(open_part.faces[-1].box, look.face.box) < SAME_FACE:
            open_part = Part(look.time, look.time, [], shot.turns, shot.shape)
            parts.append(open_part)
        open_part.faces.append(look.face)
        open_part.end = min(shot.end, look.time + LOOK_EVERY / FPS)
        missed = 0
    return [piece for part in parts for piece in _still(part)]


def _still(part: Part) -> list[Part]:
    """Halves, and halves of these, until one crop holds the face throughout."""
    centres = np.array([[(face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2] for face in part.faces])
    size = float(np.median([face.size for face in part.faces]))
    if len(part.faces) < 4 or np.abs(centres - np.median(centres, axis=0)).max() < 0.6 * size:
        return [part]
    middle = len(part.faces) // 2
    cut = part.start + (part.end - part.start) * middle / len(part.faces)
    halves = (part.start, cut, part.faces[:middle]), (cut, part.end, part.faces[middle:])
    return [piece for half in halves for piece in _still(Part(*half, part.turns, part.shape))]


def voiced(wave: np.ndarray) -> np.ndarray:
    """(frames,) bool at 25 frames per second: whether somebody speaks, pauses of up to a second included."""
    width = round(SAMPLE_RATE / FPS)
    pieces = np.pad(wave, (0, -len(wave) % width)).reshape(-1, width)
    level = 10 * np.log10(np.square(pieces, dtype=np.float64).mean(1) + 1e-12)
    if not len(level):
        return np.zeros(0, bool)
    active = level > max(FLOOR_DB, float(np.percentile(level, 95)) - QUIET_DB)
    pad, pause = round(PAD_SECONDS * FPS), round(PAUSE_SECONDS * FPS)
    places = np.flatnonzero(active)
    for first, second in zip(places[:-1], places[1:], strict=True):
        if second - first <= pause:
            active[first:second] = True
    for place in np.flatnonzero(np.diff(active.astype(int)) == 1):
        active[max(0, place + 1 - pad) : place + 1] = True
    for place in np.flatnonzero(np.diff(active.astype(int)) == -1):
        active[place + 1 : place + 1 + pad] = True
    return active


def with_sound(part: Part, active: np.ndarray) -> list[Part]:
    """The stretches of a part in which somebody speaks."""
    first, last = round(part.start * FPS), min(len(active), round(part.end * FPS))
    found, start = [], None
    for index in range(first, last + 1):
        speaks = index < last and active[index]
        if speaks and start is None:
            start = index
        if not speaks and start is not None:
            found.append(_between(part, start / FPS, index / FPS))
            start = None
    return found


def _between(part: Part, start: float, end: float) -> Part:
    """The same face from `start` to `end`."""
    step = max(1e-6, part.seconds / len(part.faces))
    first, last = int((start - part.start) / step), int(np.ceil((end - part.start) / step))
    return Part(start, end, part.faces[first:last] or part.faces[-1:], part.turns, part.shape)


def cut_to_length(part: Part, longest: float) -> list[Part]:
    """Equal pieces of at most `longest` seconds."""
    frames, count = round(part.seconds * FPS), int(np.ceil(part.seconds / longest - 1e-6))
    edges = [part.start + round(frames * k / max(1, count)) / FPS for k in range(max(1, count) + 1)]
    return [_between(part, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
