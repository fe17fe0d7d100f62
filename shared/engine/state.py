"""What a checkpoint holds of strategy and EMA, and how it comes back under any strategy and number of ranks."""

import importlib.metadata
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from shared.engine.checkpoint import load_weights, persistent_buffers
from shared.engine.ema import EMA
from shared.engine.strategy import MOMENTS, Strategy
from shared.errors import CheckpointError
from shared.tensorfile import TensorFile


def tensors_to_save(strategy: Strategy, ema: EMA | None) -> dict[str, tuple[list, Iterable[Tensor | None]]]:
    """File name -> (specs, values) for CheckpointStore.save; the values are gathered one by one when drawn."""
    names = list(strategy.parameters)
    buffers = persistent_buffers(strategy.module)
    weight_specs = [(name, strategy.shape(name), torch.float32) for name in names]
    model_specs = weight_specs + [(name, tuple(value.shape), value.dtype) for name, value in buffers.items()]
    steps = strategy.steps_taken()
    moments = [(name, kind) for name in names if name in steps for kind in MOMENTS]

    def model_values():
        yield from (strategy.full("weight", name) for name in names)
        yield from (value.detach().cpu() for value in buffers.values())

    files: dict = {"model.safetensors": (model_specs, model_values())}
    if ema is not None:
        files["ema.safetensors"] = (weight_specs, (ema.full(name) for name in names))
    files["optimizer.safetensors"] = (
        [(f"{name}.{kind}", strategy.shape(name), torch.float32) for name, kind in moments],
        (strategy.full(kind, name) for name, kind in moments),
    )
    return files


def trainer_state(strategy: Strategy, ema: EMA | None) -> dict:
    """The numbers that go with those tensors."""
    steps = strategy.steps_taken()
    return {
        "optimizer_steps": steps,
        "parameter_groups": [
            {key: group[key] for key in ("lr", "weight_decay", "betas", "eps") if key in group}
            for group in strategy.optimizer.param_groups
        ],
        "loss_scale": {"value": strategy.scale.value, "good_steps": strategy.scale.good_steps},
        "ema_updates": None if ema is None else ema.updates,
    }


def restore(folder: Path, trainer: dict, strategy: Strategy, ema: EMA | None, say: Callable[[str], None]) -> None:
    """Put a checkpoint's tensors into the strategy and the EMA; CheckpointError when the names or shapes do not fit."""
    model, names = TensorFile(folder / "model.safetensors"), list(strategy.parameters)
    buffers = persistent_buffers(strategy.module)
    _check_names(folder, model.names, {*names, *buffers})
    for name in names:
        _load(
            strategy.shape(name),
            model[name],
            name,
            folder,
            lambda value, name=name: strategy.load_full("weight", name, value),
        )
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(model[name])
    strategy.load_steps_taken(trainer["optimizer_steps"])
    optimizer = TensorFile(folder / "optimizer.safetensors")
    for name in names:
        for kind in MOMENTS:
            if f"{name}.{kind}" in optimizer.names:
                strategy.load_full(kind, name, optimizer[f"{name}.{kind}"])
    strategy.scale.value = trainer["loss_scale"]["value"]
    strategy.scale.good_steps = trainer["loss_scale"]["good_steps"]
    if ema is None:
        return
    if (folder / "ema.safetensors").exists():
        averaged = TensorFile(folder / "ema.safetensors")
        for name in names:
            ema.load_full(name, averaged[name])
        ema.updates = trainer["ema_updates"]
    else:
        say(f"{folder} holds no averaged weights; the average starts from the restored weights")
        for name in names:
            ema.load_full(name, model[name])


def restore_weights_only(path: Path, strategy: Strategy, ema: EMA | None, say: Callable[[str], None]) -> None:
    """Start from a file of weights: optimizer, average and position are not in it, which is said."""
    weights, names = load_weights(path, prefer_ema=False), list(strategy.parameters)
    weights = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in weights.items()}
    _check_names(path, set(weights), set(names), allow_more=True)
    for name in names:
        _load(
            strategy.shape(name),
            weights[name],
            name,
            path,
            lambda value, name=name: strategy.load_full("weight", name, value),
        )
        if ema is not None:
            ema.load_full(name, weights[name])
    say(f"weights taken from {path}; it holds no optimizer state, average or position: these start anew at step 0")


def versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "numpy")}


def _load(shape: tuple, value: Tensor, name: str, folder: Path, put: Callable[[Tensor], None]) -> None:
    if tuple(value.shape) != shape:
        raise CheckpointError(
            f"{folder}: {name} is {tuple(value.shape)}, this model has {shape}; "
            "use the settings of the checkpoint's config.yaml"
        )
    put(value)


def _check_names(folder: Path, found: set[str], wanted: set[str], allow_more: bool = False) -> None:
    missing, more = sorted(wanted - found), [] if allow_more else sorted(found - wanted)
    if missing or more:
        raise CheckpointError(
            f"{folder} does not fit this model: {len(missing)} weights missing {missing[:3]}, {len(more)} unexpected "
            f"{more[:3]}; use the settings of the checkpoint's config.yaml"
        )
