"""Record files and pictures, opened safely; what opening a set must know of its records; pictures to tensors."""

import base64
import codecs
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bagel.data.records import FORMATS
from shared.errors import BadSample, UserError, written_aside
from shared.media.folders import is_junk
from shared.media.pictures import MOST_PIXELS, as_rgb

DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024


class ImageFault(Exception):
    """A picture that cannot be used; `code` is one of the E_IMAGE codes of the data format."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def image_size(source: Path | BinaryIO) -> tuple[int, int]:
    """(width, height) as the picture is to be looked at, from the header alone; raises an ImageFault."""
    with _opened(source) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in LYING else (width, height)


def load_image(source: Path | BinaryIO) -> Image.Image:
    """The whole picture as RGB, upright, transparency laid on white; raises an ImageFault for what is missing, damaged
    or too large.
    """
    with _opened(source) as image:
        try:
            turn = TURNS.get(_orientation(image))
            pixels = as_rgb(image, upright=False)  # turned below, by the same rule as in image_size
            return pixels if turn is None else pixels.transpose(turn)
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageFault("E_IMAGE_DECODE", f"{_name(source)} is damaged or cut short ({error})") from None


# How a camera was held (EXIF tag 274), and what sets the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)  # width and height change places


def _orientation(image: Image.Image) -> int:
    """The EXIF note as the header alone tells it: a PNG may hold one behind its pixels, which does not count."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(274, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError):  # a damaged note
        return 1


def _opened(source: Path | BinaryIO) -> Image.Image:
    if isinstance(source, Path) and not os.path.isfile(source):  # unlike Path's, False also for an impossible name
        raise ImageFault(
            "E_IMAGE_MISSING", f"{_name(source)} is {'a folder' if os.path.isdir(source) else 'not there'}"
        )
    try:
        image = Image.open(source)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ImageFault("E_IMAGE_DECODE", f"{_name(source)} is not a readable picture{why}") from None
    width, height = image.size
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        image.close()
        raise ImageFault(
            "E_IMAGE_SIZE", f"{_name(source)} has {width} x {height} pixels; 1 to {MOST_PIXELS} are allowed"
        )
    return image


def _name(source: Path | BinaryIO) -> str:
    return _short(str(source)) if isinstance(source, Path) else "the embedded picture"


def _short(text: str) -> str:
    """A name that may be a whole picture written as text."""
    return text if len(text) <= 200 else f"{text[:80]}... ({len(text)} characters)"


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
    wide, high = (max(stride, round(round(side * scale) / stride) * stride) for side in (width, height))
    return wide, high


def check_sides(name: str, size: tuple[int, int], sides: tuple[int, int], stride: int, most: int) -> None:
    """Refuse (width, height) of a picture that the resize rule would bend out of shape, more than halving or doubling
    its proportions, or that needs more than `most` patches of `stride` pixels on a side; raises an ImageFault.
    """
    if max(sides) * min(size) * 2 < min(sides) * max(size):
        raise ImageFault(
            "E_IMAGE_SIZE",
            f"{_short(name)} of {size[0]} x {size[1]} pixels is too long and narrow: at {sides[0]} x {sides[1]}, what "
            "the resize rule makes of it, its shape would be lost; crop it",
        )
    if max(sides) // stride > most:
        raise ImageFault(
            "E_IMAGE_SIZE",
            f"{_short(name)} of {size[0]} x {size[1]} pixels becomes {sides[0]} x {sides[1]}, which needs "
            f"{max(sides) // stride} patches on a side; at most {most} fit",
        )


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


