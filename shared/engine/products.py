"""Linear layers in fp32 on processors where torch's own matrix product leaves half of the machine unused.

torch multiplies fp32 matrices on a CPU by MKL, which takes its AVX-512 path on Intel's processors only; on an AMD
processor with AVX-512 it computes with vectors of half that width. oneDNN, which torch ships for convolutions, looks at
what the processor can do and not at who made it: 245 against 108 GFLOP/s on one core of an EPYC. So there, and only
there, the linear layers of the five models multiply by oneDNN. `torch.backends.mkldnn.flags(enabled=False)` turns it
off, as it does for convolutions.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

SMALLEST = 2**22  # multiply-adds; below, a Python function costs more than the faster product brings
FEWEST_ROWS = 4  # of x; below, a product only reads its weight, and MKL reads as fast


_onednn = torch.ops.mkldnn._linear_pointwise


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is one for which MKL does not use it."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "AuthenticAMD" in processor.read_text(errors="replace")


class _Product(torch.autograd.Function):
    """The rows of linear(), differentiable any number of times: the gradients are such products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:  # type: ignore[override]
        by_x, by_weight, _ = ctx.needs_input_grad
        ctx.shape = x.shape  # a frozen layer holds no input, as torch's does not
        ctx.save_for_backward(x if by_weight else None, weight_NK if by_x else None)
        return _multiply(x, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_NK = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        return (
            _rows(gradient_MN, weight_NK.t(), None).view(ctx.shape) if by_x else None,
            _weight_gradient(gradient_MN, x.reshape(-1, x.shape[-1])) if by_weight else None,
            gradient_MN.sum(0) if by_bias else None,
        )


def _weight_gradient(gradient_MN: Tensor, x_MK: Tensor) -> Tensor:
    """gradient^T x, (N, K). oneDNN's first factor is copied row by row: here the narrower one, where rows are many."""
    rows, width = x_MK.shape
    if width < gradient_MN.shape[1] < rows:
        return _rows(x_MK.t(), gradient_MN.t(), None).t().contiguous()
    return _rows(gradient_MN.t(), x_MK.t(), None)


def _multiply(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    # Rows or columns without gaps: for a slice of a wider matrix oneDNN has no kernel but its slow reference.
    if not (weight_NK.is_contiguous() or weight_NK.t().is_contiguous()):
        weight_NK = weight_NK.contiguous()
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    product_MN: Tensor = _onednn(x_MK, weight_NK, bias_N, "none", [], "")
    return product_MN


def _rows(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _Product.apply(x, weight_NK, bias_N)  # type: ignore[no-any-return]
    return _multiply(x, weight_NK, bias_N)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain fp32 tensors of a CPU, large enough and of shapes that belong together; nothing that is planned, traced,
    compiled, transformed, sharded or cast. oneDNN would read a bias with gaps, or on meta, as if it lay there whole.
    """
    return bool(
        not torch.compiler.is_compiling()  # first: dynamo would watch the rest, sizes too, and compile again
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and x.dtype is torch.float32 is weight.dtype
        and x.numel() * len(weight) >= SMALLEST
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and onednn_is_faster()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and weight.shape[1:] == x.shape[-1:]
        and (bias is None or (bias.dtype is torch.float32 and bias.device.type == "cpu"))
        and (bias is None or (type(bias) in (Tensor, nn.Parameter) and bias.shape == weight.shape[:1]))
        and (bias is None or bias.is_contiguous())
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: x (..., K) to (..., N), equal up to the rounding of sums."""
    if not _fits(x, weight_NK, bias_N):
        return functional.linear(x, weight_NK, bias_N)
    return _rows(x, weight_NK, bias_N).view(*x.shape[:-1], len(weight_NK))


class Linear(nn.Linear):
    """nn.Linear that multiplies by linear(); same parameters, same state."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


def use_fast_products(model: nn.Module) -> None:
    """Give every plain nn.Linear of a model the forward of Linear, in place; subclasses stay what they are."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
