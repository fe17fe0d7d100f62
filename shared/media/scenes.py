"""Scenes composed on the fly from real drawings: what, where, how large, on which ground; two with a relation; moving.

A scene is a pure function of (seed, index). Its ground truth is returned as words, so that a system's success can be
counted (shared/media/scene_scores.py), and sentences, questions and edits are made from it. A share of the combinations
is chosen by the hash of their words and never drawn for training: on those, a model shows whether it composes or
remembers.
Shapes: H W of a picture, T frames, S side of a drawing.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from shared.errors import UserError
from shared.media.pictures import as_rgb
from shared.rng import keyed_seed

GROUNDS = {
    "red": (235, 80, 70),
    "yellow": (250, 200, 60),
    "green": (90, 180, 90),
    "blue": (80, 140, 230),
    "purple": (170, 110, 210),
    "white": (245, 245, 245),
    "black": (40, 40, 50),
    "pink": (240, 150, 190),
}
SIZES = {"small": 0.5, "large": 0.75}  # side of an object, as a part of the picture's shorter side
PAIR_SIZE = 0.47  # of each of two objects
PLACES = {"top left": (0.0, 0.0), "top right": (1.0, 0.0), "bottom left": (0.0, 1.0), "bottom right": (1.0, 1.0)}
RELATIONS = {
    "left of": (0.0, 0.5),
    "right of": (1.0, 0.5),
    "above": (0.5, 0.0),
    "below": (0.5, 1.0),
}  # the first's place
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MOTIONS = {"to the right": (1.0, 0.0), "to the left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
SHIFT = 1 / 32  # an object lies off its place by up to this part of the picture's shorter side, which no sentence tells
NEAR_WHITE = 12  # a ground of white paper differs from white by at most this (JPEG rings at the edges)
Kind = Literal["one", "two", "moving"]
_SCENE, _WORDS, _QUESTION, _EDIT = 201, 202, 203, 204  # random streams
_ATTEMPTS = 10_000


class Drawing(NamedTuple):
    """One object: its name, and RGBA uint8 (S, S, 4), cut close and centred."""

    name: str
    rgba: np.ndarray


class Scene(NamedTuple):
    """The ground truth of a picture or clip. Fields that do not belong to its kind are empty."""

    objects: tuple[int, ...]  # numbers of the drawings: one, or two
    ground: str
    size: str = ""  # of a single object
    place: str = ""  # of a single object that stays
    relation: str = ""  # of the first of two objects to the second
    motion: str = ""  # of a single object that moves
    shifts: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.0, 0.0))  # (right, down) of each object, from -1 to 1
    channels: tuple[int, int, int] = (0, 1, 2)  # order of the drawings' colour channels; others recolour them


def cut_out(image: Image.Image) -> np.ndarray:
    """RGBA uint8 (S, S, 4) of a picture: by its transparency, or, where it has none, by its white ground.

    White that touches the border is ground, white inside stays. The rest is cut close and centred on a square.
    Raises ValueError for a picture that is all ground.
    """
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if has_alpha:
        rgba = np.array(image.convert("RGBA"))
    else:
        rgb = np.asarray(as_rgb(image))
        ground = _reached_from_border((255 - rgb.min(axis=2)) <= NEAR_WHITE)
        rgba = np.dstack([rgb, _soft(~ground)])
    rows, columns = np.nonzero(rgba[..., 3].max(axis=1) > 8)[0], np.nonzero(rgba[..., 3].max(axis=0) > 8)[0]
    if not len(rows):
        raise ValueError("nothing but ground")
    rgba = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = rgba.shape[:2]
    side = max(height, width)
    square = np.zeros((side, side, 4), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgba
    return square


def noun_of(caption: str) -> str:
    """The name that a plain caption gives: "A diya lamp." is a "diya lamp"."""
    words = caption.strip().removesuffix(".").split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words).lower()


class Scenes:
    """A world of drawings: scene(index) is its ground truth, picture(scene) or frames(scene, T) shows it."""

    def __init__(
        self,
        drawings: Sequence[Drawing],
        *,
        height: int = 32,
        width: int | None = None,
        kinds: Sequence[Kind] = ("one",),
        unseen_share: float = 0.1,
        recoloured: float = 0.0,
        seed: int = 0,
    ) -> None:
        """height, width: pixels; no width: as high. kinds: drawn from evenly, repeat one to draw it more often.

        unseen_share: of the combinations, never trained. recoloured: share of the trained scenes whose objects get
        their colour channels in another order. Raises UserError for settings from which no scene can be drawn.
        """
        self.drawings, self.seed = list(drawings), seed
        self.height, self.width = height, height if width is None else width
        self.kinds, self.unseen_share, self.recoloured = tuple(kinds), unseen_share, recoloured
        self._sprites: dict[tuple[int, int], np.ndarray] = {}
        self._unseen: dict[tuple, bool] = {}
        if not self.kinds or not set(self.kinds) <= {"one", "two", "moving"}:
            raise UserError(f"kinds of scenes {self.kinds}: use some of one, two, moving")
        if not 0 <= unseen_share < 1:
            raise UserError(f"unseen share {unseen_share}: a share from 0 to below 1 is wanted")
        least = 2 if "two" in self.kinds else 1
        if len(self.drawings) < least:
            raise UserError(f"scenes need at least {least} drawings, found {len(self.drawings)}; give more pictures")
        twice = _first_repeated([drawing.name for drawing in self.drawings])
        if twice is not None:
            raise UserError(f"two drawings are named {twice!r}; a name must tell which one is meant")

    def scene(self, index: int, *, unseen: bool = False) -> Scene:
        """The ground truth of scene `index`: of a trained combination, or of one that is never trained."""
        draw = _generator(self.seed, _SCENE, int(unseen), index)
        for _ in range(_ATTEMPTS):
            scene = self._drawn(draw)
            if self.is_unseen(scene) == unseen:
                break
        else:
            what = "never trained" if unseen else "trained"
            raise UserError(
                f"no combination of these {len(self.drawings)} drawings is {what} (unseen share {self.unseen_share}); "
                "use more drawings or another share"
            )
        if not unseen and draw.random() < self.recoloured:
            scene = scene._replace(channels=_ORDERS[draw.integers(1, len(_ORDERS))])
        return scene

    def is_unseen(self, scene: Scene) -> bool:
        """Whether the scene's combination is one that is never trained; a property of its words alone.

        One object: object, ground, place. Two: both objects and their relation ("a left of b" is "b right of a").
        Moving: object, ground, direction. Sizes and shifts do not count.
        """
        words = self._combination(scene)
        if words not in self._unseen:
            digest = hashlib.sha256("|".join(words).encode()).digest()
            self._unseen[words] = int.from_bytes(digest[:8], "big") < self.unseen_share * 2**64
        return self._unseen[words]

    def picture(self, scene: Scene) -> np.ndarray:
        """uint8 (H, W, 3); of a moving scene its middle."""
        return self._painted(scene, 0.5)

    def frames(self, scene: Scene, count: int) -> np.ndarray:
        """uint8 (T, H, W, 3): the object crosses the picture from the first frame to the last."""
        return np.stack([self._painted(scene, frame / max(count - 1, 1)) for frame in range(count)])

    def frame(self, scene: Scene, at: float) -> np.ndarray:
        """uint8 (H, W, 3) of a moving scene. at: 0 first frame, 1 last."""
        return self._painted(scene, at)

    def mask(self, scene: Scene, at: float = 0.5) -> np.ndarray:
        """How much of every pixel the objects cover: float32 (H, W) in [0, 1]. at: 0 first frame, 1 last."""
        covered = np.zeros((self.height, self.width), np.float32)
        for sprite, top, left in self._placed(scene, at):
            window = (slice(top, top + len(sprite)), slice(left, left + len(sprite)))
            covered[window] = np.maximum(covered[window], sprite[..., 3])
        return covered

    def reference(self, scene: Scene, side: int, *, which: int = 0) -> np.ndarray:
        """Object number `which` of the scene alone on white, in the scene's colours: uint8 (side, side, 3)."""
        sprite = self._sprite(scene.objects[which], side)
        colours = sprite[..., :3][..., list(scene.channels)]
        return _to_uint8(255.0 * (1 - sprite[..., 3:]) + colours)

    def name(self, scene: Scene, which: int = 0) -> str:
        """The name of object number `which` of a scene."""
        return self.drawings[scene.objects[which]].name

    # --- words: all choices are keyed by (seed, index) as well ----------------------------------------------------

    def sentence(self, scene: Scene, index: int, *, nouns: Sequence[str] | None = None) -> str:
        """A sentence that tells all of the ground truth, in words chosen by `index`. nouns: in place of the names."""
        draw = _generator(self.seed, _WORDS, index)
        nouns = [noun.lower() for noun in nouns or [self.drawings[n].name for n in scene.objects]]

        def choose(options: Sequence[str]) -> str:
            return options[int(draw.integers(len(options)))]

        ground = _with_article(f"{choose(_GROUND_WORDS[scene.ground])} {choose(_BACKGROUND)}")
        if scene.relation:
            parts = {
                "first": _with_article(nouns[0]),
                "second": _with_article(nouns[1]),
                "relation": choose(_RELATION_WORDS[scene.relation]),
                "ground": ground,
            }
            return choose(_TWO).format(**parts)
        thing = _with_article(f"{choose(_SIZE_WORDS[scene.size])} {nouns[0]}")
        if scene.motion:
            return choose(_MOVING).format(thing=thing, motion=choose(_MOTION_WORDS[scene.motion]), ground=ground)
        return choose(_ONE).format(thing=thing, place=choose(_PLACE_WORDS[scene.place]), ground=ground)

    def question(self, scene: Scene, index: int) -> tuple[str, str]:
        """A question about the scene and its answer, chosen by `index`."""
        draw = _generator(self.seed, _QUESTION, index)
        noun = self.name(scene).lower()
        asked = [("what colour is the background?", scene.ground)]
        if scene.relation:
            other = self.name(scene, 1).lower()
            asked.append((f"where is the {noun}, seen from the {other}?", scene.relation))
            asked.append((f"what is {OPPOSITE[scene.relation]} the {noun}?", _with_article(other)))
            asked.append((f"what is {scene.relation} the {other}?", _with_article(noun)))
        else:
            asked.append(("what is in the picture?", _with_article(noun)))
            asked.append((f"is the {noun} small or large?", scene.size))
        if scene.place:
            asked.append((f"where is the {noun}?", scene.place))
        if scene.motion:
            asked.append((f"which way does the {noun} move?", scene.motion))
        return asked[draw.integers(len(asked))]

    def edit(self, scene: Scene, index: int) -> tuple[str, Scene]:
        """An instruction that changes one thing, and the scene after it; all else stays, shifts included."""
        draw = _generator(self.seed, _EDIT, index)
        changeable = [name for name in _VALUES if getattr(scene, name)]
        what = changeable[draw.integers(len(changeable))]
        values = [value for value in _VALUES[what] if value != getattr(scene, what)]
        value, noun = values[draw.integers(len(values))], self.name(scene).lower()
        told = {
            "ground": f"make the background {value}",
            "place": f"move the {noun} to the {value}",
            "size": f"make the {noun} {value}",
            "relation": f"put the {noun} {value} the {self.name(scene, 1).lower() if scene.relation else ''}",
            "motion": f"let the {noun} move {value}",
        }
        change: dict[str, Any] = {what: value}
        return told[what], scene._replace(**change)

    def alternatives(self, scene: Scene, what: str, *, among: int | None = None) -> list[Scene]:
        """The scene itself, then those that differ from it in `what` alone: object, second, ground, place, size,
        relation, motion. among: at most so many in all (objects: chosen by hash).
        """
        if what in ("object", "second"):
            which = int(what == "second")
            numbers = [number for number in range(len(self.drawings)) if number not in scene.objects]
            if among is not None and len(numbers) >= among:
                draw = _generator(self.seed, _SCENE, 7, *scene.objects)
                numbers = draw.choice(numbers, among - 1, replace=False).tolist()
            swapped = [tuple(other if k == which else n for k, n in enumerate(scene.objects)) for other in numbers]
            return [scene, *(scene._replace(objects=objects) for objects in swapped)]
        changes: list[dict[str, Any]] = [{what: value} for value in _VALUES[what] if value != getattr(scene, what)]
        return [scene, *(scene._replace(**change) for change in changes)]

    # --- how it is done -----------------------------------------------------------------------------------------------

    def _drawn(self, draw: np.random.Generator) -> Scene:
        """Any scene, trained or not."""
        kind = self.kinds[draw.integers(len(self.kinds))]
        first, second = int(draw.integers(len(self.drawings))), int(draw.integers(max(len(self.drawings) - 1, 1)))
        ground = _GROUND_NAMES[draw.integers(len(_GROUND_NAMES))]
        which, size = int(draw.integers(4)), _SIZE_NAMES[draw.integers(len(_SIZE_NAMES))]
        x1, y1, x2, y2 = (2 * draw.random(4) - 1).tolist()
        shifts = ((x1, y1), (x2, y2))
        if kind == "two":
            objects = (first, second + (second >= first))
            return Scene(objects, ground, relation=list(RELATIONS)[which], shifts=shifts)
        if kind == "moving":
            return Scene((first,), ground, size, motion=list(MOTIONS)[which], shifts=shifts)
        return Scene((first,), ground, size, place=list(PLACES)[which], shifts=shifts)

    def _combination(self, scene: Scene) -> tuple[str, ...]:
        names = [self.drawings[number].name for number in scene.objects]
        if scene.relation in ("right of", "below"):
            return (names[1], OPPOSITE[scene.relation], names[0])
        if scene.relation:
            return (names[0], scene.relation, names[1])
        return (names[0], scene.ground, scene.place or scene.motion)

    def _painted(self, scene: Scene, at: float) -> np.ndarray:
        picture = np.empty((self.height, self.width, 3), np.float32)
        picture[:] = GROUNDS[scene.ground]
        for sprite, top, left in self._placed(scene, at):
            window = picture[top : top + len(sprite), left : left + len(sprite)]
            window *= 1 - sprite[..., 3:]
            window += sprite[..., :3] if scene.channels == (0, 1, 2) else sprite[..., list(scene.channels)]
        return _to_uint8(picture)

    def _placed(self, scene: Scene, at: float) -> list[tuple[np.ndarray, int, int]]:
        """(sprite, top, left) of every object, the first one last: it lies in front."""
        shorter, found = min(self.height, self.width), []
        side = round(shorter * (PAIR_SIZE if scene.relation else SIZES[scene.size]))
        for which, number in enumerate(scene.objects):
            if scene.relation:
                x, y = RELATIONS[scene.relation if which == 0 else OPPOSITE[scene.relation]]
            elif scene.motion:
                right, down = MOTIONS[scene.motion]
                x, y = 0.5 + right * (at - 0.5), 0.5 + down * (at - 0.5)
            else:
                x, y = PLACES[scene.place]
            shift_x, shift_y = (shorter * SHIFT * part for part in scene.shifts[which])
            left = min(max(round(x * (self.width - side) + shift_x), 0), self.width - side)
            top = min(max(round(y * (self.height - side) + shift_y), 0), self.height - side)
            found.append((self._sprite(number, side), top, left))
        return found[::-1]

    def _sprite(self, number: int, side: int) -> np.ndarray:
        """float32 (side, side, 4): colours from 0 to 255 times alpha, alpha from 0 to 1."""
        key = (number, side)
        if key not in self._sprites:
            image = Image.fromarray(self.drawings[number].rgba).resize((side, side), Image.Resampling.LANCZOS)
            sprite = np.asarray(image, np.float32).copy()
            sprite[..., 3] /= 255
            sprite[..., :3] *= sprite[..., 3:]
            self._sprites[key] = sprite
        return self._sprites[key]


