"""Records: a picture or a sound with its captions; lists of them in little memory; and the files that lists come in."""

import codecs
import csv
import io
import json
import re
import unicodedata
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, Protocol, overload

import numpy as np

from multimodal.data.audio import AUDIO_SUFFIXES
from multimodal.data.image import IMAGE_SUFFIXES
from shared.errors import UserError, check_columns

Kind = Literal["image", "audio", "voice"]
KINDS: tuple[Kind, ...] = ("image", "audio", "voice")
MAX_BAD_SHARE = 0.01  # of the rows of a list; one is always allowed
CAPTION_KEYS = ("captions", "caption", "texts", "text")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "eval")}
FILE_KEYS = ("file", "file_name", "filename", "image", "audio", "path", "filepath", "image_path", "audio_path")
_CHUNK = 1 << 20  # characters of a JSON file that are read at a time


class MissingData(UserError):
    """A data set that is not there, or none of whose files is; training goes on with the others."""


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

    @property
    def identity(self) -> str:
        """The same for the same picture or sound in another split, so that what is in two splits can be found."""
        if self.dataset in ("coco", "shards", "synthetic"):
            return f"{self.dataset}/{self.id.rpartition('/')[2]}"
        return f"{self.dataset}/{self.source if self.dataset == 'jsonl' else Path(str(self.source)).stem}"


