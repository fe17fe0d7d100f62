"""Pictures to latents and back: the Stable Diffusion autoencoder, and four codecs that need no weights.

All offer moments(images) -> unscaled mean and log variance (B, 2C, h, w), latents(moments, noise) -> what the model is
trained on, encode(images), decode(latents). Images are float32 in [-1, 1].
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.errors import UserError

SD_ALIASES = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/sd-vae-ft-ema, stabilityai/sd-vae-ft-mse, "
    "or a local folder"
)
NO_VARIANCE = -30.0  # log variance of a codec that is not random
CODEC_FILE = "autoencoder.safetensors"  # a fitted codec, beside the checkpoints and in each of them


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
        """Unscaled mean and log variance (B, 2C, h, w): what a cache stores."""
        raise NotImplementedError

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the model is trained on, from moments; `noise` (B, C, h, w) draws from the posterior."""
        raise NotImplementedError

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images."""
        return self.latents(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        raise NotImplementedError


class VAEEncoder(Codec):
    """AutoencoderKL, frozen. encode(images) -> (B, C, H/8, W/8) scaled by the VAE's own factor (0.18215 for SD 1.5)."""

    factor = 8
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        pretrained_model_name: str = "runwayml/stable-diffusion-v1-5",
        use_slicing: bool = False,
        *,
        use_tiling: bool = False,
        posterior: str = "sample",
        latent_stats: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        self.vae: Any = _load_vae(pretrained_model_name, local_files_only).requires_grad_(False).eval()  # diffusers'
        if use_slicing:
            self.vae.enable_slicing()
        if use_tiling:
            self.vae.enable_tiling()
        self.posterior, self.channels = posterior, self.vae.config.latent_channels
        self.scaling_factor = float(self.vae.config.scaling_factor)
        shift = getattr(self.vae.config, "shift_factor", None)
        mean = torch.full((self.channels,), float(shift or 0.0))
        scale = torch.full((self.channels,), self.scaling_factor)
        if latent_stats is not None:
            stats = load_file(latent_stats)
            mean, scale = stats["mean"].float().flatten(), 1 / stats["std"].float().flatten()
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1))

    def train(self, mode: bool = True) -> "VAEEncoder":
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance, before any scaling, so that a cache can draw from the posterior on each visit."""
        return self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.parameters.float()

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: a draw with `noise` (B, C, h, w) where the posterior is sampled, else the mean."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        if noise is not None and self.posterior == "sample":
            mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise.to(mean.device)
        return (mean - self.mean.to(mean.device)) * self.scale.to(mean.device)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, H/8, W/8). Without `noise` the posterior is drawn from torch's own generator."""
        moments = self.moments(images)
        if noise is None and self.posterior == "sample":
            noise = torch.randn_like(moments[:, : self.channels])
        return self.latents(moments, noise)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        unscaled = latents.float() / self.scale.to(latents.device) + self.mean.to(latents.device)
        return self.vae.decode(unscaled.to(self.vae.device, self.vae.dtype)).sample.float().clamp(-1, 1)


class PixelCodec(Codec):
    """No compression: pixels, brought to mean 0 and variance 1 by the training pictures' channel statistics."""

    factor, channels, learns = 1, 3, True
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))

    def fit(self, images: Tensor, *, seed: int) -> dict[str, float]:
        """Measure the statistics on images (N, 3, H, W)."""
        self.mean.copy_(images.mean((0, 2, 3), keepdim=True))
        self.std.copy_(images.std((0, 2, 3), keepdim=True).clamp_min(1e-3))
        return {"mean": self.mean.mean().item(), "std": self.std.mean().item()}

    def moments(self, images: Tensor) -> Tensor:
        """Pixels with no variance."""
        return torch.cat([images, torch.full_like(images, NO_VARIANCE)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pixels."""
        pixels = moments[:, :3]
        return (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return (latents * self.std.to(latents.device) + self.mean.to(latents.device)).clamp(-1, 1)


class PoolCodec(Codec):
    """For tests: 8x8 averages of red, green, blue and brightness; decodes by repeating."""

    factor, channels = 8, 4

    def moments(self, images: Tensor) -> Tensor:
        """Averages with no variance."""
        colours = nn.functional.avg_pool2d(images, 8)
        means = torch.cat([colours, colours.mean(1, keepdim=True)], dim=1)
        return torch.cat([means, torch.full_like(means, NO_VARIANCE)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The averages."""
        return moments[:, :4]

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="nearest").clamp(-1, 1)


def _load_vae(name: str, local_files_only: bool) -> Any:
    """From the folder "vae" of a pipeline, or from a VAE's own folder."""
    from diffusers import AutoencoderKL

    own_folder = Path(name).is_dir() and (Path(name) / "config.json").is_file()
    try:
        if own_folder or (not Path(name).is_dir() and "vae" in name.split("/")[-1]):
            return AutoencoderKL.from_pretrained(name, local_files_only=local_files_only)
        return AutoencoderKL.from_pretrained(name, subfolder="vae", local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(
            f"vae.pretrained_model_name {name}: cannot be loaded ({reason}); the hub's runwayml repository was "
            "withdrawn: "
            f"give {SD_ALIASES} with --vae-path, or --set vae.type=patches, which needs no weights"
        ) from None
