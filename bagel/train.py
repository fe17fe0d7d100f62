"""Train BAGEL on texts and pictures.

From nothing, on the sample data:   python bagel/train.py --config small --output-dir outputs/bagel
From the released weights:          python bagel/train.py --model_path DIR --train_data_path data.jsonl
  (the preset that fits DIR and the machine is taken and named; --config 7b, 7b_lora, 7b_nf4 or 7b_gen chooses)
Eight GPUs:                         scripts/train_bagel.sh --gpus 8 --config 7b --model_path DIR ...
The plan without a GPU:             python bagel/train.py --config 7b_nf4 --dry-run
The same command again resumes.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from bagel.config import PRESETS, SAMPLE_DATA, Config, ModelConfig
from shared.config import load_config, load_saved
from shared.errors import UserError, command
from shared.media.folders import files_in

if TYPE_CHECKING:
    from bagel.dataset import UnifiedGenerationDataset
    from bagel.model import Bagel

VALIDATED = {f"val/{name}" for name in ("loss", "text_loss", "image_loss")}


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


def completed(argv: list[str]) -> list[str]:
    """The command line with what a guide's command leaves out: weights without a preset get the preset that fits them,
    and the guide's defaults where the preset has others. Never random weights beside a folder that holds some.
    """
    found = {name: _given(argv, *names) for name, names in NAMES.items()}
    folder = found["model_path"]
    half = next((word.removeprefix("--") for word in argv if word in ("--fp16", "--bf16")), None)
    if half and not found["precision"]:
        argv = [*argv, "--precision", half]  # over the preset's
    if folder is None or found["config"] or {"-h", "--help"} & set(argv):
        return argv
    if found["from_scratch"]:
        return ["--config", "small", *argv]
    from bagel.weights.pretrained import fitting_preset, read_config

    read_config(ModelConfig(model_path=folder))  # says what is missing
    world = int(os.environ.get("WORLD_SIZE", "1"))
    preset, why = _preset_of_run(found["output_dir"]) or fitting_preset(Path(folder), world)
    defaults = {
        "text_loss_weight": "1.0", "lr_scheduler_type": "cosine", "accumulation": "8", "warmup": "0.03",
        "export": "true",
    }  # fmt: skip
    if world == 1:
        defaults["strategy"] = "none"
    missing = [word for name, value in defaults.items() if not found[name] for word in (f"--{NAMES[name][0]}", value)]
    if not found["warmup"]:
        missing += ["--warmup-steps", "0"]
    if os.environ.get("RANK", "0") == "0":
        print(f"no --config; {why}; with the guide's {' '.join(missing)}", flush=True)
    return ["--config", preset, *argv, *missing]


# Settings that a command line may name in several ways, the flag that is written first.
NAMES = {
    "config": ("config",),
    "model_path": ("model-path", "model.model-path"),
    "from_scratch": ("from-scratch", "model.from-scratch"),
    "tokenizer": ("tokenizer", "model.tokenizer"),
    "output_dir": ("output-dir", "logdir", "run.output-dir"),
    "precision": ("precision", "run.precision"),
    "strategy": ("strategy", "run.strategy", "deepspeed", "training.deepspeed"),
    "text_loss_weight": ("text-loss-weight", "ce-weight", "training.text-loss-weight"),
    "lr_scheduler_type": ("lr-scheduler-type", "lr-scheduler", "training.lr-scheduler-type"),
    "accumulation": ("gradient-accumulation-steps", "grad-accum", "training.gradient-accumulation-steps",
                     "global-batch-size", "training.global-batch-size"),
    "warmup": ("warmup-ratio", "training.warmup-ratio", "warmup-steps", "num-warmup-steps", "training.warmup-steps"),
    "export": ("export", "no-export", "training.export"),
}  # fmt: skip


def _given(argv: list[str], *names: str) -> str | None:
    """What follows a flag of any of these names, in either spelling, or stands in --set; "true" for a bare flag."""
    for place, word in enumerate(argv):
        if place and argv[place - 1] == "--set":
            word = f"--{word}"
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("_", "-") in names:
            following = argv[place + 1] if place + 1 < len(argv) else "--"
            return value if equals else "true" if following.startswith("--") else following
    return None


def _preset_of_run(output_dir: str | None) -> tuple[str, str] | None:
    """What the run in this folder was begun with, so that the same command goes on with it."""
    path = Path(output_dir or Config().run.output_dir) / "config.yaml"
    if not path.is_file():
        return None
    model = load_saved(Config, path).model
    preset = "7b_nf4" if model.quantization != "none" else "7b_lora" if model.use_lora else "7b"
    return preset, f"the run in {path.parent} goes on with preset {preset}"


def complete(config: Config, argv: list[str] | None = None) -> Config:
    """The settings with what follows from the files: the sample data for the small preset, the tokenizer of a folder,
    the strategy of a DeepSpeed file.
    """
    argv = argv or []
    model, data = config.model, config.data
    if model.from_scratch and model.model_path is not None:
        by_preset = not (_given(argv, "config") or "small").endswith((".yaml", ".yml"))
        asked = _given(argv, *NAMES["from_scratch"])
        if by_preset and not asked and _holds_weights(Path(model.model_path)):
            raise UserError(
                f"--model-path {model.model_path} holds weights, but this preset starts from random ones; leave out "
                "--config, or choose 7b, 7b_lora, 7b_nf4 or 7b_gen; to take only sizes and tokenizer of the folder, "
                "add --from-scratch"
            )
        if not _given(argv, *NAMES["tokenizer"]) and (Path(model.model_path) / "tokenizer.json").is_file():
            model.tokenizer = None
    own = data.train_data_path is not None and not data.train_data_path.startswith("scenes")
    if own and not _given(argv, "val-data-path", "data.val-data-path") and data.val_data_path == "scenes:unseen":
        data.val_data_path = None  # the preset's, which belongs to its own training data
    if data.train_data_path is None:
        if not model.from_scratch or model.model_path is not None:
            raise UserError("no data: give --train-data-path FILE (.jsonl, .json, .parquet or .tar, or a folder)")
        data.train_data_path = str(SAMPLE_DATA / "train.jsonl")
        data.val_data_path = data.val_data_path or str(SAMPLE_DATA / "val.jsonl")
    if config.training.deepspeed:
        config.run.strategy = _deepspeed_strategy(Path(config.training.deepspeed), config.run.strategy)
    return config


def _holds_weights(folder: Path) -> bool:
    return bool(files_in(folder, "*.safetensors", "*.safetensors.index.json"))


def _deepspeed_strategy(path: Path, given: str | None) -> Literal["zero1", "zero2", "zero3"]:
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
    zero: dict[int, Literal["zero1", "zero2", "zero3"]] = {1: "zero1", 2: "zero2", 3: "zero3"}
    return zero[stage]


def refuse_malformed(dataset: "UnifiedGenerationDataset", most: float) -> None:
    """Stop before anything is trained when more than a share of the records is malformed; one always may be."""
    bad, total = len(dataset.errors), len(dataset.errors) + len(dataset)
    if bad > max(1, most * total):
        raise UserError(
            f"{dataset.data_path}: {bad} of {total} records are malformed, more than {most:.1%} "
            f"(--max-malformed-share); mend them, or raise the share; python bagel/check_data.py lists them all\n  "
            f"{dataset.summary_of_errors()}"
        )


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
    argv = completed(list(sys.argv[1:] if argv is None else argv))
    config = load_config(Config, presets=PRESETS, argv=argv, default="small", description=__doc__)
    if config.run.dry_run:
        from bagel.plan import print_plan

        print_plan(config)
        return
    config = complete(config, argv)
    if config.run.wandb and find_spec("wandb") is None:
        if _given(argv, "wandb", "use-wandb", "run.wandb"):
            raise UserError("--wandb needs the package wandb: pip install wandb; or use --no-wandb")
        print(
            f"--wandb-project {config.run.wandb_project}: the package wandb is missing, nothing is logged there",
            flush=True,
        )
        config.run.wandb = False
    import torch

    from bagel.data.tokenizer import load_tokenizer
    from bagel.dataset import open_dataset
    from bagel.model import count_parameters
    from bagel.objective import UnifiedTrainer
    from bagel.weights.phases import prepare_autoencoder, prepare_tower
    from bagel.weights.pretrained import build_model, open_released, read_config
    from shared.engine.dist import init_distributed, shutdown
    from shared.engine.preflight import preflight
    from shared.engine.strategy import choose_precision

    # Everything that a user may have to mend is looked at before anything is written or built.
    info = init_distributed(config.run.device, config.run.timeout_minutes * 60)
    preflight(config, info, metrics=VALIDATED)
    began, output_dir = time.perf_counter(), Path(config.run.output_dir)
    precision = choose_precision(config.run.precision, info.device)
    model_config = read_config(config.model)
    tokenizer = load_tokenizer(model_config)
    paths = {"train": config.data.train_data_path, "val": config.data.val_data_path}
    copies = {"train": config.data.drawn_copies, "val": 1}
    sets = {
        name: open_dataset(config, model_config, tokenizer, path, copies=copies[name])
        for name, path in paths.items()
        if path
    }
    for dataset in sets.values():
        refuse_malformed(dataset, config.data.max_malformed_share)
    output_dir.mkdir(parents=True, exist_ok=True)
    autoencoder = prepare_autoencoder(config, model_config, sets["train"], info)
    torch.manual_seed(config.run.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    in_parts = open_released(model_config, rows=tokenizer.vocab_size) if config.run.strategy == "fsdp" else None
    model, first_values = in_parts or (build_model(model_config, rows=tokenizer.vocab_size, dtype=dtype), None)
    if in_parts is None:
        prepare_tower(config, model_config, model, sets["train"], info)
    if info.is_main:
        report_quantization(model, output_dir)
        for name, dataset in sets.items():
            report_data(dataset, name, output_dir)
        print(
            ", ".join(f"{name} {count:,}" for name, count in count_parameters(model).items())
            + f" (ready in {time.perf_counter() - began:.1f} s)"
        )
    trainer = UnifiedTrainer(config, info, model, autoencoder, tokenizer, sets["train"], sets.get("val"), first_values)
    result = trainer.train()
    shutdown()  # what follows is for rank 0 alone
    if info.is_main and result.finished:
        from bagel.weights.open import finish

        finish(config, model_config)


if __name__ == "__main__":
    main()
