"""What lies on disk: COCO, Clotho, AudioCaps, VoxCeleb and captions in JSON lines, as lists of records."""

import csv
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from multimodal.data.audio import AUDIO_SUFFIXES
from multimodal.data.image import IMAGE_SUFFIXES
from shared.errors import UserError

Kind = Literal["image", "audio", "voice"]
KINDS: tuple[Kind, ...] = ("image", "audio", "voice")
CLOTHO_SPLITS = {"train": "development", "val": "validation", "test": "evaluation"}
VOX_SPLITS = {1: "train", 2: "val", 3: "test"}


class Source(Protocol):
    """Something other than a file on disk that gives the bytes of one."""

    def read(self) -> bytes:
        """The encoded picture or sound."""


@dataclass(frozen=True)
class Record:
    """One picture or sound with its captions. labels: class indices, None where the set has none."""

    id: str
    source: Path | Source
    captions: tuple[str, ...]
    dataset: str
    kind: Kind
    labels: tuple[int, ...] | None = None
    video: Path | None = None  # voice: the video that a frame is read from


class Records(Sequence[Record]):
    """Records that are at hand, on disk, or both. What is asked here of all of them reads no caption from a shard."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """Their ids."""

    @abstractmethod
    def take(self, places_N: np.ndarray) -> "Records":
        """Those at these places, which ascend."""

    @abstractmethod
    def by_kind(self) -> dict[Kind, "Records"]:
        """Pictures, sounds and voices apart."""

    @abstractmethod
    def all_labelled(self) -> bool:
        """Whether each has class labels, which a batch needs; of a shard the first readable one speaks for all."""


class ListRecords(list[Record], Records):
    """Records at hand."""

    def names(self) -> Iterator[str]:
        return (record.id for record in self)

    def take(self, places_N: np.ndarray) -> "ListRecords":
        return ListRecords(self[place] for place in places_N)

    def by_kind(self) -> dict[Kind, Records]:
        return {kind: own for kind in KINDS if (own := ListRecords(record for record in self if record.kind == kind))}

    def all_labelled(self) -> bool:
        return all(record.labels is not None for record in self)


@dataclass(frozen=True)
class Found:
    """The records of one split, and how many the set lists whose file is not there."""

    records: Records
    missing: int = 0


def remedy(name: str, folder: Path) -> str:
    """How to get a data set that is not there."""
    if name in ("jsonl", "shards"):
        return f"give its place with --set data.paths='{{{name}: FOLDER}}'"
    return (
        f"python multimodal/download_datasets.py --datasets {name} --data-root {folder.parent}, or train on the "
        "sample data "
        "with --config small"
    )


# --- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(folder: Path, split: str) -> Found:
    """train2017/ and val2017/ with annotations/captions_*2017.json, and instances_*2017.json where they are."""
    year = f"{'train' if split == 'train' else 'val'}2017"
    path = folder / "annotations" / f"captions_{year}.json"
    if not path.exists():
        if split == "train":
            raise UserError(f"data set coco: no file {path}; {remedy('coco', folder)}")
        return Found(ListRecords())
    tree = read_json(path, ("images", "annotations"))
    captions: dict[int, list[str]] = {}
    for entry in tree["annotations"]:
        if text := clean(entry["caption"]):
            captions.setdefault(entry["image_id"], []).append(text)
    labels = read_coco_labels(folder / "annotations" / f"instances_{year}.json")
    listed = [(image["id"], folder / year / image["file_name"]) for image in tree["images"] if image["id"] in captions]
    present = names_in(folder / year)
    records = [
        Record(
            f"coco/{key:012d}",
            file,
            tuple(captions[key]),
            "coco",
            "image",
            None if labels is None else labels.get(key, ()),
        )
        for key, file in sorted(listed)
        if file.name in present
    ]
    return Found(ListRecords(records), len(listed) - len(records))


def read_coco_labels(path: Path) -> dict[int, tuple[int, ...]] | None:
    """Image id -> class indices: ranks of the category ids, since the 80 ids run 1..90 with gaps."""
    if not path.exists():
        return None
    tree = read_json(path, ("annotations", "categories"))
    index = {key: rank for rank, key in enumerate(sorted(category["id"] for category in tree["categories"]))}
    labels: dict[int, set[int]] = {}
    for entry in tree["annotations"]:
        labels.setdefault(entry["image_id"], set()).add(index[entry["category_id"]])
    return {key: tuple(sorted(found)) for key, found in labels.items()}


def coco_class_names(folder: Path) -> list[str]:
    """The 80 names in the order of the class indices."""
    tree = read_json(folder / "annotations" / "instances_val2017.json", ("categories",))
    return [category["name"] for category in sorted(tree["categories"], key=lambda category: category["id"])]


def read_karpathy(folder: Path, split: str) -> Found:
    """dataset_coco.json of Karpathy's splits (train includes restval), whose files lie in train2014/ and val2014/."""
    path = folder / "dataset_coco.json"
    if not path.exists():
        raise UserError(
            f"data set coco: no file {path}; python multimodal/download_datasets.py --datasets coco --splits karpathy"
        )
    wanted = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}[split]
    listed = [image for image in read_json(path, ("images",))["images"] if image["split"] in wanted]
    records = []
    for image in listed:
        places = (
            folder / image["filepath"] / image["filename"],
            *(folder / year / f"{image['cocoid']:012d}.jpg" for year in ("train2017", "val2017")),
        )
        file = next((place for place in places if place.exists()), None)
        captions = tuple(filter(None, (clean(sentence["raw"]) for sentence in image["sentences"])))
        if file is not None and captions:
            records.append(Record(f"coco/{image['cocoid']:012d}", file, captions, "coco", "image"))
    return Found(ListRecords(records), len(listed) - len(records))


