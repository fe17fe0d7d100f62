"""Moving average of the trainable weights, kept where the fp32 weights live (sharded under fsdp and zero3)."""

import contextlib

import torch
from torch import Tensor

from shared.engine.strategy import Strategy


class EMA:
    """values <- decay values + (1 - decay) weights after every applied optimizer step.

    warmup: decay min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that a short run does not evaluate its
    initial weights.
    """

    def __init__(self, strategy: Strategy, decay: float, warmup: bool = True):
        self.strategy, self.decay, self.warmup, self.updates = strategy, decay, warmup, 0
        self.values = {name: strategy.local_value(name).clone() for name in strategy.parameters}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of this step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = [self.strategy.local_value(name) for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), weights, 1 - decay)
        self.updates += 1

    def applied(self) -> contextlib.AbstractContextManager:
        """A context in which the model runs with the averaged weights."""
        return self.strategy.swapped(self.values)

    def full(self, name: str) -> Tensor:
        """The whole averaged tensor on the CPU; a collective."""
        return self.strategy.gather_local(name, self.values[name])

    def load_full(self, name: str, value: Tensor) -> None:
        """Put a whole tensor into place; every rank passes the same one."""
        self.values[name].copy_(self.strategy.split_full(name, value))
