"""Train the text-to-image DiT.

  python dit/train.py --config small --output-dir outputs/dit          on a CPU with the sample pictures, some minutes
  python dit/train.py --config default --data-root data/CUB_200_2011   one GPU
  bash scripts/train_dit.sh --gpus 8 --config default --strategy fsdp  eight
  ... --dry-run --world-size 64 --gpu h100                             the plan only
The same command again resumes. `--config configs/train_config.yaml` reads the guide's form of the settings.
"""

import json
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import PRESETS, Config
from shared.config import accumulation_steps, load_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(Config, presets=PRESETS, default="small", description=__doc__)  # answers before torch is imported

import torch

from dit.data.cache import CachedDataset
from dit.dataset import TextImageDataset, collate, unit
from dit.evaluation.held_out import prepare, readable
from dit.modules.text import make_text_encoder
from dit.objective import Trainer
from dit.plan import workload
from dit.sampling.drawing import grid, to_uint8
from dit.weights.autoencoder import prepare_codec
from dit.weights.convert import load_pretrained
from dit.weights.open import build_model, make_vae
from shared.data import BatchPlan, MapStream
from shared.engine.dist import init_distributed, shutdown
from shared.engine.preflight import preflight
from shared.plan.table import plan_run
from shared.rng import seed_everything

OUT_OF_MEMORY = (
    "lower --batch-size and raise --gradient-accumulation-steps, or use --gradient-checkpointing, --use-slicing, or a "
    "cache of latents (dit/precompute.py, --cache-dir)"
)


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
    preflight(config, info)
    output_dir = Path(config.run.output_dir)
    if info.is_main:
        _refuse_many_skipped(training_set, output_dir)
    vae_encoder, text_encoder = make_vae(config), make_text_encoder(config)
    prepare_codec(config, vae_encoder, training_set, validation_set, info)
    if text_encoder is not None and text_encoder.has_tokens:
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
