"""Random access to tar shards: keys, index, damage."""

import gzip
import io
import os
import pickle
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from torch.utils.data import DataLoader

from shared.errors import BadSample, UserError
from shared.media import shards as headers
from shared.media.shards import Shards, split_name


def make_shard(path, samples, extra=()):
    """Write {key: {extension: bytes}} in order, then the extra (name, bytes) members."""
    members = [(f"{key}.{extension}", data) for key, parts in samples.items() for extension, data in parts.items()]
    with tarfile.open(path, "w") as archive:
        for name, data in [*members, *extra]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def numbered(start, count, size=700):
    return {
        f"{i:05d}": {"txt": f"caption {i}".encode(), "bin": bytes([i % 256]) * size}
        for i in range(start, start + count)
    }


def indices(folder):
    return sorted(path.name for path in folder.glob(".*.npy"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("0001.seg.PNG", ("0001", "seg.png")),
        ("train/a.b/0001.jpg", ("train/a.b/0001", "jpg")),
        ("plain", ("plain", "")),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_file_name(name, expected):
    assert split_name(name) == expected


def test_members_of_one_key_are_one_sample(tmp_path):
    samples = {"a/x": {"jpg": b"1", "json": b"{}"}, "a/y": {"jpg": b""}, "b/x": {"seg.png": b"33", "txt": b"4"}}
    shards = Shards([make_shard(tmp_path / "one.tar", samples, extra=[(".hidden", b"no"), ("b/._x.txt", b"no")])])
    assert len(shards) == 3
    assert [shards[i] for i in range(3)] == [{"__key__": key, **parts} for key, parts in samples.items()]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            shards[index]


def test_several_shards_count_on(tmp_path):
    paths = [
        make_shard(tmp_path / "a.tar", numbered(0, 3)),
        make_shard(tmp_path / "b.tar", numbered(3, 1)),
        make_shard(tmp_path / "c.tar", numbered(4, 4)),
    ]
    shards = Shards(paths)
    assert len(shards) == 8
    assert [shards[i]["__key__"] for i in (7, 0, 3, 2, 4)] == ["00007", "00000", "00003", "00002", "00004"]
    assert shards[5]["txt"] == b"caption 5" and shards[5]["bin"] == b"\x05" * 700


def test_the_index_is_read_once(tmp_path, monkeypatch):
    path = make_shard(tmp_path / "one.tar", numbered(0, 5))
    assert len(Shards([path])) == 5 and len(indices(tmp_path)) == 2
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the headers were read again"))
    assert Shards([path])[4]["txt"] == b"caption 4"


def test_the_index_is_made_anew_when_the_file_changes(tmp_path):
    path = make_shard(tmp_path / "one.tar", numbered(0, 5))
    assert len(Shards([path])) == 5
    make_shard(path, numbered(100, 7))
    shards = Shards([path])
    assert len(shards) == 7 and shards[0]["__key__"] == "00100"
    make_shard(path, numbered(200, 7))  # of the same size; the time tells
    os.utime(path, ns=(1, 1))
    assert Shards([path])[0]["__key__"] == "00200"


def test_the_index_may_lie_elsewhere_or_nowhere(tmp_path):
    path = make_shard(tmp_path / "one.tar", numbered(0, 2))
    assert len(Shards([path], cache_dir=tmp_path / "cache")) == 2
    assert indices(tmp_path) == [] and len(indices(tmp_path / "cache")) == 2
    (tmp_path / "file").write_text("in the way of the folder")
    assert len(Shards([path], cache_dir=tmp_path / "file" / "cache")) == 2


@pytest.mark.parametrize("archive_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, monkeypatch, archive_format):
    long, accented = "folder" * 18 + "/x.txt", "h\u00e9.txt"
    lists = (["a/x.jpg", "a/x.txt", ".no"], ["y.txt", accented], ["y.txt", long, "z.txt"])
    for number, names in enumerate(lists):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=archive_format) as archive:
            folder = tarfile.TarInfo("a")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name in names:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(name), 1.5 if number else 1
                archive.addfile(info, io.BytesIO(name.encode()))
        plain = headers._read_headers(path)
        is_plain = number == 0 or (number == 1 and archive_format != tarfile.PAX_FORMAT)
        assert (headers._plain_files(path) is not None) == is_plain
        with monkeypatch.context() as patch:
            patch.setattr(headers, "_plain_files", lambda _: None)
            expected = headers._read_headers(path)
        assert all(np.array_equal(one, other) for one, other in zip(plain, expected, strict=True))


@pytest.mark.parametrize("place", [0, 3, 100, 120, 130, 150, 1024])  # 1024: of the second member
def test_a_changed_header_is_not_taken_for_plain(tmp_path, place):
    path = make_shard(tmp_path / "one.tar", numbered(0, 5))
    assert headers._plain_files(path) is not None
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert headers._plain_files(path) is None
    with pytest.raises(UserError, match="not a readable tar file"):
        Shards([path])


@pytest.mark.parametrize("cut", [600, 1200, 3000, 3072])
def test_a_truncated_shard_is_refused(tmp_path, cut):
    path = make_shard(tmp_path / "one.tar", numbered(0, 5))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="one.tar: .*(copy|make) the shard") as caught:
        Shards([path])
    assert "\n" not in str(caught.value) and indices(tmp_path) == []


def test_a_shard_cut_after_it_was_indexed_gives_bad_samples(tmp_path):
    path = make_shard(tmp_path / "one.tar", numbered(0, 5))
    shards = Shards([path])
    with open(path, "r+b") as file:
        file.truncate(3000)
    assert shards[0]["txt"] == b"caption 0"
    with pytest.raises(BadSample, match="one.tar: ends at byte 3000"):
        shards[4]


def test_what_is_no_shard_is_refused(tmp_path):
    empty, text, none = tmp_path / "empty.tar", tmp_path / "text.tar", tmp_path / "none.tar"
    make_shard(empty, {})
    text.write_text("not a tar file")
    none.write_bytes(b"")
    for path, reason in [(empty, "holds no files"), (text, "text.tar"), (none, "none.tar")]:
        with pytest.raises(UserError, match=reason):
            Shards([path])
    with pytest.raises(UserError, match="gone.tar: no such shard"):
        Shards([tmp_path / "gone.tar"])
    with pytest.raises(UserError, match="no .tar shard was given"):
        Shards([])


def test_an_empty_shard_among_others_is_passed_over(tmp_path):
    """img2dataset leaves one where no download succeeded."""
    shards = [make_shard(tmp_path / f"{n}.tar", numbered(0, 2) if n else {}) for n in range(2)]
    for _ in range(2):  # the second time from the stored index
        opened = Shards([shards[0], shards[1], shards[0]])
        assert len(opened) == 2 and opened[0]["txt"] == b"caption 0" and [key for key, _ in opened.listing()]
    (tmp_path / "zeros.tar").write_bytes(bytes(20480))  # longer than what tar writes for no file
    with pytest.raises(UserError, match="zeros.tar: the shard holds no files in its 20,480 bytes"):
        Shards([shards[1], tmp_path / "zeros.tar"])


def test_what_follows_the_end_of_a_shard_is_not_lost_unsaid(tmp_path):
    one, two = (make_shard(tmp_path / f"{n}.tar", numbered(n, 1)) for n in range(2))
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match="both.tar: .*goes on after its end"):
        Shards([tmp_path / "both.tar"])


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_member_stored_with_holes_is_refused(tmp_path, form):
    """Its bytes do not lie in one piece, so that others' would be read in their place."""
    with open(tmp_path / "a.wav", "wb") as file:
        file.write(b"head")
        file.truncate(1 << 20)
    (tmp_path / "a.txt").write_text("a sound")
    made = subprocess.run(["tar", "-cS", f"--format={form}", "-f", "s.tar", "a.txt", "a.wav"], cwd=tmp_path)
    if made.returncode or (tmp_path / "s.tar").stat().st_size > 1 << 20:
        pytest.skip("this tar, or this disk, makes no holes")
    with pytest.raises(UserError, match=r"s.tar: .*a.wav is stored with holes, as tar -S does"):
        Shards([tmp_path / "s.tar"])


