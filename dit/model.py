"""The diffusion transformer: noisy latent, time and text (or class) in; noise, clean latent or velocity out.

Tensor names are those of the public class-conditional DiT and SiT, so their weights load; text enters by cross-
attention whose last projection starts at zero, so a loaded model starts as the function that it was. Peebles and Xie
2022, arXiv 2212.09748. Below: tables, embedders, the parts of a block, the block, the model.

Shapes: B batch, N image tokens (row index slow, column fast), T text tokens, L all tokens of a block, D width, K head
width, C channels, H W latent size, h w token grid.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from shared.engine.products import use_fast_products
from shared.engine.recompute import checkpoint

EPS = 1e-6
Rotation = tuple[Tensor, Tensor] | None

# --- tables and embedders ---------------------------------------------------------------------------------------------


def timestep_sinusoid(t_B: Tensor, dim: int, *, max_period: float = 10000.0, freq_shift: int = 0) -> Tensor:
    """Cosines, then sines, of t times frequencies from 1 down to about 1 / max_period: (B, dim) float32.

    freq_shift 0 divides the exponent by half the dimension (official DiT), 1 by one less (diffusers' DiT): weights
    trained with one give several per cent of error with the other. An odd dim gets one zero column at the end.
    """
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / (half - freq_shift)
    angles = t_B.float()[:, None] * exponents.exp()[None]
    columns = [angles.cos(), angles.sin()]
    if dim % 2:
        columns.append(torch.zeros_like(angles[:, :1]))
    return torch.cat(columns, dim=1)


def position_table_1d(dim: int, positions: Tensor) -> Tensor:
    """Sines, then cosines, of the positions (any shape, flattened): (count, dim) float64. `dim` is even."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2.0))
    angles = positions.reshape(-1).double()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_table_2d(dim: int, rows: int, columns: int, *, scale: float = 1.0) -> Tensor:
    """The table (rows * columns, dim) float64 that DiT adds to its tokens. `dim` is a multiple of 4.

    The FIRST half encodes the COLUMN and the second the row, as in the public weights. `scale` multiplies the
    coordinates (PixArt divides them when the grid is larger than the one trained on).
    """
    row, column = torch.meshgrid(torch.arange(rows) * scale, torch.arange(columns) * scale, indexing="ij")
    return torch.cat([position_table_1d(dim // 2, column), position_table_1d(dim // 2, row)], dim=1)


def rotation_table_2d(head_width: int, rows: int, columns: int, *, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, K) of the rotary embedding: half of a head turns with the row, half with the column."""
    quarter = head_width // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], dim=1)
    angles = angles.repeat_interleave(2, dim=1)  # neighbours (0, 1), (2, 3), ... turn together
    return angles.cos().float(), angles.sin().float()


def rotate(heads_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Turn neighbouring pairs of the last dimension by a table of angles, which may be each sample's own (B, N, K)."""
    if cos_NK.ndim == 3:
        cos_NK, sin_NK = cos_NK[:, None], sin_NK[:, None]
    pairs = rearrange(heads_BHNK, "b heads n (k two) -> b heads n k two", two=2)
    turned = rearrange(torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1), "b heads n k two -> b heads n (k two)")
    return heads_BHNK * cos_NK.to(heads_BHNK.dtype) + turned * sin_NK.to(heads_BHNK.dtype)


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) to tokens (B, N, D): one linear map per p x p patch."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        # in the order of memory: every later sum would keep the convolution's order, and every normalisation copy
        return rearrange(self.proj(latent_BCHW), "b d h w -> b (h w) d").contiguous()


def unpatchify(tokens_BNV: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens whose last dimension is (row in patch, column in patch, channel), channel fastest, to (B, C, H, W)."""
    return rearrange(tokens_BNV, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch_size, q=patch_size)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first weights: what its input must have outside autocast."""
    return next(module.parameters()).dtype


class TimestepEmbedder(nn.Module):
    """Time (B,), fractions allowed, to a vector (B, D)."""

    def __init__(self, hidden_size: int, *, frequency_dim: int = 256, freq_shift: int = 0) -> None:
        super().__init__()
        self.frequency_dim, self.freq_shift = frequency_dim, freq_shift
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_B: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(t_B, self.frequency_dim, freq_shift=self.freq_shift)
        return self.mlp(sinusoid.to(dtype_of(self.mlp)))


class LabelEmbedder(nn.Module):
    """Class label (B,) to a vector (B, D). With a null row, index num_classes stands for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int, *, null_row: bool = True) -> None:
        super().__init__()
        self.num_classes, self.null_row = num_classes, null_row
        self.embedding_table = nn.Embedding(num_classes + int(null_row), hidden_size)

    def forward(self, labels_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        if drop_B is not None:
            if not self.null_row:
                raise ValueError("labels cannot be dropped: the table has no null row (class_dropout is 0)")
            labels_B = torch.where(drop_B, self.num_classes, labels_B)
        return self.embedding_table(labels_B)


# --- the parts of a block ---------------------------------------------------------------------------------------------


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same for every token of a sample."""
    return torch.addcmul(shift_BD[:, None], x_BLD, 1 + scale_BD[:, None])


class Norm(nn.Module):
    """Normalisation over the width without trained parameters: layernorm, rmsnorm, or none."""

    def __init__(self, hidden_size: int, kind: str = "layernorm") -> None:
        super().__init__()
        self.hidden_size, self.kind = hidden_size, kind

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return layer_norm(x_BLD, (self.hidden_size,), eps=EPS)
        if self.kind == "rmsnorm":
            return nn.functional.rms_norm(x_BLD, (self.hidden_size,), eps=EPS)
        return x_BLD


class Attention(nn.Module):
    """Self-attention; rows of qkv are ordered q, k, v and inside each by head."""

    def __init__(
        self, hidden_size: int, num_heads: int, *, qk_norm: bool = False, value_residual: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        # the share of the first block's values (Zhou et al. 2024, arXiv 2410.17897, in its learned form)
        self.value_share = nn.Parameter(torch.tensor(0.5)) if value_residual else None
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        head_width = hidden_size // num_heads
        self.q_norm = nn.RMSNorm(head_width, eps=EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width, eps=EPS) if qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, rotation: Rotation = None, mask_BL: Tensor | None = None) -> Tensor:
        """Attended tokens (B, L, D)."""
        return self.attend(x_BLD, rotation, mask_BL)[0]

    def attend(
        self,
        x_BLD: Tensor,
        rotation: Rotation = None,
        mask_BL: Tensor | None = None,
        first_v: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attended tokens (B, L, D), and the block's own values (B, heads, L, K)."""
        qkv = rearrange(self.qkv(x_BLD), "b l (three heads k) -> b l three heads k", three=3, heads=self.num_heads)
        # unbound where they lie, so that their gradients are stacked in the order of memory
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k, own_v = self.q_norm(q), self.k_norm(k), v
        if self.value_share is not None and first_v is not None:
            v = torch.lerp(v, first_v.to(v.dtype), self.value_share.to(v.dtype))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        mask = None if mask_BL is None else mask_BL[:, None, None]
        attended = rearrange(scaled_dot_product_attention(q, k, v, attn_mask=mask), "b heads l k -> b l (heads k)")
        return self.proj(attended), own_v


class CrossAttention(nn.Module):
    """Image tokens look at text tokens; padding is masked."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, text_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        q = rearrange(self.q(x_BND), "b n (heads k) -> b heads n k", heads=self.num_heads)
        kv = rearrange(self.kv(text_BTD), "b t (two heads k) -> b t two heads k", two=2, heads=self.num_heads)
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        mask = None if mask_BT is None else mask_BT[:, None, None]
        return self.proj(
            rearrange(scaled_dot_product_attention(q, k, v, attn_mask=mask), "b heads n k -> b n (heads k)")
        )


class MLP(nn.Module):
    """GELU (tanh) or SwiGLU, whose 8D/3 hidden units, rounded up to 256, make about the same number of parameters."""

    def __init__(self, hidden_size: int, *, kind: str = "gelu", ratio: float = 4.0) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = -(-8 * hidden_size // 3 // 256) * 256 if self.gated else int(hidden_size * ratio)
        self.fc1 = nn.Linear(hidden_size, 2 * hidden if self.gated else hidden)
        self.fc2 = nn.Linear(hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(nn.functional.silu(gate) * value)
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


# --- the block and the model ------------------------------------------------------------------------------------------


def _modulation(vectors: int, hidden_size: int, conditioning: str) -> tuple[nn.Sequential | None, nn.Parameter | None]:
    """Condition to shifts, scales and gates: a projection of its own, or a table added to vectors that all share."""
    if conditioning == "adaln_zero":
        return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, vectors * hidden_size)), None
    return None, nn.Parameter(torch.empty(vectors, hidden_size))


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to text, MLP; the first and last are shifted, scaled and gated by the condition.

    `condition` is the vector c (B, D) with adaln_zero, and the six vectors (B, 6, D) shared by all blocks with
    adaln_single.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        norm: str = "layernorm",
        qk_norm: bool = False,
        cross: bool = False,
        cross_norm: str = "layernorm",
        conditioning: str = "adaln_zero",
        drop_path: float = 0.0,
        value_residual: bool = False,
        is_first: bool = False,
    ) -> None:
        super().__init__()
        self.drop_path, self.value_residual = drop_path, value_residual
        self.norm1 = Norm(hidden_size, norm)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm, value_residual=value_residual and not is_first)
        self.cross_norm = Norm(hidden_size, cross_norm) if cross else None
        self.cross_attn = CrossAttention(hidden_size, num_heads) if cross else None
        self.norm2 = Norm(hidden_size, norm)
        self.mlp = MLP(hidden_size, kind=mlp, ratio=mlp_ratio)
        self.adaLN_modulation, self.scale_shift_table = _modulation(6, hidden_size, conditioning)

    def forward(
        self,
        x_BLD: Tensor,
        condition: Tensor,
        text_BTD: Tensor | None = None,
        text_mask_BT: Tensor | None = None,
        rotation: Rotation = None,
        mask_BL: Tensor | None = None,
        draws_B3: Tensor | None = None,
        first_v: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens to tokens; with value_residual the values of this block as well, which the first one hands on."""
        # the order of the six is that of the public weights
        if self.adaLN_modulation is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        else:
            assert self.scale_shift_table is not None  # one of the two is there
            shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + condition).unbind(1)
        attended, values = self.attn.attend(modulate(self.norm1(x_BLD), shift1, scale1), rotation, mask_BL, first_v)
        x_BLD = torch.addcmul(x_BLD, gate1[:, None], self._drop(attended, draws_B3, 0))
        # text enters between the two, ungated: its last projection starts at zero, so it needs no gate to start as
        # the identity
        if self.cross_attn is not None and self.cross_norm is not None:
            x_BLD = x_BLD + self._drop(self.cross_attn(self.cross_norm(x_BLD), text_BTD, text_mask_BT), draws_B3, 1)
        expanded = self.mlp(modulate(self.norm2(x_BLD), shift2, scale2))
        x_BLD = torch.addcmul(x_BLD, gate2[:, None], self._drop(expanded, draws_B3, 2))
        return (x_BLD, values) if self.value_residual else x_BLD

    def _drop(self, branch_BLD: Tensor, draws_B3: Tensor | None, branch: int) -> Tensor:
        """Stochastic depth (Huang et al. 2016): leave the branch out for whole samples in training, and scale the rest
        up. draws_B3: uniform numbers for the three branches, the sample's own; without them torch's generator draws.
        """
        if not self.training or self.drop_path == 0.0:
            return branch_BLD
        count = len(branch_BLD)
        draw_B = torch.rand(count, device=branch_BLD.device) if draws_B3 is None else draws_B3[:, branch]
        return branch_BLD * (draw_B >= self.drop_path)[:, None, None] / (1 - self.drop_path)


class FinalLayer(nn.Module):
    """Tokens to patch values, shifted and scaled by the condition c (B, D)."""

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        out_channels: int,
        *,
        norm: str = "layernorm",
        conditioning: str = "adaln_zero",
    ) -> None:
        super().__init__()
        self.norm_final = Norm(hidden_size, norm)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation, self.scale_shift_table = _modulation(2, hidden_size, conditioning)

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=-1)
        else:
            assert self.scale_shift_table is not None  # one of the two is there
            shift, scale = (self.scale_shift_table + c_BD[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x_BND), shift, scale))


