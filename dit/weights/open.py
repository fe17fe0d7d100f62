"""From settings to the parts of a run: the network, the codec of the latents, a model to draw with."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit.config import Config, DrawOptions
from dit.data.cache import file_digest, read_manifest
from dit.dataset import TextImageDataset, unit
from dit.model import DiTModel
from dit.modules.autoencoder import Codec, ConvAutoencoder, PatchAutoencoder
from dit.modules.prx import PRXModel
from dit.modules.text import CaptionEncoder, make_text_encoder
from dit.modules.vae import CODEC_FILE, PixelCodec, PoolCodec, VAEEncoder, scaled_latents
from dit.objective import Objective, make_objective
from dit.weights.averages import averaged_to
from shared.config import load_saved
from shared.engine.checkpoint import find_checkpoint, load_strict, load_weights, open_run
from shared.engine.dist import DistInfo, barrier
from shared.errors import UserError, written_aside

CODEC_PICTURES = 2048  # training pictures that a codec is fitted on


def build_model(config: Config) -> DiTModel | PRXModel:
    """The network of the settings, with fresh weights."""
    if config.model.type == "prx":
        prx = PRXModel(config.model, null_text=config.diffusion.null_text, time_scale=config.flow.time_scale)
        prx.gradient_checkpointing = bool(config.training.gradient_checkpointing)
        return prx
    options = config.model.model_dump(exclude={"pretrained_path", "type", "bottleneck_size", "resolution_embeds"})
    options["class_dropout"] = 0.0 if config.model.class_dropout == 0 else 0.1  # for the model: is there a null row?
    if config.repa.features is not None:
        repa = config.repa
        options |= {"align_width": repa.features, "align_layer": repa.layer, "align_hidden": repa.hidden}
    model = DiTModel(input_size=config.latent_side, null_text=config.diffusion.null_text, **options)
    model.gradient_checkpointing = config.training.gradient_checkpointing
    return model


def make_vae(config: Config) -> Codec:
    """The codec that the settings name. Refuses a number of channels that the model does not expect."""
    vae = config.vae
    if vae.type == "sd":
        codec: Codec = VAEEncoder(
            vae.pretrained_model_name,
            vae.use_slicing,
            use_tiling=vae.use_tiling,
            posterior=vae.posterior,
            latent_stats=vae.latent_stats,
            scaling_factor=vae.scaling_factor,
            precision=vae.vae_precision,
            local_files_only=config.text.local_files_only,
        )
    elif vae.type == "patches":
        codec = PatchAutoencoder(channels=config.model.in_channels, patch=vae.patch, decoder_steps=vae.decoder_steps)
    elif vae.type == "conv":
        codec = ConvAutoencoder(channels=config.model.in_channels, factor=vae.patch, width=vae.width)
    else:
        codec = PixelCodec() if vae.type == "pixels" else PoolCodec()
    if codec.factor != config.vae_factor:
        raise UserError(
            f"vae.pretrained_model_name {vae.pretrained_model_name}: a latent cell is {codec.factor} pixels wide, the "
            f"run was laid out for {config.vae_factor}; set --set vae.factor={codec.factor}"
        )
    if codec.channels != config.model.in_channels:
        raise UserError(
            f"vae.type {vae.type} gives latents of {codec.channels} channels, model.in_channels is "
            f"{config.model.in_channels}; "
            f"set --in-channels {codec.channels}"
        )
    return codec


class LazyVAE(Codec):
    """The VAE of a run that trains from a cache: latents follow from the cache's numbers, and the weights are opened
    when a picture is to be drawn.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: Config, numbers: dict[str, list[float]]) -> None:
        super().__init__()
        self.config, self.posterior = config, config.vae.posterior
        self.factor, self.channels = config.vae_factor, config.model.in_channels
        self.register_buffer("mean", torch.tensor(numbers["mean"]).reshape(1, -1, 1, 1))
        self.register_buffer("scale", torch.tensor(numbers["scale"]).reshape(1, -1, 1, 1))
        self._opened: Codec | None = None

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """As VAEEncoder.latents."""
        return scaled_latents(moments, noise if self.posterior == "sample" else None, self.mean, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]; UserError where the VAE cannot be opened."""
        if self._opened is None:
            self._opened = make_vae(self.config).to(latents.device).eval()
        return self._opened.decode(latents)


def cached_codec(config: Config, output_dir: Path, info: DistInfo) -> Codec:
    """The codec of a run that trains from a cache; a fitted one is taken from there into the run's folder."""
    assert config.data.cache_dir is not None
    folder = Path(config.data.cache_dir)
    if config.vae.type == "sd":
        return LazyVAE(config, read_manifest(folder)["latents"])
    codec = make_vae(config)
    if codec.learns:
        if info.is_main and not (output_dir / CODEC_FILE).exists():
            with written_aside(output_dir / CODEC_FILE) as temporary:
                shutil.copyfile(folder / CODEC_FILE, temporary)
        barrier()
        load_codec(codec, output_dir / CODEC_FILE)
    return codec


