"""A small video auto-encoder for presets without a download, with the frames of Wan's VAE: one alone, then four each.

Convolutions whose fields overlap, so that no patch decides alone: what it decodes has no seams. The first latent frame
holds a picture, later ones hold its motion.
Shapes: B batch, C channels, F frames, h w latent grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from opens2v.modules.encoders import check_frames, principal_components


class Pictures(nn.Module):
    """A picture of H x W <-> C channels of H/4 x W/4.

    Patches of 4 x 4 pixels to their leading components, as in PatchCodec, plus convolutions for what these lose. Back
    by repeating cells and convolutions over them (Odena et al. 2016): a decoder that writes the pixels of a cell from
    channels of their own leaves seams between cells, the more the less a drawn latent fits its neighbours.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.to_components = nn.Conv2d(3, channels, 4, stride=4)
        self.encoder = _encoder(3, channels, width)
        self.decoder = nn.Sequential(
            _conv(channels, 2 * width), nn.SiLU(),
            _conv(2 * width, 2 * width), nn.SiLU(),
            nn.Upsample(scale_factor=2), _conv(2 * width, width), nn.SiLU(),
            _conv(width, width), nn.SiLU(),
            nn.Upsample(scale_factor=2), _conv(width, width // 2), nn.SiLU(),
            _conv(width // 2, 3),
        )  # fmt: skip
        _start_small(self.encoder[-1])

    @torch.no_grad()
    def start_from(self, pictures: Tensor) -> None:
        """Take the components of pictures (M, 3, H, W) in [-1, 1]."""
        mean = pictures.float().mean((0, 2, 3))  # one value a colour, as a bias has
        patches = functional.pixel_unshuffle(pictures.float() - mean[:, None, None], 4).movedim(1, -1)
        basis = principal_components(patches, self.to_components.weight.shape[0])
        self.to_components.weight.copy_(basis.T.reshape(-1, 3, 4, 4))
        assert self.to_components.bias is not None
        self.to_components.bias.copy_(-mean.repeat_interleave(16) @ basis)

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        pictures = _channels_last(pictures)
        return self.to_components(pictures) + self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of encode, not clamped."""
        return self.decoder(_channels_last(latents))


class Motion(nn.Module):
    """Four frames after a known one <-> C channels of H/4 x W/4: how it moves, and what comes in new.

    Each frame is the known one, warped by a flow field, and where a mask says so painted over. So the later latents
    need not hold what is seen, only how it goes on, and a subject keeps its detail while it moves. Few of the channels
    are used: the rest would hold noise that a generator has to learn.
    """

    frames, used = 4, 4

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.encoder = _encoder(3 * (1 + self.frames), self.used, width)
        self.context = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 16, 1))
        self.decoder = nn.Sequential(
            _conv(self.used + 16, 2 * width), nn.SiLU(),
            _conv(2 * width, 2 * width), nn.SiLU(),
            _conv(2 * width, 4 * width), nn.PixelShuffle(2), nn.SiLU(),
            _conv(width, 4 * (2 + 6 * self.frames)), nn.PixelShuffle(2),
        )  # fmt: skip
        _start_small(self.decoder[-2])  # near the identity: nothing moves and nothing is painted over

    def encode(self, window: Tensor) -> Tensor:
        """The known frame and the next four (B, 3, 5, H, W) -> (B, C, h, w)."""
        latents = self.encoder(_channels_last(window.transpose(1, 2).flatten(1, 2)))
        return functional.pad(latents, (0, 0, 0, 0, 0, self.channels - self.used))

    def decode(self, source: Tensor, latents: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, C, h, w) -> the next four frames (B, 3, 4, H, W)."""
        parts = self.decoder(_channels_last(torch.cat([latents[:, : self.used], self.context(source)], 1))).float()
        steady, parts = parts[:, None, :2], parts[:, 2:].unflatten(1, (self.frames, 6))
        # A steady motion that all frames share is found from the first, nearest one; alone, the last would be too far.
        count = torch.arange(1.0, self.frames + 1, device=source.device)[:, None, None, None]
        flow = (count * steady + parts[:, :, :2]).flatten(0, 1)
        paint, mask = parts[:, :, 2:].flatten(0, 1).split([3, 1], 1)
        height, width = source.shape[-2:]
        rows, columns = (torch.linspace(-1 + 1 / n, 1 - 1 / n, n, device=source.device) for n in (height, width))
        grid = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)], -1)
        scale = torch.tensor([16 / width, 16 / height], device=source.device)  # an output of 1 is eight pixels
        moved = functional.grid_sample(
            source.float().repeat_interleave(self.frames, 0), grid + flow.permute(0, 2, 3, 1) * scale,
            padding_mode="border", align_corners=False,
        )  # fmt: skip
        return torch.lerp(moved, paint, torch.sigmoid(mask - 2)).unflatten(0, (-1, self.frames)).transpose(1, 2)


