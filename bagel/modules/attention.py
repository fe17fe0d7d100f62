"""Who sees whom in a pack, and three ways to compute it that agree: dense per sample, sliced per split, flex attention.

A sample is a row of splits. Causal splits are text; a full split is a clean image; a noise split is an image to be
generated. Query q sees key k if both are in one sample and (k <= q, or both are in one full or noise split), unless k
is in a noise split and q is not in that same split.
Letters of shapes: L tokens, H heads, K head width, Q queries, S keys.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from bagel.sliced import Segment, sliced_attention

Pair = tuple[Tensor, Tensor]  # tokens of the understanding expert (text, then ViT), tokens of the generation expert
CAUSAL, FULL, NOISE = "causal", "full", "noise"


def sample_mask(split_lens: Sequence[int], attn_modes: Sequence[str]) -> Tensor:
    """The rule for one sample as a boolean matrix (L, L), true where the row may see the column."""
    split = torch.repeat_interleave(torch.arange(len(split_lens)), torch.tensor(list(split_lens)))
    block = torch.tensor([mode != CAUSAL for mode in attn_modes], dtype=torch.bool)[split]
    noise = torch.tensor([mode == NOISE for mode in attn_modes], dtype=torch.bool)[split]
    position = torch.arange(len(split))
    together = split[:, None] == split[None]
    earlier = position[None] <= position[:, None]
    return (earlier | (together & block[:, None])) & (together | ~noise[None])


class PackLayout:
    """Samples, splits and modes of a pack, and everything that is worked out from them once for all layers.

    static_length: tokens to which flex attention pads, so that its shapes stay the same in every step; null: the next
    128.
    """

    def __init__(
        self,
        sample_lens: Sequence[int],
        split_lens: Sequence[int],
        attn_modes: Sequence[str],
        static_length: int | None = None,
    ):
        if sum(sample_lens) != sum(split_lens) or len(split_lens) != len(attn_modes):
            raise ValueError(
                f"samples hold {sum(sample_lens)} tokens, {len(split_lens)} splits {sum(split_lens)}, "
                f"with {len(attn_modes)} modes; they must agree"
            )
        self.sample_lens, self.split_lens, self.attn_modes = list(sample_lens), list(split_lens), list(attn_modes)
        self.length = sum(sample_lens)
        self.padded_length = -(-max(self.length, static_length or 1) // 128) * 128
        self.block_mask = None
        self._segments: list[list[Segment]] | None = None  # by sample
        self._masks: list[Tensor] | None = None

    def samples(self) -> list[tuple[list[int], list[str]]]:
        """(split lengths, modes) of every sample."""
        found, split = [], 0
        for length in self.sample_lens:
            first, covered = split, 0
            while covered < length:
                covered += self.split_lens[split]
                split += 1
            if covered != length:
                raise ValueError(f"a split crosses the end of sample {len(found)}")
            found.append((self.split_lens[first:split], self.attn_modes[first:split]))
        return found

    def masks(self, device: torch.device) -> list[Tensor]:
        """One boolean (L, L) a sample."""
        if self._masks is None:
            self._masks = [sample_mask(lens, modes).to(device) for lens, modes in self.samples()]
        return self._masks

    def segments(self) -> list[list[Segment]]:
        """The calls of the sliced form for every sample; neighbouring causal splits become one call."""
        if self._segments is None:
            self._segments, start = [], 0
            for split_lens, attn_modes in self.samples():
                self._segments.append(_segments_of_sample(start, split_lens, attn_modes))
                start += sum(split_lens)
        return self._segments

    def attended_pairs(self) -> list[int]:
        """Allowed (query, key) pairs of every sample, for honest FLOP counts."""
        pairs = []
        for segments in self.segments():
            count = 0
            for segment in segments:
                queries = segment.num_queries
                count += queries * segment.num_keys - (queries * (queries - 1) // 2 if segment.causal else 0)
            pairs.append(count)
        return pairs


def _segments_of_sample(start: int, split_lens: list[int], attn_modes: list[str]) -> list[Segment]:
    """The calls of a sample that begins at `start`."""
    segments: list[Segment] = []
    visible: list[tuple[int, int]] = []  # keys of earlier splits that are not noise
    for length, mode in zip(split_lens, attn_modes, strict=True):
        stop = start + length
        last = segments[-1] if segments else None
        if mode == CAUSAL and last is not None and last.causal and last.stop == start:
            segments[-1] = Segment(last.start, stop, _joined(last.key_spans, (start, stop)), True)
        else:
            segments.append(Segment(start, stop, _joined(visible, (start, stop)), mode == CAUSAL))
        if mode != NOISE:
            visible = _joined(visible, (start, stop))
        start = stop
    return segments


def _joined(spans: list[tuple[int, int]], span: tuple[int, int]) -> list[tuple[int, int]]:
    if spans and spans[-1][1] == span[0]:
        return [*spans[:-1], (spans[-1][0], span[1])]
    return [*spans, span]


def attend(query_LHK: Tensor, key_LHK: Tensor, value_LHK: Tensor, layout: PackLayout, backend: str) -> Tensor:
    """Attention over a pack in its own order, scale 1/sqrt(K), grouped keys. Backend: dense, sliced (on a CPU) or
    flex.
    """
    if backend == "flex":
        return _flex(query_LHK, key_LHK, value_LHK, layout)
    if backend == "sliced":
        segments = [segment for sample in layout.segments() for segment in sample]
        return sliced_attention(query_LHK, key_LHK, value_LHK, segments)
    if backend != "dense":
        raise ValueError(f"attention backend {backend!r}: expected dense, sliced or flex")
    parts = zip(
        layout.masks(query_LHK.device),
        *(x.split(layout.sample_lens) for x in (query_LHK, key_LHK, value_LHK)),
        strict=True,
    )
    outputs = [scaled_dot_product(query, key, value, mask=mask) for mask, query, key, value in parts]
    return torch.cat(outputs) if outputs else torch.zeros_like(query_LHK)


def scaled_dot_product(
    query_QHK: Tensor, key_SHK: Tensor, value_SHK: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """One unbatched call of the fused kernel; every group of query heads shares a head of keys and values.

    causal: the last query sees every key, the one before it all but the last, and so on.
    """
    older = len(key_SHK) - len(query_QHK)
    if causal and older:  # torch aligns is_causal to the upper left
        mask = torch.ones(len(query_QHK), len(key_SHK), dtype=torch.bool, device=query_QHK.device).tril(older)
    out = F.scaled_dot_product_attention(
        query_QHK.transpose(0, 1)[None],
        key_SHK.transpose(0, 1)[None],
        value_SHK.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal and not older,
        enable_gqa=query_QHK.shape[1] != key_SHK.shape[1],
    )
    return out[0].transpose(0, 1)


def flex_ids(layout: PackLayout, padded: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: sample, block (its image; -1: text), whether it is noise. Padding is one more causal sample."""
    lengths = [*layout.sample_lens, padded - layout.length]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    modes = [*layout.attn_modes, CAUSAL]
    splits = torch.tensor([*layout.split_lens, padded - layout.length])
    block = torch.tensor([number if mode != CAUSAL else -1 for number, mode in enumerate(modes)]).repeat_interleave(
        splits
    )
    noise = torch.tensor([mode == NOISE for mode in modes]).repeat_interleave(splits)
    return sample.to(device), block.to(device), noise.to(device)


