"""A run that is killed or stopped ends with the weights of the undisturbed one; a damaged checkpoint is never used."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from shared.config import TrainingSection
from shared.engine.checkpoint import CheckpointStore, find_checkpoint, load_weights, newest_checkpoint, open_run
from shared.engine.dist import DistInfo
from shared.engine.strategy import KINDS, Strategy
from shared.errors import CheckpointError, UserError
from shared.optim import decay_groups
from tests.launching import ENVIRONMENT, ROOT, command, final_tensors, losses, newest, run, run_and_kill, same_bits
from tests.shared import toy

TOY = Path(__file__).parent / "toy.py"


def case(output_dir: Path, **changes) -> dict:
    training = {"batch_size": 2, "total_steps": 20, "save_steps": 3, "keep_last": 3, **changes.pop("training", {})}
    return {"output_dir": str(output_dir), "dropout": 0.2, "training": training, **changes}


def write(folder: Path, **described) -> Path:
    path = folder / f"{Path(described['output_dir']).name}.json"
    path.write_text(json.dumps([described]))
    return path


def run_here(described: dict):
    return toy.run_case(described, DistInfo())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_halves_equal_the_whole(tmp_path, num_workers):
    run_here(case(tmp_path / "whole"))
    run_here(case(tmp_path / "halves", num_workers=num_workers, training={"max_steps": 9}))
    result = run_here(case(tmp_path / "halves", num_workers=num_workers))
    assert result.step == 20 and result.finished and (tmp_path / "halves" / "DONE").exists()
    assert same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "halves"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


def test_a_finished_run_ends_at_once(tmp_path):
    run_here(case(tmp_path / "run", training={"total_steps": 4}))
    before = final_tensors(tmp_path / "run")
    assert run_here(case(tmp_path / "run", training={"total_steps": 4})).step == 4
    assert same_bits(before, final_tensors(tmp_path / "run"))


def test_moments_come_back_in_the_memory_layout_of_the_weight():
    def strategy() -> Strategy:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        made = Strategy("none", DistInfo(), "fp32", TrainingSection(learning_rate=0.1))
        made.prepare(model, decay_groups(model, 0.0))
        return made

    def step(made: Strategy, seed: int) -> None:
        picture = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        made.backward(made.model(picture).square().mean())
        made.optimizer_step()

    straight, resumed = strategy(), strategy()
    step(straight, 1)
    resumed.load_steps_taken(straight.steps_taken())
    for kind in KINDS:
        for name in straight.parameters:
            resumed.load_full(kind, name, straight.full(kind, name).contiguous().clone())
    step(straight, 2)
    step(resumed, 2)
    assert all(torch.equal(straight.full("weight", name), resumed.full("weight", name)) for name in straight.parameters)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path, world):
    steps = {"total_steps": 800 // world, "save_steps": 7, "logging_steps": 50, "eval_steps": None}
    run(world, TOY, write(tmp_path, **case(tmp_path / "whole", training=steps)))
    path, moments, kills = write(tmp_path, **case(tmp_path / "killed", training=steps)), random.Random(5), 0
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    while kills < 5 and run_and_kill(world, TOY, path, after=moments.uniform(0, 0.7), watch=latest) != 0:
        kills += 1
    run(world, TOY, path)
    assert kills >= 2, "the run ended before it could be killed; make it longer"
    assert same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "killed"))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".tmp-*/manifest.json"))


@pytest.mark.distributed
def test_sigterm_saves_the_current_step_and_leaves_with_code_0(tmp_path):
    steps = {"total_steps": 5000, "save_steps": None, "logging_steps": 10, "eval_steps": None}
    path = write(tmp_path, **case(tmp_path / "run", training=steps))
    process = subprocess.Popen(command(1, TOY, path), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("Step "):
            process.send_signal(signal.SIGTERM)
            break
    text = process.stdout.read()
    assert process.wait(timeout=60) == 0 and "stopped at step" in text and "SIGTERM" in text
    step = json.loads((newest(tmp_path / "run") / "manifest.json").read_text())["step"]
    assert step >= 10 and not (tmp_path / "run" / "DONE").exists()
    result = run_here(case(tmp_path / "run", training={**steps, "max_steps": step + 1}))
    assert result.step == step + 1


def test_the_time_limit_stops_like_a_signal(tmp_path):
    described = case(
        tmp_path / "run", run={"time_limit_minutes": 1e-4}, training={"total_steps": 10**6, "logging_steps": 10**6}
    )
    result = run_here(described)
    assert result.stopped_by == "the time limit" and not result.finished


def test_a_stop_loses_no_step_of_a_stream_that_knows_its_own_place(tmp_path, monkeypatch):
    class Counted(toy.MapStream):
        """Goes on from its state alone, and asks the run to stop when it reads its fifth step."""

        stops, count = False, 0

        def start(self, step, state=None):
            self.count = state["count"] if state else 0
            super().start(self.count)

        def next_step(self):
            self.count += 1
            if self.stops and self.count == 5:
                signal.raise_signal(signal.SIGTERM)
            return super().next_step()

        def state(self):
            return {"count": self.count}

    monkeypatch.setattr(toy, "MapStream", Counted)
    run_here(case(tmp_path / "whole"))
    monkeypatch.setattr(Counted, "stops", True)
    stopped = run_here(case(tmp_path / "stopped"))
    assert stopped.stopped_by == "SIGTERM" and stopped.step in (2, 3, 4)
    monkeypatch.setattr(Counted, "stops", False)
    run_here(case(tmp_path / "stopped"))
    assert same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "stopped"))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_restarted_worker_ends_with_the_same_weights(tmp_path):
    steps = {"total_steps": 300, "save_steps": 10, "logging_steps": 10, "eval_steps": None}
    run(2, TOY, write(tmp_path, **case(tmp_path / "whole", training=steps)))
    path = write(tmp_path, **case(tmp_path / "restarted", training=steps))
    line = command(2, TOY, path)
    line[line.index("--standalone") + 1 : 1] = []
    line.insert(line.index("--standalone") + 1, "--max-restarts=3")
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "restarted" / "train.log"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and "Step 50," in log.read_text()):
        time.sleep(0.05)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    assert "restart 1" in log.read_text()
    assert same_bits(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "restarted"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_hangs_is_named(tmp_path):
    path = write(tmp_path, **case(tmp_path / "run", hang_at=4))
    process = subprocess.Popen(
        command(2, TOY, path), cwd=ROOT, env={**ENVIRONMENT, "TOY_TIMEOUT": "8"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said, ended = "", "Sending process"  # what torchrun says when a rank has failed; it gives the other one 30 seconds
    try:
        for line in process.stderr:
            said += line
            if ended in line:
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert ended in said and "rank 1 is late: its last sign of life was at step 4" in said


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def delete_a_file(folder: Path) -> None:
    (folder / "trainer.json").unlink()


def edit_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "step": manifest["step"] + 1}))


def delete_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_here(case(folder, training={"total_steps": 9}))
    return folder


@pytest.mark.parametrize(
    "damage, word",
    [
        (truncate, "bytes"),
        (flip_a_bit, "SHA-256"),
        (delete_a_file, "missing"),
        (edit_the_manifest, "changed"),
        (delete_the_manifest, "manifest.json"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(finished, tmp_path, damage, word, capfd):
    shutil.copytree(finished, tmp_path / "run")
    whole, broken = final_tensors(tmp_path / "run"), newest(tmp_path / "run")
    damage(broken)
    chosen, passed_over = CheckpointStore(tmp_path / "run" / "checkpoints", DistInfo()).newest_valid()
    assert chosen.name == "step_00000006" and any(
        broken.name in sentence and word in sentence for sentence in passed_over
    )
    with pytest.raises(CheckpointError, match=word if damage is not delete_the_manifest else "no complete checkpoint"):
        find_checkpoint(broken)
    result = run_here(case(tmp_path / "run", training={"total_steps": 9}))  # automatic resume falls back and says so
    assert result.step == 9 and "passed over" in capfd.readouterr().out
    assert same_bits(whole, final_tensors(tmp_path / "run"))


def test_a_run_is_opened_by_one_rule_and_one_line_says_what_was_taken(finished, tmp_path, capfd):
    run = shutil.copytree(finished, tmp_path / "run")
    newest_one = open_run(run)
    assert (
        newest_one.name == "step_00000009"
        and capfd.readouterr().out == f"checkpoint: {newest_one} (step 9, the newest)\n"
    )
    assert open_run(run / "step_00000006").name == "step_00000006" and "as named" in capfd.readouterr().out
    settings = (run / "config.yaml").read_text()
    (run / "checkpoints" / "best").write_text("step_00000003\n")
    (run / "config.yaml").write_text(settings.replace("early_stopping_patience: null", "early_stopping_patience: 2"))
    assert open_run(run).name == "step_00000003" and "best by validation" in capfd.readouterr().out
    (run / "config.yaml").write_text(settings)
    flip_a_bit(newest_one)
    said = []
    assert open_run(run, said.append).name == "step_00000006" and len(said) == 1
    assert "step_00000009: model.safetensors is damaged" in said[0] and not capfd.readouterr().out
    assert find_checkpoint(run).name == "step_00000006"
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        open_run(newest_one)
    with pytest.raises(CheckpointError, match="no such checkpoint; give a run folder or one of its checkpoints"):
        open_run(tmp_path / "nothing")


def test_nothing_half_written_stays_when_the_disk_is_full(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    import shared.engine.checkpoint as checkpoint

    def full(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        run_here(case(tmp_path / "run", training={"total_steps": 12}))
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["best", "latest", "step_00000003", "step_00000006", "step_00000009"] or "best" not in names
    assert newest_checkpoint(tmp_path / "run").name == "step_00000009"


def test_other_settings_and_other_data_are_refused(finished, tmp_path, monkeypatch):

    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match="run.seed was 42, is 7"):
        run_here(case(tmp_path / "run", run={"seed": 7}))
    monkeypatch.setattr(toy.Tokens, "fingerprint", "another list")
    with pytest.raises(UserError, match="another list of samples.*--allow-data-change"):
        run_here(case(tmp_path / "run", training={"total_steps": 10}))
    assert run_here(case(tmp_path / "run", run={"allow_data_change": True}, training={"total_steps": 10})).step == 10


def test_another_frozen_base_is_refused(finished, tmp_path, monkeypatch):

    shutil.copytree(finished, tmp_path / "run")
    original = toy.Toy.__init__

    def other_base(self, *arguments, **named):
        original(self, *arguments, **named)
        self.frozen.weight.data.add_(1)

    monkeypatch.setattr(toy.Toy, "__init__", other_base)
    with pytest.raises(UserError, match="another frozen base"):
        run_here(case(tmp_path / "run"))


def test_starting_anew_keeps_the_former_checkpoints(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert run_here(case(tmp_path / "run", run={"resume": "none"}, training={"total_steps": 3})).step == 3
    assert len(list((tmp_path / "run").glob("checkpoints.before-*/step_*"))) == 3


def test_a_file_of_weights_starts_a_run_and_says_what_is_missing(finished, tmp_path, capfd):
    file = newest(finished) / "model.safetensors"
    run_here(case(tmp_path / "run", run={"resume": str(file)}, training={"total_steps": 1, "learning_rate": 0.0}))
    assert "no optimizer state" in capfd.readouterr().out
    before, after = load_weights(file), load_weights(tmp_path / "run", prefer_ema=False)
    assert all((before[name] == after[name]).all() for name in before if "weight" in name)


def test_the_newest_and_the_best_are_kept(tmp_path):
    result = run_here(
        case(
            tmp_path / "run",
            training={
                "total_steps": 20,
                "save_steps": 2,
                "eval_steps": 4,
                "keep_last": 2,
                "keep_every": 10,
                "best_metric": "val/draw",
            },
        )
    )
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")}
    best = (tmp_path / "run" / "checkpoints" / "best").read_text().strip()
    assert names == {"step_00000010", "step_00000018", "step_00000020", best} and result.best is not None


@pytest.mark.slow
def test_saving_survives_kills(tmp_path):
    """Saves in a tight loop, killed at random: what is visible is always whole."""
    script = tmp_path / "saver.py"
    script.write_text(SAVER)
    moments = random.Random(3)
    for _ in range(10):
        run_and_kill(1, script, str(tmp_path / "run"), after=moments.uniform(0, 0.5), watch=tmp_path / "run" / "latest")
        store = CheckpointStore(tmp_path / "run", DistInfo())
        chosen, passed_over = store.newest_valid()
        assert chosen is not None and not passed_over and chosen == store.listed()[0][1]


SAVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
from shared.engine.checkpoint import CheckpointStore
from shared.engine.dist import DistInfo
store, step = CheckpointStore(Path(sys.argv[1]), DistInfo()), 0
while True:
    step = (store.listed() or [(0, None)])[0][0] + 1
    value = torch.full((500_000,), float(step))
    tensors = {{"model.safetensors": ([("w", (500_000,), torch.float32)], [value])}}
    store.save(f"step_{{step:08d}}", step=step, trainer={{}}, meta={{}}, tensors=tensors)
"""


@pytest.mark.distributed
def test_one_rank_that_cannot_go_on_makes_all_raise(tmp_path):
    script = tmp_path / "one_fails.py"
    script.write_text(ONE_FAILS)
    done = run(2, script, str(tmp_path / "run"), check=False)
    text = done.stdout + done.stderr
    assert done.returncode != 0 and text.count("raised on rank") == 2 and "No space left" in text
    assert not list((tmp_path / "run").glob("*"))


ONE_FAILS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
import shared.engine.checkpoint as checkpoint
from shared.engine.dist import init_distributed
info = init_distributed("cpu", 60)
def full(*_):
    raise OSError(28, "No space left on device")
checkpoint.write_safetensors = full
tensors = {{"model.safetensors": ([("w", (2,), torch.float32)], [torch.zeros(2)])}}
try:
    checkpoint.CheckpointStore(Path(sys.argv[1]), info).save("step_1", step=1, trainer={{}}, meta={{}}, tensors=tensors)
except Exception as error:
    print(f"raised on rank {{info.rank}}: {{error}}", flush=True)
    raise SystemExit(2)
"""
