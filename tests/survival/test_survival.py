"""A short form of the survival tools: one kill of a system, one strategy, one plan; the tools run the whole tables."""

import argparse
import importlib
import json
import signal
import subprocess
import sys
import time

import pytest

from shared.config import load_config
from shared.engine.checkpoint import read_manifest
from shared.engine.dist import init_distributed
from tests.launching import ENVIRONMENT, ROOT, final_tensors, losses, newest, run, same_bits
from tests.multimodal import small
from tests.survival import breakages, kills, memory, precompute, strategies
from tests.survival.systems import SYSTEMS, chosen

BY_NAME = {system.name: system for system in SYSTEMS}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_the_undisturbed_one(tmp_path):
    options = argparse.Namespace(steps=16, save=2, window=0.3, seed=0, anywhere=False)
    found = kills.survive(BY_NAME["opens2v"], tmp_path, 1, 2, options)
    assert found["kills"] == 2 and found["equal"] and found["losses_equal"]


ONE_PAIR = {"bagel": ["--gradient-accumulation-steps", "1"], "multimodal": ["--grad-accum", "1"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "float phase 1", "float phase 2", "bagel", "opens2v", "multimodal"])
def test_going_back_trains_what_an_undisturbed_run_of_that_branch_trains(name, tmp_path, monkeypatch):
    system = BY_NAME[name]
    monkeypatch.setitem(small.model.SIZES, "mini", small.WIDTHS)
    monkeypatch.setitem(small.objectives.DECODERS, "mini", (64, 1))
    script = "multimodal/train.py" if name == "multimodal" else system.script
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main

    def train(folder, *more):
        line = system.arguments(tmp_path, tmp_path / folder, 1, 20, 4)[1:]
        main([*line, *ONE_PAIR.get(name, ["--global-batch-size", "2"]), *more])
        return tmp_path / folder / system.place

    branch = ["--learning-rate", "1e-5"]
    old = final_tensors(train("back"))
    (step_12,) = (path.parent for path in tmp_path.rglob("manifest.json") if read_manifest(path.parent)["step"] == 12)
    new = final_tensors(train("back", "--resume", str(step_12), *branch))
    train("undisturbed", "--max-steps", "12")
    assert same_bits(new, final_tensors(train("undisturbed", *branch))) and not same_bits(new, old)


@pytest.mark.slow
def test_a_cache_whose_writing_was_killed_is_the_undisturbed_one(tmp_path):
    options = argparse.Namespace(kills=1, window=0.2, seed=0)
    assert precompute.survive("dit", tmp_path, 1, options) == (1, True)


@pytest.mark.slow
@pytest.mark.distributed
def test_phase_one_of_float_trains_on_two_ranks_as_on_one(tmp_path):
    options = argparse.Namespace(steps=4, adam_epsilon=1e-4)
    system = BY_NAME["float phase 1"]
    one = strategies.train(system, tmp_path, "one", "none", 1, options)
    two = strategies.train(system, tmp_path, "two", "fsdp", 2, options)
    assert strategies.difference(one, two) < 1e-6


@pytest.mark.slow
def test_the_planned_memory_is_what_real_steps_take():
    schema, presets, workload = memory.cases()["opens2v"]
    config = load_config(schema, presets=presets, argv=["--config", "small"])
    planned, measured, *_ = memory.compare(config, workload, "none", init_distributed("cpu"))
    assert 0.95 < planned / measured < 1.05


SLOW_DISK = """
import os, time
_sync = os.fsync
def fsync(handle):
    time.sleep(float(os.environ.get("SLOW_FSYNC", 0)))
    _sync(handle)
os.fsync = fsync
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_save_that_takes_longer_than_thirty_seconds_survives_the_schedulers_signal(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "sitecustomize.py").write_text(SLOW_DISK)
    out, system = tmp_path / "out", BY_NAME["dit"]
    line = system.arguments(tmp_path, out, 2, 100_000, 100_000)
    process = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "launch.sh"), "--gpus", "2", "dit", *line[1:]],
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "disk"), "SLOW_FSYNC": "6"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and len(losses(out)) > 20):
        time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)  # whatever was reached: nothing may go on behind the test
    process.wait(timeout=200)
    step = max(losses(out))
    assert time.monotonic() - began > 30, "the save was not slow enough to show anything"
    assert json.loads((newest(out) / "manifest.json").read_text())["step"] >= step


@pytest.mark.slow
def test_a_signal_in_the_last_save_of_a_phase_starts_no_other(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "sitecustomize.py").write_text(SLOW_DISK)
    out, system = tmp_path / "out", BY_NAME["whole float"]
    line = system.arguments(tmp_path, out, 1, 8, 100)
    process = subprocess.Popen(
        [sys.executable, *line],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "disk"), "SLOW_FSYNC": "0.7"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for text in process.stdout:
        if text.startswith("Step 8, Loss"):
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    process.wait(timeout=120)
    assert "phase 2" not in rest and not (out / "features").exists(), rest
    assert json.loads((newest(out / "autoencoder") / "manifest.json").read_text())["step"] == 8
    run(1, *line, timeout=280)
    assert (out / "DONE").exists() and (out / "autoencoder" / "DONE").exists()


def test_an_unknown_system_is_refused():
    with pytest.raises(SystemExit, match="unknown systems"):
        chosen(["dat"])


def test_every_listed_breakage_still_has_its_place():
    found = breakages.breakages()
    assert len(found) >= 10 and len({breakage.name for breakage in found}) == len(found)
    for breakage in found:
        text = (ROOT / breakage.file).read_text(encoding="utf-8")
        assert text.count(breakage.old) == 1, f"{breakage.name}: {breakage.file} has changed; name the new place"
