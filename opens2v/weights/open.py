"""A trained generator from what a user names: a run folder, a checkpoint folder, or the guide's model.pt."""

from pathlib import Path

import torch
from torch import nn

from opens2v.config import Config
from opens2v.model import RefWanTransformer3DModel
from opens2v.modules.conditions import Encoders, load_encoders
from opens2v.weights.base import base_path, load_generator
from opens2v.weights.export import load_trained, read_trained
from shared.config import load_saved
from shared.engine.checkpoint import open_run
from shared.engine.strategy import choose_precision
from shared.errors import UserError


def settings_of(checkpoint: Path, config_path: str | None = None) -> tuple[Config, Path]:
    """(settings, weights to load). The settings lie in the checkpoint, beside model.pt, or in the run folder."""
    if not checkpoint.exists():
        raise UserError(
            f"--checkpoint {checkpoint}: not found; give a run folder, one of its checkpoints, or a model.pt"
        )
    weights = checkpoint if checkpoint.is_file() else open_run(checkpoint)
    folder = weights.parent if weights.is_file() else weights
    for candidate in (
        config_path,
        folder / "config.yaml",
        folder.parent / "config.yaml",
        folder.parent.parent / "config.yaml",
    ):
        if candidate is not None and Path(candidate).exists():
            return load_saved(Config, Path(candidate)), weights
    raise UserError(f"--checkpoint {checkpoint}: no config.yaml beside it; give --config-path of the run")


def load_trained_model(
    checkpoint: Path,
    *,
    config_path: str | None = None,
    base: str | None = None,
    use_ema: bool = True,
    precision: str = "fp32",
) -> tuple[RefWanTransformer3DModel, Config, Path, Path]:
    """The generator with its trained parts, the settings, the weights that were read, and where the base lies.

    base: other base weights than those of the run, for a folder that was moved. precision: "fp32" (a bf16 base is then
    held in fp32), or "bf16".
    """
    config, weights = settings_of(checkpoint, config_path)
    if base is None and not base_path(config).exists():
        for folder in (weights.parent, *weights.parents):  # a small run that was moved carries its base along
            if (folder / "base" / "generator.safetensors").exists():
                base = str(folder / "base" / "generator.safetensors")
                break
    if base is not None:
        config.model.generator_ckpt = base
    path = base_path(config)
    if not path.exists():
        raise UserError(f"base weights {path}: not found; give them with --generator-ckpt")
    model, _ = load_generator(config, path, precision=precision)
    load_trained(model, read_trained(weights, use_ema=use_ema), str(weights))
    return model.eval().requires_grad_(False), config, weights, path


def load_trained_generator(
    checkpoint: str | Path,
    *,
    config_path: str | None = None,
    base: str | None = None,
    use_ema: bool = True,
    device: torch.device | str = "cpu",
    precision: str | None = None,
    offload: bool = False,
) -> tuple[RefWanTransformer3DModel, Encoders, Config, Path]:
    """The generator with its trained parts in eval mode, the encoders, the settings, and the weights that were read.

    base: see load_trained_model. precision: of the arithmetic that the model is called in, "fp32", or "bf16" under
    autocast; None: see precision_of. offload: the text encoder stays on the CPU.
    """
    device = torch.device(device)
    chosen = precision_of(settings_of(Path(checkpoint), config_path)[0], precision, device)
    model, config, weights, path = load_trained_model(
        Path(checkpoint), config_path=config_path, base=base, use_ema=use_ema, precision=chosen
    )
    if offload:  # before it is loaded: on a small card there is no room to move it through
        config.model.text_encoder_cpu_offload = True
    # Prompts are new, so the text encoder is needed whatever the run had cached.
    encoders = load_encoders(config, path if path.is_dir() else path.parent, kinds=("text", "clip"))
    encoders.stored = None
    nn.Module.to(model, device)
    return model, encoders.to(device), config, weights


def precision_of(config: Config, wanted: str | None, device: torch.device) -> str:
    """The arithmetic of a finished run: as wished, else bf16 where its base lies in bf16 and the device has it."""
    if wanted is not None:
        return wanted
    return "fp32" if config.model.base_dtype == "fp32" else choose_precision(None, device)
