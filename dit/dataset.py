"""Pictures with captions as training samples. Everything random about a sample follows from (seed, epoch, index)."""

import contextlib
import copy
import hashlib
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dit.config import SAMPLE_DATA, Config, DataConfig, Layout
from dit.data.readers import Item, Items, read
from dit.data.scenes import SceneDataset
from shared.data import BatchPlan
from shared.errors import BadSample, UserError
from shared.media.pictures import as_rgb, to_pixels
from shared.rng import keyed_generator

_AUGMENT, _SUBSET, _BUCKETS = 11, 12, 14  # random streams
_SIDES = ("left", "right", "leftward", "rightward", "leftwards", "rightwards")
_WORDS = re.compile("[a-z]+")
WIDE = 8  # sides of pictures from this ratio on are cut before they are scaled
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
        bucket_step: int = 64,
    ) -> None:
        """bucket_step: what the sides of data.buckets are multiples of, pixels."""
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
        if is_train and not len(self.items):
            wanted = "a class" if num_classes else "a caption"
            raise UserError(
                f"data.dataset_path {self.root}: no usable picture with {wanted} was found for dataset_name "
                f"{settings.dataset_name}; {len(self.skipped)} were left out"
                f"{f', the first: {self.skipped[0][1]}' if self.skipped else ''}; check the layout and the captions"
                f"{'' if num_classes or settings.dataset_name != 'custom' else ' (folders of classes: --num-classes)'}"
            )
        self.may_flip = self._flip_rule()
        self.shapes = bucket_shapes(settings.image_size, bucket_step) if settings.buckets and is_train else []
        self.bucket_N = self._buckets()
        self._memory: dict[int, tuple[Image.Image, Crop]] = {}
        if blank := sum(item.captions == ("",) for item in self.items) if self.items.captions_at_hand else 0:
            print(f"warning: {blank} captions are empty; their pictures train without one", file=sys.stderr)

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
            bucket_step=config.bucket_step,
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.sample(index, 0)
        return sample | {"image": unit(sample["image"])}

    def sample(self, index: int, epoch: int, *, flip: bool | None = None) -> dict[str, Any]:
        """Item `index` as seen in `epoch`; image is uint8. Evaluation: the centre, the first caption, no mirroring."""
        item, settings = self.items[index], self.settings
        caption_draw, flip_draw, draw = draws_of_visit(self.seed, epoch, index)
        caption = item.captions[int(caption_draw * len(item.captions)) if self.is_train else 0] if item.captions else ""
        if flip is None:
            is_spared = settings.flip_guard and names_sides(item.captions)
            flip = self.may_flip and flip_draw < settings.flip and not is_spared
        square, where = self._square(index, item, draw)
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

    def names(self) -> Iterator[str]:
        """The samples' names, in order."""
        return self.items.ids()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the list of ids: two runs with the same one see the same samples."""
        return fingerprint_of(self.names())

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

    def as_squares(self) -> "TextImageDataset":
        """The same pictures, all square, as evaluations see them."""
        squares = copy.copy(self)
        squares.shapes, squares._memory = [], {}
        return squares

    def _buckets(self) -> np.ndarray:
        """The number of every picture's shape, by the header of its file; broken ones go with the square ones, and are
        met in training.
        """
        if not self.shapes:
            return np.zeros(0, dtype=np.int64)
        ratios = np.log([height / width for height, width in self.shapes])
        found = np.full(len(self.items), int(np.abs(ratios).argmin()), dtype=np.int64)
        for index in range(len(self.items)):
            try:
                item = self.items[index]
                width, height = _size(self.items.picture(item)[0])
            except (BadSample, OSError, ValueError, SyntaxError):
                continue
            if item.box is None:  # a bird's box is a square
                found[index] = int(np.abs(ratios - math.log(height / width)).argmin())
        return found

    def _square(self, index: int, item: Item, draw: Callable[[], float]) -> tuple[Image.Image, Crop]:
        """The picture cut to size, and where it lay; squares that come out the same on every visit may be kept."""
        if index in self._memory:
            return self._memory[index]
        crop = self.settings.crop if self.is_train else _steady(self.settings.crop)
        image = decode(*self.items.picture(item))
        if item.box is not None:
            image = crop_to_box(image, item.box)
        if self.shapes:
            shape = self.shapes[self.bucket_N[index]]
            square = to_shape(image, shape, draw if self.settings.crop == "random" else lambda: 0.5)
        else:
            square = to_square(image, self.settings.image_size, crop=crop, draw=draw)
        if self.settings.keep_in_memory and crop == _steady(crop):
            self._memory[index] = square
        return square

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


def draws_of_visit(seed: int, epoch: int, index: int) -> tuple[float, float, Callable[[], float]]:
    """What is random about one visit to a sample: caption, mirroring, and as many numbers as its crop takes.

    Caption and mirroring are always drawn, so that the crop's numbers depend on no other setting, and a cache's samples
    are those of the pictures.
    """
    generator = keyed_generator(seed, _AUGMENT, epoch, index)

    def draw() -> float:
        return torch.rand((), generator=generator).item()

    return draw(), draw(), draw


def fingerprint_of(names: Iterator[str]) -> str:
    """SHA-256 of names joined by line ends."""
    digest = hashlib.sha256()
    for number, name in enumerate(names):
        digest.update((f"\n{name}" if number else name).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def names_sides(captions: Sequence[str]) -> bool:
    """Whether a caption speaks of left or right, which mirroring would make wrong."""
    return any(word in _SIDES for caption in captions for word in _WORDS.findall(caption.lower()))


def spread(dataset: Any, count: int) -> list[int]:
    """Indices in the order in which an evaluation takes them: at most `count` are wanted, in the order of the hash of
    their names, so that no class and no folder comes first; those behind them stand in for broken ones.
    """
    if count >= len(dataset) or isinstance(dataset, SceneDataset):  # scenes come in no order
        return list(range(len(dataset)))
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8] for name in dataset.names()]
    return sorted(range(len(dataset)), key=digests.__getitem__)


def spread_captions(dataset: Any, count: int) -> list[tuple[str, ...]]:
    """The captions of up to `count` items that can be read, chosen as by spread(), in the set's order."""
    found: dict[int, tuple[str, ...]] = {}
    for index in spread(dataset, count):
        if len(found) < count:
            with contextlib.suppress(BadSample):
                found[index] = dataset.items[index].captions
    return [found[index] for index in sorted(found)]


