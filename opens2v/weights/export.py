"""The guide's checkpoint file: {"generator": ..., "step": ..., "format": "opens2v-1", "ref_config": ...}."""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opens2v.config import Config
from opens2v.model import is_reference_name
from opens2v.weights.wan import read_tensors_file, strip_wrappers, to_diffusers_name, to_original_name
from shared.config import load_saved
from shared.engine.checkpoint import find_checkpoint, load_weights, read_weights_file
from shared.errors import CheckpointError, UserError
from shared.media.folders import files_in

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


_LORA_SIDE = re.compile(r"(?P<layer>.+)\.lora[_.](?P<side>A|B|down|up)(\.\w+)?$")
_KNOWN_OF_LAYER = re.compile(r"(\.base_layer)?\.(weight|bias|alpha)|\.lora[_.](A|B|down|up)(\.default)?(\.weight)?")
_INSIDE = ("generator", "generator_lora", "model", "state_dict")  # where files of other programs keep their tensors


def load_init(model: nn.Module, path: Path) -> None:
    """Start a new run from trained adapters: all that they hold must fit; what they lack starts anew and is said.

    path: a run, one of its checkpoints, its model.pt, or files of LoRA and reference modules, alone or in a folder,
    under the names of diffusers, ComfyUI, peft, Kohya's scripts or the original. Their strength is kept: a run with
    another alpha gets other matrices. LoRA can so be added in a second stage; the other way round, LoRA is merged by
    export.py first.
    """
    given, alpha = _adapters_of(path)
    weights = _with_strength(model, given, alpha)
    if not weights:
        raise UserError(f"init_from {path}: holds neither reference modules nor LoRA; a base goes to --generator-ckpt")
    advice = "give the settings that they were trained with (--r, --clip-path, ...), or merge LoRA with export.py first"
    renamed = _fitting(model, weights, f"init_from {path}", advice)
    model.load_state_dict(renamed, strict=False)
    new = [name for name, p in model.named_parameters() if p.requires_grad and name not in renamed]
    print(f"init_from {path}: {len(renamed)} tensors taken, {len(new)} start anew{f' ({new[0]}, ...)' if new else ''}")


def _adapters_of(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """(tensors as they are named, alpha of their LoRA where it is that of a run)."""
    files = [path]
    if path.is_dir():
        with contextlib.suppress(CheckpointError):
            folder = find_checkpoint(path)
            adapter = load_saved(Config, folder / "config.yaml").adapter
            return load_weights(folder), None if adapter is None else adapter.lora_alpha
        files = files_in(path, "*.safetensors", "*.bin", "*.pt", "*.pth")
        if not files:
            raise UserError(f"init_from {path}: holds no checkpoint and no weights file; give a run or a file of it")
    tensors: dict[str, Tensor] = {}
    for file in files:
        state = read_tensors_file(file, "init_from")
        if state.get("format") == FORMAT:
            settings = (state.get("ref_config") or {}).get("adapter") or {}
            return read_trained(file), float(settings.get("lora_alpha", 1))
        for part in (state, *(state[name] for name in _INSIDE if isinstance(state.get(name), dict))):
            for name, value in part.items():
                if isinstance(value, Tensor):
                    _put(tensors, strip_wrappers(name), value)
    return tensors, None


def _with_strength(model: nn.Module, given: dict[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
    """The adapters under the model's names, B scaled so that the model's strength times B A is what it was."""
    own: dict[str, tuple[str, float]] = {}  # how a layer is called anywhere -> (its name, the model's strength)
    for layer, module in model.named_modules():
        if hasattr(module, "lora_A"):
            original = to_original_name(f"{layer}.weight").removesuffix(".weight")
            for name in (layer, original, *(f"lora_unet_{one.replace('.', '_')}" for one in (layer, original))):
                own[name] = layer, float(module.scaling["default"])
    named = {strip_wrappers(name): value for name, value in given.items()}
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        layer = next((name[:end] for end in _dots(name) if name[:end] in own), "")
        if layer and not _KNOWN_OF_LAYER.fullmatch(name[len(layer) :]):
            raise UserError(f"init_from: {name} is no part of plain LoRA, and its effect would be lost; merge it first")
        side = _LORA_SIDE.match(name.removesuffix(".weight"))
        if side is None:
            if is_reference_name(to_diffusers_name(name)):
                found[to_diffusers_name(name)] = value
            continue
        layer, strength = own.get(side["layer"], (side["layer"], 1.0))
        if side["side"] in ("A", "down"):
            _put(found, f"{layer}.lora_A.default.weight", value)
            continue
        rank = value.shape[1]
        theirs = float(named.get(f"{side['layer']}.alpha", rank if alpha is None else alpha)) / rank
        value = value if theirs == strength else value * (theirs / strength)
        _put(found, f"{layer}.lora_B.default.weight", value)
    return found


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _put(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Two files of a folder may hold one LoRA in two spellings, and not two of them."""
    if name in found and (found[name].shape != value.shape or not torch.allclose(found[name], value, rtol=1e-3)):
        raise UserError(f"init_from: holds two different tensors for {name}; give the file that is meant")
    found[name] = value


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
