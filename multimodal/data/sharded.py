"""Records that stay on disk: webdataset shards, and several data sets read as one list.

A million samples open in seconds with a few bytes of memory each: names come from the shards' index, captions when a
sample is used.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path

import numpy as np

from multimodal.data.audio import AUDIO_SUFFIXES
from multimodal.data.image import IMAGE_SUFFIXES
from multimodal.data.records import KINDS, Found, Kind, ListRecords, Record, Records, captions_of, labels_of, remedy
from shared.errors import BadSample, UserError
from shared.media.shards import Shards

MEDIA: dict[str, Kind] = {suffix[1:]: "image" for suffix in IMAGE_SUFFIXES} | {
    suffix[1:]: "audio" for suffix in AUDIO_SUFFIXES
}


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
        return f"{self.shards.paths[0].parent}: sample {self.index}.{self.extension}"


class ShardRecords(Records):
    """records[i] -> Record of the i-th of the chosen samples, all of one kind, read when asked for.

    BadSample: no caption, labels that are no class numbers, or a json that cannot be read.
    """

    def __init__(self, shards: Shards, split: str, kind: Kind, numbers_N: np.ndarray):
        self.shards, self.split, self.kind, self.numbers_N = shards, split, kind, numbers_N

    def __len__(self) -> int:
        return len(self.numbers_N)

    def __getitem__(self, index: int) -> Record:
        number = int(self.numbers_N[index])
        sample, extensions = self.shards.read(number, ("txt", "json")), self.shards.names(number)[1]
        media = next(name for name in extensions if name in MEDIA)
        where = f"{self.shards.paths[0].parent}: sample {sample['__key__']}"
        try:
            row = json.loads(sample["json"]) if "json" in sample else {"captions": sample["txt"].decode().splitlines()}
            captions = captions_of(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadSample(f"{where} has no caption: a .txt with lines or a .json with captions is wanted") from None
        try:
            labels = labels_of(row, where)
        except UserError as error:
            raise BadSample(str(error)) from None
        source = Member(self.shards, number, media)
        return Record(f"{self.split}/{sample['__key__']}", source, captions, "shards", self.kind, labels)

    def names(self) -> Iterator[str]:
        chosen = np.zeros(len(self.shards), dtype=bool)
        chosen[self.numbers_N] = True
        return (f"{self.split}/{key}" for key, _ in compress(self.shards.listing(), chosen.tobytes()))

    def take(self, places_N: np.ndarray) -> "ShardRecords":
        return ShardRecords(self.shards, self.split, self.kind, self.numbers_N[places_N])

    def by_kind(self) -> dict[Kind, Records]:
        return {self.kind: self}

    def all_labelled(self) -> bool:
        for index in range(len(self)):
            with suppress(BadSample):
                return self[index].labels is not None
        return True


class Joined(Records):
    """The records of several parts one after another."""

    def __init__(self, parts: Sequence[Records]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]

    def names(self) -> Iterator[str]:
        return chain.from_iterable(part.names() for part in self.parts)

    def take(self, places_N: np.ndarray) -> "Joined":
        inside = np.split(places_N, np.searchsorted(places_N, self.ends[:-1]))
        starts = [0, *self.ends[:-1]]
        return Joined([part.take(own - start) for part, own, start in zip(self.parts, inside, starts, strict=True)])

    def by_kind(self) -> dict[Kind, Records]:
        found: dict[Kind, list[Records]] = {}
        for part in self.parts:
            for kind, own in part.by_kind().items():
                found.setdefault(kind, []).append(own)
        return {kind: Joined(parts) for kind, parts in found.items()}

    def all_labelled(self) -> bool:
        return all(part.all_labelled() for part in self.parts)


def read_shards(folder: Path, split: str) -> Found:
    """{train,val,test}*.tar in the webdataset layout: a picture or sound, and txt (captions by line) or json (as in
    jsonl). UserError where a sample holds neither picture nor sound, or the first one no caption.
    """
    paths = sorted(folder.glob(f"{split}*.tar"))
    if not paths:
        if split == "train":
            raise UserError(f"data set shards: no file {folder}/train*.tar; {remedy('shards', folder)}")
        return Found(ListRecords())
    shards, numbers = Shards(paths), {kind: array("q") for kind in KINDS}
    for number, (key, extensions) in enumerate(shards.listing()):
        kind = next((MEDIA[name] for name in extensions if name in MEDIA), None)
        if kind is None:
            where = f"{folder}: sample {key}"
            raise UserError(f"{where} holds no picture or sound; its members are {', '.join(sorted(extensions))}")
        numbers[kind].append(number)
    parts = [ShardRecords(shards, split, kind, np.array(found)) for kind, found in numbers.items() if found]
    try:
        for part in parts:
            part[0]
    except BadSample as error:
        raise UserError(str(error)) from None
    return Found(Joined(parts))


def readable(records: Records) -> ListRecords:
    """All that can be read, in memory."""
    found = ListRecords()
    for index in range(len(records)):
        with suppress(BadSample):
            found.append(records[index])
    return found
