"""Contrastive losses over all ranks, and the gradient cache that lets accumulation enlarge the batch.

Legend: n rows of this rank, N rows of all ranks, E embedding width.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.nn import functional

from shared.engine.dist import is_distributed

Key = Tensor  # int64 (n, 2): hash of the caption and of the item that a pair belongs to


class _Gather(torch.autograd.Function):
    """All ranks' rows in rank order. Backward sums every rank's gradient for these rows (a reduce-scatter).

    Each rank's feature gradient is then R times that of one process; the average over ranks that data-parallel training
    takes of parameter gradients divides by R, so that parameters get exactly the gradient of one process.
    """

    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        context.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(torch_dist.get_world_size())]
        torch_dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        torch_dist.all_reduce(total)
        return total.narrow(0, torch_dist.get_rank() * context.rows, context.rows)


def gather(rows: Tensor) -> Tensor:
    """(N, ...) rows of all ranks, with gradient; every rank has equally many. The rows themselves on one rank."""
    return _Gather.apply(rows) if is_distributed() else rows


def positives(keys: Key, all_keys: Key, offset: int) -> Tensor:
    """bool (n, N): pairs that belong together: row i with column i + offset, and equal captions or equal items."""
    same = (keys[:, None] == all_keys[None]).any(-1)
    rows = torch.arange(len(keys), device=keys.device)
    same[rows, rows + offset] = True
    return same


def contrastive_loss(
    kind: str,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    bias: Tensor,
    keys: Key | None = None,
    *,
    all_ranks: bool = True,
) -> Tensor:
    """This rank's loss for n pairs of unit rows (n, E) against all ranks' rows; its mean over ranks is the loss of all
    N pairs.

    infonce: S = scale X Y^T, (CE(S) + CE(S^T)) / 2, mean over rows (Radford et al. 2021).
    siglip:  z = scale X Y^T + bias, -(1/n) sum log sigmoid(+-z) (Zhai et al. 2023, divided by rows).
    keys: rows with an equal caption or item count as positives too (equal shares of the target). all_ranks false:
    these rows alone. fp32 throughout.
    """
    first, second = first.float(), second.float()
    with torch.autocast(first.device.type, enabled=False):
        shared = all_ranks and is_distributed()
        collect = gather if shared else lambda rows: rows
        all_second = collect(second)
        offset = torch_dist.get_rank() * len(first) if shared else 0
        same = None if keys is None else positives(keys, collect(keys), offset)
        if kind == "siglip":
            logits = scale * first @ all_second.T + bias
            if same is None:
                same = torch.zeros_like(logits, dtype=torch.bool)
                rows = torch.arange(len(first), device=first.device)
                same[rows, rows + offset] = True
            sign = same.to(logits.dtype) * 2 - 1
            return -functional.logsigmoid(sign * logits).sum() / len(first)
        if same is None:
            target: Tensor = torch.arange(len(first), device=first.device) + offset
        else:
            target = same.float() / same.sum(1, keepdim=True)
        forward = functional.cross_entropy(scale * first @ all_second.T, target)
        backward = functional.cross_entropy(scale * second @ collect(first).T, target)
        return (forward + backward) / 2


class Pairing(NamedTuple):
    """One contrastive term: the names of its embeddings, temperature, bias and keys, and its weight."""

    first: str
    second: str
    scale: str
    bias: str
    keys: str
    weight: float


def total_loss(
    kind: str, pairings: list[Pairing], outputs: dict[str, Tensor], keys: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the contrastive terms, and each by name."""
    total, terms = outputs[pairings[0].first].new_zeros(()), {}
    for p in pairings:
        own = None if keys is None else keys[p.keys]
        loss = contrastive_loss(kind, outputs[p.first], outputs[p.second], outputs[p.scale], outputs[p.bias], own)
        total = total + p.weight * loss
        terms[f"{p.first}_{p.second}".replace("_embeds", "")] = loss.detach()
    return total, terms


# --- gradient cache (Gao et al. 2021) ---------------------------------------------------------------------------------


class CachedStep:
    """Gradients of the loss of a whole step with respect to every embedding, from a first pass without gradient.

    encode(index) runs micro-batch `index` and returns its outputs by name; it is run again, with gradient and the same
    random state, in the second pass, where `surrogate` turns the cached gradients into a loss.
    """

    def __init__(
        self,
        encode: Callable[[int], dict[str, Tensor]],
        micro_batches: int,
        kind: str,
        pairings: list[Pairing],
        keys: list[dict[str, Tensor]] | None,
    ):
        self.micro_batches, self.states, outputs = micro_batches, [], []
        # First pass: embeddings alone. Its random state is kept, so that dropout hides the same units in the second.
        for index in range(micro_batches):
            self.states.append(_random_state())
            with torch.no_grad():
                outputs.append(encode(index))
        after = _random_state()
        whole = sorted({name for p in pairings for name in (p.scale, p.bias)})
        rows = sorted({name for p in pairings for name in (p.first, p.second)})
        # The loss of all pairs of the step, from embeddings that are leaves of their own: cheap, and its gradient with
        # respect to each embedding is all that the towers need to know of the other micro-batches.
        leaves = {name: torch.cat([output[name].float() for output in outputs]).requires_grad_() for name in rows}
        leaves |= {name: outputs[0][name].detach().float().clone().requires_grad_() for name in whole}
        merged = None if keys is None else {name: torch.cat([key[name] for key in keys]) for name in keys[0]}
        with torch.enable_grad():
            loss, self.terms = total_loss(kind, pairings, leaves, merged)
            loss.backward()
        self.loss = loss.detach()
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}  # no bias in infonce
        self.row_gradients = {name: found[name].split([len(output[name]) for output in outputs]) for name in rows}
        self.whole_gradients = {name: found[name] for name in whole if name in found}
        _set_random_state(after)

    @contextlib.contextmanager
    def replay(self, index: int) -> Iterator[None]:
        """Run micro-batch `index` with the random numbers of the first pass."""
        _set_random_state(self.states[index])
        yield

    def surrogate(self, index: int, outputs: dict[str, Tensor]) -> Tensor:
        """A loss whose gradient is this micro-batch's part, and whose value is its share of the step's loss."""
        parts = [(outputs[name].float() * gradients[index]).sum() for name, gradients in self.row_gradients.items()]
        parts += [outputs[name] * gradient / self.micro_batches for name, gradient in self.whole_gradients.items()]
        total = sum(parts)
        return total + (self.loss / self.micro_batches - total).detach()


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
