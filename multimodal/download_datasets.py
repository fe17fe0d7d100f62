"""Fetch COCO, Clotho, AudioCaps, VoxCeleb and GloVe into a data folder.

    python multimodal/download_datasets.py --datasets coco clotho audiocaps --data-root ./data --skip-existing
    python multimodal/download_datasets.py --datasets all --dry-run

Downloads are resumed and verified, archives are unpacked safely, and what its authors hand out on request is explained
step by step. Exit code: 0 all is there, 2 bad arguments, 3 a download, checksum, archive or disk failure, 4 only
manual sets are missing.
"""

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from multimodal.download.archives import ArchiveError, count_files, unpack  # noqa: E402
from multimodal.download.catalogue import AUDIOCAPS_2, SETS, ManualFile, RemoteFile, RemoteSet  # noqa: E402
from multimodal.download.fetch import DownloadError, Policy, digest, fetch  # noqa: E402
from shared.config import Section, load_config, setting  # noqa: E402
from shared.errors import UserError, check_output, command, write_text, written_aside  # noqa: E402
from shared.media.folders import is_junk

MARKER = ".complete.json"
FAILED, MANUAL = 3, 4
SPARE = 1.05  # free space wanted beyond what is computed


class Options(Section):
    """Flags of this command."""

    datasets: list[Literal["all", "coco", "clotho", "audiocaps", "voxceleb", "glove"]] = setting(
        [], "which sets to fetch, or all"
    )
    data_root: str = setting("./data", "folder that receives one folder for each set")
    skip_existing: bool = setting(False, "leave sets alone whose marker is there and whose file counts still match")
    dry_run: bool = setting(False, "say what would be fetched, and stop")
    keep_archives: bool = setting(False, "keep downloaded archives after unpacking")
    extract: bool = setting(True, "unpack archives; --no-extract only fetches and verifies them")
    splits: list[Literal["train", "val", "test", "test2017", "karpathy"]] = setting(
        ["train", "val", "test"], "parts to fetch; test2017 and karpathy belong to coco"
    )
    max_retries: int = setting(5, "failures in a row, without a new byte, before a file is given up", ge=0)
    timeout: float = setting(60.0, "seconds without an answer before a connection is given up", gt=0)
    first_wait: float = setting(1.0, "seconds before the first retry; doubles with each", ge=0)
    base_url: list[str] = setting([], "NAME=URL: fetch a set from a mirror")
    audiocaps_version: Literal["1.0", "2.0"] = setting("1.0", "release of the AudioCaps captions")
    yes: bool = setting(False, "do not ask before a download of more than 1 GB")


@dataclass
class State:
    """What became of one set."""

    name: str
    state: str
    files: int = 0
    bytes: int = 0
    code: int = 0


@command
def main(argv: list[str] | None = None) -> None:
    """Fetch each set in turn; one failure does not keep the others back."""
    options = load_config(Options, argv=argv, description=__doc__)
    if not options.datasets:
        raise UserError(f"--datasets is needed: some of {', '.join(SETS)}, or all")
    names = list(SETS) if "all" in options.datasets else list(dict.fromkeys(options.datasets))
    sets = [AUDIOCAPS_2 if name == "audiocaps" and options.audiocaps_version == "2.0" else SETS[name] for name in names]
    for found in sets:
        if found.files and not wanted(found, options):
            parts = ", ".join(dict.fromkeys(file.split for file in found.files))
            raise UserError(
                f"--splits {' '.join(options.splits)}: {found.name} has {parts}; name one of them, or leave it out"
            )
    bases = read_bases(options.base_url)
    root = check_output(options.data_root, flag="--data-root", folder=True)
    todo = [found for found in sets if not (options.skip_existing and is_complete(root / found.name, found, options))]
    needed = sum(bytes_needed(found, root / found.name, options) for found in todo)
    if options.dry_run:
        for found in todo:
            for file in wanted(found, options):
                print(f"{found.name}: {address(found, file, bases)} -> {root / found.name / file.name}")
        print(f"{needed / 1e9:.1f} GB of disk space in all, archives and unpacked files together")
        return
    check_disk(root, needed)
    ask(needed, options)
    states = []
    for found in sets:
        if found not in todo:
            states.append(State(found.name, "was complete", *measure(root / found.name)))
        else:
            states.append(handle(found, root / found.name, options, bases))
    print_table(states)
    codes = {state.code for state in states}
    if FAILED in codes:
        print(
            "the same command goes on where it stopped; training that needs no download: "
            "python multimodal/train.py --config small",
            file=sys.stderr,
        )
    if codes != {0}:
        raise SystemExit(FAILED if FAILED in codes else MANUAL)


