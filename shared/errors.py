"""The two errors a user can cause, and the way every main() reports them: one sentence on stderr, exit code 2."""

import errno
import fcntl
import functools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


class UserError(Exception):
    """Bad input. The message is one sentence: what was wrong, where, what was found, what to do."""


class Stopped(UserError):
    """A signal or the time limit met a phase that is not the last: all is saved, the command ends with exit code 0."""


class BadSample(UserError):
    """One sample of many cannot be read. The stream skips it, counts it and lists it in bad_samples.jsonl."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete or damaged, or does not fit."""


def command(main: Callable) -> Callable:
    """Decorate a ``main(argv)`` so that what the user can fix ends with exit code 2 and one sentence on stderr."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        _AT_END.append([])
        try:
            return main(argv)
        except Stopped as error:
            if os.environ.get("RANK", "0") == "0":
                print(error, flush=True)
            raise SystemExit(0) from None
        except UserError as error:
            _leave(f"error: {error}")
        except FileNotFoundError as error:
            _leave(f"error: {error.filename or error}: no such file or folder; check the path")
        except PermissionError as error:
            _leave(f"error: {error.filename or error}: permission denied; choose a place that you can read and write")
        except RecursionError:
            _leave("error: an input file or value is nested too deeply to be read; look at its brackets")
        except UnicodeError as error:
            _leave(f"error: a file or a file's name is not UTF-8 text ({error}); convert or rename it")
        except BrokenPipeError:
            _leave("error: the console was closed, such as by head; what was saved stays, the same command goes on")
        except OSError as error:
            if error.errno not in _FULL and error.filename is None and error.errno not in _OF_DISKS:
                raise
            _leave_for_disk(error)
        except Exception as error:
            if (of_disk := disk_error(error)) is None:
                raise
            _leave_for_disk(of_disk)
        finally:
            for action in _AT_END.pop():
                action()

    return run


@contextmanager
def opening(what: str, remedy: str) -> Iterator[None]:
    """Around a library's reading of a model's folder: whatever it raises over a damaged or foreign one (tokenizers
    raise a bare Exception) becomes a UserError. what: the setting and the folder.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot be loaded ({reason_of(error)}); {remedy}") from None


def reason_of(error: Exception) -> str:
    """The first sentence of a library's message, which may go on for a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". This ")[0][:200]


def load_whole(loader: Any, place: str | Path, **given: Any) -> Any:
    """loader.from_pretrained(place), for classes of transformers and diffusers: what a folder lacks they fill with
    random numbers and only warn. Here that is a ValueError, which opening() puts into a sentence.
    """
    logger = logging.getLogger(loader.__module__.partition(".")[0])
    level = logger.level
    logger.setLevel(logging.ERROR)  # their table of what is missing
    try:
        model, found = loader.from_pretrained(str(place), output_loading_info=True, **given)
    finally:
        logger.setLevel(level)
    unused = ("masked_spec_embed", "pooler.dense.weight", "pooler.dense.bias")  # left out of many public files
    lacking = sorted(name for name in found["missing_keys"] if not name.endswith(unused))
    lacking += [str(entry[0]) for entry in found.get("mismatched_keys") or ()]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of its weights are missing or of another shape, such as {lacking[0]}: another model's"
        )
    return model


_AT_END: list[list[Callable[[], object]]] = []  # of every command that runs, the inner one last


WAIT_TO_SAY = 3.0  # seconds that all ranks of a node but its first wait before they say what is wrong


def in_command() -> bool:
    """Whether a command() runs; not where a notebook or a test calls its parts."""
    return bool(_AT_END)


def at_end(action: Callable[[], object]) -> None:
    """Do this when the command that runs now ends, however it ends."""
    _AT_END[-1].append(action)


_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_DISKS = (errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE)


def disk_error(error: BaseException) -> OSError | None:
    """What a disk said where a library raises an error of its own over it: torch's comes while the system's is handled,
    that of safetensors quotes its number.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _OF_WRITING:
            return seen
        quoted = re.search(r"\(os error (\d+)\)", str(seen))
        if quoted and int(quoted[1]) in _OF_WRITING:
            return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


_OF_WRITING = (*_FULL, errno.EIO, errno.EROFS, errno.EFBIG)


def _leave_for_disk(error: OSError) -> None:
    if error.errno in _FULL:
        place = error.filename or ("the console's output" if _console_fails() else "output folder")
        _leave(f"error: {place}: the disk is full; free some space and run the same command again")
    place = error.filename or "reading or writing failed"
    _leave(f"error: {place}: {error.strerror}; look at that disk, or give another path")