class Records(Sequence[Record]):
    """Records that are at hand, on disk, or both. What is asked here of all of them reads no caption from a shard."""

    @abstractmethod
    def _at(self, index: int) -> Record:
        """The record at a place that is there."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "ListRecords": ...
    def __getitem__(self, index: int | slice) -> "Record | ListRecords":
        if isinstance(index, slice):
            return ListRecords(self._at(place) for place in range(*index.indices(len(self))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._at(place)

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

    def __iter__(self) -> Iterator[Record]:
        return (self._at(index) for index in range(len(self)))

    def identities(self) -> Iterator[str]:
        """The identity of each."""
        return (record.identity for record in self)

    def largest_label(self) -> int:
        """The largest class number, -1 where there is none; of shards -1, since theirs are read with the samples."""
        return max((max(record.labels or (), default=-1) for record in self), default=-1)


class PackedRecords(Records):
    """Rows of text in one block of bytes, made into records when asked for.

    A million captioned files take about 150 MB, which loader processes share, where as many objects take 600 MB and
    are copied page by page into every process that counts their references.
    """

    def __init__(self, dataset: str, text_B: np.ndarray, bounds_N2: np.ndarray, kinds_N: np.ndarray, labelled: bool):
        self.dataset, self.text_B, self.bounds_N2, self.kinds_N = dataset, text_B, bounds_N2, kinds_N
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.bounds_N2)

    def _row(self, index: int) -> list:
        start, end = self.bounds_N2[index]
        return json.loads(self.text_B[start:end].tobytes())

    def _at(self, index: int) -> Record:
        name, source, captions, labels, video = self._row(index)
        kind = KINDS[int(self.kinds_N[index])]
        own = None if labels is None else tuple(labels)
        return Record(name, Path(source), tuple(captions), self.dataset, kind, own, Path(video) if video else None)

    def names(self) -> Iterator[str]:
        return (self._row(index)[0] for index in range(len(self)))

    def take(self, places_N: np.ndarray) -> "PackedRecords":
        bounds_N2, kinds_N = self.bounds_N2[places_N], self.kinds_N[places_N]
        return PackedRecords(self.dataset, self.text_B, bounds_N2, kinds_N, self.labelled)

    def by_kind(self) -> dict[Kind, Records]:
        found = {kind: np.flatnonzero(self.kinds_N == number) for number, kind in enumerate(KINDS)}
        return {kind: self.take(places) for kind, places in found.items() if len(places)}

    def all_labelled(self) -> bool:
        return self.labelled or all(self._row(index)[3] is not None for index in range(len(self)))


class Packer:
    """Collects rows for PackedRecords. repeated: how many have the name of an earlier one, as in lists with a caption a
    line.
    """

    def __init__(self, dataset: str):
        self.dataset, self.text, self.ends, self.kinds = dataset, bytearray(), array("q"), array("b")
        self.labelled, self._names = True, array("q")

    def add(
        self,
        name: str,
        source: Path,
        captions: Iterable[str],
        kind: Kind,
        labels: Iterable[int] | None = None,
        video: Path | None = None,
    ) -> None:
        """One record."""
        own = None if labels is None else list(labels)
        row = [name, str(source), list(captions), own, str(video) if video else None]
        self.text += json.dumps(row, ensure_ascii=False).encode()
        self.ends.append(len(self.text))
        self.kinds.append(KINDS.index(kind))
        self.labelled &= labels is not None
        self._names.append(hash(name))

    @property
    def repeated(self) -> int:
        return len(self._names) - len(np.unique(self._names))

    def records(self) -> PackedRecords:
        """What was added."""
        ends = np.array(self.ends, dtype=np.int64)
        bounds_N2 = np.stack([np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]]), ends], 1)
        text_B = np.frombuffer(self.text, np.uint8)  # the same memory
        return PackedRecords(self.dataset, text_B, bounds_N2, np.array(self.kinds, np.int8), self.labelled)


class ListRecords(Records):
    """Records at hand."""

    def __init__(self, records: Iterable[Record] = ()):
        self.items = list(records)

    def __len__(self) -> int:
        return len(self.items)

    def _at(self, index: int) -> Record:
        return self.items[index]

    def append(self, record: Record) -> None:
        """One more."""
        self.items.append(record)

    def names(self) -> Iterator[str]:
        return (record.id for record in self)

    def take(self, places_N: np.ndarray) -> "ListRecords":
        return ListRecords(self[place] for place in places_N)

    def by_kind(self) -> dict[Kind, Records]:
        return {kind: own for kind in KINDS if (own := ListRecords(record for record in self if record.kind == kind))}

    def all_labelled(self) -> bool:
        return all(record.labels is not None for record in self)


class Joined(Records):
    """The records of several parts one after another."""

    def __init__(self, parts: Sequence[Records]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _at(self, index: int) -> Record:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]

    def names(self) -> Iterator[str]:
        return chain.from_iterable(part.names() for part in self.parts)

    def take(self, places_N: np.ndarray) -> "Joined":
        inside = np.split(places_N, np.searchsorted(places_N, self.ends[:-1]))
        starts = [0, *self.ends[:-1]]
        return Joined([part.take(own - start) for part, own, start in zip(self.parts, inside, starts, strict=True)])

    def identities(self) -> Iterator[str]:
        return chain.from_iterable(part.identities() for part in self.parts)

    def largest_label(self) -> int:
        return max((part.largest_label() for part in self.parts), default=-1)

    def by_kind(self) -> dict[Kind, Records]:
        found: dict[Kind, list[Records]] = {}
        for part in self.parts:
            for kind, own in part.by_kind().items():
                found.setdefault(kind, []).append(own)
        return {kind: Joined(parts) for kind, parts in found.items()}

    def all_labelled(self) -> bool:
        return all(part.all_labelled() for part in self.parts)


@dataclass
class Found:
    """The records of one split; how many are listed whose file or caption is not there; and rows that are no rows."""

    records: Records
    missing: int = 0
    bad: list[str] = field(default_factory=list)
    repeated: int = 0  # rows of a picture or sound that an earlier row has

    def checked(self, where: Path | str) -> "Found":
        """Itself; UserError when more than one row, and more than 1 %, cannot be used."""
        total = len(self.records) + self.missing + len(self.bad)
        if len(self.bad) > max(1, MAX_BAD_SHARE * total) or (self.bad and not self.records and not self.missing):
            raise UserError(
                f"{where}: {len(self.bad)} of {total} rows cannot be used; the first: {self.bad[0]}; fix or remove them"
            )
        return self


# --- one row ----------------------------------------------------------------------------------------------------------


def clean(caption: str) -> str:
    """White space collapsed (some captions hold stray newlines); control characters and halves of a character, which
    no encoding knows, left out.
    """
    text = "".join(c for c in caption if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join(text.split())


def captions_of(row: dict) -> tuple[str, ...]:
    """The captions of a row: a text or a list of texts under any of CAPTION_KEYS, those that are blank or null left
    out. () where there is none; TypeError where one is no text.
    """
    for key in CAPTION_KEYS:
        value = row.get(key)
        texts = [value] if isinstance(value, str) else value
        if texts is None:
            continue
        if not isinstance(texts, list) or any(not isinstance(text, str | None) for text in texts):
            raise TypeError(f"{key} is {value!r}: a text or a list of texts is wanted")
        if captions := tuple(filter(None, (clean(text) for text in texts if text is not None))):
            return captions
    return ()


def labels_of(row: dict) -> tuple[int, ...] | None:
    """The class numbers of a row, None where it has none; TypeError where they are no numbers from 0."""
    labels = row.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in labels):
        raise TypeError(f"labels {labels!r}: a list of class numbers from 0 is wanted")
    return tuple(labels)


def kind_of(suffix: str) -> Kind:
    """Whether a file is a picture or a sound, by its suffix; TypeError for neither."""
    if suffix.lower() in IMAGE_SUFFIXES:
        return "image"
    if suffix.lower() in AUDIO_SUFFIXES:
        return "audio"
    raise TypeError(f"{suffix or 'a name without suffix'} is neither a picture nor a sound that can be read")


class Folder:
    """The files of a folder by the names that lists give them.

    A list may write a name in another Unicode form than the disk (macOS decomposes letters), with blanks at its ends,
    in another case, or with another suffix than the file has, of a picture for a picture and of a sound for a sound; an
    exact name always comes first.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, dict[str, str]] = {}

    def find(self, name: str) -> Path | None:
        """The file, or None. name: relative to the folder, with / or \\ between folders."""
        parent, _, base = name.replace("\\", "/").rpartition("/")
        if parent.startswith("/") or not base.strip():
            return Path(name) if base and Path(name).is_file() else None
        known = self._known(parent)
        wanted = unicodedata.normalize("NFC", base)
        for key in (base, wanted, wanted.strip(), wanted.strip().casefold()):
            if key in known:
                return self.path / parent / known[key]
        kind = kind_by_name(wanted.strip())
        stem = Path(wanted.strip()).stem if kind else wanted.strip()
        other = known.get(f"{kind}\0{stem.casefold()}")  # the same name with another suffix
        return None if other is None else self.path / parent / other

    def names(self) -> list[str]:
        """The visible files in it, by name."""
        return sorted(set(self._known("").values()))

    def _known(self, parent: str) -> dict[str, str]:
        if parent not in self._places:
            known: dict[str, str] = {}
            folder = self.path / parent
            files = [item for item in folder.iterdir() if not item.name.startswith("._")] if folder.is_dir() else []
            exact = [item.name for item in files]
            for name in sorted(exact):
                form = unicodedata.normalize("NFC", name)
                for key in (form, form.strip(), form.strip().casefold()):
                    known.setdefault(key, name)
                if kind := kind_by_name(form):
                    for wanted in (kind, ""):  # "": the list gives no suffix
                        known.setdefault(f"{wanted}\0{Path(form).stem.casefold()}", name)
            self._places[parent] = known | {name: name for name in exact}
        return self._places[parent]


