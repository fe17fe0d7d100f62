"""The guide's form of a checkpoint: model.pt, optimizer.pt, scheduler.pt, training_state.json in one folder.

Written next to ours on request (training.guide_files), and read back: such a folder becomes a checkpoint of ours, which
any strategy and number of ranks resumes from. Everything is read with weights_only=True.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit.config import Config
from shared.config import fixed_settings
from shared.data import MapStream
from shared.engine.checkpoint import (
    CheckpointStore,
    frozen_digest,
    load_strict,
    load_tensors,
    persistent_buffers,
    read_weights_file,
)
from shared.engine.dist import DistInfo
from shared.engine.state import RunState, versions
from shared.errors import UserError, write_text, written_aside

MODEL, OPTIMIZER, SCHEDULER, STATE = "model.pt", "optimizer.pt", "scheduler.pt", "training_state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_guide_folder(path: Path) -> bool:
    """Whether a folder is a checkpoint in the guide's form alone."""
    return (path / MODEL).is_file() and not (path / "manifest.json").exists()


def trained_names(model: nn.Module) -> list[str]:
    """The parameters in the order in which torch numbers them."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def write_guide_files(folder: Path, model: nn.Module, config: Config, steps_per_epoch: int) -> None:
    """Add the four files to a checkpoint of ours that is being written."""
    weights, moments = load_tensors(folder, "model"), load_tensors(folder, "optimizer")
    trainer = json.loads((folder / "trainer.json").read_text())
    state = trainer["run_state"]
    names, taken = trained_names(model), trainer["optimizer_steps"]
    group = {**trainer["parameter_groups"][0], "weight_decay": config.training.weight_decay}
    optimizer = {
        "state": {
            number: {"step": torch.tensor(float(taken[name]))} | {kind: moments[f"{name}.{kind}"] for kind in MOMENTS}
            for number, name in enumerate(names)
            if f"{name}.exp_avg" in moments
        },
        "param_groups": [{**group, "params": list(range(len(names)))}],
    }
    write_guide_folder(folder, weights, optimizer, step=state["step"], steps_per_epoch=steps_per_epoch, config=config)


def write_guide_folder(
    folder: Path, weights: dict[str, Tensor], optimizer: dict | None, *, step: int, steps_per_epoch: int, config: Config
) -> None:
    """The four files; without an optimizer's state only model.pt and training_state.json."""
    contents: dict[str, Any] = {MODEL: weights}
    if optimizer is not None:
        contents |= {OPTIMIZER: optimizer, SCHEDULER: {"last_epoch": step, "type": config.training.lr_scheduler_type}}
    for name, content in contents.items():
        with written_aside(folder / name) as temporary:
            torch.save(content, temporary)
    epoch = step // steps_per_epoch if steps_per_epoch else 0
    write_text(folder / STATE, json.dumps({"epoch": epoch, "global_step": step, "version": 1}, indent=1) + "\n")


def read_guide_weights(folder: Path, model: nn.Module) -> None:
    """Put model.pt into the model."""
    state = read_weights_file(folder / MODEL)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{folder / MODEL}: a state dict, names to tensors, is expected")
    state = {name.removeprefix("_orig_mod.").removeprefix("module."): value for name, value in state.items()}
    for name, own in model.state_dict().items():
        if name in state and own.is_floating_point() and not _is_finite(state[name]):
            raise UserError(f"{folder / MODEL}: {name} holds numbers that are no finite decimal ones; copy it again")
    load_strict(model, state, what=str(folder / MODEL))


def _is_finite(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.isfinite().all())


class GuideState(NamedTuple):
    """What a folder of the guide holds beside its weights: AdamW's moments by name, the steps that each parameter has
    taken, and how far the run is, in steps or, where the file tells no more, in complete epochs.
    """

    folder: Path
    moments: dict[str, Tensor]
    taken: dict[str, int]
    steps: int
    epochs: int


