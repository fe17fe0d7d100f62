"""Frozen projections in 4 or 8 bits, in plain torch: NF4 (blocks of 64, Dettmers et al. 2023) and INT8 (per row,
absolute maximum).

The weight is unpacked to the input's type for each product; only the input receives a gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from shared.errors import UserError

BLOCK = 64
# The 16 NormalFloat levels: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8, two values a byte; scales fp32, one a block of 64 values in reading order)."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp(min=1e-12)[:, None], borders).to(torch.uint8).flatten()
    return codes[0::2] << 4 | codes[1::2], scale


def dequantize_nf4(codes: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight of `shape` again, as close as 16 levels allow."""
    index = torch.stack([codes >> 4, codes & 15], dim=1).flatten().int()
    values = torch.tensor(NF4_LEVELS, device=codes.device)[index].view(-1, BLOCK) * scale[:, None]
    return values.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 (out, in), scales fp32 (out,))."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class _FrozenProduct(torch.autograd.Function):
    """x W^T with W unpacked again in the backward pass, so that no full weight is kept between the two."""

    @staticmethod
    def forward(context, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        context.layer = layer
        return F.linear(x, layer.weight_as(x.dtype))

    @staticmethod
    def backward(context, grad: Tensor):
        return grad @ context.layer.weight_as(grad.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is stored as nf4 or int8; the bias stays as it is."""

    def __init__(self, features_in: int, features_out: int, kind: str, *, bias: bool, dtype: torch.dtype | None = None):
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, features_in, features_out
        self.max_error: float | None = None  # largest difference from the weight that was stored last
        self.codes: Tensor
        self.scale: Tensor
        if kind == "nf4":
            blocks = -(-features_in * features_out // BLOCK)
            self.register_buffer("codes", torch.empty(blocks * BLOCK // 2, dtype=torch.uint8), persistent=False)
            self.register_buffer("scale", torch.empty(blocks), persistent=False)
        else:
            self.register_buffer("codes", torch.empty(features_out, features_in, dtype=torch.int8), persistent=False)
            self.register_buffer("scale", torch.empty(features_out), persistent=False)
        self.bias = nn.Parameter(torch.empty(features_out, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> "QuantizedLinear":
        """The quantized form of a linear layer."""
        with torch.device(linear.weight.device):
            layer = cls(
                linear.in_features, linear.out_features, kind, bias=linear.bias is not None, dtype=linear.weight.dtype
            )
        if not linear.weight.is_meta:
            layer.store(linear.weight)
            if linear.bias is not None and layer.bias is not None:
                with torch.no_grad():
                    layer.bias.copy_(linear.bias)
        return layer

    def store(self, weight: Tensor) -> None:
        """Quantize `weight` (out, in) into this layer."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"weight of shape {tuple(weight.shape)} for a layer of {(self.out_features, self.in_features)}"
            )
        codes, scale = quantize_nf4(weight) if self.kind == "nf4" else quantize_int8(weight)
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        if not isinstance(weight, FakeTensor):
            self.max_error = (self.weight_as(torch.float32) - weight.float()).abs().max().item()

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The full weight (out, in) in `dtype`."""
        if self.kind == "nf4":
            return dequantize_nf4(self.codes, self.scale, (self.out_features, self.in_features), dtype)
        return (self.codes.float() * self.scale[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = _FrozenProduct.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @property
    def bytes_stored(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in (self.codes, self.scale))


PROJECTIONS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def is_projection(name: str) -> bool:
    """Whether a module of the model is one of the decoder's large projections; all else keeps its precision."""
    parts = name.split(".")
    return name.startswith("language_model.model.layers.") and parts[-1].removesuffix("_moe_gen") in PROJECTIONS


def quantize_projections(model: nn.Module, kind: str) -> None:
    """Replace the decoder's projections; embeddings, head, norms, vision tower and bridges stay in high precision."""
    if kind not in ("nf4", "int8"):
        raise UserError(f"quantization {kind!r}: expected none, nf4 or int8")
    for name, module in list(model.named_modules()):
        if is_projection(name) and isinstance(module, nn.Linear):
            model.get_submodule(name.rsplit(".", 1)[0]).register_module(
                name.rsplit(".", 1)[1], QuantizedLinear.of(module, kind)
            )


def stored_layers(model: nn.Module) -> list[dict[str, Any]]:
    """Per quantized layer: the largest error of its weight, bytes as bf16 and as stored."""
    return [
        {
            "layer": name,
            "max_error": module.max_error,
            "bytes_bf16": 2 * module.in_features * module.out_features,
            "bytes_stored": module.bytes_stored,
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    ]
