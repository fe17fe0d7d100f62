"""Records that stay on disk: webdataset shards, as img2dataset, CLAP and others write them.

A million samples open in seconds with a few bytes of memory each: names come from the shards' index, captions when a
sample is used.
"""

import json
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from multimodal.data.audio import AUDIO_SUFFIXES
from multimodal.data.image import IMAGE_SUFFIXES
from multimodal.data.records import (
    KINDS,
    SPLIT_NAMES,
    Found,
    Joined,
    Kind,
    ListRecords,
    Record,
    Records,
    captions_of,
    clean,
    kind_of,
    labels_of,
)
from multimodal.data.sets import no_file
from shared.errors import BadSample, UserError
from shared.media.folders import files_in
from shared.media.shards import Shards

MEDIA: dict[str, Kind] = {suffix[1:]: kind_of(suffix) for suffix in IMAGE_SUFFIXES + AUDIO_SUFFIXES}
TEXTS = ("txt", "text", "caption", "json")  # members that may hold the captions
TRIED = 100  # samples at the start, one of which must have a caption


@dataclass(frozen=True)
class Member:
    """A file inside a shard."""

    shards: Shards
    index: int
    extension: str

    def read(self) -> bytes:
        """Its bytes."""
        return self.shards.read(self.index, (self.extension,))[self.extension]

    def __str__(self) -> str:
        return f"{self.shards.paths[0].parent}: sample {self.shards.names(self.index)[0]}.{self.extension}"


class ShardRecords(Records):
    """records[i] -> Record of the i-th of the chosen samples, all of one kind, read when asked for.

    BadSample: no caption, labels that are no class numbers, or a json that cannot be read.
    """

    def __init__(self, shards: Shards, split: str, kind: Kind, numbers_N: np.ndarray):
        self.shards, self.split, self.kind, self.numbers_N = shards, split, kind, numbers_N

    def __len__(self) -> int:
        return len(self.numbers_N)

    def _at(self, index: int) -> Record:
        number = int(self.numbers_N[index])
        sample, extensions = self.shards.read(number, TEXTS), self.shards.names(number)[1]
        media = next(name for name in extensions if name in MEDIA)
        where = f"{self.shards.paths[0].parent}: sample {sample['__key__']}"
        captions: tuple[str, ...] = ()
        labels, fault = None, ""
        try:
            # The json first: it may hold several captions, and labels. Where it has no caption, the text next to it.
            row = json.loads(sample.get("json", b"{}"))
            if isinstance(row, dict):
                captions, labels = captions_of(row), labels_of(row)
        except (ValueError, TypeError, RecursionError) as error:
            fault = f" ({' '.join(str(error).split())})"
            if str(error).startswith("labels"):
                raise BadSample(f"{where}: {error}") from None
        for name in ("txt", "text", "caption"):
            if not captions and name in sample:
                captions = tuple(filter(None, map(clean, re.split("[\r\n]+", decoded(sample[name])))))
        if not captions:
            found = ", ".join(sorted(extensions))
            raise BadSample(f"{where} has no caption{fault}; its members are {found}, a .txt or a .json is wanted")
        source = Member(self.shards, number, media)
        return Record(f"{self.split}/{sample['__key__']}", source, captions, "shards", self.kind, labels)

    def names(self) -> Iterator[str]:
        chosen = np.zeros(len(self.shards), dtype=bool)
        chosen[self.numbers_N] = True
        return (f"{self.split}/{key}" for key, _ in compress(self.shards.listing(), chosen.tobytes()))

    def identities(self) -> Iterator[str]:
        return (f"shards/{name.partition('/')[2]}" for name in self.names())

    def largest_label(self) -> int:
        return -1

    def take(self, places_N: np.ndarray) -> "ShardRecords":
        return ShardRecords(self.shards, self.split, self.kind, self.numbers_N[places_N])

    def by_kind(self) -> dict[Kind, Records]:
        return {self.kind: self}

    def all_labelled(self) -> bool:
        for index in range(len(self)):
            with suppress(BadSample):
                return self[index].labels is not None
        return True


def decoded(data: bytes) -> str:
    """UTF-8, or else Latin-1, in which every byte is a character."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def shard_paths(folder: Path, split: str) -> list[Path]:
    """{split}*.tar, *-{split}-*.tar, or {split}/*.tar; where no shard names a split (img2dataset: 00000.tar), all are
    for training.
    """
    shards = {path: _split_in(path.stem.lower()) for path in files_in(folder, "*.tar")}
    found = [path for path, own in shards.items() if own == split]
    found = found or files_in(folder, *(f"{name}/*.tar" for name in SPLIT_NAMES[split]))
    if not found and split == "train":
        found = [path for path, own in shards.items() if own is None]
    return found


def _split_in(name: str) -> str | None:
    words = re.split("[^a-z]+", name)
    whole = (split for word in words for split, names in SPLIT_NAMES.items() if word in names)
    begun = (split for split, names in SPLIT_NAMES.items() if name.startswith(names))
    return next(whole, next(begun, None))


def read_shards(folder: Path, split: str) -> Found:
    """Samples of a picture or sound with captions: txt (by line) or json (the keys of jsonl).

    A sample with neither, or without any text, is left out and counted. UserError where none has both, or none of the
    first hundred has a caption.
    """
    paths = shard_paths(folder, split)
    if not paths and split == "train" and (packed := files_in(folder, "*.tar.*", "*.tgz", "*/*.tar.*", "*/*.tgz")):
        raise UserError(f"{packed[0]}: a packed shard, in which no sample can be found; unpack it, as with gzip -d")
    if not paths:
        return no_file("shards", folder / f"{split}*.tar", split)
    shards, numbers = Shards(paths), {kind: array("q") for kind in KINDS}
    bad: list[str] = []
    for number, (key, extensions) in enumerate(shards.listing()):
        kind = next((MEDIA[name] for name in extensions if name in MEDIA), None)
        if kind is not None and any(name in extensions for name in TEXTS):
            numbers[kind].append(number)
        else:
            what = "picture or sound" if kind is None else "caption"
            bad.append(f"sample {key} holds no {what}; its members are {', '.join(sorted(extensions))}")
    parts = [ShardRecords(shards, split, kind, np.array(found)) for kind, found in numbers.items() if found]
    for part in parts:
        faults = []
        for place in range(min(TRIED, len(part))):
            try:
                part[place]
                break
            except BadSample as error:
                faults.append(str(error))
        else:
            raise UserError(faults[0])
    if not parts:
        raise UserError(f"{folder}: {bad[0]}" if bad else f"{folder}: its shards hold no sample")
    missing = len(bad)  # incomplete samples are usual in what was collected from the web: never too many
    return Found(Joined(parts), missing, [])


def readable(records: Records) -> ListRecords:
    """All that can be read, in memory."""
    found = ListRecords()
    for index in range(len(records)):
        with suppress(BadSample):
            found.append(records[index])
    return found