# --- sound ------------------------------------------------------------------------------------------------------------


def read_clotho(folder: Path, split: str) -> Found:
    """clotho_captions_{development,validation,evaluation}.csv (UTF-8) and the folders of those names."""
    name = CLOTHO_SPLITS[split]
    path = folder / f"clotho_captions_{name}.csv"
    if not path.exists():
        if split == "train":
            raise UserError(f"data set clotho: no file {path}; {remedy('clotho', folder)}")
        return Found(ListRecords())
    rows = read_csv(path, ("file_name", "caption_1"))
    present, records = names_in(folder / name), []
    for row in rows:
        captions = (clean(row[key] or "") for key in sorted(key for key in row if key and key.startswith("caption_")))
        captions = tuple(filter(None, captions))
        if row["file_name"] in present and captions:
            file = folder / name / row["file_name"]
            records.append(Record(f"clotho/{name}/{file.name}", file, captions, "clotho", "audio"))
    return Found(ListRecords(records), len(rows) - len(records))


def read_clotho_keywords(folder: Path, split: str) -> dict[str, list[str]]:
    """File name -> keywords, from the metadata table, which is ISO-8859-1."""
    path = folder / f"clotho_metadata_{CLOTHO_SPLITS[split]}.csv"
    rows = read_csv(path, ("file_name", "keywords"), encoding="iso-8859-1")
    return {row["file_name"]: [word.strip() for word in row["keywords"].split(";") if word.strip()] for row in rows}


def read_audiocaps(folder: Path, split: str) -> Found:
    """{train,val,test}.csv (one caption a row; several rows a clip) and the clips under audio/SPLIT/ or SPLIT/.

    A clip is named ID_START, ID or YID, with any sound suffix.
    """
    path = folder / f"{split}.csv"
    if not path.exists():
        if split == "train":
            raise UserError(f"data set audiocaps: no file {path}; {remedy('audiocaps', folder)}")
        return Found(ListRecords())
    captions: dict[tuple[str, str], list[str]] = {}
    for row in read_csv(path, ("youtube_id", "start_time", "caption")):
        if text := clean(row["caption"]):
            captions.setdefault((row["youtube_id"], row["start_time"]), []).append(text)
    files = {
        file.stem: file
        for place in (folder / split, folder / "audio" / split)
        if place.is_dir()
        for file in sorted(place.iterdir())
        if file.suffix.lower() in AUDIO_SUFFIXES
    }
    records = []
    for (key, start), texts in captions.items():
        file = next((files[name] for name in (f"{key}_{start}", key, f"Y{key}") if name in files), None)
        if file is not None:
            records.append(Record(f"audiocaps/{split}/{key}_{start}", file, tuple(texts), "audiocaps", "audio"))
    return Found(ListRecords(records), len(captions) - len(records))


def read_voxceleb(folder: Path, split: str) -> Found:
    """VoxCeleb1 wav/ID/VIDEO/N.wav or VoxCeleb2 dev/aac/...m4a, with dev/mp4/...mp4 for the frames.

    Split by iden_split.txt where it is (VoxCeleb1), else one video of 20 is validation. Label: rank of the
    speaker's id.
    """
    root = next((place for place in (folder / "wav", folder / "dev" / "aac", folder / "aac") if place.is_dir()), None)
    if root is None:
        raise UserError(f"data set voxceleb: neither wav/ nor dev/aac/ in {folder}; {remedy('voxceleb', folder)}")
    speakers = {path.name: rank for rank, path in enumerate(sorted(p for p in root.iterdir() if p.is_dir()))}
    listed = _identification_split(folder / "iden_split.txt")
    records = []
    for file in sorted(path for path in root.glob("*/*/*") if path.suffix.lower() in AUDIO_SUFFIXES):
        name = file.relative_to(root).as_posix()
        own = listed.get(name, "train") if listed else ("val" if _is_held_out(file.parent) else "train")
        if own == split:
            video = next(
                (
                    place
                    for place in (
                        folder / "dev" / "mp4" / Path(name).with_suffix(".mp4"),
                        folder / "mp4" / Path(name).with_suffix(".mp4"),
                    )
                    if place.exists()
                ),
                None,
            )
            records.append(
                Record(f"voxceleb/{name}", file, (), "voxceleb", "voice", (speakers[Path(name).parts[0]],), video)
            )
    return Found(ListRecords(records))


