"""The index of a large set: read once, the same data afterwards, and never believed when anything has changed."""

import io
import json
import os
import tarfile

import pytest
import torch
from PIL import Image

from bagel import dataset as dataset_module
from bagel.dataset import DataFormatError, UnifiedGenerationDataset
from shared.errors import BadSample
from tests.bagel.conftest import open_dataset

RECORDS = [
    {"id": "one", "text_prompt": "a red apple", "image_path": "jpg"},
    {"id": "two", "text_prompt": ["a boat", "a small boat"], "image_path": "jpg", "weight": 2.5},
    {"id": "ask", "image_path": "jpg", "question": "what?", "answer": "a cat"},
    {"id": "bad", "nothing": 1},
]


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """A shard of four samples, one without meaning, in a set that counts as large."""
    monkeypatch.setattr(dataset_module, "STORED_FROM", 1)
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for number, record in enumerate(RECORDS):
            picture = io.BytesIO()
            Image.new("RGB", (24 + 8 * number, 40), (200, 10 * number, 0)).save(picture, "JPEG")
            for name, data in (("json", json.dumps(record).encode()), ("jpg", picture.getvalue())):
                entry = tarfile.TarInfo(f"{number:04d}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def stored(folder) -> list:
    return sorted(folder.glob(".*.records.npz"))


def refuse(*_):
    raise AssertionError("the records were read again")


def test_the_second_start_reads_the_index_alone(shard, tmp_path, monkeypatch):
    first = open_dataset(shard)
    assert len(first) == 3 and len(stored(tmp_path)) == 1
    monkeypatch.setattr(UnifiedGenerationDataset, "_read_all", refuse)
    second = open_dataset(shard)
    assert second.fingerprint() == first.fingerprint() and second.describe() == first.describe()
    assert second.errors == first.errors and second.errors[0].id == "bad"
    assert [second.order(epoch) for epoch in range(3)] == [first.order(epoch) for epoch in range(3)]
    for index in range(6):  # the second three are repetitions
        assert second.length(index, 1) == first.length(index, 1)
        ours, theirs = second.sample(index, 1)["items"], first.sample(index, 1)["items"]
        assert [item.ids for item in ours] == [item.ids for item in theirs]
        assert all(torch.equal(a.image, b.image) for a, b in zip(ours, theirs, strict=True) if b.image is not None)
    with pytest.raises(DataFormatError, match="no known format"):
        open_dataset(shard, strict=True)


@pytest.mark.parametrize("change", ["file", "settings", "index"])
def test_a_stored_index_is_not_believed_after_a_change(shard, tmp_path, monkeypatch, change):
    open_dataset(shard)
    if change == "file":
        os.utime(shard, ns=(1, 1))
    if change == "index":
        stored(tmp_path)[0].write_bytes(stored(tmp_path)[0].read_bytes()[:-40])
    assert len(open_dataset(shard, max_sequence_length=399 if change == "settings" else 400)) == 3
    monkeypatch.setattr(UnifiedGenerationDataset, "_read_all", refuse)
    assert len(open_dataset(shard, max_sequence_length=399 if change == "settings" else 400)) == 3  # stored anew


def test_records_with_pictures_outside_are_read_at_every_start(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "STORED_FROM", 1)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text_prompt": "a red apple", "image_path": "apple.png"}) + "\n")
    with pytest.raises(Exception, match="no valid record"):
        open_dataset(path)
    Image.new("RGB", (24, 24)).save(tmp_path / "apple.png")
    assert len(open_dataset(path)) == 1 and not stored(tmp_path)


def test_a_record_file_that_changes_under_a_run_gives_bad_samples(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [json.dumps({"conversations": [{"role": "assistant", "content": text * 9}]}) + "\n" for text in "ab"]
    path.write_text("".join(rows))
    dataset = open_dataset(path)
    path.write_text(rows[0])
    assert dataset.sample(0, 0)["items"]
    with pytest.raises(BadSample, match=r"data.jsonl:2: the file has changed since the run began"):
        dataset.sample(1, 0)
