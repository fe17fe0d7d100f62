"""How pictures enter: the SigLIP tower that looks at them, and the frozen autoencoder whose latents are drawn."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from bagel.config import AutoencoderConfig, VisionConfig
from bagel.modules.transformer import FULL, PackLayout, flex_block_mask, flex_of_pack
from shared.engine.recompute import checkpoint


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
    """Attention within each image; images of equal length that stand side by side are one batch.

    flex: the device for whose compiled layers flex attention is made ready, in whose graph lengths are no constants.
    """

    def __init__(self, lengths: Sequence[int], flex: torch.device | None = None):
        self.runs = _runs(lengths)
        self.layout: PackLayout | None = None
        if flex is not None:
            self.layout = PackLayout(lengths, lengths, [FULL] * len(lengths))
            self.layout.block_mask = flex_block_mask(self.layout, flex)

    def __call__(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.layout is not None:
            return flex_of_pack(query_NHK, key_NHK, value_NHK, self.layout)
        return self._by_runs(query_NHK, key_NHK, value_NHK)

    @torch.compiler.disable  # the number and the sizes of images change with every pack
    def _by_runs(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor) -> Tensor:
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


class VisionEncoder(nn.Module):
    """Holds the layers under the name that the released weights use."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """Patches (N, 3 P P), their table cells (N,) and the patches of each image -> features (N, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.side = config.patches_per_side
        self.rope_width = config.hidden_size // config.num_attention_heads if config.rope else None
        self.gradient_checkpointing = False

    def forward(self, patches: Tensor, position_N: Tensor, lengths: Sequence[int], flex: bool = False) -> Tensor:
        x, attend = self.embeddings(patches, position_N), WithinImages(lengths, patches.device if flex else None)
        angles = None if self.rope_width is None else grid_angles(position_N, self.side, self.rope_width)
        for layer in self.encoder.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, attend, angles)
            else:
                x = layer(x, attend, angles)
        return self.post_layernorm(x)


class VisionModel(nn.Module):
    """Holds the tower under the name that the released weights use."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, patches: Tensor, position_N: Tensor, lengths: Sequence[int], flex: bool = False) -> Tensor:
        return self.vision_model(patches, position_N, lengths, flex)


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


class Middle(nn.Module):
    """Attention between two residual blocks, at the coarsest level."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Stage(nn.Module):
    """The residual blocks of a level, and what leads to the next one where there is one."""

    def __init__(self, blocks: list[nn.Module], *, down: int | None = None, up: int | None = None):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        if down is not None:
            self.downsample = Downsample(down)
        if up is not None:
            self.upsample = Upsample(up)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self.get_submodule(name)(x)
        return x


class Encoder(nn.Module):
    """Image to the moments (mean, log variance) of the latent; level 0 is the finest."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        stages, channels = [], config.ch
        for level, factor in enumerate(config.ch_mult):
            blocks: list[nn.Module] = []
            for _ in range(config.num_res_blocks):
                blocks.append(ResnetBlock(channels, config.ch * factor))
                channels = config.ch * factor
            stages.append(Stage(blocks, down=channels if level < len(config.ch_mult) - 1 else None))
        self.down = nn.ModuleList(stages)
        self.mid = Middle(channels)
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent to image, from the coarsest level to level 0."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels)
        stages = []
        for level in reversed(range(len(config.ch_mult))):
            blocks: list[nn.Module] = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, config.ch * config.ch_mult[level]))
                channels = config.ch * config.ch_mult[level]
            stages.append(Stage(blocks, up=channels if level > 0 else None))
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
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


class ConvAutoencoder(nn.Module):
    """A small one with overlapping fields, trained first in the run that uses it, then frozen: what it decodes has no
    seams, as patches of pixels have. Latents have mean 0 and variance 1 in every channel once `settle` was called.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        width, halvings = config.ch, config.downsample.bit_length() - 2  # after the first, which only moves pixels
        down: list[nn.Module] = [nn.PixelUnshuffle(2), _conv(12, width), nn.SiLU(), _conv(width, width), nn.SiLU()]
        up: list[nn.Module] = []
        for _ in range(halvings):
            down += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU()]
            down += [_conv(2 * width, 2 * width), nn.SiLU()]
            up = [_conv(2 * width, 4 * width), nn.PixelShuffle(2), nn.SiLU(), _conv(width, width), nn.SiLU(), *up]
            width *= 2
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, config.z_channels, 1))
        first = [_conv(config.z_channels, width), nn.SiLU(), _conv(width, width), nn.SiLU()]
        self.decoder = nn.Sequential(*first, *up, _conv(config.ch, 12), nn.PixelShuffle(2))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(1, config.z_channels, 1, 1))
        self.register_buffer("std", torch.ones(1, config.z_channels, 1, 1))

    def forward(self, image: Tensor, noise: Tensor, spread_B: Tensor) -> tuple[Tensor, Tensor]:
        """(decoded, latents) of a training step. On the way to the decoder noise is added, `spread_B` (B,) times as
        large as the sample's own latents vary: drawn latents are off by that much, and the decoder must not care.
        """
        latent = self.encoder(image)
        size = latent.detach().flatten(1).std(1) * spread_B
        return self.decoder(latent + size[:, None, None, None] * noise), latent

    @torch.no_grad()
    def settle(self, images: Tensor) -> None:
        """Measure the channels on pictures (B, 3, H, W)."""
        latent = self.encoder(images)
        self.mean.copy_(latent.mean((0, 2, 3), keepdim=True))
        self.std.copy_(latent.std((0, 2, 3), keepdim=True).clamp_min(1e-6))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The code of a picture has no width, so `noise` changes nothing."""
        return (self.encoder(image) - self.mean) / self.std

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent * self.std + self.mean)


def _conv(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


Autoencoder = FluxAutoencoder | ConvAutoencoder | PixelAutoencoder


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """The configured autoencoder, frozen and in evaluation mode."""
    kinds: dict[str, type[Autoencoder]] = {"flux": FluxAutoencoder, "conv": ConvAutoencoder, "pixel": PixelAutoencoder}
    autoencoder = kinds[config.kind](config)
    return autoencoder.requires_grad_(False).eval()


def to_uint8(image: Tensor) -> Tensor:
    """Pixels in [-1, 1] (3, H, W) to uint8 (H, W, 3), by truncation as the released code does."""
    return (image.float() * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8).permute(1, 2, 0)
