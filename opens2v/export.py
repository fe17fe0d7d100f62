"""The guide's checkpoint file: {"generator": ..., "step": ..., "format": "opens2v-1", "ref_config": ...}."""

from typing import Any

from torch import Tensor, nn

from opens2v.config import Config
from opens2v.wan import fingerprint
from shared.errors import UserError

FORMAT = "opens2v-1"


def legacy_checkpoint(
    config: Config, model: nn.Module, weights: dict[str, Tensor], ema: dict[str, Tensor] | None, step: int
) -> dict[str, Any]:
    """model.pt's content. `generator` holds the trained tensors under diffusers names, float32; with save_full_generator the
    frozen ones as well. LoRA tensors are under `generator_lora`, named as peft's tools read them."""
    generator = {name: value for name, value in weights.items() if "lora_" not in name}
    if config.training.save_full_generator:
        frozen = {name: p for name, p in model.named_parameters() if name not in weights and p.numel()}
        generator |= {name.replace(".base_layer.", "."): p.detach().cpu().float() for name, p in frozen.items()}
    state: dict[str, Any] = {"generator": generator, "step": step, "format": FORMAT}
    lora = {name.replace(".default.", "."): value for name, value in weights.items() if "lora_" in name}
    if lora:
        state["generator_lora"] = lora
    if ema is not None:
        state["generator_ema"] = {name: value for name, value in ema.items() if "lora_" not in name}
    state["ref_config"] = {
        "clip_path": config.model.clip_path,
        "clip_proj_type": config.model.clip_proj_type,
        "vae_pos_embed": config.model.vae_pos_embed,
        "train_fused_path": config.model.train_fused_path,
        "adapter": None if config.adapter is None else config.adapter.model_dump(),
    }
    return state


def load_trained(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Put trained weights (canonical names, or `generator` of a model.pt) into the model; UserError for what does not fit."""
    own = model.state_dict()
    renamed = {}
    for name, value in weights.items():
        if name not in own and "lora_" in name and name.replace(".weight", ".default.weight") in own:
            name = name.replace(".weight", ".default.weight")
        if name not in own and name.rsplit(".", 1)[0] + ".base_layer." + name.rsplit(".", 1)[-1] in own:
            name = name.rsplit(".", 1)[0] + ".base_layer." + name.rsplit(".", 1)[-1]
        renamed[name] = value
    unexpected = [name for name in renamed if name not in own]
    shapes = [name for name, value in renamed.items() if name in own and value.shape != own[name].shape]
    if unexpected or shapes:
        raise UserError(
            f"{source} does not fit the generator: {len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of another shape "
            f"{shapes[:3]}; use the config.yaml that lies beside it"
        )
    model.load_state_dict(renamed, strict=False)


def base_fingerprint(model: nn.Module) -> float:
    """See opens2v.wan.fingerprint."""
    return fingerprint(model)
