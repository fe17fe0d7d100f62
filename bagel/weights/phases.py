"""What a run from nothing trains first: a convolutional autoencoder into OUT/autoencoder, then frozen, and the vision
tower into OUT/tower, which the released model also has from elsewhere.

The same loop as the transformer's, so phases log, resume and run on several ranks in the same way.
Shapes: B batch, C channels, H W of a picture, h w of a latent, V ids of the tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bagel.config import Config, ModelConfig
from bagel.dataset import UnifiedGenerationDataset
from bagel.model import Bagel
from bagel.modules.vision import Autoencoder, ConvAutoencoder, EncoderLayer, VisionModel, build_autoencoder
from bagel.packing import PackFormat, PlanItem, patchify, position_ids
from bagel.weights.pretrained import AUTOENCODER, load_autoencoder
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import CheckpointStore, load_weights
from shared.engine.dist import DistInfo, barrier
from shared.errors import BadSample, Stopped, UserError, written_aside
from shared.loop import fit, steps_done
from shared.rng import keyed_rand, keyed_randn, seed_everything

PHASE, TOWER = "autoencoder", "tower"  # folders within the run's output
_NOISE, _WEIGHTS, _HEAD, _SPREAD = 342, 343, 344, 345  # random streams
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
    Stopped when a signal or the time limit stopped it; the same command goes on from there.
    """
    seed_everything(config.run.seed, _WEIGHTS)
    network = build_autoencoder(model.autoencoder)
    assert isinstance(network, ConvAutoencoder)
    network.requires_grad_(True)
    pictures = Pictures(dataset, "vae_image")
    if not len(pictures):
        raise UserError(
            f"{dataset.data_path}: no record draws a picture to learn an autoencoder from; use "
            "--set model.autoencoder.kind=pixel"
        )

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

    found = ConvAutoencoder(model.autoencoder).requires_grad_(False)
    steps, title = model.autoencoder.steps, "autoencoder of the pictures"
    found.load_state_dict(_trained(config, info, PHASE, network, pictures, losses, (nn.Sequential,), steps, title))
    found.settle(pictures.first(SETTLED_ON))
    return found


