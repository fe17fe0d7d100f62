"""No way of going on, back or down loses a run: identity, pruning, ends, stops, locks, and what is compared."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.config import load_saved
from shared.engine import checkpoint
from shared.engine.checkpoint import CheckpointStore, open_run, read_manifest, verify
from shared.engine.dist import DistInfo, StopFlag
from shared.engine.preflight import preflight
from shared.errors import CheckpointError, UserError
from shared.loop import finished_checkpoint, steps_done
from tests.launching import ENVIRONMENT, ROOT, final_tensors, run, same_bits
from tests.shared import toy
from tests.shared.test_resume import case, flip_a_bit, run_here, write

BRANCH = {"learning_rate": 1e-4}


def checkpoints(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").glob("step_*"))


def at(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:08d}"


# --- going back -------------------------------------------------------------------------------------------------------


def test_going_back_keeps_the_new_training_and_sets_the_old_aside(tmp_path, capfd):
    run_here(case(tmp_path / "run", training={"save_steps": 4}))
    old = final_tensors(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    back = {"run": {"resume": str(at(tmp_path / "run", 12))}, "training": {"save_steps": 4, **BRANCH}}
    result = run_here(case(tmp_path / "run", **back))
    said = capfd.readouterr().out
    assert result.checkpoint == at(tmp_path / "run", 20) and "going back" in said and "after step 12 lie in" in said
    assert "training.learning_rate was 0.003, is 0.0001" in said

    undisturbed = {"run": {"resume": str(at(tmp_path / "copy", 12))}, "training": {"save_steps": 4, **BRANCH}}
    run_here(case(tmp_path / "branch", **undisturbed))  # the same branch in a folder of its own
    new = final_tensors(tmp_path / "run")
    assert same_bits(new, final_tensors(tmp_path / "branch")) and not same_bits(new, old)
    (aside,) = tmp_path.glob("run/checkpoints.after-step-12-*")
    assert sorted(path.name for path in aside.glob("step_*")) == ["step_00000016", "step_00000020"]
    assert "step" in (aside / "metrics.jsonl").read_text() and verify(aside / "step_00000020")
    assert open_run(tmp_path / "run").name == "step_00000020"
    settings = (at(tmp_path / "run", 20) / "config.yaml").read_text()
    assert "learning_rate: 0.0001" in settings and read_manifest(at(tmp_path / "run", 20))["run"]["parent"]

    assert run_here(case(tmp_path / "run", **back)).step == 20  # the same command again, as a scheduler gives it
    assert "it goes on from its newest checkpoint" in capfd.readouterr().out
    assert len(list(tmp_path.glob("run/checkpoints.after-*"))) == 1 and same_bits(new, final_tensors(tmp_path / "run"))
    longer = {"training": {"save_steps": 4, "total_steps": 24, **BRANCH}}
    assert run_here(case(tmp_path / "run", **longer)).step == 24
    assert "resumed from " + str(at(tmp_path / "run", 20)) in capfd.readouterr().out


def test_going_back_twice_makes_two_branches(tmp_path):
    run_here(case(tmp_path / "run", training={"save_steps": 4, "total_steps": 12, "eval_steps": None}))
    ends = []
    for rate in (1e-4, 2e-4):
        training = {"learning_rate": rate, "total_steps": 12, "save_steps": 4}
        back = {"run": {"resume": str(at(tmp_path / "run", 8))}, "training": training}
        run_here(case(tmp_path / "run", **back))
        ends.append(final_tensors(tmp_path / "run"))
    assert not same_bits(*ends) and len(list(tmp_path.glob("run/checkpoints.after-step-8-*"))) == 2


def test_what_is_refused_sets_nothing_aside(tmp_path):
    run_here(case(tmp_path / "run", training={"save_steps": 4, "total_steps": 12, "eval_steps": None}))
    before = checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match="run.seed was 42, is 7"):
        run_here(case(tmp_path / "run", run={"resume": str(at(tmp_path / "run", 4)), "seed": 7}))
    assert checkpoints(tmp_path / "run") == before and not list(tmp_path.glob("run/checkpoints.*"))


def test_a_restarted_process_goes_on_although_it_was_told_to_start_again(tmp_path):
    described = case(tmp_path / "run", run={"resume": "none"}, training={"total_steps": 6})
    run_here(described)
    assert toy.run_case(described, DistInfo(restart=1)).checkpoint == at(tmp_path / "run", 6)
    assert not list(tmp_path.glob("run/checkpoints.*"))


# --- pruning, damage, ends --------------------------------------------------------------------------------------------


def damage_all(run_folder: Path) -> None:
    for folder in (run_folder / "checkpoints").glob("step_*"):
        flip_a_bit(folder)


def another_format(run_folder: Path) -> None:
    for path in (run_folder / "checkpoints").glob("step_*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))


def no_manifests(run_folder: Path) -> None:
    for path in (run_folder / "checkpoints").glob("step_*/manifest.json"):
        path.unlink()


def links_to_a_disk_that_is_not_there(run_folder: Path) -> None:
    for folder in (run_folder / "checkpoints").glob("step_*"):
        folder.rename(run_folder / folder.name)
        folder.symlink_to("/nowhere/disk")


@pytest.mark.parametrize("damage", [damage_all, another_format, no_manifests, links_to_a_disk_that_is_not_there])
def test_checkpoints_of_which_none_can_be_read_stop_the_start(tmp_path, damage):
    run_here(case(tmp_path / "run", training={"total_steps": 9}))
    damage(tmp_path / "run")
    before = checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds 3 checkpoint\(s\), and none can be read.*--resume none, which keeps"):
        run_here(case(tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == before
    assert run_here(case(tmp_path / "run", run={"resume": "none"}, training={"total_steps": 3})).step == 3
    (aside,) = tmp_path.glob("run/checkpoints.before-*")
    assert sorted(path.name for path in aside.iterdir() if path.name.startswith("step_")) == before


def test_a_checkpoint_that_its_disk_cannot_read_is_passed_over(tmp_path, monkeypatch, capfd):
    run_here(case(tmp_path / "run", training={"total_steps": 9}))
    describe = checkpoint._describe

    def bad_sector(path: Path) -> dict:
        if "00000009" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return describe(path)

    monkeypatch.setattr(checkpoint, "_describe", bad_sector)
    assert open_run(tmp_path / "run") == at(tmp_path / "run", 6)
    assert "Input/output error" in capfd.readouterr().out


def test_links_to_checkpoints_are_replaced_and_pruned(tmp_path):
    run_here(case(tmp_path / "run", training={"total_steps": 9, "save_steps": 3}))
    for step in (3, 6):  # moved to a larger disk
        at(tmp_path / "run", step).rename(tmp_path / f"moved_{step}")
        at(tmp_path / "run", step).symlink_to(tmp_path / f"moved_{step}")
    flip_a_bit(tmp_path / "moved_6")
    flip_a_bit(at(tmp_path / "run", 9))
    assert run_here(case(tmp_path / "run", training={"total_steps": 9, "save_steps": 3, "keep_last": 2})).step == 9
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_symlink()] == []
    assert verify(at(tmp_path / "run", 6)) and verify(tmp_path / "moved_3") and not list(tmp_path.rglob(".tmp-*"))


def test_damaged_checkpoints_take_no_place_among_those_that_are_kept(tmp_path):
    steps = {"save_steps": 4, "total_steps": 12, "eval_steps": None}
    run_here(case(tmp_path / "run", training=steps))
    flip_a_bit(at(tmp_path / "run", 8))
    flip_a_bit(at(tmp_path / "run", 12))
    steps |= {"save_steps": 1, "keep_last": 2}
    run_here(case(tmp_path / "run", training={**steps, "max_steps": 7}))
    assert {"step_00000006", "step_00000007"} <= set(checkpoints(tmp_path / "run"))
    assert open_run(tmp_path / "run").name == "step_00000007"
    assert run_here(case(tmp_path / "run", training=steps)).step == 12 and verify(at(tmp_path / "run", 12))
    assert not {"step_00000008", "step_00000010"} & set(checkpoints(tmp_path / "run"))  # 8: written over, pruned


def test_epoch_checkpoints_that_were_asked_for_and_all_without_a_limit_are_kept(tmp_path):
    epochs = {
        "batch_size": 25,
        "save_every_n_epochs": 2,
        "save_steps": 1,
        "keep_last": 2,
        "total_steps": 12,
        "eval_steps": None,
    }
    run_here(case(tmp_path / "epochs", training=epochs))  # 4 steps an epoch
    assert checkpoints(tmp_path / "epochs") == ["step_00000008", "step_00000011", "step_00000012"]
    run_here(case(tmp_path / "all", training={"save_steps": 1, "keep_last": None, "total_steps": 7}))
    assert len(checkpoints(tmp_path / "all")) == 7


def test_a_checkpoint_that_was_touched_is_hashed_again_before_it_counts(tmp_path):
    store = CheckpointStore(tmp_path, DistInfo(), keep_last=2)
    for step in (1, 2, 3, 4):
        if step == 4:
            path = tmp_path / "s3" / "w.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        tensors = {"w.safetensors": ([("w", (3,), torch.float32)], [torch.zeros(3)])}
        store.save(f"s{step}", step=step, trainer={}, meta={}, tensors=tensors)
    assert sorted(path.name for path in store.folders()) == ["s2", "s3", "s4"]


def test_what_others_hid_among_the_checkpoints_stays(tmp_path):
    run_here(case(tmp_path / "run", training={"total_steps": 3}))
    (tmp_path / "run" / "checkpoints" / ".nfs0001").write_text("")
    (tmp_path / "run" / "checkpoints" / ".mine").mkdir()
    run_here(case(tmp_path / "run", training={"total_steps": 6}))
    assert {".nfs0001", ".mine"} <= set(os.listdir(tmp_path / "run" / "checkpoints"))


def fail(model, step):
    raise RuntimeError("out of memory in the validation")


def test_a_failing_last_validation_costs_nothing(tmp_path, monkeypatch):
    described = case(tmp_path / "run", training={"total_steps": 8, "eval_steps": None, "save_steps": None})
    monkeypatch.setattr(toy, "validate", fail)
    with pytest.raises(RuntimeError, match="in the validation"):
        run_here(described)
    assert open_run(tmp_path / "run").name == "step_00000008" and steps_done(tmp_path / "run") == -1
    monkeypatch.undo()
    result = run_here(described)
    assert result.finished and "val/loss" in result.metrics and steps_done(tmp_path / "run") == 8
    run_here(case(tmp_path / "whole", training=described["training"]))
    assert same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "run"))
    states = [json.loads((at(tmp_path / name, 8) / "trainer.json").read_text()) for name in ("run", "whole")]
    assert states[0] == states[1] and states[0]["run_state"]["best"] is not None


def test_a_run_always_says_which_checkpoint_it_ended_at(tmp_path):
    described = case(tmp_path / "run", training={"total_steps": 6})
    assert run_here(described).checkpoint == run_here(described).checkpoint == at(tmp_path / "run", 6)
    assert finished_checkpoint(tmp_path / "run") == at(tmp_path / "run", 6)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000003\n")  # killed before it was written
    assert run_here(described).checkpoint == finished_checkpoint(tmp_path / "run") == at(tmp_path / "run", 6)
    flip_a_bit(at(tmp_path / "run", 6))
    assert finished_checkpoint(tmp_path / "run") is None
    whole = final_tensors(run_folder_of(run_here(described).checkpoint))
    run_here(case(tmp_path / "other", training={"total_steps": 6}))
    assert same_bits(whole, final_tensors(tmp_path / "other"))


def run_folder_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent


@pytest.mark.parametrize("text", ["", "six\n", "\0\0\0"])
def test_an_unreadable_mark_of_the_end_is_no_end(tmp_path, text):
    run_here(case(tmp_path / "run", training={"total_steps": 3}))
    (tmp_path / "run" / "DONE").write_text(text)
    assert steps_done(tmp_path / "run") == -1 and finished_checkpoint(tmp_path / "run") is None
    assert run_here(case(tmp_path / "run", training={"total_steps": 3})).finished
    assert steps_done(tmp_path / "run") == 3


def test_a_kill_between_the_two_renames_of_a_replacement_is_undone(tmp_path):
    run_here(case(tmp_path / "run", training={"total_steps": 6}))
    at(tmp_path / "run", 6).rename(tmp_path / "run" / "checkpoints" / ".tmp-old-step_00000006-4711")
    result = run_here(case(tmp_path / "run", training={"total_steps": 6}))
    assert result.checkpoint == at(tmp_path / "run", 6) and "step_00000006" in checkpoints(tmp_path / "run")


def deep(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 20_000 + "]" * 20_000)


def pipe(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../../secret"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def a_list(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"step": 9, "files": ["a"], "sha256": "x"}')


def a_negative_step(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"step": -9, "files": {}, "sha256": "x"}')


@pytest.mark.parametrize("damage", [deep, pipe, outside, a_list, a_negative_step])
def test_a_manifest_that_is_none_is_passed_over(tmp_path, damage):
    run_here(case(tmp_path / "run", training={"total_steps": 9}))
    damage(at(tmp_path / "run", 9))
    assert open_run(tmp_path / "run").name == "step_00000006"
    with pytest.raises(CheckpointError, match="manifest.json is missing or unreadable|no complete checkpoint"):
        open_run(at(tmp_path / "run", 9))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_changed_setting_is_said_and_the_precision_is_fixed(tmp_path, capfd):
    run_here(case(tmp_path / "run", training={"total_steps": 3}))
    changed = {"learning_rate": 1e-3, "weight_decay": 0.3, "max_grad_norm": 0.5, "warmup_steps": 2, "total_steps": 4}
    run_here(case(tmp_path / "run", training={**changed, "ema_decay": 0.5}))
    said = capfd.readouterr().out
    assert all(f"changed setting: training.{name} was" in said for name in [*changed, "ema_decay"])
    run_here(case(tmp_path / "run", training={**changed, "ema_decay": 0.5}))
    assert "changed setting" not in capfd.readouterr().out
    with pytest.raises(UserError, match="run.precision was 'fp32', is 'bf16'"):
        run_here(case(tmp_path / "run", run={"precision": "bf16"}, training={**changed, "ema_decay": 0.5}))


OTHERS = {
    "training": {
        "learning_rate": 0.5, "weight_decay": 0.3, "max_grad_norm": 0.01, "ema_decay": 0.5, "warmup_steps": 100,
        "batch_size": 3, "gradient_accumulation_steps": 2, "eval_steps": 7, "sample_steps": 3, "total_steps": 30,
        "adam_beta1": 0.5,
    },
    "run": {"precision": "bf16", "strategy": "fsdp", "seed": 7},
}  # fmt: skip


@pytest.mark.distributed
def test_settings_that_differ_on_one_rank_are_refused_by_name(tmp_path):
    cases = [
        {**case(tmp_path / name), "rank_1": {part: {name: value}}, "expect": True}
        for part, settings in OTHERS.items()
        for name, value in settings.items()
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    run(2, Path(toy.__file__), path)
    for part, settings in OTHERS.items():
        for name in settings:
            for rank in (0, 1):
                found = toy.error_file(tmp_path / name, rank).read_text()
                assert "rank 1 has other settings than rank 0" in found and f"{part}.{name} is" in found


@pytest.mark.distributed
def test_another_frozen_base_or_other_first_weights_on_one_rank_are_refused(tmp_path):
    cases = [{**case(tmp_path / name), "rank_1": {"shift": name}, "expect": True} for name in ("frozen", "head")]
    cases.append({**case(tmp_path / "code"), "rank_1": {"code": "of another commit"}, "expect": True})
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    run(2, Path(toy.__file__), path)
    assert "other frozen base weights" in toy.error_file(tmp_path / "frozen", 0).read_text()
    assert "other first weights" in toy.error_file(tmp_path / "head", 1).read_text()
    assert "code is 'of another commit' instead of" in toy.error_file(tmp_path / "code", 0).read_text()


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_signal_left():
    """Signals stop a run, also where the tests were started by nohup, and none is left for the next test."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)
    StopFlag.pending = None


