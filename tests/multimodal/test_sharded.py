"""Shards stay on disk: opened by their index, captions read when asked for, mixed with lists without a difference."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from multimodal.config import Config
from multimodal.data.records import Joined, ListRecords, Record
from multimodal.data.sharded import readable
from multimodal.data.sources import HELD_OUT, open_data, read_records, stable_hash
from multimodal.data.text import TextTokenizer
from multimodal.dataset import list_fingerprint
from shared.errors import BadSample, UserError
from shared.media.shards import Shards
from tests.multimodal.files import dataset, picture, write_shard

PIXELS = io.BytesIO()
Image.new("RGB", (8, 8), 120).save(PIXELS, "PNG")


def pictures(first: int, count: int, text: str = "picture") -> dict[str, bytes]:
    """Samples of a picture and a caption each."""
    numbers = range(first, first + count)
    return {
        f"k{n:03d}.{part}": data
        for n in numbers
        for part, data in (("png", PIXELS.getvalue()), ("txt", f"{text} {n}".encode()))
    }


def test_a_line_of_a_text_member_is_a_caption_whatever_it_holds(tmp_path):
    texts = {"k0": "one \u2028 whole line\r\ntwo".encode(), "k1": b"caf\xe9 \x85 noir"}  # utf-8; cp1252
    members = {
        f"{k}.{part}": data for k, text in texts.items() for part, data in (("png", PIXELS.getvalue()), ("txt", text))
    }
    folder = write_shard(tmp_path / "train-0.tar", members)
    found = [record.captions for record in read_records("shards", folder, "train").records]
    assert found == [("one whole line", "two"), ("café noir",)]


def test_opening_reads_one_caption_and_training_reads_the_rest(tmp_path, monkeypatch):
    folder = write_shard(tmp_path / "train-0.tar", pictures(0, 40))
    write_shard(tmp_path / "train-1.tar", pictures(40, 20))
    reads, read = [], Shards.read
    monkeypatch.setattr(
        Shards, "read", lambda self, index, wanted: (reads.append(wanted), read(self, index, wanted))[1]
    )
    config = Config(data={"datasets": ["shards"], "paths": {"shards": str(folder)}})
    data = open_data(config)
    assert reads == [("txt", "text", "caption", "json")]
    names = [f"train/k{n:03d}" for n in range(60)]
    held = [name for name in names if stable_hash(name) % HELD_OUT == 0]
    assert list(data.val["image"].names()) == held and held
    assert list(data.train["image"].names()) == [name for name in names if name not in held]
    for records in (data.train["image"], data.val["image"]):
        as_list = ListRecords(Record(name, tmp_path, (), "", "image") for name in records.names())
        assert list_fingerprint(records) == list_fingerprint(as_list)
        assert [record.id for record in records] == [record.id for record in as_list]


def test_shards_and_lists_are_read_as_one(tmp_path):
    tokenizer = TextTokenizer()
    folder = write_shard(tmp_path / "shards" / "train-0.tar", pictures(0, 5))
    rows = [{"file": f"{n}.png", "caption": f"drawing {n}"} for n in range(4)]
    for row in rows:
        picture(tmp_path / "jsonl" / row["file"])
    (tmp_path / "jsonl" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {"jsonl": str(tmp_path / "jsonl"), "shards": str(folder)}
    both = open_data(Config(data={"datasets": ["jsonl", "shards"], "paths": paths}))
    records = Joined(
        [read_records("jsonl", tmp_path / "jsonl", "train").records, read_records("shards", folder, "train").records]
    )
    found = {record.id: record.captions for part in (both.train, both.val) for record in part["image"]}
    assert found == {record.id: record.captions for record in records} and len(found) == 9
    places = np.array([0, 3, 4, 8])
    assert [record.captions[0] for record in records.take(places)] == [
        "drawing 0",
        "drawing 3",
        "picture 0",
        "picture 4",
    ]
    assert dataset(records, tokenizer)[8]["caption"] == "picture 4"
    with pytest.raises(IndexError):
        records[9]


def test_broken_samples_stop_at_the_opening_or_when_they_are_read(tmp_path):
    tokenizer, whole = TextTokenizer(), pictures(0, 4)
    for name, member, reason in (
        ("blank", {"k002.txt": b" \n"}, "no caption"),
        ("labels", {"k002.txt": b"{", "k002.json": b'{"caption": "a", "labels": [-1]}'}, "class numbers"),
        ("json", {"k002.json": b"not json", "k002.txt": b""}, "no caption"),
    ):
        folder = write_shard(tmp_path / name / "train.tar", dict(sorted({**whole, **member}.items())))
        records = read_records("shards", folder, "train").records
        with pytest.raises(BadSample, match=f"k002.*{reason}"):
            dataset(records, tokenizer)[2]
        assert not records.take(np.array([2, 3])).all_labelled()  # the broken one is passed over
        assert [record.captions for record in readable(records)] == [("picture 0",), ("picture 1",), ("picture 3",)]


def test_incomplete_samples_are_left_out_and_counted(tmp_path):
    whole = pictures(0, 4)
    folder = write_shard(tmp_path / "first" / "train.tar", {**whole, "k000.txt": b""})
    assert [record.captions for record in readable(read_records("shards", folder, "train").records)] == [
        ("picture 1",),
        ("picture 2",),
        ("picture 3",),
    ]
    folder = write_shard(tmp_path / "media" / "train.tar", {**whole, "k004.txt": b"no picture", "k005.png": b"no text"})
    found = read_records("shards", folder, "train")
    assert len(found.records) == 4 and found.missing == 2
    folder = write_shard(tmp_path / "none" / "train.tar", {"k004.txt": b"no picture", "k004.cls": b"3"})
    with pytest.raises(UserError, match="k004 holds no picture or sound; its members are cls, txt"):
        read_records("shards", folder, "train")
    folder = write_shard(
        tmp_path / "texts" / "train.tar", {"k0.png": b"", "k0.txt": b" ", "k1.png": b"", "k1.json": b"{}"}
    )
    with pytest.raises(UserError, match="k0 has no caption"):
        read_records("shards", folder, "train")


def test_a_broken_file_of_a_shard_is_named(tmp_path):
    members = pictures(0, 2) | {"k001.png": b"<html>"} | {"k002.wav": b"RIFF", "k002.txt": b"a sound"}
    records = read_records("shards", write_shard(tmp_path / "train.tar", members), "train").records
    tokenizer = TextTokenizer()
    for place, name in ((1, "k001.png: cannot be decoded as a picture"), (2, "k002.wav: cannot be decoded as sound")):
        with pytest.raises(BadSample, match=f"{tmp_path}: sample {name}") as caught:
            dataset(records, tokenizer)[place]
        assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train/0.tgz", "train-0.tar.zst"])
def test_packed_shards_are_not_said_to_be_missing(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"1")
    with pytest.raises(UserError, match=f"{name}: a packed shard.*unpack"):
        read_records("shards", tmp_path, "train")


def test_names_of_another_encoding_are_names(tmp_path):
    members = {name.replace("k001", "caf\udce9"): data for name, data in pictures(0, 2).items()}
    records = read_records("shards", write_shard(tmp_path / "train.tar", members), "train").records
    assert [record.captions for record in readable(records)] == [("picture 0",), ("picture 1",)]
    assert len(set(records.names())) == 2 and open_data(
        Config(data={"paths": {"shards": str(tmp_path)}, "datasets": ["shards"]})
    )


@pytest.mark.parametrize(
    "texts,captions",
    [
        ({"json": b'{"text": ["a bell", "a high bell"], "tag": ["bell"]}'}, ("a bell", "a high bell")),  # CLAP
        ({"json": b'{"text": "a bell", "original_data": {}}'}, ("a bell",)),
        (
            {"json": b'{"caption": "a bell", "status": "success", "key": "000"}', "txt": b"other"},
            ("a bell",),
        ),  # img2dataset
        ({"json": b'{"status": "success"}', "txt": b"a bell"}, ("a bell",)),
        ({"json": b'{"caption": null}', "txt": b"a bell"}, ("a bell",)),
        ({"json": b"[1, 2]", "txt": b"a bell"}, ("a bell",)),
        ({"json": b"[" * 100_000, "txt": b"a bell"}, ("a bell",)),
        ({"json": b'{"captions": "a bell"}'}, ("a bell",)),
        ({"text": b"a bell"}, ("a bell",)),
        ({"txt": "un caf\u00e9".encode("latin-1")}, ("un caf\u00e9",)),
        ({"txt": b"\xef\xbb\xbfa bell\n\na low bell\n"}, ("a bell", "a low bell")),
    ],
)
@pytest.mark.parametrize("media", ["flac", "png"])
def test_the_shards_of_others_are_read(tmp_path, texts, captions, media):
    members = {f"k.{media}": PIXELS.getvalue()} | {f"k.{name}": data for name, data in texts.items()}
    records = read_records("shards", write_shard(tmp_path / "00000.tar", members), "train").records
    assert records[0].captions == captions and records[0].kind == {"flac": "audio", "png": "image"}[media]


@pytest.mark.parametrize(
    "names",
    [
        ("train/0.tar", "valid/0.tar"),
        ("train-000.tar", "val-000.tar"),
        ("TRAIN.tar", "VAL.tar"),
        ("cc3m-train-0000.tar", "cc3m-validation-0000.tar"),
        ("0_training.tar", "0_valid.tar"),
    ],
)
def test_splits_of_shards_by_file_and_by_folder(tmp_path, names):
    for number, name in enumerate(names):
        write_shard(tmp_path / name, pictures(10 * number, 2 + number))
    assert [len(read_records("shards", tmp_path, split).records) for split in ("train", "val", "test")] == [2, 3, 0]


def test_labels_of_shards_are_those_of_the_first_sample(tmp_path):
    rows = [{"caption": "a", "labels": [1]}, {"caption": "b"}]
    members = {
        f"k{n}.{part}": data
        for n in range(2)
        for part, data in (("png", PIXELS.getvalue()), ("json", json.dumps(rows[n]).encode()))
    }
    records = read_records("shards", write_shard(tmp_path / "train.tar", members), "train").records
    assert records.all_labelled() and list(records.by_kind()) == ["image"]
    assert records.take(np.array([], int)).all_labelled() and not records.take(np.array([1])).all_labelled()
    items = dataset(records, TextTokenizer(), num_classes=2)
    assert items[0]["labels"].tolist() == [0, 1]
    with pytest.raises(BadSample, match="k1: no labels"):
        items[1]
