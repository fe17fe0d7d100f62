"""Pictures to latents and back: the Stable Diffusion autoencoder, and four codecs that need no weights.

All offer moments(images) -> unscaled mean and log variance (B, 2C, h, w), latents(moments, noise) -> what the model is
trained on, encode(images), decode(latents). Images are float32 in [-1, 1].
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dit.config import diffusers_config
from dit.modules.autoencoder import NO_VARIANCE, Codec
from shared.engine.checkpoint import load_strict
from shared.errors import UserError, load_whole, opening

SD_ALIASES = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/sd-vae-ft-ema, stabilityai/sd-vae-ft-mse, "
    "or a local folder"
)
AT_A_TIME = 8  # pictures of 256 pixels that pass the VAE at a time; fewer of larger ones
CODEC_FILE = "autoencoder.safetensors"  # a fitted codec, beside the checkpoints and in each of them


class VAEEncoder(Codec):
    """A frozen VAE of diffusers. encode(images) -> (B, C, H/f, W/f), scaled by its own factor (0.18215 for SD 1.5).

    AutoencoderKL of any size (SD, SDXL; SD3 and Flux with 16 channels and a shift), AutoencoderKLFlux2 (normalised by
    its batch statistics, of each channel), AutoencoderDC (no distribution: the posterior is its latent).
    """

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
        scaling_factor: float | None = None,
        precision: str = "auto",
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        self.vae: Any = _load_vae(pretrained_model_name, local_files_only, scaling_factor)  # one of diffusers' classes
        self.vae.requires_grad_(False).eval()
        if use_slicing:
            self.vae.enable_slicing()
        if use_tiling:
            self.vae.enable_tiling()
        config = self.vae.config
        self.posterior, self.channels, self.precision = posterior, config.latent_channels, precision
        if config.get("encoder_block_out_channels"):  # AutoencoderDC, which has no distribution
            self.posterior = "mode"
        widths = config.get("encoder_block_out_channels") or config.block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        try:
            self.scaling_factor = float(scaling_factor or config.get("scaling_factor") or 1.0)
            mean = torch.full((self.channels,), float(config.get("shift_factor") or 0.0))
        except (TypeError, ValueError):
            raise UserError(
                f"vae.pretrained_model_name {pretrained_model_name}: its config.json has a scaling_factor or "
                "shift_factor that is no number; copy the file again"
            ) from None
        scale = torch.full((self.channels,), self.scaling_factor)
        if latent_stats is not None:
            mean, scale = _statistics(latent_stats, self.channels)
        elif scaling_factor is None and config.get("scaling_factor") is None and hasattr(self.vae, "bn"):
            means = self.vae.bn.running_mean.reshape(self.channels, -1)  # of the cells of a 2 x 2 patch
            spread = self.vae.bn.running_var.reshape(self.channels, -1).mean(1) + means.var(1, correction=0)
            mean, scale = means.mean(1), (spread + self.vae.bn.eps).rsqrt()
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1))

    def train(self, mode: bool = True) -> "VAEEncoder":
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance, before any scaling, so that a cache can draw from the posterior on each visit."""
        return torch.cat([self._moments(part) for part in self._parts(images, images.shape[2] * images.shape[3])])

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: a draw with `noise` (B, C, h, w) where the posterior is sampled, else the mean."""
        return scaled_latents(moments, noise if self.posterior == "sample" else None, self.mean, self.scale)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, h, w). Without `noise` the posterior is drawn from torch's own generator."""
        moments = self.moments(images)
        if noise is None and self.posterior == "sample":
            noise = torch.randn_like(moments[:, : self.channels])
        return self.latents(moments, noise)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        unscaled = latents.float() / self.scale.to(latents.device) + self.mean.to(latents.device)
        cells = latents.shape[2] * latents.shape[3]
        parts = self._parts(unscaled, cells * self.factor**2)
        return torch.cat([self.vae.decode(part).sample.float().clamp(-1, 1) for part in parts])

    def _moments(self, images: Tensor) -> Tensor:
        found = self.vae.encode(images)
        if hasattr(found, "latent_dist"):
            return found.latent_dist.parameters.float()
        latent = found.latent.float()
        return torch.cat([latent, torch.full_like(latent, NO_VARIANCE)], dim=1)

    def _parts(self, batch: Tensor, pixels: int) -> list[Tensor]:
        """The batch in parts of about the pixels of AT_A_TIME pictures of 256 pixels, in the VAE's format."""
        device = self.vae.device
        wanted = (
            torch.bfloat16 if self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda") else None
        )
        if wanted is not None and self.vae.dtype != wanted:
            self.vae.to(wanted)
        if device.type == "cuda":  # convolutions run faster on channels-last there
            self.vae.to(memory_format=torch.channels_last)
        size = max(1, AT_A_TIME * 256 * 256 // max(pixels, 1))
        form = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        return [part.to(device, self.vae.dtype, memory_format=form) for part in batch.split(size)]


def scaled_latents(moments: Tensor, noise: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    """(draw - mean) * scale, the draw from unscaled moments (B, 2C, h, w), or their mean without noise."""
    drawn, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        drawn = drawn + (0.5 * log_variance.clamp(-30, 20)).exp() * noise.to(drawn.device)
    return (drawn - mean.to(drawn.device)) * scale.to(drawn.device)


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

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pixels."""
        return self.latents(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return (latents * self.std.to(latents.device) + self.mean.to(latents.device)).clamp(-1, 1)


class PoolCodec(Codec):
    """For tests: 8x8 averages of red, green, blue and brightness; decodes by repeating."""

    factor, channels = 8, 4

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The averages."""
        colours = nn.functional.avg_pool2d(images, 8)
        return torch.cat([colours, colours.mean(1, keepdim=True)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="nearest").clamp(-1, 1)


VAE_CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLFlux2")


def _load_vae(name: str, local_files_only: bool, scaling_factor: float | None) -> Any:
    """From the folder "vae" of a pipeline, from a VAE's own folder, or from a single file."""
    import diffusers

    if Path(name).is_file():
        return _from_file(Path(name), scaling_factor)
    own = diffusers_config(name, "vae")
    kind = "AutoencoderKL" if own is None else own["_class_name"]
    if kind not in VAE_CLASSES:
        raise UserError(f"vae.pretrained_model_name {name}: is {kind}; VAEs of {', '.join(VAE_CLASSES)} are read")
    loader = getattr(diffusers, kind)
    in_own_folder = (Path(name) / "config.json").is_file() and not (Path(name) / "vae" / "config.json").is_file()
    hint = "" if Path(name).exists() else "the hub's runwayml repository was withdrawn: "
    remedy = f"{hint}give {SD_ALIASES} with --vae-path, or --set vae.type=patches, which needs no weights"
    with opening(f"vae.pretrained_model_name {name}", remedy):
        if in_own_folder or (not Path(name).is_dir() and "vae" in name.split("/")[-1]):
            return load_whole(loader, name, local_files_only=local_files_only)
        return load_whole(loader, name, subfolder="vae", local_files_only=local_files_only)


def _from_file(path: Path, scaling_factor: float | None) -> Any:
    """An AutoencoderKL from one .safetensors file, in diffusers' names or the original ones; its sizes follow from the
    tensors' shapes.
    """
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if path.suffix != ".safetensors":
        raise UserError(f"vae.pretrained_model_name {path}: a single file must be .safetensors, or give a folder")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"vae.pretrained_model_name {path}: cannot be read ({error}); copy it again") from None
    state = {name.removeprefix("first_stage_model.").removeprefix("vae."): value for name, value in state.items()}
    is_original = "encoder.down.0.block.0.conv1.weight" in state
    is_its_folder = (path.parent / "config.json").is_file() and not (path.parent / "vae").is_dir()
    own = diffusers_config(str(path.parent), "vae") if is_its_folder else None
    config = own or _config_from_shapes(path, state, is_original, scaling_factor)
    vae: Any = AutoencoderKL.from_config(config)
    if is_original:
        state = convert_ldm_vae_checkpoint(state, vae.config)
    load_strict(vae, state, what=f"vae.pretrained_model_name {path}")
    return vae


def _config_from_shapes(
    path: Path, state: dict[str, Tensor], is_original: bool, scaling_factor: float | None
) -> dict[str, Any]:
    """The config of an AutoencoderKL, as far as the shapes of its tensors tell it."""
    first = "encoder.down.{}.block.{}.conv1.weight" if is_original else "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    widths: list[int] = []
    while first.format(len(widths), 0) in state:
        widths.append(len(state[first.format(len(widths), 0)]))
    layers = sum(first.format(0, layer) in state for layer in range(16))
    if not widths or "decoder.conv_in.weight" not in state:
        raise UserError(f"vae.pretrained_model_name {path}: holds no VAE (no encoder.down..., no decoder.conv_in)")
    if widths[0] % 32:
        raise UserError(
            f"vae.pretrained_model_name {path}: {widths[0]} channels are no 32 groups of norms, and a single file "
            "does not say in how many; give a folder with config.json"
        )
    if scaling_factor is None:
        raise UserError(
            f"vae.pretrained_model_name {path}: a single file does not hold its scaling factor; give it with "
            "--scaling-factor (0.18215 for SD 1.5, 0.13025 for SDXL), or keep config.json next to the file"
        )
    return {
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": scaling_factor,
    }


def _statistics(path: str, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std of every channel from a file."""
    try:
        stats = load_file(path)
        mean, std = stats["mean"].float().flatten(), stats["std"].float().flatten()
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"vae.latent_stats {path}: a .safetensors with mean and std is expected ({error})") from None
    if len(mean) != channels or len(std) != channels or not bool((std > 0).all()):
        raise UserError(
            f"vae.latent_stats {path}: holds {len(mean)} means and {len(std)} deviations; {channels} of each, above 0, "
            "are wanted"
        )
    return mean, 1 / std