PICTURE_FIELDS = ("image_path", "image", "images", "source_image_path", "target_image_path", "image_list", "image_url")
MAX_LIST = 1 << 24  # bytes of a .json file that may be a list of parquet files
ROWS_AT_ONCE = 4096
STARTS = {  # of files that are no UTF-8 text, and what to do about them
    codecs.BOM_UTF32_LE: "UTF-32; save it as UTF-8",
    codecs.BOM_UTF32_BE: "UTF-32; save it as UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "packed with gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it",
    b"PK\x03\x04": "packed with zip; unpack it",
    b"PAR1": "a parquet file; call it .parquet",
}


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
    """A file of JSON records: one a line, or a list (or an object whose key `data` holds one), whatever its name says.
    Picture paths are relative to `image_root`, else to the file's folder.
    """

    changes = False  # whether a place holds another record in every epoch

    def __init__(self, path: Path, image_root: Path | None):
        self.path, self.root = path, image_root or path.parent
        self._values: list | None = None
        self._is_list: bool | None = None

    def records(self) -> Iterator[RawRecord]:
        """Every record in order; lines that are not JSON come with a fault."""
        if self._holds_a_list():
            for number, value in enumerate(self._whole()):
                yield RawRecord(number, value, None, number)
            return
        place = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    yield RawRecord(number, None, f"not UTF-8: {error}", place)
                else:
                    if text.strip():
                        yield RawRecord(number, *_parse(text), place)
                place += len(line)

    def read(self, place: int, epoch: int = 0) -> Any:
        """The record at a place again; None when there is none any more."""
        if self._holds_a_list():
            values = self._whole()
            return values[place] if place < len(values) else None
        with open(self.path, "rb") as file:
            file.seek(place)
            line = file.readline()
        return _parse(line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace"))[0]

    def load(self, name: str) -> Image.Image:
        """The picture, whole; raises an ImageFault."""
        return load_image(self.picture(name))

    def holds(self, name: str) -> bool:
        """Whether a picture lies inside this file."""
        return name.startswith("data:")

    def _holds_a_list(self) -> bool:
        """By the content: a file that begins with `[` is a list if it can be read as one; a .json file is one record a
        line if its first line is a whole object.
        """
        if self._is_list is None:
            with open(self.path, "rb") as file:
                lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
                head, more = next(filter(None, lines), b""), next(filter(None, lines), None)
            self._check_text(head)
            value, fault = _parse(head.decode("utf-8", "replace"))
            if self.path.suffix.lower() == ".json":
                self._is_list = bool(fault) or not isinstance(value, dict) or more is None
            else:
                self._is_list = head.startswith(b"[") and (bool(fault) or more is None) and self._reads_as_list()
        return self._is_list

    def _check_text(self, head: bytes) -> None:
        """Refuse by its first line a file that is no UTF-8 text at all."""
        for start, what in STARTS.items():
            if head.startswith(start):
                raise UserError(f"{self.path}: {what}")
        zeros = head[:4].count(0)  # JSON begins with a letter of ASCII
        if 0 < zeros < 4:
            raise UserError(f"{self.path}: UTF-{32 if zeros == 3 else 16}; save it as UTF-8")
        first, cr, _ = head.partition(b"\r")
        if cr and isinstance(_parse(first.decode("utf-8", "replace"))[0], dict):
            raise UserError(f"{self.path}: its lines end with CR alone; save it with line ends LF or CR LF")

    def _reads_as_list(self) -> bool:
        return isinstance(_parse(self.path.read_bytes().decode("utf-8-sig", "replace"))[0], list)

    def _whole(self) -> list:
        """The records of a list, kept from the first call on."""
        if self._values is None:
            # a byte that is not UTF-8 spoils the record that it stands in, which check_texts refuses
            value, fault = _parse(self.path.read_bytes().decode("utf-8-sig", "surrogateescape"))
            if isinstance(value, dict):
                value = value.get("data")
            if fault or not isinstance(value, list):
                raise UserError(
                    f"{self.path}: expected a JSON list of records, an object whose key 'data' holds one, or one "
                    f"record a line{f' ({fault})' if fault else ''}"
                )
            self._values = value
        return self._values

    def picture(self, name: str) -> Path | io.BytesIO:
        """Where to read the picture from; raises an ImageFault for an address, since nothing is downloaded."""
        if name.startswith("data:"):
            return _from_text(name)
        if name.startswith(("http://", "https://", "s3://", "gs://")):
            raise ImageFault("E_IMAGE_MISSING", f"{_short(name)} is an address: download the picture, give its path")
        path = Path(unquote(urlsplit(name).path) if name.startswith("file://") else name)
        path = path if path.is_absolute() else self.root / path
        if "\\" in name and not os.path.isfile(path):  # written on Windows
            other = Path(name.replace("\\", "/"))
            path = other if other.is_absolute() else self.root / other
        return path

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_values": None}


def _from_text(name: str) -> io.BytesIO:
    """A picture written as data:image/...;base64,... in the record itself."""
    head, comma, data = name.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("expected data:image/...;base64,...")
        return io.BytesIO(base64.b64decode(data, validate=True))
    except ValueError as error:
        raise ImageFault("E_IMAGE_DECODE", f"{_short(name)} is not base64 ({error})") from None


class ParquetFile(RecordFile):
    """Rows with the fields of the record formats. A binary column `X` (or {"bytes", "path"}) stands for the picture
    `image_path` when it is called `image` and no turns are given, else for the field of its own name; a list of such
    stands for several pictures. Columns of texts may be binary, too, and such of nested fields JSON text.
    """

    TEXTS = ("text_prompt", "question", "answer", "caption", "instruction", "system", "id")
    NESTED = ("conversations", "messages", "sequence", "image_list", "instruction_list", "images", "captions")

    def __init__(self, path: Path, image_root: Path | None):
        super().__init__(path, image_root)
        import pyarrow
        import pyarrow.parquet

        try:
            schema = pyarrow.parquet.ParquetFile(path).schema_arrow
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from None
        words = (*self.TEXTS, "conversations", "messages", "sequence", "instruction_list", "captions")
        self.binary = {
            field.name: _is_list(field.type) for field in schema if field.name not in words and _holds_bytes(field.type)
        }
        self.plain = [field.name for field in schema if field.name not in self.binary]
        self._group: tuple[int, Any] | None = None
        self._table: Any = None
        self._counts: dict[str, np.ndarray] | None = None

    def records(self) -> Iterator[RawRecord]:
        for first in range(0, self._rows().num_rows, ROWS_AT_ONCE):
            yield from self._read(first, ROWS_AT_ONCE)

    def read(self, place: int, epoch: int = 0) -> Any:
        rows = self._read(place, 1)
        return rows[0].value if rows else None

    def _read(self, first: int, count: int) -> list[RawRecord]:
        """Some rows; a text that is not UTF-8 spoils its own alone."""
        block = self._rows().slice(first, count)
        try:
            rows = enumerate(block.to_pylist(maps_as_pydicts="lossy"), start=first)
            return [RawRecord(number, self._record(number, _decoded(row)), None, number) for number, row in rows]
        except UnicodeDecodeError as error:
            if count == 1:
                return [RawRecord(first, None, f"not UTF-8: {error}", first)]
            return [raw for number in range(first, first + block.num_rows) for raw in self._read(number, 1)]

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

    def _pictures_a_row(self) -> dict[str, np.ndarray]:
        """For every binary column how many pictures a row has: 0 or 1, or the length of its list."""
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        if self._counts is None:
            found: dict[str, list[np.ndarray]] = {name: [] for name in self.binary}
            try:
                file = pyarrow.parquet.ParquetFile(self.path)
                for group in range(file.num_row_groups if self.binary else 0):
                    table = file.read_row_group(group, columns=list(self.binary))
                    for name, is_list in self.binary.items():
                        column = table.column(name)
                        lengths = (
                            pyarrow.compute.list_value_length(column) if is_list else column.is_valid().cast("int32")
                        )
                        found[name].append(lengths.fill_null(0).to_numpy().astype(np.int32))
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{self.path}: damaged ({error}); copy it again") from None
            self._counts = {name: np.concatenate(parts or [np.zeros(0, np.int32)]) for name, parts in found.items()}
        return self._counts

    def _record(self, number: int, row: dict) -> dict:
        record = {
            name: _json_or_text(value) if name in self.NESTED else value
            for name, value in row.items()
            if value is not None
        }
        talks = "conversations" in record or "messages" in record
        for column, counts in self._pictures_a_row().items():
            count = int(counts[number])
            if self.binary[column]:
                if count:
                    record.setdefault(column, [f"{number}:{column}.{k}" for k in range(count)])
            elif count:  # before a path, which may be that of another machine
                record["image_path" if column == "image" and not talks else column] = f"{number}:{column}"
        return record

    def holds(self, name: str) -> bool:
        row, _, column = name.partition(":")
        return (row.isdigit() and self._column(column)[0] in self.binary) or super().holds(name)

    def _column(self, text: str) -> tuple[str, int | None]:
        """(column, place in its list) of the second half of a name."""
        column, dot, place = text.rpartition(".")
        return (column, int(place)) if dot and place.isdigit() and self.binary.get(column) else (text, None)

    def picture(self, name: str) -> Path | io.BytesIO:
        row, _, rest = name.partition(":")
        if not row.isdigit() or self._column(rest)[0] not in self.binary:
            return super().picture(name)
        column, place = self._column(rest)
        value = self._cell(int(row), column)
        if place is not None and value is not None:
            value = value[place]
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return super().picture(value["path"])
            value = value.get("bytes")
        return io.BytesIO(value or b"")

    def _cell(self, row: int, column: str) -> Any:
        """The cell, with its row group kept for the next call."""
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row < first + count:
                    kept = self._group  # another thread may change it
                    if kept is None or kept[0] != group:
                        kept = self._group = (group, file.read_row_group(group, columns=list(self.binary)))
                    return kept[1].column(column)[row - first].as_py()
                first += count
        except (pyarrow.ArrowException, OSError) as error:
            raise ImageFault("E_IMAGE_DECODE", f"{self.path} is damaged ({error})") from None
        raise IndexError(row)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_group": None, "_table": None}


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

    def read(self, place: int, epoch: int = 0) -> Any:
        return self._record(place)[0]

    def _record(self, number: int) -> tuple[Any, str | None]:
        """(the record, None), or (None, why there is none)."""
        members = self.shards.read(number, ("json", "txt"))
        if "json" in members:
            value, fault = _parse(members["json"].decode("utf-8-sig", "surrogateescape"))
        elif "txt" in members:
            value, fault = {"text_prompt": members["txt"].decode("utf-8-sig", "surrogateescape").strip()}, None
        else:
            return None, "the sample has neither a json nor a txt member"
        return (self._with_members(value, number) if isinstance(value, dict) else value), fault

    def holds(self, name: str) -> bool:
        sample, _, extension = name.partition(":")
        inside = sample.isdigit() and bool(extension) and int(sample) < len(self.shards)
        return inside or super().holds(name)

    def _with_members(self, record: dict, number: int) -> dict:
        key, extensions = self.shards.names(number)
        names = {extension: f"{number}:{extension}" for extension in extensions}
        names.update({f"{key}.{extension}": f"{number}:{extension}" for extension in extensions})
        record = _renamed(record, names)
        own = next((extension for extension in self.PICTURES if extension in extensions), None)
        if own and ("text_prompt" in record or "captions" in record) and "image_path" not in record:
            record["image_path"] = f"{number}:{own}"
        return record

    def picture(self, name: str) -> Path | io.BytesIO:
        sample, _, extension = name.partition(":")
        if name.startswith("data:") or not self.holds(name):
            return super().picture(name)
        try:
            return io.BytesIO(self.shards.read(int(sample), (extension,)).get(extension, b""))
        except BadSample as fault:
            raise ImageFault("E_IMAGE_DECODE", str(fault)) from None


KINDS: dict[str, type[RecordFile]] = {
    ".parquet": ParquetFile,
    ".tar": TarFile,
    ".jsonl": RecordFile,
    ".ndjson": RecordFile,
    ".json": RecordFile,
}


def open_records(paths: str, image_root: str | None) -> list[RecordFile]:
    """The files of a comma-separated list of files, folders of shards, patterns and lists of parquet files (an object
    of paths with num_row_groups, as the released data have); raises a UserError for what is not there.
    """
    root = Path(image_root) if image_root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--image-root {root}: no such folder")
    found = []
    given = [paths] if os.path.exists(paths) else [text.strip() for text in paths.split(",")]
    for text in filter(None, given):
        for path in _files_of(Path(text)):
            if path.suffix.lower() not in KINDS:
                raise UserError(
                    f"{path}: unknown kind of record file {path.suffix!r}; give .jsonl, .json, .parquet or .tar"
                )
            found.append(KINDS[path.suffix.lower()](path, root))
    return found


def _files_of(path: Path) -> list[Path]:
    """The record files that a path of the command line stands for."""
    if path.is_dir():
        return _shards_of(path)
    if not path.is_file() and set("*?[") & set(str(path)):
        files = sorted(file for file in map(Path, glob(str(path), recursive=True)) if file.is_file())
        if not files:
            raise UserError(f"{path}: no file fits this pattern")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such record file; give .jsonl, .json, .parquet or .tar, or a folder of them")
    if path.suffix.lower() == ".json" and path.stat().st_size < MAX_LIST:
        value, _ = _parse(path.read_bytes().decode("utf-8-sig", "replace"))
        if isinstance(value, dict) and value and all(_is_shard_note(note) for note in value.values()):
            return [_listed(path, name) for name in value]
    return [path]


def _shards_of(folder: Path) -> list[Path]:
    """The record files of one kind in a folder, else in the folders below it."""
    for files in (folder.iterdir(), folder.rglob("*")):
        by_kind: dict[str, list[Path]] = {}
        for file in files:
            if file.suffix.lower() in KINDS and file.is_file() and not is_junk(file, folder):
                by_kind.setdefault(file.suffix.lower(), []).append(file)
        if by_kind.keys() <= {".json"} and any(folder.glob("*.arrow")):
            raise UserError(f"{folder}: its shards are .arrow files; write them as .parquet")
        if len(by_kind) > 1:
            by_kind.pop(".json", None)  # notes about the shards
        if len(by_kind) > 1:
            raise UserError(
                f"{folder}: holds {' and '.join(sorted(by_kind))}; name one kind, such as '{folder}/*.jsonl'"
            )
        if by_kind:
            return sorted(by_kind.popitem()[1])
    raise UserError(f"{folder}: a folder without record files; give .jsonl, .json, .parquet or .tar")


def _is_shard_note(value: Any) -> bool:
    return isinstance(value, dict) and "num_row_groups" in value


def _listed(info: Path, name: str) -> Path:
    """A file of a list: where it says, else beside the list, else the longest end of its path that is found in the
    folders around the list; for data are moved, and lists hold the paths of the machine that made them.
    """
    parts = Path(name).parts
    beside = (Path(name), info.parent / name, info.parent / parts[-1])
    ends = (folder / Path(*parts[k:]) for k in range(len(parts) - 1) for folder in info.absolute().parents[:4])
    for path in (*beside, *ends):
        if path.is_file():
            return path
    raise UserError(f"{info}: its file {name} is not there, nor around the list; copy it there or mend the path")


def picture_names(value: Any) -> list[str]:
    """Every string in a record that its format reads as a picture."""
    if isinstance(value, list):
        return [name for item in value for name in picture_names(item)]
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        if key in PICTURE_FIELDS:
            items = [name.get("url") if isinstance(name, dict) else name for name in _as_list(item)]
            found += [name for name in items if isinstance(name, str) and name]
        elif isinstance(item, (dict, list)):
            found += picture_names(item)
    return found


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _parse(text: str) -> tuple[Any, str | None]:
    try:
        return json.loads(text, parse_constant=_refuse_constant), None
    except (ValueError, RecursionError) as error:
        return None, str(error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name} is not JSON")


def _json_or_text(value: Any) -> Any:
    """Nested fields are often stored as JSON text in parquet."""
    if isinstance(value, str) and value[:1] in "[{":
        parsed, fault = _parse(value)
        return value if fault else parsed
    return value


def _decoded(value: Any) -> Any:
    """Texts that are stored as bytes."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return {name: _decoded(item) for name, item in value.items()} if isinstance(value, dict) else value


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if _is_list(kind) or types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


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


VERSION = 2
STORED_FROM = 10_000  # records: fewer are read again in a moment
ROW = np.dtype(
    [
        ("source", "i2"),
        ("place", "i8"),
        ("line", "i8"),
        ("kind", "i1"),
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
    """A record that passed every check; `asks`: it answers about a given picture;
    `sizes`: (width, height) of its pictures.
    """

    source: RecordFile
    line: int
    value: dict
    kind: str
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
        weight = float(record.value.get("weight") or 1.0)
        kind = FORMATS.index(record.kind)
        row = (source, place, record.line, kind, record.asks, weight, length, self._pictures)
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


class Records:
    """records[i] -> Record, read from its file. BadSample: the file has changed since it was indexed."""

    def __init__(self, sources: list[RecordFile], index: Index):
        self.sources, self.rows, self.sizes = sources, index.rows, index.sizes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Record:
        return self.at(number, 0)

    def at(self, number: int, epoch: int) -> Record:
        """The record in an epoch."""
        row = self.rows[number]
        source, line = self.sources[row["source"]], int(row["line"])
        value = source.read(int(row["place"]), epoch)
        if not isinstance(value, dict):
            raise BadSample(f"{source.path}:{line}: the file has changed since the run began; start the run again")
        names, first = picture_names(value), int(row["sizes"])
        found = self.sizes[first : first + len(names)].tolist()
        sizes = {name: (width, height) for name, (width, height) in zip(names, found, strict=False) if width}
        return Record(source, line, value, FORMATS[row["kind"]], bool(row["asks"]), sizes)


def index_path(sources: list[RecordFile], settings: Any) -> Path:
    """Where the index of these files, as they are now and read with these settings, is stored."""
    files = [(str(source.path.resolve()), *_state(source.path), str(source.root)) for source in sources]
    mark = hashlib.sha256(json.dumps([VERSION, files, settings], default=str).encode()).hexdigest()[:16]
    first = sources[0].path
    return first.with_name(f".{first.name}.{mark}.records.npz")


def _state(path: Path) -> tuple[int, int]:
    found = path.stat() if path.is_file() else os.stat(__file__)  # scenes are no file
    return found.st_size, found.st_mtime_ns
