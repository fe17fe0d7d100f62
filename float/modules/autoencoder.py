"""The motion auto-encoder: one picture -> identity latent and motion latent; identity + motion -> picture.

Latent algebra (FLOAT section 3.1, after LIA, Wang et al. 2022):
    w_S = enc.net_app(S)        identity latent of a source picture
    r_D = Q enc.fc(net_app(D))  motion latent of a driving picture, in the span of M orthonormal directions Q
    D^  = dec(w_S + r_D, features of S)
Shapes: B batch, d latent width, M motion directions, pictures (B, 3, S, S) float32 in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from float.config import CHANNELS
from float.modules.image_ops import ConvLayer, EqualConv2d, EqualLinear, ModulatedConv2d, ResBlock, StyledConv, Upsample

FLOW_SIDE = 64  # the sampling grid of this level is handed out


def levels(size: int) -> int:
    """log2 of the picture side."""
    exponent = int(math.log2(size))
    if 2**exponent != size or exponent < 3:
        raise ValueError(f"picture side {size} is not a power of two of at least 8")
    return exponent


class AppearanceEncoder(nn.Module):
    """Picture -> identity latent (B, d) and features from 8 px up to the full side."""

    def __init__(self, size: int, dim_w: int, channels: dict[int, int]):
        super().__init__()
        blocks: list[nn.Module] = [ConvLayer(3, channels[size], 1)]
        for exponent in range(levels(size), 2, -1):
            blocks.append(ResBlock(channels[2**exponent], channels[2 ** (exponent - 1)]))
        blocks.append(EqualConv2d(channels[4], dim_w, 4, bias=False))
        self.convs = nn.ModuleList(blocks)

    def forward(self, image_B3SS: Tensor) -> tuple[Tensor, list[Tensor]]:
        features, x = [], image_B3SS
        for block in self.convs:
            x = block(x)
            features.append(x)
        return x.flatten(1), features[-3::-1]  # without the latent itself and the 4 px features, smallest first


class MotionEncoder(nn.Module):
    """Appearance encoder and the head that reads the M motion coefficients off its latent."""

    def __init__(self, size: int, dim_w: int, dim_m: int, channels: dict[int, int]):
        super().__init__()
        self.net_app = AppearanceEncoder(size, dim_w, channels)
        # five layers without a non-linearity between them, as released
        self.fc = nn.Sequential(*[EqualLinear(dim_w, dim_w) for _ in range(4)], EqualLinear(dim_w, dim_m))

    def enc_motion(self, image_B3SS: Tensor) -> Tensor:
        """Motion coefficients (B, M) of a picture."""
        return self.fc(self.net_app(image_B3SS)[0])


class Direction(nn.Module):
    """M orthonormal directions of motion in the latent space."""

    def __init__(self, dim_w: int, dim_m: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim_w, dim_m))

    def basis(self) -> Tensor:
        """Q (d, M), Q^T Q = I. Householder QR in float32: another method turns the sign of some columns round."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.linalg.qr(self.weight.float() + 1e-8).Q

    def forward(self, coefficients_BM: Tensor | None) -> Tensor:
        """sum_m lambda_m q_m, (..., M) -> (..., d); the basis itself for None."""
        basis = self.basis()
        return basis if coefficients_BM is None else coefficients_BM @ basis.T.to(coefficients_BM.dtype)


