"""The guide's checkpoint file: {"generator": ..., "step": ..., "format": "opens2v-1", "ref_config": ...}."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opens2v.config import Config
from shared.engine.checkpoint import load_weights, read_weights_file
from shared.errors import UserError

FORMAT = "opens2v-1"


def legacy_checkpoint(
    config: Config, model: nn.Module, weights: dict[str, Tensor], ema: dict[str, Tensor] | None, step: int
) -> dict[str, Any]:
    """model.pt's content.

    `generator` holds the trained tensors under diffusers names, float32; with save_full_generator the frozen ones as
    well. LoRA tensors are under `generator_lora`, named as peft's tools read them; averages under the names with _ema.
    """
    generator = {name: value for name, value in weights.items() if "lora_" not in name}
    if config.training.save_full_generator:
        frozen = {name: p for name, p in model.named_parameters() if name not in weights and p.numel()}
        generator |= {name.replace(".base_layer.", "."): p.detach().cpu().float() for name, p in frozen.items()}
    state: dict[str, Any] = {"generator": generator, "step": step, "format": FORMAT}
    for suffix, values in (("", weights), ("_ema", ema)):
        if values is not None:
            lora = {name.replace(".default.", "."): value for name, value in values.items() if "lora_" in name}
            state |= {f"generator_lora{suffix}": lora} if lora else {}
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


def read_trained(path: Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """Trained tensors, LoRA included, from a run, a checkpoint folder or a model.pt; averaged ones if there are."""
    if path.is_dir() or path.suffix == ".safetensors":
        return load_weights(path, prefer_ema=use_ema)
    state = read_weights_file(path)
    if not isinstance(state, dict) or "generator" not in state:
        raise UserError(
            f"{path}: holds no `generator`; give a model.pt of this project, a checkpoint folder or a run folder"
        )
    suffix = "_ema" if use_ema and "generator_ema" in state else ""
    lora = state.get(f"generator_lora{suffix}", {})
    return {**state["generator"], **state[f"generator{suffix}"], **lora}


def load_trained(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Put trained weights (canonical names, or those of a model.pt) into the model; UserError for what does not fit."""
    renamed = _fitting(model, weights, source, "use the config.yaml that lies beside it")
    model.load_state_dict(renamed, strict=False)


def load_init(model: nn.Module, path: Path) -> None:
    """Start a new run from trained adapters: all that they hold must fit; what they lack starts anew and is said.

    So LoRA can be added in a second stage; the other way round, LoRA is merged by export.py first.
    """
    weights = read_trained(path)
    advice = "give the settings that they were trained with (--r, --clip-path, ...), or merge LoRA with export.py first"
    renamed = _fitting(model, weights, f"init_from {path}", advice)
    model.load_state_dict(renamed, strict=False)
    new = [name for name, p in model.named_parameters() if p.requires_grad and name not in renamed]
    print(f"init_from {path}: {len(renamed)} tensors taken, {len(new)} start anew{f' ({new[0]}, ...)' if new else ''}")


def _fitting(model: nn.Module, weights: dict[str, Tensor], source: str, advice: str) -> dict[str, Tensor]:
    own = model.state_dict()
    renamed = {_own_name(name, own): value for name, value in weights.items()}
    unexpected = [name for name in renamed if name not in own]
    shapes = [name for name, value in renamed.items() if name in own and value.shape != own[name].shape]
    if unexpected or shapes:
        raise UserError(
            f"{source} does not fit the generator: {len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of "
            f"another shape {shapes[:3]}; {advice}"
        )
    return renamed


def _own_name(name: str, own: dict[str, Tensor]) -> str:
    """The model's name of a stored tensor: peft keeps adapters by name and puts the base layer one level down."""
    stem, _, last = name.rpartition(".")
    for candidate in (name, name.replace(".weight", ".default.weight"), f"{stem}.base_layer.{last}"):
        if candidate in own:
            return candidate
    return name
