"""Activation checkpointing as all five systems do it: a block is computed again in the backward pass, whole, or without
its matrix products and attention, whose outputs are then kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
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
