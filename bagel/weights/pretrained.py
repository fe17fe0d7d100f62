"""Folders of released form (llm_config, vit_config, ae.safetensors, ema.safetensors, tokenizer) in and out, and a start
from a plain Qwen2.5 with a SigLIP tower.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bagel.config import AutoencoderConfig, LanguageConfig, ModelConfig, VisionConfig
from bagel.model import Bagel, PositionTable, sincos_table
from bagel.modules.lora import add_adapters
from bagel.modules.quantization import QuantizedLinear, quantize_projections
from bagel.modules.transformer import MoTAttention, RMSNorm
from bagel.modules.vision import (
    Autoencoder,
    ConvAutoencoder,
    PixelAutoencoder,
    build_autoencoder,
    linear_patch_embedding,
)
from shared.config import Section
from shared.engine.checkpoint import StoredTensors, load_strict
from shared.errors import UserError

WEIGHTS = ("ema.safetensors", "model.safetensors")  # whole, or with an index of shards beside them
# A weight file holds each of these parts whole or not at all; what of a plain language model is missing starts anew.
PARTS = {
    "query and key norms": r".*\.self_attn\.[qk]_norm\.weight",
    "generation expert": r".*_moe_gen.*",
    "vision tower": r"vit_model\..*",
    "connector": r"connector\..*",
    "time embedder and latent heads": r"(time_embedder|vae2llm|llm2vae)\..*",
}
AUTOENCODER = "autoencoder.safetensors"  # the convolutional one, in the folder of the run that trained it
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")


def read_config(config: ModelConfig) -> ModelConfig:
    """The settings with the sizes of model_path in place of the sections; the settings themselves without a model_path.

    Raises FileNotFoundError for a missing file, a UserError for one that does not make sense.
    """
    if config.model_path is None:
        return config if config.llm_path is None else _plain_config(config)
    folder = Path(config.model_path)
    if not (config.model_path.strip() and folder.is_dir()):
        raise UserError(
            f"--model-path {config.model_path!r}: no such folder; give one with llm_config.json, vit_config.json, "
            "ae.safetensors and ema.safetensors"
        )
    language = _section(LanguageConfig, _read_json(folder / "llm_config.json"), folder / "llm_config.json")
    vision = _vision(_read_json(folder / "vit_config.json"), folder / "vit_config.json")
    changes: dict[str, Any] = {"language": language, "vision": vision}
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
        weight_files(folder)
    return config.model_copy(update=changes)


def _plain_config(config: ModelConfig) -> ModelConfig:
    """Sizes of a Qwen2.5 folder, a SigLIP folder and a FLUX autoencoder."""
    if config.vae_path is None:
        raise UserError("--llm-path starts from a plain language model, which needs --vae-path ae.safetensors as well")
    assert config.llm_path is not None  # the caller asked
    path = Path(config.llm_path) / "config.json"
    changes: dict[str, Any] = {"language": _section(LanguageConfig, _read_json(path), path)}
    if config.vit_path is not None:
        path = Path(config.vit_path) / "config.json"
        values = _read_json(path)
        changes["vision"] = _vision(values.get("vision_config", values), path)
    changes["autoencoder"] = _autoencoder_sizes(Path(config.vae_path), config.autoencoder)
    for folder in filter(None, (config.llm_path, config.vit_path)):
        weight_files(Path(folder))
    return config.model_copy(update=changes)


def _vision(values: dict[str, Any], path: Path) -> VisionConfig:
    """SigLIP's sizes; the last of its layers does not run, for the features are those of the second-last."""
    vision = _section(VisionConfig, {"num_hidden_layers": 27, **values}, path)
    if vision.num_hidden_layers < 2:
        raise UserError(f"{path}: num_hidden_layers must be 2 or more, for the last does not run")
    return vision.model_copy(update={"num_hidden_layers": vision.num_hidden_layers - 1})


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


S = TypeVar("S", bound=Section)


def _section(kind: type[S], values: dict[str, Any], path: Path) -> S:
    try:
        return kind(**{name: values[name] for name in kind.model_fields if name in values})
    except ValidationError as error:
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
    if config.model_path is None and config.llm_path is None and not config.from_scratch:
        raise UserError(
            "no weights: give --model-path FOLDER, --llm-path FOLDER of a plain Qwen2.5, or --from-scratch to start "
            "from random weights"
        )
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
        folders = [config.model_path] if config.model_path else [config.llm_path, config.vit_path]
        load_released(model, [file for folder in folders if folder for file in weight_files(Path(folder))])
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
            spread = model.config.initializer_range or 0.02
            module.store(torch.randn(module.out_features, module.in_features) * spread)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.initialize()


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights: one, or the shards of an index."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index}: expected 'weight_map', which names the file of every weight")
            files = [folder / shard for shard in sorted(set(shards.values()))]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(2, "missing in the model folder", str(file))
            return files
    raise FileNotFoundError(2, "missing in the model folder", str(folder / WEIGHTS[0]))


