"""A motion auto-encoder that learns from a minute of video in CPU minutes: same interface and algebra, other network.

The released decoder starts from random flows and needs days of training. This one warps the source picture itself and
adds a residual, and starts at the identity (all heads are zero), so that it begins at the quality of a copy of the
source. Nothing runs at the full side: the picture is folded, 2 x 2 pixels into 12 channels, which keeps every pixel
and costs a quarter. It is not compatible with the released weights.
Shapes as in float/modules/autoencoder.py; C channels of a level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from float.config import MOUTH_BOX
from float.modules.autoencoder import Direction, levels
from float.modules.losses import box_slices

CODE_SIDE = 4  # the encoder goes down to this side
CODE_WIDTH = 128
FOLDED_RGB = 12  # channels of a picture folded to half its side
GROUP_CHANNELS = 8
MOTION_GAIN = 3.0
REFINE_CHANNELS = 32


def _fold(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, 4 C, S / 2, S / 2)."""
    return F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def _unfold(x: Tensor) -> Tensor:
    """(B, 4 C, S, S) -> (B, C, 2 S, 2 S)."""
    return F.pixel_shuffle(x, 2).contiguous(memory_format=torch.channels_last)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // GROUP_CHANNELS), channels)


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), _norm(outputs), nn.SiLU())


