"""StyleGAN2 image operators of the motion auto-encoder (Karras et al. 2020), in plain PyTorch for any device and type.

Module and parameter names follow the released FLOAT checkpoint. Shapes: B batch, C channels, H W picture, D style
width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTHING = (1, 3, 3, 1)
LEAK = 0.2


def smoothing_kernel(taps: tuple[int, ...] = SMOOTHING) -> Tensor:
    """The outer product of `taps` with itself, normalised to sum 1."""
    row = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(row, row)
    return kernel / kernel.sum()


def upfirdn2d(x_BCHW: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Insert up - 1 zeros after every sample, pad (negative: crop), convolve with `kernel`, keep every down-th sample.

    kernel: (K, K). Side of the result: (H up + pad[0] + pad[1] - K) // down + 1.
    """
    batch, channels, height, width = x_BCHW.shape
    if up > 1:
        spread = x_BCHW.new_zeros(batch, channels, height, up, width, up)
        spread[:, :, :, 0, :, 0] = x_BCHW
        x_BCHW = spread.reshape(batch, channels, height * up, width * up)
    x_BCHW = F.pad(x_BCHW, (pad[0], pad[1], pad[0], pad[1]))  # F.pad crops where the amount is negative
    # conv2d correlates, so the kernel is flipped to make it a convolution
    weight = kernel.flip(0, 1).to(x_BCHW.dtype).expand(channels, 1, *kernel.shape)
    return F.conv2d(x_BCHW, weight, stride=down, groups=channels)


class Blur(nn.Module):
    """Smooth without changing the scale."""

    kernel: Tensor

    def __init__(self, pad: tuple[int, int], upsample_factor: int = 1):
        super().__init__()
        self.pad = pad
        self.register_buffer("kernel", smoothing_kernel() * upsample_factor**2)

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, pad=self.pad)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W), smooth."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", smoothing_kernel() * 4)

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, up=2, pad=(2, 1))


def leaky_relu_gain(x: Tensor, bias: Tensor) -> Tensor:
    """leaky_relu(x + bias, 0.2) sqrt(2), which keeps the variance."""
    return F.leaky_relu(x + bias, LEAK) * math.sqrt(2)


class FusedLeakyReLU(nn.Module):
    """A bias of its own, then leaky_relu_gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu_gain(x, self.bias)


class EqualConv2d(nn.Module):
    """A convolution whose weights are scaled at run time, so that all learn at one speed (Karras et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.scale = 1 / math.sqrt(inputs * kernel**2)
        self.stride, self.padding = stride, padding
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """A linear layer with run-time scaling; with `activation` it ends in leaky_relu_gain."""

    def __init__(
        self, inputs: int, outputs: int, *, bias_init: float = 0.0, lr_mul: float = 1.0, activation: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.full((outputs,), float(bias_init)))
        self.scale, self.lr_mul, self.activation = lr_mul / math.sqrt(inputs), lr_mul, activation

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.scale, self.bias * self.lr_mul
        if self.activation:
            return leaky_relu_gain(F.linear(x, weight), bias)
        return F.linear(x, weight, bias)


class ConvLayer(nn.Sequential):
    """[blur,] convolution [, biased activation]; the positions in the sequence make the parameter names.

    The convolution has a bias of its own only when there is a bias and no activation.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        downsample: bool = False,
        bias: bool = True,
        activate: bool = True,
    ):
        layers: list[nn.Module] = []
        own_bias = bias and not activate
        if downsample:
            total = 2 + (kernel - 1)
            layers.append(Blur(((total + 1) // 2, total // 2)))
            layers.append(EqualConv2d(inputs, outputs, kernel, stride=2, bias=own_bias))
        else:
            layers.append(EqualConv2d(inputs, outputs, kernel, padding=kernel // 2, bias=own_bias))
        if activate:
            layers.append(FusedLeakyReLU(outputs) if bias else nn.LeakyReLU(LEAK))
        super().__init__(*layers)


class ResBlock(nn.Module):
    """(B, C, H, W) -> (B, C', H/2, W/2) with a skip connection, variance kept."""

    def __init__(self, inputs: int, outputs: int, *, downsample: bool = True):
        super().__init__()
        self.conv1 = ConvLayer(inputs, inputs, 3)
        self.conv2 = ConvLayer(inputs, outputs, 3, downsample=downsample)
        self.skip = ConvLayer(inputs, outputs, 1, downsample=downsample, activate=False, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by a style, per sample (StyleGAN2, section 2.2)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        style_dim: int,
        *,
        demodulate: bool = True,
        upsample: bool = False,
        downsample: bool = False,
    ):
        super().__init__()
        self.kernel_size, self.demodulate, self.upsample, self.downsample = kernel, demodulate, upsample, downsample
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))
        self.scale = 1 / math.sqrt(inputs * kernel**2)
        self.modulation = EqualLinear(style_dim, inputs, bias_init=1.0)
        if upsample:
            total = 2 - (kernel - 1)
            self.blur = Blur(((total + 1) // 2 + 1, total // 2 + 1), upsample_factor=2)
        if downsample:
            total = 2 + (kernel - 1)
            self.blur = Blur(((total + 1) // 2, total // 2))

    def forward(self, x_BCHW: Tensor, style_BD: Tensor) -> Tensor:
        batch, inputs, height, width = x_BCHW.shape
        weight = self.weight * self.scale * self.modulation(style_BD).reshape(batch, 1, inputs, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        if self.downsample:
            x_BCHW = self.blur(x_BCHW)
        grouped = x_BCHW.reshape(1, batch * inputs, *x_BCHW.shape[2:])
        if self.upsample:
            # conv_transpose2d wants inputs first; side 2H + kernel - 2, which the blur brings to 2H
            out = F.conv_transpose2d(grouped, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
        else:
            stride, padding = (2, 0) if self.downsample else (1, self.kernel_size // 2)
            out = F.conv2d(grouped, weight.flatten(0, 1), stride=stride, padding=padding, groups=batch)
        out = out.reshape(batch, -1, *out.shape[2:])
        return self.blur(out) if self.upsample else out


class NoiseInjection(nn.Module):
    """A weight that the released checkpoint carries; no noise map is ever given, so this is the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x if noise is None else x + self.weight * noise


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, the unused noise weight, biased activation."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, *, upsample: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(inputs, outputs, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(outputs)

    def forward(self, x: Tensor, style_BD: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x, style_BD)))
