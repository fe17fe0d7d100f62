"""One optimizer step: clipped and scaled as torch does it, left out when the gradient is not finite, without reading
anything from the device; and the loop takes its outcome in late without changing anything.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import TrainingSection
from shared.data import to_device
from shared.engine.dist import DistInfo
from shared.engine.strategy import Strategy
from shared.optim import decay_groups
from shared.rng import keyed_rand, keyed_randn
from tests.shared.toy import run_case


class NoReading(TorchDispatchMode):
    """Fails where the host takes a number from a tensor."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        return function(*arguments, **(named or {}))


def made(precision="fp32", **training) -> Strategy:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    strategy = Strategy("none", DistInfo(), precision, TrainingSection(learning_rate=1e-2, **training))
    strategy.prepare(model, decay_groups(model, 0.01))
    return strategy


def loss_of(model, scale=1.0):
    return scale * model(torch.linspace(-1, 1, 24).reshape(4, 6)).square().mean()


def state_of(strategy):
    moments = [strategy.full(kind, name) for kind in ("weight", "exp_avg") for name in strategy.parameters]
    return [None if value is None else value.clone() for value in moments]


@pytest.mark.parametrize("limit, scale", [(None, 1.0), (1.0, 1.0), (1.0, 1e-3), (0.05, 30.0)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_is_that_of_torch(limit, scale, precision):
    strategy, torchs = made(precision, max_grad_norm=limit), made()
    for _ in range(3):
        strategy.backward(loss_of(strategy.model, scale))
        loss_of(torchs.model, scale).backward()
        norm = nn.utils.clip_grad_norm_(torchs.model.parameters(), limit or float("inf"))
        torchs.optimizer.step()
        torchs.optimizer.zero_grad()
        done = strategy.optimizer_step()
        assert done.applied and done.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for found, expected in zip(state_of(strategy), state_of(torchs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_step_reads_nothing_from_the_device(limit):
    strategy = made(max_grad_norm=limit)
    strategy.backward(loss_of(strategy.model))
    with NoReading():
        done = strategy.optimizer_step()
    with pytest.raises(AssertionError, match="reads a number"), NoReading():
        done.grad_norm  # noqa: B018


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, limit, precision):
    strategy = made(precision, max_grad_norm=limit)
    strategy.backward(loss_of(strategy.model))
    strategy.optimizer_step()
    before, steps, scale = state_of(strategy), strategy.steps_taken(), strategy.scale.value
    strategy.backward(loss_of(strategy.model) * bad)
    done = strategy.optimizer_step()
    assert not done.applied and strategy.steps_taken() == steps
    assert all(torch.equal(one, two) for one, two in zip(before, state_of(strategy), strict=True))
    assert strategy.scale.value == (scale / 2 if precision == "fp16" else 1)
    strategy.backward(loss_of(strategy.model))
    assert strategy.optimizer_step().applied


def test_the_average_is_the_same_whenever_a_step_is_taken_in(tmp_path):
    """Writing a checkpoint or a log line takes the step in at once, training on takes it in one step later."""
    found = {}
    for name, every in (("each", 1), ("late", 100)):
        training = {
            "total_steps": 7,
            "save_steps": every,
            "logging_steps": every,
            "ema_decay": 0.9,
            "ema_warmup": False,
            "keep_last": 9,
        }
        run_case({"output_dir": str(tmp_path / name), "nan_at": 3, "training": training}, DistInfo())
        found[name] = load_file(tmp_path / name / "checkpoints" / "step_00000007" / "ema.safetensors")
    assert all(torch.equal(value, found["late"][name]) for name, value in found["each"].items())
    rows = [json.loads(line) for line in (tmp_path / "late" / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "train/grad_norm" in row)
    assert row["step"] == 7 and row["train/skipped"] == 1
    # by hand, from the weights that were saved after every step: the one left out does not count
    folders = [tmp_path / "each" / "checkpoints" / f"step_{step:08d}" for step in range(1, 8)]
    weights, averages = ([load_file(folder / f"{kind}.safetensors") for folder in folders] for kind in ("model", "ema"))
    for step in range(1, 7):
        for name, value in averages[step].items():
            own = weights[step][name] if step != 3 else averages[2][name]
            torch.testing.assert_close(value, 0.9 * averages[step - 1][name] + 0.1 * own, atol=1e-6, rtol=0)
    assert all(torch.equal(averages[3][name], value) for name, value in averages[2].items())


def test_slots_stay_where_the_host_reads_them():
    batch = to_device({"image": {"slot": torch.arange(3), "pixels": torch.ones(3, 2)}}, torch.device("meta"))["image"]
    assert batch["slot"].tolist() == [0, 1, 2] and batch["pixels"].device.type == "meta"
    for draw in (keyed_rand, keyed_randn):
        values = draw((2,), key=(1, 2), slots=batch["slot"], device=batch["pixels"].device)
        assert values.device.type == "meta" and values.shape == (3, 2)
        assert torch.equal(
            draw((2,), key=(1, 2), slots=batch["slot"], device=torch.device("cpu")),
            torch.stack([draw((2,), key=(1, 2), slots=torch.tensor([slot]))[0] for slot in range(3)]),
        )
