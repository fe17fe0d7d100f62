"""What dit/metrics.py needs beside shared/metrics.py: PSNR, SSIM, a test network, and the name of a set."""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from shared.rng import keyed_generator


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return (10 * torch.log10(4 / (found - wanted.to(found.device)).square().mean().clamp_min(1e-12))).item()


def ssim(found: Tensor, wanted: Tensor) -> float:
    """Structural similarity of images (B, C, H, W) in [-1, 1], at least 11 pixels a side (Wang et al. 2004, eq. 13):
    windows of 11 pixels weighted by a normal curve of deviation 1.5, constants 0.01 and 0.03, mean over all.
    """
    curve = torch.exp(-torch.arange(-5.0, 6.0).square() / (2 * 1.5**2))
    window = torch.outer(curve, curve) / curve.sum() ** 2
    x, y = (images.double().flatten(0, 1)[:, None] for images in (found, wanted.to(found.device)))

    def mean(values: Tensor) -> Tensor:
        return nn.functional.conv2d(values, window.to(values)[None, None])

    mean_x, mean_y = mean(x), mean(y)
    spread_x, spread_y, shared = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    low, high = (2 * 0.01) ** 2, (2 * 0.03) ** 2
    share = (2 * mean_x * mean_y + low) * (2 * shared + high)
    return (share / ((mean_x**2 + mean_y**2 + low) * (spread_x + spread_y + high))).mean().item()


class RandomFeatures(nn.Module):
    """A fixed random convolution network, for tests only: its distances mean nothing to anyone else."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, width, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        generator = keyed_generator(0, 51)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (
                0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            )
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, F) from uint8 (B, 3, H, W)."""
        return self.layers(pictures.float() / 127.5 - 1)


def set_digest(pictures: np.ndarray) -> str:
    """SHA-256 of a set of pictures, so that a report names its reference exactly."""
    return hashlib.sha256(np.ascontiguousarray(pictures).tobytes()).hexdigest()
