"""The first phase of a run with vae.type conv: the latents' autoencoder, trained into OUT/autoencoder, then frozen.

The same loop as the transformer's, so it logs, resumes and runs on several ranks in the same way.
Shapes: B batch, C channels, H W of a picture, h w of a latent.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit.config import Config
from dit.dataset import collate, unit
from dit.evaluation.held_out import readable
from dit.modules.autoencoder import Codec, ConvAutoencoder
from dit.modules.vae import CODEC_FILE
from dit.sampling.drawing import grid, to_uint8
from dit.weights.open import fit_codec
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import load_strict, load_weights, newest_checkpoint
from shared.engine.dist import DistInfo, barrier
from shared.errors import Stopped
from shared.loop import FitResult, fit, steps_done
from shared.rng import keyed_rand, keyed_randn, seed_everything

PHASE = "autoencoder"  # folder within the run's output
NOISE, SPREAD, WEIGHTS = 51, 52, 53  # random streams
LARGEST_NOISE = 0.3  # of the latents' own spread
EDGES, SIZE = 0.2, 1e-4  # weights of the edges' absolute error and of the latents' squared size
LEARNING_RATE, BATCH = 3e-3, 16
HELD_OUT, SHOWN = 64, 8  # pictures of an evaluation, and of a sample grid


def prepare_codec(config: Config, codec: Codec, training_set: Any, validation_set: Any, info: DistInfo) -> None:
    """Have a codec that is learned from the pictures ready: train it where it needs steps, fit it, load it."""
    output_dir = Path(config.run.output_dir)
    if not codec.learns:
        return
    if config.data.buckets:
        training_set = training_set.as_squares()
    if isinstance(codec, ConvAutoencoder):
        if info.is_main:
            _drop_if_short(config, output_dir)
        barrier()
        if not (output_dir / CODEC_FILE).exists():
            train_autoencoder(config, codec, training_set, validation_set, info)
    fit_codec(codec, training_set, output_dir, info, seed=config.run.seed)


def _drop_if_short(config: Config, output_dir: Path) -> None:
    """Remove an autoencoder that an earlier --max-steps cut short, so that it is trained on: what was trained on its
    latents would not fit others, so a run with checkpoints keeps it and says so.
    """
    done, planned = steps_done(output_dir / PHASE), config.vae.codec_steps
    if not (output_dir / CODEC_FILE).exists() or not 0 <= done < min(planned, config.training.max_steps or planned):
        return
    if newest_checkpoint(output_dir) is None or config.run.resume == "none":
        (output_dir / CODEC_FILE).unlink()
        return
    print(
        f"warning: the autoencoder in {output_dir} had {done} of {planned} steps, by an earlier --max-steps, and this "
        "run's checkpoints belong to it; for a full one use another --output-dir, or --resume none",
        file=sys.stderr,
    )


def train_autoencoder(
    config: Config, codec: ConvAutoencoder, training_set: Any, validation_set: Any, info: DistInfo
) -> None:
    """Train `codec` to its planned step, resuming what is in OUT/autoencoder; its averaged weights are loaded into it.

    Raises Stopped when the run was stopped before; the same command goes on from there.
    """
    phase = phase_config(config, info.world)
    output_dir = Path(config.run.output_dir) / PHASE
    if info.is_main:
        print(f"the autoencoder of the latents is trained first, into {output_dir}", flush=True)
    result = AutoencoderTrainer(phase, training_set, validation_set, info).train(output_dir)
    if not result.finished:
        raise Stopped(
            f"the autoencoder was stopped at step {result.step} of {phase.training.total_steps}; the same command "
            "goes on from there"
        )
    if info.is_main and result.step < config.vae.codec_steps:
        print(
            f"warning: --max-steps ends the autoencoder at step {result.step} of {config.vae.codec_steps}: its "
            "pictures are blurred; a command without it trains it on, as long as there is no checkpoint of the run",
            file=sys.stderr,
        )
    load_strict(codec, load_weights(result.checkpoint or output_dir), what=str(output_dir))


class AutoencoderTrainer:
    """The phase's objective as functions for the loop: pictures come back out of latents that were disturbed."""

    def __init__(self, config: Config, training_set: Any, validation_set: Any, info: DistInfo) -> None:
        """config: of this phase (phase_config)."""
        self.config, self.training_set, self.info = config, training_set, info
        seed_everything(config.run.seed, WEIGHTS)
        self.model = ConvAutoencoder(channels=config.model.in_channels, factor=config.vae.patch, width=config.vae.width)
        samples = readable(validation_set if len(validation_set) else training_set, HELD_OUT)
        self.shown_NCHW = unit(torch.stack([sample["image"] for sample in samples])).to(info.device)

    def losses(self, model: Callable, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        """One (loss, metrics) a micro-batch. Noise is keyed by (seed, step, sample): ranks and resumes change none."""
        seed = self.config.run.seed
        for batch in batches:
            images_BCHW = unit(batch["image"].to(self.info.device))
            draws = {"slots": batch["slot"], "device": images_BCHW.device}
            noise_BChw = keyed_randn(self._latent_shape(images_BCHW), key=(seed, NOISE, step), **draws)
            spread_B = LARGEST_NOISE * keyed_rand((), key=(seed, SPREAD, step), **draws)
            decoded_BCHW, latents_BChw = model(images_BCHW, noise_BChw, spread_B)
            # a little weight on the latents' size, or they grow without end: the noise grows with them
            loss = reconstruction_loss(decoded_BCHW.float(), images_BCHW) + SIZE * latents_BChw.float().square().mean()
            yield loss / len(batches), {}

    def validate(self, model: Callable, step: int) -> dict[str, float]:
        """Loss and PSNR in dB of the undisturbed round trip, on held-out pictures."""
        found = self._round_trip(model)
        psnr = 10 * torch.log10(4 / (found - self.shown_NCHW).square().mean())
        return {"loss": reconstruction_loss(found, self.shown_NCHW).item(), "psnr": psnr.item()}

    def sample(self, model: Callable, step: int, folder: Path) -> None:
        """A row of held-out pictures, and below it what comes back."""
        back = to_uint8(self._round_trip(model)[:SHOWN])
        if self.info.is_main:
            pictures = np.concatenate([to_uint8(self.shown_NCHW[:SHOWN]), back])
            grid(pictures, columns=min(SHOWN, len(back)), enlarge=2).save(folder / f"step_{step:08d}.png")

    def train(self, output_dir: Path) -> FitResult:
        """Train to the planned step, resuming what is in the output folder."""
        training, seed = self.config.training, self.config.run.seed
        # without drop_last a batch runs on into the next epoch, so that a set smaller than a batch will do
        order = BatchPlan(len(self.training_set), training.batch_size, self.info.world, 1, seed, drop_last=False)
        stream = MapStream(
            self.training_set,
            order,
            self.info,
            collate=collate,
            num_workers=training.num_workers,
            prefetch_factor=training.prefetch_factor,
            bad_samples=output_dir / "bad_samples.jsonl",
        )
        return fit(
            config=self.config,
            info=self.info,
            model=self.model,
            stream=stream,
            losses=self.losses,
            validate=self.validate,
            sample=self.sample,
            output_dir=output_dir,
            title="autoencoder of the latents",
            wrap_classes=(nn.Sequential,),
        )

    def _latent_shape(self, images_BCHW: Tensor) -> tuple[int, int, int]:
        factor = self.config.vae.patch
        return (self.config.model.in_channels, images_BCHW.shape[2] // factor, images_BCHW.shape[3] // factor)

    def _round_trip(self, model: Callable) -> Tensor:
        nothing = torch.zeros(len(self.shown_NCHW), *self._latent_shape(self.shown_NCHW), device=self.info.device)
        return model(self.shown_NCHW, nothing, nothing[:, 0, 0, 0])[0].float().clamp(-1, 1)


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Squared error, and a little of the absolute error of the differences between neighbours, which keeps edges."""
    edges = [(decoded.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (2, 3)]
    return (decoded - images).square().mean() + EDGES * sum(edges)


def phase_config(config: Config, world: int) -> Config:
    """The run's settings with the loop of this phase."""
    batch_size = max(1, BATCH // world)
    training = config.training.model_copy(
        update=dict(
            total_steps=config.vae.codec_steps, max_steps=config.training.max_steps, batch_size=batch_size,
            global_batch_size=None, gradient_accumulation_steps=1, learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine", warmup_steps=50, min_lr_ratio=0.02, weight_decay=0.0, adam_beta2=0.99,
            max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True, eval_steps=None, sample_steps=None, save_steps=500,
            save_every_n_epochs=None, early_stopping_patience=None, compile=False, save=True,
        )
    )  # fmt: skip
    resume = "none" if config.run.resume == "none" else "auto"  # a path means the transformer's checkpoint
    return config.model_copy(update={"training": training, "run": config.run.model_copy(update={"resume": resume})})
