"""The dry run: one training step on tensors without memory, and the frozen encoders beside it.

python dit/train.py --config xl --dry-run --strategy fsdp --world-size 64 --gpu h100
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import Config, diffusers_config
from dit.model import DiTBlock
from dit.modules.text import encoder_class
from dit.modules.vae import AT_A_TIME
from dit.weights.open import build_model
from shared.errors import opening
from shared.plan.measure import FrozenPart, measure_frozen
from shared.plan.table import Workload

CLIP_B32 = (63_165_952, 4 * 63_165_952)  # parameters, bytes of CLIP ViT-B/32's text tower, where none is on this disk
SD_VAE: dict[str, Any] = {  # of Stable Diffusion 1.5 and SDXL, where the run's own is not on this disk
    "_class_name": "AutoencoderKL", "block_out_channels": (128, 256, 512, 512), "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}  # fmt: skip


def workload(config: Config) -> Workload:
    """One micro-step of the model on inputs of the right shapes, for --dry-run."""
    model = config.model

    def step(config: Config) -> Callable[[nn.Module], Tensor]:
        size, shape = config.training.batch_size, (model.in_channels, config.latent_side, config.latent_side)

        def loss(network: nn.Module) -> Tensor:
            condition = {}
            if model.text_conditioning != "none":
                condition["text_embeddings"] = torch.randn(size, model.text_len, model.text_dim)
                condition["text_pooled"] = torch.randn(size, model.text_dim)
            if model.num_classes:
                condition["labels"] = torch.zeros(size, dtype=torch.long)
            return network(torch.randn(size, *shape), torch.rand(size), **condition).float().square().mean()

        return loss

    def frozen_parts(config: Config) -> list[FrozenPart]:
        size, parts = config.training.batch_size, []
        if config.data.cache_dir is None and config.vae.type == "sd":
            parts.append(vae_part(config))
        if config.data.cache_dir is None and model.text_conditioning != "none" and config.text.type != "hash":
            name, of_clip = config.text.pretrained_model_name, FrozenPart("CLIP text tower", *CLIP_B32, size * 6.0e9)
            found = encoder_part("text encoder", name, tokens=size * model.text_len)
            parts += [found] if found else [of_clip] if config.text.type == "clip" else []
        if config.data.cache_dir is None and config.repa.encoder_path is not None:
            tokens = size * (config.latent_side // model.patch_size) ** 2
            parts += filter(None, [encoder_part("encoder to align with", config.repa.encoder_path, tokens=tokens)])
        if config.training.power_ema:
            with torch.device("meta"):
                averaged = sum(weight.numel() for weight in build_model(config).parameters())
            parts.append(FrozenPart("power averages", 0, 8 * averaged))
        return parts

    title = f"DiT {model.hidden_size}/{model.num_layers}/{model.num_heads}"
    if model.type == "prx":
        from diffusers.models.transformers.transformer_prx import PRXBlock

        return Workload(title.replace("DiT", "PRX"), build_model, step, (PRXBlock,), frozen_parts, built_once=True)
    return Workload(title, build_model, step, (DiTBlock,), frozen_parts, built_once=True)


def encoder_part(title: str, name: str, *, tokens: int) -> FrozenPart | None:
    """A frozen encoder of transformers by the config.json of its folder, or of a pipeline's text_encoder; None where it
    is not on this disk. FLOPs: two for each weight beyond the table of words and token.
    """
    import transformers

    place = next((path for path in (Path(name) / "text_encoder", Path(name)) if (path / "config.json").is_file()), None)
    if place is None:
        return None
    with opening(f"{title} {name}", "give the folder as transformers saves it"), torch.device("meta"):
        settings = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
        kind = encoder_class(settings.model_type)
        settings = settings.text_config if settings.model_type == "clip" else settings
        model = kind.from_config(settings) if kind is transformers.AutoModel else kind(settings)
        words = model.get_input_embeddings().weight.numel() if hasattr(settings, "vocab_size") else 0
    count = sum(weight.numel() for weight in model.parameters())
    size = (getattr(settings, "dtype", None) or torch.float32).itemsize
    return FrozenPart(title, count, size * count, 2.0 * (count - words) * tokens)


def vae_part(config: Config) -> FrozenPart:
    """The VAE with what it needs while it works: a part of the batch at a time, in bf16 on a GPU."""
    import diffusers

    side, vae = config.data.image_size, config.vae
    settings = diffusers_config(vae.pretrained_model_name, "vae") or SD_VAE
    half = torch.float32 if vae.vae_precision == "fp32" else torch.bfloat16
    count = min(config.training.batch_size, max(1, AT_A_TIME * 256 * 256 // side**2))

    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(half)  # fake weights cannot be converted later
        try:
            return getattr(diffusers, settings["_class_name"]).from_config(settings)
        finally:
            torch.set_default_dtype(before)

    def encode(network: Any) -> object:
        return network.encode(torch.zeros(count, 3, side, side, dtype=half))

    def decode(network: Any) -> object:  # of the sample grids
        cells = side // config.vae_factor
        return network.decode(torch.zeros(count, settings["latent_channels"], cells, cells, dtype=half))

    parameters, size, peak, flops = measure_frozen(build, encode)
    peak = max(peak, measure_frozen(build, decode)[2])
    return FrozenPart("VAE", parameters, size + peak, flops * config.training.batch_size / count)
