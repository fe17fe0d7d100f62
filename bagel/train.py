"""Train BAGEL on texts and pictures.

From nothing, on the sample data:   python bagel/train.py --config small --output-dir outputs/bagel
From the released weights:          python bagel/train.py --config 7b_lora --model_path DIR --train_data_path data.jsonl
Eight GPUs:                         scripts/train_bagel.sh --gpus 8 --config 7b --model_path DIR ...
The plan without a GPU:             python bagel/train.py --config 7b_nf4 --dry-run
The same command again resumes.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bagel.config import PRESETS, SAMPLE_DATA, Config, TrainingConfig
from shared.config import accumulation_steps, load_config
from shared.errors import UserError, command

if TYPE_CHECKING:
    import torch

    from bagel.data.tokenizer import Tokenizer
    from bagel.dataset import UnifiedGenerationDataset
    from bagel.model import Bagel
    from bagel.modules.vae import Autoencoder
    from shared.engine.dist import DistInfo
    from shared.loop import FitResult


class UnifiedTrainer:
    """What learns from what: the losses, the validation on fixed noise and times, the samples, the exports."""

    def __init__(
        self,
        config: Config,
        info: "DistInfo",
        model: "Bagel",
        autoencoder: "Autoencoder",
        tokenizer: "Tokenizer",
        train_set: "UnifiedGenerationDataset",
        val_set: "UnifiedGenerationDataset | None" = None,
    ):
        from bagel.objective import SpeedMeter

        self.config, self.info, self.model, self.tokenizer = config, info, model, tokenizer
        self.autoencoder = autoencoder.to(info.device)
        self.train_set, self.val_set = train_set, val_set
        self.speed = SpeedMeter(model.config, info)

    def losses(self, model: Any, batches: list[dict], step: int) -> Iterator[tuple["torch.Tensor", dict]]:
        """The joint loss of every micro-batch, pre-weighted by the tokens of the whole step."""
        from bagel.objective import joint_losses

        packs = [self.encoded(pack) for pack in batches]
        speed = self.speed.after_step(packs)
        for loss, metrics in joint_losses(model, packs, self.config.training, self.info.world):
            yield loss, {**metrics, **speed}

    def encoded(self, pack: dict[str, Any]) -> dict[str, Any]:
        """The pack with the latents of its pictures."""
        from bagel.objective import with_latents

        return with_latents(pack, self.autoencoder, self.model.config, together=self.config.data.pad_images_together)

    def validate(self, model: Any, step: int) -> dict[str, float]:
        """Losses of the held-out records, with the same noise and the same times in every validation."""
        from bagel.evaluation.validation import held_out_losses

        return held_out_losses(self, model)

    def sample(self, model: Any, step: int, folder: Path) -> None:
        """Pictures for held-out prompts and descriptions of held-out pictures; all ranks compute, rank 0 writes."""
        from bagel.evaluation.validation import write_samples

        write_samples(self, model, step, folder, most=self.config.training.sample_records)

    def export(self, folder: Path, weights: dict[str, "torch.Tensor"], ema: dict[str, "torch.Tensor"] | None) -> None:
        """Files of a checkpoint that others read: the adapter, or all trained weights as one plain file."""
        import torch

        from bagel.modules.lora import save_adapter

        chosen = ema or weights
        if self.config.model.use_lora:
            save_adapter(folder, chosen, self.config.model)
        else:
            torch.save({name: value.contiguous() for name, value in chosen.items()}, folder / "trained_model.pt")

    def train(self) -> "FitResult":
        """Run to the planned step."""
        import torch

        from bagel.data.stream import PackStream
        from bagel.modules.transformer import MoTDecoderLayer
        from bagel.modules.vit import EncoderLayer
        from shared.loop import fit, plan_steps

        config, training = self.config, self.config.training
        stream = PackStream(
            self.train_set,
            config.data,
            self.info,
            batch_size=training.batch_size,
            accumulation=accumulation_steps(training, self.info.world),
            collate=self.collate(),
            num_workers=training.num_workers,
            prefetch_factor=training.prefetch_factor,
            bad_samples=Path(config.run.output_dir) / "bad_samples.jsonl",
        )
        if training.warmup_ratio and not training.warmup_steps:
            training.warmup_steps = round(training.warmup_ratio * plan_steps(training, stream))
        self.model.checkpoint_layers(training.gradient_checkpointing)
        if training.compile:  # every pack has its own lengths: symbols from the first graph on
            torch._dynamo.config.assume_static_by_default = False
        return fit(
            config=config,
            info=self.info,
            model=self.model,
            stream=stream,
            losses=self.losses,
            validate=self.validate if self.val_set is not None else None,
            sample=self.sample if training.sample_records else None,
            export=self.export if training.export or config.model.use_lora else None,
            groups=parameter_groups(self.model, training),
            wrap_classes=(MoTDecoderLayer, EncoderLayer),
            checkpoint_name="step_{step}",
            title="BAGEL",
        )

    def collate(self) -> Any:
        """Samples to packs, with the configured chances of leaving conditions out."""
        from bagel.dataset import make_collate
        from bagel.packing import Dropout

        data = self.config.data
        dropout = Dropout(data.text_cond_dropout_prob, data.vit_cond_dropout_prob, data.vae_cond_dropout_prob)
        static = None if data.packing == "samples" else data.tokens_per_batch * self.config.training.batch_size
        return make_collate(self.train_set.layout, dropout, self.config.run.seed, static)


def parameter_groups(model: "Bagel", training: TrainingConfig) -> list[dict]:
    """Trainable parameters by their weight decay; that of the vision tower and the connector may be its own."""
    from bagel.model import SEEING
    from shared.optim import decay_groups

    decay, vision = training.weight_decay, training.vision_weight_decay
    parts = [(False, decay), (True, decay if vision is None else vision)]
    groups = [
        {**group, "names": [name for name in group["names"] if name.startswith(SEEING) == seeing]}
        for seeing, weight_decay in parts
        for group in decay_groups(model, weight_decay)
    ]
    return [group for group in groups if group["names"]]


def open_dataset(config: Config, model_config: Any, tokenizer: "Tokenizer", path: str) -> "UnifiedGenerationDataset":
    """The records of `path` under the settings of the run."""
    from bagel.data.layout import layout_of, transforms_of
    from bagel.dataset import UnifiedGenerationDataset

    data = config.data
    vae_transform, vit_transform = transforms_of(data, model_config)
    return UnifiedGenerationDataset(
        path,
        tokenizer=tokenizer,
        layout=layout_of(model_config, tokenizer),
        vae_transform=vae_transform,
        vit_transform=vit_transform,
        image_root=data.image_root,
        max_sequence_length=data.max_sequence_length,
        truncate_text=data.truncate_text,
        strict=data.strict_data,
        escape_special_tokens=data.escape_special_tokens,
        question_weight=data.question_weight,
        flip_probability=data.flip_probability,
        seed=config.run.seed,
    )


def report_quantization(model: "Bagel", output_dir: Path) -> None:
    """Print what the quantized projections save, and write the error of each to quantization.json."""
    from bagel.modules.quantization import stored_layers

    layers = stored_layers(model)
    if not layers:
        return
    before, after = (sum(layer[name] for layer in layers) / 1e9 for name in ("bytes_bf16", "bytes_stored"))
    worst = max(layers, key=lambda layer: layer["max_error"])
    print(
        f"{len(layers)} quantized projections: {after:.3f} GB in place of {before:.3f} GB in bf16; largest error "
        f"{worst['max_error']:.3g} in {worst['layer']}; all in {output_dir / 'quantization.json'}"
    )
    (output_dir / "quantization.json").write_text(json.dumps(layers, indent=1) + "\n")


def complete(config: Config) -> Config:
    """The settings with what follows from the files: the sample data for the small preset, the strategy of a DeepSpeed
    file.
    """
    if config.data.train_data_path is None:
        if not config.model.from_scratch:
            raise UserError("no data: give --train-data-path FILE (.jsonl, .json, .parquet or .tar)")
        config.data.train_data_path = str(SAMPLE_DATA / "train.jsonl")
        config.data.val_data_path = config.data.val_data_path or str(SAMPLE_DATA / "val.jsonl")
    if config.training.deepspeed:
        config.run.strategy = _deepspeed_strategy(Path(config.training.deepspeed), config.run.strategy)
    return config


def _deepspeed_strategy(path: Path, given: str | None) -> str:
    """zero1, zero2 or zero3 by the file's stage; its other keys are set by our own flags."""
    try:
        stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    except FileNotFoundError:
        raise UserError(f"--deepspeed {path}: no such file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--deepspeed {path}: expected JSON with zero_optimization.stage") from None
    if stage not in (1, 2, 3) or given not in (None, f"zero{stage}"):
        raise UserError(
            f"--deepspeed {path}: stage {stage!r} with --strategy {given}; use stage 1, 2 or 3 and leave --strategy out"
        )
    return f"zero{stage}"


