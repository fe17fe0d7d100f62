"""A folder that was on a Mac holds `._NAME` beside every file, an unpacked archive __MACOSX: none of it is data."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bagel.data.sources import open_records
from bagel.train import _holds_weights
from dit.data.readers import is_sharded, parquet_files, tar_files
from dit.evaluation.figures import Pictures
from dit.weights.convert import read_state
from float.data.clips import find_clips
from float.prepare import find_sources, is_raw
from multimodal.data.sharded import shard_paths
from multimodal.download_datasets import visible_names
from multimodal.evaluation.zeroshot import labelled_files
from multimodal.weights.open import files_below
from opens2v.data.annotations import Annotations
from opens2v.weights.export import _adapters_of
from opens2v.weights.wan import read_generator_state
from shared.errors import UserError

WEIGHTS, PICTURE = "a.safetensors", "a.png"
READERS = {  # what reads a folder: the names of its files, how they are read
    "dit tar": (["00.tar", "01.tar"], tar_files),
    "dit tar pattern": (["00.tar", "01.tar"], lambda folder: tar_files(folder / "*.tar")),
    "dit parquet": (["00.parquet"], parquet_files),
    "dit pictures": ([PICTURE, "b.png"], lambda folder: Pictures(folder).files),
    "dit weights": ([WEIGHTS], lambda folder: sorted(read_state(folder))),
    "float clips": (["train/ann/a.mp4", "train/ann/a.wav"], lambda folder: find_clips(folder, "train")),
    "float videos": (["ann/a.mp4", "bob/a.mp4"], find_sources),
    "bagel records": (["a.jsonl", "b.jsonl"], lambda folder: [part.path for part in open_records(str(folder), None)]),
    "multimodal shards": (["00.tar", "01.tar"], lambda folder: shard_paths(folder, "train")),
    "multimodal shards by split": (["train/00.tar"], lambda folder: shard_paths(folder, "train")),
    "multimodal files": ([PICTURE, "more/b.png"], lambda folder: files_below(str(folder), "image")),
    "multimodal classes": (["cat/a.png", "dog/b.png"], labelled_files),
    "multimodal downloads": (["coco/a.png"], visible_names),
    "opens2v annotations": (["a.json", "b.json"], lambda folder: [path.name for path in Annotations(folder).files]),
    "opens2v base": ([WEIGHTS], lambda folder: sorted(read_generator_state(folder))),
    "opens2v adapters": ([WEIGHTS], lambda folder: sorted(_adapters_of(folder)[0])),
}  # fmt: skip


def fill(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.new("RGB", (8, 8)).save(path)
    elif path.suffix == ".safetensors":
        save_file({"blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, path)
    else:
        path.write_text(json.dumps({"key": path.stem}) + "\n")


def come_from_a_mac(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        inside = path.relative_to(folder)
        for left in (path.with_name(f"._{path.name}"), folder / "__MACOSX" / inside.with_name(f"._{path.name}")):
            left.parent.mkdir(parents=True, exist_ok=True)
            left.write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
        (folder / "__MACOSX" / inside).write_bytes(b"\x00\x05\x16\x07")
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


@pytest.mark.parametrize("reader", READERS)
def test_what_other_programs_left_is_not_read(tmp_path, reader):
    names, read = READERS[reader]
    for name in names:
        fill(tmp_path / name)
    before = read(tmp_path)
    assert before
    come_from_a_mac(tmp_path)
    assert read(tmp_path) == before


def test_a_folder_of_nothing_else_is_empty(tmp_path):
    for name in ("._00.tar", "._a.safetensors", "._a.mp4", "._a.parquet"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert not is_sharded(tmp_path) and not is_raw(tmp_path) and not _holds_weights(tmp_path)
    assert not parquet_files(tmp_path)
    with pytest.raises(UserError, match="holds neither a run"):
        read_state(tmp_path)
