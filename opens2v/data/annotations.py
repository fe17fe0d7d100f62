"""Annotation files of any size, one entry in memory at a time. An index holds where each entry lies in the file.

    python opens2v/data/annotations.py --json PART.json [--out PART.json.idx]        index a large file once (streams)

Accepted: PART.json ({key: entry}, or a list of {"key": ..., ...}), PART.jsonl (one {"key": ..., ...} a line), or a
folder of single-entry files.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from io import FileIO

import numpy as np

from shared.config import Section, load_config, setting
from shared.errors import UserError, command, written_aside
from shared.media.folders import files_in

INDEX_ABOVE_BYTES = 512 << 20  # larger files get an index file by themselves
_CHUNK = 8 << 20
_LARGEST_ENTRY = 256 << 20
_SPACE = " \t\r\n"
_BOM = b"\xef\xbb\xbf"
_KEY = re.compile(rb'"key"\s*:\s*("(?:[^"\\]|\\.)*")')
_COLUMNS = 5  # offset and length of the key, offset and length of the entry, hash of the key
_FORMAT = 1


class Annotations:
    """Entries of one annotation file by position or key; nothing but the index stays in memory.

    path: .json, .jsonl or a folder. index_path: where the index of a large file lies (default: beside it, name + .idx;
    beside a file in a read-only folder: in the user's cache folder). index_dir: the folder for it instead.
    """

    def __init__(self, path: str | Path, index_path: str | Path | None = None, *, index_dir: str | Path | None = None):
        self.path = Path(path)
        if index_path is None and index_dir is not None:
            index_path = Path(index_dir) / index_name(self.path)
        if not self.path.exists():
            raise UserError(f"annotation file {self.path}: not found; check opens2v.json_paths")
        self.files = files_in(self.path, "*.json") if self.path.is_dir() else None
        if self.files is not None:
            if not self.files:
                raise UserError(f"annotation folder {self.path}: holds no .json file")
            self.table = np.array([[0, 0, 0, 0, _hash(file.stem)] for file in self.files], np.int64)
        else:
            self.table = _index_of(self.path, Path(index_path) if index_path else None)
        self._file: FileIO | None = None
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None, "_order": None}  # every process opens the file for itself

    def key(self, index: int) -> str:
        """The key of the entry at a position."""
        if self.files is not None:
            return self.files[index].stem
        return json.loads(self._bytes(*self.table[index, :2]))

    def entry(self, index: int) -> dict:
        """The parsed entry at a position."""
        if self.files is not None:
            entry = json.loads(self.files[index].read_bytes())
            if set(entry) == {self.files[index].stem}:  # a file may nest the entry under its key
                entry = entry[self.files[index].stem]
            return entry
        return json.loads(self._bytes(*self.table[index, 2:4]))

    def item(self, index: int) -> tuple[str, dict]:
        """(key, entry) at a position, in one read of the file."""
        if self.files is not None:
            return self.key(index), self.entry(index)
        key_at, key_length, entry_at, entry_length = (int(value) for value in self.table[index, :4])
        first = min(key_at, entry_at)
        text = self._bytes(first, max(key_at + key_length, entry_at + entry_length) - first)
        key_at, entry_at = key_at - first, entry_at - first
        return json.loads(text[key_at : key_at + key_length]), json.loads(text[entry_at : entry_at + entry_length])

    def find(self, key: str) -> int | None:
        """The position of a key, or None."""
        if self._order is None:
            self._order = np.argsort(self.table[:, 4], kind="stable")
        wanted = _hash(key)
        place = int(np.searchsorted(self.table[:, 4], wanted, sorter=self._order))
        while place < len(self) and self.table[self._order[place], 4] == wanted:
            if self.key(int(self._order[place])) == key:
                return int(self._order[place])
            place += 1
        return None

    def digest(self) -> str:
        """A short text that stands for the list of keys and sizes."""
        return hashlib.sha256(np.ascontiguousarray(self.table[:, [1, 3, 4]]).tobytes()).hexdigest()[:16]

    def _bytes(self, offset: int, length: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115
            if hasattr(os, "posix_fadvise"):  # entries are drawn at random: reading ahead would only take longer
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(self._file.fileno(), int(length), int(offset))


def _hash(key: str) -> int:
    text = key.encode("utf-8", "surrogatepass")  # a key cut within an emoji holds half of a character
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


# --- the index --------------------------------------------------------------------------------------------------------


def index_name(path: Path) -> str:
    """The name of an index that does not lie beside its file: told apart by the file's folder."""
    folder = hashlib.sha256(str(path.resolve().parent).encode()).hexdigest()[:8]
    return f"{path.stem}-{folder}{path.suffix}.idx"


def index_place(path: Path) -> Path:
    """Where the index of a file lies when nobody says: beside it, or in the user's cache folder if that cannot be."""
    beside = path.with_name(path.name + ".idx")
    if beside.exists() or os.access(path.parent, os.W_OK):
        return beside
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        cache = Path(tempfile.gettempdir())
    return cache / "opens2v" / index_name(path)


def write_index(path: Path, out: Path | None = None) -> Path:
    """Index an annotation file in one streaming pass; the index is written aside and renamed."""
    out = out or index_place(path)
    stamp = _stamp(path)
    rows = np.fromiter(_rows(path), dtype=(np.int64, _COLUMNS))
    with written_aside(out) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate([np.array([stamp], np.int64), rows]))
    return out