class CompactEncoder(nn.Module):
    """Picture -> code (B, CODE_WIDTH) and features from 8 px up to half the side, smallest first.

    channels[S] is the width of the mouth's own branch: a mouth opens by one or two pixels here, and what the encoder
    of the whole picture squeezes to 4 px does not keep them apart.
    """

    def __init__(self, size: int, dim_w: int, dim_m: int, channels: dict[int, int], mouth_box: list[float]):
        super().__init__()
        self.mouth_box = mouth_box
        half, width = size // 2, channels[size]
        sides = [2**exponent for exponent in range(levels(size) - 1, 2, -1)]  # half the side to 8 px
        self.stem = _convolution(FOLDED_RGB, channels[half])
        self.down = nn.ModuleList(_convolution(channels[side], channels[side // 2], stride=2) for side in sides)
        self.mouth = nn.Sequential(_convolution(FOLDED_RGB, width), _convolution(width, width, stride=2))
        rows, columns = box_slices(mouth_box, half)
        mouth_cells = ((rows.stop - rows.start + 1) // 2) * ((columns.stop - columns.start + 1) // 2)
        inputs = channels[CODE_SIDE] * CODE_SIDE**2 + width * mouth_cells
        self.code = nn.Sequential(nn.Linear(inputs, CODE_WIDTH), nn.SiLU())
        self.identity = nn.Linear(CODE_WIDTH, dim_w)
        self.fc = nn.Linear(CODE_WIDTH, dim_m)
        with torch.no_grad():
            # frames of a clip differ by hundredths in a fresh code, too little for the decoder to listen to
            self.fc.weight.mul_(MOTION_GAIN)

    def forward(self, image_B3SS: Tensor) -> tuple[Tensor, list[Tensor]]:
        folded = _fold(image_B3SS)
        features = [self.stem(folded)]
        for block in self.down:
            features.append(block(features[-1]))
        rows, columns = box_slices(self.mouth_box, folded.shape[-1])
        mouth = self.mouth(folded[..., rows, columns])
        code = self.code(torch.cat([features[-1].flatten(1), mouth.flatten(1)], 1))
        return code, features[-2::-1]  # without the 4 px features


class StyledBlock(nn.Module):
    """A convolution whose output is scaled and shifted by the style."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm = _norm(outputs)
        self.style = nn.Linear(CODE_WIDTH, 2 * outputs)

    def forward(self, x: Tensor, style_Bc: Tensor) -> Tensor:
        scale, shift = self.style(style_Bc)[:, :, None, None].chunk(2, 1)
        return F.silu(torch.addcmul(shift, self.norm(self.conv(x)), 1 + scale))


class WarpDecoder(nn.Module):
    """Latent, source features and source picture -> picture.

    From 8 px to half the side the features make a flow; it moves the source picture; what it cannot move is added, by
    one block for the whole picture and two more for the mouth box, whose teeth and lips appear from nowhere.
    """

    def __init__(self, size: int, dim_w: int, dim_m: int, channels: dict[int, int], mouth_box: list[float]):
        super().__init__()
        self.mouth_box = mouth_box
        self.direction = Direction(dim_w, dim_m)
        self.style = nn.Sequential(nn.Linear(dim_w, CODE_WIDTH), nn.SiLU())
        self.blocks, self.enlarge = nn.ModuleList(), nn.ModuleList()
        from_below = 0
        for side in [2**exponent for exponent in range(3, levels(size))]:  # 8 px to half the side
            self.blocks.append(StyledBlock(channels[side] + from_below, channels[side]))
            if side < size // 2:
                from_below = channels[side] // 2
                self.enlarge.append(nn.Conv2d(channels[side], 4 * from_below, 1))
        width, mouth_width = channels[size // 2], channels[size]
        self.flow = nn.Conv2d(width, 2, 3, 1, 1)
        self.refine = StyledBlock(width + FOLDED_RGB, REFINE_CHANNELS)
        self.residual = nn.Conv2d(REFINE_CHANNELS, FOLDED_RGB, 3, 1, 1)
        self.mouth_blocks = nn.ModuleList(
            [StyledBlock(width + FOLDED_RGB, mouth_width), StyledBlock(mouth_width, mouth_width)]
        )
        self.mouth_residual = nn.Conv2d(mouth_width, FOLDED_RGB, 3, 1, 1)
        for head in (self.flow, self.residual, self.mouth_residual):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def forward(self, latent_Bd: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """features: encoder features, smallest first, then the source picture. -> picture, sampling grid (B, S, S,
        2).
        """
        *features, source = features
        style = self.style(latent_Bd)
        x = self.blocks[0](features[0], style)
        for enlarge, block, feature in zip(self.enlarge, self.blocks[1:], features[1:], strict=True):
            x = block(torch.cat([feature, _unfold(enlarge(x))], 1), style)
        flow = F.interpolate(self.flow(x), scale_factor=2, mode="bilinear", align_corners=False)
        grid = flow.permute(0, 2, 3, 1) + _identity_grid(source)
        warped = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
        joined = torch.cat([x, _fold(warped)], 1)
        residual = self.residual(self.refine(joined, style)) + self._mouth(joined, style)
        return warped + F.pixel_shuffle(residual, 2), grid

    def _mouth(self, x: Tensor, style_Bc: Tensor) -> Tensor:
        """The residual of the mouth box, zero around it, (B, 12, S / 2, S / 2)."""
        side = x.shape[-1]
        rows, columns = box_slices(self.mouth_box, side)
        x = x[..., rows, columns]
        for block in self.mouth_blocks:
            x = block(x, style_Bc)
        return F.pad(self.mouth_residual(x), (columns.start, side - columns.stop, rows.start, side - rows.stop))


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
        channels = {4: 64, 8: 64, 16: 48, 32: 24, 64: 48} if channels is None else channels
        mouth_box = mouth_box or MOUTH_BOX
        self.size, self.dim_w, self.dim_m = size, dim_w, dim_m
        self.enc = CompactEncoder(size, dim_w, dim_m, channels, mouth_box)
        self.dec = WarpDecoder(size, dim_w, dim_m, channels, mouth_box)

    def encode_source(self, image: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Source picture -> (identity latent w_S (B, d), its own motion r_S (B, d), features and the picture
        itself).
        """
        code, features = self.enc(image)
        basis = self.dec.direction.basis().to(code.dtype)
        motion_Bd = self.enc.fc(code) @ basis.T
        looks_Bd = self.enc.identity(code)
        looks_Bd = looks_Bd - (looks_Bd @ basis) @ basis.T
        return looks_Bd - motion_Bd, motion_Bd, [*features, image]

    def encode_motion(self, image: Tensor) -> Tensor:
        """Driving picture -> motion latent r_D (B, d)."""
        code, _ = self.enc(image)
        return self.dec.direction(self.enc.fc(code))

    def decode(self, w_Bd: Tensor, motion_Bd: Tensor, features: list[Tensor]) -> Tensor:
        """Picture of the source under a motion latent; (B, 3, S, S), clamp to [-1, 1] before saving."""
        return self.dec(w_Bd + motion_Bd, features)[0]

    def forward(self, source: Tensor, driving: Tensor) -> Tensor:
        """The source picture with the motion of the driving picture."""
        w_Bd, _, features = self.encode_source(source)
        return self.decode(w_Bd, self.encode_motion(driving), features)
