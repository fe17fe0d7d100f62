"""What opening a dataset must know of its records, in a few bytes each, so that a million open with flat memory.

A record itself is read again when it is used. When every picture lies inside the record files (webdataset, parquet),
what was found is stored beside the first of them, and the next start reads that.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from bagel.data.records import FORMATS
from bagel.data.sources import RecordFile, picture_names
from shared.errors import BadSample, written_aside

VERSION = 1
STORED_FROM = 10_000  # records: fewer are read anew in a moment
ROW = np.dtype(
    [
        ("source", "i2"),
        ("place", "i8"),
        ("line", "i8"),
        ("kind", "i1"),
        ("fixed", "?"),
        ("asks", "?"),
        ("weight", "f8"),
        ("length", "i4"),
        ("sizes", "i8"),  # the record's first row in the table of picture sizes
    ]
)


@dataclass(frozen=True)
class DataError:
    """One malformed record."""

    file: str
    line: int
    id: str | None
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}: {self.message}"


@dataclass(frozen=True)
class Record:
    """A record that passed every check; `fixed`: nothing is drawn for it; `asks`: it answers about a given picture;
    `sizes`: (width, height) of its pictures.
    """

    source: RecordFile
    line: int
    value: dict
    kind: str
    fixed: bool
    asks: bool
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


class Index(NamedTuple):
    """rows: (N,) of ROW, the valid records in order; sizes: (P, 2) width and height, 0 for what is no picture;
    targets: how many texts, pictures and tokens there are to learn; digest: of all valid records.
    """

    rows: np.ndarray
    sizes: np.ndarray
    errors: list[DataError]
    targets: dict[str, int]
    digest: str

    @classmethod
    def load(cls, path: Path) -> "Index | None":
        """What was stored there; None when there is nothing, or nothing whole."""
        try:
            with np.load(path, allow_pickle=False) as file:
                notes = json.loads(file["notes"].tobytes())
                rows, sizes = file["rows"], file["sizes"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        errors = [DataError(**error) for error in notes["errors"]]
        return cls(rows, sizes, errors, notes["targets"], notes["digest"])

    def save(self, path: Path) -> None:
        """Write it; a folder that cannot be written is left as it is."""
        notes = {"errors": [asdict(error) for error in self.errors], "targets": self.targets, "digest": self.digest}
        encoded = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
        with suppress(OSError), written_aside(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, rows=self.rows, sizes=self.sizes, notes=encoded)


class IndexBuilder:
    """Collects an Index while the records are read, a block of arrays at a time."""

    def __init__(self) -> None:
        self.count, self._pictures, self._digest = 0, 0, hashlib.sha256()
        self._rows: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._block: list[tuple] = []
        self._block_sizes: list[tuple[int, int]] = []
        self.targets: Counter[str] = Counter()

    def add(self, source: int, place: int, record: Record, length: int) -> None:
        """The next valid record: the number of its file, its place there, and its tokens in epoch 0."""
        weight = float(record.value.get("weight", 1.0))
        kind = FORMATS.index(record.kind)
        row = (source, place, record.line, kind, record.fixed, record.asks, weight, length, self._pictures)
        sizes = [record.sizes.get(name, (0, 0)) for name in picture_names(record.value)]
        self._block.append(row)
        self._block_sizes += sizes
        self._pictures += len(sizes)
        self._digest.update(json.dumps(record.value, sort_keys=True, default=str).encode())
        self.count += 1

    def end_block(self) -> None:
        """Turn what was added since the last block into arrays."""
        self._rows.append(np.array(self._block, dtype=ROW))
        self._sizes.append(np.array(self._block_sizes, dtype=np.int32).reshape(-1, 2))
        self._block, self._block_sizes = [], []

    def index(self, errors: list[DataError]) -> Index:
        """Everything that was added."""
        rows = np.concatenate([np.zeros(0, ROW), *self._rows])
        sizes = np.concatenate([np.zeros((0, 2), np.int32), *self._sizes])
        return Index(rows, sizes, errors, dict(self.targets), self._digest.hexdigest()[:16])


class Records(Sequence[Record]):
    """records[i] -> Record, read from its file. BadSample: the file has changed since it was indexed."""

    def __init__(self, sources: list[RecordFile], index: Index):
        self.sources, self.rows, self.sizes = sources, index.rows, index.sizes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Record:
        row = self.rows[number]
        source, line = self.sources[row["source"]], int(row["line"])
        value = source.read(int(row["place"]))
        if not isinstance(value, dict):
            raise BadSample(f"{source.path}:{line}: the file has changed since the run began; start the run again")
        names, first = picture_names(value), int(row["sizes"])
        found = self.sizes[first : first + len(names)].tolist()
        sizes = {name: (width, height) for name, (width, height) in zip(names, found, strict=False) if width}
        return Record(source, line, value, FORMATS[row["kind"]], bool(row["fixed"]), bool(row["asks"]), sizes)


def index_path(sources: list[RecordFile], settings: Any) -> Path:
    """Where the index of these files, as they are now and read with these settings, is stored."""
    files = [(str(source.path.resolve()), *_state(source.path), str(source.root)) for source in sources]
    mark = hashlib.sha256(json.dumps([VERSION, files, settings], default=str).encode()).hexdigest()[:16]
    first = sources[0].path
    return first.with_name(f".{first.name}.{mark}.records.npz")


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
