"""The public on-disk layouts as lists of items: MS-COCO, CUB-200-2011, and folders of one's own.

A reader looks only at lists and names, never into pictures, so a large set opens in seconds. What cannot be used is
returned beside the items, with the reason.
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from dit.config import DataConfig
from dit.data.texts import TextFiles, clean_captions
from shared.errors import BadSample, UserError, check_columns
from shared.media.folders import files_in, is_junk
from shared.media.shards import Shards
from shared.rng import keyed_seed

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".psd", ".svg", ".cr2", ".nef", ".arw", ".dng", ".raw", ".eps")
IMAGE_KEYS = ("file_name", "file", "image", "image_path")
CAPTION_KEYS = ("text", "caption", "prompt", "text_prompt", "captions")
LABEL_KEYS = ("label", "class", "cls")
SPLIT_FILES = ("train.jsonl", "val.jsonl")  # without the second, val_fraction holds out a share of the first
LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
HELD_OUT_FOLDERS = ("val", "validation", "valid", "test")


class Item(NamedTuple):
    """One picture: a file, or a place in shards; its captions; a box (x, y, width, height); a class from 0."""

    id: str
    image: Path | int
    captions: tuple[str, ...]
    box: tuple[float, float, float, float] | None = None
    label: int | None = None


class Strings:
    """Many strings in one piece of memory: a list of objects would be copied into every loader process, page by page,
    as each look at one counts it.
    """

    def __init__(self, values: list[str]) -> None:
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
        self.bytes = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogateescape")


class FileItems:
    """The pictures of a data set: an Item by its number, and its encoded picture. Here they are files, and the list is
    packed: about the bytes of their names and captions.
    """

    captions_at_hand = True  # all captions can be looked through without reading pictures

    def __init__(self, items: list[Item]) -> None:
        self.count = len(items)
        paths = [str(item.image) for item in items]
        self.root = os.path.commonpath(paths) if items and isinstance(items[0].image, Path) else ""
        self.root = os.path.dirname(self.root) if self.root in paths else self.root
        self._ids = Strings([item.id for item in items])
        self._images = Strings([path[len(self.root) :] for path in paths])
        self._captions = Strings(["\n".join(item.captions) for item in items])
        self._is_bare = np.array([not item.captions for item in items], dtype=bool)
        self._labels = np.array([-1 if item.label is None else item.label for item in items], dtype=np.int64)
        nowhere = (np.nan,) * 4
        has_boxes = any(item.box is not None for item in items)
        self._boxes = np.array([item.box or nowhere for item in items]) if has_boxes else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not -self.count <= index < self.count:
            raise IndexError(index)
        index %= self.count
        captions = () if self._is_bare[index] else tuple(self._captions[index].split("\n"))
        box = None if self._boxes is None or np.isnan(self._boxes[index]).any() else self._boxes[index].tolist()
        label = int(self._labels[index])
        return Item(
            self._ids[index],
            self._place(self.root + self._images[index]),
            captions,
            None if box is None else (box[0], box[1], box[2], box[3]),
            None if label < 0 else label,
        )

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @staticmethod
    def _place(text: str) -> Path | int:
        return Path(text)

    def ids(self) -> Iterator[str]:
        """The items' names."""
        return (self._ids[index] for index in range(self.count))

    def take(self, indices: list[int]) -> "FileItems":
        """Only these items, in this order."""
        return type(self)([self[index] for index in indices])

    def picture(self, item: Item) -> tuple[bytes, str]:
        """The encoded picture of an item, and where it lies. BadSample where it cannot be read."""
        assert isinstance(item.image, Path)
        try:
            return item.image.read_bytes(), str(item.image)
        except OSError as error:
            raise BadSample(f"{item.image}: cannot be read ({error.strerror})") from None

    def stamp(self, item: Item) -> str:
        """What changes when the picture's bytes change: size and time of its file."""
        assert isinstance(item.image, Path)
        return _stamp(item.image)


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise BadSample(f"{path}: cannot be read ({error.strerror})") from None
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass
class Reading:
    """One look at a data set: what is wanted, and what was found out on the way."""

    settings: DataConfig
    root: Path
    is_train: bool
    num_classes: int | None = None
    texts: TextFiles = field(default_factory=TextFiles)

    def holds(self, name: str) -> bool:
        """Whether a name belongs to the wanted split, where the data have none of their own."""
        return held_out(name, self.settings.val_fraction) != self.is_train


