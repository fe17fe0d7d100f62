"""Record files and the pictures beside them: .jsonl, .json, .parquet and .tar (webdataset).

A picture is named by a string: a path, or `row:column` and `sample:extension` for bytes inside parquet and tar files.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError

PICTURE_FIELDS = ("image_path", "image", "source_image_path", "target_image_path", "image_list")


@dataclass(frozen=True)
class RawRecord:
    """One record before it is checked: its line (from 1; list index or row otherwise), and the object or why there is
    none.
    """

    line: int
    value: Any
    fault: str | None = None


class RecordFile:
    """A .jsonl or .json file; picture paths are relative to `image_root`, else to the file's folder."""

    def __init__(self, path: Path, image_root: Path | None):
        self.path, self.root = path, image_root or path.parent

    def records(self) -> Iterator[RawRecord]:
        """Every record in order; lines that are not JSON come with a fault."""
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 ({error}); save it as UTF-8") from None
        if self.path.suffix == ".json":
            yield from self._whole(text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                value, fault = _parse(line)
                yield RawRecord(number, value, fault)

    def _whole(self, text: str) -> Iterator[RawRecord]:
        value, fault = _parse(text)
        if isinstance(value, dict):
            value = value.get("data")
        if fault or not isinstance(value, list):
            raise UserError(
                f"{self.path}: expected a JSON list of records, or an object whose key 'data' holds "
                f"one{f' ({fault})' if fault else ''}"
            )
        for number, record in enumerate(value):
            yield RawRecord(number, record)

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

    def records(self) -> Iterator[RawRecord]:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.path, columns=self.plain or None)
        rows = table.to_pylist() if self.plain else [{} for _ in range(table.num_rows)]
        for number, row in enumerate(rows):
            record = {name: _maybe_json(value) for name, value in row.items() if value is not None}
            for column in self.binary:
                record.setdefault("image_path" if column == "image" else column, f"{number}:{column}")
            yield RawRecord(number, record)

    def picture(self, name: str) -> Path | io.BytesIO:
        row, _, column = name.partition(":")
        if column not in self.binary or not row.isdigit():
            return super().picture(name)
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
                if self._group is None or self._group[0] != group:
                    self._group = (group, file.read_row_group(group, columns=self.binary))
                return self._group[1].column(column)[row - first].as_py()
            first += count
        raise IndexError(row)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_group": None}


class TarFile(RecordFile):
    """webdataset: each sample has a `json` member with a record (or a `txt` member with a caption); a picture path of
    the record may name a member by its extension or full name; a record without a picture path takes the sample's own
    picture.
    """

    PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

    def __init__(self, path: Path, image_root: Path | None):
        super().__init__(path, image_root)
        from shared.shards import Shards

        self.shards = Shards([path])

    def records(self) -> Iterator[RawRecord]:
        for number in range(len(self.shards)):
            members = self.shards.read(number, ("json", "txt"))
            if "json" in members:
                value, fault = _parse(members["json"].decode("utf-8", errors="replace"))
            elif "txt" in members:
                value, fault = {"text_prompt": members["txt"].decode("utf-8", errors="replace").strip()}, None
            else:
                value, fault = None, "the sample has neither a json nor a txt member"
            if isinstance(value, dict):
                value = self._with_members(value, number)
            yield RawRecord(number, value, fault)

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
        sample, _, extension = name.partition(":")
        if not sample.isdigit() or not extension:
            return super().picture(name)
        return io.BytesIO(self.shards.read(int(sample), (extension,)).get(extension, b""))


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
