"""Downloads survive a bad server, archives cannot reach outside their folder, and nothing of the user's is lost."""

import errno
import hashlib
import io
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from multimodal import download_datasets
from multimodal.download import archives
from multimodal.download import fetch as fetching
from multimodal.download.archives import ArchiveError, unpack
from multimodal.download.catalogue import AUDIOCAPS, AUDIOCAPS_2, SETS, ManualFile, RemoteFile, RemoteSet
from multimodal.download.fetch import DownloadError, Policy, fetch
from tests.multimodal.server import Site, serving

QUICK = Policy(max_retries=3, timeout=5, first_wait=0.0)


def content(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def sha(data: bytes) -> tuple[str, str]:
    return "sha256", hashlib.sha256(data).hexdigest()


@pytest.fixture
def site():
    with serving() as running:
        yield running


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("etag", ['"strong"', 'W/"weak"', None])
def test_a_connection_cut_every_64_kb_is_survived(site: Site, tmp_path: Path, etag: str | None):
    site.files["a"], site.cut, site.etag = content(1_000_000), 65536, etag
    fetch(site.url + "a", tmp_path / "a", checksum=sha(site.files["a"]), policy=QUICK)
    assert (tmp_path / "a").read_bytes() == site.files["a"]
    assert len(site.requests) == 16 and site.requests[1][1] == "bytes=65536-"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_connection_reset_every_70_kb_makes_progress(site: Site, tmp_path: Path):
    site.files["a"], site.cut, site.reset = content(300_000), 70_000, True
    fetch(
        site.url + "a", tmp_path / "a", checksum=sha(site.files["a"]), policy=QUICK, progress=lambda have, total: None
    )
    assert (tmp_path / "a").read_bytes() == site.files["a"] and len(site.requests) == 5


def test_a_part_of_an_earlier_run_is_continued(site: Site, tmp_path: Path):
    data = site.files["a"] = content(50_000)
    (tmp_path / "a.part").write_bytes(data[:20_000])
    fetch(site.url + "a", tmp_path / "a", checksum=sha(data), policy=QUICK)
    assert site.requests == [("a", "bytes=20000-")] and (tmp_path / "a").read_bytes() == data


def test_a_file_that_changed_meanwhile_starts_over(site: Site, tmp_path: Path):
    site.files["a"], site.cut = content(200_000), 65536
    (tmp_path / "a.part").write_bytes(content(100_000, 1))
    (tmp_path / "a.part.json").write_text('{"validator": "\\"other\\"", "total": 200000}')
    fetch(site.url + "a", tmp_path / "a", checksum=sha(site.files["a"]), policy=QUICK)
    assert (tmp_path / "a").read_bytes() == site.files["a"]


def test_a_server_that_ignores_ranges_gets_a_restart(site: Site, tmp_path: Path):
    data = site.files["a"] = content(50_000)
    site.ranges = False
    (tmp_path / "a.part").write_bytes(b"x" * 20_000)
    fetch(site.url + "a", tmp_path / "a", checksum=sha(data), policy=QUICK)
    assert (tmp_path / "a").read_bytes() == data


def test_cut_connections_without_ranges_end_in_a_failure_that_keeps_nothing_wrong(site: Site, tmp_path: Path):
    site.files["a"], site.cut, site.ranges = content(200_000), 65536, False
    with pytest.raises(DownloadError, match="without progress"):
        fetch(site.url + "a", tmp_path / "a", policy=QUICK)
    assert not (tmp_path / "a").exists()


def test_a_complete_part_is_accepted_by_416(site: Site, tmp_path: Path):
    data = site.files["a"] = content(30_000)
    (tmp_path / "a.part").write_bytes(data)
    fetch(site.url + "a", tmp_path / "a", checksum=sha(data), policy=QUICK)
    assert (tmp_path / "a").read_bytes() == data
    (tmp_path / "b.part").write_bytes(data + b"more")
    fetch(site.url + "a", tmp_path / "b", checksum=sha(data), policy=QUICK)
    assert (tmp_path / "b").read_bytes() == data


def test_a_wrong_checksum_is_tried_once_more_and_then_named(site: Site, tmp_path: Path):
    site.files["a"] = content(1000)
    with pytest.raises(DownloadError, match=f"{sha(site.files['a'])[1]}.*expected {'0' * 64}"):
        fetch(site.url + "a", tmp_path / "a", checksum=("sha256", "0" * 64), policy=QUICK)
    assert len(site.requests) == 2 and not list(tmp_path.iterdir())


def test_a_missing_file_is_not_tried_again(site: Site, tmp_path: Path):
    with pytest.raises(DownloadError, match="404"):
        fetch(site.url + "nothing", tmp_path / "a", policy=QUICK)
    assert len(site.requests) == 1


def test_a_busy_server_is_waited_for(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    waits: list[float] = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    site.files["a"] = content(1000)
    site.answers = [(429, {"Retry-After": "7"}), (503, {}), (500, {})]
    fetch(site.url + "a", tmp_path / "a", policy=Policy(5, 5, 1.0))
    assert waits == [7, 2, 4] and (tmp_path / "a").exists()
    assert "429" in (said := capsys.readouterr().err) and "trying again in 7 s" in said
    site.answers = [(503, {})] * 9
    with pytest.raises(DownloadError, match="503"):
        fetch(site.url + "a", tmp_path / "b", policy=Policy(2, 5, 1.0))


OK, GONE = "HTTP/1.1 200 OK\r\n", "HTTP/1.1 302 Found\r\n"


@pytest.mark.parametrize(
    "answer,right",
    [
        (OK + "Content-Length: abc\r\n\r\nDATA", True),
        (OK + "Content-Length: -5\r\n\r\nDATA", True),
        (OK + "Content-Length: \xb2\r\n\r\nDATA", True),
        ("HTTP/1.1 503 Busy\r\nRetry-After: \xb2\r\n\r\n", True),
        ("HTTP/1.1 503 Busy\r\nRetry-After: soon\r\n\r\n", True),
        (GONE + "Location: http://[::1/x\r\n\r\n", True),
        (GONE + "Location: file:///etc/hostname\r\n\r\n", False),
        ("\0\1\2", True),
        (OK + "Content-Encoding: gzip\r\n\r\nDATA", False),
        (OK + "Content-Length: 0\r\n\r\n", True),
        (OK + "Transfer-Encoding: chunked\r\n\r\nzz\r\nab", True),
    ],
)
def test_what_a_broken_server_says_is_no_crash_and_no_wrong_file(site: Site, tmp_path: Path, answer: str, right: bool):
    site.files["a"] = b"DATA"
    site.raw = [answer.encode("latin-1")]
    if right:
        assert fetch(site.url + "a", tmp_path / "a", policy=QUICK).read_bytes() == b"DATA"
        return
    with pytest.raises(DownloadError) as caught:
        fetch(site.url + "a", tmp_path / "a", policy=QUICK)
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def test_a_range_of_another_version_is_not_appended(site: Site, tmp_path: Path):
    """Some servers answer 206 whatever If-Range says; their ETag tells that it is another file."""
    new = site.files["a"] = content(40_000, 1)
    (tmp_path / "a.part").write_bytes(content(10_000, 0))
    (tmp_path / "a.part.json").write_text('{"validator": "\\"old\\"", "total": 40000}')
    body = b"".join(
        (b"HTTP/1.1 206 Partial Content\r\nETag: \"new\"\r\nContent-Range: bytes 10000-39999/40000\r\n",
         b"Content-Length: 30000\r\nConnection: close\r\n\r\n", new[10_000:])
    )  # fmt: skip
    site.raw = [body]
    fetch(site.url + "a", tmp_path / "a", policy=QUICK)
    assert (tmp_path / "a").read_bytes() == new


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>log in</html>", b"\xef\xbb\xbf\n <HTML>no</HTML>"])
def test_a_web_page_is_no_file_even_without_a_checksum(site: Site, tmp_path: Path, page: bytes):
    site.files["a"] = page
    with pytest.raises(DownloadError, match="a web page"):
        fetch(site.url + "a", tmp_path / "a", policy=QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", [202, 203, 408, 425])
def test_an_answer_that_is_no_file_yet_is_waited_for(site: Site, tmp_path: Path, status: int):
    site.files["a"] = content(500)
    site.raw = [f"HTTP/1.1 {status} Later\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok".encode()]
    fetch(site.url + "a", tmp_path / "a", policy=QUICK)
    assert (tmp_path / "a").read_bytes() == site.files["a"]


@pytest.mark.parametrize(
    "facts", ["[]", "3", '{"total": 9}', '{"validator": 5, "total": 9}', '{"validator": "a\\r\\nb: c"}']
)
def test_damaged_notes_of_an_earlier_part_are_passed_over(site: Site, tmp_path: Path, facts: str):
    data = site.files["a"] = content(5000)
    (tmp_path / "a.part").write_bytes(data[:2000])
    (tmp_path / "a.part.json").write_text(facts)
    fetch(site.url + "a", tmp_path / "a", checksum=sha(data), policy=QUICK)
    assert (tmp_path / "a").read_bytes() == data and site.requests[0][1] == "bytes=2000-"


def test_a_full_disk_keeps_what_was_received(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = site.files["a"] = content(400_000)
    monkeypatch.setattr(fetching, "CHUNK", 65536)
    real = fetching.os.fsync

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    site.cut = 100_000
    monkeypatch.setattr(fetching.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        fetch(site.url + "a", tmp_path / "a", policy=QUICK)
    assert (tmp_path / "a.part").read_bytes() == data[:100_000] and not (tmp_path / "a").exists()
    monkeypatch.setattr(fetching.os, "fsync", real)
    fetch(site.url + "a", tmp_path / "a", checksum=sha(data), policy=QUICK)
    assert (tmp_path / "a").read_bytes() == data


# --- archives ---------------------------------------------------------------------------------------------------------


def make_zip(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "a\\..\\evil", "c:evil"])
def test_a_member_outside_the_folder_is_refused(tmp_path: Path, name: str):
    archive = make_zip(tmp_path / "x.zip", {"good": b"1", name: b"2"})
    with pytest.raises(ArchiveError, match="outside"):
        unpack(archive, tmp_path / "data", expected_bytes=100)
    assert not list((tmp_path / "data").iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == ["data", "x.zip"]


def test_links_and_devices_are_refused(tmp_path: Path):
    with pytest.raises(ArchiveError, match="link"):
        unpack(make_zip(tmp_path / "x.zip", {"good": b"1"}, link="bad"), tmp_path / "data", expected_bytes=100)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            info = tarfile.TarInfo("bad")
            info.type, info.linkname = kind, "../../outside"
            archive.addfile(info)
        with pytest.raises(ArchiveError, match="link or a device"):
            unpack(tmp_path / "x.tar", tmp_path / "data", expected_bytes=100)
    assert not list((tmp_path / "data").iterdir())


def joined_tars(path: Path) -> None:
    for name in "ab":
        with tarfile.open(path.with_suffix(f".{name}"), "w") as archive:
            archive.addfile(tarfile.TarInfo(name))
    path.write_bytes(b"".join(path.with_suffix(f".{name}").read_bytes() for name in "ab"))


@pytest.mark.parametrize(
    "make,said",
    [
        (lambda path: zipfile.ZipFile(path, "w").close(), "holds no file"),
        (lambda path: tarfile.open(path, "w").close(), "holds no file"),
        (lambda path: make_zip(path, {"folder/": b""}), "holds no file"),
        (joined_tars, "goes on after its end"),
        (lambda path: path.write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(600)), "RAR"),
        (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html></html>" * 30), "a web page"),
        (lambda path: path.write_bytes(b""), "neither a zip nor a tar nor a 7z"),
        (lambda path: path.write_bytes(make_zip(path, {"a": bytes(900)}).read_bytes()[:-30]), "without its end"),
    ],
)
def test_what_is_no_archive_or_only_half_of_one_is_said(tmp_path: Path, make, said: str):
    make(tmp_path / "x.zip")
    with pytest.raises(ArchiveError, match=said):
        unpack(tmp_path / "x.zip", tmp_path / "data", expected_bytes=10_000)
    assert not list((tmp_path / "data").iterdir())


def test_archives_are_what_their_bytes_say_and_backslashes_stand_between_folders(tmp_path: Path):
    import py7zr

    with py7zr.SevenZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(b"1", "a/b")
    assert unpack(tmp_path / "x.zip", tmp_path / "one", expected_bytes=100) == {"a": 1}
    make_zip(tmp_path / "y.7z", {"a\\b\\c.txt": b"2", "a\\d\\": b""})
    assert unpack(tmp_path / "y.7z", tmp_path / "two", expected_bytes=100) == {"a": 1}
    assert (tmp_path / "two" / "a" / "b" / "c.txt").read_bytes() == b"2"


def test_a_zip_with_a_password_says_so(tmp_path: Path):
    data = bytearray(make_zip(tmp_path / "x.zip", {"a": b"1"}).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match="needs a password"):
        unpack(tmp_path / "x.zip", tmp_path / "data", expected_bytes=100)


def test_a_program_that_asks_for_a_password_is_not_waited_for(tmp_path: Path):
    program = tmp_path / "7z"
    program.write_text("#!/bin/sh\nread password || { echo 'Break signaled' >&2; exit 255; }\n")
    program.chmod(0o755)
    (tmp_path / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    command = (
        "import importlib.util, os, sys; from pathlib import Path; from multimodal.download import archives; "
        "found = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *more: None if name == 'py7zr' else found(name, *more); "
        f"os.environ['PATH'] = {str(tmp_path)!r} + ':' + os.environ['PATH']; "
        f"archives.unpack(Path({str(tmp_path / 'x.7z')!r}), Path({str(tmp_path / 'data')!r}), expected_bytes=100)"
    )
    waiting = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        waiting.wait(30)  # nobody types anything
    finally:
        waiting.kill()
    assert b"ArchiveError" in waiting.communicate()[1]


def test_two_that_unpack_at_once_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second begins, in another process, while the first is half done."""
    archive, code = make_zip(tmp_path / "x.zip", {"a/1": b"1", "a/2": b"2"}), []
    real = archives._write_member

    def slowly(*given):
        if not code:
            command = (
                "import sys; from pathlib import Path; from multimodal.download.archives import unpack; "
                f"unpack(Path({str(archive)!r}), Path({str(tmp_path / 'data')!r}), expected_bytes=100)"
            )
            left = real(*given)
            code.append(subprocess.run([sys.executable, "-c", command]).returncode)
            return left
        return real(*given)

    monkeypatch.setattr(archives, "_write_member", slowly)
    assert unpack(archive, tmp_path / "data", expected_bytes=100) == {"a": 2} and code == [0]
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["1", "2", "a"]


def test_an_archive_that_grows_too_much_is_refused(tmp_path: Path):
    archive = make_zip(tmp_path / "x.zip", {"a": bytes(1000), "b": bytes(2001)})
    with pytest.raises(ArchiveError, match="3 times"):
        unpack(archive, tmp_path / "data", expected_bytes=1000)
    assert not list((tmp_path / "data").iterdir())


def test_a_damaged_archive_leaves_nothing(tmp_path: Path):
    archive = make_zip(tmp_path / "x.zip", {"folder/a": content(5000)})
    data = bytearray(archive.read_bytes())
    data[2000] ^= 1
    archive.write_bytes(data)
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(archive, tmp_path / "data", expected_bytes=5000)
    assert not list((tmp_path / "data").iterdir())


def damaged_archive(folder: Path, kind: str) -> Path:
    """An archive of one member whose bytes, or whose names, are no good."""
    path, data = folder / f"x.{kind.split()[0]}", np.random.default_rng(0).integers(0, 50, 60000, np.uint8).tobytes()
    names = {"file in file": ("a", "a/b"), "no name": (".",), "long name": ("n" * 300,), "one of two": ("a", "b")}.get(
        kind.partition(" ")[2], ("d/a",)
    )
    if path.suffix == ".zip":
        method = {"lzma": zipfile.ZIP_LZMA, "bz2": zipfile.ZIP_BZIP2}.get(kind.split()[-1], zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(path, "w", method) as archive:
            for name in names:
                archive.writestr(name, data)
    elif path.suffix == ".7z":
        import py7zr

        with py7zr.SevenZipFile(path, "w", password="x" if "locked" in kind else None) as archive:
            archive.writestr(data, names[0])
    else:
        with tarfile.open(path, f"w:{path.suffix[1:]}".removesuffix("tar")) as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    if names == ("a", "b"):
        path.write_bytes(path.read_bytes().replace(b"b" + bytes(99), b"c" + bytes(99)))  # its header's sum is wrong
    if names == ("d/a",) and "locked" not in kind:
        spoiled = bytearray(path.read_bytes())
        middle = slice(len(spoiled) * 3 // 10, len(spoiled) * 3 // 10 + 40)
        spoiled[middle] = bytes(value ^ 0x5A for value in spoiled[middle])
        path.write_bytes(spoiled)
    return path


@pytest.mark.parametrize(
    "kind",
    [*("zip deflate", "zip lzma", "zip bz2", "tar.gz", "tar.xz", "tar.bz2", "7z", "7z locked")]
    + [f"{form} {names}" for form in ("zip", "tar") for names in ("file in file", "no name", "long name")]
    + ["tar one of two"],  # of which the first is whole
)
def test_archives_that_cannot_be_unpacked_are_damaged_whatever_their_decompressor_raises(tmp_path: Path, kind: str):
    archive = damaged_archive(tmp_path, kind)
    with pytest.raises(ArchiveError, match="damaged") as caught:
        unpack(archive, tmp_path / "data", expected_bytes=10**6)
    assert not list((tmp_path / "data").iterdir()) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_unpacking_fills_up_folders_and_keeps_the_users_files(tmp_path: Path):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    (folder / "own.txt").write_text("mine")
    (folder / "a.txt").write_text("mine too")
    for name in ("b", "b.kept-1"):  # the second from an earlier unpacking
        (folder / name).symlink_to(tmp_path / "a disk that is not mounted" / name)
    counts = unpack(
        make_zip(tmp_path / "x.zip", {"train/a.txt": b"theirs", "train/b/c.txt": b"1"}),
        tmp_path / "data",
        expected_bytes=100,
    )
    assert counts == {"train": 2}
    assert (folder / "own.txt").read_text() == "mine" and (folder / "a.txt").read_text() == "theirs"
    assert (folder / "a.txt.kept-1").read_text() == "mine too" and (folder / "b" / "c.txt").exists()
    assert (folder / "b.kept-1").is_symlink()
    assert (folder / "b.kept-1").readlink().name == "b.kept-1" and (folder / "b.kept-2").readlink().name == "b"


def test_tar_archives(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("folder/a")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert unpack(tmp_path / "x.tar.gz", tmp_path / "data", expected_bytes=10) == {"folder": 1}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteSet:
    """A small set in place of COCO: a table, and an archive of two pictures."""
    site.files["zips/val.zip"] = make_zip(
        tmp_path / "val.zip", {"val/a.jpg": content(1000), "val/b.jpg": content(900)}
    ).read_bytes()
    (tmp_path / "val.zip").unlink()
    site.files["table.csv"] = b"a,b\n1,2\n"
    small = RemoteSet(
        "coco",
        site.url,
        (
            RemoteFile("table.csv", "always", sha(site.files["table.csv"]), len(site.files["table.csv"])),
            RemoteFile("zips/val.zip", "val", sha(site.files["zips/val.zip"]), len(site.files["zips/val.zip"]), 2000),
        ),
    )
    monkeypatch.setitem(SETS, "coco", small)
    return small


def run(tmp_path: Path, *flags: str) -> int:
    try:
        download_datasets.main(["--data-root", str(tmp_path / "data"), "--first-wait", "0", "--timeout", "5", *flags])
    except SystemExit as leaving:
        return leaving.code
    return 0


def test_the_command_fetches_unpacks_and_skips(
    tiny: RemoteSet, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run(tmp_path, "--datasets", "coco") == 0
    folder = tmp_path / "data" / "coco"
    assert sorted(path.name for path in folder.iterdir()) == [".complete.json", ".downloads", "table.csv", "val"]
    assert not list((folder / ".downloads").iterdir())
    asked = len(site.requests)
    assert run(tmp_path, "--datasets", "coco", "--skip-existing") == 0
    assert len(site.requests) == asked and "was complete" in capsys.readouterr().out
    (folder / "val" / "a.jpg").unlink()
    assert run(tmp_path, "--datasets", "coco", "--skip-existing") == 0
    assert (folder / "val" / "a.jpg").exists() and len(site.requests) == asked + 1


def test_no_extract_and_keep_archives(tiny: RemoteSet, tmp_path: Path):
    assert run(tmp_path, "--datasets", "coco", "--no-extract") == 0
    folder = tmp_path / "data" / "coco"
    assert (folder / ".downloads" / "val.zip").exists() and not (folder / "val").exists()
    assert run(tmp_path, "--datasets", "coco", "--keep-archives") == 0
    assert (folder / ".downloads" / "val.zip").exists() and (folder / "val" / "a.jpg").exists()


def test_an_archive_that_the_user_brought_is_used_and_kept(tiny: RemoteSet, site: Site, tmp_path: Path):
    folder = tmp_path / "data" / "coco"
    folder.mkdir(parents=True)
    (folder / "val.zip").write_bytes(site.files["zips/val.zip"])
    assert run(tmp_path, "--datasets", "coco") == 0
    assert (folder / "val.zip").exists() and (folder / "val" / "b.jpg").exists()
    assert [path for path, _ in site.requests] == ["table.csv"]


def test_one_failure_does_not_keep_the_others_back(
    tiny: RemoteSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(
        SETS, "glove", RemoteSet("glove", site.url, (RemoteFile("nothing.zip", "always", unpacked=10),))
    )
    assert run(tmp_path, "--datasets", "glove", "coco") == 3
    printed = capsys.readouterr()
    assert "404" in printed.err and "train.py --config small" in printed.err
    assert "complete" in printed.out and (tmp_path / "data" / "coco" / "val").exists()


def test_a_small_disk_stops_before_the_first_byte(
    tiny: RemoteSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(download_datasets.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert run(tmp_path, "--datasets", "coco") == 3
    assert "are needed" in capsys.readouterr().err and not site.requests and not (tmp_path / "data").exists()


def test_manual_sets_print_their_steps(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    parts = [content(300, seed) for seed in (1, 2)]
    whole = make_zip(tmp_path / "w.zip", {"wav/id1/v/00001.wav": b"sound"}).read_bytes()
    parts = [whole[:100], whole[100:]]
    names = tuple((f"p{i}", hashlib.md5(part).hexdigest()) for i, part in enumerate(parts))
    monkeypatch.setitem(
        SETS,
        "voxceleb",
        RemoteSet(
            "voxceleb",
            site.url,
            (),
            manual=(ManualFile("w.zip", hashlib.md5(whole).hexdigest(), names),),
            steps=("1. ask for it",),
            layout=("wav/id*/*/*.wav",),
        ),
    )
    (tmp_path / "data" / "voxceleb").mkdir(parents=True)
    assert run(tmp_path, "--datasets", "voxceleb") == 4
    assert "1. ask for it" in capsys.readouterr().out
    for (name, _), part in zip(names, parts, strict=True):
        (tmp_path / "data" / "voxceleb" / name).write_bytes(part)
    assert run(tmp_path, "--datasets", "voxceleb") == 0
    assert (tmp_path / "data" / "voxceleb" / "wav" / "id1" / "v" / "00001.wav").exists()


def test_a_part_that_is_missing_is_named_whatever_else_is_there(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    whole = make_zip(tmp_path / "w.zip", {"wav/id1/v/00001.wav": b"dev"}).read_bytes()
    test = make_zip(tmp_path / "t.zip", {"wav/id9/v/00001.wav": b"test"}).read_bytes()
    pieces = {"pa": whole[:50], "pb": whole[50:90], "pc": whole[90:]}
    parts = tuple((name, hashlib.md5(piece).hexdigest()) for name, piece in pieces.items())
    manual = (ManualFile("w.zip", None, parts), ManualFile("t.zip"))
    monkeypatch.setitem(
        SETS,
        "voxceleb",
        RemoteSet("voxceleb", site.url, (), manual=manual, steps=("ask",), layout=("wav/id*/*/*.wav",)),
    )
    folder = tmp_path / "data" / "voxceleb"
    folder.mkdir(parents=True)
    for name in ("pa", "pc"):
        (folder / name).write_bytes(pieces[name])
    (folder / "t.zip").write_bytes(test)
    for _ in range(2):
        assert run(tmp_path, "--datasets", "voxceleb", "--skip-existing") == 4
        assert "w.zip: of its 3 parts pb is missing" in capsys.readouterr().out
    (folder / "pb").write_bytes(pieces["pb"])
    assert run(tmp_path, "--datasets", "voxceleb", "--skip-existing") == 0
    assert (folder / "wav" / "id1" / "v" / "00001.wav").exists()
    (folder / "pb").unlink()  # it is unpacked, so that nobody needs the parts
    assert run(tmp_path, "--datasets", "voxceleb", "--skip-existing") == 0


def test_an_archive_without_a_file_is_no_complete_set(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    zipfile.ZipFile(tmp_path / "e.zip", "w").close()
    site.files["e.zip"] = (tmp_path / "e.zip").read_bytes()
    monkeypatch.setitem(SETS, "glove", RemoteSet("glove", site.url, (RemoteFile("e.zip", "always", unpacked=100),)))
    assert run(tmp_path, "--datasets", "glove") == 3


def audiocaps_two(site: Site, monkeypatch: pytest.MonkeyPatch, table: bytes) -> None:
    site.files["train.csv"] = table
    file = RemoteFile("train.csv", "train", other=hashlib.sha256(b"release 1").hexdigest())
    steps = {"steps": SETS["audiocaps"].steps, "layout": SETS["audiocaps"].layout}
    monkeypatch.setattr(download_datasets, "AUDIOCAPS_2", RemoteSet("audiocaps", site.url, (file,), **steps))


def test_a_table_that_is_none_does_not_keep_the_other_sets_back(
    tiny: RemoteSet, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    audiocaps_two(site, monkeypatch, b"not found")
    assert run(tmp_path, "--datasets", "audiocaps", "coco", "--audiocaps-version", "2.0") == 3
    said = capsys.readouterr()
    assert "train.csv: has no column youtube_id" in said.err and "delete it" in said.err
    assert (tmp_path / "data" / "coco" / "table.csv").exists() and "complete" in said.out


def test_a_table_of_another_release_is_not_taken_for_the_one_asked_for(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    audiocaps_two(site, monkeypatch, b"audiocap_id,youtube_id,start_time,caption\n")
    folder = tmp_path / "data" / "audiocaps"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_bytes(b"release 1")
    assert run(tmp_path, "--datasets", "audiocaps", "--audiocaps-version", "2.0") == 3
    assert "is there, but is not the published file" in capsys.readouterr().err
    assert all(file.other == one.checksum[1] for file, one in zip(AUDIOCAPS_2.files, AUDIOCAPS.files, strict=True))


@pytest.mark.parametrize(
    "marker",
    ['{"files": []}', '{"files": {"table.csv": 3}}', '{"files": {"table.csv": {"paths": {"table.csv": "x"}}}}'],
)
def test_a_damaged_marker_counts_as_none(tiny: RemoteSet, tmp_path: Path, marker: str):
    (tmp_path / "data" / "coco").mkdir(parents=True)
    (tmp_path / "data" / "coco" / ".complete.json").write_text(marker)
    assert run(tmp_path, "--datasets", "coco", "--skip-existing") == 0
    assert run(tmp_path, "--datasets", "coco", "--skip-existing") == 0


def test_a_second_downloader_at_the_same_folder_is_told(tiny: RemoteSet, tmp_path: Path, capsys):
    with download_datasets.alone(tmp_path / "data" / "coco"):
        assert run(tmp_path, "--datasets", "coco") == 3
    assert "another download_datasets.py is at work" in capsys.readouterr().err
    assert run(tmp_path, "--datasets", "coco") == 0


def test_mirrors_with_blanks_and_letters_in_their_folders(tiny: RemoteSet, site: Site, tmp_path: Path):
    site.files = {f"D%C3%A4ta%20sets/{name}": data for name, data in site.files.items()}
    assert run(tmp_path, "--datasets", "coco", "--base-url", f"coco={site.url}D\u00e4ta sets") == 0


def test_what_is_done_is_not_fetched_again_when_a_later_file_fails(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {name: make_zip(tmp_path / f"{name}.zip", {f"{name}/1": content(3000)}).read_bytes() for name in "abc"}
    remote = [RemoteFile(f"{name}.zip", "always", sha(data), len(data), 6000) for name, data in files.items()]
    monkeypatch.setitem(SETS, "coco", RemoteSet("coco", site.url, tuple(remote)))
    site.files = {f"{name}.zip": data for name, data in files.items() if name != "c"}
    assert run(tmp_path, "--datasets", "coco") == 3
    assert [path for path, _ in site.requests] == ["a.zip", "b.zip", "c.zip"]
    site.requests, site.files = [], {f"{name}.zip": data for name, data in files.items()}
    assert run(tmp_path, "--datasets", "coco") == 0
    assert [path for path, _ in site.requests] == ["c.zip"]
    assert run(tmp_path, "--datasets", "coco", "--skip-existing") == 0 and len(site.requests) == 1


def test_every_archive_that_was_laid_there_is_unpacked(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    dev = make_zip(tmp_path / "dev.zip", {"wav/id10001/v/00001.wav": b"dev"}).read_bytes()
    test = make_zip(tmp_path / "test.zip", {"wav/id10270/v/00001.wav": b"test"}).read_bytes()
    second = make_zip(tmp_path / "second.zip", {"dev/aac/id00012/v/00001.m4a": b"second"}).read_bytes()
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in (("dev", dev), ("test", test), ("second", second))}
    parts = tuple((f"dev_{i}", hashlib.md5(part).hexdigest()) for i, part in enumerate((dev[:80], dev[80:])))
    manual = (ManualFile("dev.zip", md5["dev"], parts), ManualFile("test.zip", md5["test"]))
    voxceleb = RemoteSet(
        "voxceleb", site.url, (), manual=(*manual, ManualFile("second.zip", md5["second"])), steps=("ask",),
        layout=("wav/id*/*/*.wav", "dev/aac/id*/*/*.m4a"),
    )  # fmt: skip
    monkeypatch.setitem(SETS, "voxceleb", voxceleb)
    folder = tmp_path / "data" / "voxceleb"
    folder.mkdir(parents=True)
    (folder / "dev_0").write_bytes(dev[:80])
    (folder / "dev_1").write_bytes(dev[80:])
    (folder / "test.zip").write_bytes(test)
    assert run(tmp_path, "--datasets", "voxceleb", "--skip-existing") == 0
    found = sorted(path.name for path in (folder / "wav").iterdir())
    assert found == ["id10001", "id10270"] and not (folder / "dev.zip").exists() and (folder / "test.zip").exists()
    (folder / "second.zip").write_bytes(second)  # VoxCeleb2 comes later
    assert run(tmp_path, "--datasets", "voxceleb", "--skip-existing") == 0
    assert (folder / "dev" / "aac" / "id00012" / "v" / "00001.m4a").exists()
    from multimodal.data.sources import read_records

    records = read_records("voxceleb", folder, "train").records
    labels = {record.id.split("/")[1]: record.labels for record in records}
    assert labels == {"id00012": (0,), "id10001": (1,), "id10270": (2,)}
    monkeypatch.setattr(download_datasets.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    shutil.rmtree(folder / "wav")
    assert run(tmp_path, "--datasets", "voxceleb") == 3 and "are needed" in capsys.readouterr().err


def test_missing_clips_are_listed(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    table = b"audiocap_id,youtube_id,start_time,caption\n1,abc,30,x\n2,-de,90,y\n"
    site.files["train.csv"] = table
    steps = {"steps": SETS["audiocaps"].steps, "layout": SETS["audiocaps"].layout}
    small = RemoteSet("audiocaps", site.url, (RemoteFile("train.csv", "train", sha(table), len(table)),), **steps)
    monkeypatch.setitem(SETS, "audiocaps", small)
    assert run(tmp_path, "--datasets", "audiocaps") == 4
    folder = tmp_path / "data" / "audiocaps"
    assert "0 of 2 clips are there" in capsys.readouterr().out
    (folder / "wavs" / "train").mkdir(parents=True)
    (folder / "wavs" / "train" / "Yabc_30.0_40.0.wav").write_bytes(b"x")
    assert run(tmp_path, "--datasets", "audiocaps") == 0
    assert "1 of 2 clips are there" in capsys.readouterr().out
    assert (folder / "missing_train.csv").read_text() == "youtube_id,start_time\n-de,90\n"


def test_a_damaged_archive_is_named_in_one_line(tmp_path: Path):
    for name, data in (
        ("x.tar", b"no archive at all" * 100),
        ("y.zip", b"PK\x03\x04" + bytes(100)),
        ("z.7z", b"7z" * 40),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ArchiveError, match="damaged.*run the same command again") as found:
            unpack(tmp_path / name, tmp_path / "data", expected_bytes=10_000)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "flags,message",
    [
        ((), "--datasets is needed"),
        (("--datasets", "cocoa"), "cocoa"),
        (("--datasets", "coco", "--base-url", "coco"), "NAME=URL"),
        (("--datasets", "coco", "--base-url", "coco=file:///etc"), "http"),
        (("--datasets", "coco", "--base-url", "coco=http://host/a?token=x"), "a host and a folder"),
        (("--datasets", "coco", "--base-url", "coco=http://[::1/"), "a host and a folder"),
        (("--datasets", "coco", "--base-url", "coco=http:///x"), "a host and a folder"),
        (("--datasets", "coco", "--base-url", "coco=http://host:99999/"), "a host and a folder"),
        (("--datasets", "audiocaps", "--splits", "karpathy"), "audiocaps has train, val, test"),
        (("--datasets", "coco", "clotho", "--splits", "test2017", "karpathy"), "clotho has train, val, test"),
    ],
)
def test_bad_arguments_end_with_2(flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_fetches_nothing(tiny: RemoteSet, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(tmp_path, "--datasets", "all", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "zips/val.zip" in printed and "clotho_audio_development.7z" in printed and not site.requests