def test_a_packed_shard_is_said_to_be_packed(tmp_path):
    path = make_shard(tmp_path / "one.tar", numbered(0, 1))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="one.tar: packed by gzip.*gzip -d"):
        Shards([path])


def test_shards_travel_to_other_processes(tmp_path):
    shards = Shards([make_shard(tmp_path / "a.tar", numbered(0, 6)), make_shard(tmp_path / "b.tar", numbered(6, 6))])
    expected = [shards[i] for i in range(12)]  # the files are open now
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy[i] for i in range(12)] == expected
    loader = DataLoader(shards, batch_size=None, sampler=list(range(12)), num_workers=2)
    assert list(loader) == expected
    assert [shards[i] for i in range(12)] == expected


def test_threads_read_at_the_same_time(tmp_path):
    samples = {f"{number:04d}": {"bin": bytes([number % 256]) * (50 + number)} for number in range(400)}
    make_shard(tmp_path / "a.tar", samples)
    shards = Shards([tmp_path / "a.tar"])
    order = [(7 * step) % 400 for step in range(4000)]
    with ThreadPoolExecutor(8) as pool:
        for index, sample in zip(order, pool.map(shards.__getitem__, order), strict=True):
            assert sample["bin"] == samples[f"{index:04d}"]["bin"]
