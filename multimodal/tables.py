"""Reading the tables that data sets come with; a UserError names the file that is not what it should be."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from shared.errors import UserError


def clean(caption: str) -> str:
    """White space collapsed (some captions hold stray newlines)."""
    return " ".join(caption.split())


def names_in(folder: Path) -> set[str]:
    """File names in a folder; empty where there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def read_json(path: Path, keys: Iterable[str]) -> dict:
    """A JSON object with these keys."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        absent = [key for key in keys if key not in tree]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from None
    if absent:
        raise UserError(f"{path}: has no key {absent[0]!r}; download it again")
    return tree


def read_csv(path: Path, columns: tuple[str, ...], encoding: str = "utf-8-sig") -> list[dict[str, str]]:
    """The rows of a table with these columns."""
    try:
        with open(path, encoding=encoding, newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in columns if name not in (reader.fieldnames or ())]
            if absent:
                raise UserError(
                    f"{path}: has no column {absent[0]}; its columns are {', '.join(reader.fieldnames or ())}"
                )
            rows = list(reader)
            short = next((place for place, row in enumerate(rows, 2) if None in [row[name] for name in columns]), None)
            if short is not None:
                raise UserError(f"{path}: row {short} has too few columns; download it again")
            return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as {encoding} CSV ({error}); download it again") from None
