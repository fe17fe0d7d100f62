"""Record files and the pictures beside them: .jsonl, .json, .parquet and .tar (webdataset).

A picture is named by a string: a path, or `row:column` and `sample:extension` for bytes inside parquet and tar files.
Records are read in order once, and singly by their place after that.
"""

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel.data.images import ImageFault
from shared.errors import BadSample, UserError

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
