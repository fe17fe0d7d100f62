"""The first phase of a run whose autoencoder is convolutional: trained into OUT/autoencoder, then frozen.

The same loop as the transformer's, so it logs, resumes and runs on several ranks in the same way.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bagel.config import Config, ModelConfig
from bagel.dataset import UnifiedGenerationDataset
from bagel.modules.vision import Autoencoder, ConvAutoencoder, build_autoencoder
from bagel.weights.pretrained import AUTOENCODER, load_autoencoder
from shared.engine.checkpoint import load_weights
from shared.engine.dist import DistInfo, barrier
from shared.errors import UserError, written_aside
from shared.loop import fit
from shared.rng import keyed_generator, seed_everything

_PICK, _NOISE, _WEIGHTS, _SETTLE = 341, 342, 343, 344  # random streams
BATCH, SETTLED_ON = 16, 256  # pictures
LARGEST_NOISE = 0.3  # of the latents' own spread
EDGES, SIZE = 0.2, 1e-4  # weights of the edges' absolute error and of the latents' squared size


def prepare_autoencoder(
    config: Config, model: ModelConfig, dataset: UnifiedGenerationDataset, info: DistInfo
) -> Autoencoder:
    """The frozen autoencoder of a run; a convolutional one that is given nowhere is trained first."""
    run = Path(config.run.output_dir)
    is_own = model.autoencoder.kind == "conv" and model.model_path is None
    if is_own and not (run / AUTOENCODER).is_file():
        trained = train_autoencoder(config, model, dataset, info)
        if info.is_main:
            with written_aside(run / AUTOENCODER) as temporary:
                save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, temporary)
        barrier()
    return load_autoencoder(model, run)


def train_autoencoder(
    config: Config, model: ModelConfig, dataset: UnifiedGenerationDataset, info: DistInfo
) -> ConvAutoencoder:
    """Squared error, and a little of the absolute error of differences between neighbours, which keeps edges."""
    phase, folder = _phase(config, info.world), Path(config.run.output_dir) / "autoencoder"
    phase.training.total_steps = model.autoencoder.steps
    if info.is_main:
        print(f"the autoencoder of the pictures is trained first, into {folder}", flush=True)
    seed_everything(config.run.seed, _WEIGHTS)
    network = build_autoencoder(model.autoencoder)
    assert isinstance(network, ConvAutoencoder)
    network.requires_grad_(True)
    stream = PictureStream(dataset, info, phase.training.batch_size, config.run.seed)

    def losses(call: Callable, batches: list[Tensor], step: int) -> Iterator[tuple[Tensor, dict]]:
        for images in batches:
            generator = keyed_generator(config.run.seed, _NOISE, step, info.rank)
            cells = [side // model.autoencoder.downsample for side in images.shape[2:]]
            noise = torch.randn(len(images), model.autoencoder.z_channels, *cells, generator=generator)
            spread_B = LARGEST_NOISE * torch.rand(len(images), generator=generator)
            decoded, latents = call(images, noise.to(images.device), spread_B.to(images.device))
            error = (decoded.float() - images).square().mean()
            edges = sum((decoded.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (2, 3))
            yield (
                (error + EDGES * edges + SIZE * latents.float().square().mean()) / len(batches),
                {"error": error.detach()},
            )

    result = fit(
        config=phase, info=info, model=network, stream=stream, losses=losses, output_dir=folder,
        wrap_classes=(torch.nn.Sequential,), checkpoint_name="step_{step}", title="autoencoder of the pictures",
    )  # fmt: skip
    if not result.finished:
        raise UserError(
            f"the autoencoder was stopped at step {result.step} of {phase.training.total_steps}; the same command goes "
            "on from there"
        )
    found = ConvAutoencoder(model.autoencoder).requires_grad_(False)
    found.load_state_dict(load_weights(result.checkpoint or folder))
    found.settle(stream.pictures(keyed_generator(config.run.seed, _SETTLE), SETTLED_ON).cpu())
    return found


def _phase(config: Config, world: int) -> Config:
    """The run's settings with the loop of this phase."""
    training = config.training.model_copy(
        update=dict(
            max_steps=None, batch_size=max(1, BATCH // world), global_batch_size=None, gradient_accumulation_steps=1,
            learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=50, warmup_ratio=0.0, min_lr_ratio=0.02,
            weight_decay=0.0, adam_beta2=0.99, adam_epsilon=1e-8, max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True,
            logging_steps=100, eval_steps=None, sample_steps=None, save_steps=700, early_stopping_patience=None,
            compile=False, save=True, save_every_n_epochs=None,
        )
    )  # fmt: skip
    resume = "none" if config.run.resume == "none" else "auto"  # a path means a checkpoint of the transformer
    return config.model_copy(update={"training": training, "run": config.run.model_copy(update={"resume": resume})})


class PictureStream:
    """Batches of pictures of one size, drawn by (seed, step, rank) from the records that draw one."""

    steps_per_epoch: int | None = None

    def __init__(self, dataset: UnifiedGenerationDataset, info: DistInfo, batch_size: int, seed: int):
        self.dataset, self.info, self.batch_size, self.seed = dataset, info, batch_size, seed
        self.samples_per_step = batch_size * info.world
        self.fingerprint: str | None = dataset.fingerprint()
        self.step = 0

    def start(self, step: int, state: dict | None) -> None:
        """Go to a step."""
        self.step = step

    def next_step(self) -> list[Tensor]:
        """One batch (B, 3, H, W) in [-1, 1]."""
        self.step += 1
        return [self.pictures(keyed_generator(self.seed, _PICK, self.step - 1, self.info.rank), self.batch_size)]

    def state(self) -> dict[str, Any]:
        """Nothing: the step tells the position."""
        return {}

    def agree(self) -> None:
        """Nothing to agree on."""

    def close(self) -> None:
        """No process to end."""

    def pictures(self, generator: torch.Generator, count: int) -> Tensor:
        """The first picture's size decides; records without a picture of that size are passed over."""
        found: list[Tensor] = []
        for _ in range(100 * count):
            index, epoch = torch.randint(2**31, (2,), generator=generator).tolist()
            items = self.dataset.sample(index % len(self.dataset), epoch % 1000)["items"]
            for item in items:
                fits = item.image is not None and item.type == "vae_image"
                if fits and (not found or item.image.shape == found[0].shape):
                    found.append(item.image)
                    break
            if len(found) == count:
                return torch.stack(found)
        raise UserError(
            f"{self.dataset.data_path}: fewer than {count} pictures of one size to learn an autoencoder from; use "
            "--set model.autoencoder.kind=pixel"
        )
