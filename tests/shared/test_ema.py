"""The moving average, by hand."""

import pytest
import torch
from torch import nn

from shared.config import TrainingSection
from shared.engine.dist import DistInfo
from shared.engine.strategy import EMA, Strategy
from shared.optim import decay_groups


def make() -> Strategy:
    strategy = Strategy("none", DistInfo(), "fp32", TrainingSection())
    model = nn.Linear(3, 2)
    strategy.prepare(model, decay_groups(model, 0.0))
    return strategy


@pytest.mark.parametrize("warmup, decays", [(False, [0.9, 0.9, 0.9]), (True, [1 / 10, 2 / 11, 3 / 12])])
def test_every_update_moves_by_one_minus_the_decay(warmup, decays):
    strategy = make()
    ema = EMA(strategy, 0.9, warmup=warmup)
    expected = strategy.full("weight", "weight").clone()
    for number, decay in enumerate(decays):
        with torch.no_grad():
            strategy.parameters["weight"].fill_(float(number + 1))
        ema.update()
        expected = decay * expected + (1 - decay) * (number + 1)
        torch.testing.assert_close(ema.full("weight"), expected, atol=1e-6, rtol=0)


def test_a_long_run_leaves_the_warm_up():
    ema = EMA(make(), 0.5)
    ema.updates = 10**6
    before, weights = ema.full("bias").clone(), ema.strategy.full("weight", "bias") + 1
    ema.strategy.load_full("weight", "bias", weights)
    ema.update()
    torch.testing.assert_close(ema.full("bias"), (before + weights) / 2)


def test_the_model_runs_with_the_average_only_inside_the_context():
    strategy = make()
    ema = EMA(strategy, 0.9)
    own = strategy.full("weight", "weight").clone()
    ema.load_full("weight", torch.zeros(2, 3))
    with ema.applied():
        assert not strategy.model(torch.ones(1, 3)).sub(strategy.full("weight", "bias")).any()
    assert torch.equal(strategy.full("weight", "weight"), own)