def _identification_split(path: Path) -> dict[str, str]:
    """Lines `1|2|3 id.../video/00001.wav`."""
    if not path.exists():
        return {}
    try:
        rows = (line.split() for line in path.read_text().splitlines() if line.strip())
        return {name: VOX_SPLITS[int(number)] for number, name in rows}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: lines `1|2|3 id.../video/00001.wav` are wanted ({error}); fetch it again") from None


def _is_held_out(video: Path) -> bool:
    """One video of 20, by the hash of its name: all utterances of a video fall on one side."""
    return (
        int.from_bytes(hashlib.blake2b("/".join(video.parts[-2:]).encode(), digest_size=4).digest(), "little") % 20 == 0
    )


# --- own data ---------------------------------------------------------------------------------------------------------


def read_jsonl(folder: Path, split: str) -> Found:
    """{train,val,test}.jsonl: {"file": path in the folder, "captions": [...] or "caption": text, "labels": [indices]}
    a line.
    """
    path = folder / f"{split}.jsonl"
    if not path.exists():
        if split == "train":
            raise UserError(f"data set jsonl: no file {path}; {remedy('jsonl', folder)}")
        return Found(ListRecords())
    records, missing = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                source, captions = folder / row["file"], captions_of(row)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{path}: line {number} is not an object with file and captions; mend that line"
                ) from None
            if not source.is_file():
                missing += 1
                continue
            labels = labels_of(row, f"{path}: line {number}")
            name = f"{split}/{row['file']}"
            records.append(Record(name, source, captions, "jsonl", kind_of(source.suffix, path), labels))
    return Found(ListRecords(records), missing)


def captions_of(row: dict) -> tuple[str, ...]:
    """The captions of a row that are not blank; ValueError where there is none, TypeError where one is no text."""
    captions = tuple(filter(None, (clean(text) for text in row.get("captions") or [row["caption"]])))
    if not captions:
        raise ValueError("no caption")
    return captions


def kind_of(suffix: str, where: Path) -> Kind:
    """Whether a file is a picture or a sound, by its suffix."""
    if suffix.lower() in IMAGE_SUFFIXES:
        return "image"
    if suffix.lower() in AUDIO_SUFFIXES:
        return "audio"
    raise UserError(f"{where}: {suffix} is neither a picture nor a sound that can be read")


def labels_of(row: dict, where: str) -> tuple[int, ...] | None:
    """The class numbers of a row, None where it has none; UserError naming the place where they are no numbers."""
    if row.get("labels") is None:
        return None
    try:
        labels = tuple(map(int, row["labels"]))
    except (ValueError, TypeError):
        labels = (-1,)
    if min(labels, default=0) < 0:
        raise UserError(f"{where}: labels {row['labels']!r}: a list of class numbers from 0 is wanted")
    return labels


# Reading the tables that data sets come with; a UserError names the file that is not what it should be.


def clean(caption: str) -> str:
    """White space collapsed (some captions hold stray newlines)."""
    return " ".join(caption.split())


def names_in(folder: Path) -> set[str]:
    """File names in a folder; empty where there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def read_json(path: Path, keys: Iterable[str]) -> dict:
    """A JSON object with these keys."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        absent = [key for key in keys if key not in tree]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from None
    if absent:
        raise UserError(f"{path}: has no key {absent[0]!r}; download it again")
    return tree


def read_csv(path: Path, columns: tuple[str, ...], encoding: str = "utf-8-sig") -> list[dict[str, str]]:
    """The rows of a table with these columns."""
    try:
        with open(path, encoding=encoding, newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in columns if name not in (reader.fieldnames or ())]
            if absent:
                raise UserError(
                    f"{path}: has no column {absent[0]}; its columns are {', '.join(reader.fieldnames or ())}"
                )
            rows = list(reader)
            short = next((place for place, row in enumerate(rows, 2) if None in [row[name] for name in columns]), None)
            if short is not None:
                raise UserError(f"{path}: row {short} has too few columns; download it again")
            return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as {encoding} CSV ({error}); download it again") from None