def _index_of(path: Path, index_path: Path | None) -> np.ndarray:
    """The table of a file: from a fresh index file, by writing one for a large file, or scanned now for a small one."""
    out = index_path or index_place(path)
    if not out.exists() and path.stat().st_size <= INDEX_ABOVE_BYTES:
        return np.fromiter(_rows(path), dtype=(np.int64, _COLUMNS))
    table = _fresh_table(path, out)
    if table is None:
        with _one_at_a_time(out):  # the ranks of a node start together; the first one writes, the others find it
            table = _fresh_table(path, out)
            if table is None:
                write_index(path, out)
                table = _fresh_table(path, out)
    assert table is not None
    return table


def _fresh_table(path: Path, out: Path) -> np.ndarray | None:
    """The rows of an index that fits the file; None where there is none or the file changed since."""
    if not out.exists():
        return None
    try:
        table = np.load(out, mmap_mode="r", allow_pickle=False)
        stamp = tuple(int(value) for value in table[0])
    except (ValueError, OSError, EOFError, IndexError) as error:
        raise UserError(f"index {out}: not readable ({error}); delete it and it is made again") from None
    now = _stamp(path)
    if stamp[0] != now[0] or stamp[2:] != now[2:]:
        return None
    # Copied or touched files have another time and the same content: then some rows are compared with the file.
    return table[1:] if stamp[1] == now[1] or _rows_fit(path, table[1:]) else None


def _rows_fit(path: Path, table: np.ndarray, count: int = 256) -> bool:
    if not len(table):
        return True
    places = np.unique(np.linspace(0, len(table) - 1, min(count, len(table))).astype(int))
    with open(path, "rb") as file:
        for key_at, key_length, entry_at, entry_length, digest in table[places].tolist():
            file.seek(key_at)
            key = file.read(key_length)
            file.seek(entry_at)
            entry = file.read(entry_length).strip()
            try:
                if _hash(json.loads(key)) != digest or entry[:1] != b"{" or entry[-1:] != b"}":
                    return False
            except (ValueError, AttributeError):
                return False
    return True


@contextlib.contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Processes of this machine (and of others, where the file system has locks) enter one after the other."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f".{out.name}.lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: each writes for itself, aside and renamed
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (found.st_size, found.st_mtime_ns, _FORMAT, _COLUMNS, 0)


def _rows(path: Path) -> Iterator[tuple[int, ...]]:
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _json_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, ...]]:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            text, start = line[skipped:], offset + skipped
            if text.strip():
                row = _keyed_row(text, start)
                if row is None:
                    raise UserError(f'{path}, line {number}: not a JSON object with a "key" that is text')
                yield row
            offset += len(line)


def _keyed_row(text: bytes, start: int) -> tuple[int, ...] | None:
    """The row of an entry {"key": ..., ...} that begins at byte `start`; None for anything else."""
    try:
        wanted = json.loads(text)["key"]
        first, last = next(found.span(1) for found in _KEY.finditer(text) if json.loads(found[1]) == wanted)
        return start + first, last - first, start, len(text), _hash(wanted)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None


