"""Where a run goes on, and what a save puts into a checkpoint."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import check_resume, config_digest, fixed_settings, save_config
from shared.data import Stream
from shared.engine.checkpoint import CheckpointStore, find_checkpoint
from shared.engine.dist import barrier, from_main
from shared.engine.ema import EMA
from shared.engine.state import restore, restore_weights_only, tensors_to_save, trainer_state, versions
from shared.engine.strategy import Strategy
from shared.errors import UserError


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
    samples_per_step, fingerprint = getattr(stream, "samples_per_step", 1), getattr(stream, "fingerprint", None)
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
        if whole is not None:
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
