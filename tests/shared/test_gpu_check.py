"""scripts/gpu_check.sh at toy size on the CPU: right steps, a table, going on, and what it refuses."""

import importlib
import json

import pytest
import torch
from torch import nn

from scripts.bench import check
from shared.plan.table import Workload

TOY = ["--device", "cpu", "--toy", "--system", "float", "--rounds", "1"]


class Net(nn.Linear):
    """A layer that is wrong by a thousandth where it is told to be."""

    error = 0.0

    def forward(self, x):
        return super().forward(x) * (1 + self.error)


def workload(**_) -> Workload:
    return Workload(
        "toy", lambda config: Net(8, 8), lambda config: lambda model: model(torch.randn(4, 8)).square().mean()
    )


@pytest.mark.slow
def test_a_check_writes_its_table_and_goes_on_where_it_was_cut(tmp_path, capsys, monkeypatch):
    check.main([*TOY, "--output", str(tmp_path), "--minutes", "1e-9"])
    found = json.loads((tmp_path / "gpu_check.json").read_text()) if (tmp_path / "gpu_check.json").exists() else None
    assert found is None and "goes on with: right float" in capsys.readouterr().out
    check.main([*TOY, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert set(found["parts"]) == {"right float", "speed float"}
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| float fp32 | 0.0e+00 | 0.0e+00 | 0.0001 | met |" in text and "float small, not compiled" in text
    monkeypatch.setattr(check, "compare", lambda *_: pytest.fail("what is done is not done again"))
    check.main([*TOY, "--output", str(tmp_path)])


def test_a_device_that_computes_something_else_is_found(monkeypatch):
    rows = check.compare(workload(), None, torch.device("cpu"))
    assert [row["met"] for row in rows] == [True, True]
    real = check.one_step

    def wrong(work, config, device, precision):
        loss, gradients = real(work, config, device, precision)
        calls.append(precision)
        return (loss * 1.001, gradients) if len(calls) == 2 else (loss, gradients)

    calls: list[str] = []
    monkeypatch.setattr(check, "one_step", wrong)
    assert [row["met"] for row in check.compare(workload(), None, torch.device("cpu"))] == [False, True]


def test_inputs_are_the_same_whatever_was_drawn_before():
    device = torch.device("cpu")
    first = check.one_step(workload(), None, device, "fp32")
    torch.randn(100)
    again = check.one_step(workload(), None, device, "fp32")
    assert first[0] == again[0] and torch.equal(first[1]["weight"], again[1]["weight"])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--device", "cpu"], "works with --toy only"),
        (["--system", "nothing"], "--system nothing: unknown"),
        (["--device", "cuda"], "no CUDA device was found"),
    ],
)
def test_what_cannot_be_checked_is_said(words, sentence, capsys, tmp_path):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as left:
        check.main([*words, "--output", str(tmp_path / "out")])
    assert left.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("system", ["bagel", "dit", "float", "multimodal", "opens2v"])
def test_the_model_of_a_check_has_finite_weights(system):
    bench = importlib.import_module(f"scripts.bench.{system}")
    config = bench.settings("small")
    torch.use_deterministic_algorithms(True)  # memory without values is filled with NaN
    try:
        model = bench.workload(config).build(config)
    finally:
        torch.use_deterministic_algorithms(False)
    values = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, value in values if not value.isfinite().all()] == []