class _Window:
    """A part of a file as text whose positions are bytes: latin-1 maps each byte to one character.

    The bytes of UTF-8 beyond ASCII never look like JSON's own characters.
    """

    def __init__(self, path: Path):
        self.path, self.file, self.text, self.start, self.at_end = path, open(path, "rb"), "", 0, False  # noqa: SIM115

    def grow(self, keep_from: int) -> int:
        """Drop what lies before `keep_from`, read more, and return how far positions moved."""
        if len(self.text) - keep_from > _LARGEST_ENTRY:
            raise UserError(
                f"{self.path}, byte {self.start + keep_from}: no complete entry within 256 MiB; the file is damaged "
                "there"
            )
        more = self.file.read(_CHUNK)
        self.at_end = not more
        self.text = self.text[keep_from:] + more.decode("latin-1")
        self.start += keep_from
        return keep_from


def _json_rows(path: Path) -> Iterator[tuple[int, ...]]:
    """Rows of {key: entry, ...} or [{"key": ..., ...}, ...]: the C scanner of the json module runs over one entry after
    another in a moving window.
    """
    scan, window = json.JSONDecoder(strict=False).raw_decode, _Window(path)
    with window.file:
        window.grow(0)
        if window.text.startswith(_BOM.decode("latin-1")):  # Windows' editors put it before UTF-8
            window.text, window.start = window.text[len(_BOM) :], len(_BOM)
        place = _skip(window, 0, "{[", first=True)
        is_list, count = window.text[place - 1] == "[", 0
        while True:
            place = _skip(window, place, "{]" if is_list else '"}')
            if window.text[place] in "]}":
                return
            count += 1
            while True:
                try:
                    key, key_end = ("", place) if is_list else scan(window.text, place)
                    value_at = place if is_list else _skip_in(window.text, key_end, ":")
                    value, end = scan(window.text, value_at)
                    if end >= len(window.text) and not window.at_end:
                        raise ValueError("cut at the end of the window")
                    break
                except (ValueError, IndexError, RecursionError) as error:
                    if window.at_end:
                        raise UserError(
                            f"{path}, byte {window.start + place}: the entry is no valid JSON ({error}); the file is "
                            "cut or damaged there"
                        ) from None
                    place -= window.grow(place)
            if is_list:
                row = _keyed_row(window.text[place:end].encode("latin-1"), window.start + place)
                if row is None:
                    raise UserError(f'{path}: entry {count} of the list has no "key" that is text')
                yield row
                place = end
                continue
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}: the entry {key[:80]!r} is no object; expected {{key: {{metadata, annotation}}}}"
                )
            key = json.loads(window.text[place:key_end].encode("latin-1"))
            yield (window.start + place, key_end - place, window.start + value_at, end - value_at, _hash(key))
            place = end


def _skip(window: _Window, place: int, wanted: str, first: bool = False) -> int:
    """The position of the next of the wanted characters after white space and commas."""
    while True:
        while place < len(window.text) and window.text[place] in _SPACE + ("" if first else ","):
            place += 1
        if place < len(window.text):
            if window.text[place] in wanted:
                return place + (1 if first else 0)
            raise UserError(
                f"{window.path}, byte {window.start + place}: expected {' or '.join(wanted)}, found "
                f"{window.text[place]!r}; "
                'an annotation file is one JSON object {key: entry}, or a list of entries with a "key"'
            )
        if window.at_end:
            raise UserError(f"{window.path}: ends at byte {window.start + place} before its end; copy it again")
        place -= window.grow(place)


def _skip_in(text: str, place: int, separator: str) -> int:
    while text[place] in _SPACE:
        place += 1
    if text[place] != separator:
        raise ValueError(f"expected {separator!r} after the key")
    place += 1
    while text[place] in _SPACE:
        place += 1
    return place


# --- command line -----------------------------------------------------------------------------------------------------


class IndexOptions(Section):
    """What to index."""

    json_path: str = setting("", "annotation file, .json or .jsonl", "json")
    out: str | None = setting(None, "index file; null: beside the annotation file, name + .idx")


@command
def main(argv: list[str] | None = None) -> None:
    options = load_config(IndexOptions, argv=argv, description=__doc__)
    if not options.json_path:
        raise UserError("--json PART.json is needed")
    if not Path(options.json_path).is_file():
        raise UserError(f"--json {options.json_path}: no such file")
    out = write_index(Path(options.json_path), Path(options.out) if options.out else None)
    print(f"{out}: {len(np.load(out, mmap_mode='r')) - 1:,} entries")


if __name__ == "__main__":
    main()