def test_a_signal_in_the_last_step_leaves_the_end_to_the_same_command(tmp_path, monkeypatch, no_signal_left):
    described = case(tmp_path / "run", training={"total_steps": 8, "eval_steps": None})
    monkeypatch.setattr(toy, "validate", fail)  # not called: there is no time for it

    def stop(self, step):
        if step == 7:
            signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(toy, "after_step", stop, raising=False)
    original = toy.losses

    def stopping(described):
        hook = original(described)

        def losses(model, batches, step):
            if step == 7:
                signal.raise_signal(signal.SIGHUP)
            yield from hook(model, batches, step)

        return losses

    monkeypatch.setattr(toy, "losses", stopping)
    result = run_here(described)
    assert (result.step, result.finished, result.stopped_by, result.interrupted) == (8, False, "SIGHUP", "SIGHUP")
    assert result.checkpoint == at(tmp_path / "run", 8) and steps_done(tmp_path / "run") == -1
    monkeypatch.undo()
    assert run_here(described).finished and steps_done(tmp_path / "run") == 8


def test_a_signal_in_the_last_validation_stops_the_next_phase(tmp_path, monkeypatch, no_signal_left):
    original = toy.validate

    def stopping(model, step):
        signal.raise_signal(signal.SIGTERM)
        return original(model, step)

    monkeypatch.setattr(toy, "validate", stopping)
    first = run_here(case(tmp_path / "one", training={"total_steps": 4, "eval_steps": None}))
    assert first.finished and first.interrupted == "SIGTERM" and steps_done(tmp_path / "one") == 4
    monkeypatch.undo()
    second = run_here(case(tmp_path / "two", training={"total_steps": 4}))
    assert (second.step, second.finished, second.stopped_by) == (0, False, "SIGTERM")
    assert run_here(case(tmp_path / "two", training={"total_steps": 4})).finished


