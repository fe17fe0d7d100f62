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
from typing import TYPE_CHECKING, Any

from bagel.config import PRESETS, SAMPLE_DATA, Config
from shared.config import load_config
from shared.errors import UserError, command

if TYPE_CHECKING:
    from bagel.dataset import UnifiedGenerationDataset
    from bagel.model import Bagel


def __getattr__(name: str) -> Any:
    """`from bagel.train import UnifiedTrainer`: the class of the guide, without torch behind --help."""
    if name == "UnifiedTrainer":
        from bagel.objective import UnifiedTrainer

        return UnifiedTrainer
    raise AttributeError(name)


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
    from bagel.dataset import open_dataset
    from bagel.model import count_parameters
    from bagel.objective import UnifiedTrainer
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
