"""Learning rates by hand, and which parameter belongs to which group."""

import pytest
import torch
from torch import nn

from shared.config import TrainingSection
from shared.loop import lr_at
from shared.optim import adamw, decay_groups

# (schedule, warm-up, least share, {step: rate as a share of the peak}) for 110 steps
TABLE = [
    ("constant", 0, 0.0, {0: 1, 50: 1, 109: 1}),
    ("constant", 10, 0.0, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 109: 1}),
    ("linear", 10, 0.0, {0: 0.1, 9: 1, 10: 1, 35: 0.75, 60: 0.5, 85: 0.25, 110: 0, 500: 0}),
    ("linear", 10, 0.2, {9: 1, 10: 1, 60: 0.6, 110: 0.2}),
    ("cosine", 10, 0.0, {9: 1, 10: 1, 60: 0.5, 110: 0, 500: 0}),
    ("cosine", 10, 0.1, {10: 1, 35: 0.1 + 0.9 * 0.8535533905932737, 60: 0.55, 110: 0.1, 500: 0.1}),
    ("wsd", 10, 0.0, {9: 1, 10: 1, 60: 1, 90: 1, 95: 0.75, 100: 0.5, 110: 0}),
    ("wsd", 0, 0.5, {0: 1, 87: 1, 99: 0.75, 110: 0.5}),
]


@pytest.mark.parametrize(("kind", "warmup", "least", "expected"), TABLE)
def test_learning_rates_by_hand(kind, warmup, least, expected):
    training = TrainingSection(
        learning_rate=4e-3, lr_scheduler_type=kind, warmup_steps=warmup, min_lr_ratio=least, total_steps=110
    )
    found = {step: lr_at(step, training, 110) / 4e-3 for step in expected}
    assert found == pytest.approx(expected, abs=1e-9)


def test_after_the_warm_up_no_schedule_rises():
    for kind in ("constant", "linear", "cosine", "wsd"):
        training = TrainingSection(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=7)
        rates = [lr_at(step, training, 100) for step in range(120)]
        assert all(a < b for a, b in zip(rates[:6], rates[1:7], strict=True))
        assert all(a >= b for a, b in zip(rates[7:-1], rates[8:], strict=True)) and min(rates) >= 0


def test_a_warm_up_longer_than_the_run_only_rises():
    training = TrainingSection(learning_rate=1.0, warmup_steps=50)
    assert [lr_at(step, training, 10) for step in (0, 9)] == [1 / 50, 10 / 50]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.table = nn.Embedding(5, 3)
        self.tied = self.table


def test_matrices_decay_vectors_and_scalars_do_not():
    groups = {group["weight_decay"]: group for group in decay_groups(Net(), 0.1)}
    assert set(groups) == {0.0, 0.1} and all(group["lr_scale"] == 1.0 for group in groups.values())
    assert sorted(groups[0.1]["names"]) == ["encoder.0.weight", "head.weight", "table.weight"]
    assert sorted(groups[0.0]["names"]) == [
        "encoder.0.bias",
        "encoder.1.bias",
        "encoder.1.weight",
        "head.bias",
        "scale",
    ]


def test_the_longest_prefix_scales_the_learning_rate():
    groups = decay_groups(Net(), 0.0, {"encoder": 0.1, "encoder.1": 0.5, "scale": 10.0})
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["encoder.0.weight"] == scales["encoder.0.bias"] == 0.1
    assert scales["encoder.1.weight"] == 0.5 and scales["scale"] == 10.0 and scales["head.weight"] == 1.0
    assert len(scales) == 8 and not any(name.startswith("frozen") for name in scales)


def test_decay_moves_matrices_alone():
    net, training = Net(), TrainingSection(learning_rate=0.5, weight_decay=0.1)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = adamw(decay_groups(net, 0.1), parameters, training)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in parameters.items():
        factor = 1 - 0.5 * 0.1 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


def test_the_first_step_is_the_learning_rate_along_the_sign():
    net, training = Net(), TrainingSection(learning_rate=0.01, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-12)
    parameters = {"head.weight": net.head.weight}
    before = net.head.weight.detach().clone()
    optimizer = adamw([{"names": ["head.weight"], "weight_decay": 0.0, "lr_scale": 1.0}], parameters, training)
    net.head.weight.grad = torch.randn_like(before)
    optimizer.step()
    assert torch.allclose(net.head.weight, before - 0.01 * net.head.weight.grad.sign(), atol=1e-6)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