class ToFlow(nn.Module):
    """Where to fetch the source features from, and how far to trust them."""

    def __init__(self, channels: int, style_dim: int):
        super().__init__()
        self.upsample = Upsample()
        self.conv = ModulatedConv2d(channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(
        self, x: Tensor, style_BD: Tensor, feature: Tensor, skip: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> (warped features, warped + (1 - mask) x, raw flow for the next level, grid (B, S, S, 2))."""
        raw = self.conv(x, style_BD) + self.bias
        if skip is not None:
            raw = raw + self.upsample(skip)
        side = raw.shape[-1]
        offset, mask = torch.tanh(raw[:, 0:2]), torch.sigmoid(raw[:, 2:3])
        axis = torch.linspace(-1, 1, side, device=raw.device, dtype=raw.dtype)
        grid = offset.permute(0, 2, 3, 1) + torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
        # the base grid has its ends at pixel centres (align_corners=True), the sampling has not: kept as released
        warped = F.grid_sample(feature, grid.to(feature.dtype), align_corners=False) * mask
        return warped, warped + x * (1 - mask), raw, grid


class ToRGB(nn.Module):
    """Features -> colours, added to those of the level below."""

    def __init__(self, channels: int):
        super().__init__()
        self.upsample = Upsample()
        self.conv = ConvLayer(channels, 3, 1)  # with its activation: intended
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        out = self.conv(x) + self.bias
        return out if skip is None else out + self.upsample(skip)


class ConstantInput(nn.Module):
    """The learned 4 px start of the synthesis."""

    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, batch: int) -> Tensor:
        return self.input.expand(batch, -1, -1, -1)


class SynthesisDecoder(nn.Module):
    """Latent and source features -> picture, by warping the features at every scale."""

    def __init__(self, size: int, dim_w: int, dim_m: int, channels: dict[int, int]):
        super().__init__()
        self.direction = Direction(dim_w, dim_m)
        self.input = ConstantInput(channels[4])
        self.conv1 = StyledConv(channels[4], channels[4], dim_w)
        self.to_rgb1 = ToRGB(
            channels[4]
        )  # part of the released file, never used, not saved: so the same in every process
        del self.to_rgb1.upsample
        for parameter in self.to_rgb1.parameters():
            nn.init.zeros_(parameter).requires_grad_(False)
        self.convs, self.to_rgbs, self.to_flows = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for exponent in range(3, levels(size) + 1):
            below, here = channels[2 ** (exponent - 1)], channels[2**exponent]
            self.convs.append(StyledConv(below, here, dim_w, upsample=True))
            self.convs.append(StyledConv(here, here, dim_w))
            self.to_rgbs.append(ToRGB(here))
            self.to_flows.append(ToFlow(here, dim_w))

    def forward(self, latent_Bd: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """-> picture (B, 3, S, S), not clamped, and the 64 px sampling grid (the last one of smaller pictures)."""
        x = self.conv1(self.input(len(latent_Bd)), latent_Bd)
        image: Tensor | None = None
        raw_flow = grid_out = None
        for level, (to_flow, to_rgb) in enumerate(zip(self.to_flows, self.to_rgbs, strict=True)):
            x = self.convs[2 * level](x, latent_Bd)
            x = self.convs[2 * level + 1](x, latent_Bd)
            warped, x, raw_flow, grid = to_flow(x, latent_Bd, features[level], raw_flow)
            image = to_rgb(warped, image)  # colours come from the warped features, not from x
            if grid.shape[1] <= FLOW_SIDE:
                grid_out = grid
        assert image is not None and grid_out is not None, "levels() gives one level at least"
        return image, grid_out


class MotionAutoencoder(nn.Module):
    """enc and dec of the released model, and the latent algebra around them."""

    def __init__(self, size: int = 512, dim_w: int = 512, dim_m: int = 20, channels: dict[int, int] | None = None):
        super().__init__()
        channels = CHANNELS if channels is None else channels
        self.size, self.dim_w, self.dim_m = size, dim_w, dim_m
        self.enc = MotionEncoder(size, dim_w, dim_m, channels)
        self.dec = SynthesisDecoder(size, dim_w, dim_m, channels)

    def encode_source(self, image: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Source picture -> (identity latent w_S (B, d), its own motion r_S (B, d), features for the decoder)."""
        w_Bd, features = self.enc.net_app(image)
        return w_Bd, self.dec.direction(self.enc.fc(w_Bd)), features

    def encode_motion(self, image: Tensor) -> Tensor:
        """Driving picture -> motion latent r_D (B, d)."""
        return self.dec.direction(self.enc.enc_motion(image))

    def decode(self, w_Bd: Tensor, motion_Bd: Tensor, features: list[Tensor]) -> Tensor:
        """Picture of the source under a motion latent; (B, 3, S, S), clamp to [-1, 1] before saving."""
        return self.dec(w_Bd + motion_Bd, features)[0]

    def forward(self, source: Tensor, driving: Tensor) -> Tensor:
        """The source picture with the motion of the driving picture."""
        w_Bd, _, features = self.encode_source(source)
        return self.decode(w_Bd, self.encode_motion(driving), features)


def edit_motion(
    motion: Tensor, basis_dM: Tensor, targets: dict[int, float] | None = None, deltas: dict[int, float] | None = None
) -> Tensor:
    """Set coefficients of single directions (`targets`) or shift them (`deltas`); the others stay as they are.

    motion: (..., d) in the span of the basis. The coefficient of direction k is <r, q_k>, since Q^T Q = I.
    """
    edited = motion
    for k, value in (targets or {}).items():
        direction = basis_dM[:, k]
        edited = edited + (value - (edited @ direction)[..., None]) * direction
    for k, value in (deltas or {}).items():
        edited = edited + value * basis_dM[:, k]
    return edited
