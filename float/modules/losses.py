"""Losses of phase 1 on pictures: L1, boxes, multi-scale and component-wise perceptual distance (FLOAT section 3.1,
appendix).

Pictures: (B, 3, S, S) float32 in [-1, 1]. Boxes: left, top, right, bottom as shares of the side.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.engine.checkpoint import load_weights
from shared.errors import UserError

# VGG-19 up to relu5_1: output channels, "M" is 2x2 max pooling (Simonyan and Zisserman 2015, configuration E)
VGG19 = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512)
RANDOM_STACK = (16, "M", 32, "M", 64, "M", 64)
PYRAMID_SCALES = (1.0, 0.5, 0.25)
COMPONENT_LEVELS = 4
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureStack(nn.Module):
    """A frozen convolutional stack; hands out the activations that begin each resolution (relu1_1, relu2_1, ...)."""

    mean: Tensor
    std: Tensor

    def __init__(self, plan: tuple, *, seed: int | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        width, self.taps, fresh = 3, [], True
        for entry in plan:
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
                fresh = True
                continue
            layers += [nn.Conv2d(width, entry, 3, padding=1), nn.ReLU()]
            if fresh:
                self.taps.append(len(layers) - 1)
            width, fresh = entry, False
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        if seed is not None:
            self._draw(seed)
        self.eval().requires_grad_(False)

    def _draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                fan_in = layer.in_channels * 9
                layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
                assert layer.bias is not None, "made with one above"
                layer.bias.data.zero_()

    def forward(self, image: Tensor) -> list[Tensor]:
        x, taken = ((image + 1) / 2 - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                taken.append(x)
        return taken


def make_feature_stack(vgg_path: str | None) -> tuple[FeatureStack, str]:
    """VGG-19 from torchvision's file of weights, or a small frozen random stack; and a sentence that says which."""
    if vgg_path is None:
        return FeatureStack(
            RANDOM_STACK, seed=19
        ), "perceptual distance: frozen random convolutions, no VGG-19 given (vgg_path)"
    if not Path(vgg_path).is_file():
        raise UserError(
            f"--vgg-path {vgg_path}: no such file; give torchvision's vgg19 weights, or leave it out for a random stack"
        )
    stack = FeatureStack(VGG19)
    state = load_weights(vgg_path)
    own = stack.state_dict()
    missing = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if missing:
        raise UserError(
            f"--vgg-path {vgg_path}: is not VGG-19, {len(missing)} tensors do not fit, such as {missing[0]}"
        )
    stack.load_state_dict({name: state[name] for name in own})
    return stack, f"perceptual distance: VGG-19 of {vgg_path}"


def box_slices(box: list[float], side: int) -> tuple[slice, slice]:
    """(rows, columns) of a box in a picture or feature map of that side, at least one pixel each way."""
    left, top, right, bottom = (round(edge * side) for edge in box)
    return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))


def component_mask(boxes: list[list[float]], side: int, like: Tensor) -> Tensor:
    """(side, side), 1 within the boxes of eyes and mouth."""
    mask = like.new_zeros(side, side)
    for box in boxes:
        rows, columns = box_slices(box, side)
        mask[rows, columns] = 1
    return mask


def perceptual_terms(
    stack: FeatureStack, output: Tensor, target: Tensor, boxes: list[list[float]]
) -> tuple[Tensor, Tensor]:
    """(multi-scale perceptual L1, component-wise perceptual L1), both means.

    Component-wise: for the first 4 levels of the full-size pyramid, |M phi(output) - M phi(target)| summed and divided
    by the area of the mask M times the channels.
    """
    whole, component = output.new_zeros(()), output.new_zeros(())
    for scale in PYRAMID_SCALES:
        pair = torch.cat([output, target])
        if scale < 1:
            pair = F.interpolate(pair, scale_factor=scale, mode="bilinear", antialias=True)
        with torch.autocast(output.device.type, enabled=False):
            levels = [level.chunk(2) for level in stack(pair.float())]
        for depth, (ours, theirs) in enumerate(levels):
            distance = (ours - theirs).abs()
            whole = whole + distance.mean() / len(levels)
            if scale == 1 and depth < COMPONENT_LEVELS:
                mask = component_mask(boxes, distance.shape[-1], distance)
                component = component + (distance * mask).mean((0, 1)).sum() / mask.sum() / COMPONENT_LEVELS
    return whole / len(PYRAMID_SCALES), component


def box_difference(output: Tensor, target: Tensor, box: list[float]) -> Tensor:
    """Mean squared difference within a box, weighted towards its middle by squared sines of mean 1.

    Squared, for an open mouth is a few pixels that are wrong by much: an absolute difference is content without them.
    Weighted, for hair that swings at the edge of the mouth box is five times the mouth's change.
    """
    rows, columns = box_slices(box, output.shape[-1])
    difference = (output[..., rows, columns] - target[..., rows, columns]).square()
    down, across = (
        torch.sin((torch.arange(count, device=output.device) + 0.5) / count * torch.pi).square()
        for count in difference.shape[-2:]
    )
    window = down[:, None] * across
    return (difference * (window / window.mean())).mean()


def psnr(output: Tensor, target: Tensor, box: list[float] | None = None) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], clamped; over a box where one is given."""
    if box is not None:
        rows, columns = box_slices(box, output.shape[-1])
        output, target = output[..., rows, columns], target[..., rows, columns]
    error = (output.float().clamp(-1, 1) - target.float()).square().mean().clamp(min=1e-10)
    return float(10 * torch.log10(4 / error))
