"""What a checkpoint holds of strategy and EMA, and how it comes back under any strategy and number of ranks."""

import functools
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.config import check_resume, config_digest, fixed_settings, save_config
from shared.data import Stream
from shared.engine.checkpoint import CheckpointStore, TensorFile, find_checkpoint, load_weights, persistent_buffers
from shared.engine.dist import barrier, from_main
from shared.engine.strategy import EMA, MOMENTS, Strategy
from shared.errors import CheckpointError, UserError


def tensors_to_save(strategy: Strategy, ema: EMA | None) -> dict[str, tuple[list, Iterable[Tensor]]]:
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
            functools.partial(strategy.load_full, "weight", name),
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
            functools.partial(strategy.load_full, "weight", name),
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


# Where a run goes on, and what a save puts into a checkpoint.


@dataclass
class RunState:
    """The numbers that a resumed run continues from."""

    step: int = 0
    samples_seen: int = 0
    data_step: int = 0  # the stream's step; differs from `step` after a change of the global batch
    skipped: int = 0  # in a row
    best: float | None = None
    best_name: str | None = None
    validations_without_gain: int = 0
    stream: dict | None = None
    fingerprint: str | None = None
    global_batch: int | None = None


def resume(
    config: Any,
    strategy: Strategy,
    ema: EMA | None,
    store: CheckpointStore,
    stream: Stream,
    frozen: str | None,
    say: Callable[[str], None],
) -> RunState:
    """The state to continue from; weights, moments and averages are put into place."""
    wish = config.run.resume
    samples_per_step, fingerprint = stream.samples_per_step, stream.fingerprint
    if wish == "none":
        _set_aside(store, say)
        return RunState(fingerprint=fingerprint, global_batch=samples_per_step)
    if wish == "auto":
        folder, passed_over = store.newest_valid()
        for sentence in passed_over:
            say(f"passed over {sentence}")
    else:
        path = Path(wish)
        if path.is_file():
            restore_weights_only(path, strategy, ema, say)
            return RunState(fingerprint=fingerprint, global_batch=samples_per_step)
        folder = find_checkpoint(path)
    if folder is None:
        return RunState(fingerprint=fingerprint, global_batch=samples_per_step)
    trainer = json.loads((folder / "trainer.json").read_text())
    differing = check_resume(trainer["fixed_settings"], fixed_settings(config))
    if differing:
        raise UserError(
            f"{folder} was made with other settings: {'; '.join(differing)}; use the same, or another --output-dir"
        )
    _check_base(folder, from_main(frozen))
    state = RunState(**trainer["run_state"])
    if fingerprint != state.fingerprint and not config.run.allow_data_change:
        raise UserError(
            f"{folder} was trained on another list of samples (fingerprint {state.fingerprint}, now {fingerprint}); "
            "use the same data, or --allow-data-change"
        )
    state.fingerprint = fingerprint
    if state.global_batch != samples_per_step:
        say(
            f"one optimizer step now takes {samples_per_step} samples, before it took {state.global_batch}; "
            f"the data go on after {state.samples_seen} samples "
            f"(--global-batch-size {state.global_batch} would keep the run the same)"
        )
        state.data_step, state.stream = state.samples_seen // samples_per_step, None
        state.global_batch = samples_per_step
    restore(folder, trainer, strategy, ema, say)
    say(f"resumed from {folder} at step {state.step}")
    return state


def _set_aside(store: CheckpointStore, say: Callable[[str], None]) -> None:
    if store.info.is_main and store.listed():
        aside = store.root.with_name(f"{store.root.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        store.root.rename(aside)
        say(f"starting anew as asked; the former checkpoints lie in {aside}")
    barrier()


def _check_base(folder: Path, frozen: str | None) -> None:
    saved = json.loads((folder / "manifest.json").read_text()).get("frozen_sha256")
    if saved != frozen:
        raise UserError(
            f"{folder} was trained on another frozen base (SHA-256 {str(saved)[:12]}, now {str(frozen)[:12]}); "
            "give the same base weights"
        )


def checkpoint_folder_name(state: RunState, stream: Stream, name: str, epoch_name: str | None) -> str:
    """The templates filled in; epoch_name counts where a step ends an epoch."""
    per_epoch = stream.steps_per_epoch
    if epoch_name is not None and per_epoch and state.step % per_epoch == 0:
        return epoch_name.format(step=state.step, epoch=state.step // per_epoch)
    return name.format(step=state.step, epoch=state.step // per_epoch if per_epoch else 0)


def save_run(
    name: str,
    config: Any,
    state: RunState,
    strategy: Strategy,
    ema: EMA | None,
    store: CheckpointStore,
    frozen: str | None,
    export: Callable | None,
) -> Path:
    """Write a checkpoint of the run as it is; a collective."""
    trainer = {**trainer_state(strategy, ema), "run_state": vars(state) | {}, "fixed_settings": fixed_settings(config)}
    whole = None
    if export is not None:  # a guide's own files want all weights at once
        weights = {key: strategy.full("weight", key).clone() for key in strategy.parameters}
        averaged = None if ema is None else {key: ema.full(key).clone() for key in strategy.parameters}
        whole = (weights, averaged)

    def extra(folder: Path) -> None:
        save_config(config, folder / "config.yaml")
        if export is not None and whole is not None:
            export(folder, *whole)

    meta = {
        "world": strategy.info.world,
        "strategy": strategy.name,
        "precision": strategy.precision,
        "config_sha256": config_digest(config),
        "frozen_sha256": frozen,
        "versions": versions(),
    }
    return store.save(
        name,
        step=state.step,
        trainer=trainer,
        tensors=tensors_to_save(strategy, ema),
        meta=meta,
        extra=extra,
        best=state.best_name,
        background=config.training.save_in_background,
    )
