"""Settings: pydantic sections, YAML presets, and command-line flags generated from the same schema.

Precedence: built-in default < preset or file given by --config < flags. No torch is imported: `--help` is quick.
"""

import difflib
import hashlib
import json
import os
import re
import sys
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from shared.errors import UserError, write_text
from shared.flags import Leaf as Leaf
from shared.flags import (
    StrictLoader,
    accepts_bool,
    extra_of,
    from_text,
    full_key,
    is_blank,
    leaves_of,
    make_parser,
    put,
    section_of,
    take_out,
    unknown_flag,
)

T = TypeVar("T", bound=BaseModel)
_PLACE = re.compile(r"(?:^|[._])(?:device|paths?|dirs?|root|folder|file|ckpt|cache|images?_root)$")
_ABSENT = object()
# The largest values that a batch, a count of epochs and one of steps may have: above these a plan's integers overflow
# or its time is spent on counting, so a slip of the keyboard is refused with the setting's name.
MAX_BATCH, MAX_EPOCHS, MAX_STEPS = 10**6, 10**6, 10**12
STRATEGIES = ("none", "ddp", "fsdp", "zero1", "zero2", "zero3")


def setting(
    default: Any,
    help: str,
    *flags: str,
    hidden: bool = False,
    fixed: bool = False,
    common: bool = False,
    instead_of: Collection[str] = (),
    **limits: Any,
) -> Any:
    """A field with its help text.

    flags: further names, on the command line and in YAML. hidden: no flag. fixed: may not change when a run resumes.
    common: --help names it among the first. instead_of: settings of the same section that a flag for this one takes out
    of the preset. limits: pydantic's ge, gt, le, lt. A mutable default is copied for every instance.
    """
    extra: Any = {
        "flags": list(flags),
        "hidden": hidden,
        "fixed": fixed,
        "common": common,
        "instead_of": list(instead_of),
    }
    if isinstance(default, (list, dict)):
        return Field(
            default_factory=lambda: type(default)(default), description=help, json_schema_extra=extra, **limits
        )
    return Field(default=default, description=help, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A group of settings. Unknown keys, NaN and values out of range are refused; behaves as a mapping for reading."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, validate_assignment=True, allow_inf_nan=False, protected_namespaces=()
    )
    fixed_on_resume: typing.ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _accept_other_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(values.get(name), bool) and not accepts_bool(field.annotation):
                raise ValueError(
                    f"{name} is {values[name]}, which YAML also reads from yes, no, on and off; give a value"
                )
            for other in extra_of(field).get("flags", ()):
                if other in values and other not in cls.model_fields:
                    if name in values:
                        raise ValueError(f"'{name}' and '{other}' are two names of one setting; give one of them")
                    values[name] = values.pop(other)
        return values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the section has no such key."""
        return getattr(self, key) if key in type(self).model_fields else default

    def __getitem__(self, key: str) -> Any:
        if key not in type(self).model_fields:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in type(self).model_fields


class RunSection(Section):
    """Where and how a run executes. The seed decides its draws, precision and strategy its rounding; the rest changes
    nothing that is learned.
    """

    output_dir: str = setting(
        "outputs/run", "folder that receives the run: config, logs, checkpoints, samples, report", "logdir"
    )
    seed: int = setting(42, "seed of data order, noise and initial weights", fixed=True, ge=0, le=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    strategy: Literal["none", "ddp", "fsdp", "zero1", "zero2", "zero3"] | None = setting(
        None, "how ranks share the work; null: ddp on several ranks, none on one"
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = setting(
        None, "null: bf16 where the device multiplies it natively, else fp32; fp16 needs CUDA"
    )
    resume: str = setting(
        "auto",
        "auto: newest complete checkpoint of output_dir; none: start again from step 0; or a checkpoint's path",
        "resume_from_checkpoint",
    )
    allow_data_change: bool = setting(False, "resume although the list of samples differs from the saved one")
    dry_run: bool = setting(False, "print the plan (parameters, FLOPs, memory, communication, time) and stop")
    world_size: int | None = setting(None, "ranks to plan for; null: the ranks of this launch", ge=1, le=10**6)
    gpu: str | None = setting(None, "GPU to plan for, such as a100, h100, h200, 4090; null: a100")
    gpus_per_node: int = setting(8, "GPUs of a node to plan for: above it ranks talk over the network", ge=1)
    plan_table: bool = setting(False, "with dry_run: a table over strategies, micro-batches and up to world_size GPUs")
    time_limit_minutes: float | None = setting(None, "save and stop after this many minutes", gt=0)
    timeout_minutes: float = setting(10.0, "longest wait of one rank for the others, minutes", gt=0)
    tensorboard: bool = setting(False, "write TensorBoard event files next to metrics.jsonl")
    wandb: bool = setting(False, "log to Weights & Biases (pip install wandb)", "use_wandb")
    wandb_project: str = setting("trainings", "Weights & Biases project")
    run_name: str | None = setting(None, "name of the run in Weights & Biases", "wandb_run_name")
    cpu_offload: bool = setting(
        False, "fsdp and zero: keep weights and optimizer state in host memory", "fsdp_cpu_offload"
    )
    fsdp_replicas: int = setting(
        1,
        "fsdp: copies of the model, such as one a node; a copy's ranks shard it, gradients are averaged over copies",
        ge=1,
    )
    ddp_bf16: bool = setting(False, "ddp: gradients are averaged in bf16: half the traffic, 8 bits of mantissa")
    check_gradients_every: int = setting(
        1000,
        "compare over ranks which parameters have gradients: at the first step and every so many steps; 0: never",
        ge=0,
    )


class TrainingSection(Section):
    """The loop's settings; each system subclasses it to set its defaults and add its own."""

    batch_size: int = setting(32, "samples per rank and micro-step", ge=1, le=MAX_BATCH)
    global_batch_size: int | None = setting(
        None, "samples of one optimizer step over all ranks; fixes the accumulation", ge=1, le=10**7
    )
    gradient_accumulation_steps: int = setting(
        1, "micro-steps of one optimizer step when global_batch_size is null", "grad_accum", ge=1, le=MAX_BATCH
    )
    reduce_each_micro_step: bool = setting(
        False,
        "fsdp: scatter gradients in every micro-step (less memory) instead of only in the last (less traffic)",
    )
    allow_tf32: bool = setting(True, "fp32 products on a GPU may use TF32: about 8 times faster, 10 bits of mantissa")
    num_epochs: int | None = setting(
        100,
        "passes over the data; used when total_steps is null; as a flag it takes the place of the preset's total_steps",
        "epochs",
        "num_train_epochs",
        instead_of=("total_steps",),
        ge=1,
        le=MAX_EPOCHS,
    )
    total_steps: int | None = setting(
        None, "planned optimizer steps, the length of the schedule; null: num_epochs", ge=1, le=MAX_STEPS
    )
    max_steps: int | None = setting(None, "stop after this many optimizer steps; does not bend the schedule", ge=1)
    optimizer: Literal["adamw"] = setting("adamw", "optimizer", fixed=True)
    learning_rate: float = setting(1e-4, "peak learning rate", "lr", ge=0, le=100)
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices", ge=0)
    adam_beta1: float = setting(0.9, "AdamW beta 1", "beta1", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "AdamW beta 2", "beta2", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "AdamW epsilon", "eps", gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = setting(
        "cosine", "shape after the warm-up; wsd: constant, then linear to the minimum in the last fifth", "lr_scheduler"
    )
    warmup_steps: int = setting(0, "steps of linear warm-up", "num_warmup_steps", ge=0, le=MAX_STEPS)
    min_lr_ratio: float = setting(0.0, "last learning rate as a share of the peak", ge=0, le=1)
    max_grad_norm: float | None = setting(1.0, "clip the gradient norm to this; null: no clipping", "grad_clip", ge=0)
    ema_decay: float = setting(0.0, "decay of the weights' moving average; 0: off", ge=0, lt=1)
    ema_warmup: bool = setting(
        True, "decay min(ema_decay, (1+n)/(10+n)), so that short runs do not average their start"
    )
    logging_steps: int = setting(50, "optimizer steps between log lines", "log_every", ge=1)
    save_steps: int | None = setting(
        500, "optimizer steps between checkpoints; null: only at the end", "save_every", ge=1
    )
    save_every_n_epochs: int | None = setting(
        None, "epochs between checkpoints that are never deleted, besides save_steps", ge=1
    )
    eval_steps: int | None = setting(
        500, "optimizer steps between validations; null: only at the end", "eval_every", ge=1
    )
    sample_steps: int | None = setting(
        None, "optimizer steps between sample pictures; null: only at the end", "sample_every", ge=1
    )
    save: bool = setting(True, "write checkpoints; without them a run cannot resume")
    save_in_background: bool = setting(
        True, "copy the state to host memory (16 bytes a trainable parameter) and write while training goes on"
    )
    shard_checkpoints_above_gb: float | None = setting(
        20.0,
        "larger checkpoints are written by every rank its own rows, into files of its own, if there are several ranks; "
        "null: always rank 0 alone, into one file",
        ge=0,
    )
    keep_last: int | None = setting(
        2, "newest whole checkpoints kept, besides the best one; null: all", "save_total_limit", ge=2
    )
    keep_every: int | None = setting(None, "also keep the checkpoints at multiples of this step", ge=1)
    best_metric: str = setting("val/loss", "metric that decides which checkpoint is best")
    best_mode: Literal["min", "max"] = setting("min", "whether the best metric is the smallest or the largest")
    early_stopping_patience: int | None = setting(
        None, "stop after this many validations without a better best_metric", ge=1
    )
    early_stopping_min_delta: float = setting(0.0, "smallest gain of best_metric that counts as better", ge=0)
    num_workers: int = setting(0, "loader processes per rank", "workers", ge=0)
    prefetch_factor: int = setting(2, "batches that each loader process reads ahead", ge=1, le=1000)
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass to save memory")
    keep_products: bool = setting(
        False, "with gradient_checkpointing: keep what matrix products and attention gave; more memory, less time"
    )
    compile: bool = setting(False, "torch.compile each block", "torch_compile")
    float8: bool = setting(
        False, "with compile and bf16: the blocks' linear layers multiply in float8 (torchao; H100, L40S, RTX 4090)"
    )


def accumulation_steps(training: TrainingSection, world: int) -> int:
    """Micro-steps of one optimizer step on `world` ranks.

    UserError where batch_size x world does not divide global_batch_size; it names values that would do.
    """
    if training.global_batch_size is None:
        return training.gradient_accumulation_steps
    micro = training.batch_size * world
    if training.global_batch_size % micro:
        per_rank = training.global_batch_size // world
        fits = [size for size in range(1, per_rank + 1) if training.global_batch_size % (size * world) == 0]
        advice = f"use --batch-size {', '.join(map(str, fits[-4:]))}" if fits else f"no batch size fits {world} ranks"
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not divisible by batch_size "
            f"{training.batch_size} x {world} ranks = {micro}; {advice}, or --global-batch-size "
            f"{micro * max(1, round(training.global_batch_size / micro))}"
        )
    return training.global_batch_size // micro


