"""Reading and writing folders of released form: llm_config, vit_config, ae.safetensors, ema.safetensors, tokenizer."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bagel.config import AutoencoderConfig, LanguageConfig, ModelConfig, VisionConfig
from bagel.model import Bagel, PositionTable
from bagel.modules.lora import add_adapters
from bagel.modules.quantization import QuantizedLinear, quantize_projections
from bagel.modules.transformer import RMSNorm
from bagel.modules.vision import Autoencoder, FluxAutoencoder, build_autoencoder, linear_patch_embedding
from shared.engine.checkpoint import load_strict
from shared.errors import UserError

WEIGHTS = ("ema.safetensors", "model.safetensors")
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")


def read_config(config: ModelConfig) -> ModelConfig:
    """The settings with the sizes of model_path in place of the sections; the settings themselves without a model_path.

    Raises FileNotFoundError for a missing file, a UserError for one that does not make sense.
    """
    if config.model_path is None:
        return config
    folder = Path(config.model_path)
    if not folder.is_dir():
        raise UserError(
            f"--model-path {folder}: no such folder; give one with llm_config.json, vit_config.json, ae.safetensors "
            f"and ema.safetensors"
        )
    language = _section(LanguageConfig, _read_json(folder / "llm_config.json"), folder / "llm_config.json")
    vision = {"num_hidden_layers": 27, **_read_json(folder / "vit_config.json")}
    vision = _section(VisionConfig, vision, folder / "vit_config.json")
    running = vision.num_hidden_layers - 1  # features of the second-last layer
    if running < 1:
        raise UserError(f"{folder / 'vit_config.json'}: num_hidden_layers must be 2 or more, for the last does not run")
    changes: dict[str, Any] = {
        "language": language,
        "vision": vision.model_copy(update={"num_hidden_layers": running}),
    }
    extra = folder / "bagel_config.json"  # written by export_folder; the released folder has none
    if extra.is_file():
        saved = {name: value for name, value in _read_json(extra).items() if value is not None}
        own = _section(ModelConfig, saved, extra)
        changes |= {name: own[name] for name in {*saved, "autoencoder"} if name in ModelConfig.model_fields}
    else:
        changes["autoencoder"] = _autoencoder_sizes(folder / "ae.safetensors", config.autoencoder)
    if changes["autoencoder"].kind == "flux" and not (folder / "ae.safetensors").is_file():
        raise FileNotFoundError(2, "missing in the model folder", str(folder / "ae.safetensors"))
    if not config.from_scratch:
        _weights_file(folder)
    return config.model_copy(update=changes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(2, "missing in the model folder", str(path)) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def _section(kind: type, values: dict[str, Any], path: Path) -> Any:
    try:
        return kind(**{name: values[name] for name in kind.model_fields if name in values})
    except ValueError as error:
        reasons = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{path}: {reasons}") from None


def _autoencoder_sizes(path: Path, default: AutoencoderConfig) -> AutoencoderConfig:
    """Sizes of a FLUX autoencoder from the shapes in its file."""
    shapes = {name: shape for name, shape in _shapes(path).items() if name.startswith("encoder.")}
    try:
        ch = shapes["encoder.conv_in.weight"][0]
        levels = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"encoder\.down\.(\d+)\.", name)))
        blocks = 1 + max(
            int(found[1]) for name in shapes if (found := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))
        )
        factors = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // ch for level in range(levels)]
        channels = shapes["encoder.conv_out.weight"][0] // 2
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a FLUX autoencoder, {error} is missing") from None
    return AutoencoderConfig(
        kind="flux",
        ch=ch,
        ch_mult=factors,
        num_res_blocks=blocks,
        z_channels=channels,
        downsample=2 ** (levels - 1),
        scale_factor=default.scale_factor,
        shift_factor=default.shift_factor,
    )


def _shapes(path: Path) -> dict[str, list[int]]:
    with _open(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(2, "missing in the model folder", str(path))
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own error type; all mean a damaged file
        raise UserError(f"{path}: not a complete safetensors file ({error}); copy it again") from None


def build_model(config: ModelConfig, *, rows: int = 0, dtype: torch.dtype | None = None) -> Bagel:
    """The model on the CPU, with released or random weights, frozen and adapted as the settings say.

    config: as read_config returns it. rows: least rows of the embedding (the tokenizer's ids). dtype: of frozen weights
    when adapters are trained; all that trains is fp32.
    """
    if config.model_path is None and not config.from_scratch:
        raise UserError("no weights: give --model-path FOLDER, or --from-scratch to start from random weights")
    with torch.device("meta"):
        model = Bagel(config)
    if config.use_lora and dtype is not None:
        model.to(dtype)
    if config.quantization != "none":
        quantize_projections(model, config.quantization)
    model.to_empty(device="cpu")
    for table in (module for module in model.modules() if isinstance(module, PositionTable)):
        table.pos_embed.data = table.pos_embed.data.float()
        table.reset()
    if config.from_scratch:
        _random(model)
    else:
        load_released(model, _weights_file(Path(config.model_path)))
    model.language_model.resize_vocabulary(rows)
    model.freeze()
    if config.use_lora:
        add_adapters(model, config)
    return model


def _random(model: Bagel) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, QuantizedLinear):
            module.store(torch.randn(module.out_features, module.in_features) * model.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.initialize()


def _weights_file(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(2, "missing in the model folder", str(folder / WEIGHTS[0]))


def load_released(model: Bagel, path: Path) -> None:
    """Copy weights one by one, so that no second copy of the model is held; names and shapes must fit.

    The two position tables are left out. Where no generation expert is in the file it starts as a copy of the other,
    when the settings allow. A convolution for patches becomes its linear form. Quantized layers are filled as they are
    read.
    """
    targets = dict(model.named_parameters())
    quantized = {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    loaded, faults = set(), []
    with _open(path) as file, torch.no_grad():
        for name in file.keys():
            if name in TABLES:
                continue
            value = file.get_tensor(name)
            if name.endswith("patch_embedding.weight") and value.ndim == 4:
                value = linear_patch_embedding(value)
            wanted = _shape(targets.get(name), quantized.get(name))
            if wanted is None:
                faults.append(f"{name} is not in this model")
            elif tuple(value.shape) != wanted:
                faults.append(f"{name} has shape {tuple(value.shape)}, expected {wanted}")
            else:
                quantized[name].store(value) if name in quantized else targets[name].copy_(value)
                loaded.add(name)
    missing = {*targets, *quantized} - loaded - set(TABLES)
    experts = {name for name in missing if "_moe_gen" in name}
    copied = (
        bool(experts)
        and model.config.copy_init_moe
        and not quantized
        and not any("_moe_gen" in name for name in loaded)
    )
    if missing - (experts if copied else set()):
        faults += [f"{name} is missing in the file" for name in sorted(missing - (experts if copied else set()))]
    if faults:
        raise UserError(
            f"{path} does not fit the model, {len(faults)} faults: {'; '.join(faults[:6])}"
            f"{'; ...' if len(faults) > 6 else ''}"
        )
    if copied:
        model.language_model.copy_experts()


def _shape(parameter: nn.Parameter | None, quantized: QuantizedLinear | None) -> tuple[int, ...] | None:
    if quantized is not None:
        return (quantized.out_features, quantized.in_features)
    return None if parameter is None else tuple(parameter.shape)


def load_autoencoder(config: ModelConfig) -> Autoencoder:
    """The frozen autoencoder; the released kind needs ae.safetensors in model_path."""
    autoencoder = build_autoencoder(config.autoencoder)
    if isinstance(autoencoder, FluxAutoencoder):
        if config.model_path is None:
            raise UserError(
                "the FLUX autoencoder needs weights: give --model-path with ae.safetensors, or use "
                "--set model.autoencoder.kind=pixel"
            )
        path = Path(config.model_path) / "ae.safetensors"
        with _open(path) as file:
            load_strict(autoencoder, {name: file.get_tensor(name) for name in file.keys()}, what=str(path))
    return autoencoder


def export_folder(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    autoencoder: Autoencoder,
    tokenizer_files: Iterable[Path] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder of released form that --model-path takes, aside and renamed.

    bagel_config.json beside it holds what the released form has no place for.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    language = {
        **config.language.model_dump(),
        "qk_norm": True,
        "layer_module": "Qwen2MoTDecoderLayer",
        "tie_word_embeddings": False,
    }
    language["vocab_size"] = weights["language_model.lm_head.weight"].shape[0]
    vision = {**config.vision.model_dump(), "num_hidden_layers": config.vision.num_hidden_layers + 1}
    own = {name: config[name] for name in ("latent_patch_size", "max_latent_size", "interpolate_pos", "timestep_shift")}
    own["tokenizer"] = config.tokenizer if config.tokenizer == "bytes" else None
    own["autoencoder"] = config.autoencoder.model_dump()
    for name, values in (("llm_config", language), ("vit_config", vision), ("bagel_config", own)):
        (aside / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    save_file({name: value.to(dtype).contiguous() for name, value in weights.items()}, aside / "ema.safetensors")
    save_file({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, aside / "ae.safetensors")
    for path in tokenizer_files:
        shutil.copy(path, aside / path.name)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