def flex_rule(sample: Tensor, block: Tensor, noise: Tensor):
    """The rule as flex attention's mask function of (batch, head, query, key)."""

    def visible(batch, head, query, key):
        together = (block[query] == block[key]) & (block[query] >= 0)
        return (sample[query] == sample[key]) & ((key <= query) | together) & (together | ~noise[key])

    return visible


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
    """Flex attention with a block mask of 128, compiled on CUDA; the pack is padded inside this call only."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    padded = layout.padded_length
    if layout.block_mask is None:
        rule = flex_rule(*flex_ids(layout, padded, query.device))
        layout.block_mask = create_block_mask(rule, None, None, padded, padded, device=query.device, BLOCK_SIZE=128)
    grow = (0, 0, 0, 0, 0, padded - layout.length)
    query, key, value = (F.pad(x, grow).transpose(0, 1)[None] for x in (query, key, value))
    kernel = _compiled_flex() if query.is_cuda else flex_attention
    return kernel(query, key, value, block_mask=layout.block_mask, enable_gqa=True)[0].transpose(0, 1)[: layout.length]


class _Join(torch.autograd.Function):
    """The two experts' tokens in one tensor, each at its row. The rows cover it, so the gradient is a gather."""

    @staticmethod
    def forward(context, und: Tensor, gen: Tensor, und_rows: Tensor, gen_rows: Tensor) -> Tensor:
        context.save_for_backward(und_rows, gen_rows)
        joined = gen.new_empty(len(und) + len(gen), *gen.shape[1:])
        return joined.index_copy_(0, und_rows, und.to(gen.dtype)).index_copy_(0, gen_rows, gen)

    @staticmethod
    def backward(context, grad: Tensor):
        und_rows, gen_rows = context.saved_tensors
        return grad.index_select(0, und_rows), grad.index_select(0, gen_rows), None, None


class _Part(torch.autograd.Function):
    """Back to the two experts; what _Join does is its gradient."""

    @staticmethod
    def forward(context, joined: Tensor, und_rows: Tensor, gen_rows: Tensor) -> Pair:
        context.save_for_backward(und_rows, gen_rows)
        return joined.index_select(0, und_rows), joined.index_select(0, gen_rows)

    @staticmethod
    def backward(context, und: Tensor, gen: Tensor):
        und_rows, gen_rows = context.saved_tensors
        joined = gen.new_empty(len(und) + len(gen), *gen.shape[1:])
        return joined.index_copy_(0, und_rows, und).index_copy_(0, gen_rows, gen), None, None


class Rows:
    """Where the tokens of each expert stand in a pack (or in the new tokens of several contexts)."""

    def __init__(self, und: Tensor, gen: Tensor):
        self.und, self.gen = und, gen

    def join(self, pair: Pair) -> Tensor:
        """(und, gen) -> one tensor in the order of the pack, of the generation expert's type."""
        return _Join.apply(*pair, self.und, self.gen)

    def part(self, joined: Tensor) -> Pair:
        """The inverse of join."""
        return _Part.apply(joined, self.und, self.gen)


class PackedAttention:
    """Joint attention of a training pack: the kernels work in pack order, where samples and splits are contiguous."""

    def __init__(self, layout: PackLayout, rows: Rows, backend: str):
        self.layout, self.rows, self.backend = layout, rows, backend

    @torch.compiler.disable  # lengths of samples change with every pack: compiled layers call this as it is
    def __call__(self, layer: int, query: Pair, key: Pair, value: Pair) -> Pair:
        query_LHK, key_LHK, value_LHK = (self.rows.join(pair) for pair in (query, key, value))
        return self.rows.part(attend(query_LHK, key_LHK, value_LHK, self.layout, self.backend))
