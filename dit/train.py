"""Train the text-to-image DiT.

  python dit/train.py --config small --output-dir outputs/dit          on a CPU with the sample pictures, some minutes
  python dit/train.py --config default --data-root data/CUB_200_2011   one GPU
  bash scripts/train_dit.sh --gpus 8 --config default --strategy fsdp  eight
  ... --dry-run --world-size 64 --gpu h100                             the plan only
The same command again resumes. `--config configs/train_config.yaml` reads the guide's form of the settings.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import PRESETS, Config
from shared.config import accumulation_steps, load_config, save_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(Config, presets=PRESETS, default="small", description=__doc__)  # answers before torch is imported

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dit.data.cache import CachedDataset
from dit.data.images import grid, to_uint8, unit
from dit.dataset import TextImageDataset, collate
from dit.evaluation.held_out import HeldOut, errors, prepare, readable, summary
from dit.model import DiTBlock, DiTModel
from dit.modules.text import make_text_encoder
from dit.modules.vae import make_vae
from dit.objective import make_objective
from dit.sampling.drawing import Drawing, draw_pictures
from dit.weights.autoencoder import prepare_codec
from dit.weights.convert import load_pretrained
from dit.weights.open import CODEC_FILE, build_model, condition_of
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import load_strict, load_weights
from shared.engine.dist import DistInfo, init_distributed, shutdown
from shared.errors import written_aside
from shared.loop import FitResult, fit
from shared.plan.measure import FrozenPart
from shared.plan.table import Workload, plan_run
from shared.rng import keyed_rand, keyed_randn, seed_everything

TIMES, NOISE, DROPS, POSTERIOR = 1, 2, 3, 4  # random streams
OUT_OF_MEMORY = (
    "lower --batch-size and raise --gradient-accumulation-steps, or use --gradient-checkpointing, --use-slicing, or a "
    "cache of latents (dit/precompute.py, --cache-dir)"
)


class Trainer:
    """The objective as functions for the loop. Frozen: vae_encoder and text_encoder; trained: model.

    Rectified flow or noise prediction on latents, with the caption of a share of the samples replaced by the null
    condition.
    """

    def __init__(
        self,
        model: DiTModel,
        vae_encoder: nn.Module,
        text_encoder: nn.Module | None,
        train_dataloader: MapStream,
        config: Config,
        *,
        info: DistInfo | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.model, self.config, self.stream, self.held_out = model, config, train_dataloader, held_out
        self.info = info or DistInfo()
        self.vae_encoder = vae_encoder.to(self.info.device).eval()
        self.text_encoder = None if text_encoder is None else text_encoder.to(self.info.device).eval()
        self.objective = make_objective(
            config.diffusion, config.flow, learn_sigma=config.model.learn_sigma, latent_size=config.latent_size
        )
        self.noise_scheduler = getattr(self.objective, "noise_scheduler", None)
        self.criterion = self.objective.error
        self.resume = config.run.resume
        if self.text_encoder is not None and config.diffusion.null_text == "empty":
            model.set_null_text(*(part[0].cpu() for part in self.text_encoder.encode([""])))

    def losses(self, model: Callable, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        """One (loss, metrics) a micro-batch. Draws are keyed by (seed, step, sample): ranks and resumes change none."""
        seed = self.config.run.seed
        for batch in batches:
            latents_BCHW = self.latents(batch, step)
            draws = {"slots": batch["slot"], "device": latents_BCHW.device}
            condition = self.condition(batch)
            t_B = self.objective.times(keyed_rand((), key=(seed, TIMES, step), **draws))
            noise_BCHW = keyed_randn(latents_BCHW.shape[1:], key=(seed, NOISE, step), **draws)
            drop_B = keyed_rand((), key=(seed, DROPS, step), **draws) < self.config.diffusion.cfg_dropout
            noisy_BCHW = self.objective.noisy(latents_BCHW, noise_BCHW, t_B)
            if condition and self.config.diffusion.cfg_dropout:
                condition["drop"] = drop_B
            predicted = model(noisy_BCHW, self.objective.model_time(t_B), **condition)
            error_B = self.criterion(predicted, noisy_BCHW, latents_BCHW, noise_BCHW, t_B)  # fp32
            yield error_B.mean() / len(batches), {"loss_by_t": (t_B / self.objective.span, error_B)}

    def validate(self, model: Callable, step: int) -> dict[str, float]:
        """Held-out loss at fixed levels with fixed noise: comparable between steps, runs and numbers of ranks."""
        kinds = ("right", "shuffled", "constant") if self.held_out.condition else ("right", "constant")
        found = {kind: errors(model, self.objective, self.held_out, self.info, kind=kind) for kind in kinds}
        return summary(found["right"], found.get("shuffled"), found["constant"])

    def sample(self, model: Callable, step: int, folder: Path) -> None:
        """A grid of pictures for sample_prompts, or for the first held-out captions, each with its own fixed seed."""
        settings = self.config.sample
        prompts = self.config.training.sample_prompts or self.held_out.prompts[: settings.count]
        count, labels = len(prompts), self.held_out.condition.get("labels")
        condition = condition_of(
            prompts, None if labels is None else labels[:count], self.text_encoder, self.info.device
        )
        drawing = Drawing(
            sampler=settings.sampler, steps=settings.steps, cfg_scale=settings.cfg_scale, shift=settings.shift
        )
        shape = (self.config.model.in_channels, self.config.latent_side, self.config.latent_side)
        images = draw_pictures(
            model,
            self.objective,
            self.vae_encoder,
            condition,
            list(range(count)),
            shape,
            drawing=drawing,
            device=self.info.device,
        )
        if self.info.is_main:
            grid(to_uint8(images), columns=8).save(folder / f"step_{step:08d}.png")

    def train(self) -> FitResult:
        """Train to the planned step, resuming what is in the output folder."""
        self.config.run.resume = self.resume
        return fit(
            config=self.config,
            info=self.info,
            model=self.model,
            stream=self.stream,
            losses=self.losses,
            validate=self.validate if self.held_out else None,
            sample=self.sample if self.held_out else None,
            wrap_classes=(DiTBlock,),
            export=self.export if hasattr(self.vae_encoder, "fit") else None,
            title="DiT",
            checkpoint_name="checkpoint-step-{step}",
            epoch_checkpoint_name="checkpoint-epoch-{epoch}",
        )

    def training_step(self, batch: dict) -> Tensor:
        """The loss of one batch as a scalar tensor, outside the loop."""
        count = len(batch["image"] if "image" in batch else batch["moments"])
        batch = {"slot": torch.arange(count), **batch}
        return next(self.losses(self.model, [batch], 0))[0]

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the weights and the settings into a folder. (The loop's own hold all that resuming needs.)"""
        folder = Path(path)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        with written_aside(folder / "model.safetensors") as temporary:
            save_file(weights, temporary)
        save_config(self.config, folder / "config.yaml")

    def load_checkpoint(self, path: str | Path) -> None:
        """Load the weights of save_checkpoint's folder; a checkpoint of the loop is resumed from by train()."""
        own = Path(path) / "model.safetensors"
        if own.exists() and not (Path(path) / "manifest.json").exists():
            load_strict(self.model, load_weights(own), what=str(own))
        else:
            load_strict(self.model, load_weights(path, prefer_ema=False), what=str(path))
            self.resume = str(path)

    def export(self, folder: Path, weights: dict, ema: dict | None) -> None:
        """The fitted codec goes along with every checkpoint."""
        save_file(
            {name: value.cpu().contiguous() for name, value in self.vae_encoder.state_dict().items()},
            folder / CODEC_FILE,
        )

    def latents(self, batch: dict, step: int) -> Tensor:
        """Scaled latents (B, C, H, W), from the cache or from pictures; the posterior is drawn anew on every visit."""
        with torch.no_grad():
            moments, noise = batch.get("moments"), None
            if moments is None:
                moments = self.vae_encoder.moments(unit(batch["image"].to(self.info.device)))
            if self.vae_encoder.posterior == "sample":
                shape = (moments.shape[1] // 2, *moments.shape[2:])
                key = (self.config.run.seed, POSTERIOR, step)
                noise = keyed_randn(shape, key=key, slots=batch["slot"], device=moments.device)
            return self.vae_encoder.latents(moments, noise).clone()

    def condition(self, batch: dict) -> dict[str, Tensor]:
        """The model's keyword arguments for text or labels: from the cache, from token ids, or from the captions."""
        if "text_embeddings" in batch:
            return {name: batch[name] for name in ("text_embeddings", "text_mask", "text_pooled") if name in batch}
        if self.text_encoder is not None and "input_ids" in batch:
            states, mask, pooled = self.text_encoder.encode_ids(batch["input_ids"])
            return {"text_embeddings": states.clone(), "text_mask": mask.clone(), "text_pooled": pooled.clone()}
        return condition_of(batch.get("text", []), batch.get("label"), self.text_encoder, self.info.device)


def workload(config: Config) -> Workload:
    """One micro-step of the model on inputs of the right shapes, for --dry-run."""
    model = config.model

    def step(config: Config) -> Callable[[DiTModel], Tensor]:
        size, shape = config.training.batch_size, (model.in_channels, config.latent_side, config.latent_side)

        def loss(network: DiTModel) -> Tensor:
            condition = {}
            if model.text_conditioning != "none":
                condition["text_embeddings"] = torch.randn(size, model.text_len, model.text_dim)
                condition["text_pooled"] = torch.randn(size, model.text_dim)
            if model.num_classes:
                condition["labels"] = torch.zeros(size, dtype=torch.long)
            return network(torch.randn(size, *shape), torch.rand(size), **condition).float().square().mean()

        return loss

    def frozen_parts(config: Config) -> list[FrozenPart]:
        size, parts = config.training.batch_size, []
        if config.data.cache_dir is None and config.vae.type == "sd":  # 273 GFLOP to encode a picture of 256 pixels
            flops = size * 273e9 * (config.data.image_size / 256) ** 2
            parts.append(FrozenPart("VAE", 83_653_863, 4 * 83_653_863, flops))
        if config.data.cache_dir is None and model.text_conditioning != "none" and config.text.type == "clip":
            parts.append(FrozenPart("CLIP text tower", 63_165_952, 4 * 63_165_952, size * 6.0e9))
        return parts

    title = f"DiT {model.hidden_size}/{model.num_layers}/{model.num_heads}"
    return Workload(title, build_model, step, (DiTBlock,), frozen_parts)


def _steps_from_epochs(config: Config, steps_per_epoch: int) -> None:
    """Steps are the unit inside: settings in epochs are turned into steps once."""
    training = config.training
    if training.eval_every_n_epochs:
        training.eval_steps = training.eval_every_n_epochs * steps_per_epoch
    if training.sample_every_n_epochs:
        training.sample_steps = training.sample_every_n_epochs * steps_per_epoch


def _train(trainer: Trainer) -> None:
    """Train; a full GPU ends with what to change."""
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full ({str(error).splitlines()[0]}); {OUT_OF_MEMORY}") from None


def _save_inputs(dataset: TextImageDataset, folder: Path) -> None:
    """The first training pictures as the model sees them, with their captions: the quickest check of the data."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = readable(dataset, 16, epoch=0)
    grid(to_uint8(unit(torch.stack([sample["image"] for sample in samples]))), columns=8).save(folder / "inputs.png")
    (folder / "inputs.txt").write_text("\n".join(sample["text"] for sample in samples) + "\n", encoding="utf-8")


def _refuse_many_skipped(dataset: TextImageDataset, output_dir: Path) -> None:
    """List what the readers left out; stop when it is more than one in a hundred."""
    if not dataset.skipped:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    listing = output_dir / "bad_samples.jsonl"
    listing.write_text(
        "".join(
            json.dumps({"index": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in dataset.skipped
        )
    )
    print(
        f"warning: {len(dataset.skipped)} pictures are left out, listed in {listing}; the first: "
        f"{dataset.skipped[0][1]}",
        file=sys.stderr,
    )
    if len(dataset.skipped) > 0.01 * (len(dataset) + len(dataset.skipped)):
        raise UserError(
            f"{len(dataset.skipped)} of {len(dataset) + len(dataset.skipped)} pictures cannot be used, more than 1%; "
            f"the first: {dataset.skipped[0][1]}; all are listed in {listing}; mend or remove them"
        )


@command
def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, presets=PRESETS, argv=argv, default="small", description=__doc__)
    if config.run.dry_run:
        print(plan_run(workload(config), config))
        return

    # the data come first: they are what most often is wrong
    training_set = TextImageDataset.from_config(config, is_train=True)
    validation_set = TextImageDataset.from_config(config, is_train=False)
    info = init_distributed(config.run.device, 60 * config.run.timeout_minutes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.allow_tf32
    output_dir = Path(config.run.output_dir)
    if info.is_main:
        _refuse_many_skipped(training_set, output_dir)
    vae_encoder, text_encoder = make_vae(config), make_text_encoder(config)
    prepare_codec(config, vae_encoder, training_set, validation_set, info)
    if hasattr(text_encoder, "tokenize"):
        training_set.tokenize = text_encoder.tokenize
    data = CachedDataset(config, training_set) if config.data.cache_dir else training_set
    training = config.training
    order = BatchPlan(
        len(data),
        training.batch_size,
        info.world,
        accumulation_steps(training, info.world),
        config.run.seed,
        drop_last=training.drop_last,
    )
    stream = MapStream(
        data,
        order,
        info,
        collate=collate,
        num_workers=training.num_workers,
        prefetch_factor=training.prefetch_factor,
        bad_samples=output_dir / "bad_samples.jsonl",
    )
    _steps_from_epochs(config, stream.steps_per_epoch)
    seed_everything(config.run.seed)  # the same first weights on every rank
    model = build_model(config)
    if config.model.pretrained_path:
        scale = config.flow.time_scale if config.diffusion.objective == "flow" else None
        load_pretrained(model, config.model.pretrained_path, time_scale=scale)
    held_out = None
    if len(validation_set):
        count, codec = training.eval_samples, vae_encoder.to(info.device)
        held_out = prepare(validation_set, training_set, codec, text_encoder, count=count, device=info.device)
    elif info.is_main:
        print("no held-out pictures: no evaluation (set --val-fraction, or give the data a split)", file=sys.stderr)
    trainer = Trainer(model, vae_encoder, text_encoder, stream, config, info=info, held_out=held_out)
    if info.is_main:
        _save_inputs(training_set, output_dir / "samples")
    _train(trainer)
    shutdown()


if __name__ == "__main__":
    main()
