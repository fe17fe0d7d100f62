"""The table of plans: the recipe's samples stay, sizes between are as measured, and every system prints one."""

import pytest
import torch
from torch import nn

from float import train_autoencoder
from shared.config import RunSection, Section, TrainingSection
from shared.plan.table import Workload, _extended, plan_run
from tests.launching import ROOT

WIDTH = 64


class Settings(Section):
    run: RunSection = RunSection(plan_table=True, precision="fp32", world_size=8, gpu="h100")
    training: TrainingSection = TrainingSection(batch_size=8, gradient_accumulation_steps=2)


def build(config):
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def step(config):
    return lambda model: model(torch.randn(config.training.batch_size, 32, WIDTH)).square().mean()


WORK = Workload("toy", build, step)


def rows(text: str) -> list[dict[str, str]]:
    title, heads, *lines = text.splitlines()
    return [dict(zip(heads.replace("memory GB", "memory_GB").split(), line.split(), strict=False)) for line in lines]


def test_every_plan_takes_the_recipes_samples():
    found = rows(plan_run(WORK, Settings()))
    assert {(row["GPUs"], row["strategy"]) for row in found} >= {("1", "none"), ("2", "ddp"), ("8", "zero3")}
    for row in found:
        assert int(row["micro"]) * int(row["accum"]) * int(row["GPUs"]) == 16 == int(row["samples/step"])


def test_a_size_between_is_as_measured():
    measured = {}
    for size in (1, 2, 6):
        config = Settings(training=TrainingSection(batch_size=size))
        measured[size] = WORK.measure(config)
    line = _extended(measured[1], measured[2], 6)
    assert line.step_flops == measured[6].step_flops
    assert line.live_bytes(0.5) == pytest.approx(measured[6].live_bytes(0.5), rel=0.05)


def test_without_the_table_one_plan_of_exactly_these_settings():
    run = RunSection(precision="fp32", gpu="h100")
    text = plan_run(WORK, Settings(run=run))
    assert "samples per step    16 = 8 a micro-batch x 2 micro-steps x 1 ranks" in text


@pytest.mark.slow
def test_a_system_prints_the_table(capsys, tmp_path):
    flags = ["--config", "small", "--dry-run", "--plan-table", "--world-size", "2", "--gpu", "h100"]
    train_autoencoder.main([*flags, "--strategy", "ddp", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "recompute" in printed and " zero3 " in printed and " fsdp " in printed


@pytest.mark.parametrize("system", ["dit", "float", "bagel", "opens2v", "multimodal"])
def test_no_system_plans_past_the_planner(system):
    """A call of make_plan in a system would make --plan-table a flag without effect there."""
    texts = [path.read_text() for path in (ROOT / system).glob("*.py")]
    assert not any("make_plan(" in text for text in texts) and any("plan_run(" in text for text in texts)
