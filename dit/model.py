"""The diffusion transformer: noisy latent, time and text (or class) in; noise, clean latent or velocity out.

Tensor names are those of the public class-conditional DiT and SiT, so their weights load; text enters by cross-
attention whose last projection starts at zero, so a loaded model starts as the function that it was. Peebles and Xie
2022, arXiv 2212.09748.

Shapes: B batch, N image tokens, T text tokens, L all tokens of a block, D width, K head width, C channels, H W latent
size.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit.modules.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    position_table_2d,
    rotation_table_2d,
    unpatchify,
)
from dit.modules.layers import MLP, Attention, CrossAttention, Norm, Rotation, modulate


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
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = Norm(hidden_size, norm)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.cross_norm = Norm(hidden_size, cross_norm) if cross else None
        self.cross_attn = CrossAttention(hidden_size, num_heads) if cross else None
        self.norm2 = Norm(hidden_size, norm)
        self.mlp = MLP(hidden_size, kind=mlp, ratio=mlp_ratio)
        if conditioning == "adaln_zero":
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
            self.scale_shift_table = None
        else:
            self.adaLN_modulation = None
            self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))

    def forward(
        self,
        x_BLD: Tensor,
        condition: Tensor,
        text_BTD: Tensor | None = None,
        text_mask_BT: Tensor | None = None,
        rotation: Rotation = None,
        mask_BL: Tensor | None = None,
    ) -> Tensor:
        if self.scale_shift_table is None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + condition).unbind(1)
        attended = self.attn(modulate(self.norm1(x_BLD), shift1, scale1), rotation, mask_BL)
        x_BLD = torch.addcmul(x_BLD, gate1[:, None], self._drop(attended))
        if self.cross_attn is not None:
            x_BLD = x_BLD + self._drop(self.cross_attn(self.cross_norm(x_BLD), text_BTD, text_mask_BT))
        expanded = self.mlp(modulate(self.norm2(x_BLD), shift2, scale2))
        return torch.addcmul(x_BLD, gate2[:, None], self._drop(expanded))

    def _drop(self, branch_BLD: Tensor) -> Tensor:
        """Stochastic depth: leave the branch out for whole samples in training, and scale the rest up."""
        if not self.training or self.drop_path == 0.0:
            return branch_BLD
        keep = torch.rand(branch_BLD.shape[0], 1, 1, device=branch_BLD.device) >= self.drop_path
        return branch_BLD * keep / (1 - self.drop_path)


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
        if conditioning == "adaln_zero":
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
            self.scale_shift_table = None
        else:
            self.adaLN_modulation = None
            self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        if self.scale_shift_table is None:
            shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=-1)
        else:
            shift, scale = (self.scale_shift_table + c_BD[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x_BND), shift, scale))


class DiTModel(nn.Module):
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
        time_freq_shift: Literal[0, 1] = 0,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_heads, input_size, patch_size, pos)
        self.patch_size, self.in_channels = patch_size, in_channels
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.grid = (input_size // patch_size,) * 2
        self.text_conditioning, self.text_mask, self.pos, self.null_text = text_conditioning, text_mask, pos, null_text
        self.text_len = text_len
        self.gradient_checkpointing: bool | int = False
        self._tables: dict[tuple, Tensor | Rotation] = {}

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, freq_shift=time_freq_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_row=class_dropout > 0) if num_classes else None
        reads_tokens = text_conditioning in ("cross", "joint")
        reads_pooled = text_conditioning == "pooled" or (reads_tokens and use_pooled_text)
        self.text_embedder = _text_mlp(text_dim, hidden_size, nn.GELU(approximate="tanh")) if reads_tokens else None
        self.pooled_embedder = _text_mlp(text_dim, hidden_size, nn.SiLU()) if reads_pooled else None
        if text_conditioning != "none":
            self._make_null_text(text_len, text_dim)
        self.register_buffer("pos_embed", None)
        if "sincos" in pos:
            self.register_buffer("pos_embed", position_table_2d(hidden_size, *self.grid).float()[None])
        is_single = conditioning == "adaln_single"
        self.adaLN_single = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) if is_single else None
        options = {"mlp_ratio": mlp_ratio, "mlp": mlp, "norm": norm, "qk_norm": qk_norm, "cross_norm": cross_norm}
        options |= {"cross": text_conditioning == "cross", "conditioning": conditioning}
        rates = [drop_path * index / max(num_layers - 1, 1) for index in range(num_layers)]
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, drop_path=rate, **options) for rate in rates)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, norm=norm, conditioning=conditioning)
        self.initialize_weights()

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
    ) -> Tensor:
        """noisy_latents (B, C, H, W), timesteps (B,), text_embeddings (B, T, text_dim), text_mask (B, T) True at real
        tokens, text_pooled (B, text_dim), labels (B,). Where drop (B,) is True the null condition takes the place of
        text or label.
        """
        grid = (noisy_latents.shape[2] // self.patch_size, noisy_latents.shape[3] // self.patch_size)
        states, mask, pooled = self._with_null_text(text_embeddings, text_mask, text_pooled, drop)
        x_BLD = self.x_embedder(noisy_latents)
        if self.pos_embed is not None:
            x_BLD = x_BLD + self._position_table(grid).to(x_BLD.dtype)
        c_BD = self.t_embedder(timesteps)
        if self.pooled_embedder is not None:
            c_BD = c_BD + self.pooled_embedder(pooled)
        if self.y_embedder is not None:
            c_BD = c_BD + self.y_embedder(labels, drop)
        if self.text_conditioning == "cross" and mask is not None and mask.device.type == "cpu":
            longest = _real_tokens(mask)  # on a GPU the number would have to be waited for
            states, mask = states[:, :longest], mask[:, :longest]
        text_BTD = None if self.text_embedder is None else self.text_embedder(states)
        tokens_before, mask_BL = 0, None
        if self.text_conditioning == "joint":
            tokens_before = text_BTD.shape[1]
            if mask is not None:
                mask_BL = torch.cat([mask, mask.new_ones(x_BLD.shape[:2])], dim=1)
            x_BLD, text_BTD, mask = torch.cat([text_BTD, x_BLD], dim=1), None, None
        condition = (
            c_BD if self.adaLN_single is None else rearrange(self.adaLN_single(c_BD), "b (six d) -> b six d", six=6)
        )
        rotation = self._rotation(grid, tokens_before, x_BLD.device) if "rope" in self.pos else None
        for index, block in enumerate(self.blocks):
            every = int(self.gradient_checkpointing)
            if every and self.training and index % every == 0:
                x_BLD = checkpoint(block, x_BLD, condition, text_BTD, mask, rotation, mask_BL, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, condition, text_BTD, mask, rotation, mask_BL)
        return unpatchify(self.final_layer(x_BLD[:, tokens_before:], c_BD), grid, self.patch_size)

    @torch.no_grad()
    def set_null_text(self, states_TD: Tensor, mask_T: Tensor, pooled_D: Tensor) -> None:
        """Store the condition that stands for "no caption", so that sampling needs no text encoder for it."""
        length = len(states_TD)
        for name, value in (("states", states_TD), ("mask", mask_T)):
            stored = getattr(self, f"null_text_{name}")
            stored.zero_()
            stored[:length] = value.to(stored.dtype)
        self.null_text_pooled.copy_(pooled_D)

    def initialize_weights(self) -> None:
        """Xavier; zeros where a branch joins, every block starts as the identity and the output as exactly 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        small = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        small += [] if self.text_embedder is None else [self.text_embedder[0], self.text_embedder[2]]
        small += [] if self.y_embedder is None else [self.y_embedder.embedding_table]
        small += [] if self.adaLN_single is None else [self.adaLN_single[1]]
        for module in small:
            nn.init.normal_(module.weight, std=0.02)
        zero = [self.final_layer.linear] + ([] if self.pooled_embedder is None else [self.pooled_embedder[2]])
        for layer in (*self.blocks, self.final_layer):
            if layer.adaLN_modulation is not None:
                zero.append(layer.adaLN_modulation[1])
            else:
                nn.init.normal_(layer.scale_shift_table, std=self.hidden_size**-0.5)
        zero += [block.cross_attn.proj for block in self.blocks if block.cross_attn is not None]
        for module in zero:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def _make_null_text(self, text_len: int, text_dim: int) -> None:
        self.register_buffer("null_text_mask", torch.ones(text_len, dtype=torch.bool))
        if self.null_text == "learned":
            self.null_text_states = nn.Parameter(torch.randn(text_len, text_dim) * 0.02)
            self.null_text_pooled = nn.Parameter(torch.zeros(text_dim))
        else:
            self.register_buffer("null_text_states", torch.zeros(text_len, text_dim))
            self.register_buffer("null_text_pooled", torch.zeros(text_dim))

    def _with_null_text(
        self, states: Tensor | None, mask: Tensor | None, pooled: Tensor | None, drop: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """States, mask and pooled vector with the null condition in dropped rows; no mask where padding may be seen."""
        if self.text_conditioning == "none":
            return None, None, None
        if self.text_embedder is not None:
            if states is None:
                raise ValueError("this model reads text: give text_embeddings (B, T, text_dim)")
            states = states.to(self.text_embedder[0].weight.dtype)
            mask = None if mask is None else mask.bool()
            if drop is not None:
                length = states.shape[1]
                states = torch.where(drop[:, None, None], self.null_text_states[:length].to(states.dtype), states)
                if mask is not None:
                    mask = torch.where(drop[:, None], self.null_text_mask[:length], mask)
        if self.pooled_embedder is not None:
            if pooled is None:  # the guide's call gives token states only; the mean over real tokens stands in
                weight = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
                pooled = (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)
            pooled = pooled.to(self.pooled_embedder[0].weight.dtype)
            if drop is not None:
                pooled = torch.where(drop[:, None], self.null_text_pooled.to(pooled.dtype), pooled)
        return states, mask if self.text_mask else None, pooled

    def _position_table(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        key = ("table", grid, self.pos_embed.device)
        if key not in self._tables:
            self._tables[key] = position_table_2d(self.hidden_size, *grid).float()[None].to(self.pos_embed.device)
        return self._tables[key]

    def _rotation(self, grid: tuple[int, int], tokens_before: int, device: torch.device) -> Rotation:
        """Angles for the image tokens; text tokens in front of them are not turned."""
        key = ("rotation", grid, tokens_before, device)
        if key not in self._tables:
            cos, sin = rotation_table_2d(self.hidden_size // self.num_heads, *grid)
            cos = torch.cat([torch.ones(tokens_before, cos.shape[1]), cos])
            sin = torch.cat([torch.zeros(tokens_before, sin.shape[1]), sin])
            self._tables[key] = (cos.to(device), sin.to(device))
        return self._tables[key]


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
