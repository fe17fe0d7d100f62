"""Low-rank adapters beside the frozen projections of either expert (Hu et al. 2021): y = W x + (alpha / r) B A x."""

import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bagel.config import ModelConfig
from bagel.modules.quantization import QuantizedLinear, is_projection
from shared.engine.products import linear


class LoRALinear(nn.Module):
    """A frozen projection with an adapter; B starts at zero, so that training starts from the frozen model."""

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.codes.device if isinstance(base, QuantizedLinear) else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.scale, self.dropout, self.merged = alpha / rank, dropout, False
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.merged:
            return out
        narrow = linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return out + self.scale * linear(narrow, self.lora_B.to(narrow.dtype))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight."""
        return self.scale * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight, so that it costs nothing at inference."""
        if isinstance(self.base, QuantizedLinear):
            raise ValueError("an adapter cannot be merged into a quantized weight; load the base without quantization")
        if not self.merged:
            self.base.weight.copy_(self.base.weight.float() + self.delta())  # rounded once
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out of the weight again."""
        if self.merged and isinstance(self.base, nn.Linear):
            self.base.weight -= self.delta().to(self.base.weight.dtype)
            self.merged = False


def add_adapters(model: nn.Module, config: ModelConfig) -> int:
    """Freeze the model and put adapters beside the projections of the chosen experts; returns how many."""
    model.requires_grad_(False)
    wanted = {"und": (False,), "gen": (True,), "both": (False, True)}[config.lora_target]
    count = 0
    for name, module in list(model.named_modules()):
        if is_projection(name) and isinstance(module, (nn.Linear, QuantizedLinear)) and ("_moe_gen" in name) in wanted:
            adapter = LoRALinear(module, config.lora_rank, config.lora_alpha, config.lora_dropout)
            model.get_submodule(name.rsplit(".", 1)[0]).register_module(name.rsplit(".", 1)[1], adapter)
            count += 1
    return count


def adapters(model: nn.Module) -> list[LoRALinear]:
    """Every adapter of the model."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def merge_adapters(model: nn.Module) -> nn.Module:
    """Fold every adapter into its weight and put the plain layers back, with the names of the released model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.merge()
            model.get_submodule(name.rsplit(".", 1)[0]).register_module(name.rsplit(".", 1)[1], module.base)
    return model


def save_adapter(folder: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """adapter.safetensors and adapter_config.json of a checkpoint, in our names; save_peft writes PEFT's."""
    chosen = {name: value.contiguous() for name, value in weights.items() if "lora_" in name}
    save_file(chosen, folder / "adapter.safetensors")
    settings = {
        name: config[name]
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "quantization", "model_path")
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def save_peft(folder: Path, model: nn.Module, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """adapter_model.safetensors and adapter_config.json as the library PEFT reads them, written aside and renamed.

    PEFT's names: base_model.model.NAME.lora_A.weight, of the layer that the adapter stands beside.
    """
    tensors, targets = {}, []
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            targets.append(name)
            for part, value in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
                tensors[f"base_model.model.{name}.{part}.weight"] = value.detach().to(dtype).contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": config.model_path,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
    (aside / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