class Listed(NamedTuple):
    """What a layout lists, and (name, reason) of what it cannot use."""

    items: list[Item]
    skipped: list[tuple[str, str]]


class Found(NamedTuple):
    """Items in the order of their ids (shards: of the files), and (name, reason) of what was left out."""

    items: "Items"
    skipped: list[tuple[str, str]]


def read(settings: DataConfig, root: Path, *, is_train: bool, num_classes: int | None = None) -> Found:
    """Everything the layout lists for this split."""
    reading = Reading(settings, root, is_train, num_classes)
    if not is_pattern(root) and not os.path.exists(root):
        raise UserError(
            f"data.dataset_path {root}: no such folder; give the folder that holds the {settings.dataset_name} data"
        )
    if os.path.isfile(root) and root.suffix not in (".tar", ".parquet"):
        raise UserError(
            f"data.dataset_path {root}: is a file; give the folder it lies in, a .tar or a .parquet (unpack .tar.gz)"
        )
    if settings.dataset_name == "custom" and is_sharded(root):
        found = Found(*ShardItems.open(reading))
    elif settings.dataset_name == "custom" and parquet_files(root):
        found = Found(*ParquetItems.open(reading))
    else:
        readers = {"coco": _coco, "cub": _cub, "custom": _custom}
        found = _usable(readers[settings.dataset_name](reading), num_classes)
    reading.texts.warn(lambda text: print(text, file=sys.stderr))
    if found.skipped and settings.on_error == "raise":
        (name, reason), more = found.skipped[0], len(found.skipped) - 1
        raise UserError(f"{name}: {reason} (and {more} more); mend the data, or use --on-error skip")
    return found


def _usable(found: Listed, num_classes: int | None) -> Found:
    """The items that have what training needs, in the order of their ids."""
    items, skipped = [], list(found.skipped)
    for item in found.items:
        image = item.image
        if isinstance(image, Path) and "\\" in str(image) and not os.path.isfile(image):  # a list made on Windows
            image = Path(str(image).replace("\\", "/"))
        if not item.captions and not (num_classes and item.label is not None):
            skipped.append((item.id, _lack(num_classes)))
        elif not os.path.isfile(image):  # unlike Path's, False also for a name that no file can have
            skipped.append((item.id, f"{image}: no such picture"))
        else:
            items.append(item._replace(image=image))
    return Found(FileItems(sorted(items, key=lambda item: item.id)), skipped)


def captions_of(record: dict) -> tuple[str, ...]:
    """The captions under the first of CAPTION_KEYS that holds any."""
    return next((found for key in CAPTION_KEYS if (found := clean_captions(record.get(key)))), ())


def label_of(record: dict) -> int | None:
    """The class number under one of LABEL_KEYS; 2.0 is 2, as tables with gaps are written."""
    texts = (str(record[key]).strip().removesuffix(".0") for key in LABEL_KEYS if record.get(key) is not None)
    return next((int(text) for text in texts if text.isdecimal()), None)


def _lack(num_classes: int | None) -> str:
    """Why an item is left out that has neither a caption nor a class."""
    return f"no class: one of {', '.join(LABEL_KEYS)} with its number is wanted" if num_classes else "no caption"


