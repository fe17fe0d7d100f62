"""The public on-disk layouts as lists of items: MS-COCO, CUB-200-2011, and folders of one's own.

A reader looks only at lists and names, never into pictures, so a large set opens in seconds. What cannot be used is
returned beside the items, with the reason.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit.config import DataConfig
from shared.errors import BadSample, UserError
from shared.media.shards import Shards
from shared.rng import keyed_seed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
IMAGE_KEYS = ("file_name", "file", "image", "image_path")
CAPTION_KEYS = ("text", "caption", "prompt", "text_prompt", "captions")
SPLIT_FILES = ("train.jsonl", "val.jsonl")  # without the second, val_fraction holds out a share of the first


class Item(NamedTuple):
    """One picture: a file, or a place in tar shards; its captions; a box (x, y, width, height); a class from 0."""

    id: str
    image: Path | int
    captions: tuple[str, ...]
    box: tuple[float, float, float, float] | None = None
    label: int | None = None


class Items:
    """The pictures of a data set: an Item by its number, and its encoded picture."""

    captions_at_hand = True  # all captions can be looked through without reading pictures

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def ids(self) -> Iterator[str]:
        """The items' names."""
        return (item.id for item in self)

    def take(self, indices: list[int]) -> "Items":
        """Only these items, in this order."""
        raise NotImplementedError

    def picture(self, item: Item) -> tuple[bytes, str]:
        """The encoded picture of an item, and its place."""
        raise NotImplementedError


class FileItems(Items):
    """Items whose pictures are files."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    def take(self, indices: list[int]) -> "FileItems":
        """Only these items, in this order."""
        return FileItems([self.items[index] for index in indices])

    def picture(self, item: Item) -> tuple[bytes, str]:
        """The encoded picture of an item, and where it lies."""
        assert isinstance(item.image, Path)
        try:
            return item.image.read_bytes(), str(item.image)
        except OSError as error:
            raise BadSample(f"{item.image}: cannot be read ({error.strerror})") from None


class Listed(NamedTuple):
    """What a layout lists, and (name, reason) of what it cannot use."""

    items: list[Item]
    skipped: list[tuple[str, str]]


class Found(NamedTuple):
    """Items in the order of their ids (shards: of the files), and (name, reason) of what was left out."""

    items: Items
    skipped: list[tuple[str, str]]


def read(settings: DataConfig, root: Path, *, is_train: bool, num_classes: int | None = None) -> Found:
    """Everything the layout lists for this split."""
    if not any(mark in root.name for mark in "*{") and not os.path.exists(root):
        raise UserError(
            f"data.dataset_path {root}: no such folder; give the folder that holds the {settings.dataset_name} data"
        )
    if settings.dataset_name == "custom" and is_sharded(root):
        found = Found(*ShardItems.open(root, lambda name: held_out(name, settings.val_fraction) != is_train))
    else:
        readers = {"coco": _coco, "cub": _cub, "custom": _custom}
        found = _usable(readers[settings.dataset_name](settings, root, is_train, num_classes), num_classes)
    if found.skipped and settings.on_error == "raise":
        (name, reason), more = found.skipped[0], len(found.skipped) - 1
        raise UserError(f"{name}: {reason} (and {more} more); mend the data, or use --on-error skip")
    return found


def _usable(found: Listed, num_classes: int | None) -> Found:
    """The items that have what training needs, in the order of their ids."""
    items, skipped = [], list(found.skipped)
    for item in found.items:
        if not item.captions and not (num_classes and item.label is not None):
            skipped.append((item.id, "no caption"))
        elif not os.path.isfile(item.image):  # unlike Path's, False also for a name that no file can have
            skipped.append((item.id, f"{item.image}: no such picture"))
        else:
            items.append(item)
    return Found(FileItems(sorted(items, key=lambda item: item.id)), skipped)


def clean_captions(texts: Any) -> tuple[str, ...]:
    """Non-empty captions, white space joined."""
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    return tuple(line for line in (" ".join(text.split()) for text in texts if isinstance(text, str)) if line)


def captions_of(record: dict) -> tuple[str, ...]:
    """The captions under the first of CAPTION_KEYS that holds any."""
    return next((found for key in CAPTION_KEYS if (found := clean_captions(record.get(key)))), ())


def held_out(name: str, fraction: float) -> bool:
    """Whether a name belongs to the validation share; a property of the name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < fraction


