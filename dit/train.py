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
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import PRESETS, Config
from shared.config import accumulation_steps, load_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(Config, presets=PRESETS, default="small", description=__doc__)  # answers before torch is imported

import torch
from torch import Tensor

from dit.config import refuse_unused
from dit.data.cache import (
    SPLITS,
    CachedDataset,
    contents,
    null_text,
    read_manifest,
    refuse_changed_pictures,
    refuse_other_settings,
)
from dit.dataset import BucketPlan, TextImageDataset, collate, spread, unit
from dit.evaluation.held_out import HeldOut, prepare, prepare_cached, readable
from dit.model import DiTModel
from dit.modules.autoencoder import Codec
from dit.modules.prx import PRXModel
from dit.modules.text import CaptionEncoder, make_text_encoder, warn_of_cut
from dit.modules.vae import CODEC_FILE
from dit.objective import Trainer
from dit.plan import workload
from dit.sampling.drawing import grid, to_uint8
from dit.weights.autoencoder import prepare_codec
from dit.weights.convert import load_pretrained
from dit.weights.guide import is_guide_folder, read_guide_folder
from dit.weights.open import build_model, cached_codec, make_vae
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import find_checkpoint, newest_checkpoint
from shared.engine.dist import DistInfo, from_main, init_distributed, raise_together, shutdown
from shared.engine.parallel import built_once
from shared.engine.preflight import preflight
from shared.errors import write_text, written_aside
from shared.plan.table import plan_run
from shared.rng import seed_everything

VALIDATED = {f"val/{name}" for name in ("loss", "constant_loss", "ratio", "shuffled_cost_percent", "shuffled_p")}
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


def _save_inputs(dataset: TextImageDataset | CachedDataset, folder: Path) -> None:
    """The first training pictures as the model sees them, with their captions: the quickest check of the data. From a
    cache the captions only.
    """
    if isinstance(dataset, CachedDataset):
        captions = [dataset.captions_of(index)[0] for index in range(min(16, len(dataset)))]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        samples = readable(dataset.as_squares() if dataset.settings.buckets else dataset, 16)
        pixels = unit(torch.stack([sample["image"] for sample in samples]))
        with written_aside(folder / "inputs.png") as temporary:
            grid(to_uint8(pixels), columns=8).save(temporary, "PNG")
        captions = [sample["text"] for sample in samples]
    write_text(folder / "inputs.txt", "\n".join(captions) + "\n")


def _refuse_many_skipped(dataset: TextImageDataset | CachedDataset, output_dir: Path) -> None:
    """List what the readers left out; stop when it is more than one in a hundred."""
    if not dataset.skipped:
        return
    listing = output_dir / "bad_samples.jsonl"
    lines = [json.dumps({"index": name, "reason": reason}, ensure_ascii=False) for name, reason in dataset.skipped]
    write_text(listing, "\n".join(lines) + "\n")
    print(
        f"warning: {len(dataset.skipped)} pictures are left out, listed in {listing}; the first: "
        f"{dataset.skipped[0][1]}",
        file=sys.stderr,
    )
    if len(dataset.skipped) > max(1, 0.01 * (len(dataset) + len(dataset.skipped))):
        raise UserError(
            f"{len(dataset.skipped)} of {len(dataset) + len(dataset.skipped)} pictures cannot be used, more than 1%; "
            f"the first: {dataset.skipped[0][1]}; all are listed in {listing}; mend or remove them"
        )