def writes_shards(training: TrainingSection, trainable: int, world: int) -> bool:
    """Whether a checkpoint of so many trainable numbers is written by every rank its own rows."""
    limit = training.shard_checkpoints_above_gb
    return limit is not None and world > 1 and checkpoint_bytes(training, trainable) > 1e9 * limit


def checkpoint_bytes(training: TrainingSection, trainable: int) -> int:
    """Weights, two moments and the average where there is one, in fp32."""
    return 4 * trainable * (3 + (training.ema_decay > 0))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; a UserError names the file and line of what cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":  # YAML knows neither tabs between values nor the escaped slash
            text = re.sub(r"(\\.)|\t", lambda found: {None: " ", "\\/": "/"}.get(found[1], found[0]), text)
        tree = yaml.load(text, StrictLoader)  # noqa: S506  (a SafeLoader)
    except RecursionError:
        raise UserError(f"{path}: not readable as YAML: nested too deeply") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; a YAML file is expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections with keys, found {type(tree).__name__}")
    return tree


def load_config(
    schema: type[T],
    *,
    presets: Path | None = None,
    argv: list[str] | None = None,
    default: str | None = None,
    description: str | None = None,
    aliases: dict[str, str] | None = None,
    given: set[str] | None = None,
) -> T:
    """Read --config PRESET|FILE.yaml and the flags of `schema` into a validated `schema`.

    aliases maps further flag spellings onto existing ones, e.g. {"--config_path": "--config"}. given: receives the
    dotted names of the settings that the command line gave. Errors are UserErrors.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    leaves = list(leaves_of(schema))
    parser = make_parser(leaves, description, presets, default, aliases or {})
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise unknown_flag(unknown[0], leaves)
    flags = vars(known)
    tree, where = {}, "command line"
    chosen = flags.pop("--config", default)
    if chosen is not None and presets is not None:
        path = _preset_path(chosen, presets)
        tree, where = read_yaml(path), str(path)
    for assignment in flags.pop("--set", None) or ():
        key, separator, value = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment}: expected section.key=value")
        flags[full_key(key, leaves)] = value
    by_path = {leaf.path: leaf for leaf in leaves}
    for name, value in flags.items():
        if is_blank(value, by_path[name]):
            flag = name.rpartition(".")[2].replace("_", "-")
            raise UserError(f"--{flag} is empty, as with a shell variable that is not set; give one, or leave it out")
        put(tree, name, from_text(value, by_path[name].annotation), schema)
        section = name.rpartition(".")[0]
        for other in extra_of(by_path[name].field).get("instead_of", ()):
            if f"{section}.{other}" not in flags:  # the preset's; --num-epochs would be ignored next to its total_steps
                take_out(tree, f"{section}.{other}", schema)
    if given is not None:
        given.update(flags)
    config = validate(schema, tree, where, flags=flags)
    if os.environ.get("CHECK_ARGUMENTS"):  # of scripts/launch.sh, before it starts many processes
        raise SystemExit(0)
    return config


def validate(schema: type[T], tree: dict, where: str, *, flags: Collection[str] = ()) -> T:
    """Validate once; every fault in one UserError, one per line, with the nearest valid key for an unknown one.

    where: the file of the tree. flags: dotted names that the command line gave.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [f"{_source(item['loc'], where, flags)}: {_fault(item, schema)}" for item in error.errors()]
        raise UserError("\n       ".join(lines)) from None