def report_data(dataset: "UnifiedGenerationDataset", name: str, output_dir: Path) -> None:
    """Print what was found and write the faults."""
    found = dataset.describe()
    print(
        f"{name}: {found['records']} records {found['formats']}, targets {found['targets']}, tokens {found['length']}"
    )
    texts, images = found["targets"].get("texts", 0), found["targets"].get("images", 0)
    if min(texts, images) < 0.1 * max(texts, images):
        print(f"{name}: warning: {texts} texts and {images} pictures to learn; one kind is below a tenth of the other")
    if dataset.errors:
        dataset.write_errors(output_dir / f"data_errors_{name}.jsonl")
        print(f"{name}: {dataset.summary_of_errors()}\n  all are listed in {output_dir / f'data_errors_{name}.jsonl'}")


@command
def main(argv: list[str] | None = None) -> None:
    """Read the settings, check the data, train."""
    config = load_config(Config, presets=PRESETS, argv=argv, default="small", description=__doc__)
    if config.run.dry_run:
        from bagel.plan import print_plan

        print_plan(config)
        return
    config = complete(config)
    import torch

    from bagel.data.tokenizer import load_tokenizer
    from bagel.model import count_parameters
    from bagel.weights.pretrained import build_model, load_autoencoder, read_config
    from shared.engine.dist import init_distributed, shutdown
    from shared.engine.strategy import choose_precision

    info = init_distributed(config.run.device, config.run.timeout_minutes * 60)
    began, output_dir = time.perf_counter(), Path(config.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    precision = choose_precision(config.run.precision, info.device)
    model_config = read_config(config.model)
    tokenizer = load_tokenizer(model_config)
    train_set = open_dataset(config, model_config, tokenizer, config.data.train_data_path)
    val_set = (
        open_dataset(config, model_config, tokenizer, config.data.val_data_path) if config.data.val_data_path else None
    )
    torch.manual_seed(config.run.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    model = build_model(model_config, rows=tokenizer.vocab_size, dtype=dtype)
    if info.is_main:
        report_quantization(model, output_dir)
        for name, dataset in (("train", train_set), ("val", val_set)):
            if dataset is not None:
                report_data(dataset, name, output_dir)
        print(
            ", ".join(f"{name} {count:,}" for name, count in count_parameters(model).items())
            + f" (ready in {time.perf_counter() - began:.1f} s)"
        )
    trainer = UnifiedTrainer(config, info, model, load_autoencoder(model_config), tokenizer, train_set, val_set)
    result = trainer.train()
    shutdown()  # what follows is for rank 0 alone
    if info.is_main and result.finished:
        from bagel.weights.open import finish

        finish(config, model_config)


if __name__ == "__main__":
    main()
