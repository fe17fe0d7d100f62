"""Attention of a pack on a CPU, split by split and without masks, as one node of the autograd graph.

A pack holds a few dozen splits, most of them shorter than a hundred tokens. Slices and concatenations of each, with
their gradients, would take as long as the kernel itself, so this node calls the kernel and its gradient on views of
the pack. Letters of shapes: L tokens, H heads, K head width, Q queries, S keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Segment:
    """Queries of one call of attention: `start:stop` of the pack, and the spans of keys they see; causal among the last
    `stop - start` keys.
    """

    def __init__(self, start: int, stop: int, key_spans: list[tuple[int, int]], causal: bool):
        self.start, self.stop, self.key_spans, self.causal = start, stop, key_spans, causal
        self.num_queries = stop - start
        self.num_keys = sum(end - begin for begin, end in key_spans)
        self._mask: Tensor | None = None

    def rule(self, query: Tensor) -> tuple[bool, Tensor | None]:
        """Who sees whom as the kernel takes it: whether its causal rule serves, and a mask, the same for all layers."""
        older = self.num_keys - self.num_queries
        if not self.causal or not older:
            return self.causal, None
        if self._mask is None:  # the kernel's causal rule is aligned to the upper left
            hidden = query.new_full((self.num_queries, self.num_keys), -torch.inf)
            self._mask = hidden.triu_(older + 1)
        return False, self._mask

    def seen(self, x_1HLK: Tensor) -> Tensor:
        """The keys that the queries see (1, H, S, K); a view where they stand side by side."""
        pieces = [x_1HLK[:, :, begin:end] for begin, end in self.key_spans]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    def add_to(self, total_1HLK: Tensor, part_1HSK: Tensor) -> None:
        """What the keys of this segment add to a sum over the pack."""
        pieces = part_1HSK.split([end - begin for begin, end in self.key_spans], 2)
        for (begin, end), piece in zip(self.key_spans, pieces, strict=True):
            total_1HLK[:, :, begin:end].add_(piece)


class _Sliced(torch.autograd.Function):
    """The segments' queries follow one another; keys and values may be seen by several, and sum up their gradients."""

    @staticmethod
    def forward(context, query_LHK: Tensor, key_LHK: Tensor, value_LHK: Tensor, segments: Sequence[Segment]) -> Tensor:
        query, key, value = map(_for_kernel, (query_LHK, key_LHK, value_LHK))
        outputs, sums = [], []
        for segment, queries in zip(segments, _by_queries(query, segments), strict=True):
            causal, mask = segment.rule(query)
            out, log_sum = _kernel(queries, segment.seen(key), segment.seen(value), 0.0, causal, attn_mask=mask)
            outputs.append(_from_kernel(out))
            sums.append(log_sum)
        out_LHK = torch.cat(outputs)
        context.save_for_backward(query, key, value, _for_kernel(out_LHK), *sums)
        context.segments = segments
        return out_LHK

    @staticmethod
    def backward(context, grad_LHK: Tensor):
        query, key, value, out, *sums = context.saved_tensors
        segments = context.segments
        pieces = (_by_queries(x, segments) for x in (_for_kernel(grad_LHK), query, out))
        grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for segment, grad, queries, seen, log_sum in zip(segments, *pieces, sums, strict=True):
            causal, mask = segment.rule(query)
            parts = _kernel_backward(
                grad, queries, segment.seen(key), segment.seen(value), seen, log_sum, 0.0, causal, attn_mask=mask
            )
            grad_query.append(_from_kernel(parts[0]))
            segment.add_to(grad_key, parts[1])
            segment.add_to(grad_value, parts[2])
        return torch.cat(grad_query), _from_kernel(grad_key), _from_kernel(grad_value), None


def _for_kernel(x_LHK: Tensor) -> Tensor:
    """(L, H, K) -> (1, H, L, K), a view."""
    return x_LHK.transpose(0, 1)[None]


def _from_kernel(x_1HLK: Tensor) -> Tensor:
    """(1, H, L, K) -> (L, H, K), a view."""
    return x_1HLK[0].transpose(0, 1)


def _by_queries(x_1HLK: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """Views of the queries of each segment."""
    return x_1HLK.split([segment.num_queries for segment in segments], 2)


def sliced_attention(query_LHK: Tensor, key_LHK: Tensor, value_LHK: Tensor, segments: Sequence[Segment]) -> Tensor:
    """(L, H, K), scale 1/sqrt(K), of segments whose queries cover the pack in its order; groups of query heads share
    keys and values. Under autocast in its type, as the kernel by its public name.
    """
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query_LHK.dtype
    return _Sliced.apply(*(x.to(kind) for x in (query_LHK, key_LHK, value_LHK)), segments)
