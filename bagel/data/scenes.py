"""Scenes composed on the fly as records: draw one from a sentence, answer about one, edit one, talk about one.

Training never sees a scene twice: scene number = epoch x SCENES + index. `scenes` as a data path stands for the
combinations that are trained, `scenes:unseen` for those that never are (shared/media/scenes.py).
"""

import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel.config import SAMPLE_DATA, SceneConfig
from bagel.data.sources import RawRecord, RecordFile, load_image
from shared.errors import UserError
from shared.media.scenes import Drawing, Scene, Scenes, cut_out
from shared.rng import keyed_seed

NAME, UNSEEN = "scenes", "scenes:unseen"
SCENES = 2048  # records of an epoch
TASKS = ("draw", "ask", "edit", "talk")
QUESTIONS = ("what", "where", "colour", "size")
DESCRIBE = "describe the picture"
WORDINGS = 2000  # sentences of a scene that are tried; there are up to 288
_TASK, _EDIT, _ASK = 331, 332, 333  # random streams
_ATTEMPTS = 1000


class World:
    """The scenes of a setting, with questions, edits and descriptions; every choice is keyed by (seed, number)."""

    def __init__(self, settings: SceneConfig, seed: int):
        path = Path(settings.drawings) if settings.drawings else SAMPLE_DATA / "drawings.json"
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"--drawings {path}: no such file; give a JSON object of picture paths and names") from None
        except ValueError as error:
            raise UserError(f"--drawings {path}: not valid JSON ({error})") from None
        chosen = list(names.items())[: settings.objects] if isinstance(names, dict) else []
        if len(chosen) < 2:
            raise UserError(f"--drawings {path}: a JSON object of two or more picture paths and names is wanted")
        drawings = [Drawing(name, cut_out(load_image(path.parent / file))) for file, name in chosen]
        self.scenes = Scenes(drawings, height=settings.side, unseen_share=settings.unseen_share, seed=seed)
        self.seed = seed
        # A record names its scene or edit, and its pictures ask for it again.
        self.scene, self.edit = lru_cache(512)(self.scenes.scene), lru_cache(512)(self._edit)

    def question(self, scene: Scene, kind: str) -> tuple[str, str]:
        """A question of a kind and its answer."""
        noun = self.scenes.name(scene)
        return {
            "what": ("what is in the picture?", noun),
            "where": (f"where is the {noun}?", scene.place),
            "colour": ("what colour is the background?", scene.ground),
            "size": (f"is the {noun} small or large?", scene.size),
        }[kind]

    def is_described(self, scene: Scene, text: str) -> bool:
        """Whether a text is one of the sentences that tell this scene and no other."""
        return any(self.scenes.sentence(scene, number) == text for number in range(WORDINGS))

    def _edit(self, number: int, *, unseen: bool) -> tuple[Scene, str, str, Scene]:
        """(before, what changes, the instruction, after) of a scene; what comes out is of a trained combination, or of
        one that is never trained, and so is what was there before.
        """
        for attempt in range(_ATTEMPTS):
            draw = _generator(self.seed, _EDIT, int(unseen), number, attempt)
            before = self.scenes.scene(number * _ATTEMPTS + attempt, unseen=unseen and draw.random() < 0.5)
            what = ("object", "ground", "place", "size")[draw.integers(4)]
            others = self.scenes.alternatives(before, what)[1:]
            after = others[draw.integers(len(others))]
            if self.scenes.is_unseen(after) == unseen:
                return before, what, self._told(what, before, after), after
        raise UserError("no edit leads to a combination that is never trained; raise data.scenes.unseen_share")

    def _told(self, what: str, before: Scene, after: Scene) -> str:
        noun = self.scenes.name(before)
        return {
            "object": f"replace the {noun} by a {self.scenes.name(after)}",
            "ground": f"make the background {after.ground}",
            "place": f"move the {noun} to the {after.place}",
            "size": f"make the {noun} {after.size}",
        }[what]