class WordReader(nn.Module):
    """A tower and a linear layer over the mean of its tokens: pictures (B, 3, H, W) of one size, (H, W) in pixels ->
    a number for every id (B, V).
    """

    cells: Tensor

    def __init__(self, tower: VisionModel, layout: PackFormat, size: tuple[int, int], width: int, words: int):
        super().__init__()
        self.tower, self.patch, self.head = tower, layout.vit_patch, nn.Linear(width, words)
        rows, columns = (side // layout.vit_patch for side in size)
        cells = position_ids(rows, columns, layout.vit_side, interpolate=layout.interpolate_pos)
        self.register_buffer("cells", cells, persistent=False)  # once, or every step would wait for its copy

    def forward(self, image_BCHW: Tensor) -> Tensor:
        count = len(image_BCHW)
        patches = torch.cat([patchify(image, self.patch) for image in image_BCHW])
        tokens = self.tower(patches, self.cells.repeat(count), [len(self.cells)] * count)
        return self.head(tokens.unflatten(0, (count, -1)).mean(1))


def prepare_tower(
    config: Config, model: ModelConfig, bagel: Bagel, dataset: UnifiedGenerationDataset, info: DistInfo
) -> None:
    """Teach a tower of random weights, in model.vision_steps steps, which words are said about a picture: softmax over
    all ids against the share of each in what is learned (Huang et al. 2024, SuperClass, arXiv 2411.03313).

    Else only what an answer makes of it teaches the tower, and where a thing lies, which no single token shows, is
    not found that way. Nothing to do for a tower that is given or frozen, or once the run itself has a checkpoint.
    """
    run, tower = Path(config.run.output_dir), bagel.vit_model
    is_given = not model.from_scratch and (model.llm_path is None or model.vit_path is not None)
    is_frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    goes_on = config.run.resume != "none" and CheckpointStore(run / "checkpoints", DistInfo()).look()[0] is not None
    barrier()  # all ranks have looked
    if not model.vision_steps or is_given or is_frozen or goes_on:
        return
    pictures, steps = Pictures(dataset, "vit_image"), model.vision_steps
    if not len(pictures):
        if info.is_main:
            print(f"{dataset.data_path}: nothing is said about a picture, so the vision tower is not trained first")
        return
    seed_everything(config.run.seed, _HEAD)
    own = VisionModel(model.vision)  # no strategy may touch the model of the run
    own.load_state_dict(tower.state_dict())
    words = dataset.tokenizer.vocab_size
    reader = WordReader(own, dataset.layout, pictures.size, model.vision.hidden_size, words)

    def losses(call: Callable, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        for batch in batches:
            yield F.cross_entropy(call(batch["image"]).float(), batch["words"]) / len(batches), {}

    weights = _trained(config, info, TOWER, reader, pictures, losses, (EncoderLayer,), steps, "vision tower")
    tower.load_state_dict(
        {name.removeprefix("tower."): value for name, value in weights.items() if name.startswith("tower.")}
    )


def _trained(
    config: Config,
    info: DistInfo,
    name: str,
    network: nn.Module,
    pictures: "Pictures",
    losses: Callable,
    wrap_classes: tuple[type, ...],
    steps: int,
    title: str,
) -> dict[str, Tensor]:
    """The averaged weights of a network after its phase, which is resumed where it stopped, and ends at `steps` or
    earlier at training.max_steps. Raises Stopped when a signal or the time limit did.
    """
    phase, folder = _phase(config, steps, info.world), Path(config.run.output_dir) / name
    if info.is_main:
        print(f"the {title} is trained first, into {folder}", flush=True)
    # without drop_last a batch runs on into the next epoch, so that fewer pictures than a batch will do
    plan = BatchPlan(len(pictures), phase.training.batch_size, info.world, 1, config.run.seed, drop_last=False)
    result = fit(
        config=phase, info=info, model=network, losses=losses, output_dir=folder, wrap_classes=wrap_classes,
        stream=MapStream(pictures, plan, info, collate=_collate, bad_samples=folder / "bad_samples.jsonl"),
        checkpoint_name="step_{step}", title=title,
    )  # fmt: skip
    if not result.finished:
        raise Stopped(f"the {title} was stopped at step {result.step} of {steps}; the same command goes on from there")
    return load_weights(result.checkpoint or folder)


def _phase(config: Config, steps: int, world: int) -> Config:
    """The run's settings with the loop of this phase; max_steps bounds it too."""
    training = config.training.model_copy(
        update=dict(
            total_steps=steps, batch_size=max(1, BATCH // world), global_batch_size=None,
            gradient_accumulation_steps=1, learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=50,
            warmup_ratio=0.0, min_lr_ratio=0.02, weight_decay=0.0, adam_beta2=0.99, adam_epsilon=1e-8,
            max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True, logging_steps=100, eval_steps=None, sample_steps=None,
            save_steps=700, early_stopping_patience=None, compile=False, save=True, save_every_n_epochs=None,
        )
    )  # fmt: skip
    resume = "none" if config.run.resume == "none" else "auto"  # a path means a checkpoint of the transformer
    return config.model_copy(update={"training": training, "run": config.run.model_copy(update={"resume": resume})})


def _collate(samples: list[dict]) -> dict:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class Pictures:
    """{"image": (3, H, W) in [-1, 1]} of every record with a picture of this kind (its first one) of the most frequent
    size; of a picture that is looked at, with something learned about it, also {"words": (V,)}, the shares of ids.
    """

    def __init__(self, dataset: UnifiedGenerationDataset, kind: Literal["vae_image", "vit_image"]):
        self.dataset, self.kind, self.fingerprint = dataset, kind, dataset.fingerprint()
        sizes: dict[tuple[int, int], list[int]] = {}
        for index in range(min(len(dataset), SEARCHED)):
            if (item := self._first_of(dataset.plan(index, 0))) is not None:
                sizes.setdefault(item.size, []).append(index)
        self.size, self.indices = max(sizes.items(), key=lambda entry: len(entry[1]), default=((0, 0), []))

    def _first_of(self, items: Sequence[PlanItem]) -> PlanItem | None:
        if self.kind == "vit_image" and not _said(items):
            return None
        return next((item for item in items if item.type == self.kind), None)

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        """The picture as this epoch has it; raises a BadSample where it is damaged or now of another size."""
        items = self.dataset.sample(self.indices[index], epoch)["items"]
        item = self._first_of(items)
        if item is None or item.image is None or item.size != self.size:
            raise BadSample(f"record {self.indices[index]}: no picture of {self.size} in epoch {epoch}")
        if self.kind == "vae_image":
            return {"image": item.image}
        words = torch.bincount(torch.tensor(_said(items)), minlength=self.dataset.tokenizer.vocab_size).float()
        return {"image": item.image, "words": words / words.sum()}

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


def _said(items: Sequence[PlanItem]) -> list[int]:
    """The ids of a sample that are learned."""
    return [token for item in items if item.type == "text" and item.loss for token in item.ids]
