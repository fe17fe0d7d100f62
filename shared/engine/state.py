"""What a checkpoint holds of strategy and EMA, and how it comes back under any strategy and number of ranks."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.config import (
    check_resume,
    config_digest,
    fixed_settings,
    flat_settings,
    is_place,
    read_yaml,
    save_config,
    writes_shards,
)
from shared.data import Stream
from shared.engine.checkpoint import (
    SHARDS,
    CheckpointStore,
    Spec,
    StoredTensors,
    attempt,
    find_checkpoint,
    load_weights,
    new_identity,
    persistent_buffers,
    read_manifest,
)
from shared.engine.dist import from_main, raise_together
from shared.engine.strategy import EMA, MOMENTS, Strategy
from shared.errors import CheckpointError, UserError


def tensors_to_save(
    strategy: Strategy, ema: EMA | None, sharded: bool = False
) -> dict[str, tuple[list[Spec], Iterable[Tensor]]]:
    """File name -> (specs, values) for CheckpointStore.save: whole tensors, gathered one by one when drawn; or this
    rank's rows of all of them, in its own file. Buffers are rank 0's.
    """
    names, steps, info = list(strategy.parameters), strategy.steps_taken(), strategy.info
    buffers = persistent_buffers(strategy.module)
    kept = {"model": [(name, "weight", name) for name in names]}  # file -> name in it, kind, parameter
    if ema is not None:
        kept["ema"] = [(name, "average", name) for name in names]
    kept["optimizer"] = [(f"{name}.{kind}", kind, name) for name in names if name in steps for kind in MOMENTS]

    def whole(kind: str, name: str) -> Tensor:
        return ema.full(name) if ema is not None and kind == "average" else strategy.full(kind, name)

    def rows(kind: str, name: str) -> Tensor:
        return ema.part(name) if ema is not None and kind == "average" else strategy.part(kind, name)

    if not sharded:
        files: dict = {}
        for file, entries in kept.items():
            specs = [(key, strategy.shape(name), torch.float32) for key, _, name in entries]
            files[f"{file}.safetensors"] = (specs, (whole(kind, name) for _, kind, name in entries))
        specs, values = files["model.safetensors"]
        specs += [(name, tuple(value.shape), value.dtype) for name, value in buffers.items()]
        files["model.safetensors"] = (specs, itertools.chain(values, (buffer.detach() for buffer in buffers.values())))
        return files
    own: list[Spec] = []
    for file, entries in kept.items():
        for key, _, name in entries:
            shape, (start, stop) = strategy.shape(name), strategy.rows(name)
            if start < stop:
                own.append((f"{file}.{key}", (stop - start, *shape[1:]) if shape else shape, torch.float32, start))
    drawn = (rows(kind, name) for _, kind, name in itertools.chain(*kept.values()))  # ZeRO: on all ranks, empty or not
    values = (value for value in drawn if value.numel())
    if info.is_main:
        own += [(f"model.{name}", tuple(value.shape), value.dtype, 0) for name, value in buffers.items()]
        values = itertools.chain(values, (buffer.detach() for buffer in buffers.values()))
    return {f"{SHARDS}/{info.rank + 1:05d}-of-{info.world:05d}.safetensors": (own, values)}


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
    model, names = StoredTensors(folder, "model"), list(strategy.parameters)
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
            buffer.copy_(model[name][...])
    strategy.load_steps_taken(trainer["optimizer_steps"])
    optimizer = StoredTensors(folder, "optimizer")
    for name in names:
        for kind in MOMENTS:
            if f"{name}.{kind}" in optimizer.names:
                strategy.load_full(kind, name, optimizer[f"{name}.{kind}"])
    strategy.scale.value = trainer["loss_scale"]["value"]
    strategy.scale.good_steps = trainer["loss_scale"]["good_steps"]
    if ema is None:
        return
    averaged = StoredTensors(folder, "ema")
    if averaged.names:
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
    say(f"weights taken from {path}; it holds no optimizer state, average or position: these start again at step 0")


def versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "numpy")}


def _load(shape: tuple, value: Any, name: str, folder: Path, put: Callable[[Any], None]) -> None:
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
) -> tuple[RunState, Path | None]:
    """The state to continue from and the checkpoint that it is in (None at step 0); weights, moments and averages are
    put into place. Checkpoints that the new trajectory does not go through are set aside, once all has been checked.

    UserError for a checkpoint that does not fit, and where there are checkpoints of which none can be read.
    """
    store.hash_together()
    chosen = from_main(_attempt_choice(config, store) if store.info.is_main else None)
    if isinstance(chosen, Exception):
        raise chosen
    for note in chosen.notes:
        say(note)
    state, folder = RunState(fingerprint=stream.fingerprint, global_batch=stream.samples_per_step), chosen.folder
    trainer: dict = {}
    if folder is not None:
        try:
            trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            state = RunState(**trainer["run_state"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{folder}: trainer.json is not one of a run ({type(error).__name__})") from None
        _compare(folder, trainer, config, strategy.precision, frozen, say)
        if stream.fingerprint != state.fingerprint and not config.run.allow_data_change:
            raise UserError(
                f"{folder} was trained on another list of samples (fingerprint {state.fingerprint}, now "
                f"{stream.fingerprint}); use the same data, or --allow-data-change"
            )
        state.fingerprint = stream.fingerprint
        _fit_global_batch(state, stream.samples_per_step, say)
    store.identity = chosen.identity
    if folder is not None:
        try:
            restore(folder, trainer, strategy, ema, say)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: trainer.json is not one of a run ({error!r})") from None
        say(f"resumed from {folder} at step {state.step}")
    elif chosen.weights is not None:
        restore_weights_only(chosen.weights, strategy, ema, say)
    raise_together(attempt(lambda: _set_aside(chosen, state.step, store, say)) if store.info.is_main else None)
    return state, folder


@dataclass
class _Choice:
    """Where a run begins: a checkpoint, a file of weights, or neither."""

    folder: Path | None
    identity: dict
    weights: Path | None = None
    aside: str = ""  # why other checkpoints of the folder are set aside; empty: they are not
    notes: list[str] = field(default_factory=list)


def _attempt_choice(config: Any, store: CheckpointStore) -> "_Choice | Exception":
    try:
        store.recover()
        return _choose(config, store)
    except (UserError, OSError) as error:  # raised on all ranks
        return error


def _choose(config: Any, store: CheckpointStore) -> _Choice:
    wish, settings = config.run.resume, settings_digest(config)
    if wish == "none" and store.info.restart == 0:
        return _Choice(None, new_identity(), aside="starting again from step 0 as asked")
    if wish in ("auto", "none"):
        newest, passed_over = store.look()
        if newest is None and passed_over:
            raise UserError(
                f"{store.root} holds {len(passed_over)} checkpoint(s), and none can be read: {passed_over[0]}; put a "
                "copy of one there, give another --output-dir, or start again with --resume none, which keeps them"
            )
        return _Choice(newest, _identity_of(newest), notes=[f"passed over {sentence}" for sentence in passed_over])
    path = Path(wish)
    weights = path if path.is_file() else None
    folder = None if weights else find_checkpoint(path, newest=True)
    parent = f"{path.name} {path.stat().st_size}" if weights else read_manifest(folder or path)["sha256"]
    newest, passed_over = store.look()
    began = _identity_of(newest)
    if newest is not None and (began.get("parent"), began.get("settings")) == (parent, settings):
        # the same command once more, by a scheduler or after a crash: it must not throw away its own work
        return _Choice(newest, began, notes=[f"this run began at {path}; it goes on from its newest checkpoint"])
    if newest is not None and folder is not None and folder.resolve() == newest.resolve() and not passed_over:
        return _Choice(newest, began)
    aside = f"going back to {path}" if newest is not None or passed_over else ""
    return _Choice(folder, new_identity(parent, settings), weights, aside)


def _identity_of(folder: Path | None) -> dict:
    found = read_manifest(folder).get("run") if folder is not None else None
    return found if isinstance(found, dict) else new_identity()  # written before manifests had one


def _set_aside(chosen: _Choice, step: int, store: CheckpointStore, say: Callable[[str], None]) -> None:
    if not chosen.aside:
        return
    inside = chosen.folder is not None and chosen.folder.resolve().parent == store.root.resolve()
    place = store.set_aside(f"after-step-{step}" if inside else "before", after=step if inside else None)
    if place is not None:
        say(f"{chosen.aside}; the former checkpoints{f' after step {step}' if inside else ''} lie in {place}")
    if chosen.folder is not None and inside:
        store.point(chosen.folder.name, None)


def settings_digest(config: Any) -> str:
    """SHA-256 of all settings but places, how long this call trains, and where it begins."""
    left_out = ("run.resume", "training.max_steps", "training.total_steps", "training.num_epochs", "run.run_name")
    settings = {
        name: value for name, value in flat_settings(config).items() if not is_place(name) and name not in left_out
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _compare(
    folder: Path, trainer: dict, config: Any, precision: str, frozen: str | None, say: Callable[[str], None]
) -> None:
    """Refuse a checkpoint whose fixed settings, precision or base are others; say every other setting that differs."""
    manifest = read_manifest(folder)
    differing = check_resume(trainer.get("fixed_settings", {}), fixed_settings(config))
    if manifest.get("precision", precision) != precision:
        differing.append(f"run.precision was {manifest['precision']!r}, is {precision!r}")
    if differing:
        raise UserError(
            f"{folder} was made with other settings: {'; '.join(differing)}; use the same, or another --output-dir"
        )
    if manifest.get("frozen_sha256") != frozen:
        raise UserError(
            f"{folder} was trained on another frozen base (SHA-256 {str(manifest.get('frozen_sha256'))[:12]}, now "
            f"{str(frozen)[:12]}); give the same base weights"
        )
    saved = flat_settings(config, read_yaml(folder / "config.yaml")) if (folder / "config.yaml").is_file() else {}
    now = {name: value for name, value in flat_settings(config).items() if name not in _SAID_ELSEWHERE}
    for sentence in check_resume(saved, now):
        say(f"changed setting: {sentence}")
    for name, version in versions().items():
        if manifest.get("versions", {}).get(name, version) != version:
            say(f"changed library: {name} was {manifest['versions'][name]}, is {version}")
    if manifest.get("code_sha256", code_digest(config)) != code_digest(config):
        say("changed code: the checkpoint was written by another version of this repository")


_SAID_ELSEWHERE = ("run.resume", "run.output_dir", "run.precision", "run.allow_data_change")


@functools.cache
def _digest_of_code(folders: tuple[str, ...]) -> str:
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_digest(config: Any) -> str:
    """SHA-256 of the Python files of shared/ and of the system whose settings these are."""
    return _digest_of_code(("shared", type(config).__module__.partition(".")[0]))


def _fit_global_batch(state: RunState, samples_per_step: int, say: Callable[[str], None]) -> None:
    if state.global_batch == samples_per_step:
        return
    say(
        f"one optimizer step now takes {samples_per_step} samples, before it took {state.global_batch}; "
        f"the data go on after {state.samples_seen} samples "
        f"(--global-batch-size {state.global_batch} would keep the run the same)"
    )
    state.data_step, state.stream = state.samples_seen // samples_per_step, None
    state.global_batch = samples_per_step


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
    *,
    keep: bool = False,
) -> Path:
    """Write a checkpoint of the run as it is; a collective. keep: it is never deleted."""
    meta = {
        "world": strategy.info.world,
        "strategy": strategy.name,
        "precision": strategy.precision,
        "config_sha256": config_digest(config),
        "frozen_sha256": frozen,
        "versions": versions(),
        "code_sha256": code_digest(config),
        **({"keep": True} if keep else {}),
    }
    trainable = sum(math.prod(strategy.shape(name)) for name in strategy.parameters)
    sharded = writes_shards(config.training, trainable, strategy.info.world)
    return store.save(
        name,
        step=state.step,
        trainer=_trainer(config, state, strategy, ema),
        tensors=tensors_to_save(strategy, ema, sharded),
        meta=meta,
        extra=_exporter(config, strategy, ema, export),
        best=state.best_name,
        background=config.training.save_in_background,
        sharded=sharded,
    )


def save_again(
    folder: Path,
    config: Any,
    state: RunState,
    strategy: Strategy,
    ema: EMA | None,
    store: CheckpointStore,
    export: Callable | None,
) -> None:
    """Give a checkpoint of this very step the state after its validation; a collective. export: as in save_run, or
    None where what was exported stays right.
    """
    extra = None if export is None else _exporter(config, strategy, ema, export)
    store.rewrite(folder, trainer=_trainer(config, state, strategy, ema), extra=extra, best=state.best_name)


def _trainer(config: Any, state: RunState, strategy: Strategy, ema: EMA | None) -> dict:
    return {**trainer_state(strategy, ema), "run_state": vars(state) | {}, "fixed_settings": fixed_settings(config)}


def _exporter(config: Any, strategy: Strategy, ema: EMA | None, export: Callable | None) -> Callable[[Path], None]:
    """What rank 0 writes besides the tensors. A guide's own files want all weights at once: all ranks gather them."""
    weights = averaged = None
    if export is not None:
        weights = _gathered(strategy, functools.partial(strategy.full, "weight"))
        averaged = None if ema is None else _gathered(strategy, ema.full)

    def extra(folder: Path) -> None:
        save_config(config, folder / "config.yaml")
        if export is not None:
            export(folder, weights, averaged)

    return extra


def _gathered(strategy: Strategy, full: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Every whole tensor, kept by rank 0 alone."""
    found = {}
    for name in strategy.parameters:
        value = full(name)
        if strategy.info.is_main:
            found[name] = value.clone()
    return found
