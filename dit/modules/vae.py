"""Pictures to latents and back: the Stable Diffusion autoencoder, and four codecs that need no weights.

All offer moments(images) -> unscaled mean and log variance (B, 2C, h, w), latents(moments, noise) -> what the model is
trained on, encode(images), decode(latents). Images are float32 in [-1, 1].
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dit.config import Config
from dit.modules.autoencoder import ConvAutoencoder, PatchAutoencoder
from shared.errors import UserError

SD_ALIASES = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/sd-vae-ft-ema, stabilityai/sd-vae-ft-mse, "
    "or a local folder"
)
NO_VARIANCE = -30.0  # log variance of a codec that is not random


class VAEEncoder(nn.Module):
    """AutoencoderKL, frozen. encode(images) -> (B, C, H/8, W/8) scaled by the VAE's own factor (0.18215 for SD 1.5)."""

    factor = 8

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
        self.vae = _load_vae(pretrained_model_name, local_files_only).requires_grad_(False).eval()
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


class PixelCodec(nn.Module):
    """No compression: pixels, brought to mean 0 and variance 1 by the training pictures' channel statistics."""

    factor, channels, posterior = 1, 3, "mode"

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

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pixels."""
        return self.latents(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return (latents * self.std.to(latents.device) + self.mean.to(latents.device)).clamp(-1, 1)


class PoolCodec(nn.Module):
    """For tests: 8x8 averages of red, green, blue and brightness; decodes by repeating."""

    factor, channels, posterior = 8, 4, "mode"

    def moments(self, images: Tensor) -> Tensor:
        """Averages with no variance."""
        colours = nn.functional.avg_pool2d(images, 8)
        means = torch.cat([colours, colours.mean(1, keepdim=True)], dim=1)
        return torch.cat([means, torch.full_like(means, NO_VARIANCE)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The averages."""
        return moments[:, :4]

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The averages."""
        return self.moments(images)[:, :4]

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="nearest").clamp(-1, 1)


def make_vae(config: Config) -> nn.Module:
    """The codec that the settings name. Refuses a number of channels that the model does not expect."""
    vae = config.vae
    if vae.type == "sd":
        codec: nn.Module = VAEEncoder(
            vae.pretrained_model_name,
            vae.use_slicing,
            use_tiling=vae.use_tiling,
            posterior=vae.posterior,
            latent_stats=vae.latent_stats,
            local_files_only=config.text.local_files_only,
        )
    elif vae.type == "patches":
        codec = PatchAutoencoder(channels=config.model.in_channels, patch=vae.patch, decoder_steps=vae.decoder_steps)
    elif vae.type == "conv":
        codec = ConvAutoencoder(channels=config.model.in_channels, factor=vae.patch, width=vae.width)
    else:
        codec = PixelCodec() if vae.type == "pixels" else PoolCodec()
    if codec.channels != config.model.in_channels:
        raise UserError(
            f"vae.type {vae.type} gives latents of {codec.channels} channels, model.in_channels is "
            f"{config.model.in_channels}; "
            f"set --in-channels {codec.channels}"
        )
    return codec


def _load_vae(name: str, local_files_only: bool) -> nn.Module:
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