def test_a_hang_up_that_is_ignored_stays_so(no_signal_left):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_early_stopped_run_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "validate", lambda model, step: {"loss": float(step)})
    patience = {"eval_steps": 2, "early_stopping_patience": 2, "total_steps": 20}
    assert run_here(case(tmp_path / "run", training=patience)).step == 6
    again = run_here(case(tmp_path / "run", training=patience))
    assert again.step == 6 and again.finished and again.stopped_by.startswith("no better")
    assert open_run(tmp_path / "run").name == "step_00000002"  # the best one


# --- one run a folder, and what is checked before ---------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from shared.engine.preflight import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(tmp_path):
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    holder = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"run is in use by process {holder.pid} on .* since"):
            run_here(case(tmp_path / "run", training={"total_steps": 2}))
        assert os.listdir(tmp_path / "run") == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    assert run_here(case(tmp_path / "run", training={"total_steps": 2})).finished
    assert not (tmp_path / "run" / ".lock").exists()


def settings(tmp_path: Path, **changes) -> toy.Config:
    run = {"output_dir": str(tmp_path / "out"), "device": "cpu", **changes.pop("run", {})}
    return toy.Config(run=run, training={"total_steps": 4, **changes.pop("training", {})})


FAULTS = [
    ({"run": {"precision": "fp16"}}, "--precision fp16 needs CUDA"),
    ({"run": {"cpu_offload": True}}, "--cpu-offload works with the strategies"),
    ({"run": {"fsdp_replicas": 2}}, "--fsdp-replicas 2 works with the strategy fsdp, not with none"),
    ({"run": {"ddp_bf16": True, "strategy": "fsdp"}}, "--ddp-bf16 works with the strategy ddp, not with fsdp"),
    ({"training": {"keep_products": True}}, "--keep-products says what --gradient-checkpointing keeps"),
    (
        {"training": {"keep_products": True, "gradient_checkpointing": True, "compile": True}},
        "--keep-products looks into the blocks that --compile closes",
    ),
    ({"training": {"float8": True}}, "--float8 needs a GPU that multiplies in float8 .* found cpu"),
    ({"run": {"fsdp_replicas": 2, "strategy": "fsdp"}}, "--fsdp-replicas 2: 1 ranks cannot be dealt"),
    ({"run": {"resume": "/nowhere/checkpoint"}}, "/nowhere/checkpoint: no such checkpoint"),
    ({"run": {"output_dir": "  "}}, "--output-dir is empty"),
    ({"run": {"output_dir": "/proc/self/status/x"}}, "is not a folder"),
    ({"training": {"global_batch_size": 7, "batch_size": 2}}, "global_batch_size 7 is not divisible"),
    ({"training": {"num_workers": 100_000}}, "--num-workers 100000: this machine has"),
    ({"training": {"best_metric": "val/los"}}, "--best-metric val/los: no validation gives it; did you mean val/loss"),
]


