"""From settings to the parts of a run: the network, the codec of the latents, a model to draw with."""

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit.config import Config
from dit.data.images import unit
from dit.model import DiTModel
from dit.modules.text import make_text_encoder
from dit.modules.vae import make_vae
from dit.objective import make_objective
from shared.config import load_saved
from shared.engine.checkpoint import find_checkpoint, load_strict, load_weights
from shared.engine.dist import DistInfo, barrier
from shared.errors import UserError, written_aside

CODEC_FILE = "autoencoder.safetensors"
CODEC_PICTURES = 2048  # training pictures that a codec is fitted on


def build_model(config: Config) -> DiTModel:
    """The network of the settings, with fresh weights."""
    options = config.model.model_dump(exclude={"pretrained_path"})
    model = DiTModel(input_size=config.latent_side, null_text=config.diffusion.null_text, **options)
    model.gradient_checkpointing = config.training.gradient_checkpointing
    return model


def fit_codec(
    codec: nn.Module, dataset: torch.utils.data.Dataset, output_dir: Path, info: DistInfo, *, seed: int
) -> None:
    """Fit a codec that learns from the training pictures, once a run folder: rank 0 fits and saves, all ranks load."""
    path = output_dir / CODEC_FILE
    if info.is_main and not path.exists():
        began = time.perf_counter()
        count = min(len(dataset), CODEC_PICTURES)
        images = unit(torch.stack([dataset.sample(index, 0, flip=False)["image"] for index in range(count)]))
        figures = codec.fit(images, seed=seed)
        with written_aside(path) as temporary:
            save_file(codec.state_dict(), temporary, metadata={"figures": json.dumps(figures)})
        print(
            f"fitted the latents' codec on {count} training pictures in {time.perf_counter() - began:.0f} s: "
            + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()),
            flush=True,
        )
    barrier()
    load_codec(codec, path)


def load_codec(codec: nn.Module, path: Path) -> None:
    """Load what fit_codec saved."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file; it is written by training beside the checkpoints; copy it along with them"
        )
    load_strict(codec, load_file(path), what=str(path))


def saved_settings(path: Path) -> tuple[Config, Path]:
    """The settings of a run folder, one of its checkpoints or a weights file, and the folder of the weights."""
    folder = find_checkpoint(path) if path.is_dir() else path.parent
    places = [place / "config.yaml" for place in (folder, folder.parent, folder.parent.parent)]
    settings = next((place for place in places if place.is_file()), None)
    if settings is None:
        raise UserError(f"{path}: no config.yaml beside the weights; give a run folder or a checkpoint folder")
    return load_saved(Config, settings), folder


class Trained(NamedTuple):
    """A trained model with all that drawing and measuring need."""

    config: Config
    model: DiTModel
    codec: nn.Module
    text_encoder: nn.Module | None
    objective: object
    folder: Path


def load_trained(
    path: str | Path,
    *,
    device: torch.device,
    use_ema: bool = True,
    vae: str | None = None,
    text_encoder: str | None = None,
) -> Trained:
    """Model, codec and text encoder of a run or one of its checkpoints; vae, text_encoder: in place of saved names."""
    path = Path(path)
    config, folder = saved_settings(path)
    for flag, name, section, kind in (
        ("vae", vae, config.vae, "sd"),
        ("text-encoder", text_encoder, config.text, "clip"),
    ):
        if name is not None and section.type != kind:
            raise UserError(f"--{flag} {name}: this run's is of type {section.type}, which has no weights to replace")
        section.pretrained_model_name = name or section.pretrained_model_name
    model = build_model(config)
    load_strict(model, load_weights(path if path.is_file() else folder, prefer_ema=use_ema), what=str(path))
    codec = make_vae(config)
    if hasattr(codec, "fit"):
        places = [folder / CODEC_FILE, folder.parent / CODEC_FILE, folder.parent.parent / CODEC_FILE]
        load_codec(codec, next((place for place in places if place.exists()), places[0]))
    encoder = make_text_encoder(config)
    objective = make_objective(
        config.diffusion, config.flow, learn_sigma=config.model.learn_sigma, latent_size=config.latent_size
    )
    return Trained(
        config,
        model.to(device).eval(),
        codec.to(device).eval(),
        None if encoder is None else encoder.to(device),
        objective,
        folder,
    )


def condition_of(
    texts: list[str], labels: Tensor | None, encoder: nn.Module | None, device: torch.device
) -> dict[str, Tensor]:
    """The keyword arguments of the model that carry captions or labels."""
    if encoder is None:
        return {} if labels is None else {"labels": labels.to(device)}
    states, mask, pooled = (part.to(device) for part in encoder.encode(texts))
    return {"text_embeddings": states.clone(), "text_mask": mask.clone(), "text_pooled": pooled.clone()}
