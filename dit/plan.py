"""The dry run: one training step on tensors without memory, and the frozen encoders beside it.

python dit/train.py --config xl --dry-run --strategy fsdp --world-size 64 --gpu h100
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dit.config import Config
from dit.model import DiTBlock
from dit.weights.open import build_model
from shared.plan.measure import FrozenPart
from shared.plan.table import Workload


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
        if config.data.cache_dir is None and config.vae.type == "sd":  # 273 GFLOP to encode a picture of 256 pixels
            flops = size * 273e9 * (config.data.image_size / 256) ** 2
            parts.append(FrozenPart("VAE", 83_653_863, 4 * 83_653_863, flops))
        if config.data.cache_dir is None and model.text_conditioning != "none" and config.text.type == "clip":
            parts.append(FrozenPart("CLIP text tower", 63_165_952, 4 * 63_165_952, size * 6.0e9))
        return parts

    title = f"DiT {model.hidden_size}/{model.num_layers}/{model.num_heads}"
    return Workload(title, build_model, step, (DiTBlock,), frozen_parts)