def _is_name(name: Any) -> TypeGuard[str]:
    """Whether a list's entry can be the name of a file: a text without half signs, which JSON may hold."""
    try:
        return isinstance(name, str) and bool(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


def held_out(name: str, fraction: float) -> bool:
    """Whether a name belongs to the validation share; a property of the name alone."""
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 2**32 < fraction


# --- MS-COCO ----------------------------------------------------------------------------------------------------------


def _coco(reading: Reading) -> Listed:
    root, split = reading.root, "train" if reading.is_train else "val"
    years = ("2017", "2014") if reading.settings.coco_year == "auto" else (reading.settings.coco_year,)
    listings = [root / "annotations" / f"captions_{split}{year}.json" for year in years]
    listing = next((path for path in listings if path.is_file()), None)
    if listing is None:
        raise UserError(
            f"{root}: no annotations/captions_{split}{years[0]}.json{' (nor 2014)' if len(years) > 1 else ''}; "
            "dataset_name coco needs MS-COCO's layout"
        )
    tree = _json(listing, reading.texts)
    try:
        names = {image["id"]: image["file_name"] for image in tree["images"]}
        captions: dict[str, list[Any]] = {}  # by text: some converters write 7 here and "7" there
        for note in sorted(tree["annotations"], key=lambda note: (str(type(note["id"])), note["id"])):
            captions.setdefault(str(note["image_id"]), []).append(note["caption"])
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
    items, skipped = [], []
    for key, name in names.items():
        number = f"{key:012d}" if isinstance(key, int) else str(key)  # theirs are numbers, converters write names
        if _is_name(name) and _is_name(number):
            items.append(Item(number, folder / name, clean_captions(captions.get(str(key), []))))
        else:
            skipped.append((repr(key), f"its file_name is {name!r}, the name of a file is expected"))
    return Listed(items, skipped)


# --- CUB-200-2011 -----------------------------------------------------------------------------------------------------


def _cub(reading: Reading) -> Listed:
    settings, texts = reading.settings, reading.texts
    root = next(
        (path for path in (reading.root, reading.root / "CUB_200_2011") if (path / "images.txt").is_file()),
        reading.root,
    )
    names = _table(root / "images.txt", texts, required=True)
    classes = _table(root / "classes.txt", texts, required=False)
    labels = _table(root / "image_class_labels.txt", texts, required=False)
    split = _table(root / "train_test_split.txt", texts, required=False)
    boxes = _table(root / "bounding_boxes.txt", texts, required=False)
    source = _CubCaptions(root, reading)
    items = []
    for number, name in names.items():
        training = split[number].strip() == "1" if number in split else not held_out(name, 0.1)
        if training != reading.is_train:
            continue
        class_name = classes.get(labels.get(number, "").strip(), name.split("/")[0])
        box = _numbers(boxes[number], root / "bounding_boxes.txt") if settings.use_bbox and number in boxes else None
        label = int(labels[number]) - 1 if labels.get(number, "").isdecimal() else None
        items.append(Item(name, root / "images" / name, source.captions(number, name, class_name), box, label))
    return Listed(items, [])


class _CubCaptions:
    """The first source of captions that exists: ten lines of text, attributes, the class name."""

    def __init__(self, root: Path, reading: Reading) -> None:
        self.source, self.seed, self.texts = (
            reading.settings.caption_source,
            reading.settings.subset_seed,
            reading.texts,
        )
        folders = [base / name for base in (root, root.parent) for name in ("text_c10", "text")]
        self.folder = next((folder for folder in folders if folder.is_dir()), None)
        if self.source == "text" and self.folder is None:
            raise UserError(f"{root}: no text_c10 or text folder beside or inside it; use --caption-source auto")
        is_wanted = self.source == "attributes" or (self.source == "auto" and self.folder is None)
        self.attributes = _cub_attributes(root, self.texts) if is_wanted else {}
        if self.source == "attributes" and not self.attributes:
            raise UserError(
                f"{root}: no attributes.txt with attributes/image_attribute_labels.txt; use --caption-source auto"
            )

    def captions(self, number: str, name: str, class_name: str) -> tuple[str, ...]:
        """Captions of one picture."""
        if self.folder is not None and self.source in ("auto", "text"):
            path = (self.folder / name).with_suffix(".txt")
            if path.is_file():
                return self.texts.captions(path)
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


def _cub_attributes(root: Path, texts: TextFiles) -> dict[str, list[str]]:
    """Phrases such as "red wing" of the attributes that are present for sure, by picture number."""
    places = [folder / "attributes.txt" for folder in (root, root.parent, root / "attributes")]
    names_path = next((path for path in places if path.is_file()), None)
    labels_path = root / "attributes" / "image_attribute_labels.txt"
    if names_path is None or not labels_path.is_file():
        return {}
    phrases = {number: _phrase(text) for number, text in _table(names_path, texts, required=True).items()}
    found: dict[str, list[str]] = {}
    for line in texts.read(labels_path).split("\n"):
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


def is_pattern(root: Path) -> bool:
    """Whether a path is a pattern of shards and not the name of something that is there."""
    return any(mark in root.name for mark in "*{") and not os.path.exists(root)


def is_sharded(root: Path) -> bool:
    """Whether a path names tar files: one, a pattern, or a folder that holds some."""
    return root.suffix == ".tar" or is_pattern(root) or (root.is_dir() and bool(files_in(root, "*.tar")))


def _custom(reading: Reading) -> Listed:
    root = reading.root
    if all((root / name).is_file() for name in SPLIT_FILES):
        return _rows(root / SPLIT_FILES[0 if reading.is_train else 1], reading.texts)  # the data have their own split
    listing = _listing(root)
    if listing is None and (folders := split_folders(root, reading.num_classes)):
        chosen = folders[0] if reading.is_train or folders[1] is None else folders[1]
        found = _layout(reading, chosen, class_root=folders[0])
        return found if folders[1] is not None else _split(found, reading)
    return _split(_layout(reading, root, class_root=root), reading)


def _layout(reading: Reading, root: Path, *, class_root: Path) -> Listed:
    """What one folder lists. class_root: the folder whose sub-folders are numbered as the classes."""
    listing = _listing(root)
    if listing is not None:
        return _rows(listing, reading.texts)
    if (root / "data_info.json").is_file():
        return _pixart(root, reading.texts)
    if reading.num_classes:
        return _class_folders(root, class_root, reading.num_classes)
    return _sidecars(root, reading.texts)


def _split(found: Listed, reading: Reading) -> Listed:
    return found._replace(items=[item for item in found.items if reading.holds(item.id)])


def _listing(root: Path) -> Path | None:
    return next((root / name for name in (SPLIT_FILES[0], *LISTINGS) if (root / name).is_file()), None)


def split_folders(root: Path, num_classes: int | None) -> tuple[Path, Path | None] | None:
    """(train, held-out or None) of a folder in the form of ImageNet or of Hugging Face's imagefolder."""
    train = root / "train"
    if not train.is_dir() or not (_listing(train) or (num_classes and any(map(_has_pictures, _folders(train))))):
        return None
    return train, next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)