def _console_fails() -> bool:
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _leave(message: str) -> None:
    rank = os.environ.get("RANK")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it in its summary, below its own traceback
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            said = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
            json.dump({"message": said}, file)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(WAIT_TO_SAY)  # mostly rank 0 says the same, and torchrun ends this process meanwhile
    with suppress(OSError):
        print(message if rank is None else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # or the interpreter would report it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(2)


def check_output(
    path: Path | str, kinds: tuple[str, ...] = (), *, flag: str = "--output", folder: bool = False
) -> Path:
    """The file (or folder) that a command is to write, looked at before anything is loaded or computed for it.

    kinds: the suffixes that it may have, in lower case, "" for none; left out: any. UserError for an empty or unknown
    name, a folder where a file is wanted, and a place that is no folder or cannot be written to.
    """
    if not str(path).strip():
        raise UserError(f"{flag} is empty; name a {'folder for the run' if folder else 'file'}")
    path = Path(path)
    if not folder and path.is_dir():
        raise UserError(f"{flag} {path}: a folder; give the name of a file")
    if kinds and path.suffix.lower() not in kinds:
        raise UserError(f"{flag} {path}: unknown kind; give a name that ends in {' or '.join(filter(None, kinds))}")
    place = path if folder else path.parent
    while not place.exists() and not place.is_symlink() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{flag} {path}: {place} is not a folder; give another path")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {place}: permission denied; choose a place that you can write to")
    return path


def sync_file(file: IO) -> None:
    """Have a file on the disk, not in the system's memory; an error names the file."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        error.filename = os.fspath(file.name)
        raise


# --- atomic writes: files that are visible only when they are whole ---------------------------------------------------

_OWN: set[Path] = set()  # temporary folders that this process writes in
_CLEARED: set[Path] = set()  # folders in which this process has looked for what dead writers left


@contextmanager
def own_folder(parent: Path | str, name: str) -> Iterator[Path]:
    """Yield a new hidden folder in `parent` that is removed whole at the end, whatever a library left in it.

    A lock says that its writer lives; where the writer was killed the lock is free, and remove_parts() takes the folder
    away. It is named .NAME.RANDOM.part.
    """
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _locked_folder(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)  # NFS keeps an open file's name till it is closed
        _OWN.discard(folder)


def _locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{name[:40]}.", suffix=".part", dir=parent.resolve()))
        except OSError as error:
            error.filename = os.fspath(parent / name)
            raise
        _OWN.add(folder)
        try:
            lock = _take_lock(folder, wait=True)
        except FileNotFoundError:
            continue
        if (folder / "lock").exists() and os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):
            return folder, lock
        os.close(lock)  # remove_parts() came between the making and the locking: take another


def _take_lock(folder: Path, *, wait: bool) -> int:
    """The open lock file. A POSIX lock: it ends with the process, is not inherited by forks, and works over NFS."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if not wait:
            os.close(lock)
            raise
        # a file system without locks: remove_parts() cannot lock there either, and leaves the folder alone
    return lock


@contextmanager
def written_aside(path: Path | str) -> Iterator[Path]:
    """Atomic write: yield a temporary file, in a hidden folder of its own next to `path`, to write to. At the end it is
    renamed to `path`, which is made with its folders; when writing fails or is killed, `path` stays as it was.

    The temporary file ends in .part, so that no reader of a folder takes it for data.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _CLEARED:
        _CLEARED.add(path.parent)
        remove_parts(path.parent)
    with own_folder(path.parent, path.name) as folder:
        try:
            yield folder / "content.part"
        except UserError:
            raise
        except Exception as error:
            of_disk = disk_error(error)
            if of_disk is None or of_disk.filename is not None:
                raise
            # A write does not say of which file, which need not be the command's output.
            raise OSError(of_disk.errno, of_disk.strerror or str(of_disk), os.fspath(path)) from error
        try:
            os.replace(folder / "content.part", path)
        except OSError as error:
            error.filename, error.filename2 = os.fspath(path), None
            raise


def remove_parts(folder: Path | str) -> None:
    """Remove what killed writers left in a folder, with everything that their libraries left there. What a living
    process writes, in this one or another, stays.
    """
    for left in Path(folder).resolve().glob(".*.part"):
        if not left.is_dir() or left.is_symlink():
            with suppress(OSError):
                left.unlink()  # of an earlier version
        elif left not in _OWN:
            try:
                if not (left / "lock").exists() and any(left.iterdir()):
                    continue  # of another program, or somebody's own: a writer of ours makes its lock first
                lock = _take_lock(left, wait=False)
            except OSError:
                continue
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def read_lines(path: Path | str, flag: str, remedy: str) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text that hold something, stripped, each with its number from 1. UserError where what the
    flag names is no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file; {remedy}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 ({error}); save it as UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def check_columns(table: Path | str, names: Iterable[str] | None) -> None:
    """Refuse a table with two columns of one name: nobody can know which of them is meant."""
    repeated = [name for name, count in Counter(names or ()).items() if name and count > 1]
    if repeated:
        raise UserError(f"{table}: column {repeated[0]!r} occurs twice in its first row; rename or remove one of them")


def write_text(path: Path | str, text: str, *, sync: bool = False) -> None:
    """Atomic write of UTF-8 text. sync: it is on the disk, not in the system's memory, before the renaming."""
    with written_aside(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            sync_file(file)