def save_config(config: BaseModel, path: Path) -> None:
    """Write the resolved settings as YAML, aside and renamed."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def load_saved(schema: type[T], path: Path) -> T:
    """The settings that save_config wrote; a UserError says so where they are another system's."""
    tree = read_yaml(Path(path))
    try:
        return validate(schema, tree, str(path))
    except UserError:
        if others := foreign_settings(schema, tree):
            raise UserError(
                f"{path}: not of this system (its model has {others}); give a run that this system's train.py made"
            ) from None
        raise


def foreign_settings(schema: type[BaseModel], tree: dict) -> list[str]:
    """Some names of a saved `model` section of which this schema knows less than half; else none."""
    saved, field = tree.get("model"), schema.model_fields.get("model")
    own = field.annotation if field is not None else schema
    known = set(getattr(own, "model_fields", {}))
    return sorted(saved)[:3] if isinstance(saved, dict) and len(known & set(saved)) < len(saved) / 2 else []


def config_digest(config: BaseModel) -> str:
    """SHA-256 of the settings that may not change on resume."""
    return hashlib.sha256(json.dumps(fixed_settings(config), sort_keys=True).encode()).hexdigest()


def fixed_settings(config: BaseModel) -> dict[str, Any]:
    """Dotted names and values of every setting that may not change when a run resumes."""
    fixed = {leaf.path for leaf in leaves_of(type(config)) if leaf.fixed}
    return {name: value for name, value in flat_settings(config).items() if name in fixed}


