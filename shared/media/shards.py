"""Random access to webdataset tar files, so that sharded data keeps the exact order and resume of any other data."""

import hashlib
import io
import mmap
import os
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from shared.errors import BadSample, UserError, written_aside

LISTED = 4096  # samples whose names are in memory at a time
_ADLER = 65521  # the modulus of zlib.adler32
_PLAIN_EXTRAS = re.compile(rb"(?:\d+ (?:[acm]time|[gu]id|[gu]name)=[^\n]*\n)+")  # of a pax header: no name, no size


class Shards:
    """Samples of tar files: members that share a path up to the first dot of the name make one sample.

    The headers are read once; the index lies next to the shards (or in `cache_dir`) as a memory-mapped array, so that a
    million samples open at once with flat memory. shards[i] -> {"__key__": str, "jpg": bytes, "txt": bytes, ...}.
    """

    def __init__(self, paths: list[Path], cache_dir: Path | None = None):
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise UserError("no .tar shard was given; check the path or the pattern")
        self._indices = [_open_index(path, cache_dir) for path in self.paths]
        self._ends = np.cumsum([len(starts) - 1 for starts, _ in self._indices])
        if not self._ends[-1]:  # one of many may be empty: img2dataset writes such where no download succeeded
            raise UserError(f"{self.paths[0]}: the shard holds no files")
        self._files: dict[tuple[int, int], io.FileIO] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        return self.read(index, None)

    def read(self, index: int, extensions: Collection[str] | None) -> dict:
        """The sample with only these members, None: with all; the others' bytes are not touched."""
        shard, members = self._members(index)
        sample: dict = {}
        for offset, size, name in members:
            key, extension = split_name(name.decode())
            sample["__key__"] = key
            if extensions is None or extension in extensions:
                sample[extension] = self._read(shard, offset, size)
        return sample

    def path_of(self, index: int) -> Path:
        """The shard that holds a sample."""
        return self.paths[self._members(index)[0]]

    def names(self, index: int) -> tuple[str, list[str]]:
        """The sample's key and the extensions of its members, from the index alone."""
        names = [split_name(name.decode()) for _, _, name in self._members(index)[1]]
        return names[0][0], [extension for _, extension in names]

    def listing(self) -> Iterator[tuple[str, list[str]]]:
        """names(i) of every sample in turn, a few thousand at a time."""
        for starts, members in self._indices:
            for first in range(0, len(starts) - 1, LISTED):
                bounds = starts[first : first + LISTED + 1].tolist()
                names = [split_name(name.decode()) for name in members["name"][bounds[0] : bounds[-1]].tolist()]
                for begin, end in pairwise(bounds):
                    own = names[begin - bounds[0] : end - bounds[0]]
                    yield own[0][0], [extension for _, extension in own]

    def _members(self, index: int) -> tuple[int, list[tuple[int, int, bytes]]]:
        """The shard of a sample and (offset, size, name) of its members."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[shard - 1]) if shard else 0)
        starts, members = self._indices[shard]
        return shard, members[int(starts[local]) : int(starts[local + 1])].tolist()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # each process opens its own files

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; threads may read at the same time, so nothing moves a shared position."""
        key = (os.getpid(), shard)
        file = self._files.get(key)
        if file is None:
            if len(self._files) >= 64:
                self._files.pop(list(self._files)[0], None)  # closed once no thread reads from it
            file = self._files[key] = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115  (kept between samples)
        data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            length = os.fstat(file.fileno()).st_size
            raise BadSample(f"{self.paths[shard]}: ends at byte {length}, {offset + size} wanted; copy the shard again")
        return data


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file name; the rest, in lower case, is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _open_index(path: Path, cache_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """(starts, members): members (M,) of (offset, size, name); sample i owns members starts[i]:starts[i+1]."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such shard; check the path or the pattern") from None
    mark = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(cache_dir) if cache_dir is not None else path.parent
    cached = folder / f".{path.name}.{mark}.index.npz"
    names = [cached.with_suffix(f".{part}.npy") for part in ("starts", "members")]
    index = _load_index(*names)
    if index is None:
        arrays = _read_headers(path)
        try:
            for name, array in zip(names, arrays, strict=True):
                with written_aside(name) as temporary, open(temporary, "wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError:
            return arrays  # a read-only data folder: index again next time
        index = _load_index(*names)
        return arrays if index is None else index
    return index


def _load_index(starts_file: Path, members_file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The stored index, memory-mapped; None where there is none or it is damaged: it is made from the shard again."""
    try:
        starts, members = (np.load(file, mmap_mode="r") for file in (starts_file, members_file))
        names = members.dtype.names
        sound = starts.dtype == np.int64 and starts.ndim == members.ndim == 1 and names == ("offset", "size", "name")
        sound = sound and len(starts) > 0 and starts[0] == 0 and starts[-1] == len(members)
        sound = sound and bool((np.diff(starts) > 0).all()) and bool((members["size"] >= 0).all())
        return (starts, members) if sound else None
    except (OSError, ValueError, EOFError):
        return None


def _read_headers(path: Path) -> tuple[np.ndarray, np.ndarray]:
    members: list[tuple[int, int, bytes]] = []
    starts: list[int] = []
    last = None
    if packed := _compression(path):
        raise UserError(f"{path}: packed by {packed}, so that no sample can be found in it; unpack it with {packed} -d")
    if path.stat().st_size % tarfile.BLOCKSIZE:  # tarfile takes a header cut short for the end
        raise UserError(f"{path}: cut short, its size is no multiple of 512 bytes; copy or make the shard again")
    files = _plain_files(path)
    for offset, size, name in _files(path) if files is None else files:
        if name.rpartition("/")[2].startswith("."):
            continue
        key = split_name(name)[0]
        if key != last:
            starts.append(len(members))
            last = key
        members.append((offset, size, name.encode(errors="backslashreplace")))  # some are Latin-1
    if not members and path.stat().st_size > tarfile.RECORDSIZE:  # what tar writes for no file is not longer
        raise UserError(f"{path}: the shard holds no files in its {path.stat().st_size:,} bytes; copy or make it again")
    width = max((len(name) for _, _, name in members), default=1)
    return (
        np.array([*starts, len(members)], dtype=np.int64),
        np.array(members, dtype=[("offset", np.int64), ("size", np.int64), ("name", f"S{width}")]),
    )


def _compression(path: Path) -> str | None:
    """The program that packed a file, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(6)
    known = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((program for start, program in known.items() if head.startswith(start)), None)


def _plain_files(path: Path) -> list[tuple[int, int, str]] | None:
    """(offset, size, name) of the files, at a tenth of tarfile's time; None for a shard in which anything is special:
    a long name, a link, another format, damage.
    """
    if not path.stat().st_size:
        return None
    found, place = [], 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (header := data[place : place + tarfile.BLOCKSIZE]).strip(b"\0"):
            kind, offset = header[156:157], place + tarfile.BLOCKSIZE
            try:
                name, size = header[:100].rstrip(b"\0").decode(), int(header[124:136].rstrip(b"\0 "), 8)
                total = int(header[148:156].rstrip(b"\0 "), 8)
            except ValueError:
                return None
            place = offset + size + -size % tarfile.BLOCKSIZE
            is_sound = _sum_of_bytes(header[:148] + b" " * 8 + header[156:]) == total % _ADLER
            if not is_sound or header[257:262] != b"ustar" or header[345] or place > len(data):
                return None
            if kind == tarfile.REGTYPE:
                found.append((offset, size, name))
            elif kind != tarfile.DIRTYPE and not (
                kind == tarfile.XHDTYPE and _PLAIN_EXTRAS.fullmatch(data[offset : offset + size])
            ):
                return None
        if any(data[start : start + (1 << 20)].strip(b"\0") for start in range(place, len(data), 1 << 20)):
            return None  # it goes on after its end
    return found


def _sum_of_bytes(header: bytes) -> int:
    """Modulo _ADLER: zlib's checksum holds it, one too large, at a twentieth of the time of sum()."""
    return (zlib.adler32(header) % 2**16 - 1) % _ADLER


def check_end(archive: tarfile.TarFile) -> None:
    """After the last member of an open archive: tarfile.ReadError where the archive goes on. tarfile ends without a
    word at a header that it cannot read, and at the end of the first of two archives that were joined by `cat`, as if
    the members behind were not there.
    """
    assert archive.fileobj is not None, "it is open"
    archive.fileobj.seek(archive.offset)
    if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"at byte {archive.offset:,} stands neither a member nor the end")
    while block := archive.fileobj.read(1 << 20):
        if any(block):
            raise tarfile.ReadError(
                f"it goes on after its end at byte {archive.offset:,}, as if two were joined by cat"
            )


def _files(path: Path) -> Iterator[tuple[int, int, str]]:
    """The same by tarfile."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.issparse() or member.size < 0:
                    raise tarfile.ReadError(f"{member.name} is stored with holes, as tar -S does, or has no size")
                if member.isfile():
                    yield member.offset_data, member.size, member.name
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            check_end(archive)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a readable tar file ({error}); copy or make the shard again") from None