def fitting_preset(folder: Path, world: int) -> tuple[str, str]:
    """(preset, why) for the weights in a folder of released form and this machine: the one that trains most of what
    fits. Full training needs 20 bytes a value over all ranks (weights, gradients, moments, average), adapters 2 a
    value, adapters on 4 bits 0.75, and activations, which grow with width and depth. UserError: nothing fits.
    """
    language = _section(LanguageConfig, _read_json(folder / "llm_config.json"), folder / "llm_config.json")
    count = count_weights(folder)
    size = language.hidden_size * language.num_hidden_layers / (3584 * 28)
    needs = {  # bytes a rank, activations as the dry run measures them for the 7B
        "7b": 20 * count / world + 35e9 * size,
        "7b_lora": 2 * count + 7e9 * size,
        "7b_nf4": 0.75 * count + 5e9 * size,
    }
    memory, where = _memory()
    for preset, need in needs.items():
        if need <= memory:
            larger = list(needs)[: list(needs).index(preset)]
            refused = "".join(f"; {name} would need {needs[name] / 1e9:.0f} GB" for name in larger)
            return preset, (
                f"{count:,} values, {world} rank(s) with {memory / 1e9:.0f} GB of {where}: preset {preset} takes about "
                f"{need / 1e9:.1f} GB a rank{refused}"
            )
    raise UserError(
        f"--model-path {folder}: {count:,} values do not fit {memory / 1e9:.0f} GB of {where}: the smallest preset, "
        f"7b_nf4, needs about {needs['7b_nf4'] / 1e9:.0f} GB; use a larger GPU, or choose a preset with --config"
    )


def _memory() -> tuple[float, str]:
    """Bytes that a rank may use, and of what."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), "GPU memory"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(pages), "host memory"


def count_weights(folder: Path) -> int:
    """Values in a folder's weight files, from their headers."""
    return sum(math.prod(shape) for file in weight_files(folder) for shape in _shapes(file).values())


def released_name(name: str) -> str | None:
    """The name in our model of a weight of BAGEL, of a plain Qwen2 or of SigLIP, with or without the prefix of data
    parallelism; None for what SigLIP has and BAGEL does not use.
    """
    name = name.removeprefix("module.")
    if name.startswith(("model.", "lm_head.")):
        return f"language_model.{name}"
    if name.startswith("vision_model."):
        name = f"vit_model.{name}"
    if name.startswith(("text_model.", "logit_", "vit_model.vision_model.head.")):
        return None
    return name


def open_released(config: ModelConfig, *, rows: int = 0) -> tuple[Bagel, Callable[[str], Any]] | None:
    """The model on the meta device and the reader of its parameters by name, for a start in parts: of every weight fsdp
    reads the rows alone that a rank keeps. None where more than reading is to be done, as build_model does it (weights
    that are drawn, quantized or adapted, a plain language model, further rows), or to be said, such as a wrong shape.
    """
    if config.model_path is None or config.from_scratch or config.use_lora or config.quantization != "none":
        return None
    with torch.device("meta"):
        model = Bagel(config)
    stored = StoredTensors(*weight_files(Path(config.model_path)))
    found = {name: stored[own] for own in stored.names if (name := released_name(own)) not in (None, *TABLES)}
    wanted = {name: p for name, p in model.named_parameters() if name not in TABLES}
    fits = found.keys() == wanted.keys() and all(found[name].shape == p.shape for name, p in wanted.items())
    if not fits or rows > config.language.vocab_size:
        return None
    model.freeze()
    tables: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".pos_embed")) for name in TABLES}
    made = {name: sincos_table(t.pos_embed.shape[1], t.side).float() for name, t in tables.items()}
    return model, {**found, **made}.__getitem__