def kind_by_name(name: str) -> str:
    """image or audio by the suffix of a name; empty for another, or none."""
    suffix = Path(name).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else ""


# --- whole files ------------------------------------------------------------------------------------------------------


def encoding_of(path: Path) -> str:
    """UTF-8, or UTF-16 where the file says so by its first two bytes."""
    with open(path, "rb") as file:
        head = file.read(2)
    return "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def not_text(path: Path, error: Exception, kind: str) -> UserError:
    """What to say of a file that is not of the kind, or in the encoding, that it should be in."""
    reason = " ".join(str(error).split())
    way = ", or convert it to UTF-8 with iconv" if isinstance(error, UnicodeError) else ""
    return UserError(f"{path}: not readable as {kind} ({reason}); download it again{way}")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file."""
    try:
        with open(path, encoding=encoding_of(path)) as file:
            yield from enumerate(file, 1)
    except UnicodeError as error:
        raise not_text(path, error, "text") from None


def json_items(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(key, item) of the arrays under these keys of a JSON object, one at a time and in the order of the file.

    A file of any size takes a megabyte or two. UserError: no JSON, no object, or a key that is not there.
    """
    wanted, seen = set(keys), set()
    decoder = json.JSONDecoder()
    try:
        with open(path, encoding=encoding_of(path)) as file:
            text = _Text(file)
            if text.peek() != "{":
                raise UserError(f"{path}: an object with {', '.join(sorted(wanted))} is wanted; download it again")
            text.skip(1)
            while text.peek() != "}":
                key = text.value(decoder)
                text.expect(":")
                if key in wanted and text.peek() == "[":
                    seen.add(key)
                    text.skip(1)
                    while text.peek() != "]":
                        yield key, text.value(decoder)
                        text.separator("]")
                    text.skip(1)
                else:
                    text.value(decoder)
                text.separator("}")
            text.skip(1)
            if not text.is_over():
                raise ValueError("something follows its end, as where two files were joined")
    except (ValueError, EOFError, RecursionError) as error:
        raise not_text(path, error, "JSON") from None
    for key in sorted(wanted - seen):
        raise UserError(f"{path}: has no list {key!r}; download it again")


