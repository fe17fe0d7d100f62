"""What every codec offers, and two small autoencoders: a convolutional one, trained first in the same run, and
principal components of patches.

ConvAutoencoder: fields that overlap, so that what it decodes has no seams. A transformer on pixels or on patches of
its own guesses every patch by itself, and its pictures are mosaics; on these latents it draws whole objects.

PatchAutoencoder is fitted in seconds. The encoder is linear and orthonormal, so latents keep the variance that they
have in the picture (unwhitened: few large channels, many small ones) and the held-out loss stays comparable with
pixels. The decoder is the transpose and then a small convolutional network that mends the seams, trained on latents
with noise, so that it also smooths the small disagreements between generated patches.
Shapes: B batch, C channels, P patch side, h w latent grid.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from shared.errors import UserError
from shared.rng import keyed_generator

_DECODER = 21  # random stream
NOISE = 0.3  # largest standard deviation of the noise on the decoder's training latents, which have variance 1
BATCH = 16
NO_VARIANCE = -30.0  # log variance of a codec that is not random


class Codec(nn.Module):
    """What every codec offers. Images (B, 3, H, W) float32 in [-1, 1]; latents (B, C, h, w)."""

    factor: int  # pixels per latent cell side
    channels: int  # C
    posterior: str = "mode"  # sample: latents are drawn around the mean
    learns = False  # whether fit() must have been called, on training pictures

    def fit(self, images: Tensor, *, seed: int) -> dict[str, float]:
        """Learn from images (N, 3, H, W); returns figures to print."""
        raise NotImplementedError

    def moments(self, images: Tensor) -> Tensor:
        """Unscaled mean and log variance (B, 2C, h, w): what a cache stores. Without scaling: latents, no variance."""
        latents = self.encode(images)
        return torch.cat([latents, torch.full_like(latents, NO_VARIANCE)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the model is trained on, from moments; `noise` (B, C, h, w) draws from the posterior."""
        return moments[:, : self.channels]

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        raise NotImplementedError