@dataclass(frozen=True, eq=False)
class BucketPlan(BatchPlan):
    """A plan whose steps hold pictures of one shape. Each epoch shuffles every bucket, cuts it into steps, leaves out
    what fills none, and shuffles the steps: a function of (seed, epoch), so that resuming and ranks change nothing.

    bucket_N: the number of every picture's shape.
    """

    bucket_N: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.buckets: no shape has the {self.global_batch} pictures of one optimizer step; use a smaller "
                "--batch-size, or leave buckets out"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that the buckets fill."""
        return int((np.bincount(self.bucket_N) // self.global_batch).sum())

    def _shuffled(self, epoch: int) -> Tensor:
        generator, steps = keyed_generator(self.seed, _BUCKETS, epoch), []
        for number in np.unique(self.bucket_N):
            members = torch.from_numpy(np.flatnonzero(self.bucket_N == number))
            members = members[torch.randperm(len(members), generator=generator)]
            whole = len(members) // self.global_batch * self.global_batch
            steps += members[:whole].split(self.global_batch)
        return torch.cat([steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()])


def bucket_shapes(size: int, step: int) -> list[tuple[int, int]]:
    """(height, width) from 1:2 to 2:1 in multiples of `step`, of at most size squared pixels, as many as there are."""
    shapes = {(size, size)}
    for side in range(-(-size // 2 // step) * step, 2 * size + 1, step):
        other = size * size // side // step * step
        if other and 0.5 <= side / other <= 2:
            shapes |= {(side, other), (other, side)}
    return sorted(shapes)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors stacked (in a loader process straight into shared memory), texts and ids as lists.

    With buckets, a sample that stands in for a broken one may have another shape than the rest; then one of the rest
    stands in for it.
    """
    if "image" in samples[0]:
        shapes = Counter(tuple(sample["image"].shape) for sample in samples)
        if len(shapes) > 1:
            shape = shapes.most_common(1)[0][0]
            fitting = next(sample for sample in samples if tuple(sample["image"].shape) == shape)
            samples = [sample if tuple(sample["image"].shape) == shape else fitting for sample in samples]
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
    except Exception as error:  # every format's library raises its own kinds
        whole = _without_its_end(data) if "truncated" in str(error) else None
        if whole is not None:
            return whole
        reason = "no picture format" if "BytesIO" in str(error) else error
        raise BadSample(f"{name}: not a readable picture ({reason})") from None


def _without_its_end(data: bytes) -> Image.Image | None:
    """A JPEG that lacks its end mark alone. What follows complete data changes no pixel; where data are missing, other
    bytes in their place do.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    data = data.rstrip(b"\xff")
    try:
        found = [as_rgb(Image.open(io.BytesIO(data + filling + b"\xff\xd9"))) for filling in (b"", b"\x5a\x3c" * 64)]
    except Exception:  # as above
        return None
    return found[0] if found[0].tobytes() == found[1].tobytes() else None


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
    if max(image.size) > WIDE * min(image.size):
        return _window_of_strip(image, size, draw if crop == "random" else lambda: 0.5)
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


def to_shape(image: Image.Image, shape: tuple[int, int], draw: Callable[[], float]) -> tuple[Image.Image, Crop]:
    """A (height, width) picture that fills its shape, scaled by the smaller side; what sticks out is cut off evenly, or
    where draw() says.
    """
    height, width = shape
    scale = max(height / image.height, width / image.width)
    whole = (round(image.height * scale), round(image.width * scale))
    top, left = draw() * (image.height - height / scale), draw() * (image.width - width / scale)
    box = (left, top, min(image.width, left + width / scale), min(image.height, top + height / scale))
    cut = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return cut, (round(top * scale), round(left * scale), *whole)


def _size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded picture, as it stands upright; only its header is read."""
    image = Image.open(io.BytesIO(data))
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _window_of_strip(image: Image.Image, size: int, draw: Callable[[], float]) -> tuple[Image.Image, Crop]:
    """The same square from a very wide or tall picture, without scaling what is cut off."""
    scale = size / min(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    left, top = int(draw() * (width - size + 1)), int(draw() * (height - size + 1))
    box = (left / scale, top / scale, min(image.width, (left + size) / scale), min(image.height, (top + size) / scale))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), (top, left, height, width)


def unit(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] from uint8; what is float already is in that range and stays."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(127.5).sub_(1.0)
