"""The benchmark's measures: turns, slopes, bars, starving loaders, tables, and a GPU's share on the CPU at toy size."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scripts.bench import bench as bench_module
from scripts.bench.bench import (
    Bench,
    BenchOptions,
    Row,
    alternate,
    planned_step,
    run_benchmark,
    slope,
    training_step,
)
from scripts.bench.gpu import make_step, matrix_peak, utilisation
from scripts.bench.kernels import breakdown, kind_of
from scripts.bench.table import find_systems, markdown, number, write_tables
from shared.config import RunSection, Section, TrainingSection
from shared.plan.table import Workload
from tests.launching import ENVIRONMENT, ROOT

CPU = torch.device("cpu")


class Config(Section):
    run: RunSection = RunSection()
    training: TrainingSection = TrainingSection()


class FakeClock:
    """A `time` that only sleeping moves, so that a busy machine changes nothing."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now

    process_time = perf_counter


class FakeStream:
    """Steps that take `seconds` of a clock to come, or those of `burst` while it lasts."""

    num_workers = 0

    def __init__(self, seconds, clock, burst=()):
        self.seconds, self.clock, self.burst = seconds, clock, list(burst)

    def start(self, step, state):
        pass

    def next_step(self):
        self.clock.sleep(self.burst.pop() if self.burst else self.seconds)

    def close(self):
        pass


def fresh(rounds=2):
    made = Bench("toy", BenchOptions(rounds=rounds))
    made.part = "peers"
    return made


def planned(seconds):
    plan = SimpleNamespace(seconds_per_step=seconds, measured=SimpleNamespace(trainable=0), world=1)
    return SimpleNamespace(plan=lambda config: plan)


def test_jobs_take_turns_and_the_order_turns_each_time():
    called = []
    seconds = alternate([lambda: called.append("a"), lambda: called.append("b")], 3)
    assert "".join(called) == "baabbaab" and [len(row) for row in seconds] == [3, 3]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_slope_is_the_exponent(exponent):
    sizes = [1, 4, 9, 100]
    assert slope(sizes, [3 * size**exponent for size in sizes]) == pytest.approx(exponent)


@pytest.mark.parametrize(
    "ratio, bar, direction, met",
    [(0.9, 0.95, "at most", True), (0.96, 0.95, "at most", False), (2.1, 2, "at least", True), (1, None, "", None)],
)
def test_a_bar_is_met_in_its_direction(ratio, bar, direction, met):
    assert Row("peers", "x", ratio, bar, direction).met is met


def test_a_pair_is_compared_per_unit_of_work():
    clock = iter(range(1000))
    row = fresh().pair(
        "step", lambda: None, lambda: None, peer="other", work=(2.0, 1.0), clock=lambda: next(clock), bar=0.6
    )
    assert row.ratio == 0.5 and row.met and row.ours == 500 and row.theirs == 1000


def test_the_default_precision_has_a_line_of_its_own():
    made, layer = fresh(1), nn.Linear(4, 4)
    step = training_step(layer, lambda: layer(torch.ones(1, 4)).sum())
    made.training_pair("step", step, step, peer="other")
    assert [row.bar for row in made.rows] == [0.95, 0.70]


@pytest.mark.parametrize("seconds, share", [(0.0, 0.0), (0.001, 0.001 / 0.101), (0.1, 0.5)])
def test_a_loader_that_is_late_starves_the_step(monkeypatch, seconds, share):
    clock = FakeClock()
    monkeypatch.setattr(bench_module, "time", clock)
    monkeypatch.setattr("shared.data.ReadAhead", lambda stream, device: stream)  # its thread would not see this clock
    made = fresh()
    made.starving("loader", FakeStream(seconds, clock), planned_step(planned(0.1), Config()))
    (row,) = made.rows
    assert row.ratio == pytest.approx(share, abs=2e-3) and row.met is (share < 0.02) and "100 ms planned" in row.note