def flat_settings(config: BaseModel, tree: dict | None = None) -> dict[str, Any]:
    """Dotted name -> value of every setting; of `tree`, such as a saved config.yaml, those that stand in it."""
    tree = config.model_dump(mode="json") if tree is None else tree
    found = {}
    for leaf in leaves_of(type(config)):
        node: Any = tree
        for part in leaf.path.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            found[leaf.path] = node
    return found


def is_place(name: str) -> bool:
    """Whether a setting says where something lies or which device is used: that may differ between nodes."""
    return bool(_PLACE.search(name))


def check_resume(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Sentences on the fixed settings that differ; empty when the run may resume."""
    return [
        f"{key} was {saved[key]!r}, is {current[key]!r}"
        for key in current
        if key in saved and saved[key] != current[key]
    ]


def _preset_path(chosen: str, presets: Path) -> Path:
    if chosen.lower().endswith((".yaml", ".yml", ".json")) or os.sep in chosen:
        path = Path(chosen)
        return path if path.exists() or not (presets / path.name).exists() or os.sep in chosen else presets / path.name
    path = presets / f"{chosen}.yaml"
    if not path.exists():
        known = sorted(item.stem for item in presets.glob("*.yaml"))
        near = difflib.get_close_matches(chosen, known, 1)
        raise UserError(
            f"--config {chosen}: no such preset{f'; did you mean {near[0]}?' if near else ''} "
            f"(presets: {', '.join(known)}; or give a .yaml file)"
        )
    return path


def _source(location: tuple, where: str, flags: Collection[str]) -> str:
    """Where a faulty value stands: among the flags, in the file, or in either for a fault of a whole section."""
    path = ".".join(map(str, location))
    if any(f"{path}.".startswith(f"{flag}.") for flag in flags):
        return "command line"
    mixed = where != "command line" and any(not path or flag.startswith(f"{path}.") for flag in flags)
    return f"command line or {where}" if mixed else where


def _fault(item: ErrorDetails, schema: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        *parents, key = [str(part) for part in item["loc"]]
        node: type[BaseModel] | None = schema
        for parent in parents:
            node = section_of(node.model_fields[parent].annotation) if node and parent in node.model_fields else None
        near = difflib.get_close_matches(key, list(node.model_fields) if node else [], 1)
        return f"{path}: unknown setting{f'; did you mean {near[0]}?' if near else ''}"
    if item["type"] == "invalid_key":
        return (
            f"{item['input']!r} is no text, as a key must be; YAML reads bare on, off, yes, no and numbers so: quote it"
        )
    if item["type"] == "model_type":
        return f"{path}: expected a section with keys (got {item['input']!r})"
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message} (got {item['input']!r})"
