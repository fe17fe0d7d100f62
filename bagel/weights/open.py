"""Finished runs and folders of released form, opened for inference; and what a run leaves at its end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagel.config import Config, DataConfig, ModelConfig
from bagel.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_folder
from bagel.dataset import transforms_of
from bagel.inferencer import InterleaveInferencer
from bagel.model import Bagel
from bagel.modules.lora import adapters, merge_adapters
from bagel.modules.vision import Autoencoder
from bagel.weights.pretrained import AUTOENCODER, build_model, export_folder, load_autoencoder, read_config
from shared.config import load_saved
from shared.engine.checkpoint import load_weights, open_run
from shared.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass
class Opened:
    """A model ready for inference."""

    config: Config | None  # of the run; None for a folder of released form
    model_config: ModelConfig
    model: Bagel
    autoencoder: Autoencoder
    tokenizer: Tokenizer
    data: DataConfig
    source: Path

    def inferencer(self, **settings: Any) -> InterleaveInferencer:
        vae, vit, edit = transforms_of(self.data, self.model_config)
        return InterleaveInferencer(
            self.model,
            self.autoencoder,
            self.tokenizer,
            vae,
            vit,
            self.tokenizer.special,
            edit_vit_transform=edit,
            **settings,
        )


def open_model(
    path: str,
    *,
    model_path: str | None = None,
    prefer_ema: bool = True,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    whole_base: bool = False,
    merge: bool = True,
) -> Opened:
    """A run's folder, one of its checkpoints, or a folder of released form.

    model_path: where the base of a run lies now, if it has moved. Adapters are merged, unless the base is quantized or
    `merge` is off. whole_base: take the base's full weights, also where training kept it in few bits.
    """
    source = Path(path)
    if not source.exists():
        raise UserError(
            f"--checkpoint {source}: no such folder; give a run's output folder, a checkpoint or a model folder"
        )
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise UserError(f"--device {device}: not a device; use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs; use --device cpu")
    if (source / "llm_config.json").is_file():
        model_config = read_config(ModelConfig(model_path=str(source)))
        tokenizer = load_tokenizer(model_config)
        model, config, data = build_model(model_config, rows=tokenizer.vocab_size), None, _data_of(model_config)
    else:
        checkpoint = source if source.is_file() else open_run(source)
        config = _config_of(checkpoint)
        if model_path:
            config.model.model_path = model_path
        if whole_base:
            config.model.quantization = "none"
        model_config, data = read_config(config.model), config.data
        tokenizer = load_tokenizer(model_config)
        # in the precision of the training, unless more is wanted: adapters may be smaller than what bf16 can add
        half = config.run.precision == "bf16" and dtype != torch.float32
        model = build_model(model_config, rows=tokenizer.vocab_size, dtype=torch.bfloat16 if half else None)
        _put(model, load_weights(checkpoint, prefer_ema=prefer_ema), checkpoint)
        if merge and adapters(model) and model_config.quantization == "none":
            merge_adapters(model)
    model = model.to(chosen, dtype) if dtype is not None else model.to(chosen)
    autoencoder = load_autoencoder(model_config, None if config is None else _run_of(checkpoint)).to(chosen)
    return Opened(config, model_config, model.eval().requires_grad_(False), autoencoder, tokenizer, data, source)


def _run_of(checkpoint: Path) -> Path:
    """The output folder that a checkpoint belongs to."""
    folders = [folder for folder in (checkpoint, *checkpoint.parents) if (folder / AUTOENCODER).is_file()]
    return folders[0] if folders else checkpoint


def _config_of(checkpoint: Path) -> Config:
    for folder in (checkpoint if checkpoint.is_dir() else checkpoint.parent, *checkpoint.parents):
        if (folder / "config.yaml").is_file():
            return load_saved(Config, folder / "config.yaml")
    raise UserError(f"{checkpoint}: no config.yaml beside it or above it; give the run's output folder")


def _data_of(config: ModelConfig) -> DataConfig:
    """Picture sizes that a folder of released form was made for; small models take what their tables hold."""
    data = DataConfig()
    for sizes, most in (
        (data.vae_image, config.max_latent_size * config.latent_stride),
        (data.vit_image, config.vision.image_size),
    ):
        sizes.min_size = min(sizes.min_size, most)
        sizes.max_size = min(sizes.max_size, most)
    return data


def _put(model: Bagel, weights: dict[str, Tensor], source: Path) -> None:
    """Trained weights over the base; every trained name must be there and fit."""
    own = dict(model.named_parameters())
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    faults = [f"{name} is missing" for name in sorted(trained - set(weights))]
    faults += [f"{name} is not in this model" for name in sorted(set(weights) - set(own))]
    faults += [
        f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and own[name].shape != value.shape
    ]
    if faults:
        raise UserError(
            f"{source} does not fit the model of its settings: {'; '.join(faults[:5])}"
            f"{'; ...' if len(faults) > 5 else ''}"
        )
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def tokenizer_files(config: ModelConfig) -> list[Path]:
    """The files of the model's tokenizer; none for bytes."""
    name = config.tokenizer or config.model_path or config.llm_path
    if name is None or name == "bytes":
        return []
    folder = tokenizer_folder(name)
    return [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]


def finish(config: Config, model_config: ModelConfig) -> None:
    """At the end of a run, on rank 0: the folder that --model-path takes, in the type that was computed in. Adapters
    stay beside their base; the command that merges them is said.
    """
    output = Path(config.run.output_dir)
    if config.model.use_lora:
        print(
            f"adapters in {output}; python bagel/weights/export.py --checkpoint {output} --output DIR merges them into "
            "a folder of released form, and --form peft writes them for PEFT"
        )
    if not config.training.export or config.model.use_lora:
        return
    opened = open_model(str(output), device="cpu")
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    weights, files = opened.model.state_dict(), tokenizer_files(model_config)
    export_folder(output / "model", model_config, weights, opened.autoencoder, files, dtype=dtype)
    print(f"wrote {output / 'model'}, a folder that --model-path and --checkpoint take")
