"""What inference remembers of a conversation: keys and values of every layer, tokens so far, the next rotary position.

Letters of shapes: L new tokens, S all tokens of a context, B texts continued together, H heads, K head width, G heads
of queries that share one of keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from bagel.modules.transformer import Pair, Rows, scaled_dot_product


@dataclass
class Context:
    """Keys (after norm and rotation) and values, one (S, H, K) a layer. Updates make new tensors and never write in
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
    """Attention of new tokens over their own contexts; stores the new keys and values when asked.

    repeats: the same contexts are read again and again, at every step of a picture: what is read is laid out once, with
    room behind it for the new keys and values of each step.
    """

    def __init__(
        self,
        contexts: Sequence[Context],
        query_lens: Sequence[int],
        rows: Rows,
        *,
        causal: bool,
        store: bool,
        repeats: bool = False,
    ):
        self.contexts, self.query_lens, self.rows = contexts, list(query_lens), rows
        self.causal, self.store, self.repeats = causal, store, repeats
        self._laid_out: dict[tuple[int, int, str], Tensor] = {}

    @torch.compiler.disable  # lengths change with every call
    def __call__(self, layer: int, query: Pair, key: Pair, value: Pair) -> Pair:
        joined = self.in_order(layer, *(self.rows.join(pair) for pair in (query, key, value)))
        return self.rows.part(joined.to(query[1].dtype))

    def in_order(self, layer: int, query_LHK: Tensor, key_LHK: Tensor, value_LHK: Tensor) -> Tensor:
        """The same for tokens in the order of the contexts, (L, H, K)."""
        parts = (x.split(self.query_lens) for x in (query_LHK, key_LHK, value_LHK))
        outputs = []
        for number, (context, query, new_key, new_value) in enumerate(zip(self.contexts, *parts, strict=True)):
            key = self._seen(number, layer, "key", context.keys, new_key)
            value = self._seen(number, layer, "value", context.values, new_value)
            if self.store:
                _put(context.keys, layer, key)
                _put(context.values, layer, value)
            outputs.append(scaled_dot_product(query.to(key.dtype), key, value, causal=self.causal))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _seen(self, number: int, layer: int, kind: str, old: list[Tensor], new_LHK: Tensor) -> Tensor:
        """What a context holds with the new tokens behind it (S, H, K)."""
        if layer >= len(old):
            return new_LHK
        if not self.repeats:
            return torch.cat([old[layer], new_LHK.to(old[layer].dtype)])
        place = (number, layer, kind)
        if place not in self._laid_out:
            self._laid_out[place] = torch.cat([old[layer], torch.empty_like(new_LHK, dtype=old[layer].dtype)])
        self._laid_out[place][len(old[layer]) :] = new_LHK
        return self._laid_out[place]


def _put(tensors: list[Tensor], layer: int, value: Tensor) -> None:
    if layer < len(tensors):
        tensors[layer] = value
    else:
        tensors.append(value)


class TextCache:
    """Contexts that grow by one token a step, all of them together; the contexts given stay as they are.

    Keys and values lie in one tensor a layer, (B, H, S, K), with room for `room` more tokens: nothing is copied or
    allocated at a step. Shorter contexts have gaps, which a mask hides.
    """

    def __init__(self, contexts: Sequence[Context], room: int, device: torch.device):
        self.lens = [context.kv_len for context in contexts]
        self.filled = torch.tensor(self.lens, device=device)
        self.position = torch.tensor([context.rope for context in contexts], device=device)
        self.room, self._rows = max(self.lens, default=0) + room, torch.arange(len(contexts), device=device)
        self.keys = [self._laid_out(tensors) for tensors in _by_layer([context.keys for context in contexts])]
        self.values = [self._laid_out(tensors) for tensors in _by_layer([context.values for context in contexts])]
        self._mask: Tensor | None = None

    def _laid_out(self, tensors_SHK: list[Tensor | None]) -> Tensor:
        known = next(tensor for tensor in tensors_SHK if tensor is not None)
        cache = known.new_zeros(len(tensors_SHK), known.shape[1], self.room, known.shape[2])
        for row, tensor in enumerate(tensors_SHK):
            if tensor is not None:
                cache[row, :, : len(tensor)] = tensor.transpose(0, 1)
        return cache

    def begin(self) -> None:
        """Before the layers of a step: what each text sees."""
        longest = max(self.lens) + 1
        if min(self.lens) + 1 < longest:
            self._mask = (torch.arange(longest, device=self.filled.device) <= self.filled[:, None])[:, None, None]

    def end(self) -> None:
        """After the layers: every text is one token longer."""
        self.lens = [length + 1 for length in self.lens]
        self.filled += 1
        self.position += 1
        self._mask = None

    def keep(self, rows: list[int]) -> None:
        """Go on with these texts alone."""
        chosen = torch.tensor(rows, device=self.filled.device)
        self.lens = [self.lens[row] for row in rows]
        self.filled, self.position = self.filled[chosen], self.position[chosen]
        self.keys, self.values = [x[chosen] for x in self.keys], [x[chosen] for x in self.values]
        self._rows = self._rows[: len(rows)]

    def __call__(self, layer: int, query_BHK: Tensor, key_BHK: Tensor, value_BHK: Tensor) -> Tensor:
        """Attention of the newest token of each text, (B, H, K)."""
        if layer == len(self.keys):  # all contexts were empty
            batch, heads, width = key_BHK.shape
            self.keys.append(key_BHK.new_zeros(batch, heads, self.room, width))
            self.values.append(key_BHK.new_zeros(batch, heads, self.room, width))
        keys, values = self.keys[layer], self.values[layer]
        if self._mask is None:  # all of one length: a slice
            now = self.lens[0]
            keys[:, :, now] = key_BHK
            values[:, :, now] = value_BHK
        else:
            keys[self._rows, :, self.filled] = key_BHK.to(keys.dtype)
            values[self._rows, :, self.filled] = value_BHK.to(values.dtype)
        longest = max(self.lens) + 1
        # The heads that share keys stand as so many queries: one token sees everything, so no order matters.
        query_BHGK = query_BHK.to(keys.dtype).unflatten(1, (keys.shape[1], -1))
        out = F.scaled_dot_product_attention(
            query_BHGK, keys[:, :, :longest], values[:, :, :longest], attn_mask=self._mask
        )
        return out.flatten(1, 2)


def _by_layer(tensors: list[list[Tensor]]) -> list[list[Tensor | None]]:
    """One list a layer; None for a context that is empty."""
    layers = max(map(len, tensors), default=0)
    return [[each[layer] if layer < len(each) else None for each in tensors] for layer in range(layers)]