# --- MS-COCO ----------------------------------------------------------------------------------------------------------


def _coco(settings: DataConfig, root: Path, is_train: bool, num_classes: int | None) -> Listed:
    split = "train" if is_train else "val"
    listings = [root / "annotations" / f"captions_{split}{year}.json" for year in (2017, 2014)]
    listing = next((path for path in listings if path.is_file()), None)
    if listing is None:
        raise UserError(
            f"{root}: no annotations/captions_{split}2017.json (nor 2014); dataset_name coco needs MS-COCO's layout"
        )
    tree = _json(listing)
    try:
        names = {image["id"]: image["file_name"] for image in tree["images"]}
        captions: dict[int, list[str]] = {}
        for note in sorted(tree["annotations"], key=lambda note: note["id"]):
            captions.setdefault(note["image_id"], []).append(note["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{listing}: expected images with id and file_name, annotations with id, image_id and caption; missing "
            f"{error}"
        ) from None
    folders = [root / listing.stem.removeprefix("captions_"), root / "images" / listing.stem.removeprefix("captions_")]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{folders[0]}: no such folder (nor {folders[1]}); it should hold the pictures of {listing.name}"
        )
    return Listed(
        [
            Item(f"{number:012d}", folder / name, clean_captions(captions.get(number, [])))
            for number, name in names.items()
        ],
        [],
    )


# --- CUB-200-2011 -----------------------------------------------------------------------------------------------------


def _cub(settings: DataConfig, root: Path, is_train: bool, num_classes: int | None) -> Listed:
    root = next((path for path in (root, root / "CUB_200_2011") if (path / "images.txt").is_file()), root)
    names = _table(root / "images.txt", required=True)
    classes = _table(root / "classes.txt", required=False)
    labels = _table(root / "image_class_labels.txt", required=False)
    split = _table(root / "train_test_split.txt", required=False)
    boxes = _table(root / "bounding_boxes.txt", required=False)
    source = _CubCaptions(root, settings)
    items = []
    for number, name in names.items():
        training = split[number].strip() == "1" if number in split else not held_out(name, 0.1)
        if training != is_train:
            continue
        class_name = classes.get(labels.get(number, "").strip(), name.split("/")[0])
        box = _numbers(boxes[number], root / "bounding_boxes.txt") if settings.use_bbox and number in boxes else None
        label = int(labels[number]) - 1 if labels.get(number, "").isdecimal() else None
        items.append(Item(name, root / "images" / name, source.captions(number, name, class_name), box, label))
    return Listed(items, [])


class _CubCaptions:
    """The first source of captions that exists: ten lines of text, attributes, the class name."""

    def __init__(self, root: Path, settings: DataConfig) -> None:
        self.source, self.seed = settings.caption_source, settings.subset_seed
        folders = [base / name for base in (root, root.parent) for name in ("text_c10", "text")]
        self.folder = next((folder for folder in folders if folder.is_dir()), None)
        if self.source == "text" and self.folder is None:
            raise UserError(f"{root}: no text_c10 or text folder beside or inside it; use --caption-source auto")
        is_wanted = self.source == "attributes" or (self.source == "auto" and self.folder is None)
        self.attributes = _cub_attributes(root) if is_wanted else {}
        if self.source == "attributes" and not self.attributes:
            raise UserError(
                f"{root}: no attributes.txt with attributes/image_attribute_labels.txt; use --caption-source auto"
            )

    def captions(self, number: str, name: str, class_name: str) -> tuple[str, ...]:
        """Captions of one picture."""
        if self.folder is not None and self.source in ("auto", "text"):
            path = (self.folder / name).with_suffix(".txt")
            if path.is_file():
                return clean_captions(_text(path).splitlines())
            if self.source == "text":
                return ()
        bird = " ".join(class_name.split(".", 1)[-1].replace("_", " ").split())
        present = self.attributes.get(number, [])
        if present and self.source != "class":
            order = sorted(
                present, key=lambda phrase: keyed_seed(self.seed, int(number), len(phrase), sum(phrase.encode()))
            )
            return (f"a photo of a {bird}, a bird with {', '.join(order[:6])}",)
        return (f"a photo of a {bird}, a type of bird",)