# --- words ------------------------------------------------------------------------------------------------------------

_ORDERS = [(a, b, 3 - a - b) for a, b in itertools.permutations(range(3), 2)]  # the first changes nothing
_GROUND_NAMES, _SIZE_NAMES = tuple(GROUNDS), tuple(SIZES)
_VALUES: dict[str, tuple[str, ...]] = {
    "ground": _GROUND_NAMES,
    "place": tuple(PLACES),
    "size": _SIZE_NAMES,
    "relation": tuple(RELATIONS),
    "motion": tuple(MOTIONS),
}
_BACKGROUND = ("ground", "background", "backdrop")
_GROUND_WORDS = {
    "red": ("red", "crimson"),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "white": ("white",),
    "black": ("black", "dark"),
    "pink": ("pink", "rose"),
}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_ROWS, _CORNERS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}, ("in the {} corner", "at the {}")
_PLACE_WORDS = {
    place: tuple(form.format(f"{row} {place.split()[1]}") for form in _CORNERS for row in _ROWS[place.split()[0]])
    for place in PLACES
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_MOTION_WORDS = {
    "to the right": ("to the right", "from left to right", "rightwards"),
    "to the left": ("to the left", "from right to left", "leftwards"),
    "down": ("down", "from top to bottom", "downwards"),
    "up": ("up", "from bottom to top", "upwards"),
}
_ONE = (
    "{thing} {place} on {ground}",
    "{ground} with {thing} {place}",
    "on {ground} there is {thing} {place}",
    "{place} of {ground}, {thing}",
)
_TWO = ("{first} {relation} {second} on {ground}", "on {ground}, {first} {relation} {second}")
_MOVING = ("{thing} moves {motion} on {ground}", "on {ground}, {thing} moves {motion}")


def _with_article(words: str) -> str:
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"


# --- small steps ------------------------------------------------------------------------------------------------------


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(keyed_seed(*key)))


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


def _first_repeated(names: list[str]) -> str | None:
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def _reached_from_border(is_light: np.ndarray) -> np.ndarray:
    """The True cells (H, W) that hang together with the border."""
    from scipy import ndimage

    labels, _ = ndimage.label(is_light)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, edge[edge > 0])


def _soft(inside: np.ndarray) -> np.ndarray:
    """uint8 alpha of a mask, its edge a little soft and drawn in, so that no white rim is left."""
    from scipy import ndimage

    alpha = ndimage.gaussian_filter(inside.astype(np.float32), 0.8)
    return (255 * (2 * alpha - 1).clip(0, 1)).astype(np.uint8)
