"""LoRA on the base's attention through peft, and the freezing of everything but the named modules."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from opens2v.config import lora_pattern
from opens2v.model import is_reference_name
from shared.errors import UserError


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str],
    scope: Sequence[str],
) -> int:
    """Put LoRA layers in and return their parameter count. peft freezes all else: enable_trainable comes after."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only multiplies with it
        lora_dropout=dropout,
        target_modules=lora_pattern(target_modules, scope),
        init_lora_weights=True,
    )
    inject_adapter_in_model(config, model)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)


def scale_lora(model: nn.Module, factor: float) -> None:
    """Multiply the strength of all LoRA layers."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(factor)


def merge_lora(model: nn.Module) -> None:
    """Add the LoRA products into the base weights, so that inference costs nothing more."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()


@dataclass(frozen=True)
class TrainableSet:
    """What trains: parameter counts by group of names, and what stays frozen."""

    groups: dict[str, int]
    frozen: int

    @property
    def total(self) -> int:
        """Parameters that train."""
        return sum(self.groups.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {count:,}" for name, count in self.groups.items())
        share = self.total / max(1, self.frozen)
        return f"trainable {self.total:,} ({listed}); frozen {self.frozen:,} ({share:.1%} of it trains)"


def enable_trainable(model: nn.Module, *, train_fused_path: bool = False) -> TrainableSet:
    """Freeze everything, enable the reference modules and LoRA by name; no base tensor may be among them."""
    model.requires_grad_(False)
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = trainable_group(name)
        if group is None or (group.endswith("_fused") and not train_fused_path):
            continue
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(torch.float32)
        groups[group] = groups.get(group, 0) + parameter.numel()
    if not groups:
        raise UserError("nothing would train: the model has neither reference modules nor LoRA")
    for name, parameter in model.named_parameters():
        is_base = not is_reference_name(name) and "lora_" not in name
        assert not (is_base and parameter.requires_grad), f"base tensor {name} is trainable"
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return TrainableSet(groups, frozen)


def trainable_group(name: str) -> str | None:
    """The group of a parameter that may train, such as "clip_proj", "attn2.k_vae" or "lora"; None for the base's."""
    if "lora_" in name:
        return "lora"
    if not is_reference_name(name):
        return None
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part in ("attn1", "attn2")), None)
    return parts[0] if place is None else ".".join(parts[place : place + 2])