class SceneFile(RecordFile):
    """Looks like a file of records; what stands at a place changes with the epoch."""

    changes = True

    def __init__(self, name: str, settings: SceneConfig, seed: int):
        super().__init__(Path(name), None)
        if name not in (NAME, UNSEEN):
            raise UserError(f"{name}: give {NAME} (trained combinations) or {UNSEEN} (never trained ones)")
        self.world, self.unseen, self.seed = World(settings, seed), name == UNSEEN, seed
        shares = np.array([settings.draw, settings.ask, settings.edit, settings.talk], dtype=np.float64)
        self.shares = (shares / shares.sum()).cumsum()

    def records(self) -> Iterator[RawRecord]:
        for place in range(SCENES):
            yield RawRecord(place, self.read(place), None, place)

    def read(self, place: int, epoch: int = 0) -> Any:
        """The record at a place in an epoch; its task is the same in all of them."""
        number = place + (0 if self.unseen else epoch * SCENES)
        task = TASKS[int(np.searchsorted(self.shares, _generator(self.seed, _TASK, place).random()))]
        return getattr(self, f"_{task}")(number)

    def _draw(self, number: int) -> dict:
        scene = self.scene(number)
        return {"text_prompt": self.world.scenes.sentence(scene, number), "image_path": f"{number}:scene"}

    def _ask(self, number: int) -> dict:
        """Questions in an order of their own, or a description, in words that are always the same.

        An answer that stands in an earlier turn, or in its question, is copied, not seen: so nothing is said twice, and
        what the object is, which the other questions tell, is asked first or not at all.
        """
        scene = self.scene(number)
        kinds = _generator(self.seed, _ASK, number).permutation(QUESTIONS).tolist()
        if kinds[0] == "colour":
            turns = [(DESCRIBE, self.world.scenes.sentence(scene, 0))]
        else:
            kinds = ["what"] * (kinds[0] != "size") + [kind for kind in kinds if kind != "what"]
            turns = [self.world.question(scene, kind) for kind in kinds]
        return {
            "conversations": [_picture("user", f"{number}:scene"), *(part for turn in turns for part in _turn(turn))]
        }

    def _edit(self, number: int) -> dict:
        _, _, told, _ = self.world.edit(number, unseen=self.unseen)
        return {"source_image_path": f"{number}:before", "instruction": told, "target_image_path": f"{number}:after"}

    def _talk(self, number: int) -> dict:
        """A picture is drawn, asked about and changed, as one conversation."""
        before, _, told, _ = self.world.edit(number, unseen=self.unseen)
        kind = QUESTIONS[_generator(self.seed, _ASK, number).integers(len(QUESTIONS))]
        return {
            "conversations": [
                _say("user", self.world.scenes.sentence(before, number)),
                _picture("assistant", f"{number}:before"),
                *_turn(self.world.question(before, kind)),
                _say("user", told),
                _picture("assistant", f"{number}:after"),
            ]
        }

    def scene(self, number: int) -> Scene:
        """The ground truth of scene `number`."""
        return self.world.scene(number, unseen=self.unseen)

    def holds(self, name: str) -> bool:
        number, _, which = name.partition(":")
        return number.isdigit() and which in ("scene", "before", "after")

    def load(self, name: str) -> Image.Image:
        number, _, which = name.partition(":")
        if which == "scene":
            scene = self.scene(int(number))
        else:
            before, _, _, after = self.world.edit(int(number), unseen=self.unseen)
            scene = before if which == "before" else after
        return Image.fromarray(self.world.scenes.picture(scene))

    def picture(self, name: str) -> io.BytesIO:
        data = io.BytesIO()
        self.load(name).save(data, "PNG")
        data.seek(0)
        return data


def _say(role: str, text: str) -> dict:
    return {"role": role, "type": "text", "content": text}


def _picture(role: str, name: str) -> dict:
    return {"role": role, "type": "image", "image_path": name}


def _turn(turn: tuple[str, str]) -> list[dict]:
    return [_say("user", turn[0]), _say("assistant", turn[1])]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(keyed_seed(*key)))