def read_guide_folder(folder: Path, model: nn.Module) -> GuideState:
    """Put the weights into the model and return the rest. UserError: files that are damaged or of another model."""
    read_guide_weights(folder, model)
    return GuideState(folder, *_moments(folder, model), *_steps_and_epochs(folder / STATE))


def adopt(found: GuideState, config: Config, model: nn.Module, stream: MapStream, info: DistInfo) -> Path:
    """Turn what read_guide_folder() found, with the weights that it left in the model, into a checkpoint of ours in the
    run's folder; all ranks call it. Returns its place. What is absent starts anew, which is said.
    """
    folder, step = found.folder, found.steps + found.epochs * stream.plan.steps_per_epoch
    for name, what in ((STATE, "the run starts at step 0"), (OPTIMIZER, "the optimizer starts anew")):
        if info.is_main and not (folder / name).is_file():
            print(f"warning: {folder} holds no {name}; {what}", file=sys.stderr)
    run_state = RunState(
        step=step,
        samples_seen=step * stream.samples_per_step,
        data_step=step,
        fingerprint=stream.fingerprint,
        global_batch=stream.samples_per_step,
    )
    training = config.training
    group = {"lr": training.learning_rate, "betas": [training.adam_beta1, training.adam_beta2]}
    trainer = {
        "optimizer_steps": found.taken,
        "parameter_groups": [{**group, "eps": training.adam_epsilon, "weight_decay": training.weight_decay}],
        "loss_scale": {"value": 1.0, "good_steps": 0},
        "ema_updates": 0,
        "run_state": vars(run_state),
        "fixed_settings": fixed_settings(config),
    }
    buffers = persistent_buffers(model)
    parameters = dict(model.named_parameters())
    weights = [(name, parameters[name].detach()) for name in trained_names(model)] + list(buffers.items())
    tensors = {"model.safetensors": weights, "optimizer.safetensors": list(found.moments.items())}
    store = CheckpointStore(Path(config.run.output_dir) / "checkpoints", info, keep_last=1_000_000)
    return store.save(
        f"{folder.name}-of-the-guide",
        step=run_state.step,
        trainer=trainer,
        tensors={
            file: ([(name, tuple(value.shape), value.dtype) for name, value in pairs], (value for _, value in pairs))
            for file, pairs in tensors.items()
        },
        meta={"frozen_sha256": frozen_digest(model), "versions": versions()},
    )


def _steps_and_epochs(path: Path) -> tuple[int, int]:
    """global_step, or 0 and the complete epochs where a training_state.json has none."""
    if not path.is_file():
        return 0, 0
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        name = "global_step" if "global_step" in tree else "epoch"
        count = tree.get(name, 0)
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} is {count!r}")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: epoch and global_step, whole numbers, are expected ({error})") from None
    return (count, 0) if name == "global_step" else (0, count)


def _moments(folder: Path, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """AdamW's moments by name, and the steps that each parameter has taken; none where the folder has no optimizer."""
    moments: dict[str, Tensor] = {}
    taken: dict[str, int] = {}
    if not (folder / OPTIMIZER).is_file():
        return moments, taken
    optimizer, names = read_weights_file(folder / OPTIMIZER), trained_names(model)
    try:
        order = [number for group in optimizer["param_groups"] for number in group["params"]]
        held = optimizer["state"]
        for name, number in zip(names, order, strict=True):
            if number not in held:
                continue
            taken[name] = int(held[number]["step"])
            if taken[name] < 0:
                raise ValueError(f"{name} has taken {taken[name]} steps")
            for kind in MOMENTS:
                value, wanted = held[number][kind], tuple(model.get_parameter(name).shape)
                if tuple(value.shape) != wanted:
                    raise ValueError(f"{kind} of {name} is {tuple(value.shape)}, {wanted} is wanted")
                if not _is_finite(value):
                    raise ValueError(f"{kind} of {name} holds numbers that are no finite decimal ones")
                moments[f"{name}.{kind}"] = value.float()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(
            f"{folder / OPTIMIZER}: not the state of an AdamW over this model's {len(names)} parameters ({error}); "
            "remove the file to start the optimizer anew"
        ) from None
    return moments, taken
