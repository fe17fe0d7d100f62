"""A motion auto-encoder that learns from a minute of video in CPU minutes: same interface and algebra, other network.

The released decoder starts from random flows and needs days of training. This one warps the source picture itself and
adds a residual, and starts at the identity (both heads are zero), so that it begins at the quality of a copy of the
source. It is not compatible with the released weights. Shapes as in float/autoencoder.py; C channels of a level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from float.autoencoder import Direction, levels
from float.autoencoder_losses import box_slices

CODE_SIDE = 4  # the encoder goes down to this side
FLOW_LEVELS_BELOW_FULL = 1  # the flow is made at half the picture side and enlarged
GROUP_CHANNELS = 8
MOTION_GAIN = 12.0
MOUTH_BOX = [0.28, 0.47, 0.72, 0.82]  # left, top, right, bottom as shares of the side


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(max(1, outputs // GROUP_CHANNELS), outputs), nn.SiLU()
    )


class CompactEncoder(nn.Module):
    """Picture -> code (B, code width) and features from 8 px up to the full side, smallest first."""

    def __init__(
        self,
        size: int,
        dim_w: int,
        dim_m: int,
        channels: dict[int, int],
        mouth_box: list[float],
        code_width: int = 192,
    ):
        super().__init__()
        self.mouth_box = mouth_box
        sides = [2**exponent for exponent in range(levels(size), 1, -1)]
        self.stem = _convolution(3, channels[size])
        self.down = nn.ModuleList(
            _convolution(channels[side], channels[side // 2], stride=2) for side in sides if side > CODE_SIDE
        )
        # a mouth opens by one or two pixels here: it gets a branch of its own, which keeps them apart for longer
        self.mouth = nn.Sequential(_convolution(channels[size], 32), _convolution(32, 32, stride=2))
        rows, columns = box_slices(mouth_box, size)
        mouth_width = 32 * ((rows.stop - rows.start + 1) // 2) * ((columns.stop - columns.start + 1) // 2)
        self.code = nn.Sequential(nn.Linear(channels[CODE_SIDE] * CODE_SIDE**2 + mouth_width, code_width), nn.SiLU())
        self.identity = nn.Linear(code_width, dim_w)
        self.fc = nn.Linear(code_width, dim_m)
        with torch.no_grad():
            # frames of a clip differ by hundredths in a fresh code, too little for the decoder to listen to
            self.fc.weight.mul_(MOTION_GAIN)

    def forward(self, image_B3SS: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(image_B3SS)
        features = [x]
        for block in self.down:
            x = block(x)
            features.append(x)
        rows, columns = box_slices(self.mouth_box, image_B3SS.shape[-1])
        mouth = self.mouth(features[0][..., rows, columns])
        code = self.code(torch.cat([x.flatten(1), mouth.flatten(1)], 1))
        return code, features[-2::-1]  # without the 4 px features


class StyledBlock(nn.Module):
    """A convolution whose output is scaled and shifted by the latent."""

    def __init__(self, inputs: int, outputs: int, dim_w: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm = nn.GroupNorm(max(1, outputs // GROUP_CHANNELS), outputs)
        self.style = nn.Linear(dim_w, 2 * outputs)

    def forward(self, x: Tensor, latent_Bd: Tensor) -> Tensor:
        scale, shift = self.style(latent_Bd)[:, :, None, None].chunk(2, 1)
        return F.silu(self.norm(self.conv(x)) * (1 + scale) + shift)


class WarpDecoder(nn.Module):
    """Latent, source features and source picture -> picture."""

    def __init__(self, size: int, dim_w: int, dim_m: int, channels: dict[int, int]):
        super().__init__()
        self.direction = Direction(dim_w, dim_m)
        self.flow_side = size >> FLOW_LEVELS_BELOW_FULL
        sides = [2**exponent for exponent in range(3, levels(size))]  # 8 px to the flow's side
        self.blocks = nn.ModuleList()
        width = 0
        for side in sides:
            self.blocks.append(StyledBlock(channels[side] + width, channels[side], dim_w))
            width = channels[side]
        self.flow = nn.Conv2d(width, 2, 3, 1, 1)
        # together with the warped features and colours twice channels[size]: multiples of 16 run fastest
        self.narrow = nn.Conv2d(width, channels[size] - 3, 1)
        self.refine = StyledBlock(2 * channels[size], channels[size], dim_w)
        self.residual = nn.Conv2d(channels[size], 3, 3, 1, 1)
        for head in (self.flow, self.residual):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, latent_Bd: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """features: encoder features, smallest first, then the source picture. -> picture, sampling grid (B, S, S,
        2).
        """
        *features, full, source = features
        x = None
        for block, feature in zip(self.blocks, features, strict=True):
            joined = feature if x is None else torch.cat([feature, _enlarge(x)], 1)
            x = block(joined, latent_Bd)
        grid = _enlarge(self.flow(x)).permute(0, 2, 3, 1) + _identity_grid(source)
        warped = F.grid_sample(torch.cat([source, full], 1), grid, padding_mode="border", align_corners=False)
        hidden = self.refine(torch.cat([_enlarge(self.narrow(x)), warped], 1), latent_Bd)
        return warped[:, :3] + self.residual(hidden), grid


def _enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _identity_grid(image: Tensor) -> Tensor:
    """The grid that samples every pixel at its own place, (S, S, 2)."""
    side = image.shape[-1]
    axis = (torch.arange(side, device=image.device, dtype=image.dtype) * 2 + 1) / side - 1
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)


class CompactAutoencoder(nn.Module):
    """Same methods as MotionAutoencoder.

    The identity latent is built so that the decoder sees motion relative to the source: w_S = (I - Q Q^T) e(S) - r_S,
    hence w_S + r_D holds r_D - r_S within the span of Q, zero for the source itself, and the looks of the source
    outside it.
    """

    def __init__(
        self,
        size: int = 64,
        dim_w: int = 64,
        dim_m: int = 20,
        channels: dict[int, int] | None = None,
        mouth_box: list[float] | None = None,
    ):
        super().__init__()
        channels = {side: 32 for side in (4, 8, 16, 32)} | {64: 16} if channels is None else channels
        self.size, self.dim_w, self.dim_m = size, dim_w, dim_m
        self.enc = CompactEncoder(size, dim_w, dim_m, channels, mouth_box or MOUTH_BOX)
        self.dec = WarpDecoder(size, dim_w, dim_m, channels)

    def encode_source(self, image: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Source picture -> (identity latent w_S (B, d), its own motion r_S (B, d), features and the picture
        itself).
        """
        # a quarter faster on a CPU; the weights stay as they are, and the activations follow the picture
        code, features = self.enc(image.contiguous(memory_format=torch.channels_last))
        basis = self.dec.direction.basis().to(code.dtype)
        motion_Bd = self.enc.fc(code) @ basis.T
        looks_Bd = self.enc.identity(code)
        looks_Bd = looks_Bd - (looks_Bd @ basis) @ basis.T
        return looks_Bd - motion_Bd, motion_Bd, [*features, image]

    def encode_motion(self, image: Tensor) -> Tensor:
        """Driving picture -> motion latent r_D (B, d)."""
        code, _ = self.enc(image.contiguous(memory_format=torch.channels_last))
        return self.dec.direction(self.enc.fc(code))

    def decode(self, w_Bd: Tensor, motion_Bd: Tensor, features: list[Tensor]) -> Tensor:
        """Picture of the source under a motion latent; (B, 3, S, S), clamp to [-1, 1] before saving."""
        return self.dec(w_Bd + motion_Bd, features)[0]

    def forward(self, source: Tensor, driving: Tensor) -> Tensor:
        """The source picture with the motion of the driving picture."""
        w_Bd, _, features = self.encode_source(source)
        return self.decode(w_Bd, self.encode_motion(driving), features)
