"""Randomness as a function of keys.

A draw keyed by (seed, step, sample) is the same on any rank, with any number of workers, after any resume.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def keyed_seed(*key: int) -> int:
    """A 63-bit seed mixed from integers in [0, 2**64); different keys give unrelated seeds (numpy SeedSequence)."""
    # SeedSequence fills up with zeros and cuts large numbers in two: length and width are made part of the key.
    words = [len(key), *(word for number in key for word in divmod(number, 2**32))]
    word = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return word & (2**63 - 1)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator for one key."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_randn(
    shape: tuple[int, ...], *, key: tuple[int, ...], slots: Tensor, device: torch.device | None = None
) -> Tensor:
    """Standard normal (B, *shape), float32, on `device` (None: that of slots); row i depends on key and slots[i] alone.

    slots: int64 (B,), best on the CPU: the host reads them, and would wait for a GPU's. Drawn on the CPU, so that CPU
    and GPU see the same numbers.
    """
    return _keyed(torch.randn, shape, key, slots, device)


def keyed_rand(
    shape: tuple[int, ...], *, key: tuple[int, ...], slots: Tensor, device: torch.device | None = None
) -> Tensor:
    """Uniform in [0, 1), otherwise as keyed_randn."""
    return _keyed(torch.rand, shape, key, slots, device)


def _keyed(
    draw: Callable, shape: tuple[int, ...], key: tuple[int, ...], slots: Tensor, device: torch.device | None
) -> Tensor:
    device = slots.device if device is None else device
    rows = torch.empty(len(slots), *shape, pin_memory=device.type == "cuda")  # a copy that the host need not wait for
    for row, slot in zip(rows, slots.tolist(), strict=True):
        draw(shape, generator=keyed_generator(*key, slot), out=row)
    return rows.to(device, non_blocking=True)


def seed_everything(*key: int) -> None:
    """Seed python, numpy and torch (all devices). The loop does so before every step: no RNG state is saved."""
    seed = keyed_seed(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