def _cub_attributes(root: Path) -> dict[str, list[str]]:
    """Phrases such as "red wing" of the attributes that are present for sure, by picture number."""
    places = [folder / "attributes.txt" for folder in (root, root.parent, root / "attributes")]
    names_path = next((path for path in places if path.is_file()), None)
    labels_path = root / "attributes" / "image_attribute_labels.txt"
    if names_path is None or not labels_path.is_file():
        return {}
    phrases = {number: _phrase(text) for number, text in _table(names_path, required=True).items()}
    found: dict[str, list[str]] = {}
    for line in _text(labels_path).splitlines():
        columns = line.split()[:4]  # some rows of the archive carry more columns
        if len(columns) == 4 and columns[2] == "1" and columns[3] >= "3" and columns[1] in phrases:
            found.setdefault(columns[0], []).append(phrases[columns[1]])
    return found


def _phrase(attribute: str) -> str:
    """has_wing_color::red -> "red wing"; has_size::small_(5_-_9_in) -> "small size"."""
    group, _, value = attribute.partition("::")
    words = group.removeprefix("has_").split("_")
    part = " ".join(words[:-1]) or words[-1]
    return f"{value.split('(')[0].replace('_', ' ').strip()} {part}"


# --- one's own --------------------------------------------------------------------------------------------------------


def is_sharded(root: Path) -> bool:
    """Whether a path names tar files: one, a pattern, or a folder that holds some."""
    is_pattern = root.suffix == ".tar" or any(mark in root.name for mark in "*{")
    return is_pattern or (root.is_dir() and any(root.glob("*.tar")))


def _custom(settings: DataConfig, root: Path, is_train: bool, num_classes: int | None) -> Listed:
    if all((root / name).is_file() for name in SPLIT_FILES):
        return _rows(root / SPLIT_FILES[0 if is_train else 1])  # the data have their own split
    names = (SPLIT_FILES[0], "metadata.jsonl", "metadata.csv")
    listing = next((root / name for name in names if (root / name).is_file()), None)
    if listing is not None:
        found = _rows(listing)
    elif (root / "data_info.json").is_file():
        found = _pixart(root)
    elif num_classes:
        found = _class_folders(root)
    else:
        found = _sidecars(root)
    return found._replace(items=[item for item in found.items if held_out(item.id, settings.val_fraction) != is_train])


def _rows(listing: Path) -> Listed:
    """metadata.jsonl or .csv: one picture a row."""
    if listing.suffix == ".csv":
        numbered: list[tuple[int, Any]] = list(enumerate(csv.DictReader(io.StringIO(_text(listing), newline="")), 2))
    else:
        numbered = [(number, line) for number, line in enumerate(_text(listing).split("\n"), 1) if line.strip()]
    items: list[Item] = []
    skipped: list[tuple[str, str]] = []
    for number, row in numbered:
        try:
            record = json.loads(row) if isinstance(row, str) else row
            items.append(_from_record(record, listing.parent))
        except (ValueError, RecursionError) as error:
            skipped.append((f"{listing}:{number}", f"not a usable row ({error})"))
    if not items and skipped:
        raise UserError(
            f"{skipped[0][0]}: {skipped[0][1]}; each row needs one of {', '.join(IMAGE_KEYS)} and one of "
            f"{', '.join(CAPTION_KEYS)}"
        )
    return Listed(items, skipped)


def _from_record(record: Any, folder: Path) -> Item:
    if not isinstance(record, dict):
        raise ValueError(f"an object is expected, found {type(record).__name__}")
    name = next((record[key] for key in IMAGE_KEYS if record.get(key)), None)
    if not isinstance(name, str):
        raise ValueError(f"none of {', '.join(IMAGE_KEYS)} names a file")
    label = str(record.get("label", record.get("class")))
    return Item(name, folder / name, captions_of(record), label=int(label) if label.isdecimal() else None)


def _pixart(root: Path) -> Listed:
    folder = next((root / name for name in ("InternImgs", "images") if (root / name).is_dir()), root)
    items, skipped = [], []
    records = _json(root / "data_info.json")
    if not isinstance(records, list):
        raise UserError(f"{root / 'data_info.json'}: a list of records is expected, found {type(records).__name__}")
    for number, record in enumerate(records):
        if isinstance(record, dict) and isinstance(record.get("path"), str):
            items.append(Item(record["path"], folder / record["path"], clean_captions(record.get("prompt"))))
        else:
            skipped.append((f"data_info.json[{number}]", "no path"))
    return Listed(items, skipped)


