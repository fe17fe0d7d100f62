"""The first phase of a run whose autoencoder is convolutional: trained into OUT/autoencoder, then frozen.

The same loop as the transformer's, so it logs, resumes and runs on several ranks in the same way.
Shapes: B batch, C channels, H W of a picture, h w of a latent.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bagel.config import Config, ModelConfig
from bagel.dataset import UnifiedGenerationDataset
from bagel.modules.vision import Autoencoder, ConvAutoencoder, build_autoencoder
from bagel.weights.pretrained import AUTOENCODER, load_autoencoder
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import load_weights
from shared.engine.dist import DistInfo, barrier
from shared.errors import BadSample, Stopped, UserError, written_aside
from shared.loop import fit, steps_done
from shared.rng import keyed_rand, keyed_randn, seed_everything

PHASE = "autoencoder"  # folder within the run's output
_NOISE, _WEIGHTS, _SPREAD = 342, 343, 345  # random streams
BATCH, SETTLED_ON, SEARCHED = 16, 256, 20_000  # pictures, pictures, records
LARGEST_NOISE = 0.3  # of the latents' own spread
EDGES, SIZE = 0.2, 1e-4  # weights of the edges' absolute error and of the latents' squared size


def prepare_autoencoder(
    config: Config, model: ModelConfig, dataset: UnifiedGenerationDataset, info: DistInfo
) -> Autoencoder:
    """The frozen autoencoder of a run; a convolutional one that is given nowhere is trained first."""
    run = Path(config.run.output_dir)
    is_own = model.autoencoder.kind == "conv" and model.model_path is None
    is_there = (run / AUTOENCODER).is_file()
    done, planned = steps_done(run / PHASE), model.autoencoder.steps
    wanted = min(planned, config.training.max_steps or planned)
    if is_own and is_there and 0 <= done < wanted:  # an earlier command's --max-steps cut it short
        is_there = (run / "checkpoints").is_dir()  # what was trained on its latents would not fit others
        if is_there and info.is_main:
            print(
                f"warning: the autoencoder in {run} had {done} of {planned} steps, by an earlier --max-steps, and this "
                "run's checkpoints belong to it; for a full one use another --output-dir",
                flush=True,
            )
    barrier()  # all ranks have looked
    if is_own and not is_there:
        trained = train_autoencoder(config, model, dataset, info)
        if info.is_main:
            with written_aside(run / AUTOENCODER) as temporary:
                save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, temporary)
        barrier()
    return load_autoencoder(model, run)


def train_autoencoder(
    config: Config, model: ModelConfig, dataset: UnifiedGenerationDataset, info: DistInfo
) -> ConvAutoencoder:
    """Squared error, and a little of the absolute error of differences between neighbours, which keeps edges.

    Resumes what is in OUT/autoencoder, and ends at model.autoencoder.steps or earlier at training.max_steps. Raises a
    UserError when a signal or the time limit stopped it; the same command goes on from there.
    """
    phase, folder = _phase(config, model, info.world), Path(config.run.output_dir) / PHASE
    if info.is_main:
        print(f"the autoencoder of the pictures is trained first, into {folder}", flush=True)
    seed_everything(config.run.seed, _WEIGHTS)
    network = build_autoencoder(model.autoencoder)
    assert isinstance(network, ConvAutoencoder)
    network.requires_grad_(True)
    pictures = DrawnPictures(dataset)
    # without drop_last a batch runs on into the next epoch, so that fewer pictures than a batch will do
    plan = BatchPlan(len(pictures), phase.training.batch_size, info.world, 1, config.run.seed, drop_last=False)
    stream = MapStream(pictures, plan, info, collate=_collate, bad_samples=folder / "bad_samples.jsonl")

    def losses(call: Callable, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        # What is drawn for a picture is keyed by its slot in the step, so that it is the same on any number of ranks.
        for batch in batches:
            images_BCHW, draws = batch["image"], {"slots": batch["slot"].cpu(), "device": batch["image"].device}
            cells = [side // model.autoencoder.downsample for side in images_BCHW.shape[2:]]
            shape = (model.autoencoder.z_channels, *cells)
            noise_BChw = keyed_randn(shape, key=(config.run.seed, _NOISE, step), **draws)
            spread_B = LARGEST_NOISE * keyed_rand((), key=(config.run.seed, _SPREAD, step), **draws)
            decoded, latents = call(images_BCHW, noise_BChw, spread_B)
            error = (decoded.float() - images_BCHW).square().mean()
            edges = sum((decoded.diff(dim=axis) - images_BCHW.diff(dim=axis)).abs().mean() for axis in (2, 3))
            # a little weight on the latents' size, or they grow without end: the noise grows with them
            loss = error + EDGES * edges + SIZE * latents.float().square().mean()
            yield loss / len(batches), {"error": error.detach()}

    result = fit(
        config=phase, info=info, model=network, stream=stream, losses=losses, output_dir=folder,
        wrap_classes=(torch.nn.Sequential,), checkpoint_name="step_{step}", title="autoencoder of the pictures",
    )  # fmt: skip
    if not result.finished:
        raise Stopped(
            f"the autoencoder was stopped at step {result.step} of {phase.training.total_steps}; the same command goes "
            "on from there"
        )
    found = ConvAutoencoder(model.autoencoder).requires_grad_(False)
    found.load_state_dict(load_weights(result.checkpoint or folder))
    found.settle(pictures.first(SETTLED_ON))
    return found


def _phase(config: Config, model: ModelConfig, world: int) -> Config:
    """The run's settings with the loop of this phase; max_steps bounds it too."""
    training = config.training.model_copy(
        update=dict(
            total_steps=model.autoencoder.steps, batch_size=max(1, BATCH // world), global_batch_size=None,
            gradient_accumulation_steps=1, learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=50,
            warmup_ratio=0.0, min_lr_ratio=0.02, weight_decay=0.0, adam_beta2=0.99, adam_epsilon=1e-8,
            max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True, logging_steps=100, eval_steps=None, sample_steps=None,
            save_steps=700, early_stopping_patience=None, compile=False, save=True, save_every_n_epochs=None,
        )
    )  # fmt: skip
    resume = "none" if config.run.resume == "none" else "auto"  # a path means a checkpoint of the transformer
    return config.model_copy(update={"training": training, "run": config.run.model_copy(update={"resume": resume})})


def _collate(samples: list[dict]) -> dict:
    return {"image": torch.stack([sample["image"] for sample in samples])}


class DrawnPictures:
    """{"image": (3, H, W) in [-1, 1]} of every record that draws a picture of the most frequent size, its first one."""

    def __init__(self, dataset: UnifiedGenerationDataset):
        self.dataset, self.fingerprint = dataset, dataset.fingerprint()
        sizes: dict[tuple[int, int], list[int]] = {}
        for index in range(min(len(dataset), SEARCHED)):
            if (item := next((item for item in dataset.plan(index, 0) if item.type == "vae_image"), None)) is not None:
                sizes.setdefault(item.size, []).append(index)
        if not sizes:
            raise UserError(
                f"{dataset.data_path}: no record draws a picture to learn an autoencoder from; use "
                "--set model.autoencoder.kind=pixel"
            )
        self.size, self.indices = max(sizes.items(), key=lambda entry: len(entry[1]))

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        """The picture as this epoch has it; raises a BadSample where it is damaged or now of another size."""
        for item in self.dataset.sample(self.indices[index], epoch)["items"]:
            if item.type == "vae_image" and item.image is not None and item.size == self.size:
                return {"image": item.image}
        raise BadSample(f"record {self.indices[index]}: no picture of {self.size} in epoch {epoch}")

    def first(self, most: int) -> Tensor:
        """(at most `most`, 3, H, W): the first ones that can be read."""
        found: list[Tensor] = []
        for index in range(len(self)):
            try:
                found.append(self.sample(index, 0)["image"])
            except BadSample:
                continue
            if len(found) == most:
                break
        return torch.stack(found)