def _rows(listing: Path, texts: TextFiles) -> Listed:
    """metadata.jsonl, .csv or .tsv: one picture a row."""
    text = texts.read(listing)
    if listing.suffix in (".csv", ".tsv"):
        numbered = _table_rows(listing, text)
    else:
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    items: list[Item] = []
    skipped: list[tuple[str, str]] = []
    for number, row in numbered:
        try:
            record = json.loads(row) if isinstance(row, str) and listing.suffix == ".jsonl" else row
            items.append(_from_record(record, listing.parent))
        except (ValueError, RecursionError) as error:
            skipped.append((f"{listing}:{number}", f"not a usable row ({error})"))
    if not items and skipped:
        raise UserError(
            f"{skipped[0][0]}: {skipped[0][1]}; each row needs one of {', '.join(IMAGE_KEYS)} and one of "
            f"{', '.join(CAPTION_KEYS)}"
        )
    return Listed(items, skipped)


def _table_rows(listing: Path, text: str) -> list[tuple[int, Any]]:
    """(line, record) of a .csv or .tsv; a record says what is wrong with its row, where something is."""
    first = text.partition("\n")[0]
    names = {*IMAGE_KEYS, *CAPTION_KEYS}
    cells = {mark: [cell.strip(' "').lower() for cell in first.split(mark)] for mark in ",\t;|"}
    delimiter = max(cells, key=lambda mark: len(set(cells[mark]) & names))
    if not set(cells[delimiter]) & {*IMAGE_KEYS}:
        raise UserError(
            f"{listing}: its first row must name the columns, one of {', '.join(IMAGE_KEYS)} among them; found "
            f"{first[:120]!r}"
        )
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header = [cell.strip().lower() for cell in next(lines)]
    check_columns(listing, header)
    rows: list[tuple[int, Any]] = []
    began = lines.line_num + 1
    try:
        for row in lines:
            if len(row) > len(header):
                rows.append((began, f"has {len(row)} cells, the first row {len(header)}: put the caption in quotes"))
            elif row:
                rows.append((began, dict(zip(header, row, strict=False))))
            began = lines.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{listing}:{began}: not a readable row ({error}); look for a quote that is not closed"
        ) from None
    return rows


