"""Pictures with captions as training samples. Everything random about a sample follows from (seed, epoch, index)."""

import hashlib
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dit.config import SAMPLE_DATA, Config, DataConfig, Layout
from dit.data.readers import Item, Items, read
from dit.data.scenes import SceneDataset
from shared.errors import BadSample, UserError
from shared.media.pictures import as_rgb, to_pixels
from shared.rng import keyed_generator

_AUGMENT, _SUBSET = 11, 12  # random streams
_SIDES = ("left", "right", "leftward", "rightward", "leftwards", "rightwards")
_WORDS = re.compile("[a-z]+")
Crop = tuple[int, int, int, int]  # top, left of the window; height, width of the resized picture it was cut from


class TextImageDataset(Dataset):
    """Items: image float32 (3, S, S) in [-1, 1], text, image_id, index, flip, crop (top, left, resized height, resized
    width), label, and input_ids, attention_mask (77,) where `tokenize` is given.
    """

    def __init__(
        self,
        dataset_name: Layout = "coco",
        dataset_path: str | Path | None = None,
        image_size: int = 256,
        num_samples: int | None = None,
        is_train: bool = True,
        *,
        settings: DataConfig | None = None,
        seed: int = 0,
        num_classes: int | None = None,
        tokenize: Callable[[list[str]], dict[str, Tensor]] | None = None,
    ) -> None:
        if settings is None:
            settings = DataConfig(
                dataset_name=dataset_name,
                dataset_path=None if dataset_path is None else str(dataset_path),
                image_size=image_size,
                num_samples=num_samples,
            )
        self.settings, self.is_train, self.seed = settings, is_train, seed
        self.num_classes, self.tokenize = num_classes, tokenize
        if settings.dataset_name == "scenes":
            raise UserError("dataset_name scenes is opened with TextImageDataset.from_config, not by the constructor")
        if settings.dataset_path is None:
            raise UserError(
                "data.dataset_path is not set; give the folder of the pictures with --data-root (or --data-root sample)"
            )
        self.root = SAMPLE_DATA if settings.dataset_path == "sample" else Path(settings.dataset_path)
        found = read(settings, self.root, is_train=is_train, num_classes=num_classes)
        self.skipped = found.skipped
        self.items = self._subset(found.items)
        if is_train and not self.items:
            raise UserError(
                f"data.dataset_path {self.root}: no usable picture with a caption was found for dataset_name "
                f"{settings.dataset_name}; {len(self.skipped)} were left out"
                f"{f', the first: {self.skipped[0][1]}' if self.skipped else ''}; check the layout and the captions"
            )
        self.may_flip = self._flip_rule()
        self._memory: dict[int, Image.Image] = {}

    @classmethod
    def from_config(cls, config: Config, *, is_train: bool, tokenize: Callable | None = None) -> Any:
        """The data set of a run: one of these, or a SceneDataset, which has the same methods."""
        if config.data.dataset_name == "scenes":
            return SceneDataset.from_config(config, is_train=is_train, tokenize=tokenize)
        return cls(
            settings=config.data,
            is_train=is_train,
            seed=config.run.seed,
            num_classes=config.model.num_classes,
            tokenize=tokenize,
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.sample(index, 0)
        return sample | {"image": unit(sample["image"])}

    def sample(self, index: int, epoch: int, *, flip: bool | None = None) -> dict[str, Any]:
        """Item `index` as seen in `epoch`; image is uint8. Evaluation: the centre, the first caption, no mirroring."""
        item, settings = self.items[index], self.settings
        generator = keyed_generator(self.seed, _AUGMENT, epoch, index)

        def draw() -> float:
            return torch.rand((), generator=generator).item()

        caption_draw, flip_draw = draw(), draw()  # both always: the crop's draws depend on no other setting
        caption = item.captions[int(caption_draw * len(item.captions)) if self.is_train else 0] if item.captions else ""
        if flip is None:
            is_spared = settings.flip_guard and names_sides(item.captions)
            flip = self.may_flip and flip_draw < settings.flip and not is_spared
        square, where = to_square(
            self._picture(index),
            settings.image_size,
            crop=settings.crop if self.is_train else _steady(settings.crop),
            draw=draw,
        )
        sample = {
            "image": to_pixels(square, flip=flip),
            "text": caption,
            "image_id": item.id,
            "index": index,
            "flip": flip,
            "crop": where,
        }
        if self.num_classes:
            sample["label"] = self._label(item)
        if self.tokenize is not None:
            sample |= {name: ids[0] for name, ids in self.tokenize([caption]).items()}
        return sample

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the list of ids: two runs with the same one see the same samples."""
        digest = hashlib.sha256()
        for number, name in enumerate(self.items.ids()):
            digest.update(f"\n{name}".encode() if number else name.encode())
        return digest.hexdigest()

    def _flip_rule(self) -> bool:
        """Whether training pictures may be mirrored at all; with the guard, not where any caption names a side."""
        if not self.is_train or self.settings.flip == 0:
            return False
        if not self.items.captions_at_hand:
            return True  # the guard looks at each picture's own captions
        if self.settings.flip_guard is True and any(names_sides(item.captions) for item in self.items):
            print(
                "warning: some captions speak of left or right, so no picture is mirrored (data.flip_guard)",
                file=sys.stderr,
            )
            return False
        return True

    def _picture(self, index: int) -> Image.Image:
        if index in self._memory:
            return self._memory[index]
        item = self.items[index]
        image = decode(*self.items.picture(item))
        if item.box is not None:
            image = crop_to_box(image, item.box)
        if self.settings.keep_in_memory:
            self._memory[index] = image
        return image

    def _label(self, item: Item) -> int:
        assert self.num_classes is not None  # asked for by class-conditional runs
        if item.label is None or not 0 <= item.label < self.num_classes:
            raise BadSample(f"{item.id}: class {item.label} is not in 0 .. {self.num_classes - 1} (model.num_classes)")
        return item.label

    def _subset(self, items: Items) -> Items:
        wanted = self.settings.num_samples
        if wanted is None or not self.is_train:
            return items
        if wanted > len(items):
            print(
                f"warning: data.num_samples {wanted} is more than the {len(items)} there are; all are used",
                file=sys.stderr,
            )
            return items
        chosen = torch.randperm(len(items), generator=keyed_generator(self.settings.subset_seed, _SUBSET))[:wanted]
        return items.take(sorted(chosen.tolist()))


def names_sides(captions: Sequence[str]) -> bool:
    """Whether a caption speaks of left or right, which mirroring would make wrong."""
    return any(word in _SIDES for caption in captions for word in _WORDS.findall(caption.lower()))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors stacked (in a loader process straight into shared memory), texts and ids as lists."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, Tensor):
            batch[name] = default_collate(values)
        elif isinstance(first, (bool, int)):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch


def _steady(crop: str) -> str:
    return "resize" if crop == "resize" else "center"


# --- picture files to squares ----------------------------------------------------------------------------------------


def decode(data: bytes, name: str) -> Image.Image:
    """RGB picture: turned upright by EXIF, transparency laid on white, 16 bits scaled to 8. BadSample if broken."""
    try:
        return as_rgb(Image.open(io.BytesIO(data)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{name}: not a readable picture ({error})") from None


def crop_to_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The square, clipped to the picture, of which a box (x, y, width, height; pixels) fills three quarters a side."""
    x, y, width, height = box
    side = max(width, height) / 0.75
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    window = (
        max(0, round(left)),
        max(0, round(top)),
        min(image.width, round(left + side)),
        min(image.height, round(top + side)),
    )
    return image.crop(window) if window[2] > window[0] and window[3] > window[1] else image


def to_square(
    image: Image.Image, size: int, *, crop: str = "center", draw: Callable[[], float] = lambda: 0.5
) -> tuple[Image.Image, Crop]:
    """A size x size picture and where it lay.

    center: the ADM rule (Dhariwal and Nichol 2021): halve by BOX while the shorter side is at least twice the size,
    BICUBIC to the size, cut the centre. random: the same, any window. random_resized: a square of 80 to 100 % of the
    area. resize: no cutting. draw() gives uniform numbers in [0, 1) for the random ones.
    """
    if crop == "resize":
        return image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=None), (0, 0, size, size)
    if crop == "random_resized":
        side = min(image.size) * math.sqrt(0.8 + 0.2 * draw())
        left, top = draw() * (image.width - side), draw() * (image.height - side)
        scale = size / side
        where = (round(top * scale), round(left * scale), round(image.height * scale), round(image.width * scale))
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)), where
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    spare_x, spare_y = image.width - size, image.height - size
    if crop == "random":
        left, top = int(draw() * (spare_x + 1)), int(draw() * (spare_y + 1))
    else:
        left, top = spare_x // 2, spare_y // 2
    return image.crop((left, top, left + size, top + size)), (top, left, image.height, image.width)


def unit(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] from uint8; what is float already is in that range and stays."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(127.5).sub_(1.0)
