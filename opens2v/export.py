"""Take trained adapters out of a run: for diffusers, for ComfyUI, or merged into whole weights.

    python opens2v/export.py --checkpoint OUT --output FOLDER --what lora            for diffusers' load_lora_weights
    python opens2v/export.py --checkpoint OUT --output FOLDER --what lora --names comfyui
    python opens2v/export.py --checkpoint OUT --output FOLDER --what references      for --init-from
    python opens2v/export.py --checkpoint OUT --output FOLDER --what merged [--names original|comfyui]

lora: the LoRA layers alone, with their strength. references: the reference modules, which no other program has. merged:
the whole base with LoRA added in, as a diffusers folder or under the original names, and the reference modules beside
it.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from typing import Any, Literal

from shared.config import Section, load_config, setting
from shared.errors import UserError, command, write_text, written_aside

LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
REFERENCE_FILE = "reference_adapters.safetensors"


class ExportOptions(Section):
    """What to take out, and for whom."""

    checkpoint: str = setting("", "run folder, checkpoint folder, or model.pt")
    config_path: str | None = setting(None, "settings of the run, when they do not lie beside the checkpoint")
    generator_ckpt: str | None = setting(None, "base weights, when they are not where the run had them")
    output: str = setting("", "folder that receives the files")
    what: Literal["lora", "references", "merged"] = setting("lora", "LoRA layers, reference modules, or whole weights")
    names: Literal["diffusers", "comfyui", "original"] = setting(
        "diffusers", "whose parameter names; comfyui: the original names behind diffusion_model. (lora and merged)"
    )
    use_ema: bool = setting(True, "averaged weights, where the checkpoint has them")
    dtype: Literal["fp32", "bf16"] = setting("fp32", "precision of the written weights")


def lora_of(weights: dict[str, Any]) -> dict[str, Any]:
    """LoRA tensors by layer and side: {"blocks.0.attn1.to_q.lora_A": (r, in), ...}."""
    found = {}
    for name, value in weights.items():
        if "lora_" in name:
            found[name.replace(".default.", ".").removesuffix(".weight")] = value.float()
    return found


def lora_for_diffusers(lora: dict[str, Any], alpha: float) -> dict[str, Any]:
    """Tensors for load_lora_weights. Its form has no place for alpha, so that the strength alpha / r goes into B."""
    return {
        f"transformer.{name}.weight": value * (alpha / value.shape[1] if name.endswith("lora_B") else 1)
        for name, value in lora.items()
    }


def lora_for_comfyui(lora: dict[str, Any], alpha: float) -> dict[str, Any]:
    """Tensors under the original names behind diffusion_model., with alpha beside each layer."""
    import torch

    from opens2v.weights.wan import to_original_name

    found = {}
    for name, value in lora.items():
        layer, side = name.rsplit(".", 1)
        stem = "diffusion_model." + to_original_name(f"{layer}.weight").removesuffix(".weight")
        found[f"{stem}.{side}.weight"] = value
        found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def base_state(model: Any, *, merged: bool = True) -> dict[str, Any]:
    """The base's tensors under diffusers names, LoRA added in."""
    from opens2v.model import is_reference_name
    from opens2v.modules.lora import merge_lora

    if merged:
        merge_lora(model)
    return {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if "lora_" not in name and not is_reference_name(name)
    }


def export(options: ExportOptions) -> list[Path]:
    """Write the files; returns them."""
    import torch
    from safetensors.torch import save_file

    from opens2v.model import is_reference_name
    from opens2v.weights.export import read_trained
    from opens2v.weights.open import settings_of
    from opens2v.weights.wan import to_original_name

    config, path = settings_of(Path(options.checkpoint), options.config_path)
    weights = read_trained(path, use_ema=options.use_ema)
    lora, folder = lora_of(weights), Path(options.output)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    if options.what == "lora" and not lora:
        raise UserError(f"--checkpoint {path}: the run has no LoRA (adapter.r); use --what references or merged")
    written: list[Path] = []

    def write(name: str, tensors: dict[str, Any], **metadata: str) -> None:
        target = folder / name
        stored = {key: value.detach().cpu().to(dtype).contiguous() for key, value in tensors.items()}
        with written_aside(target) as temporary:
            save_file(stored, temporary, metadata={"format": "pt", **metadata})
        written.append(target)

    alpha = 0.0 if config.adapter is None else config.adapter.lora_alpha
    references = {name: value for name, value in weights.items() if is_reference_name(name)}
    if options.what == "lora":
        if options.names == "original":
            raise UserError("--names original has no form for LoRA; use diffusers or comfyui")
        make = lora_for_diffusers if options.names == "diffusers" else lora_for_comfyui
        write(LORA_FILE if options.names == "diffusers" else "lora_comfyui.safetensors", make(lora, alpha))
        return written
    if options.what == "references":
        if options.names != "diffusers":
            raise UserError("--what references: only this project has these modules; leave --names out")
        write(REFERENCE_FILE, references)
        return written
    model = _whole_model(options)
    state = base_state(model)
    if options.names == "diffusers":
        write("transformer/diffusion_pytorch_model.safetensors", state)
        write_text(folder / "transformer" / "config.json", json.dumps(diffusers_config(model), indent=1))
        written.append(folder / "transformer" / "config.json")
    else:
        prefix = "model.diffusion_model." if options.names == "comfyui" else ""
        write(f"wan_{options.names}.safetensors", {prefix + to_original_name(key): v for key, v in state.items()})
    if references:
        write(REFERENCE_FILE, references)
    return written


def diffusers_config(model: Any) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel for a model of ours."""
    import inspect

    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    known = set(inspect.signature(WanTransformer3DModel.__init__).parameters) - {"self"}
    settings = {name: value for name, value in dict(model.config).items() if name in known}
    return {"_class_name": "WanTransformer3DModel", **settings}


def _whole_model(options: ExportOptions) -> Any:
    """The generator in fp32, since LoRA added to bf16 weights would be rounded away."""
    from opens2v.weights.open import load_trained_model

    return load_trained_model(
        Path(options.checkpoint), config_path=options.config_path, base=options.generator_ckpt, use_ema=options.use_ema
    )[0]


@command
def main(argv: list[str] | None = None) -> list[Path]:
    options = load_config(ExportOptions, argv=argv, description=__doc__)
    if not options.checkpoint:
        raise UserError("--checkpoint is needed: a run folder, one of its checkpoints, or a model.pt")
    if not options.output:
        raise UserError("--output is needed: the folder that receives the files")
    written = export(options)
    for path in written:
        print(path)
    return written


if __name__ == "__main__":
    main()