def _from_record(record: Any, folder: Path) -> Item:
    if isinstance(record, str):
        raise ValueError(record)
    if not isinstance(record, dict):
        raise ValueError(f"an object is expected, found {type(record).__name__}")
    name = next((record[key] for key in IMAGE_KEYS if record.get(key)), None)
    if not _is_name(name):
        raise ValueError(f"none of {', '.join(IMAGE_KEYS)} names a file")
    return Item(name, folder / name, captions_of(record), label=label_of(record))


def _pixart(root: Path, texts: TextFiles) -> Listed:
    folder = next((root / name for name in ("InternImgs", "images") if (root / name).is_dir()), root)
    items, skipped = [], []
    records = _json(root / "data_info.json", texts)
    if not isinstance(records, list):
        raise UserError(f"{root / 'data_info.json'}: a list of records is expected, found {type(records).__name__}")
    for number, record in enumerate(records):
        if isinstance(record, dict) and _is_name(record.get("path")):
            items.append(Item(record["path"], folder / record["path"], clean_captions(record.get("prompt"))))
        else:
            skipped.append((f"data_info.json[{number}]", "no path"))
    return Listed(items, skipped)


def _sidecars(root: Path, texts: TextFiles) -> Listed:
    """Pictures with text files next to them, at any depth, without hidden folders and what archives leave behind."""
    items, skipped, unread = [], [], []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        notes = {Path(name).stem: name for name in sorted(names) if Path(name).suffix.lower() == ".caption"}
        notes |= {Path(name).stem: name for name in sorted(names, reverse=True) if Path(name).suffix.lower() == ".txt"}
        for name in sorted(names):
            path, suffix = Path(folder) / name, Path(name).suffix.lower()
            if is_junk(name):
                continue
            if suffix in IMAGE_SUFFIXES:
                note = notes.get(Path(name).stem)
                captions = () if note is None else texts.captions(Path(folder) / note)
                items.append(Item(str(path.relative_to(root)), path, captions))
            elif suffix in UNREAD_SUFFIXES:
                unread.append(
                    (str(path.relative_to(root)), f"{suffix} pictures are not read here; convert them to .png")
                )
    skipped += unread
    if not items:
        has_folders = any(
            map(_has_pictures, (f for name in ("train", *HELD_OUT_FOLDERS) for f in _folders(root / name)))
        )
        raise UserError(
            f"{root}: neither {', '.join((*SPLIT_FILES[:1], *LISTINGS))}, data_info.json, .tar or .parquet shards nor "
            f"pictures with .txt files{'; for folders of classes set --num-classes' if has_folders else ''}; see "
            "dit/README.md"
        )
    return Listed(items, skipped)


