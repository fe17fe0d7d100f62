"""Clips composed on the fly: a drawing that moves over a plain ground, with its picture as the reference.

What the small preset trains on. A tenth of the combinations (drawing, ground, direction) is never trained, and the last
UNSEEN drawings of the sheet are never trained at all: what is drawn of those was learned from the picture alone.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from opens2v.config import Config, pixel_count
from opens2v.data.augment import WHITE
from opens2v.data.subjects import BROKEN_PICTURE, picture_tensors
from shared.errors import UserError
from shared.media.folders import is_junk
from shared.media.scenes import MOTIONS, SHIFT, Drawing, Scene, Scenes, cut_out
from shared.rng import keyed_seed

SCENE_RATE = 8.0  # frames per second
UNSEEN = 16  # drawings at the end of the list
OFF_CELL = 2  # pixels from the middle to where a subject starts: half a cell of the codec, so always the same way off
ACROSS = {True: ("on the left", "on the right"), False: ("at the top", "at the bottom")}  # of up and down; else
LENGTH = 4096  # scenes of an epoch
RECOLOURED = 0.6  # share of the trained scenes whose drawing and picture have their colour channels in another order
GENERIC = 0.5  # share of the trained captions that call the drawing "subject"
_CHOICES = 503  # random stream


def read_drawings(path: str | Path) -> list[Drawing]:
    """The drawings of a sheet (NAME.json beside NAME.webp), or of a folder of pictures, named by their files."""
    path = Path(path)
    if path.is_dir():
        kinds = (".png", ".webp", ".jpg", ".jpeg")
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in kinds and not is_junk(f))
        found = []
        for file in files:
            try:
                found.append(Drawing(file.stem.replace("_", " ").lower(), cut_out(Image.open(file))))
            except BROKEN_PICTURE as error:
                raise UserError(f"data.scenes: {file} cannot be used ({error}); mend or remove it") from None
        if len(found) <= UNSEEN:
            raise UserError(f"data.scenes {path}: {len(found)} pictures; more than {UNSEEN} are needed")
        return found
    if not path.is_file():
        raise UserError(f"data.scenes {path}: not found; give a folder of pictures or the .json of a sheet")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        side, columns, names = int(listed["side"]), int(listed["columns"]), list(listed["names"])
        sheet = np.array(Image.open(path.with_suffix(".webp")).convert("RGBA"))
    except (KeyError, TypeError, *BROKEN_PICTURE) as error:
        raise UserError(f"data.scenes {path}: no sheet of drawings ({error}); copy it again") from None
    return [
        Drawing(name, sheet[row * side : (row + 1) * side, column * side : (column + 1) * side])
        for place, name in enumerate(names)
        for row, column in [divmod(place, columns)]
    ]


class SceneDataset:
    """Samples as OpenS2VAdapterDataset gives them. which: "train", "combinations" (never trained), "subjects" (drawings
    that are never trained).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_frames: int,
        size: tuple[int, int],
        reference_size: tuple[int, int],
        clip_size: int,
        max_subjects: int = 1,
        seed: int = 0,
        which: str = "train",
        generic: float = GENERIC,
    ):
        drawings = read_drawings(path)
        chosen = drawings[-UNSEEN:] if which == "subjects" else drawings[:-UNSEEN]
        self.which, self.seed, self.generic = which, seed, generic if which == "train" else 0.0
        self.scenes = Scenes(
            chosen, height=size[0], width=size[1], kinds=("moving",), seed=seed,
            recoloured=RECOLOURED if which == "train" else 0.0,
        )  # fmt: skip
        self.num_frames, self.reference_size, self.clip_size = num_frames, reference_size, clip_size
        self.max_subjects = max_subjects
        self.fingerprint = f"scenes-{len(drawings)}-{seed}"

    def __len__(self) -> int:
        return LENGTH

    def identity(self, index: int) -> tuple[str, str]:
        """(part, key) of a sample."""
        return f"scenes_{self.which}", f"{index:06d}"

    def scene(self, index: int, epoch: int = 0) -> Scene:
        """The ground truth of a sample: a large subject that starts off the middle by half a cell of the codec, against
        its direction and to one side of it.
        """
        scene = self.scenes.scene(epoch * LENGTH + index, unseen=self.which == "combinations")
        half = OFF_CELL / (SHIFT * min(self.scenes.height, self.scenes.width))  # in the unit of Scene.shifts
        right, down = MOTIONS[scene.motion]
        aside_x, aside_y = (math.copysign(half, part) for part in scene.shifts[0])
        start = (-half * right if right else aside_x, -half * down if down else aside_y)
        return scene._replace(size="large", shifts=(start, (0.0, 0.0)))

    def place(self, scene: Scene) -> str:
        """Words for the side on which the subject goes along."""
        x, y = scene.shifts[0]
        is_upright = scene.motion in ("up", "down")
        return ACROSS[is_upright][(x if is_upright else y) > 0]

    def reference(self, scene: Scene) -> Image.Image:
        """The subject alone on white, as far off the codec's cells as in the first frame."""
        side = max(self.reference_size)
        return reference_canvas(Image.fromarray(self.scenes.reference(scene, side - 2 * OFF_CELL)), side)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The sample of (index, epoch); another epoch is another scene."""
        return self.shown(self.scene(index, epoch), epoch * LENGTH + index)

    def at(self, frame: int) -> float:
        """Which part of the way across the picture lies behind the subject in a frame: it starts in the middle."""
        return 0.5 + 0.5 * frame / max(1, self.num_frames - 1)

    def clip(self, scene: Scene) -> np.ndarray:
        """uint8 (F, H, W, 3)."""
        return np.stack([self.scenes.frame(scene, self.at(frame)) for frame in range(self.num_frames)])

    def shown(self, scene: Scene, number: int) -> dict[str, Any]:
        """The sample of a scene, worded by `number`."""
        draw = np.random.Generator(np.random.PCG64(keyed_seed(self.seed, _CHOICES, number)))
        nouns = ["subject"] if draw.random() < self.generic else None
        frames = torch.from_numpy(self.clip(scene)).permute(3, 0, 1, 2)
        slots, (part, key) = self.max_subjects, self.identity(number)
        return {
            "key": key,
            "prompts": f"{self.scenes.sentence(scene, number, nouns=nouns)} {self.place(scene)}",
            "frame_indices": torch.arange(self.num_frames),
            "frames": frames.contiguous(),
            **picture_tensors([self.reference(scene)], slots, self.reference_size, self.clip_size),
            "subject_names": [self.scenes.name(scene), *[""] * (slots - 1)],
            "subject_scores": torch.full((slots, 2), torch.nan),
            "meta": {"part": part, "fps": SCENE_RATE, "annotation_idx": ["1"]},
        }


def reference_canvas(picture: Image.Image, side: int) -> Image.Image:
    """A picture on a white square of `side` pixels, its own margin left, as composed scenes show their subject."""
    inner = (side - 2 * OFF_CELL,) * 2
    return ImageOps.expand(ImageOps.pad(picture, inner, Image.Resampling.LANCZOS, color=WHITE), OFF_CELL, WHITE)


def scene_set(config: Config, which: str) -> SceneDataset:
    """The scenes of a configuration; see SceneDataset for `which`."""
    data = config.data
    return SceneDataset(
        str(data.scenes), num_frames=pixel_count(data.num_training_frames, data.num_training_frames_unit),
        size=(data.pixel_height, data.pixel_width), reference_size=(data.ref_height, data.ref_width),
        clip_size=data.ref_clip_size, max_subjects=data.max_subjects_per_sample, seed=config.run.seed, which=which,
    )  # fmt: skip