def handle(found: RemoteSet, folder: Path, options: Options, bases: dict[str, str]) -> State:
    """Fetch, verify and unpack one set."""
    try:
        with alone(folder):
            for file in wanted(found, options):
                entry, archive = take(found, file, folder, options, bases)
                if entry["paths"]:
                    # Marked file by file, and before its archive goes: what fails or is killed later leaves this done.
                    write_marker(folder, {file.name: entry})
                if archive is not None:
                    archive.unlink()
            manual, lacking = take_manual(found, folder, options)
            if found.name == "audiocaps":
                say_missing_clips(folder, options)
    except (DownloadError, ArchiveError, UserError) as error:
        way = "; delete it and run the same command again" if isinstance(error, UserError) else ""  # a table
        print(f"{found.name}: {error}{way}", file=sys.stderr)
        return State(found.name, "failed", *measure(folder), code=FAILED)
    except OSError as error:
        print(
            f"{found.name}: {error.filename or folder}: {error.strerror}; what was fetched is kept, run the same "
            "command again",
            file=sys.stderr,
        )
        return State(found.name, "failed", *measure(folder), code=FAILED)
    if not manual or lacking:
        print(
            "\n".join(
                [
                    *(found.steps if not manual else ()),
                    *lacking,
                    f"Its folder is {folder.resolve()}, which holds {', '.join(visible_names(folder)) or 'nothing'}.",
                ]
            )
        )
        return State(found.name, "manual steps left", *measure(folder), code=MANUAL)
    return State(found.name, "complete" if options.extract else "fetched", *measure(folder))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder of a set, for this process alone: two that fetch one file would write into the same part."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)  # the folder itself is locked, so that no file stays behind
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(
                f"{folder}: another download_datasets.py is at work there; wait for its end, or give another "
                "--data-root"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(opened)


def take(
    found: RemoteSet, file: RemoteFile, folder: Path, options: Options, bases: dict[str, str]
) -> tuple[dict[str, Any], Path | None]:
    """One file: fetched unless it is there and right, unpacked unless its content is there. Returns its entry in the
    marker, and the archive that is not needed any more.
    """
    previous = read_marker(folder).get(file.name)
    if file.unpacked and previous and _still_there(folder, previous):
        return previous, None
    target, own = folder / file.name, True
    if target.exists() and is_right(target, file):
        own = False  # it was here before: not ours to delete
    else:
        if target.exists():
            raise DownloadError(
                f"{target} is there, but is not the published file (its checksum or size differs); move it away"
            )
        target = folder / ".downloads" / file.name if file.unpacked else target
        if not (target.exists() and is_right(target, file)):
            fetch(
                address(found, file, bases),
                target,
                checksum=file.checksum,
                size=file.size,
                policy=Policy(options.max_retries, options.timeout, options.first_wait),
                progress=progress_of(f"{found.name}/{file.name}"),
            )
    entry: dict[str, Any] = {
        "bytes": target.stat().st_size,
        "checksum": list(file.checksum) if file.checksum else None,
        "paths": {},
    }
    if not file.unpacked:
        return {**entry, "paths": {file.name: 1}}, None
    if not options.extract:
        return entry, None
    entry["paths"] = unpack(target, folder, expected_bytes=file.unpacked)
    return entry, target if own and not options.keep_archives else None


def take_manual(found: RemoteSet, folder: Path, options: Options) -> tuple[bool, list[str]]:
    """Whether any of the part that the user fetches is there, and sentences on archives of which some parts are
    missing. Each archive that lies in the folder is checked, joined and unpacked, unless the marker says that this was
    done and its files are still there.
    """
    if not found.steps:
        return True, []
    lacking = []
    for file in found.manual:
        done = read_marker(folder).get(file.name)
        if not options.extract or (done and _still_there(folder, done)):
            continue
        before = (folder / file.name).exists()
        archive = joined(file, folder)
        if archive is None and (sentence := missing_parts(file, folder)):
            lacking.append(sentence)
        if archive is not None:
            paths = unpack(archive, folder, expected_bytes=2 * archive.stat().st_size)
            write_marker(folder, {file.name: {"bytes": archive.stat().st_size, "paths": paths}})
            if not before and not options.keep_archives:
                archive.unlink()  # made of its parts by this command; the parts stay
    return has_layout(found, folder), lacking


def missing_parts(file: ManualFile, folder: Path) -> str:
    """Which parts of an archive are not there, where others are; empty where all or none are."""
    absent = [name for name, _ in file.parts if not (folder / name).exists()]
    if (folder / file.name).exists() or len(absent) in (0, len(file.parts)):
        return ""
    return (
        f"{file.name}: of its {len(file.parts)} parts {', '.join(absent)} is missing; lay all of them into the folder"
    )


def has_layout(found: RemoteSet, folder: Path) -> bool:
    """Whether anything of the part that the user fetches is there."""
    return any(True for pattern in found.layout for _ in folder.glob(pattern))


def say_missing_clips(folder: Path, options: Options) -> None:
    """How many of AudioCaps' clips are there, and a list of the others: missing_SPLIT.csv next to the tables."""
    from multimodal.data.sets import missing_clips

    for split in ("train", "val", "test"):
        if split in options.splits and (folder / f"{split}.csv").exists():
            clips, listed = missing_clips(folder, split)
            print(f"audiocaps {split}: {listed - len(clips)} of {listed} clips are there", end="")
            path = folder / f"missing_{split}.csv"
            print(f"; the others are listed in {path}" if clips else "")
            if clips:
                write_text(path, "youtube_id,start_time\n" + "".join(f"{key},{start}\n" for key, start in clips))
            else:
                path.unlink(missing_ok=True)


def joined(file: ManualFile, folder: Path) -> Path | None:
    """The archive, checked; made from its parts where these are there. None when something is missing."""
    archive = folder / file.name
    if not archive.exists():
        parts = [folder / name for name, _ in file.parts]
        if not parts or not all(part.exists() for part in parts):
            return None
        for part, (name, md5) in zip(parts, file.parts, strict=True):
            if (seen := digest(part, "md5")) != md5:
                raise DownloadError(f"{folder / name}: md5 is {seen}, expected {md5}; fetch this part again")
        with written_aside(archive) as temporary, open(temporary, "wb") as target:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, target, 1 << 22)
    if file.md5 and (seen := digest(archive, "md5")) != file.md5:
        raise DownloadError(f"{archive}: md5 is {seen}, expected {file.md5}; fetch it again")
    return archive


