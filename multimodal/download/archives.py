"""Unpacking zip, tar and 7z archives that nobody has to trust: nothing lands outside, nothing is overwritten."""

import errno
import importlib.util
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from shared.errors import own_folder, remove_parts
from shared.media.shards import check_end

BLOCK = 1 << 20
LOCKED = "or of another source than the published one: it needs a password"
MAX_GROWTH = 3  # an archive may unpack to so many times its expected size
# What the system says of a member's name (too long, file and folder at once), or of bytes that do not decompress (None)
_OF_THE_ARCHIVE = (None, errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.EILSEQ)


class ArchiveError(Exception):
    """An archive that is damaged, dangerous or too large."""


def unpack(archive: Path, folder: Path, *, expected_bytes: int) -> dict[str, int]:
    """Unpack into `folder`; returns the number of files under each top entry.

    Everything is unpacked into a hidden folder of this process first and renamed into place, so an interrupted run
    leaves nothing half-done, and another that unpacks at the same time keeps its own.
    Raises ArchiveError for absolute paths, `..`, drive letters, links, devices, more than three times expected_bytes,
    passwords, and an archive without any file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    with own_folder(folder, archive.name) as own:
        aside = own / "content"
        aside.mkdir()
        try:
            limit = MAX_GROWTH * expected_bytes
            if _kind(archive) == "7z":
                _unpack_7z(archive, aside, limit)
            else:
                for name, size, stream in _members(archive):
                    limit = _write_member(archive, aside, name, size, stream, limit)
            _refuse_links(archive, aside)
            counts = {top.name: count for top in sorted(aside.iterdir()) if (count := count_files(top))}
            if not counts:
                raise damaged(archive, "it holds no file")
            for name in counts:
                _move_into(aside / name, folder / name)
            return counts
        except ArchiveError:
            raise
        except Exception as error:  # decompressors have errors of their own for damaged bytes, the system for names
            if isinstance(error, OSError) and error.errno not in _OF_THE_ARCHIVE:
                raise
            raise damaged(archive, getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def damaged(archive: Path, reason: str) -> ArchiveError:
    """What to say of an archive that cannot be read; of a decoder's many lines the first says enough."""
    first = next(iter(reason.strip().splitlines()), "no reason given")
    return ArchiveError(f"{archive}: damaged ({first[:200]}); delete it and run the same command again")


def _kind(archive: Path) -> str:
    """zip, 7z or tar, by the content, since mirrors rename files; ArchiveError that says what else it is."""
    with open(archive, "rb") as file:
        head = file.read(512)
    if head.startswith(b"7z\xbc\xaf\x27\x1c"):
        return "7z"
    if zipfile.is_zipfile(archive):
        return "zip"
    if tarfile.is_tarfile(archive):
        return "tar"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = next((what for start, what in _OTHERS.items() if text.startswith(start.lower())), None)
    if found is None and text.startswith(b"pk\3\4"):
        raise damaged(archive, "a zip archive without its end")
    raise damaged(archive, f"it is {found}" if found else "neither a zip nor a tar nor a 7z archive")


_OTHERS = {  # first bytes of what is no archive that can be unpacked here
    b"<!doctype": "a web page, such as a server shows instead of a file",
    b"<html": "a web page, such as a server shows instead of a file",
    b"<?xml": "an XML text, such as a server sends instead of a file",
    b"Rar!": "a RAR archive; unpack it by hand",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; unpack it by hand",
}


def count_files(path: Path) -> int:
    """Files at or below a path."""
    return 1 if path.is_file() else sum(len(files) for _, _, files in os.walk(path))


