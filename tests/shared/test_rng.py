"""Keyed draws: a row depends on its key alone."""

import itertools

import pytest
import torch

from shared.rng import keyed_generator, keyed_rand, keyed_randn, keyed_seed, seed_everything


@pytest.mark.parametrize("draw", [keyed_randn, keyed_rand])
def test_a_row_is_the_same_in_any_batch(draw):
    whole = draw((3, 2), key=(1, 7, 0), slots=torch.arange(8))
    assert whole.shape == (8, 3, 2) and whole.dtype == torch.float32
    for split in ([8], [4, 4], [1] * 8, [3, 5]):
        parts = [draw((3, 2), key=(1, 7, 0), slots=slots) for slots in torch.arange(8).split(split)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([5, 0, 7])
    assert torch.equal(draw((3, 2), key=(1, 7, 0), slots=order), whole[order])


def test_the_draws_are_normal_and_uniform():
    slots = torch.arange(500)
    normal, uniform = keyed_randn((40,), key=(0, 1), slots=slots), keyed_rand((40,), key=(0, 1), slots=slots)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    # rows of neighbouring slots are as unrelated as any: correlation of 40 numbers has a deviation of 0.16
    assert torch.corrcoef(normal).fill_diagonal_(0).abs().mean() < 0.15


def test_neighbouring_keys_never_collide():
    grid = list(itertools.product(range(8), repeat=3))
    keys = grid + list(itertools.product(range(8), repeat=2)) + [(i,) for i in range(8)]
    keys += [(*key, 0, 0) for key in grid]  # a longer key is another key, also with zeros at its end
    keys += [(2**32 + 1,), (1, 1), (2**32, 0), (2**63 - 1, 5), (5, 2**63 - 1)]
    assert len({keyed_seed(*key) for key in dict.fromkeys(keys)}) == len(set(keys))
    assert all(0 <= keyed_seed(*key) < 2**63 for key in grid)


def test_a_seed_is_the_same_in_every_process():
    assert keyed_seed(42, 101, 0) == keyed_seed(42, 101, 0)
    first = keyed_randn((2,), key=(42, 1, 0), slots=torch.tensor([0]))
    assert first[0].tolist() == pytest.approx([0.6049635, 0.7697422], abs=1e-6)


def test_draws_are_made_on_the_cpu_and_leave_the_global_state_alone():
    assert keyed_generator(1, 2).device.type == "cpu"
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drawn = keyed_randn((2,), key=(1,), slots=torch.arange(2))
    assert drawn.device.type == "cpu" and torch.equal(torch.rand(3), expected)


def test_a_negative_key_is_refused():
    with pytest.raises((ValueError, OverflowError)):
        keyed_seed(1, -1)


def test_seed_everything_repeats_and_separates():
    import random

    import numpy as np

    def numbers(*key):
        seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert numbers(1, 2, 3) == numbers(1, 2, 3)
    assert all(a != b for a, b in zip(numbers(1, 2, 3), numbers(1, 2, 4), strict=True))
