"""A frozen vision encoder whose features the network's tokens are aligned with (REPA)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import load_whole, opening

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # DINOv2's pictures, where nothing else is said


class FeatureEncoder(nn.Module):
    """DINOv2, DINOv3 or SigLIP of transformers by path. images (B, 3, H, W) in [-1, 1] and a grid (h, w) -> features
    (B, h w, E), one for every token of the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        from transformers import AutoModel

        with opening(f"repa.encoder_path {path}", "give a local folder"):
            model: Any = load_whole(AutoModel, path, local_files_only=True)
        self.model: Any = getattr(model, "vision_model", model)  # of a model that also reads text
        self.model.requires_grad_(False).eval()
        config = getattr(self.model.config, "vision_config", self.model.config)
        patch = config.patch_size
        self.patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        mean, std = _statistics(Path(path))
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))

    def train(self, mode: bool = True) -> "FeatureEncoder":
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of the patches, without the tokens for the whole picture."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        pixels = nn.functional.interpolate((images_BCHW + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - self.mean) / self.std
        found = self.model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return found[:, found.shape[1] - grid[0] * grid[1] :].float()


def _statistics(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pictures that the encoder was trained on."""
    try:
        tree = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
        return tuple(tree["image_mean"]), tuple(tree["image_std"])
    except (OSError, ValueError, KeyError, TypeError):
        return IMAGENET