class NullText(nn.Module):
    """What stands for "no caption": stored in the model, so that sampling needs no text encoder for it."""

    null_text_states: Tensor
    null_text_mask: Tensor
    null_text_pooled: Tensor

    def make_null_text(self, kind: str, text_len: int, text_dim: int) -> None:
        """Room for the encoded empty caption, or (kind learned) parameters in its place."""
        self.register_buffer("null_text_mask", torch.ones(text_len, dtype=torch.bool))
        if kind == "learned":
            self.null_text_states = nn.Parameter(torch.randn(text_len, text_dim) * 0.02)
            self.null_text_pooled = nn.Parameter(torch.zeros(text_dim))
        else:
            self.register_buffer("null_text_states", torch.zeros(text_len, text_dim))
            self.register_buffer("null_text_pooled", torch.zeros(text_dim))

    @torch.no_grad()
    def set_null_text(self, states_TD: Tensor, mask_T: Tensor, pooled_D: Tensor) -> None:
        """Store the encoded empty caption."""
        length = len(states_TD)
        for name, value in (("states", states_TD), ("mask", mask_T)):
            stored = getattr(self, f"null_text_{name}")
            stored.zero_()
            stored[:length] = value.to(stored.dtype)
        self.null_text_pooled.copy_(pooled_D)

    def states_or_null(self, states: Tensor, mask: Tensor | None, drop: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """States (B, T, text_dim) and mask (B, T) with the null condition in the rows where drop (B,) is True."""
        mask = None if mask is None else mask.bool()
        if drop is not None:
            length = states.shape[1]
            states = torch.where(drop[:, None, None], self.null_text_states[:length].to(states.dtype), states)
            if mask is not None:
                mask = torch.where(drop[:, None], self.null_text_mask[:length], mask)
        return states, mask


class DiTModel(NullText):
    """`DiTModel(noisy_latents, timesteps, text_embeddings)` -> `out_channels` channels of the latents' size."""

    def __init__(
        self,
        hidden_size: int = 768,
        num_layers: int = 16,
        num_heads: int = 12,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        mlp_ratio: float = 4.0,
        text_conditioning: Literal["cross", "joint", "pooled", "none"] = "cross",
        use_pooled_text: bool = True,
        text_dim: int = 512,
        text_len: int = 77,
        text_mask: bool = True,
        null_text: Literal["empty", "learned"] = "empty",
        num_classes: int | None = None,
        class_dropout: float = 0.1,
        learn_sigma: bool = False,
        conditioning: Literal["adaln_zero", "adaln_single"] = "adaln_zero",
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
        cross_norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm",
        qk_norm: bool = False,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        pos: Literal["sincos", "rope2d", "sincos+rope2d"] = "sincos",
        drop_path: float = 0.0,
        pos_scale: float = 1.0,
        time_freq_shift: Literal[0, 1] = 0,
        value_residual: bool = False,
        route_share: float = 0.0,
        route_start: int = 2,
        route_end: int | None = None,
        align_width: int | None = None,
        align_layer: int = 8,
        align_hidden: int = 2048,
    ) -> None:
        super().__init__()
        self.route_share, self.route_start = route_share, route_start
        self.route_end = max(route_start, num_layers - 4) if route_end is None else route_end
        self.align_layer = align_layer
        _check_sizes(hidden_size, num_heads, input_size, patch_size, pos)
        self.patch_size, self.in_channels = patch_size, in_channels
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch_size,) * 2
        self.text_conditioning, self.text_mask, self.pos, self.null_text = text_conditioning, text_mask, pos, null_text
        self.text_len, self.pos_scale = text_len, pos_scale
        self.gradient_checkpointing: bool | int = False
        self.pos_embed: Tensor | None
        self._positions: dict[tuple, Tensor] = {}
        self._rotations: dict[tuple, tuple[Tensor, Tensor]] = {}

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, freq_shift=time_freq_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_row=class_dropout > 0) if num_classes else None
        reads_tokens = text_conditioning in ("cross", "joint")
        reads_pooled = text_conditioning == "pooled" or (reads_tokens and use_pooled_text)
        self.text_embedder = _text_mlp(text_dim, hidden_size, nn.GELU(approximate="tanh")) if reads_tokens else None
        self.pooled_embedder = _text_mlp(text_dim, hidden_size, nn.SiLU()) if reads_pooled else None
        if text_conditioning != "none":
            self.make_null_text(null_text, text_len, text_dim)
        self.register_buffer("pos_embed", None)
        if "sincos" in pos:
            table = position_table_2d(hidden_size, *self.grid, scale=pos_scale)
            self.register_buffer("pos_embed", table.float()[None])
        is_single = conditioning == "adaln_single"
        self.adaLN_single = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) if is_single else None
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                mlp=mlp,
                norm=norm,
                qk_norm=qk_norm,
                cross=text_conditioning == "cross",
                cross_norm=cross_norm,
                conditioning=conditioning,
                drop_path=drop_path * index / max(num_layers - 1, 1),
                value_residual=value_residual,
                is_first=index == 0,
            )
            for index in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, norm=norm, conditioning=conditioning)
        self.projector = None
        if align_width is not None:  # REPA (Yu et al. 2024, arXiv 2410.06940): three layers onto an encoder's features
            self.projector = nn.Sequential(
                nn.Linear(hidden_size, align_hidden),
                nn.SiLU(),
                nn.Linear(align_hidden, align_hidden),
                nn.SiLU(),
                nn.Linear(align_hidden, align_width),
            )
        self.initialize_weights()
        use_fast_products(self)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text_embeddings: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        text_pooled: Tensor | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
        path_draws: Tensor | None = None,
        route_draws: Tensor | None = None,
        align: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        """noisy_latents (B, C, H, W), timesteps (B,), text_embeddings (B, T, text_dim), text_mask (B, T) True at real
        tokens, text_pooled (B, text_dim), labels (B,). Where drop (B,) is True the null condition takes the place of
        text or label. path_draws (B, layers, 3): uniform numbers that decide on drop_path. route_draws (B, N): uniform
        numbers that decide which tokens pass by the middle blocks. align: also return the projected tokens (B, n, E) of
        block align_layer, and the numbers (B, n) of the tokens they belong to, None for all.
        """
        # The null condition replaces states, mask and pooled vector together, sample by sample: guidance at sampling
        # compares with exactly what training showed.
        grid = (noisy_latents.shape[2] // self.patch_size, noisy_latents.shape[3] // self.patch_size)
        states, mask, pooled = self._with_null_text(text_embeddings, text_mask, text_pooled, drop)

        # Patches become tokens; positions are added once, or turned into q and k in every block (rope), or both.
        x_BLD = self.x_embedder(noisy_latents)
        if self.pos_embed is not None:
            x_BLD = x_BLD + self._position_table(grid).to(x_BLD.dtype)

        # One vector c a sample: time, plus what is known of the whole picture. Every block reads its shifts, scales
        # and gates from it.
        c_BD = self.t_embedder(timesteps)
        if self.pooled_embedder is not None:
            c_BD = c_BD + self.pooled_embedder(pooled)
        if self.y_embedder is not None:
            c_BD = c_BD + self.y_embedder(labels, drop)

        # Text tokens are projected once. cross: they stay aside, cut to the longest caption of the batch, which changes
        # no result; on a GPU that number would have to be waited for. joint: they go in front of the image tokens.
        if self.text_conditioning == "cross" and states is not None and mask is not None and mask.device.type == "cpu":
            longest = _real_tokens(mask)
            states, mask = states[:, :longest], mask[:, :longest]
        text_BTD = None if self.text_embedder is None else self.text_embedder(states)
        tokens_before, mask_BL = 0, None
        if self.text_conditioning == "joint" and text_BTD is not None:
            tokens_before = text_BTD.shape[1]
            if mask is not None:
                mask_BL = torch.cat([mask, mask.new_ones(x_BLD.shape[:2])], dim=1)
            x_BLD, text_BTD, mask = torch.cat([text_BTD, x_BLD], dim=1), None, None

        # The blocks. A recomputed one keeps its input only; use_reentrant=False is the form that works under every
        # strategy. adaln_single: the six vectors are made here, once for all blocks.
        condition = (
            c_BD if self.adaLN_single is None else rearrange(self.adaLN_single(c_BD), "b (six d) -> b six d", six=6)
        )
        rotation = self._rotation(grid, tokens_before, x_BLD.device) if "rope" in self.pos else None
        whole = (rotation, mask_BL)
        first_v: Tensor | None = None
        first_of_part: Tensor | None = None
        kept: Tensor | None = None
        projected: Tensor | None = None
        aligned_kept: Tensor | None = None
        x_before = x_BLD
        for index, block in enumerate(self.blocks):
            # TREAD (Krause et al. 2025, arXiv 2501.04765): in training a share of the image tokens passes by the middle
            # blocks and joins the others again; drawing uses all.
            if route_draws is not None and self.training and index == self.route_start:
                kept = self._kept_tokens(route_draws, tokens_before)
                x_before, x_BLD = x_BLD, _taken(x_BLD, kept)
                rotation = None if rotation is None else (rotation[0][kept], rotation[1][kept])
                mask_BL = None if mask_BL is None else mask_BL.gather(1, kept)
                first_of_part = None if first_v is None else first_v.gather(2, _like_heads(kept, first_v))
            if kept is not None and index == self.route_end:
                x_BLD = x_before.scatter(1, kept[..., None].expand_as(x_BLD), x_BLD.to(x_before.dtype))
                (rotation, mask_BL), kept = whole, None
            arguments = (
                x_BLD,
                condition,
                text_BTD,
                mask,
                rotation,
                mask_BL,
                None if path_draws is None else path_draws[:, index],
                first_v if kept is None else first_of_part,
            )
            every = int(self.gradient_checkpointing)
            if every and self.training and index % every == 0:
                found = checkpoint(block, *arguments)
            else:
                found = block(*arguments)
            x_BLD, values = found if isinstance(found, tuple) else (found, None)
            first_v = values if index == 0 else first_v
            if align and self.projector is not None and index + 1 == self.align_layer:
                projected, aligned_kept = self.projector(x_BLD[:, tokens_before:]), kept
        if kept is not None:
            x_BLD = x_before.scatter(1, kept[..., None].expand_as(x_BLD), x_BLD.to(x_before.dtype))
        found = unpatchify(self.final_layer(x_BLD[:, tokens_before:], c_BD), grid, self.patch_size)
        if not align:
            return found
        assert projected is not None  # asked for of models that have a projector and the layer
        return found, projected, None if aligned_kept is None else aligned_kept[:, tokens_before:] - tokens_before

    def _kept_tokens(self, draws_BN: Tensor, tokens_before: int) -> Tensor:
        """Numbers (B, n) of the tokens that go through the middle blocks: all of text, the smallest draws of image."""
        count = max(1, round(draws_BN.shape[1] * (1 - self.route_share)))
        image = draws_BN.argsort(1)[:, :count].sort(1).values + tokens_before
        text = torch.arange(tokens_before, device=image.device).expand(len(image), -1)
        return torch.cat([text, image], dim=1)

    def initialize_weights(self) -> None:
        """Xavier; zeros where a branch joins, every block starts as the identity and the output as exactly 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        assert self.x_embedder.proj.bias is not None  # made with one
        nn.init.zeros_(self.x_embedder.proj.bias)
        small: list[nn.Module] = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        small += [] if self.text_embedder is None else [self.text_embedder[0], self.text_embedder[2]]
        small += [] if self.y_embedder is None else [self.y_embedder.embedding_table]
        small += [] if self.adaLN_single is None else [self.adaLN_single[1]]
        for module in small:
            nn.init.normal_(module.get_parameter("weight"), std=0.02)
        zero: list[nn.Module] = [self.final_layer.linear]
        zero += [] if self.pooled_embedder is None else [self.pooled_embedder[2]]
        blocks = [block for block in self.blocks if isinstance(block, DiTBlock)]
        layers: list[DiTBlock | FinalLayer] = [*blocks, self.final_layer]
        for layer in layers:
            if layer.adaLN_modulation is not None:
                zero.append(layer.adaLN_modulation[1])
            elif layer.scale_shift_table is not None:
                nn.init.normal_(layer.scale_shift_table, std=self.hidden_size**-0.5)
        zero += [block.cross_attn.proj for block in blocks if block.cross_attn is not None]
        for module in zero:
            nn.init.zeros_(module.get_parameter("weight"))
            nn.init.zeros_(module.get_parameter("bias"))

    def _with_null_text(
        self, states: Tensor | None, mask: Tensor | None, pooled: Tensor | None, drop: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """States, mask and pooled vector with the null condition in dropped rows; no mask where padding may be seen."""
        if self.text_conditioning == "none":
            return None, None, None
        if self.text_embedder is not None:
            if states is None:
                raise ValueError("this model reads text: give text_embeddings (B, T, text_dim)")
            states, mask = self.states_or_null(states.to(dtype_of(self.text_embedder)), mask, drop)
        if self.pooled_embedder is not None:
            if pooled is None:  # the guide's call gives token states only; the mean over real tokens stands in
                if states is None:
                    raise ValueError("this model reads pooled text: give text_pooled (B, text_dim)")
                weight = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
                pooled = (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)
            pooled = pooled.to(dtype_of(self.pooled_embedder))
            if drop is not None:
                pooled = torch.where(drop[:, None], self.null_text_pooled.to(pooled.dtype), pooled)
        return states, mask if self.text_mask else None, pooled

    def _position_table(self, grid: tuple[int, int]) -> Tensor:
        assert self.pos_embed is not None  # asked for by models that add positions
        if grid == self.grid:
            return self.pos_embed
        key = (grid, self.pos_embed.device)
        if key not in self._positions:
            table = position_table_2d(self.hidden_size, *grid, scale=self.pos_scale)
            self._positions[key] = table.float()[None].to(self.pos_embed.device)
        return self._positions[key]

    def _rotation(self, grid: tuple[int, int], tokens_before: int, device: torch.device) -> Rotation:
        """Angles for the image tokens; text tokens in front of them are not turned."""
        key = (grid, tokens_before, device)
        if key not in self._rotations:
            cos, sin = rotation_table_2d(self.hidden_size // self.num_heads, *grid)
            cos = torch.cat([torch.ones(tokens_before, cos.shape[1]), cos])
            sin = torch.cat([torch.zeros(tokens_before, sin.shape[1]), sin])
            self._rotations[key] = (cos.to(device), sin.to(device))
        return self._rotations[key]


def _taken(x_BLD: Tensor, kept_BN: Tensor) -> Tensor:
    return x_BLD.gather(1, kept_BN[..., None].expand(-1, -1, x_BLD.shape[2]))


def _like_heads(kept_BN: Tensor, values_BHLK: Tensor) -> Tensor:
    return kept_BN[:, None, :, None].expand(-1, values_BHLK.shape[1], -1, values_BHLK.shape[3])


def _real_tokens(mask_BT: Tensor) -> int:
    """Tokens up to the last real one of the batch, at least one: what follows is masked for every sample."""
    places = mask_BT.any(0).nonzero()
    return int(places[-1]) + 1 if len(places) else 1


def _text_mlp(text_dim: int, hidden_size: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(text_dim, hidden_size), activation, nn.Linear(hidden_size, hidden_size))


def _check_sizes(hidden_size: int, num_heads: int, input_size: int, patch_size: int, pos: str) -> None:
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")
    if input_size % patch_size:
        raise ValueError(f"input_size {input_size} must be a multiple of patch_size {patch_size}")
    if "rope" in pos and (hidden_size // num_heads) % 4:
        raise ValueError(f"rope2d needs a head width that is a multiple of 4, not {hidden_size}/{num_heads}")