@pytest.mark.parametrize("changes, message", FAULTS)
def test_preflight_finds_it_and_leaves_no_file(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        preflight(settings(tmp_path, **changes), DistInfo(), metrics=["val/loss"])
    assert not os.listdir(tmp_path)


def test_preflight_looks_at_the_loggers_the_other_phases_and_the_model_folders(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(UserError, match=f"--{name} needs the package {name}: pip install {name}"):
            preflight(settings(tmp_path, run={name: True}), DistInfo())
    monkeypatch.undo()
    with pytest.raises(UserError, match="global_batch_size 7"):
        phase = settings(tmp_path, training={"global_batch_size": 7, "batch_size": 2})
        preflight(settings(tmp_path), DistInfo(), phases=[phase])
    folder = tmp_path / "clip"
    for message, name in (("no such folder", None), ("config.json is missing", "config.json"), ("weights", "m.bin")):
        with pytest.raises(UserError, match=message):
            preflight(settings(tmp_path), DistInfo(), folders={"text_path": folder, "other": None})
        folder.mkdir(exist_ok=True)
        if name is not None:
            (folder / name).write_text("{}")
    preflight(settings(tmp_path), DistInfo(), folders={"text_path": folder})


def test_a_folder_with_a_run_of_another_system_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("model: {codec: wan, ffn_dim: 8, text_rows: 4}\n")
    with pytest.raises(UserError, match="--output-dir .*out: holds a run of another system .its model has .'codec'"):
        preflight(settings(tmp_path), DistInfo())
    from dit.config import Config as Dit

    with pytest.raises(UserError, match="config.yaml: not of this system .its model has .'codec', 'ffn_dim'"):
        load_saved(Dit, tmp_path / "out" / "config.yaml")


def test_a_metric_that_no_validation_gives_is_refused_in_the_first_one(tmp_path):
    with pytest.raises(UserError, match="--best-metric val/nothing: the validation gives val/draw, val/loss"):
        run_here(case(tmp_path / "run", training={"total_steps": 4, "best_metric": "val/nothing"}))


def test_a_disk_that_cannot_take_one_checkpoint_is_said_before_the_first_step(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"the disk is full: a checkpoint takes 0\.\d MB, 0\.1 MB are free"):
        run_here(case(tmp_path / "run"))
    assert not checkpoints(tmp_path / "run")


def test_a_trainer_state_of_another_form_is_a_sentence(tmp_path):
    run_here(case(tmp_path / "run", training={"total_steps": 3}))
    folder = at(tmp_path / "run", 3)
    for change in ({"run_state": {"steps": 3}}, {"run_state": None}, {"optimizer_steps": None}):
        trainer = json.loads((folder / "trainer.json").read_text())
        forge(folder, {**trainer, **change})
        with pytest.raises(CheckpointError, match="trainer.json is not one of a run"):
            run_here(case(tmp_path / "run"))
        forge(folder, trainer)


def forge(folder: Path, trainer: dict) -> None:
    from shared.engine.checkpoint import _describe, _digest

    (folder / "trainer.json").write_text(json.dumps(trainer))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = _describe(folder / "trainer.json")
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))


