"""What a run writes down, and what of it a resumed run keeps."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from shared.config import RunSection
from shared.engine.dist import DistInfo
from shared.log import RunLog, read_metrics


def open_log(folder, *, resume_step=0, rank=0):
    return RunLog(folder, RunSection(output_dir=str(folder)), DistInfo(rank=rank), resume_step=resume_step)


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_every_line_starts_with_its_step(tmp_path):
    log = open_log(tmp_path)
    log.write(1, {"train/loss": 0.5, "val/loss": 2.0})
    log.write(2, {"train/loss": 0.25})
    assert len(lines(tmp_path)) == 2  # there before the run ends
    log.close()
    assert lines(tmp_path)[0] == '{"step": 1, "train/loss": 0.5, "val/loss": 2.0}'
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 2, "train/loss": 0.25}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = open_log(tmp_path)
    log.write(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1.0, "e": 3})
    log.close()
    row = json.loads(lines(tmp_path)[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0, "e": 3}


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 7):
        log.write(step, {"train/loss": 1.0 / step})
    log.write(4, {"val/loss": 9.0})
    log.say("first")
    log.close()
    log = open_log(tmp_path, resume_step=4)
    log.write(5, {"train/loss": 7.0})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5]
    assert rows[4]["val/loss"] == 9.0 and rows[-1]["train/loss"] == 7.0
    assert "first" in (tmp_path / "train.log").read_text()  # the text goes on


def test_a_last_line_cut_short_is_left_out(tmp_path):
    log = open_log(tmp_path)
    log.write(1, {"train/loss": 1.0})
    log.write(2, {"train/loss": 2.0})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_metrics(path)] == [1]
    log = open_log(tmp_path, resume_step=2)
    log.write(3, {"train/loss": 3.0})
    log.close()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 3]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_window_is_averaged_over_its_steps(tmp_path):
    log = open_log(tmp_path)
    for step in range(4):
        log.add({"loss": torch.tensor(float(step), requires_grad=True), "rate": 2.0 * step})
    log.add({"rare": torch.tensor(5.0)})
    assert log.close_window() == {"loss": 1.5, "rate": 3.0, "rare": 5.0}
    log.add({"loss": 8.0})
    assert log.close_window() == {"loss": 8.0}  # nothing is left of the window before
    log.close()


def test_a_tensor_that_is_added_is_not_changed(tmp_path):
    log, loss = open_log(tmp_path), torch.tensor(1.0)
    log.add({"loss": loss})
    log.add({"loss": loss})
    assert loss.item() == 1.0 and log.close_window() == {"loss": 1.0}
    log.close()


def test_errors_are_averaged_in_ten_bins_of_time(tmp_path):
    log = open_log(tmp_path)
    log.add({"by_t": (torch.tensor([0.0, 0.05, 0.35, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))})
    log.add({"by_t": (torch.tensor([0.09, 0.95]), torch.tensor([8.0, 9.0], requires_grad=True))})
    assert log.close_window() == pytest.approx({"by_t_0": 4.0, "by_t_3": 5.0, "by_t_9": 8.0})
    log.close()


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = open_log(tmp_path / "run", rank=1)
    log.say("hello")
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_line_goes_to_the_console_and_to_the_file(tmp_path, capsys):
    log = open_log(tmp_path)
    log.say("Step 1, Loss: 0.5")
    log.close()
    assert capsys.readouterr().out == "Step 1, Loss: 0.5\n"
    assert (tmp_path / "train.log").read_text().endswith(" Step 1, Loss: 0.5\n")


def test_wandb_project_and_run_name_are_handed_on_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    """With a stand-in for the package: nothing is sent anywhere."""
    begun = []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(log=lambda row, step=None: None, finish=lambda: None)

    stand_in = SimpleNamespace(init=init, util=SimpleNamespace(generate_id=lambda: f"id{len(begun)}"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for _ in range(2):
        run = RunSection(output_dir=str(tmp_path), wandb=True, wandb_project="birds", run_name="third try")
        RunLog(tmp_path, run, DistInfo(rank=0)).close()
    assert [(one["project"], one["name"], one["id"]) for one in begun] == [("birds", "third try", "id0")] * 2
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    RunLog(tmp_path, run, DistInfo(rank=0)).close()
    assert [one["dir"] for one in begun] == [str(tmp_path)] * 2 + [str(tmp_path / "elsewhere")]
    assert (tmp_path / "elsewhere").is_dir()
