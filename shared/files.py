"""Files that are visible only when they are whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path | str) -> Iterator[Path]:
    """Yield a hidden name beside `path` to write to; it is renamed to `path` at the end, and removed when writing
    fails. It ends in .part, so that no reader of a folder takes it for data. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path | str) -> None:
    """Remove what killed writers left in a folder; called when none writes there any more."""
    for left in Path(folder).glob(".*.part"):
        left.unlink(missing_ok=True)


def write_text(path: Path | str, text: str, *, sync: bool = False) -> None:
    """Write UTF-8 text aside and rename. sync: it is on the disk, not in the system's memory, before the renaming."""
    with written_aside(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