@pytest.mark.slow
@pytest.mark.distributed
def test_going_back_on_two_ranks(tmp_path):
    run(2, Path(toy.__file__), write(tmp_path, **case(tmp_path / "run", training={"save_steps": 4})))
    back = case(tmp_path / "run", run={"resume": str(at(tmp_path / "run", 12))}, training={"save_steps": 4, **BRANCH})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    run(2, Path(toy.__file__), write(tmp_path, **back))
    other = {"resume": str(at(tmp_path / "copy", 12))}
    path = write(tmp_path, **case(tmp_path / "branch", run=other, training={"save_steps": 4, **BRANCH}))
    run(2, Path(toy.__file__), path)
    assert same_bits(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "branch"))


def test_a_folder_that_is_removed_under_the_run_is_made_again(tmp_path, monkeypatch):
    original = toy.losses

    def removing(described):
        hook = original(described)

        def losses(model, batches, step):
            if step == 4:
                shutil.rmtree(tmp_path / "run")
            yield from hook(model, batches, step)

        return losses

    monkeypatch.setattr(toy, "losses", removing)
    assert run_here(case(tmp_path / "run", training={"total_steps": 9, "save_in_background": False})).finished
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "train.log", "metrics.jsonl", "DONE"} <= names
    assert "was removed while" in (tmp_path / "run" / "train.log").read_text() and verify(at(tmp_path / "run", 9))


def test_a_validation_that_is_not_finite_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(toy, "validate", lambda model, step: {"loss": float("inf")})
    assert run_here(case(tmp_path / "run", training={"total_steps": 3})).finished
    assert "warning: val/loss is not finite" in capfd.readouterr().out


def test_weights_of_the_same_folder_are_read_before_the_run_is_set_aside(tmp_path, capfd):
    run_here(case(tmp_path / "run", training={"total_steps": 6}))
    file = at(tmp_path / "run", 6) / "model.safetensors"
    run_here(case(tmp_path / "run", run={"resume": str(file)}, training={"total_steps": 2}))
    assert "weights taken from" in capfd.readouterr().out and checkpoints(tmp_path / "run") == ["step_00000002"]
    (aside,) = tmp_path.glob("run/checkpoints.before-*")
    assert (aside / "step_00000006").is_dir()
