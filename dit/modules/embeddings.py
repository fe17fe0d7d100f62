"""What a DiT adds to or makes from its inputs: time sinusoids, position tables, rotations, patches, labels.

Shapes: B batch, N image tokens (row index slow, column fast), D width, C channels, H W latent size, h w token grid, K
head width.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def timestep_sinusoid(t_B: Tensor, dim: int, *, max_period: float = 10000.0, freq_shift: int = 0) -> Tensor:
    """Cosines, then sines, of t times frequencies from 1 down to about 1 / max_period: (B, dim) float32.

    freq_shift 0 divides the exponent by half the dimension (official DiT), 1 by one less (diffusers' DiT): weights
    trained
    with one give several per cent of error with the other. An odd dim gets one zero column at the end.
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
    """Turn neighbouring pairs of the last dimension by the table's angles."""
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


class TimestepEmbedder(nn.Module):
    """Time (B,), fractions allowed, to a vector (B, D)."""

    def __init__(self, hidden_size: int, *, frequency_dim: int = 256, freq_shift: int = 0) -> None:
        super().__init__()
        self.frequency_dim, self.freq_shift = frequency_dim, freq_shift
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_B: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(t_B, self.frequency_dim, freq_shift=self.freq_shift)
        return self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


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
