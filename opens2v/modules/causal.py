"""Block-causal self-attention over video frames: masks, attention without a dense mask, rotary embedding, cache.

Shapes: B batch, F latent frames, S tokens of a frame, L = F S tokens, H heads, K head width.
"""

from dataclasses import dataclass, field

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed
from torch import Tensor
from torch.nn import functional

from opens2v.modules.adapter import ReferenceTokens, RefSelfAttention, rms_norm


def frame_blocks(frames: int, frames_per_block: int, independent_first_frame: bool = False) -> list[int]:
    """The lengths of the causal blocks; ValueError when the frames do not fill whole blocks."""
    first = 1 if independent_first_frame else 0
    if frames_per_block < 1 or frames < first or (frames - first) % frames_per_block:
        raise ValueError(
            f"{frames} latent frames do not fill blocks of {frames_per_block}"
            f"{' after one independent frame' if first else ''}; choose a number of frames with "
            f"(frames - {first}) divisible by {frames_per_block}, or another num_frame_per_block"
        )
    return [1] * first + [frames_per_block] * ((frames - first) // frames_per_block)


def causal_frame_mask(
    frames: int,
    frames_per_block: int,
    *,
    independent_first_frame: bool = False,
    local_window: int = -1,
    teacher_forcing: bool = False,
) -> Tensor:
    """Which frame (row) may attend to which (column), bool (F, F); (2F, 2F) over [clean | noisy] with teacher forcing.

    A frame sees its own and earlier blocks; a noisy frame sees the noisy frames of its own block and the clean frames
    of earlier ones. local_window: frames counted back from the end of the own block, -1 for all.
    """
    lengths = frame_blocks(frames, frames_per_block, independent_first_frame)
    block_F = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    end_F = torch.cumsum(torch.tensor(lengths), 0)[block_F]
    near_FF = torch.ones(frames, frames, dtype=torch.bool)
    if local_window >= 0:
        near_FF = torch.arange(frames)[None] >= (end_F - local_window)[:, None]
    own_FF = block_F[:, None] == block_F[None]
    earlier_FF = block_F[:, None] > block_F[None]
    clean_FF = (own_FF | earlier_FF) & (near_FF | own_FF)
    if not teacher_forcing:
        return clean_FF
    clean_rows = torch.cat([clean_FF, torch.zeros_like(clean_FF)], 1)
    noisy_rows = torch.cat([earlier_FF & near_FF, own_FF], 1)
    return torch.cat([clean_rows, noisy_rows])


def attention_runs(mask_FF: Tensor, tokens_per_frame: int) -> list[tuple[slice, list[slice]]]:
    """The mask as (query tokens, runs of key tokens): neighbouring frames with equal rows share one attention call."""
    rows = mask_FF.bool().tolist()
    runs, start = [], 0
    for frame in range(1, len(rows) + 1):
        if frame == len(rows) or rows[frame] != rows[start]:
            queries = slice(start * tokens_per_frame, frame * tokens_per_frame)
            runs.append((queries, _true_runs(rows[start], tokens_per_frame)))
            start = frame
    return runs


def _true_runs(row: list[bool], tokens_per_frame: int) -> list[slice]:
    found, start = [], None
    for frame, seen in enumerate([*row, False]):
        if seen and start is None:
            start = frame
        elif not seen and start is not None:
            found.append(slice(start * tokens_per_frame, frame * tokens_per_frame))
            start = None
    if not found:
        raise ValueError("a frame of the mask attends to nothing; a softmax over no keys is not a number")
    return found


def attention_in_runs(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, runs: list[tuple[slice, list[slice]]]) -> Tensor:
    """Masked attention as exact dense calls, one a run: no mask in memory, and the fast kernels stay usable."""
    parts = []
    for queries, keys in runs:
        k = torch.cat([k_BHLK[:, :, part] for part in keys], 2)
        v = torch.cat([v_BHLK[:, :, part] for part in keys], 2)
        parts.append(functional.scaled_dot_product_attention(q_BHLK[:, :, queries], k, v))
    return torch.cat(parts, 2)


def rotary_table(
    rope: WanRotaryPosEmbed, frames: int, height: int, width: int, first_frame: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1, L, 1, K) of a patch grid whose time index starts at `first_frame`.

    The tables of `rope` are split over time, height and width.
    """
    sizes = [rope.t_dim, rope.h_dim, rope.w_dim]
    axes = (slice(first_frame, first_frame + frames), slice(0, height), slice(0, width))
    cosines, sines = rope.freqs_cos, rope.freqs_sin
    assert isinstance(cosines, Tensor) and isinstance(sines, Tensor)
    if max(part.stop for part in axes) > len(cosines):
        raise ValueError(f"the rotary table has {len(cosines)} positions, {max(part.stop for part in axes)} are needed")
    tables = []
    for table in (cosines, sines):
        time_, row, column = (part[axis] for part, axis in zip(table.split(sizes, 1), axes, strict=True))
        grid = torch.cat(
            [
                time_[:, None, None].expand(-1, height, width, -1),
                row[None, :, None].expand(frames, -1, width, -1),
                column[None, None].expand(frames, height, -1, -1),
            ],
            -1,
        )
        tables.append(grid.reshape(1, frames * height * width, 1, -1))
    return tables[0], tables[1]


def with_turns(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The table with its complex numbers cos + i sin behind, so that no block makes them again."""
    return *rotary, torch.complex(rotary[0][..., 0::2], rotary[1][..., 1::2])


def rotate(x_BLHK: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
    """Rotary embedding on adjacent channel pairs: (a, b) -> (a cos - b sin, a sin + b cos).

    Outside a compiler as one product of complex numbers, which passes over the memory once.
    """
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    pairs = x_BLHK.to(cos.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses real arithmetic, and no complex one
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    else:
        turns = rotary[2] if len(rotary) > 2 else torch.complex(cos, sin)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
    return turned.flatten(-2).type_as(x_BLHK)


@dataclass
class KeyValueCache:
    """Keys and values of the clean frames so far, per transformer block, for generation block by block.

    window: frames kept, counted with the block in work; -1 keeps all. store: whether a forward pass adds its frames
    (the pass over a finished block at timestep 0) or only reads (the denoising passes).
    """

    window: int = -1
    store: bool = False
    frames: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, tokens_per_frame: int) -> Tensor:
        """Attention of the block in work over the kept frames and itself."""
        past = self.layers.get(layer)
        if past is not None:
            k_BHLK, v_BHLK = torch.cat([past[0], k_BHLK], 2), torch.cat([past[1], v_BHLK], 2)
        if self.window >= 0:
            keep = max(self.window * tokens_per_frame, q_BHLK.shape[2])
            k_BHLK, v_BHLK = k_BHLK[:, :, -keep:], v_BHLK[:, :, -keep:]
        if self.store:
            self.layers[layer] = (k_BHLK.detach(), v_BHLK.detach())
        return functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)


def self_attention(
    attention: WanAttention,
    x_BLD: Tensor,
    rotary: tuple[Tensor, ...],
    *,
    runs: list[tuple[slice, list[slice]]] | None,
    cache: KeyValueCache | None,
    layer: int,
    tokens_per_frame: int,
    references: ReferenceTokens | None = None,
) -> Tensor:
    """A Wan block's self-attention: of all tokens, in runs of frames, or over a cache; and over the subject pictures
    where the attention has layers for them (RefSelfAttention).
    """
    heads = attention.heads
    q = rotate(attention.norm_q(attention.to_q(x_BLD)).unflatten(-1, (heads, -1)), rotary).transpose(1, 2)
    k = rotate(attention.norm_k(attention.to_k(x_BLD)).unflatten(-1, (heads, -1)), rotary).transpose(1, 2)
    v = attention.to_v(x_BLD).unflatten(-1, (heads, -1)).transpose(1, 2)
    if cache is not None:
        out = cache.attend(layer, q, k, v, tokens_per_frame)
    elif runs is not None:
        out = attention_in_runs(q, k, v, runs)
    else:
        out = functional.scaled_dot_product_attention(q, k, v)
    out_BLD = out.transpose(1, 2).flatten(2).type_as(q)
    if references is not None and references.features is not None and isinstance(attention, RefSelfAttention):
        out_BLD = out_BLD + _over_references(attention, q, references, layer)
    return attention.to_out[0](out_BLD)


def _over_references(attention: RefSelfAttention, q_BHLK: Tensor, references: ReferenceTokens, layer: int) -> Tensor:
    """(B, L, D) to add to the attention over the video's own tokens; keys and values are remembered where asked."""
    place = -1 - layer  # the cross-attention of this block remembers under `layer`
    if references.memory is not None and place in references.memory:
        k_BHSK, v_BHSK = references.memory[place]
    else:
        assert references.features is not None and references.rotary is not None
        features = references.features[layer].to(attention.k_ref.weight.dtype)
        key = rms_norm(attention.norm_k_ref, attention.k_ref(features)).unflatten(-1, (attention.heads, -1))
        k_BHSK = rotate(key, references.rotary).transpose(1, 2)
        value = attention.v_ref(features)
        value = value * references.weight_B11.to(value.dtype)
        v_BHSK = value.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        if references.memory is not None:
            references.memory[place] = [k_BHSK, v_BHSK]
    mask = None if references.mask_self_BS is None else references.mask_self_BS[:, None, None, :]
    path = functional.scaled_dot_product_attention(q_BHLK, k_BHSK.type_as(q_BHLK), v_BHSK.type_as(q_BHLK), mask)
    return path.transpose(1, 2).flatten(2)