def _channels_last(pictures: Tensor) -> Tensor:
    """The same values with a pixel's channels side by side: convolutions on a CPU then take a sixth less time."""
    return pictures.contiguous(memory_format=torch.channels_last)


def _start_small(*layers: nn.Module) -> None:
    """Make what layers give small at first."""
    for layer in layers:
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        with torch.no_grad():
            layer.weight.mul_(0.1)
            nn.init.zeros_(layer.bias)


def _conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size; the border is repeated, as zeros around a picture become a frame inside it."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, padding_mode="replicate")


def _encoder(inputs: int, channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.PixelUnshuffle(2), _conv(4 * inputs, width), nn.SiLU(),
        _conv(width, width), nn.SiLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
        _conv(2 * width, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, channels, 1),
    )  # fmt: skip


class ConvCodec(nn.Module):
    """See VideoCodec. `mean` and `std` (2, C): shift and scale of the channels, first latent frame and later ones."""

    temporal, spatial, channels = Motion.frames, 4, 16
    variance: Tensor | None = None
    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = Pictures(self.channels, width)
        self.later = Motion(self.channels, width)
        self.register_buffer("mean", torch.zeros(2, self.channels))
        self.register_buffer("std", torch.ones(2, self.channels))

    def raw_latents(self, frames: Tensor) -> Tensor:
        """(B, 3, 4k + 1, H, W) -> (B, C, 1 + k, h, w), not normalised."""
        count = frames.shape[2]
        check_frames(count, "the video")
        latents = [self.first.encode(frames[:, :, 0])]
        for start in range(0, count - 1, self.temporal):
            latents.append(self.later.encode(frames[:, :, start : start + self.temporal + 1]))
        return torch.stack(latents, 2)

    def from_raw(self, latents: Tensor) -> Tensor:
        """The inverse of raw_latents, not clamped: each group of frames goes on from the last one drawn."""
        frames = [self.first.decode(latents[:, :, 0]).unsqueeze(2)]
        for place in range(1, latents.shape[2]):
            frames.append(self.later.decode(frames[-1][:, :, -1], latents[:, :, place]))
        return torch.cat(frames, 2)

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The training pass: (rebuilt frames, mean square of the latents).

        noise: in the shape of the latents, in units of their scale. What the decoder is trained with is a little off,
        as the latents that a generator draws will be.
        """
        latents = self.raw_latents(frames)
        scale = softened(latents.detach().std((0, 3, 4)).T).T[None, :, :, None, None]
        return self.from_raw(latents + scale * noise), latents.square().mean()

    def _stats(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.arange(count, device=like.device).clamp(max=1)
        mean, std = (table.to(like)[kind].T[None, :, :, None, None] for table in (self.mean, self.std))
        return mean, std

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """See VideoCodec.encode."""
        latents = self.raw_latents(frames.float())
        mean, std = self._stats(latents.shape[2], latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See VideoCodec.decode."""
        latents = latents.float()
        mean, std = self._stats(latents.shape[2], latents)
        return self.from_raw(latents * std + mean).clamp(-1, 1)

    @torch.no_grad()
    def measure(self, clips: Tensor) -> None:
        """Take mean and scale of the latents from clips (M, 3, F, H, W), so that encode gives a variance about 1."""
        for place, part in enumerate(self.raw_latents(clips.float()).tensor_split([1], 2)):
            if part.shape[2]:
                self.mean[place] = part.mean((0, 2, 3, 4))
                self.std[place] = softened(part.std((0, 2, 3, 4))).clamp(min=1e-4)


def softened(std_C: Tensor) -> Tensor:
    """The scale of channels (..., C): half way, as a factor, from their own spread to the common one.

    With their own, faint detail counts as much as colour and place; with the common one, the least noise hides it.
    Channels without spread, which are not used, do not count.
    """
    used = (std_C > 0).sum(-1, keepdim=True).clamp(min=1)
    return (std_C * (std_C.square().sum(-1, keepdim=True) / used).sqrt()).sqrt()


def codec_loss(rebuilt: Tensor, frames: Tensor, size: Tensor) -> Tensor:
    """Squared error, and 0.2 of the absolute error of differences along rows and columns, which keeps edges."""
    loss = functional.mse_loss(rebuilt, frames) + 1e-4 * size
    for axis in (-2, -1):
        loss = loss + 0.2 * functional.l1_loss(rebuilt.diff(dim=axis), frames.diff(dim=axis))
    return loss
