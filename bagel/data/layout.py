"""What the settings mean for tokens and pictures: the pack format and the two image transforms."""

from bagel.config import DataConfig, ModelConfig
from bagel.data.images import ImageTransform
from bagel.data.tokenizer import Tokenizer
from bagel.packing import PackFormat


def layout_of(config: ModelConfig, tokenizer: Tokenizer) -> PackFormat:
    """Strides, table sizes and marks."""
    return PackFormat(
        tokenizer.special,
        config.latent_stride,
        config.max_latent_size,
        config.vision.patch_size,
        config.vision.patches_per_side,
        config.interpolate_pos,
        config.latent_patch_size,
        config.autoencoder.z_channels,
    )


def transforms_of(data: DataConfig, config: ModelConfig) -> tuple[ImageTransform, ImageTransform]:
    """(for latents, for the vision tower); strides are the sides of one token."""
    vae, vit = data.vae_image, data.vit_image
    return (
        ImageTransform(vae.max_size, vae.min_size, config.latent_stride, vae.max_pixels),
        ImageTransform(vit.max_size, vit.min_size, config.vision.patch_size, vit.max_pixels),
    )
