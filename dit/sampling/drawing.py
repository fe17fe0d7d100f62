"""Pictures from a model and conditions. A picture follows from its seed alone, not from its batch or rank.

Shapes: B pictures, C H W of a latent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit.sampling.samplers import guide


class Drawing(NamedTuple):
    """How to draw."""

    sampler: str = "auto"
    steps: int = 50
    cfg_scale: float = 5.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # noise levels at which guidance acts
    cfg_channels: int | None = None  # None: all
    cfg_rescale: float = 0.0
    shift: float | None = None


class PictureNoise:
    """One CPU generator a picture, seeded with the picture's own seed; numbers are drawn in float32."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self, step: int = 0) -> Tensor:
        """The next draw (B, *shape) of every picture; `step` only names it."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators]).to(
            self.device
        )


@torch.no_grad()
def draw_latents(
    model: Callable,
    objective: Any,
    condition: dict[str, Tensor],
    seeds: list[int],
    shape: tuple[int, ...],
    *,
    drawing: Drawing,
    device: torch.device,
    null: dict[str, Tensor] | None = None,
) -> Tensor:
    """Latents (B, *shape). condition: the model's keyword arguments, B rows; null replaces the model's own null
    condition (a negative prompt). model(x, t, **condition, drop=...) is the trained network, wrapped or not.
    """
    count = len(seeds)
    noise = PictureNoise(seeds, shape, device)
    keep, drop = (torch.full((count,), flag, dtype=torch.bool, device=device) for flag in (False, True))
    with_text = {**condition, "drop": keep}
    without = {**condition, "drop": drop} if null is None else {**null, "drop": keep}

    def network(x: Tensor, t_B: Tensor, **arguments: Tensor) -> Tensor:
        arguments = {name: value for name, value in arguments.items() if name != "drop" or value.any()}
        return model(x, objective.model_time(t_B), **arguments).float()

    def predict(x: Tensor, t_B: Tensor) -> Tensor:
        level = float(objective.noise_level(t_B[:1]))
        scale = drawing.cfg_scale if drawing.cfg_interval[0] <= level <= drawing.cfg_interval[1] and condition else 1.0
        return guide(
            network, x, t_B, with_text, without, scale, channels=drawing.cfg_channels, rescale=drawing.cfg_rescale
        )

    return objective.sample(
        predict, noise(), method=drawing.sampler, steps=drawing.steps, shift=drawing.shift, draw=noise
    )


def to_uint8(images: Tensor, *, rule: str = "round") -> np.ndarray:
    """(B, H, W, 3) uint8 from [-1, 1]. round: nearest. adm: clamp(127.5 x + 128), truncated, as ADM's scripts do."""
    scaled = 127.5 * images.float() + (128.0 if rule == "adm" else 127.5)
    scaled = scaled if rule == "adm" else scaled.round()
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures: np.ndarray, columns: int, *, enlarge: int = 1) -> Image.Image:
    """One picture of many (B, H, W, 3), row by row, with a thin white gap."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        canvas[top : top + height, left : left + width] = picture
    image = Image.fromarray(canvas)
    return image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
