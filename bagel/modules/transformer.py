"""The language model of BAGEL: Qwen2 with two sets of weights a layer (Mixture of Transformers), and its attention.

Every token belongs to one expert: text and ViT tokens to understanding, VAE tokens to generation. The tokens of the
two experts are kept apart (a `Pair`), so that each product runs on one set of weights, and meet in the attention alone.

Who sees whom in a pack: a sample is a row of splits. Causal splits are text; a full split is a clean image; a noise
split is an image to be generated. Query q sees key k if both are in one sample and (k <= q, or both are in one full or
noise split), unless k is in a noise split and q is not in that same split. Two ways to compute it agree: flex attention
(on CUDA), and dense per sample.
Letters of shapes: L tokens, D width, H heads, K head width, Q queries, S keys.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from bagel.config import LanguageConfig
from shared.data import sent
from shared.engine.norm import ScaledNorm, is_plain_fp32
from shared.engine.products import linear
from shared.engine.recompute import checkpoint

Pair = tuple[Tensor, Tensor]  # tokens of the understanding expert (text, then ViT), tokens of the generation expert
Attend = Callable[[int, Pair, Pair, Pair], Pair]
AttendOne = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # the same for the understanding expert alone
CAUSAL, FULL, NOISE = "causal", "full", "noise"
STEP = 32  # samples are padded to a multiple of this
BLOCK = 128  # side of flex attention's blocks, tokens
ROWS_AT_ONCE = 8 * BLOCK
LARGE = 1 << 16  # values from which a norm on a CPU is a matter of memory


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if is_plain_fp32(x, self.weight):
            if torch.is_grad_enabled():
                return ScaledNorm.apply(x, self.weight, self.eps)
            if x.numel() < LARGE:  # torch's own makes fewer calls, and more copies
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
            return (x * square.add_(self.eps).rsqrt_()).mul_(self.weight)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


def rotary_angles(position_L: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (L, K) in fp32 of position * theta^(-2i/K); both halves carry the same angles."""
    power = torch.arange(0, head_width, 2, dtype=torch.float32, device=position_L.device) / head_width
    angle = position_L.float()[:, None] / theta**power
    angle_LK = torch.cat([angle, angle], dim=-1)
    return angle_LK.cos(), angle_LK.sin()


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(context, grad: Tensor):
        cos, sin = context.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x_LHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_LHK.shape[-1] // 2
    cos, sin = (angle[:, None].to(x_LHK.dtype) for angle in (cos, sin))
    turned = x_LHK * cos
    turned[..., :half].addcmul_(x_LHK[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x_LHK[..., :half], sin[..., half:])
    return turned


def rotate(x_LHK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Rotary embedding in the half-rotation form: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    return _Rotation.apply(x_LHK, cos_LK, sin_LK)


# --- who sees whom ----------------------------------------------------------------------------------------------------


def sample_mask(split_lens: Sequence[int], attn_modes: Sequence[str]) -> Tensor:
    """The rule for one sample as a boolean matrix (L, L), true where the row may see the column."""
    lens = torch.tensor(list(split_lens))
    split = torch.repeat_interleave(torch.arange(len(split_lens)), lens, output_size=sum(split_lens))
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
        self.padded_length = -(-max(self.length, static_length or 1) // BLOCK) * BLOCK
        self.block_mask: Any = None  # flex attention's, made at the first layer
        self._masks: list[Tensor] | None = None

    def samples(self) -> list[tuple[list[int], list[str]]]:
        """(split lengths, modes) of every sample."""
        found: list[tuple[list[int], list[str]]] = []
        split = 0
        for length in self.sample_lens:
            first, covered = split, 0
            while covered < length:
                covered += self.split_lens[split]
                split += 1
            if covered != length:
                raise ValueError(f"a split crosses the end of sample {len(found)}")
            found.append((self.split_lens[first:split], self.attn_modes[first:split]))
        return found

    def _order(self) -> list[tuple[int, list[int]]]:
        """(padded length, samples of that length), so that all of them are one call."""
        found: dict[int, list[int]] = {}
        for number, length in enumerate(self.sample_lens):
            found.setdefault(-(-length // STEP) * STEP, []).append(number)
        return sorted(found.items())

    @property
    def padded_rows(self) -> int:
        return sum(length * len(samples) for length, samples in self._order())

    def padded_places(self, device: torch.device) -> Tensor:
        """Where each token of the pack stands when samples of about one length are put side by side."""
        starts, row = [0] * len(self.sample_lens), 0
        for length, samples in self._order():
            for number in samples:
                starts[number], row = row, row + length
        lens, first = torch.tensor(self.sample_lens), torch.tensor(self.sample_lens).cumsum(0)
        moved = torch.tensor(starts) - (first - lens)
        return sent(torch.arange(self.length) + moved.repeat_interleave(lens, output_size=self.length), device)

    def masks(self, device: torch.device) -> list[Tensor]:
        """One boolean (samples, 1, L, L) a padded length; padding sees everything and is seen by nothing."""
        if self._masks is None:
            self._masks, splits = [], self.samples()
            for length, samples in self._order():
                mask = torch.zeros(len(samples), 1, length, length, dtype=torch.bool)
                for row, number in enumerate(samples):
                    own = self.sample_lens[number]
                    mask[row, 0, :own, :own] = sample_mask(*splits[number])
                    mask[row, 0, own:] = True
                self._masks.append(sent(mask, device))
        return self._masks

    def attended_pairs(self) -> list[int]:
        """Allowed (query, key) pairs of every sample, for honest FLOP counts."""
        pairs = []
        for split_lens, attn_modes in self.samples():
            count = seen = 0  # pairs; keys of earlier splits that are not noise
            for length, mode in zip(split_lens, attn_modes, strict=True):
                own = length * (length + 1) // 2 if mode == CAUSAL else length * length
                count, seen = count + length * seen + own, seen + length * (mode != NOISE)
            pairs.append(count)
        return pairs


# --- the two ways to compute it  -------------------------------------------------------------------------------------


def padded_attention(query_RHK: Tensor, key_RHK: Tensor, value_RHK: Tensor, layout: PackLayout) -> Tensor:
    """Dense: samples of about one length as one call of the kernel with their masks. R rows, as layout.padded_places
    puts the tokens.
    """
    outputs, masks = [], layout.masks(query_RHK.device)
    rows = [len(mask) * mask.shape[-1] for mask in masks]
    for mask, *parts in zip(masks, *(x.split(rows) for x in (query_RHK, key_RHK, value_RHK)), strict=True):
        query, key, value = (x.unflatten(0, (len(mask), -1)).transpose(1, 2) for x in parts)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if outputs else torch.zeros_like(query_RHK)


def scaled_dot_product(query_QHK: Tensor, key_SHK: Tensor, value_SHK: Tensor, *, causal: bool = False) -> Tensor:
    """One unbatched call of the fused kernel; every group of query heads shares a head of keys and values.

    causal: the last query sees every key, the one before it all but the last, and so on.
    """
    older, mask = len(key_SHK) - len(query_QHK), None
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
    return sent(sample, device), sent(block, device), sent(noise, device)


def flex_rule(sample: Tensor, block: Tensor, noise: Tensor):
    """The rule as flex attention's mask function of (batch, head, query, key)."""

    def visible(batch, head, query, key):
        together = (block[query] == block[key]) & (block[query] >= 0)
        return (sample[query] == sample[key]) & ((key <= query) | together) & (together | ~noise[key])

    return visible


def flex_block_mask(layout: PackLayout, device: torch.device) -> Any:
    """The rule in blocks of 128 x 128: which hold nothing, some or all, worked out ROWS_AT_ONCE rows at a time. The
    whole matrix of a pack of 36,864 tokens would take gigabytes, and a compiled maker of it another graph.
    """
    from torch.nn.attention.flex_attention import BlockMask

    padded = layout.padded_length
    rule, key = flex_rule(*flex_ids(layout, padded, device)), torch.arange(padded, device=device)
    some, all_of = [], []
    for first in range(0, padded, ROWS_AT_ONCE):
        query = torch.arange(first, min(first + ROWS_AT_ONCE, padded), device=device)
        count = rule(0, 0, query[:, None], key[None]).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).sum((1, 3))
        some.append((count > 0) & (count < BLOCK * BLOCK))
        all_of.append(count == BLOCK * BLOCK)
    parts = (_ordered(torch.cat(found)) for found in (some, all_of))
    (count, order), (full_count, full_order) = parts
    return BlockMask.from_kv_blocks(count, order, full_count, full_order, BLOCK_SIZE=BLOCK, mask_mod=rule)


def _ordered(found: Tensor) -> Pair:
    """(number of blocks, their columns first) of every row, as BlockMask wants them: (1, 1, rows) and (1, 1, rows,
    columns), int32.
    """
    order = found.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return found.sum(1, dtype=torch.int32)[None, None], order[None, None].contiguous()


@lru_cache(maxsize=2)
def flex_kernel(is_compiled: bool) -> Any:
    """Flex attention; compiled for static shapes, so that every pack should have the same padded length."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention


def flex_of_pack(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
    """Flex attention with a block mask of 128, compiled on CUDA, with the layer where that is compiled; the pack is
    padded inside this call only.
    """
    length = len(query)
    if layout.block_mask is None:
        layout.block_mask = flex_block_mask(layout, query.device)
    grow = (0, 0, 0, 0, 0, layout.padded_length - length)
    query, key, value = (F.pad(x, grow).transpose(0, 1)[None] for x in (query, key, value))
    within = torch.compiler.is_compiling()
    kernel = torch.nn.attention.flex_attention.flex_attention if within else flex_kernel(query.is_cuda)
    return kernel(query, key, value, block_mask=layout.block_mask, enable_gqa=True)[0].transpose(0, 1)[:length]


# --- from experts to the pack and back --------------------------------------------------------------------------------


class _Join(torch.autograd.Function):
    """The two experts' tokens in one tensor of `length` rows, each at its own; the gradient is a gather."""

    @staticmethod
    def forward(context, und: Tensor, gen: Tensor, und_rows: Tensor, gen_rows: Tensor, length: int) -> Tensor:
        context.save_for_backward(und_rows, gen_rows)
        return _joined_rows(und.to(gen.dtype), gen, und_rows, gen_rows, length)

    @staticmethod
    def backward(context, grad: Tensor):
        und_rows, gen_rows = context.saved_tensors
        return grad.index_select(0, und_rows), grad.index_select(0, gen_rows), None, None, None


def _joined_rows(und: Tensor, gen: Tensor, und_rows: Tensor, gen_rows: Tensor, length: int) -> Tensor:
    is_full = length == len(und) + len(gen)
    joined = (gen.new_empty if is_full else gen.new_zeros)(length, *gen.shape[1:])
    return joined.index_copy_(0, und_rows, und).index_copy_(0, gen_rows, gen)


class _Part(torch.autograd.Function):
    """Back to the two experts; what _Join does is its gradient."""

    @staticmethod
    def forward(context, joined: Tensor, und_rows: Tensor, gen_rows: Tensor) -> Pair:
        context.save_for_backward(und_rows, gen_rows)
        context.length = len(joined)
        return joined.index_select(0, und_rows), joined.index_select(0, gen_rows)

    @staticmethod
    def backward(context, und: Tensor, gen: Tensor):
        und_rows, gen_rows = context.saved_tensors
        return _joined_rows(und, gen, und_rows, gen_rows, context.length), None, None


class Rows:
    """Where the tokens of each expert stand in a pack (or in the new tokens of several contexts), which has `length`
    rows; null: as many as there are tokens.
    """

    def __init__(self, und: Tensor, gen: Tensor, length: int | None = None):
        self.und, self.gen = und, gen
        self.length = len(und) + len(gen) if length is None else length

    def join(self, pair: Pair) -> Tensor:
        """(und, gen) -> one tensor in the order of the pack, of the generation expert's type."""
        return _Join.apply(*pair, self.und, self.gen, self.length)

    def part(self, joined: Tensor) -> Pair:
        """The inverse of join."""
        return _Part.apply(joined, self.und, self.gen)


class PackedAttention:
    """Joint attention of a training pack: the kernels work in pack order, where samples and splits are contiguous."""

    def __init__(self, layout: PackLayout, rows: Rows, backend: str):
        self.layout, self.rows, self.backend = layout, rows, backend
        if backend == "dense":  # the experts' tokens are put where the padded samples want them at once
            place = layout.padded_places(rows.und.device)
            self.rows = Rows(place[rows.und], place[rows.gen], layout.padded_rows)
        if backend == "flex" and layout.block_mask is None:  # before any layer, outside of their graphs
            layout.block_mask = flex_block_mask(layout, rows.und.device)

    def __call__(self, layer: int, query: Pair, key: Pair, value: Pair) -> Pair:
        if self.backend == "flex":
            joined = (self.rows.join(query), self.rows.join(key), self.rows.join(value))
            return self.rows.part(flex_of_pack(*joined, self.layout))
        return self._by_samples(query, key, value)

    @torch.compiler.disable  # lengths of samples change with every pack: compiled layers call this as it is
    def _by_samples(self, query: Pair, key: Pair, value: Pair) -> Pair:
        query_LHK, key_LHK, value_LHK = (self.rows.join(pair) for pair in (query, key, value))
        if self.backend == "dense":
            return self.rows.part(padded_attention(query_LHK, key_LHK, value_LHK, self.layout))
        return self.rows.part(flex_of_pack(query_LHK, key_LHK, value_LHK, self.layout))


# --- layers -----------------------------------------------------------------------------------------------------------


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))


class MoTAttention(nn.Module):
    """Projections of both experts around one joint attention; query and key are normed per head before the rotary
    embedding.
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        self.head = head
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, size) for size in (queries, keys, keys))
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head, config.rms_norm_eps), RMSNorm(head, config.rms_norm_eps)
        self.q_proj_moe_gen, self.k_proj_moe_gen, self.v_proj_moe_gen = (
            nn.Linear(width, size) for size in (queries, keys, keys)
        )
        self.o_proj_moe_gen = nn.Linear(queries, width, bias=False)
        self.q_norm_moe_gen, self.k_norm_moe_gen = (RMSNorm(head, config.rms_norm_eps) for _ in range(2))

    def _understand(self, x_LD: Tensor, angles: Pair, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (layer(x_LD) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key = self.q_norm(self._heads(query)), self.k_norm(self._heads(key))
        if frozen:
            query, key, value = query.detach(), key.detach(), value.detach()
        return rotate(query, *angles), rotate(key, *angles), self._heads(value)

    def _generate(self, x_LD: Tensor, angles: Pair) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (layer(x_LD) for layer in (self.q_proj_moe_gen, self.k_proj_moe_gen, self.v_proj_moe_gen))
        query, key = self.q_norm_moe_gen(self._heads(query)), self.k_norm_moe_gen(self._heads(key))
        return rotate(query, *angles), rotate(key, *angles), self._heads(value)

    def understand(self, x_LD: Tensor, cos_LK: Tensor, signed_sin_LK: Tensor, attend: AttendOne, layer: int) -> Tensor:
        """The understanding expert alone, without gradients."""
        query, key, value = (self._heads(project(x_LD)) for project in (self.q_proj, self.k_proj, self.v_proj))
        both = torch.cat([self.q_norm(query), self.k_norm(key)], dim=1)
        both = torch.addcmul(both * cos_LK, both.roll(self.head // 2, -1), signed_sin_LK)
        query, key = both.split([query.shape[1], key.shape[1]], dim=1)
        return self.o_proj(attend(layer, query, key, value).flatten(1))

    def _heads(self, x_LD: Tensor) -> Tensor:
        return x_LD.unflatten(-1, (-1, self.head))

    def forward(
        self, und: Tensor, gen: Tensor, angles: tuple[Pair, Pair], attend: Attend, layer: int, freeze_und: bool
    ) -> Pair:
        und_sides, gen_sides = self._understand(und, angles[0], freeze_und), self._generate(gen, angles[1])
        query, key, value = zip(und_sides, gen_sides, strict=True)
        und, gen = attend(layer, query, key, value)
        und = self.o_proj(und.flatten(1))
        return und.detach() if freeze_und else und, self.o_proj_moe_gen(gen.flatten(1))


class MoTDecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with the weights of the token's own expert."""

    forward_methods = ("understand",)  # FSDP gathers the weights for it as for forward

    def __init__(self, config: LanguageConfig):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = MoTAttention(config)
        self.mlp = GatedMLP(width, config.intermediate_size)
        self.mlp_moe_gen = GatedMLP(width, config.intermediate_size)
        self.input_layernorm = RMSNorm(width, eps)
        self.input_layernorm_moe_gen = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm_moe_gen = RMSNorm(width, eps)

    def forward(
        self,
        und: Tensor,
        gen: Tensor,
        angles: tuple[Pair, Pair],
        attend: Attend,
        layer: int,
        freeze_und: bool = False,
    ) -> Pair:
        seen = self.self_attn(
            self.input_layernorm(und), self.input_layernorm_moe_gen(gen), angles, attend, layer, freeze_und
        )
        und, gen = und + seen[0], gen + seen[1]
        thought = self.mlp(self.post_attention_layernorm(und))
        gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und + (thought.detach() if freeze_und else thought), gen

    def understand(self, x: Tensor, cos: Tensor, signed_sin: Tensor, attend: AttendOne, layer: int) -> Tensor:
        """The understanding expert alone, where no token is generated and no gradient wanted."""
        x = x + self.self_attn.understand(self.input_layernorm(x), cos, signed_sin, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class MoTDecoder(nn.Module):
    """Embeddings, layers and the two final norms."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoTDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_width, self.theta = config.head_dim, config.rope_theta
        self.gradient_checkpointing = False

    def forward(self, und: Tensor, gen: Tensor, positions: Pair, attend: Attend, freeze_und: bool = False) -> Pair:
        """Hidden states of both experts' tokens after the final norms; `positions` are those of each token."""
        angles = tuple(rotary_angles(position_L, self.head_width, self.theta) for position_L in positions)
        if freeze_und:  # the layers detach what each of them adds to these tokens
            und = und.detach()
        for number, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                und, gen = checkpoint(layer, und, gen, angles, attend, number, freeze_und)
            else:
                und, gen = layer(und, gen, angles, attend, number, freeze_und)
        und = self.norm(und)
        return und.detach() if freeze_und else und, self.norm_moe_gen(gen)

    def understand(self, x_LD: Tensor, position_L: Tensor, attend: AttendOne) -> Tensor:
        """Hidden states (L, D) of the understanding expert alone before the final norm, without gradients."""
        cos, sin = rotary_angles(position_L, self.head_width, self.theta)
        sin[:, : self.head_width // 2].neg_()  # (x1, x2) -> (x1, x2) cos + (x2, x1) signed sin
        cos, sin = cos[:, None].to(x_LD.dtype), sin[:, None].to(x_LD.dtype)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, MoTDecoderLayer)
            x_LD = layer.understand(x_LD, cos, sin, attend, number)
        return x_LD


class Head(nn.Linear):
    """Hidden states (N, D) -> logits (N, V); or, with labels (N,), -> their cross entropies (N,), fp32.

    chunk: logits of so many rows exist at once, and are computed again in the backward pass: of 10,240 rows and 152,064
    ids the logits, their fp32 copy and its gradient take 15 GB. One call, whatever the rows, so that every rank makes
    as many.
    """

    def forward(self, x_ND: Tensor, labels_N: Tensor | None = None, chunk: int | None = None) -> Tensor:
        if labels_N is None:
            return linear(x_ND, self.weight)
        if chunk is None or len(x_ND) <= chunk:
            return self._losses(x_ND, labels_N)
        parts = zip(x_ND.split(chunk), labels_N.split(chunk), strict=True)
        # torch's own call, not checkpoint() of shared/: that one may keep products, and the logits are one
        again = torch.utils.checkpoint.checkpoint
        return torch.cat([again(self._losses, x, labels, use_reentrant=False) for x, labels in parts])

    def _losses(self, x_ND: Tensor, labels_N: Tensor) -> Tensor:
        return F.cross_entropy(linear(x_ND, self.weight).float(), labels_N, reduction="none")


class LanguageModel(nn.Module):
    """The decoder and its untied head."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.model = MoTDecoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)

    def copy_experts(self) -> None:
        """Start the generation expert as a copy of the understanding expert, as one does from a plain Qwen2."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if "_moe_gen" in name:
                    parameter.copy_(parameters[name.replace("_moe_gen", "")])

    def resize_vocabulary(self, size: int) -> None:
        """Append rows for new tokens, drawn like the others; a table that is large enough is never shrunk."""
        old = self.model.embed_tokens.num_embeddings
        if size <= old:
            return
        width = self.model.embed_tokens.embedding_dim
        embedding, head = nn.Embedding(size, width), Head(width, size, bias=False)
        for new, former in ((embedding, self.model.embed_tokens), (head, self.lm_head)):
            nn.init.normal_(new.weight, std=0.02)
            new.to(former.weight.device, former.weight.dtype)
            with torch.no_grad():
                new.weight[:old] = former.weight
        self.model.embed_tokens, self.lm_head = embedding, head