class ConvAutoencoder(Codec):
    """encode(images (B, 3, H, W)) -> (B, C, H/P, W/P), every channel of mean 0 and variance 1; decode back.

    forward is a training step's; `fit` measures the statistics of the channels once it is trained.
    """

    learns = True
    mean: Tensor
    std: Tensor

    def __init__(self, *, channels: int, factor: int, width: int) -> None:
        super().__init__()
        self.channels, self.factor = channels, factor
        halvings = factor.bit_length() - 2  # after the first, which only rearranges pixels
        down = [nn.PixelUnshuffle(2), _conv(12, width), nn.SiLU(), _conv(width, width), nn.SiLU()]
        # Up by repeating cells and a convolution over them (Odena et al. 2016). PixelShuffle, which writes the cells of
        # a block from channels of their own, left seams at every second and fourth pixel.
        up = [_doubled(), _conv(width, width // 4), nn.SiLU(), _conv(width // 4, 3)]
        for _ in range(halvings):
            down += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(), _conv(2 * width, 2 * width)]
            down.append(nn.SiLU())
            up = [_doubled(), _conv(2 * width, width), nn.SiLU(), _conv(width, width), nn.SiLU(), *up]
            width *= 2
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, channels, 1))
        self.decoder = nn.Sequential(_conv(channels, width), nn.SiLU(), _conv(width, width), nn.SiLU(), *up)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def forward(self, images: Tensor, noise: Tensor, spread_B: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded images and latents, neither clamped nor normalised. On the way to the decoder noise (B, C, h, w) is
        added, `spread_B` (B,) times as large as the sample's own latents vary: what the transformer draws is off by
        that much, and the decoder must not care.
        """
        latents = self.encoder(images)
        size = latents.detach().float().flatten(1).std(1) * spread_B
        return self.decoder(latents + size[:, None, None, None] * noise), latents

    def fit(self, images: Tensor, *, seed: int) -> dict[str, float]:
        """Normalise the latents of images (N, 3, H, W) by channel, and freeze; returns the round trip's PSNR in dB."""
        self.requires_grad_(False)
        with torch.no_grad():
            latents = torch.cat([self.encoder(part) for part in images.split(64)])
        self.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
        self.std.copy_(latents.std((0, 2, 3), keepdim=True).clamp_min(1e-6))
        error = torch.stack([(self.decode(self.encode(part)) - part).square().mean() for part in images.split(64)])
        return {"psnr": (10 * torch.log10(4 / error.mean())).item()}

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w)."""
        return (self.encoder(images) - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return self.decoder(latents * self.std + self.mean).clamp(-1, 1)


def _conv(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


def _doubled() -> nn.Upsample:
    return nn.Upsample(scale_factor=2, mode="nearest")


class PatchAutoencoder(Codec):
    """encode(images (B, 3, H, W)) -> (B, C, H/P, W/P) of variance 1 over all channels together; decode back."""

    learns = True
    center: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, *, channels: int, patch: int, decoder_steps: int) -> None:
        super().__init__()
        if channels > 3 * patch * patch:
            raise UserError(
                f"model.in_channels {channels} is more than the {3 * patch * patch} numbers of a {patch} x {patch} "
                "patch (vae.patch)"
            )
        self.channels, self.factor, self.decoder_steps = channels, patch, decoder_steps
        self.register_buffer("center", torch.zeros(3 * patch * patch))
        self.register_buffer("basis", torch.zeros(channels, 3 * patch * patch))
        self.register_buffer("scale", torch.ones(()))
        self.mend = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.requires_grad_(False)
        self.mend[5].get_parameter("weight").zero_()  # at first the decoder is the linear one
        self.mend[5].get_parameter("bias").zero_()

    def fit(self, images: Tensor, *, seed: int) -> dict[str, float]:
        """Learn basis and decoder from images (N, 3, H, W) and their mirror images; returns the share of variance kept
        and the decoder's PSNR in dB before and after."""
        images = torch.cat([images, images.flip(3)])
        patches = self._cut(images).flatten(0, 1)
        self.center.copy_(patches.mean(0))
        centred = (patches - self.center).double()
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        largest = vectors.flip(1)[:, : self.channels].T
        signs = largest.gather(1, largest.abs().argmax(1, keepdim=True)).sign()  # eigenvectors come with either sign
        self.basis.copy_(largest * signs)
        kept = variances.flip(0)[: self.channels].sum()
        self.scale.copy_((kept / self.channels).sqrt())
        before = self._psnr(images)
        self._train_decoder(images, seed)
        return {"variance_kept": (kept / variances.sum()).item(), "psnr_linear": before, "psnr": self._psnr(images)}

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w)."""
        tokens = (self._cut(images) - self.center) @ self.basis.T / self.scale
        return rearrange(tokens, "b (h w) c -> b c h w", h=images.shape[2] // self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return self._decode(latents).clamp(-1, 1)

    def _decode(self, latents: Tensor) -> Tensor:
        values = rearrange(latents, "b c h w -> b h w c") * self.scale @ self.basis + self.center
        picture = rearrange(values, "b h w (c p q) -> b c (h p) (w q)", c=3, p=self.factor)
        return picture + self.mend(picture)

    def _cut(self, images: Tensor) -> Tensor:
        return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.factor, q=self.factor)

    def _psnr(self, images: Tensor) -> float:
        with torch.no_grad():
            error = torch.stack(
                [(self.decode(self.encode(part)) - part).square().mean() for part in images[:256].split(32)]
            ).mean()
        return (10 * torch.log10(4 / error)).item()

    def _train_decoder(self, images: Tensor, seed: int) -> None:
        """Squared error plus a little absolute error of edges, on latents with noise of a random size."""
        generator = keyed_generator(seed, _DECODER)
        for layer in (self.mend[1], self.mend[3]):
            nn.init.kaiming_uniform_(layer.get_parameter("weight"), nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.get_parameter("bias"))
        self.mend.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.mend.parameters(), lr=2e-3, weight_decay=0.0)
        latents = self.encode(images)
        for step in range(self.decoder_steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / self.decoder_steps)
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            spread = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
            noise = torch.randn(latents[chosen].shape, generator=generator)
            found, wanted = self._decode(latents[chosen] + spread * noise), images[chosen]
            loss = (found - wanted).square().mean() + 0.1 * sum(
                (found.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean() for axis in (2, 3)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.mend.requires_grad_(False)