def _class_folders(root: Path, class_root: Path, num_classes: int) -> Listed:
    """One folder a class, numbered in the order of their names; folders without pictures are no classes."""
    names = [folder.name for folder in _folders(class_root) if _has_pictures(folder)]
    if not names:
        found = _some([folder.name for folder in _folders(class_root)]) or "there is none"
        raise UserError(
            f"{class_root}: no folder with pictures directly in it ({found}); with model.num_classes each class is one"
        )
    if len(names) != num_classes:
        empty = [folder.name for folder in _folders(class_root) if not _has_pictures(folder)]
        text = (
            f"{class_root}: {len(names)} folders hold pictures ({_some(names)}), "
            f"{f'{len(empty)} hold none ({_some(empty)}), ' if empty else ''}model.num_classes is {num_classes}; "
            "classes are numbered in the order of the folders"
        )
        if len(names) > num_classes:
            raise UserError(f"{text}, so that the last have no place: set --num-classes {len(names)}")
        print(f"warning: {text}, from 0 to {len(names) - 1}: complete them if some are missing", file=sys.stderr)
    strange = [folder.name for folder in _folders(root) if _has_pictures(folder) and folder.name not in names]
    if strange:
        raise UserError(f"{root / strange[0]}: no class of {class_root} has this name; rename or remove the folder")
    return Listed(
        [
            Item(f"{name}/{path.name}", path, (name.replace("_", " "),), label=label)
            for label, name in enumerate(names)
            for path in files_in(root / name, "*")
            if path.suffix.lower() in IMAGE_SUFFIXES
        ],
        [],
    )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _folders(root: Path) -> list[Path]:
    """Sub-folders by name, without hidden ones and what archives leave behind."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not is_junk(path.name)) if root.is_dir() else []


def _has_pictures(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not is_junk(entry.name) for entry in entries)


# --- shards: webdataset tar files and parquet, whose items are read when asked for -----------------------------------

# A million samples open in seconds with a few bytes of memory each: names come from the shards' index, captions when a
# sample is used.

PICTURES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
SIDES = ("txt", "caption", "json", "cls")  # members beside the picture


class ShardItems:
    """The same for shards: an Item's picture is its sample's number. BadSample: no caption, or an unreadable json."""

    captions_at_hand = False

    def __init__(self, shards: Shards, numbers_N: np.ndarray, num_classes: int | None = None) -> None:
        self.shards, self.numbers_N, self.num_classes = shards, numbers_N, num_classes

    @classmethod
    def open(cls, reading: Reading) -> tuple["ShardItems", list[tuple[str, str]]]:
        """The samples of the wanted split that hold a picture, and (name, reason) of those without one."""
        shards = Shards(tar_files(reading.root))
        numbers: list[int] = []
        skipped: list[tuple[str, str]] = []
        for number, (name, extensions) in enumerate(shards.listing()):
            if not any(extension in PICTURES for extension in extensions):
                skipped.append((name, "no picture in the shard"))
            elif reading.holds(name):
                numbers.append(number)
        return cls(shards, np.array(numbers, dtype=np.int64), reading.num_classes), skipped

    def __len__(self) -> int:
        return len(self.numbers_N)

    def __getitem__(self, index: int) -> Item:
        number = int(self.numbers_N[index])
        sample = self.shards.read(number, SIDES)
        name, texts = sample["__key__"], TextFiles()
        note = sample.get("txt", sample.get("caption"))
        captions = () if note is None else clean_captions(texts.decode(note, name).split("\n"))
        label = label_of({"label": sample["cls"].decode("latin-1")}) if "cls" in sample else None
        if "json" in sample and (not captions or label is None):
            try:
                record = json.loads(texts.decode(sample["json"], name))
                captions, label = captions or captions_of(record), label_of(record) if label is None else label
            except (ValueError, RecursionError, AttributeError) as error:
                raise BadSample(f"{name}: unreadable json ({error})") from None
        if self.num_classes and label is None:
            raise BadSample(f"{name}: no class; a .cls with its number, or a .json with label, is wanted")
        if not self.num_classes and not captions:
            raise BadSample(f"{name}: no caption; a .txt, or a .json with one of {', '.join(CAPTION_KEYS)}, is wanted")
        return Item(name, number, captions, label=label)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def ids(self) -> Iterator[str]:
        """The samples' names, without reading them."""
        return (self.shards.names(int(number))[0] for number in self.numbers_N)

    def take(self, indices: list[int]) -> "ShardItems":
        """Only these items, in this order."""
        return ShardItems(self.shards, self.numbers_N[indices], self.num_classes)

    def picture(self, item: Item) -> tuple[bytes, str]:
        """The encoded picture of an item, and its name."""
        assert isinstance(item.image, int)
        sample = self.shards.read(item.image, PICTURES)
        return next(sample[extension] for extension in PICTURES if extension in sample), item.id

    def stamp(self, item: Item) -> str:
        """Size and time of the shard, and the number of the sample."""
        assert isinstance(item.image, int)
        return f"{_stamp(self.shards.path_of(item.image))} {item.image}"


