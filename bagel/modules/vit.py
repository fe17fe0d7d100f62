"""SigLIP vision tower on packed images of any size (NaViT form): no batch axis, attention within each image only.

Letters of shapes: N patches of all images, D width, H heads, K head width, G images of one size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bagel.config import VisionConfig


class Embeddings(nn.Module):
    """Linear patch embedding plus, unless rotary positions are used, a learned position table."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = None if config.rope else nn.Embedding(config.patches_per_side**2, config.hidden_size)

    def forward(self, patches: Tensor, position_N: Tensor) -> Tensor:
        embedded = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        return embedded if self.position_embedding is None else embedded + self.position_embedding(position_N)


class SelfAttention(nn.Module):
    """Full attention within each image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, attend: "WithinImages", angles: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if angles is not None:
            query, key = rotate_grid(query, *angles), rotate_grid(key, *angles)
        return self.out_proj(attend(query, key, value).flatten(1))


class WithinImages:
    """Attention within each image; images of equal length that stand side by side are one batch."""

    def __init__(self, lengths: Sequence[int]):
        self.runs = _runs(lengths)

    @torch.compiler.disable  # the number and the sizes of images change with every pack
    def __call__(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor) -> Tensor:
        outputs, start = [], 0
        for length, images in self.runs:
            stop = start + length * images
            parts = (
                x[start:stop].unflatten(0, (images, length)).transpose(1, 2) for x in (query_NHK, key_NHK, value_NHK)
            )
            outputs.append(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1))
            start = stop
        if not outputs:  # empty, yet every weight gets a gradient
            return query_NHK + key_NHK + value_NHK
        return torch.cat(outputs)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring equal lengths together: [4, 4, 9] -> [(4, 2), (9, 1)]."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


class GeluMLP(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = GeluMLP(config)

    def forward(self, x: Tensor, attend: "WithinImages", angles: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), attend, angles)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """Patches (N, 3 P P), their table cells (N,) and the patches of each image -> features (N, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.side = config.patches_per_side
        self.rope_width = config.hidden_size // config.num_attention_heads if config.rope else None
        self.gradient_checkpointing = False

    def forward(self, patches: Tensor, position_N: Tensor, lengths: Sequence[int]) -> Tensor:
        x, attend = self.embeddings(patches, position_N), WithinImages(lengths)
        angles = None if self.rope_width is None else grid_angles(position_N, self.side, self.rope_width)
        for layer in self.encoder.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, attend, angles, use_reentrant=False)
            else:
                x = layer(x, attend, angles)
        return self.post_layernorm(x)


class VisionModel(nn.Module):
    """Holds the tower under the name that the released weights use."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, patches: Tensor, position_N: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.vision_model(patches, position_N, lengths)


def grid_angles(position_N: Tensor, side: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, K): the first half of a head turns with the row, the second with the column."""
    half = head_width // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32, device=position_N.device) / half)
    row, column = position_N // side, position_N % side
    parts = [torch.cat([angle, angle], dim=-1) for angle in (row[:, None] * frequency, column[:, None] * frequency)]
    angle = torch.cat(parts, dim=-1)
    return angle.cos(), angle.sin()


def rotate_grid(x_NHK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Half-rotation form within each half of a head."""
    turned = torch.cat(
        [part for half in x_NHK.chunk(2, dim=-1) for part in (-half.chunk(2, -1)[1], half.chunk(2, -1)[0])], dim=-1
    )
    return x_NHK * cos_NK[:, None].to(x_NHK.dtype) + turned * sin_NK[:, None].to(x_NHK.dtype)


def linear_patch_embedding(weight: Tensor) -> Tensor:
    """A convolution's weight (D, 3, P, P) as the linear weight (D, P P 3) of channel-last patches."""
    return weight.permute(0, 2, 3, 1).flatten(1)
