"""A small video auto-encoder for presets without a download, with the frames of Wan's VAE: one alone, then four each.

Convolutions whose fields overlap, so that no patch decides alone: what it decodes has no seams.
Shapes: B batch, C channels, F frames, h w latent grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from opens2v.modules.encoders import check_frames


class FrameCoder(nn.Module):
    """`frames` pictures of H x W <-> C channels of H/4 x W/4."""

    def __init__(self, frames: int, channels: int, width: int):
        super().__init__()
        pixels = 12 * frames  # of a 2 x 2 cell
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(pixels, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(), nn.Conv2d(2 * width, channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 2 * width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, pixels, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip


class ConvCodec(nn.Module):
    """See VideoCodec. `mean` and `std` (2, C): of the channels of the first latent frame and of later ones."""

    temporal, spatial, channels = 4, 4, 16
    variance: Tensor | None = None
    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = FrameCoder(1, self.channels, width)
        self.later = FrameCoder(self.temporal, self.channels, width)
        self.register_buffer("mean", torch.zeros(2, self.channels))
        self.register_buffer("std", torch.ones(2, self.channels))

    def raw_latents(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 4k + 1, H, W) -> latents (B, C, 1, h, w) of the first frame and (B, C, k, h, w) of the others."""
        batch, _, count, _, _ = frames.shape
        check_frames(count, "the video")
        first = self.first.encoder(frames[:, :, 0])
        groups = frames[:, :, 1:].transpose(1, 2).unflatten(1, (-1, self.temporal)) if count > 1 else None
        if groups is None:
            return first.unsqueeze(2), first.new_zeros(batch, self.channels, 0, *first.shape[-2:])
        later = self.later.encoder(groups.flatten(2, 3).flatten(0, 1))
        return first.unsqueeze(2), later.unflatten(0, groups.shape[:2]).transpose(1, 2)

    def from_raw(self, first: Tensor, later: Tensor) -> Tensor:
        """The inverse of raw_latents, not clamped."""
        picture = self.first.decoder(first[:, :, 0]).unsqueeze(2)
        if later.shape[2] == 0:
            return picture
        groups = self.later.decoder(later.transpose(1, 2).flatten(0, 1)).unflatten(1, (self.temporal, 3))
        frames = groups.unflatten(0, (len(first), -1)).flatten(1, 2).transpose(1, 2)
        return torch.cat([picture, frames], 2)

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The training pass: (rebuilt frames, mean square of the latents).

        noise: standard normal in the shape of the latents, times a level of each sample. What the decoder is trained
        with is a little off, as the latents that a generator draws will be.
        """
        first, later = self.raw_latents(frames)
        noise_first, noise_later = noise[:, :, :1], noise[:, :, 1:]
        rebuilt = self.from_raw(
            first + _spread(first) * noise_first, later + _spread(later) * noise_later if later.shape[2] else later
        )
        size = first.square().mean() + (later.square().mean() if later.shape[2] else 0)
        return rebuilt, size

    def _stats(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.arange(count, device=like.device).clamp(max=1)
        mean, std = (table.to(like)[kind].T[None, :, :, None, None] for table in (self.mean, self.std))
        return mean, std

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """See VideoCodec.encode."""
        latents = torch.cat(self.raw_latents(frames.float()), 2)
        mean, std = self._stats(latents.shape[2], latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See VideoCodec.decode."""
        latents = latents.float()
        mean, std = self._stats(latents.shape[2], latents)
        first, later = (latents * std + mean).tensor_split([1], 2)
        return self.from_raw(first, later).clamp(-1, 1)

    @torch.no_grad()
    def measure(self, clips: Tensor) -> None:
        """Take mean and spread of the latents from clips (M, 3, F, H, W), so that encode gives unit variance."""
        for place, part in enumerate(self.raw_latents(clips.float())):
            if part.shape[2]:
                self.mean[place] = part.mean((0, 2, 3, 4))
                self.std[place] = part.std((0, 2, 3, 4)).clamp(min=1e-4)


def _spread(latents: Tensor) -> Tensor:
    return latents.detach().std((0, 2, 3, 4), keepdim=True)


def codec_loss(rebuilt: Tensor, frames: Tensor, size: Tensor) -> Tensor:
    """Squared error, and 0.2 of the absolute error of differences along rows and columns, which keeps edges."""
    loss = functional.mse_loss(rebuilt, frames) + 1e-4 * size
    for axis in (-2, -1):
        loss = loss + 0.2 * functional.l1_loss(rebuilt.diff(dim=axis), frames.diff(dim=axis))
    return loss
