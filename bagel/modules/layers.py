"""Small pieces of BAGEL: norms, rotary angles, position tables, time embedding, patch order.

Letters of shapes: L tokens, D width, K head width, N patches, P patch side, C channels, h w grid of patches, B images.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from shared.engine.norm import ScaledNorm, is_plain_fp32
from shared.errors import UserError


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if is_plain_fp32(x, self.weight):
            return ScaledNorm.apply(x, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


def rotary_angles(position_L: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (L, K) in fp32 of position * theta^(-2i/K); both halves carry the same angles."""
    power = torch.arange(0, head_width, 2, dtype=torch.float32, device=position_L.device) / head_width
    angle = position_L.float()[:, None] / theta**power
    angle_LK = torch.cat([angle, angle], dim=-1)
    return angle_LK.cos(), angle_LK.sin()


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(context, grad: Tensor):
        cos, sin = context.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x_LHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_LHK.shape[-1] // 2
    cos, sin = (angle[:, None].to(x_LHK.dtype) for angle in (cos, sin))
    turned = x_LHK * cos
    turned[..., :half].addcmul_(x_LHK[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x_LHK[..., :half], sin[..., half:])
    return turned


def rotate(x_LHK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Rotary embedding in the half-rotation form: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    return _Rotation.apply(x_LHK, cos_LK, sin_LK)


def sincos_table(width: int, side: int) -> Tensor:
    """Fixed table (side^2, width) of a square grid: the first half encodes the column, the second half the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = code[None].expand(side, side, -1)
    row = code[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, width).float()


class PositionTable(nn.Module):
    """A fixed 2-D sine table as a frozen parameter, so that it keeps its name in a checkpoint of the released form."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)
        self.side = side
        self.reset()

    def reset(self) -> None:
        """Fill the table; nothing to do without memory (meta device)."""
        if not self.pos_embed.is_meta:
            with torch.no_grad():
                self.pos_embed.copy_(sincos_table(self.pos_embed.shape[1], self.side))

    def forward(self, position_N: Tensor) -> Tensor:
        return self.pos_embed[position_N]


class TimestepEmbedder(nn.Module):
    """t in [0, 1], not multiplied by 1000 -> 256 cosines and sines -> two linear layers."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.frequencies = frequencies

    def code(self, t_L: Tensor) -> Tensor:
        """[cos(t f), sin(t f)], f_i = 10000^(-i/128), in fp32: (L, 256)."""
        half = self.frequencies // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t_L.device) / half)
        angle = t_L.float()[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t_L: Tensor) -> Tensor:
        return self.mlp(self.code(t_L).to(self.mlp[0].weight.dtype))


class Connector(nn.Module):
    """Two linear layers that carry ViT features (L, vit width) to the language width."""

    def __init__(self, vit_width: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(vit_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def position_ids(rows: int, columns: int, side: int, *, interpolate: bool = False) -> Tensor:
    """Cells of a side x side table for an image of rows x columns patches, in reading order.

    Extrapolate: row * side + column. Interpolate: [0, 1) is cut into `side` buckets, and each patch takes the bucket of
    row/rows. Raises a UserError for an image with more patches on a side than the table has.
    """
    if rows > side or columns > side:
        raise UserError(
            f"an image of {rows} x {columns} patches does not fit a position table of {side} per side; "
            f"raise max_latent_size (latents) or the ViT's image_size, or make the image smaller"
        )
    row, column = torch.arange(rows), torch.arange(columns)
    if interpolate:
        bounds = torch.arange(1 / side, 1.0, 1 / side)
        row = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / rows), bounds, right=True)
        column = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / columns), bounds, right=True)
    return (row[:, None] * side + column[None]).flatten()


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """(C, h*P, w*P) -> (h*w, P*P*C): value index (row * P + column) * C + channel, for ViT patches and latent tokens
    alike.
    """
    return rearrange(image_CHW, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens_ND: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Inverse of patchify: (h*w, P*P*C) -> (C, h*P, w*P)."""
    return rearrange(tokens_ND, "(h w) (p q c) -> c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): keeps 0 and 1, and spends more of the path near noise for s > 1."""
    return shift * t / (1 + (shift - 1) * t)


def training_times(raw: Tensor, shift: float) -> Tensor:
    """Raw normals to times in [0, 1]: sigmoid, then shift. Minus infinity, a clean image, gives exactly 0."""
    return shift_times(torch.sigmoid(raw.float()), shift)


def sampling_times(num_timesteps: int, shift: float) -> Tensor:
    """The falling grid from 1 to 0 with num_timesteps points, hence num_timesteps - 1 model steps."""
    if num_timesteps < 2:
        raise UserError(f"num_timesteps {num_timesteps} leaves no step to take; give 2 or more")
    return shift_times(torch.linspace(1, 0, num_timesteps), shift)
