"""How the blocks of all five systems are computed: again in the backward pass, whole, or without their matrix products
and attention, whose outputs are then kept; and their linear layers in float8.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from shared.engine.products import Linear
from shared.errors import UserError

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention, torch.ops.mkldnn._linear_pointwise.default,
}  # fmt: skip
_keeps_products = False


def keep_products(enabled: bool) -> None:
    """Whether checkpoint() keeps what matrix products and attention gave; for the whole process."""
    global _keeps_products
    _keeps_products = enabled


def _policy(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint(block: Callable[..., Any], *arguments: Any) -> Any:
    """block(*arguments), of which the backward pass computes again what is not kept."""
    kept: dict[str, Any] = {}
    if _keeps_products:
        kept["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    return torch_checkpoint(block, *arguments, use_reentrant=False, **kept)


def check_float8(precision: str, device: torch.device, strategy: str | None, compiled: bool) -> None:
    """UserError where a run cannot multiply in float8."""
    lacking = None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        lacking = f"a GPU that multiplies in float8 (H100, L40S, RTX 4090 or newer), found {device}"
    elif find_spec("torchao") is None:
        lacking = "the package torchao: pip install torchao"
    elif precision != "bf16":
        lacking = f"--precision bf16, not {precision}"
    elif strategy is not None and strategy.startswith("zero"):
        lacking = f"the strategies none, ddp or fsdp, not {strategy}"
    elif not compiled:
        lacking = "--compile: without it the scaling takes more time than the products save"
    if lacking:
        raise UserError(f"--float8 needs {lacking}")


def use_float8(blocks: list[nn.Module], **settings: Any) -> None:
    """Linear layers that multiply in float8, forward and backward, each tensor scaled by its largest number; weights
    stay what they are. Kernels want both sides of a layer in multiples of 16. UserError where no layer is such.
    settings: of torchao's Float8LinearConfig.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, _: str) -> bool:
        if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Linear):
            return False
        fit = not (layer.in_features % 16 or layer.out_features % 16)
        count.append(fit)
        return fit

    count: list[bool] = []
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=fits, config=Float8LinearConfig(**settings))
    if not any(count):
        raise UserError(
            "--float8: no block of this model has a linear layer with sides of multiples of 16; leave it out"
        )