def _checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that the loop will go on from; None for a run that begins, and for a file of weights."""
    wish = config.run.resume
    if wish == "auto":
        return newest_checkpoint(Path(config.run.output_dir))
    if wish == "none" or Path(wish).is_file() or is_guide_folder(Path(wish)):
        return None
    return find_checkpoint(Path(wish))


def _keep_pretrained(config: Config, folder: Path) -> None:
    """A run that resumes needs the weights no more that it began with: their file may be gone, the flag left out."""
    began_with = json.loads((folder / "trainer.json").read_text())["fixed_settings"].get("model.pretrained_path")
    if config.model.pretrained_path not in (None, began_with):
        print(f"warning: --pretrained is not read: the run goes on from {folder}", file=sys.stderr)
    config.model.pretrained_path = began_with


def _first_model(config: Config, *, begins: bool) -> DiTModel | PRXModel:
    """The network with its first weights, the same on every rank; of a run that begins, with those of --pretrained."""
    seed_everything(config.run.seed)
    model = build_model(config)
    if begins and config.model.pretrained_path:
        scale = config.flow.time_scale if config.diffusion.objective == "flow" else None
        load_pretrained(model, config.model.pretrained_path, time_scale=scale)
    return model


class Parts(NamedTuple):
    """What a run trains on: data, frozen encoders, what is held out, and the encoded empty caption."""

    training_set: TextImageDataset | CachedDataset
    codec: Codec
    encoder: CaptionEncoder | None
    held_out: HeldOut | None
    null: tuple[Tensor, Tensor, Tensor] | None = None


def _from_pictures(config: Config, sets: dict[str, TextImageDataset], info: DistInfo) -> Parts:
    """Pictures and captions, encoded as training meets them."""
    training_set, validation_set = sets["train"], sets["val"]
    output_dir = Path(config.run.output_dir)
    codec, encoder = make_vae(config), make_text_encoder(config)
    prepare_codec(config, codec, training_set, validation_set, info)
    config.vae.content, config.text.content = from_main(
        contents(config, codec=output_dir / CODEC_FILE) if info.is_main else None
    )
    if encoder is not None and encoder.has_tokens:
        training_set.tokenize = encoder.tokenize
    if encoder is not None and info.is_main and training_set.items.captions_at_hand:
        some = [text for index in spread(training_set, 2048)[:2048] for text in training_set.items[index].captions]
        warn_of_cut(encoder, some, lambda text: print(text, file=sys.stderr))
    held_out = None
    if len(validation_set):
        codec, encoder = codec.to(info.device), None if encoder is None else encoder.to(info.device)
        count = config.training.eval_samples
        seen = training_set.as_squares() if config.data.buckets else training_set
        held_out = prepare(validation_set, seen, codec, encoder, count=count, device=info.device)
    return Parts(training_set, codec, encoder, held_out)


def _from_cache(config: Config, sets: dict[str, TextImageDataset] | None, info: DistInfo) -> Parts:
    """Latents and text states from a cache: neither pictures nor encoders are opened. Where the pictures are on this
    disk, their sizes, times and captions must be those of the cache.
    """
    assert config.data.cache_dir is not None
    folder, error = Path(config.data.cache_dir), None
    manifest = read_manifest(folder)
    if info.is_main:
        try:
            refuse_other_settings(folder, manifest, config)
            if sets is not None:
                refuse_changed_pictures(folder, manifest, sets)
        except UserError as problem:
            error = problem
    raise_together(error)
    config.vae.content = manifest["pictures"]["vae_content"]
    config.text.content = manifest["texts"].get("text_content")
    training_set, validation_set = (CachedDataset(config, is_train=is_train) for is_train in (True, False))
    codec = cached_codec(config, Path(config.run.output_dir), info)
    encoder = make_text_encoder(config) if config.training.sample_prompts else None
    held_out = None
    if len(validation_set):
        codec, count = codec.to(info.device), config.training.eval_samples
        held_out = prepare_cached(validation_set, training_set, codec, count=count, device=info.device)
    return Parts(training_set, codec, encoder, held_out, null_text(folder))


@command
def main(argv: list[str] | None = None) -> None:
    """The command; see the head of the file."""
    config = load_config(Config, presets=PRESETS, argv=argv, default="small", description=__doc__)
    refuse_unused(config)
    if config.run.dry_run:
        print(plan_run(workload(config), config))
        return
    config.run.resume = "auto" if config.run.resume == "latest" else config.run.resume

    # the data come first: they are what most often is wrong. With a cache they may be gone.
    root = config.data.dataset_path
    is_gone = config.data.cache_dir is not None and (root is None or (root != "sample" and not Path(root).exists()))
    sets = None
    if not is_gone:
        sets = {split: TextImageDataset.from_config(config, is_train=split == "train") for split in SPLITS}
    info = init_distributed(config.run.device, 60 * config.run.timeout_minutes)
    # a folder in the guide's form becomes a checkpoint of ours later, and is looked at then
    preflight(config, info, metrics=VALIDATED, checks_resume=not is_guide_folder(Path(config.run.resume)))
    output_dir = Path(config.run.output_dir)
    going_on, model = from_main(_checkpoint_to_resume(config) if info.is_main else None), None
    if going_on is not None:
        _keep_pretrained(config, going_on)
    elif config.model.pretrained_path:  # read once, and before a codec is fitted: they may not fit
        model = _first_model(config, begins=True)
    guide_state = None
    if is_guide_folder(Path(config.run.resume)):  # likewise
        model = model or _first_model(config, begins=False)
        guide_state = read_guide_folder(Path(config.run.resume), model)
    if config.data.cache_dir is not None:
        parts = _from_cache(config, sets, info)
    else:
        assert sets is not None
        if info.is_main:
            _refuse_many_skipped(sets["train"], output_dir)
        parts = _from_pictures(config, sets, info)
    if info.is_main and config.data.cache_dir is not None:
        _refuse_many_skipped(parts.training_set, output_dir)
    if parts.held_out is None and info.is_main:
        print("no held-out pictures: no evaluation (set --val-fraction, or give the data a split)", file=sys.stderr)

    training = config.training
    accumulation = accumulation_steps(training, info.world)
    sizes = (len(parts.training_set), training.batch_size, info.world, accumulation, config.run.seed)
    if config.data.buckets and isinstance(parts.training_set, TextImageDataset):
        order: BatchPlan = BucketPlan(*sizes, bucket_N=parts.training_set.bucket_N)
    else:
        order = BatchPlan(*sizes, drop_last=training.drop_last)
    stream = MapStream(
        parts.training_set,
        order,
        info,
        collate=collate,
        num_workers=training.num_workers,
        prefetch_factor=training.prefetch_factor,
        bad_samples=output_dir / "bad_samples.jsonl",
    )
    _steps_from_epochs(config, order.steps_per_epoch)
    if info.is_main:
        _save_inputs(parts.training_set, output_dir / "samples")
    trainer = Trainer(
        model or built_once(lambda: _first_model(config, begins=False), config.run, info),
        parts.codec,
        parts.encoder,
        stream,
        config,
        info=info,
        held_out=parts.held_out,
        null_condition=parts.null,
        guide_state=guide_state,
    )
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full ({str(error).splitlines()[0]}); {OUT_OF_MEMORY}") from None
    shutdown()


if __name__ == "__main__":
    main()