def _sidecars(root: Path) -> Listed:
    items = []
    for path in sorted(path for path in root.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES):
        note = next((side for suffix in (".txt", ".caption") if (side := path.with_suffix(suffix)).is_file()), None)
        items.append(Item(str(path.relative_to(root)), path, clean_captions(_text(note).splitlines()) if note else ()))
    if not items:
        raise UserError(
            f"{root}: neither metadata.jsonl, train.jsonl, metadata.csv, data_info.json, .tar shards nor pictures with "
            ".txt files; see dit/README.md"
        )
    return Listed(items, [])


def _class_folders(root: Path) -> Listed:
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    return Listed(
        [
            Item(f"{folder.name}/{path.name}", path, (folder.name.replace("_", " "),), label=label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.glob("[!.]*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ],
        [],
    )


# --- webdataset tar files: items that are read when asked for --------------------------------------------------------
# A million samples open in seconds with a few bytes of memory each: names come from the shards' index, captions when a
# sample is used.

PICTURES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)


class ShardItems(Items):
    """items[i] -> Item whose picture is the sample's number. BadSample: no caption, or a json that cannot be read."""

    captions_at_hand = False

    def __init__(self, shards: Shards, numbers_N: np.ndarray) -> None:
        self.shards, self.numbers_N = shards, numbers_N

    @classmethod
    def open(cls, root: Path, keep: Callable[[str], bool]) -> tuple["ShardItems", list[tuple[str, str]]]:
        """The samples whose name is kept and that hold a picture, and (name, reason) of those without one."""
        shards, numbers, skipped = Shards(tar_files(root)), [], []
        for number, (name, extensions) in enumerate(shards.listing()):
            if not any(extension in PICTURES for extension in extensions):
                skipped.append((name, "no picture in the shard"))
            elif keep(name):
                numbers.append(number)
        return cls(shards, np.array(numbers, dtype=np.int64)), skipped

    def __len__(self) -> int:
        return len(self.numbers_N)

    def __getitem__(self, index: int) -> Item:
        number = int(self.numbers_N[index])
        sample = self.shards.read(number, ("txt", "json"))
        name = sample["__key__"]
        captions = clean_captions(sample["txt"].decode("utf-8", "replace").splitlines()) if "txt" in sample else ()
        if not captions and "json" in sample:
            try:
                captions = captions_of(json.loads(sample["json"]))
            except (ValueError, RecursionError, AttributeError) as error:
                raise BadSample(f"{name}: unreadable json ({error})") from None
        if not captions:
            raise BadSample(f"{name}: no caption; a .txt, or a .json with one of {', '.join(CAPTION_KEYS)}, is wanted")
        return Item(name, number, captions)

    def ids(self) -> Iterator[str]:
        """The samples' names, without reading them."""
        return (self.shards.names(int(number))[0] for number in self.numbers_N)

    def take(self, indices: list[int]) -> "ShardItems":
        """Only these items, in this order."""
        return ShardItems(self.shards, self.numbers_N[indices])

    def picture(self, item: Item) -> tuple[bytes, str]:
        """The encoded picture of an item, and its name."""
        assert isinstance(item.image, int)
        sample = self.shards.read(item.image, PICTURES)
        return next(sample[extension] for extension in PICTURES if extension in sample), item.id


def tar_files(root: Path) -> list[Path]:
    """The tar files of a folder, of a * pattern, or of a brace range such as data-{000..009}.tar."""
    if root.is_dir():
        return sorted(root.glob("*.tar"))
    name = root.name
    if "{" in name and ".." in name:
        before, inside = name.split("{", 1)
        inside, after = inside.split("}", 1)
        first, last = inside.split("..")
        return [root.parent / f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
    return sorted(root.parent.glob(name)) if "*" in name else [root]


# --- small files ------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy the file again") from None


def _table(path: Path, *, required: bool) -> dict[str, str]:
    """CUB's "<number> <rest of the line>" files."""
    if not path.is_file():
        if required:
            raise UserError(f"{path}: no such file; dataset_name cub needs CUB-200-2011's layout")
        return {}
    rows = (line.split(" ", 1) for line in _text(path).splitlines() if line.strip())
    return {row[0]: row[1].strip() if len(row) > 1 else "" for row in rows}


def _numbers(text: str, path: Path) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(part) for part in text.split())
    except ValueError:
        raise UserError(f"{path}: expected four numbers, found {text!r}") from None
    return x, y, width, height
