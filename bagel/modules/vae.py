"""The FLUX autoencoder (frozen): images in [-1, 1] to latents of 1/8 of the side and back; and a pixel code for small
runs.

Letters of shapes: B images, C channels, H W pixels, h w latent cells.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from bagel.config import AutoencoderConfig


class ResnetBlock(nn.Module):
    """GroupNorm-swish-conv twice, plus the input (through a 1x1 convolution when the channels differ)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return inner + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head attention over all cells."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.v, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        parts = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(*parts)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the side: one column and row of zeros at the right and bottom, then a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side by nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1, middle.attn_1, middle.block_2 = (
        ResnetBlock(channels, channels),
        AttentionBlock(channels),
        ResnetBlock(channels, channels),
    )
    return middle


def _run_middle(middle: nn.Module, x: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(x)))


class Encoder(nn.Module):
    """Image to the moments (mean, log variance) of the latent; level 0 is the finest."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.ch
        for level, factor in enumerate(config.ch_mult):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                stage.block.append(ResnetBlock(channels, config.ch * factor))
                channels = config.ch * factor
            if level < len(config.ch_mult) - 1:
                stage.downsample = Downsample(channels)
            self.down.append(stage)
        self.mid = _middle(channels)
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, stage in enumerate(self.down):
            for block in stage.block:
                x = block(x)
            if level < len(self.down) - 1:
                x = stage.downsample(x)
        return self.conv_out(F.silu(self.norm_out(_run_middle(self.mid, x))))


class Decoder(nn.Module):
    """Latent to image, from the coarsest level to level 0."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = _middle(channels)
        stages = []
        for level in reversed(range(len(config.ch_mult))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                stage.block.append(ResnetBlock(channels, config.ch * config.ch_mult[level]))
                channels = config.ch * config.ch_mult[level]
            if level > 0:
                stage.upsample = Upsample(channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = _run_middle(self.mid, self.conv_in(z))
        for level in reversed(range(len(self.up))):
            for block in self.up[level].block:
                x = block(x)
            if level > 0:
                x = self.up[level].upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class FluxAutoencoder(nn.Module):
    """encode: pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8) of about unit variance; decode: back."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.scale, self.shift = config.scale_factor, config.shift_factor

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's sample with the given normal noise, or its mean when noise is None."""
        mean, log_variance = self.encoder(image).chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return self.scale * (z - self.shift)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent / self.scale + self.shift)


class PixelAutoencoder(nn.Module):
    """For training from nothing: a latent cell holds its s x s pixels as 3 s s channels, moved and scaled. Exact, no
    weights.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.side, self.scale, self.shift = config.downsample, config.scale_factor, config.shift_factor

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Exact, so the posterior has no width and `noise` changes nothing."""
        z = rearrange(image, "b c (h p) (w q) -> b (c p q) h w", p=self.side, q=self.side)
        return self.scale * (z - self.shift)

    def decode(self, latent: Tensor) -> Tensor:
        return rearrange(latent / self.scale + self.shift, "b (c p q) h w -> b c (h p) (w q)", p=self.side, q=self.side)


Autoencoder = FluxAutoencoder | PixelAutoencoder


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """The configured autoencoder, frozen and in evaluation mode."""
    autoencoder = FluxAutoencoder(config) if config.kind == "flux" else PixelAutoencoder(config)
    return autoencoder.requires_grad_(False).eval()


def to_uint8(image: Tensor) -> Tensor:
    """Pixels in [-1, 1] (3, H, W) to uint8 (H, W, 3), by truncation as the released code does."""
    return (image.float() * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8).permute(1, 2, 0)