def safe_name(archive: Path, name: str) -> PurePosixPath:
    """A member's relative path; ArchiveError when it could leave the folder."""
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    if (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or windows.drive
        or windows.root
        or "\\" in name
        or "\0" in name
    ):
        raise ArchiveError(f"{archive}: member {name!r} points outside the folder; nothing was unpacked")
    return path


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(name, size, stream) of every file; all names are checked before the first is unpacked."""
    if _kind(archive) == "zip":
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                info.filename = info.filename.replace("\\", "/")  # as some programs of Windows write them
                safe_name(archive, info.filename)
                if info.flag_bits & 1:
                    raise damaged(archive, LOCKED)
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise ArchiveError(
                        f"{archive}: member {info.filename!r} is a link or a device; nothing was unpacked"
                    )
            for info in opened.infolist():
                if not info.is_dir():
                    with opened.open(info) as stream:
                        yield info.filename, info.file_size, stream
        return
    with tarfile.open(archive) as opened:
        for member in opened:
            safe_name(archive, member.name)
            if member.size < 0:
                raise damaged(archive, f"member {member.name!r} has a size below 0")
            if not (member.isfile() or member.isdir()):
                raise ArchiveError(f"{archive}: member {member.name!r} is a link or a device; nothing was unpacked")
        for member in opened:
            if member.isfile():
                content = opened.extractfile(member)
                assert content is not None, "a file has content"
                yield member.name, member.size, content
        check_end(opened)
        while opened.fileobj is not None and opened.fileobj.read(BLOCK):  # its checksum stands at the end
            pass


def _write_member(archive: Path, aside: Path, name: str, size: int, stream: IO[bytes], limit: int) -> int:
    """Write one file and return what is left of the limit; counted is what really comes."""
    if size > limit:
        raise ArchiveError(
            f"{archive}: unpacks to more than {MAX_GROWTH} times its expected size; nothing was unpacked"
        )
    target = aside / safe_name(archive, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        while block := stream.read(BLOCK):
            limit -= len(block)
            if limit < 0:
                raise ArchiveError(
                    f"{archive}: unpacks to more than {MAX_GROWTH} times its expected size; nothing was unpacked"
                )
            file.write(block)
    return limit


def _unpack_7z(archive: Path, aside: Path, limit: int) -> None:
    program = next((found for name in ("7z", "7zz", "7za") if (found := shutil.which(name))), None)
    if importlib.util.find_spec("py7zr"):
        import py7zr

        with py7zr.SevenZipFile(archive) as opened:
            if opened.needs_password():
                raise damaged(archive, LOCKED)
            listed = opened.list()
            for entry in listed:
                safe_name(archive, entry.filename)
            _check_total(archive, sum(entry.uncompressed or 0 for entry in listed), limit)
            opened.extractall(aside)
    elif program:
        no_input = subprocess.DEVNULL  # it would ask for a password, unseen
        listing = subprocess.run(
            [program, "l", "-slt", "-ba", str(archive)], stdin=no_input, capture_output=True, text=True
        )
        if listing.returncode:
            raise damaged(archive, listing.stderr[:200])
        fields = [line.split(" = ", 1) for line in listing.stdout.splitlines() if " = " in line]
        for key, value in fields:
            if key == "Path":
                safe_name(archive, value)
        _check_total(archive, sum(int(value) for key, value in fields if key == "Size" and value.isdigit()), limit)
        done = subprocess.run(
            [program, "x", "-y", f"-o{aside}", str(archive)], stdin=no_input, capture_output=True, text=True
        )
        if done.returncode:
            raise ArchiveError(f"{archive}: cannot be unpacked ({done.stderr.strip()[:200]})")
    else:
        raise ArchiveError(f"{archive}: 7z archives need the package py7zr (pip install py7zr) or the program 7z")


def _check_total(archive: Path, total: int, limit: int) -> None:
    if total > limit:
        raise ArchiveError(
            f"{archive}: unpacks to {total:,} bytes, more than {MAX_GROWTH} times its expected size; nothing was "
            "unpacked"
        )


def _refuse_links(archive: Path, folder: Path) -> None:
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(root, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ArchiveError(f"{archive}: member {name!r} is a link or a device; nothing was unpacked")


def _move_into(source: Path, target: Path) -> None:
    """Rename into place. A folder that is there is filled up; a file that is there and differs is kept, renamed."""
    if not os.path.lexists(target):  # a link that leads nowhere is somebody's too
        os.rename(source, target)
    elif source.is_dir() and target.is_dir() and not target.is_symlink():
        for child in sorted(source.iterdir()):
            _move_into(child, target / child.name)
    elif source.is_file() and target.is_file() and source.stat().st_size == target.stat().st_size:
        source.unlink()
    else:
        number = 1
        while os.path.lexists(kept := target.with_name(f"{target.name}.kept-{number}")):
            number += 1
        os.rename(target, kept)
        os.rename(source, target)