def test_one_bad_window_is_told_and_does_not_decide(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(bench_module, "time", clock)
    monkeypatch.setattr("shared.data.ReadAhead", lambda stream, device: stream)
    made = fresh(5)
    made.starving("loader", FakeStream(0.0, clock, burst=[0.1] * 12), planned_step(planned(0.1), Config()))
    (row,) = made.rows
    assert row.ratio == 0 and "worst of 5 windows 25.0%" in row.note


def test_tables_hold_every_row(tmp_path):
    made = fresh(1)
    made.pair("step", lambda: None, lambda: sum(range(1000)), peer="other", bar=0.95)
    made.part = "scaling"
    made.series("tokens", {10: 1.0, 100: 10.0}, "ms: linear")
    rows = {"toy": [{**asdict(row), "met": row.met} for row in made.rows]}
    write_tables(tmp_path, rows, minutes=1.0)
    tree, text = json.loads((tmp_path / "bench.json").read_text()), (tmp_path / "bench.md").read_text()
    assert tree["systems"]["toy"][1]["ratio"] == pytest.approx(1.0) and tree["machine"]["cores"]
    assert "| at most 0.95: met | toy | step |" in text and "| **1.00** | toy | tokens | 10: 1, 100: 10 ms" in text
    assert text == markdown(tree["machine"], tree["systems"], 1.0)


def test_numbers_keep_three_digits():
    assert [number(value) for value in (0.01234, 12.34, 1234.5)] == ["0.0123", "12.3", "1,234"]


def test_every_system_has_a_benchmark():
    assert set(find_systems(ROOT)) == {"bagel", "dit", "float", "multimodal", "opens2v", "workshop"}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--system", "nothing"], "no scripts/bench/nothing.py"),
        (["--parts", "nothing"], "--parts nothing: unknown"),
        (["--gpu"], "--gpu needs a CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(words, sentence):
    if "--gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "scripts/bench/bench.py", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_benchmark_runs_the_parts_asked_for(tmp_path, capsys):
    parts = {"use": lambda made: made.time("nothing", lambda: None), "scaling": lambda made: 1 / 0}
    rows = run_benchmark("toy", parts, ["--parts", "use", "--rounds", "1", "--output", str(tmp_path)], None)
    assert [row.name for row in rows] == ["nothing"] and "toy use: nothing" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["systems"]["toy"][0]["part"] == "use"


# --- the GPU's table, at toy size on the CPU --------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, x):
        return self.layers(x)


TOY = Workload("toy", lambda config: Toy(), lambda config: lambda model: model(torch.randn(32, 64)).square().mean())


def test_utilisation_counts_the_model_s_flops():
    made = fresh(1)
    made.part = "gpu"
    utilisation(made, "toy", TOY, Config(), device=CPU, peak=1e12, compiled=(False,), bar=0.5)
    (row,) = made.rows
    forward = 2 * 32 * 64 * 64 * 2
    flops = forward + forward + forward // 2  # the first layer's input needs no gradient
    assert row.ratio == pytest.approx(flops / (row.ours / 1000) / 1e12) and row.met is False
    assert "not compiled" in row.name and "%" in row.note  # which kinds come first depends on what else runs


def test_the_step_trains():
    step = make_step(TOY, Config(), CPU, compiled=False)
    step()
    assert "%" in breakdown(step, CPU)


def test_the_peak_is_that_of_a_product():
    assert 1e6 < matrix_peak(CPU, side=64, rounds=2) < 1e15


def test_kernels_are_told_apart():
    names = {
        "ampere_bf16_s16816gemm_bf16_128x128": "matrix products", "flash_fwd_kernel": "attention",
        "triton_poi_fused_add_0": "compiled pointwise", "Memcpy HtoD": "copies and casts", "unheard_of": "other",
        "multi_tensor_apply_kernel": "optimizer",
    }  # fmt: skip
    assert {name: kind_of(name) for name in names} == names


def test_no_table_names_a_folder_of_this_machine(tmp_path):
    write_tables(tmp_path, {})
    assert str(Path.home()) not in (tmp_path / "bench.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("system", ["bagel", "dit", "float", "multimodal", "opens2v"])
def test_every_system_s_step_runs_as_on_a_gpu(monkeypatch, system):
    module, asked = importlib.import_module(f"scripts.bench.{system}"), []
    monkeypatch.setattr(
        "scripts.bench.gpu.utilisation", lambda bench, name, workload, config, **more: asked.append(name)
    )
    module.gpu(fresh())
    assert asked
    config = module.settings("small")
    step = make_step(module.workload(config), config, CPU, compiled=False)
    step()
    assert "matrix products" in breakdown(step, CPU)
