"""Pictures in webdataset tar files as a sequence of items that are read when asked for.

A million samples open in seconds with a few bytes of memory each: names come from the shards' index, captions when a
sample is used.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dit.data.readers import CAPTION_KEYS, IMAGE_SUFFIXES, Item, captions_of, clean_captions
from shared.errors import BadSample
from shared.media.shards import Shards

PICTURES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)


class ShardItems(Sequence[Item]):
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