class ParquetItems(FileItems):
    """Rows of parquet files as Hugging Face writes them: image ({bytes, path} or bytes), and a caption or label."""

    files: list[Path]
    column: str

    @classmethod
    def open(cls, reading: Reading) -> tuple["ParquetItems", list[tuple[str, str]]]:
        """The rows of the wanted split; captions and labels are read at once, pictures when asked for."""
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        files = parquet_files(reading.root)
        has_split = any(_is_held_out_file(path) for path in files) and not all(
            _is_held_out_file(path) for path in files
        )
        items: list[Item] = []
        skipped: list[tuple[str, str]] = []
        column = ""
        for number, path in enumerate(files):
            if has_split and _is_held_out_file(path) == reading.is_train:
                continue
            try:
                names = parquet.read_schema(path).names
                column = next(name for name in ("image", "jpg", "png", "img") if name in names)
                kept = [name for name in (*CAPTION_KEYS, *LABEL_KEYS) if name in names]
                rows = parquet.read_table(path, columns=kept).to_pylist()
            except StopIteration:
                raise UserError(f"{path}: no column image; its columns are {', '.join(names)}") from None
            except (arrow.ArrowException, OSError) as error:
                raise UserError(f"{path}: not a readable parquet file ({str(error)[:120]}); copy it again") from None
            for row, record in enumerate(rows):
                name, captions, label = f"{path.name}:{row}", captions_of(record), label_of(record)
                if not captions and not (reading.num_classes and label is not None):
                    skipped.append((name, _lack(reading.num_classes)))
                elif has_split or reading.holds(name):
                    items.append(Item(name, number << 40 | row, captions, label=label))
        made = cls(items)
        made.files, made.column = files, column
        return made, skipped

    @staticmethod
    def _place(text: str) -> Path | int:
        return int(text)

    def take(self, indices: list[int]) -> "ParquetItems":
        """Only these items, in this order."""
        made = ParquetItems([self[index] for index in indices])
        made.files, made.column = self.files, self.column
        return made

    def picture(self, item: Item) -> tuple[bytes, str]:
        """The encoded picture of a row; a row group is read as a whole and kept until another is asked for."""
        assert isinstance(item.image, int)
        import pyarrow.parquet as parquet

        file, row = self.files[item.image >> 40], item.image & (1 << 40) - 1
        key = (os.getpid(), file)
        if getattr(self, "_open_key", None) != key:
            self._open_key, self._open_file = key, parquet.ParquetFile(file)
            sizes = [self._open_file.metadata.row_group(n).num_rows for n in range(self._open_file.num_row_groups)]
            self._ends, self._group, self._rows = np.cumsum(sizes), -1, []
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group != self._group:
            self._rows = self._open_file.read_row_group(group, columns=[self.column])[self.column].to_pylist()
            self._group = group
        cell = self._rows[row - (int(self._ends[group - 1]) if group else 0)]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise BadSample(f"{item.id}: its image holds no bytes")
        return data, item.id

    def stamp(self, item: Item) -> str:
        """Size and time of the file, and the number of the row."""
        assert isinstance(item.image, int)
        return f"{_stamp(self.files[item.image >> 40])} {item.image}"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_open_")}


Items = FileItems | ShardItems


def parquet_files(root: Path) -> list[Path]:
    """The parquet files of a path: one, or those of a folder or of its folder data/."""
    if root.suffix == ".parquet":
        return [root]
    if not root.is_dir() or _listing(root) is not None:
        return []
    return files_in(root, "*.parquet") or files_in(root / "data", "*.parquet")


def _is_held_out_file(path: Path) -> bool:
    return path.name.startswith(HELD_OUT_FOLDERS)


def tar_files(root: Path) -> list[Path]:
    """The tar files of a folder, of a * pattern, or of a brace range such as data-{000..009}.tar."""
    if root.is_dir():
        return files_in(root, "*.tar")
    name = root.name
    if not root.exists() and "{" in name and ".." in name:
        before, inside = name.split("{", 1)
        inside, _, after = inside.partition("}")
        first, _, last = inside.partition("..")
        if not (first.isdecimal() and last.isdecimal()):
            raise UserError(f"data.dataset_path {root}: a range of shards is written as data-{{000..009}}.tar")
        return [root.parent / f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
    if not root.exists() and "*" in name:
        found = files_in(root.parent, name)
        if not found:
            raise UserError(f"data.dataset_path {root}: no file fits this pattern")
        return found
    return [root]


# --- small files ------------------------------------------------------------------------------------------------------


def _json(path: Path, texts: TextFiles) -> Any:
    try:
        return json.loads(texts.read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy the file again") from None


def _table(path: Path, texts: TextFiles, *, required: bool) -> dict[str, str]:
    """CUB's "<number> <rest of the line>" files."""
    if not path.is_file():
        if required:
            raise UserError(f"{path}: no such file; dataset_name cub needs CUB-200-2011's layout")
        return {}
    rows = (line.split(None, 1) for line in texts.read(path).split("\n") if line.strip())
    return {row[0]: row[1].strip() if len(row) > 1 else "" for row in rows}


def _numbers(text: str, path: Path) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(part) for part in text.split())
    except ValueError:
        raise UserError(f"{path}: expected four numbers, found {text!r}") from None
    return x, y, width, height
