"""The first phase of a run with vae.type conv: the latents' autoencoder, trained into OUT/autoencoder, then frozen.

The same loop as the transformer's, so it logs, resumes and runs on several ranks in the same way.
Shapes: B batch, C channels, H W of a picture, h w of a latent.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit.config import Config
from dit.dataset import collate, unit
from dit.evaluation.held_out import readable
from dit.modules.autoencoder import ConvAutoencoder
from dit.modules.vae import CODEC_FILE, Codec
from dit.sampling.drawing import grid, to_uint8
from dit.weights.open import fit_codec
from shared.config import accumulation_steps
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import load_strict, load_weights
from shared.engine.dist import DistInfo
from shared.errors import UserError
from shared.loop import fit
from shared.rng import keyed_rand, keyed_randn, seed_everything

PHASE = "autoencoder"  # folder within the run's output
NOISE, SPREAD, WEIGHTS = 51, 52, 53  # random streams
LARGEST_NOISE = 0.3  # of the latents' own spread
EDGES, SIZE = 0.2, 1e-4  # weights of the edges' absolute error and of the latents' squared size
LEARNING_RATE, BATCH = 3e-3, 16
SHOWN = 8


def prepare_codec(config: Config, codec: Codec, training_set: Any, validation_set: Any, info: DistInfo) -> None:
    """Have a codec that is learned from the pictures ready: train it where it needs steps, fit it, load it."""
    output_dir = Path(config.run.output_dir)
    if not codec.learns:
        return
    if isinstance(codec, ConvAutoencoder) and not (output_dir / CODEC_FILE).exists():
        train_autoencoder(config, codec, training_set, validation_set, info)
    fit_codec(codec, training_set, output_dir, info, seed=config.run.seed)


def train_autoencoder(
    config: Config, codec: ConvAutoencoder, training_set: Any, validation_set: Any, info: DistInfo
) -> None:
    """Train `codec` to its planned step, resuming what is in OUT/autoencoder; its averaged weights are loaded into it.

    Raises UserError when the run was stopped before; the same command goes on from there.
    """
    phase = phase_config(config, info.world)
    output_dir = Path(config.run.output_dir) / PHASE
    if info.is_main:
        print(f"the autoencoder of the latents is trained first, into {output_dir}", flush=True)
    seed_everything(config.run.seed, WEIGHTS)
    network = ConvAutoencoder(channels=codec.channels, factor=codec.factor, width=config.vae.width)
    order = BatchPlan(
        len(training_set), phase.training.batch_size, info.world, accumulation_steps(phase.training, info.world),
        config.run.seed, drop_last=False,
    )  # fmt: skip
    stream = MapStream(
        training_set, order, info, collate=collate, num_workers=config.training.num_workers,
        prefetch_factor=config.training.prefetch_factor, bad_samples=output_dir / "bad_samples.jsonl",
    )  # fmt: skip
    samples = readable(validation_set if len(validation_set) else training_set, 64)
    shown = unit(torch.stack([sample["image"] for sample in samples])).to(info.device)

    def losses(model: Callable, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        for batch in batches:
            images = unit(batch["image"].to(info.device))
            draws = {"slots": batch["slot"], "device": images.device}
            latent = (codec.channels, images.shape[2] // codec.factor, images.shape[3] // codec.factor)
            noise = keyed_randn(latent, key=(config.run.seed, NOISE, step), **draws)
            spread_B = LARGEST_NOISE * keyed_rand((), key=(config.run.seed, SPREAD, step), **draws)
            decoded, latents = model(images, noise, spread_B)
            loss = reconstruction_loss(decoded.float(), images) + SIZE * latents.float().square().mean()
            yield loss / len(batches), {}

    def decoded(model: Callable) -> Tensor:
        latent = (codec.channels, shown.shape[2] // codec.factor, shown.shape[3] // codec.factor)
        nothing = torch.zeros(len(shown), *latent, device=info.device)
        return model(shown, nothing, torch.zeros(len(shown), device=info.device))[0].float().clamp(-1, 1)

    def validate(model: Callable, step: int) -> dict[str, float]:
        found = decoded(model)
        psnr = 10 * torch.log10(4 / (found - shown).square().mean())
        return {"loss": reconstruction_loss(found, shown).item(), "psnr": psnr.item()}

    def sample(model: Callable, step: int, folder: Path) -> None:
        made = to_uint8(decoded(model)[:SHOWN])
        if info.is_main:
            pictures = np.concatenate([to_uint8(shown[:SHOWN]), made])
            grid(pictures, columns=SHOWN, enlarge=2).save(folder / f"step_{step:08d}.png")

    result = fit(
        config=phase, info=info, model=network, stream=stream, losses=losses, validate=validate, sample=sample,
        output_dir=output_dir, title="autoencoder of the latents", wrap_classes=(nn.Sequential,),
    )  # fmt: skip
    if not result.finished:
        raise UserError(
            f"the autoencoder was stopped at step {result.step} of {phase.training.total_steps}; the same command "
            "goes on from there"
        )
    load_strict(codec, load_weights(result.checkpoint or output_dir), what=str(output_dir))


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Squared error, and a little of the absolute error of the differences between neighbours, which keeps edges."""
    edges = [(decoded.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (2, 3)]
    return (decoded - images).square().mean() + EDGES * sum(edges)


def phase_config(config: Config, world: int) -> Config:
    """The run's settings with the loop of this phase."""
    batch_size = max(1, BATCH // world)
    training = config.training.model_copy(
        update=dict(
            total_steps=config.vae.steps, max_steps=config.training.max_steps, batch_size=batch_size,
            global_batch_size=None, gradient_accumulation_steps=1, learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine", warmup_steps=50, min_lr_ratio=0.02, weight_decay=0.0, adam_beta2=0.99,
            max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True, eval_steps=None, sample_steps=None, save_steps=500,
            save_every_n_epochs=None, early_stopping_patience=None, compile=False, save=True,
        )
    )  # fmt: skip
    resume = "none" if config.run.resume == "none" else "auto"  # a path means the transformer's checkpoint
    return config.model_copy(update={"training": training, "run": config.run.model_copy(update={"resume": resume})})
