"""Record files and pictures, opened safely; what opening a set must know of its records; pictures to tensors."""

import codecs
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bagel.data.records import FORMATS
from shared.errors import BadSample, UserError, written_aside
from shared.media.pictures import as_rgb

MAX_AREA = 200_000_000  # pixels; larger files are refused before they are decoded
DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024


class ImageFault(Exception):
    """A picture that cannot be used; `code` is one of the E_IMAGE codes of the data format."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def image_size(source: Path | BinaryIO) -> tuple[int, int]:
    """(width, height) from the header alone; raises an ImageFault."""
    with _opened(source) as image:
        return image.size


def load_image(source: Path | BinaryIO) -> Image.Image:
    """The whole picture as RGB, transparency laid on white; raises an ImageFault for what is missing, damaged or too
    large.
    """
    with _opened(source) as image:
        try:
            return as_rgb(image, upright=False)  # as the released loader, whose sizes come from the header
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageFault("E_IMAGE_DECODE", f"{_name(source)} is damaged or cut short ({error})") from None


def _opened(source: Path | BinaryIO) -> Image.Image:
    if isinstance(source, Path) and not os.path.isfile(source):  # unlike Path's, False also for an impossible name
        raise ImageFault("E_IMAGE_MISSING", f"{source} is {'a folder' if os.path.isdir(source) else 'not there'}")
    try:
        image = Image.open(source)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ImageFault("E_IMAGE_DECODE", f"{_name(source)} is not a readable picture ({error})") from None
    width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_AREA:
        image.close()
        raise ImageFault("E_IMAGE_SIZE", f"{_name(source)} has {width} x {height} pixels; 1 to {MAX_AREA} are allowed")
    return image


def _name(source: Path | BinaryIO) -> str:
    return str(source) if isinstance(source, Path) else "the embedded picture"


def resized_sides(
    width: int,
    height: int,
    *,
    max_size: int,
    min_size: int,
    stride: int,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    images: int = 1,
) -> tuple[int, int]:
    """(width, height) after the released resize rule; both are multiples of `stride`.

    The long side goes down to max_size, the short side up to min_size, sides are rounded to the stride. An area above
    max_pixels / images shrinks the sides by that very ratio (not its root), and a long side still above max_size again.
    """
    scale = max(min(max_size / max(width, height), 1.0), min_size / min(width, height))
    width, height = _scaled(width, height, scale, stride)
    if width * height > max_pixels / images:
        width, height = _scaled(width, height, max_pixels / images / (width * height), stride)
    if max(width, height) > max_size:
        width, height = _scaled(width, height, max_size / max(width, height), stride)
    return width, height


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    sides = (round(width * scale), round(height * scale))
    return tuple(max(stride, round(side / stride) * stride) for side in sides)


class ImageTransform:
    """Resizes by the rule and normalises. Sides in pixels; `image_stride` is the side of one token."""

    def __init__(
        self, max_image_size: int, min_image_size: int, image_stride: int, max_pixels: int = DEFAULT_MAX_PIXELS
    ):
        self.max_size, self.min_size, self.stride, self.max_pixels = (
            max_image_size,
            min_image_size,
            image_stride,
            max_pixels,
        )

    def sides(self, width: int, height: int, images: int = 1) -> tuple[int, int]:
        """(width, height) that a picture of this size will have; `images`: pictures that share max_pixels."""
        return resized_sides(
            width,
            height,
            max_size=self.max_size,
            min_size=self.min_size,
            stride=self.stride,
            max_pixels=self.max_pixels,
            images=images,
        )

    def resize_transform(self, image: Image.Image, images: int = 1) -> Image.Image:
        """The resized picture, bicubic with antialiasing."""
        sides = self.sides(*image.size, images)
        return image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image, images: int = 1) -> Tensor:
        """(3, H, W) in [-1, 1]."""
        return to_tensor(self.resize_transform(image, images))


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 RGB to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


PICTURE_FIELDS = ("image_path", "image", "source_image_path", "target_image_path", "image_list")
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RawRecord:
    """One record before it is checked: its line (from 1; list index or row otherwise), the object or why there is
    none, and its place: what read() needs to find it again.
    """

    line: int
    value: Any
    fault: str | None
    place: int


class RecordFile:
    """A .jsonl or .json file; picture paths are relative to `image_root`, else to the file's folder."""

    def __init__(self, path: Path, image_root: Path | None):
        self.path, self.root = path, image_root or path.parent
        self._values: list | None = None

    def records(self) -> Iterator[RawRecord]:
        """Every record in order; lines that are not JSON come with a fault."""
        if self.path.suffix == ".json":
            for number, value in enumerate(self._whole()):
                yield RawRecord(number, value, None, number)
            return
        place = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = self._decoded(line)
                if text.strip():
                    yield RawRecord(number, *_parse(text), place)
                place += len(line)

    def read(self, place: int) -> Any:
        """The record at a place again; None when there is none any more."""
        if self.path.suffix == ".json":
            values = self._whole()
            return values[place] if place < len(values) else None
        with open(self.path, "rb") as file:
            file.seek(place)
            line = file.readline()
        return _parse(line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace"))[0]

    def holds(self, name: str) -> bool:
        """Whether a picture lies inside this file."""
        return False

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 ({error}); save it as UTF-8") from None

    def _whole(self) -> list:
        """The records of a .json file, kept from the first call on."""
        if self._values is None:
            value, fault = _parse(self._decoded(self.path.read_bytes()))
            if isinstance(value, dict):
                value = value.get("data")
            if fault or not isinstance(value, list):
                raise UserError(
                    f"{self.path}: expected a JSON list of records, or an object whose key 'data' holds "
                    f"one{f' ({fault})' if fault else ''}"
                )
            self._values = value
        return self._values

    def picture(self, name: str) -> Path | io.BytesIO:
        """Where to read the picture from."""
        path = Path(name)
        return path if path.is_absolute() else self.root / path


class ParquetFile(RecordFile):
    """Rows with the fields of the record formats. A binary column `X` (or {"bytes", "path"}) stands for the picture
    `image_path` when it is called `image`, else for the field of its own name.
    """

    def __init__(self, path: Path, image_root: Path | None):
        super().__init__(path, image_root)
        import pyarrow
        import pyarrow.parquet

        try:
            schema = pyarrow.parquet.ParquetFile(path).schema_arrow
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from None
        self.binary = [field.name for field in schema if _holds_bytes(field.type)]
        self.plain = [field.name for field in schema if field.name not in self.binary]
        self._group: tuple[int, Any] | None = None
        self._table: Any = None

    def records(self) -> Iterator[RawRecord]:
        for first in range(0, self._rows().num_rows, ROWS_AT_ONCE):
            block = self._rows().slice(first, ROWS_AT_ONCE)
            for number, row in enumerate(block.to_pylist(), start=first):
                yield RawRecord(number, self._record(number, row), None, number)

    def read(self, place: int) -> Any:
        rows = self._rows().slice(place, 1).to_pylist()
        return self._record(place, rows[0]) if rows else None

    def _rows(self) -> Any:
        """The table without pictures, kept from the first call on."""
        import pyarrow
        import pyarrow.parquet

        if self._table is None:
            try:
                self._table = pyarrow.parquet.read_table(self.path, columns=self.plain)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{self.path}: damaged ({error}); copy it again") from None
            if not self.plain:
                count = pyarrow.parquet.read_metadata(self.path).num_rows
                self._table = pyarrow.table({"": pyarrow.nulls(count)})
        return self._table

    def _record(self, number: int, row: dict) -> dict:
        record = {name: _maybe_json(value) for name, value in row.items() if value is not None}
        for column in self.binary:
            record.setdefault("image_path" if column == "image" else column, f"{number}:{column}")
        return record

    def holds(self, name: str) -> bool:
        row, _, column = name.partition(":")
        return column in self.binary and row.isdigit()

    def picture(self, name: str) -> Path | io.BytesIO:
        if not self.holds(name):
            return super().picture(name)
        row, _, column = name.partition(":")
        value = self._cell(int(row), column)
        if isinstance(value, dict):
            value = value.get("bytes")
        return io.BytesIO(value or b"")

    def _cell(self, row: int, column: str) -> Any:
        """The cell, with its row group kept for the next call."""
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(self.path)
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < first + count:
                kept = self._group  # another thread may change it
                if kept is None or kept[0] != group:
                    kept = self._group = (group, file.read_row_group(group, columns=self.binary))
                return kept[1].column(column)[row - first].as_py()
            first += count
        raise IndexError(row)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_group": None, "_table": None}


class TarFile(RecordFile):
    """webdataset: each sample has a `json` member with a record (or a `txt` member with a caption); a picture path of
    the record may name a member by its extension or full name; a record without a picture path takes the sample's own
    picture.
    """

    PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

    def __init__(self, path: Path, image_root: Path | None):
        super().__init__(path, image_root)
        from shared.media.shards import Shards

        self.shards = Shards([path])

    def records(self) -> Iterator[RawRecord]:
        for number in range(len(self.shards)):
            yield RawRecord(number, *self._record(number), number)

    def read(self, place: int) -> Any:
        return self._record(place)[0]

    def _record(self, number: int) -> tuple[Any, str | None]:
        """(the record, None), or (None, why there is none)."""
        members = self.shards.read(number, ("json", "txt"))
        if "json" in members:
            value, fault = _parse(members["json"].decode("utf-8", errors="replace"))
        elif "txt" in members:
            value, fault = {"text_prompt": members["txt"].decode("utf-8", errors="replace").strip()}, None
        else:
            return None, "the sample has neither a json nor a txt member"
        return (self._with_members(value, number) if isinstance(value, dict) else value), fault

    def holds(self, name: str) -> bool:
        sample, _, extension = name.partition(":")
        return sample.isdigit() and bool(extension) and int(sample) < len(self.shards)

    def _with_members(self, record: dict, number: int) -> dict:
        key, extensions = self.shards.names(number)
        names = {extension: f"{number}:{extension}" for extension in extensions}
        names.update({f"{key}.{extension}": f"{number}:{extension}" for extension in extensions})
        record = _renamed(record, names)
        own = next((extension for extension in self.PICTURES if extension in extensions), None)
        if own and "text_prompt" in record and "image_path" not in record:
            record["image_path"] = f"{number}:{own}"
        return record

    def picture(self, name: str) -> Path | io.BytesIO:
        if not self.holds(name):
            return super().picture(name)
        sample, _, extension = name.partition(":")
        try:
            return io.BytesIO(self.shards.read(int(sample), (extension,)).get(extension, b""))
        except BadSample as fault:
            raise ImageFault("E_IMAGE_DECODE", str(fault)) from None


def open_records(paths: str, image_root: str | None) -> list[RecordFile]:
    """The files of a comma-separated list; raises a UserError for what is not there or of an unknown kind."""
    kinds = {".jsonl": RecordFile, ".json": RecordFile, ".parquet": ParquetFile, ".tar": TarFile}
    root = Path(image_root) if image_root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--image-root {root}: no such folder")
    found = []
    for text in paths.split(","):
        path = Path(text.strip())
        if not path.is_file():
            raise UserError(
                f"{path}: {'a folder, not a record file' if path.is_dir() else 'no such record file'}; "
                f"give .jsonl, .json, .parquet or .tar"
            )
        if path.suffix not in kinds:
            raise UserError(
                f"{path}: unknown kind of record file {path.suffix!r}; give .jsonl, .json, .parquet or .tar"
            )
        found.append(kinds[path.suffix](path, root))
    return found


def picture_names(value: Any) -> list[str]:
    """Every string in a record that its format reads as a picture."""
    if isinstance(value, list):
        return [name for item in value for name in picture_names(item)]
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        if key in PICTURE_FIELDS:
            found += [name for name in (item if isinstance(item, list) else [item]) if isinstance(name, str)]
        elif isinstance(item, (dict, list)):
            found += picture_names(item)
    return found


def _parse(text: str) -> tuple[Any, str | None]:
    try:
        return json.loads(text, parse_constant=_refuse_constant), None
    except (ValueError, RecursionError) as error:
        return None, str(error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name} is not JSON")


def _maybe_json(value: Any) -> Any:
    """Nested fields are often stored as JSON text in parquet."""
    if isinstance(value, str) and value[:1] in "[{":
        parsed, fault = _parse(value)
        return value if fault else parsed
    return value


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Every string that names a member replaced by the member's own name, at any depth of picture fields."""
    if isinstance(value, dict):
        return {
            key: _renamed(item, names) if key in PICTURE_FIELDS or isinstance(item, (dict, list)) else item
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


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
