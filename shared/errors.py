"""The two errors a user can cause, and the way every main() reports them: one sentence on stderr, exit code 2."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one sentence: what was wrong, where, what was found, what to do."""


class BadSample(UserError):
    """One sample of many cannot be read. The stream skips it, counts it and lists it in bad_samples.jsonl."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete or damaged, or does not fit."""


def command(main: Callable) -> Callable:
    """Decorate a ``main(argv)`` so that what the user can mend ends with exit code 2 and one sentence on stderr."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        try:
            return main(argv)
        except UserError as error:
            _leave(f"error: {error}")
        except FileNotFoundError as error:
            _leave(f"error: {error.filename}: no such file or folder; check the path")
        except PermissionError as error:
            _leave(f"error: {error.filename}: permission denied; choose a place that you can read and write")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                place = error.filename or "output folder"
                _leave(f"error: {place}: the disk is full; free some space and run the same command again")
            if error.filename is None:
                raise
            _leave(f"error: {error.filename}: {error.strerror}; give another path")

    return run


def _leave(message: str) -> None:
    rank = os.environ.get("RANK")
    print(message if rank is None else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Files that are visible only when they are whole.


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