class _Text:
    """A text file read ahead as far as the next JSON value needs."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.text, self.at, self.ended = file, "", 0, False

    def _more(self, count: int) -> bool:
        block = self.file.read(count)
        self.text, self.at = self.text[self.at :] + block, 0
        self.ended = not block
        return bool(block)

    def peek(self) -> str:
        """The next character that is no blank."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self._more(_CHUNK):
                raise EOFError("it ends in the middle")

    def is_over(self) -> bool:
        """Whether nothing but blanks is left."""
        try:
            return not self.peek()
        except EOFError:
            return True

    def skip(self, count: int) -> None:
        self.at += count

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"{character!r} expected, found {self.peek()!r}")
        self.skip(1)

    def separator(self, end: str) -> None:
        """A comma, or the end that is left for the caller."""
        if self.peek() != end:
            self.expect(",")

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next value; reads on, twice as far each time, while it is not whole."""
        self.peek()
        count = _CHUNK
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number could go on in the next block
                    self.at = end
                    return value
            except ValueError:
                if self.ended:
                    raise
            self._more(count)
            count *= 2


def read_csv(path: Path, columns: tuple[str, ...]) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a table that have these columns, and what is wrong with the others. Between the columns commas,
    semicolons, tabs or bars; their names in small letters.
    """
    try:
        with open(path, encoding=encoding_of(path), newline="") as file:
            first = file.readline()
            file.seek(0)
            between = max(",;\t|", key=first.count)
            reader = csv.DictReader(file, delimiter=between, skipinitialspace=True)  # a, "b, c" is two columns
            names = reader.fieldnames = [name.strip().casefold() for name in reader.fieldnames or ()]
            check_columns(path, names)
            absent = [name for name in columns if name not in names]
            if absent:
                raise UserError(f"{path}: has no column {absent[0]}; its columns are {', '.join(names) or 'none'}")
            rows, bad = [], []
            for place, row in enumerate(reader, 2):
                cells = [cell for cell in row.values() if isinstance(cell, str)]
                swallowed = [line for cell in cells for line in cell.splitlines()[1:]]
                swallowed = [line for line in swallowed if line.count(between) >= len(names) - 1 > 0]
                if any(row[name] is None for name in columns):
                    bad.append(f"row {place} has too few columns")
                elif not swallowed:
                    rows.append(row)
                bad += [f"row {place} opens a quotation mark that closes some rows later"] * len(swallowed)
            return rows, bad
    except (UnicodeDecodeError, csv.Error) as error:
        raise not_text(path, error, "CSV") from None


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict | Exception]]:
    """(line number, object or what is wrong with the line); a file that is one JSON list counts its items."""
    encoding = encoding_of(path)
    with open(path, encoding=encoding, errors="replace") as head:
        whole = re.match(r"\s*\[\s*\{", head.read(256)) is not None
    if whole:
        try:
            items = json.loads(path.read_text(encoding=encoding))
        except (ValueError, RecursionError) as error:
            raise not_text(path, error, "JSON") from None
        yield from ((number, _as_row(item)) for number, item in enumerate(items, 1))
        return
    # Read as bytes: one line that is not UTF-8 is one bad line then, not the end of the file.
    with open(path, "rb") if encoding == "utf-8-sig" else _recoded(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, _as_row(json.loads(line.removeprefix(codecs.BOM_UTF8)))
                except ValueError as error:
                    yield number, error
                except RecursionError:
                    yield number, ValueError("nested too deeply")


def _recoded(path: Path, encoding: str) -> IO[bytes]:
    return io.BytesIO(path.read_text(encoding=encoding).encode())


def _as_row(value: Any) -> dict | Exception:
    return value if isinstance(value, dict) else TypeError("not an object with a file and captions")


Reader = Callable[[Path, str], Found]
