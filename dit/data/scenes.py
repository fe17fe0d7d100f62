"""Scenes composed from drawings as training samples, with the interface of TextImageDataset.

Training never sees a scene twice: scene number = epoch x SCENES + index. The held-out scenes are of combinations that
training never sees at all (shared/media/scenes.py).
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dit.config import SAMPLE_DATA, Config, DataConfig
from dit.data.readers import SPLIT_FILES, Item, Items, read
from shared.errors import BadSample, UserError
from shared.media.scenes import Drawing, Scene, Scenes, cut_out, noun_of

SCENES = 8192  # that count as an epoch
HELD_OUT = 1024


class SceneDataset(Dataset):
    """Items: image uint8 (3, S, S), text, image_id, index, flip (never), crop; input_ids where `tokenize` is given."""

    may_flip = False  # a mirrored scene would contradict its sentence

    def __init__(
        self,
        settings: DataConfig,
        *,
        is_train: bool,
        seed: int = 0,
        tokenize: Callable[[list[str]], dict[str, Tensor]] | None = None,
    ) -> None:
        if settings.dataset_path is None:
            raise UserError(
                "data.dataset_path is not set; give the folder of the drawings with --data-root (or --data-root sample)"
            )
        self.settings, self.is_train, self.seed, self.tokenize = settings, is_train, seed, tokenize
        self.root = SAMPLE_DATA if settings.dataset_path == "sample" else Path(settings.dataset_path)
        drawings, self.skipped = read_drawings(settings, self.root)
        self.scenes = Scenes(
            drawings,
            height=settings.image_size,
            kinds=settings.scene_kinds,
            unseen_share=settings.unseen_share,
            seed=seed,
        )
        self.items = _Sentences(self)

    @classmethod
    def from_config(cls, config: Config, *, is_train: bool, tokenize: Callable | None = None) -> "SceneDataset":
        """The scenes of a run."""
        return cls(config.data, is_train=is_train, seed=config.run.seed, tokenize=tokenize)

    def __len__(self) -> int:
        return SCENES if self.is_train else HELD_OUT * (self.settings.unseen_share > 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.sample(index, 0)
        return sample | {"image": sample["image"].float() / 127.5 - 1}

    def sample(self, index: int, epoch: int, *, flip: bool | None = None) -> dict[str, Any]:
        """Scene `index` of an epoch. Held-out scenes are the same in every epoch."""
        number = self.number(index, epoch)
        scene = self.truth(index, epoch)
        text, side = self.scenes.sentence(scene, number), self.settings.image_size
        sample = {
            "image": torch.from_numpy(self.scenes.picture(scene)).permute(2, 0, 1).contiguous(),
            "text": text,
            "image_id": f"scene {number}",
            "index": index,
            "flip": False,
            "crop": (0, 0, side, side),
        }
        if self.tokenize is not None:
            sample |= {name: ids[0] for name, ids in self.tokenize([text]).items()}
        return sample

    def truth(self, index: int, epoch: int = 0) -> Scene:
        """What the scene shows, as words and numbers."""
        return self.scenes.scene(self.number(index, epoch), unseen=not self.is_train)

    def number(self, index: int, epoch: int) -> int:
        """The scene's number, which keys its draws."""
        return index + (epoch * SCENES if self.is_train else 0)

    def names(self) -> Iterator[str]:
        """The scenes' names, in order."""
        return (f"scene {self.number(index, 0)}" for index in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the scenes are made of."""
        made_of = [drawing.name for drawing in self.scenes.drawings]
        made_of += [str(self.scenes.kinds), str(self.scenes.unseen_share), str(self.is_train), str(self.seed)]
        return hashlib.sha256("\n".join(made_of).encode()).hexdigest()


class _Sentences:
    """items[index]: the sentence of scene `index`, where evaluation looks for captions."""

    captions_at_hand = True

    def __init__(self, dataset: SceneDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        number = self.dataset.number(index, 0)
        return Item(f"scene {number}", number, (self.dataset.scenes.sentence(self.dataset.truth(index), number),))


def read_drawings(settings: DataConfig, root: Path) -> tuple[list[Drawing], list[tuple[str, str]]]:
    """The drawings of a folder in the cub or the custom layout, and (name, reason) of what cannot be used.

    The name is the first caption without its article. settings.drawings of them: by hash of the name, a class at a time
    where the layout has classes, so that few drawings are of many kinds.
    """
    is_cub = any((folder / "images.txt").is_file() for folder in (root, root / "CUB_200_2011"))
    layout = "cub" if is_cub and not (root / SPLIT_FILES[0]).is_file() else "custom"
    found = read(settings.model_copy(update={"dataset_name": layout}), root, is_train=True)
    skipped, named = list(found.skipped), {}
    for item in found.items:
        name = noun_of(item.captions[0])
        if name in named:
            skipped.append((item.id, f"a drawing named {name!r} is there already"))
        else:
            named[name] = item
    order = _by_hash_and_class(named, settings.subset_seed)
    drawings: list[Drawing] = []
    for name in order:
        if len(drawings) == (settings.drawings or len(order)):
            break
        try:
            drawings.append(Drawing(name, cut_out(_opened(found.items, named[name]))))
        except (BadSample, ValueError) as error:
            skipped.append((named[name].id, str(error)))
    if not drawings:
        raise UserError(
            f"data.dataset_path {root}: no drawing with a caption was found, {len(skipped)} were left out"
            f"{f', the first: {skipped[0][1]}' if skipped else ''}; scenes need pictures on white or with transparency"
        )
    return drawings, skipped


def _opened(items: Items, item: Item) -> Image.Image:
    data, name = items.picture(item)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{name}: not a readable picture ({error})") from None


def _by_hash_and_class(named: dict[str, Item], seed: int) -> list[str]:
    """Names in the order of their hash; the first of every class, then the second of every class, ..."""

    def digest(name: str) -> str:
        return hashlib.sha256(f"{seed}|{name}".encode()).hexdigest()

    seen: dict[int | None, int] = {}
    turns = {}
    for name in sorted(named, key=digest):
        label = named[name].label
        turns[name] = seen[label] = seen.get(label, 0) + 1
    return sorted(named, key=lambda name: (turns[name], digest(name)))
