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
from torch.nn import functional

SMALLEST = 2**20  # multiply-adds; below, a Python function costs more than the faster product brings


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is one for which MKL does not use it."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processor = Path("/proc/cpuinfo")
    return processor.is_file() and "AuthenticAMD" in processor.read_text(errors="replace")


class _Product(torch.autograd.Function):
    """a_MK b_NK^T + bias_N, differentiable any number of times: each gradient is such a product again."""

    @staticmethod
    def forward(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(_dense(a_MK), _dense(b_NK), bias_N, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        a_MK, b_NK, _ = inputs
        by_a, by_b, _ = ctx.needs_input_grad  # what enters a frozen layer is not kept
        ctx.save_for_backward(a_MK if by_b else None, b_NK if by_a else None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a_MK, b_NK = ctx.saved_tensors
        (gradient_MN,) = gradients
        by_a, by_b, by_bias = ctx.needs_input_grad
        return (
            _product(gradient_MN, b_NK.t(), None) if by_a else None,
            _product(gradient_MN.t(), a_MK.t(), None) if by_b else None,
            gradient_MN.sum(0) if by_bias else None,
        )


def _dense(matrix: Tensor) -> Tensor:
    """Rows or columns without gaps: for a slice of a wider matrix oneDNN has no kernel but its slow reference."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _Product.apply(a_MK, b_NK, bias_N)  # type: ignore[no-any-return]
    return _Product.forward(a_MK, b_NK, bias_N)


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Plain fp32 tensors of a CPU, large enough; nothing that is planned, traced, compiled, sharded or cast."""
    return bool(
        not torch.compiler.is_compiling()  # first: dynamo would watch the rest, sizes too, and compile again
        and x.dtype is torch.float32 is weight.dtype
        and x.device.type == "cpu"
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() * len(weight) >= SMALLEST
        and onednn_is_faster()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: x (..., K) to (..., N), equal up to the rounding of sums."""
    if not _fits(x, weight_NK):
        return functional.linear(x, weight_NK, bias_N)
    rows_MK = x.reshape(-1, x.shape[-1])
    return _product(rows_MK, weight_NK, bias_N).unflatten(0, x.shape[:-1])


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
