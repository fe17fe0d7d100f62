"""Settings of the loop that no preset changes: what is best, when it is better enough, how often ranks are compared."""

import importlib
from pathlib import Path

import pytest

from shared import loop
from shared.engine.dist import DistInfo
from shared.plan import table
from tests.launching import final_tensors, same_bits
from tests.shared import toy

SCORES = [3.0, 2.0, 2.5, 1.95, 1.9]  # of validations at steps 4, 8, ...


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """run(name, **training) -> the result, where the validations give SCORES one after another."""

    def run(name: str, **training):
        scores = iter(SCORES)
        monkeypatch.setattr(toy, "validate", lambda model, step: {"loss": next(scores)})
        settings = {"total_steps": 20, "eval_steps": 4, "save_in_background": False, **training}
        return toy.run_case({"output_dir": str(tmp_path / name), "training": settings}, DistInfo())

    return run


def best_of(folder: Path) -> str:
    return (folder / "checkpoints" / "best").read_text().strip()


def test_the_best_is_the_smallest_or_the_largest_score(fit, tmp_path):
    assert fit("small").best == 1.9 and best_of(tmp_path / "small") == "step_00000020"
    assert fit("large", best_mode="max").best == 3.0 and best_of(tmp_path / "large") == "step_00000004"


def test_a_gain_below_min_delta_is_none_and_patience_counts_it(fit, tmp_path):
    result = fit("patient", early_stopping_patience=3, early_stopping_min_delta=0.2)
    assert result.best == 2.0 and result.step == 20  # 2.5, 1.95 and 1.9 are no gain: stopped after the third
    assert "no better val/loss in 3 validations" in (tmp_path / "patient" / "train.log").read_text()
    assert fit("impatient", early_stopping_patience=1, early_stopping_min_delta=0.2).step == 12


@pytest.mark.parametrize("every, seen", [(0, []), (8, [0, 8, 16]), (1000, [0])])
def test_ranks_compare_their_gradients_at_the_first_step_and_every_so_many(tmp_path, monkeypatch, every, seen):
    steps = []
    monkeypatch.setattr(loop, "check_gradients_agree", lambda strategy, step: steps.append(step))
    case = {"output_dir": str(tmp_path), "run": {"check_gradients_every": every}, "training": {"eval_steps": None}}
    toy.run_case(case, DistInfo())
    assert steps == seen


def test_workers_read_so_many_batches_ahead_and_change_nothing(tmp_path):
    for name, workers in (("none", 0), ("two", 2)):
        training = {"prefetch_factor": 3, "total_steps": 4}
        case = {"output_dir": str(tmp_path / name), "training": training, "num_workers": workers}
        toy.run_case(case, DistInfo())
    assert same_bits(final_tensors(tmp_path / "none"), final_tensors(tmp_path / "two"))


def test_one_wait_for_the_others_is_as_long_as_the_setting_says(monkeypatch, capsys):
    """Every train.py hands run.timeout_minutes to the process group, in seconds."""
    from dit import train
    from shared.errors import UserError

    def stop(device, seconds):
        raise UserError(f"waits {seconds} s")

    monkeypatch.setattr(train, "init_distributed", stop)
    with pytest.raises(SystemExit):
        train.main(["--config", "small", "--timeout-minutes", "0.5"])
    assert "waits 30.0 s" in capsys.readouterr().err


def test_the_planner_counts_the_gpus_of_a_node():
    from dit.config import PRESETS, Config
    from dit.plan import workload
    from shared.config import load_config

    texts = []
    for count in ("8", "4"):
        words = ["--config", "small", "--world-size", "8", "--strategy", "ddp", "--gpus-per-node", count]
        config = load_config(Config, presets=PRESETS, argv=words)
        texts.append(table.plan_run(workload(config), config))
    assert "within a node" in texts[0] and "between nodes" in texts[1]


@pytest.mark.parametrize("script", ["dit.train", "float.train", "float.train_autoencoder"])
def test_a_best_metric_that_no_validation_gives_is_refused_before_anything_is_trained(script, tmp_path, capsys):
    train = importlib.import_module(script)
    with pytest.raises(SystemExit) as left:
        train.main(["--config", "small", "--best-metric", "val/nothing", "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "val/nothing" in said and "val/loss" in said
    assert not (tmp_path / "out").exists()