def fit_codec(codec: Codec, dataset: TextImageDataset, output_dir: Path, info: DistInfo, *, seed: int) -> None:
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


def load_codec(codec: Codec, path: Path) -> None:
    """Load what fit_codec saved."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file; it is written by training beside the checkpoints; copy it along with them"
        )
    load_strict(codec, load_weights(path), what=str(path))


def saved_settings(path: Path, find: Callable[[Path], Path] = find_checkpoint) -> tuple[Config, Path]:
    """The settings of a run folder, one of its checkpoints or a weights file, and the folder of the weights.

    find: find_checkpoint, or open_run, which says which checkpoint is taken.
    """
    folder = find(path) if path.is_dir() else path.parent
    places = [place / "config.yaml" for place in (folder, folder.parent, folder.parent.parent)]
    settings = next((place for place in places if place.is_file()), None)
    if settings is None:
        raise UserError(f"{path}: no config.yaml beside the weights; give a run folder or a checkpoint folder")
    return load_saved(Config, settings), folder


def run_of(folder: Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


class Trained(NamedTuple):
    """A trained model with all that drawing and measuring need."""

    config: Config
    model: DiTModel | PRXModel
    codec: Codec
    text_encoder: CaptionEncoder | None
    objective: Objective
    folder: Path
    name: str  # the checkpoint, and what its files hold


def _name_of(path: Path, folder: Path) -> str:
    """The checkpoint's name with the hash of its manifest, or of its file: two of one name are told by it."""
    manifest = folder / "manifest.json"
    held = file_digest(path if path.is_file() else manifest) if path.is_file() or manifest.exists() else "unknown"
    return f"{path.name if path.is_file() else folder.name} {held[:12]}"


def load_asked(options: DrawOptions, device: torch.device) -> Trained:
    """load_trained() as the settings that generate.py and metrics.py share ask for it."""
    return load_trained(
        options.checkpoint,
        device=device,
        use_ema=options.ema,
        ema_length=options.ema_length,
        vae=options.vae,
        text_encoder=options.text_encoder,
    )


def load_trained(
    path: str | Path,
    *,
    device: torch.device,
    use_ema: bool = True,
    ema_length: float | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
) -> Trained:
    """Model, codec and text encoder of a run or one of its checkpoints. ema_length: of the average of the weights, as
    a share of the run; vae, text_encoder: in place of saved names.
    """
    path = Path(path)
    config, folder = saved_settings(path, open_run)
    for flag, name, section, kind in (
        ("vae", vae, config.vae, "sd"),
        ("text-encoder", text_encoder, config.text, "clip"),
    ):
        if name is not None and section.type != kind:
            raise UserError(f"--{flag} {name}: this run's is of type {section.type}, which has no weights to replace")
        section.pretrained_model_name = name or section.pretrained_model_name
    model = build_model(config)
    weights = load_weights(path if path.is_file() else folder, prefer_ema=use_ema)
    if ema_length is not None:
        weights |= averaged_to(ema_length, folder, run_of(folder))
    load_strict(model, weights, what=str(path))
    codec = make_vae(config)
    if codec.learns:
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
        _name_of(path, folder),
    )