# --- what is there ----------------------------------------------------------------------------------------------------


def wanted(found: RemoteSet, options: Options) -> list[RemoteFile]:
    """The files of the chosen splits."""
    return [file for file in found.files if file.split in ("always", *options.splits)]


def visible_names(folder: Path) -> list[str]:
    """What a folder holds, hidden names left out."""
    return sorted(path.name for path in folder.iterdir() if not is_junk(path))


def is_right(path: Path, file: RemoteFile) -> bool:
    """Whether a file is the published one, as far as that can be told."""
    if file.size is not None and path.stat().st_size != file.size:
        return False
    if file.other is not None and path.is_file() and digest(path, "sha256") == file.other:
        return False
    return file.checksum is None or digest(path, file.checksum[0]) == file.checksum[1]


def read_marker(folder: Path) -> dict[str, dict]:
    """Entries of the marker by file name; empty where there is none. What is damaged in it counts as not done."""
    try:
        entries = json.loads((folder / MARKER).read_text())["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: entry for name, entry in entries if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    paths = entry.get("paths") if isinstance(entry, dict) else None
    return isinstance(paths, dict) and all(isinstance(count, int) for count in paths.values())


def write_marker(folder: Path, record: dict[str, dict]) -> None:
    """Say what is complete, with file counts."""
    entries = {**read_marker(folder), **record}
    tree = {"files": entries, "date": datetime.datetime.now(datetime.UTC).isoformat()}
    write_text(folder / MARKER, json.dumps(tree, indent=1))


def is_complete(folder: Path, found: RemoteSet, options: Options) -> bool:
    """Whether every wanted file is in the marker and its content still there."""
    entries = read_marker(folder)
    manual = not found.steps or has_layout(found, folder)
    waiting = [file for file in found.manual if is_waiting(file, folder, entries)]
    return (
        manual
        and not waiting
        and all(file.name in entries and _still_there(folder, entries[file.name]) for file in wanted(found, options))
    )


def is_waiting(file: ManualFile, folder: Path, entries: dict[str, dict]) -> bool:
    """Whether an archive that the user laid there, or some of its parts, is still to be unpacked."""
    here = (folder / file.name).exists() or any((folder / name).exists() for name, _ in file.parts)
    return bool(here) and not (file.name in entries and _still_there(folder, entries[file.name]))


def _still_there(folder: Path, entry: dict) -> bool:
    paths = entry.get("paths", {})
    return bool(paths) and all(
        (folder / name).exists() and count_files(folder / name) >= count for name, count in paths.items()
    )


def measure(folder: Path) -> tuple[int, int]:
    """Files and bytes below a folder, markers and unfinished downloads left out."""
    sizes = [
        os.path.getsize(os.path.join(root, name))
        for root, folders, names in os.walk(folder)
        if ".downloads" not in root
        for name in names
        if not name.startswith(MARKER)
    ]
    return len(sizes), sum(sizes)


def bytes_needed(found: RemoteSet, folder: Path, options: Options) -> int:
    """What is still to be fetched and unpacked."""
    total, entries = 0, read_marker(folder)
    for file in wanted(found, options):
        if file.name in entries and _still_there(folder, entries[file.name]):
            continue
        part = folder / ".downloads" / f"{file.name}.part"
        here = next(
            (
                path.stat().st_size
                for path in (folder / file.name, folder / ".downloads" / file.name, part)
                if path.exists()
            ),
            0,
        )
        total += max(0, (file.size or file.estimate) - here) + (file.unpacked if options.extract else 0)
    for manual in found.manual if options.extract else ():
        if is_waiting(manual, folder, entries) and not missing_parts(manual, folder):
            whole = folder / manual.name
            parts = sum((folder / name).stat().st_size for name, _ in manual.parts if (folder / name).exists())
            # Joined from its parts first, then unpacked: sound does not shrink much in an archive.
            total += 2 * whole.stat().st_size if whole.exists() else 3 * parts
    return total


def check_disk(root: Path, needed: int) -> None:
    """Stop before the first byte when the disk is too small."""
    place = next(path for path in (root, *root.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed * SPARE > free:
        print(
            f"{root}: {needed * SPARE / 1e9:.1f} GB are needed (archives, unpacked files and 5 % to spare), "
            f"{free / 1e9:.1f} GB are "
            "free; free some space or choose another --data-root",
            file=sys.stderr,
        )
        raise SystemExit(FAILED)


# --- talking ----------------------------------------------------------------------------------------------------------


def read_bases(values: list[str]) -> dict[str, str]:
    """Mirrors by set name."""
    bases = {}
    for value in values:
        name, separator, url = value.partition("=")
        if not separator or name not in SETS or not is_address(url):
            raise UserError(
                f"--base-url {value}: expected NAME=URL, NAME one of {', '.join(SETS)}, URL with http:// or https://, "
                "a host and a folder, to which the names of the files are added"
            )
        parts = urllib.parse.urlsplit(url)
        # Blanks and letters beyond ASCII in a folder's name are written as %20 and the like, as browsers do.
        path = urllib.parse.quote(parts.path.rstrip("/") + "/", safe="%/:=&~+!$,;'@()*")
        bases[name] = urllib.parse.urlunsplit(parts._replace(path=path))
    return bases


def is_address(url: str) -> bool:
    """Whether a folder on a server can be meant: no query, and a port that is one."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.port is None or 0 < parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    return (
        usable
        and parts.scheme in ("http", "https")
        and bool(host.strip())
        and " " not in parts.netloc
        and not (parts.query or parts.fragment)
    )


def address(found: RemoteSet, file: RemoteFile, bases: dict[str, str]) -> str:
    """Where a file is fetched from."""
    return (bases.get(found.name) or file.base or found.base) + file.path + file.query


def progress_of(title: str):
    """A bar on a terminal, a line at every 5 % elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(desc=title, unit="B", unit_scale=True)

        def draw(have: int, total: int | None) -> None:
            bar.total = total
            bar.update(have - bar.n)
            if have == total:
                bar.close()

        return draw
    said = [-1]

    def say(have: int, total: int | None) -> None:
        share = 20 * have // total if total else have >> 27
        if share > said[0]:
            said[0] = share
            print(
                f"{title}: {have / 1e6:.1f} MB{f' of {total / 1e6:.1f} MB, {5 * share} %' if total else ''}",
                file=sys.stderr,
                flush=True,
            )

    return say


def ask(needed: int, options: Options) -> None:
    """On a terminal, ask before something large."""
    if options.yes or needed < 10**9 or not sys.stdin.isatty():
        return
    if input(
        f"{needed / 1e9:.1f} GB of disk space will be used below {options.data_root}. Go on? [y/N] "
    ).strip().lower() not in ("y", "yes"):
        raise UserError("stopped as asked; nothing was fetched")


def print_table(states: list[State]) -> None:
    """The result of each set."""
    print(f"{'data set':<12}{'state':<20}{'files':>9}{'GB':>10}")
    for state in states:
        print(f"{state.name:<12}{state.state:<20}{state.files:>9}{state.bytes / 1e9:>10.3f}")


if __name__ == "__main__":
    main()