def load_released(model: Bagel, files: Sequence[Path]) -> None:
    """Copy weights one by one, so that no second copy of the model is held; names and shapes must fit.

    The two position tables are left out. A convolution for patches becomes its linear form. Quantized layers are filled
    as they are read. Files without any weight of BAGEL's own are a plain language model: query and key norms stay one,
    the generation expert starts as a copy of the other, and what else is missing as a whole is drawn, which is said.
    """
    targets = dict(model.named_parameters())
    quantized = {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    loaded: set[str] = set()
    faults: list[str] = []
    layers = len(model.vit_model.vision_model.encoder.layers)
    with torch.no_grad():
        for path in files:
            with _open(path) as file:
                for stored in file.keys():
                    name = released_name(stored)
                    unused = re.match(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.", name or "")
                    if name is None or name in TABLES or (unused and int(unused[1]) >= layers and stored != name):
                        continue
                    value = file.get_tensor(stored)
                    if name.endswith("patch_embedding.weight") and value.ndim == 4:
                        value = linear_patch_embedding(value)
                    wanted = _shape(targets.get(name), quantized.get(name))
                    if wanted is None:
                        faults.append(f"{stored} is not in this model")
                    elif tuple(value.shape) != wanted:
                        faults.append(f"{stored} has shape {tuple(value.shape)}, expected {wanted}")
                    else:
                        quantized[name].store(value) if name in quantized else targets[name].copy_(value)
                        loaded.add(name)
    where = files[0] if len(files) == 1 else files[0].parent
    _complete(model, {*targets, *quantized} - set(TABLES), loaded, faults, str(where))


def _complete(model: Bagel, wanted: set[str], loaded: set[str], faults: list[str], where: str) -> None:
    """Start anew what a plain language model lacks; refuse everything else that is missing."""
    missing, quantized = wanted - loaded, model.config.quantization != "none"
    heads = [name for name in loaded if re.fullmatch(PARTS["time embedder and latent heads"], name)]
    is_plain = not heads and model.config.copy_init_moe and not quantized
    absent = []
    for part, pattern in PARTS.items():
        names = {name for name in wanted if re.fullmatch(pattern, name)}
        copied = part == "generation expert" and model.config.copy_init_moe and not quantized
        if names and names <= missing and (is_plain or copied):
            absent.append(part)
            missing -= names
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if is_plain and head in missing and embedding in loaded:  # a small Qwen2.5 ties the two
        model.language_model.lm_head.weight.data.copy_(model.language_model.model.embed_tokens.weight)
        missing.discard(head)
    faults += [f"{name} is missing in the file" for name in sorted(missing)]
    if faults:
        raise UserError(
            f"{where} does not fit the model, {len(faults)} faults: {'; '.join(faults[:6])}"
            f"{'; ...' if len(faults) > 6 else ''}"
        )
    drawn = [part for part in absent if part not in ("generation expert", "query and key norms")]
    for name in ("vit_model", "connector", "time_embedder", "vae2llm", "llm2vae"):
        if any(re.fullmatch(PARTS[part], f"{name}.x") for part in drawn):
            model.initialize(only=f"{name}.")
    if "query and key norms" in absent:
        for module in model.modules():
            if isinstance(module, MoTAttention):
                for norm in (module.q_norm, module.k_norm, module.q_norm_moe_gen, module.k_norm_moe_gen):
                    nn.init.ones_(norm.weight)
    if "generation expert" in absent:
        model.language_model.copy_experts()
    if drawn:
        print(f"{where}: a plain language model: {' and '.join(drawn)} start from random weights", flush=True)


def _shape(parameter: nn.Parameter | None, quantized: QuantizedLinear | None) -> tuple[int, ...] | None:
    if quantized is not None:
        return (quantized.out_features, quantized.in_features)
    return None if parameter is None else tuple(parameter.shape)


def load_autoencoder(config: ModelConfig, run: Path | None = None) -> Autoencoder:
    """The frozen autoencoder, from ae.safetensors of model_path or vae_path; the convolutional one of a run from its
    output folder `run`.
    """
    autoencoder = build_autoencoder(config.autoencoder)
    if isinstance(autoencoder, PixelAutoencoder):
        return autoencoder
    if config.model_path is not None:
        path = Path(config.model_path) / "ae.safetensors"
    elif config.vae_path is not None:
        path = Path(config.vae_path)
    elif isinstance(autoencoder, ConvAutoencoder) and run is not None:
        path = run / AUTOENCODER
    else:
        raise UserError(
            "the FLUX autoencoder needs weights: give --model-path with ae.safetensors, or use "
            "--set model.autoencoder.kind=pixel"
        )
    with _open(path) as file:
        load_strict(autoencoder, {name: file.get_tensor(name) for name in file.keys()}, what=str(path))
    return autoencoder


def _save_weights(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, shard_bytes: int | None) -> None:
    """ema.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json."""
    shards: list[list[str]] = [[]]
    size, width = 0, torch.empty((), dtype=dtype).element_size()
    for name, value in weights.items():
        if shard_bytes and shards[-1] and size + value.numel() * width > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.numel() * width
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shard_bytes else WEIGHTS[0]
        save_file({name: weights[name].to(dtype).contiguous() for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if shard_bytes:
        total = sum(value.numel() for value in weights.values()) * width
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{WEIGHTS[1]}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def export_folder(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    autoencoder: Autoencoder,
    tokenizer_files: Iterable[Path] = (),
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
) -> None:
    """Write a folder of released form that --model-path takes, aside and renamed.

    bagel_config.json beside it holds what the released form has no place for. shard_bytes: cut the weights into files
    of at most this size, with an index; None: one file.
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
    _save_weights(aside, {name: value.detach() for name, value in weights.items()}, dtype, shard_bytes)
    save_file({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, aside / "ae.safetensors")
    for path in tokenizer_files:
        shutil.copy(path, aside / path.name)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
