"""Checkpoints that every rank writes and reads its own rows of: any strategy and number of ranks goes on from them."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from shared.engine import convert
from shared.engine.checkpoint import StoredTensors, load_tensors, load_weights, read_manifest, verify, write_safetensors
from shared.engine.parallel import _OnDisk
from shared.engine.strategy import rows_of
from shared.errors import CheckpointError
from tests.launching import losses, newest, run, same_bits
from tests.shared.toy import error_file
from tests.survival.sharded import Peak

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
TOY = Path(__file__).parent / "toy.py"
SHARDED = {"global_batch_size": 12, "batch_size": 1, "total_steps": 10, "shard_checkpoints_above_gb": 0}
MOVES = {  # ranks of the second half -> strategies of the first half, on 4 ranks, and of the second
    1: [("fsdp", "none")],
    2: [("fsdp", "fsdp"), ("fsdp", "zero3"), ("fsdp", "ddp"), ("zero3", "fsdp"), ("zero1", "zero2"), ("ddp", "zero1")],
}


def test_a_model_is_built_on_the_disk_with_the_same_bits(tmp_path, monkeypatch):
    """Rank 0 under fsdp holds no whole model (131 MB before): what it makes are pages of files without a name, and what
    it casts as well (67 MB before).
    """

    def build():
        torch.manual_seed(3)
        return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(32))).bfloat16()

    with Peak() as peak, _OnDisk(tmp_path):
        model = build()
    assert peak.peak < 2**25 and not list(tmp_path.iterdir())
    plain = build().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"), _OnDisk(tmp_path):
        build()
    assert not list(tmp_path.iterdir())


def toy(folder: Path, world: int, cases: list[dict]) -> None:
    path = folder / f"cases_{world}_{len(list(folder.glob('cases_*')))}.json"
    path.write_text(json.dumps(cases))
    run(world, TOY, path)


def described(output: Path, strategy: str, **training) -> dict:
    return {"output_dir": str(output), "strategy": strategy, "training": {**SHARDED, **training}}


def content_bytes(path: Path) -> int:
    """Of the tensors alone, without the header."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    first = [described(folder / name, name, max_steps=5) for name in ("fsdp", "zero3", "zero1", "ddp")]
    one_file = {"shard_checkpoints_above_gb": None, "max_steps": 5, "save_in_background": False}
    toy(folder, 4, [*first, described(folder / "whole", "fsdp", **one_file)])
    return folder


def test_a_sharded_checkpoint_goes_on_anywhere(halves, tmp_path):
    toy(tmp_path, 1, [described(tmp_path / "straight", "none")])
    expected = losses(tmp_path / "straight")
    for world, pairs in MOVES.items():
        for source, target in pairs:
            shutil.copytree(halves / source, tmp_path / f"{source}_{target}")
        toy(tmp_path, world, [described(tmp_path / f"{source}_{target}", target) for source, target in pairs])
        for source, target in pairs:
            found = losses(tmp_path / f"{source}_{target}")
            assert found.keys() == expected.keys()
            worst = max(abs(found[step] - expected[step]) / expected[step] for step in expected)
            assert worst < 1e-6, f"{source} on 4 ranks continued as {target} on {world}: {worst}"
    kept = [path for path in (tmp_path / "fsdp_none" / "checkpoints").iterdir() if path.is_dir()]
    assert sorted((path / "model.safetensors").exists() for path in kept) == [False, True]  # one rank writes one file


def test_every_rank_writes_its_own_rows_and_the_manifest_lists_them(halves):
    folder, whole = newest(halves / "fsdp"), newest(halves / "whole")
    files = verify(folder)["files"]
    shards = [name for name in files if name.startswith("shards/")]
    assert len(shards) == 4 and "model.safetensors" not in files
    sizes = [content_bytes(folder / name) for name in shards]
    total = sum(content_bytes(path) for path in whole.glob("*.safetensors"))
    assert sum(sizes) == total and max(sizes) < 0.27 * total
    for kind in ("model", "ema", "optimizer"):
        assert same_bits(load_tensors(folder, kind), load_tensors(whole, kind))
    for name in ("zero3", "zero1", "ddp"):
        found, expected = load_weights(newest(halves / name)), load_weights(whole)
        assert all(torch.allclose(found[key], expected[key], atol=1e-3) for key in expected)


def test_torch_distributed_checkpoint_reads_the_shards(halves):
    expected = load_tensors(newest(halves / "whole"), "optimizer")
    state = {"optimizer": {name: torch.zeros_like(value) for name, value in expected.items()}}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(newest(halves / "fsdp") / "shards"), no_dist=True)
    assert same_bits(state["optimizer"], expected)


def test_one_command_turns_shards_into_one_file_and_back(halves, tmp_path, capsys):
    source = newest(halves / "fsdp")
    convert.main([str(source), "--output", str(tmp_path / "one")])
    convert.main([str(tmp_path / "one"), "--output", str(tmp_path / "three"), "--shards", "3"])
    for folder in (tmp_path / "one", tmp_path / "three"):
        assert verify(folder)["run"] == read_manifest(source)["run"] and (folder / "config.yaml").is_file()
        for kind in ("model", "ema", "optimizer"):
            assert same_bits(load_tensors(folder, kind), load_tensors(source, kind))
    assert (tmp_path / "one" / "model.safetensors").is_file() and len(list((tmp_path / "three/shards").iterdir())) == 3
    with pytest.raises(SystemExit, match="2"):
        convert.main([str(source), "--output", str(tmp_path / "one")])
    assert "exists; name a new folder" in capsys.readouterr().err


def test_a_damaged_or_missing_shard_is_passed_over_and_named(halves, tmp_path):
    shutil.copytree(halves / "fsdp", tmp_path / "run")
    shard = newest(tmp_path / "run") / "shards" / "00003-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="00003-of-00004.safetensors is damaged"):
        verify(shard.parent.parent)
    shard.unlink()
    with pytest.raises(CheckpointError, match="00003-of-00004.safetensors is missing"):
        verify(shard.parent.parent)
    with pytest.raises(CheckpointError, match="rows of .* are missing or doubled"):
        StoredTensors(shard.parent.parent, "model")


def test_a_rank_that_cannot_write_stops_all_and_nothing_half_written_stays(tmp_path):
    runs = {"front": {"save_in_background": False}, "behind": {}}
    case = {"expect": True, "full_disk_of_rank": 1}
    toy(tmp_path, 2, [case | described(tmp_path / name, "fsdp", max_steps=2, **how) for name, how in runs.items()])
    for name in runs:
        for rank, sentence in enumerate(("another rank failed: rank 1: OSError", "No space left")):
            assert sentence in error_file(tmp_path / name, rank).read_text()
        assert not [path for path in (tmp_path / name / "checkpoints").glob("*") if path.is_dir()]


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (7,)])
def test_rows_come_back_from_any_cut(tmp_path, shape):
    value = torch.randn(shape)
    paths = []
    for place in range(4):
        start, stop = rows_of(shape, place, 4)
        if start < stop:
            part = value[start:stop] if shape else value
            paths.append(tmp_path / f"{place}.safetensors")
            write_safetensors(paths[-1], [("x", tuple(part.shape), part.dtype, start)], iter([part]))
    stored = StoredTensors(*paths)["x"]
    assert torch.equal(stored[...], value) and stored.shape == value.shape
    for start in range(len(value) if shape else 0):
        for stop in range(start, len(value) + 1):
            assert torch.equal(stored[start:stop], value[start:stop])
