"""What a conversation has said so far: keys and values of every layer, and the position of the next token.

Letters of shapes: L new tokens, S tokens of a context, H heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel.modules.transformer import Pair, Rows, scaled_dot_product


@dataclass
class Context:
    """One conversation. Keys (after norm and rotation) and values are (S, H, K) a layer; they are never changed in
    place, so a copy shares them.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    kv_len: int = 0  # tokens
    rope: int = 0  # rotary position of the next token; an image takes one

    def copy(self) -> "Context":
        return Context(list(self.keys), list(self.values), self.kv_len, self.rope)

    def same_as(self, other: "Context") -> bool:
        """Whether both hold the very same tensors."""
        return (self.kv_len, self.rope) == (other.kv_len, other.rope) and all(
            mine is theirs for mine, theirs in zip(self.keys, other.keys, strict=True)
        )

    def advance(self, tokens: int, positions: int) -> None:
        self.kv_len += tokens
        self.rope += positions


class CachedAttention:
    """Attention of new tokens over their own contexts; stores the new keys and values when asked."""

    def __init__(
        self, contexts: Sequence[Context], query_lens: Sequence[int], rows: Rows, *, causal: bool, store: bool
    ):
        self.contexts, self.query_lens, self.rows = contexts, list(query_lens), rows
        self.causal, self.store = causal, store

    @torch.compiler.disable  # lengths change with every call
    def __call__(self, layer: int, query: Pair, key: Pair, value: Pair) -> Pair:
        kind = query[1].dtype
        parts = [self.rows.join(pair).split(self.query_lens) for pair in (query, key, value)]
        outputs = []
        for context, new_query, new_key, new_value in zip(self.contexts, *parts, strict=True):
            if layer < len(context.keys):
                old_key, old_value = context.keys[layer], context.values[layer]
                new_key = torch.cat([old_key, new_key.to(old_key.dtype)])
                new_value = torch.cat([old_value, new_value.to(old_value.dtype)])
            if self.store:
                _put(context.keys, layer, new_key)
                _put(context.values, layer, new_value)
            outputs.append(scaled_dot_product(new_query.to(new_key.dtype), new_key, new_value, causal=self.causal))
        return self.rows.part(torch.cat(outputs).to(kind))


def _put(tensors: list[Tensor], layer: int, value: Tensor) -> None:
    if layer < len(tensors):
        tensors[layer] = value
    else:
        tensors.append(value)
