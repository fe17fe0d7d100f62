"""fit(), the only training loop. A system hands in functions (losses, validate, sample, after_step).

One optimizer step, in the order in which it happens:
  data.py             ReadAhead.next_step      micro-batches on the device; a thread reads two steps ahead
  engine/dist.py      max_over_ranks           all-reduce of one number: does any rank have to stop, or has it failed?
  lr_at               below                    the learning rate, a function of the step alone
  SYSTEM/objective    losses(model, ...)       one pre-weighted loss for each micro-batch; it calls
  SYSTEM/model.py     forward                  through TrainedModel below: the wrapped module under autocast
  engine/strategy.py  backward                 gradients; all-reduced over ranks in the last micro-step only
  engine/strategy.py  optimizer_step           norm, clipping and leaving out, then the fused AdamW, all on the device
  SYSTEM              after_step               clamps, such as of a logit scale
  engine/strategy.py  EMA.update               moving average; as the log's numbers, taken in ONE STEP LATER (_Outcome)
  log.py              RunLog.write             metrics.jsonl and the console, every logging_steps
  SYSTEM              validate, sample         under the averaged weights, on all ranks
  engine/state.py     save_run                 to the checkpoint manager of engine/checkpoint.py: aside, hashed, renamed
"""

import contextlib
import functools
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.config import TrainingSection, checkpoint_bytes, save_config
from shared.data import ReadAhead, Stream
from shared.engine.checkpoint import CheckpointStore, attempt, frozen_digest, read_manifest, sampled_digest
from shared.engine.dist import (
    DistInfo,
    StopFlag,
    barrier,
    from_main,
    heartbeat,
    max_over_ranks,
    mean_over_ranks,
    naming_late_ranks,
    raise_together,
    same_on_all_ranks,
)
from shared.engine.parallel import make_strategy
from shared.engine.preflight import claimed, compare_ranks
from shared.engine.state import RunState, checkpoint_folder_name, resume, save_again, save_run
from shared.engine.strategy import EMA, StepInfo, Strategy, check_gradients_agree, choose_precision
from shared.errors import UserError, write_text
from shared.log import RunLog
from shared.optim import decay_groups
from shared.rng import seed_everything

MAX_SKIPPED = 20  # steps in a row whose gradient is not finite before the run stops
GARBAGE_STEPS = 50  # steps between two collections where there are several ranks
_STEP_STREAM = 103


def lr_at(step: int, training: TrainingSection, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up: peak (step + 1) / warmup. Then, with p the share of the rest that is done: constant 1, linear 1 - p,
    cosine (1 + cos pi p) / 2, wsd 1 until p = 0.8 and linear to 0 after it; scaled so that it ends at min_lr_ratio.
    """
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": min(1.0, (1 - done) / 0.2),
    }[training.lr_scheduler_type]
    return peak * (training.min_lr_ratio + (1 - training.min_lr_ratio) * shape)


class TrainedModel:
    """What the hooks call: the wrapped module in the run's precision. `.module` is the bare one, for reading only."""

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self.last_step: StepInfo | None = None  # what the last optimizer step did, for after_step

    @property
    def module(self) -> nn.Module:
        """The model without its wrapper."""
        return self.strategy.module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self.strategy.autocast():
            return self.strategy.model(*arguments, **named)


@dataclass
class FitResult:
    """How a run ended."""

    step: int
    finished: bool
    stopped_by: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    checkpoint: Path | None = None  # the one that it ended at, resumed from or written; None only without saving
    interrupted: str | None = None  # a signal or the time limit, even if it came when the last step was done


def steps_done(output_dir: Path | str) -> int:
    """The step at which a run in this folder reached its planned end; -1 where it did not, or DONE is unreadable."""
    try:
        return int((Path(output_dir) / "DONE").read_text())
    except (OSError, ValueError):
        return -1


def is_done(output_dir: Path | str) -> bool:
    """Whether a run in this folder reached its last planned step."""
    return steps_done(output_dir) >= 0


def finished_checkpoint(output_dir: Path | str) -> Path | None:
    """The last checkpoint of a run that reached its planned end, verified; None where it did not, or where that
    checkpoint is damaged or gone: fit() then goes on from what is whole. This is how one phase is handed to the next.
    """
    folder, _ = CheckpointStore(Path(output_dir) / "checkpoints", DistInfo()).look()
    if folder is None or read_manifest(folder)["step"] != steps_done(output_dir):
        return None
    return folder


def _claiming(train: Callable[..., FitResult]) -> Callable[..., FitResult]:
    """Hold the output folder's lock (on rank 0) while it trains."""

    @functools.wraps(train)
    def run(*, config: Any, info: DistInfo, output_dir: Path | str | None = None, **others: Any) -> FitResult:
        output_dir = Path(output_dir or config.run.output_dir)
        with contextlib.ExitStack() as stack:
            raise_together(attempt(lambda: stack.enter_context(claimed(output_dir))) if info.is_main else None)
            return train(config=config, info=info, output_dir=output_dir, **others)

    return run


@_claiming
def fit(
    *,
    config: Any,
    info: DistInfo,
    model: nn.Module,
    stream: Stream,
    losses: Callable[..., Iterator],
    validate: Callable | None = None,
    sample: Callable | None = None,
    after_step: Callable | None = None,
    groups: list[dict] | None = None,
    wrap_classes: tuple[type | str, ...] = (),
    first_values: Callable[[str], Any] | None = None,
    export: Callable | None = None,
    checkpoint_name: str = "step_{step:08d}",
    epoch_checkpoint_name: str | None = None,
    keep_epochs: bool = True,
    output_dir: Path | str | None = None,
    title: str = "",
) -> FitResult:
    """Train `model` to the planned step, resuming what is in the output folder.

    losses(model, batches, step) yields one (loss, metrics) per micro-batch, pre-weighted: their sum over micro-batches,
    averaged over ranks, is the loss. validate(model, step) -> dict of floats; sample(model, step, folder);
    after_step(module, step); export(folder, weights, ema) adds files to a checkpoint. All ranks call all hooks in the
    same order. wrap_classes: blocks that fsdp shards and compile compiles one by one, and names of further modules to
    shard apart. first_values(name): of a model on the meta device the first value of each parameter and buffer, as a
    tensor or a file's (StoredTensors); fsdp reads only the rows that a rank keeps. keep_epochs: checkpoints of
    save_every_n_epochs are never deleted. Raises UserError for unreadable data, settings that do not fit the
    checkpoint, and lasting overflow.
    """
    run, training = config.run, config.training
    output_dir = Path(output_dir or run.output_dir)
    first_values = first_values or vars(model).pop("first_values", None)  # of built_once
    # Ranks that started with other settings, data or weights would train diverging replicas without an error.
    compare_ranks(config, info)
    same_on_all_ranks(stream.fingerprint, "samples")
    frozen = frozen_digest(model)
    same_on_all_ranks(frozen, "frozen base weights")
    same_on_all_ranks(sampled_digest(model), "first weights")
    precision = choose_precision(run.precision, info.device)
    strategy = make_strategy(run, info, precision, training)
    strategy.prepare(model, groups or decay_groups(model, training.weight_decay), wrap_classes, first_values)
    frozen = strategy.frozen_sha256 or frozen
    ema = EMA(strategy, training.ema_decay, training.ema_warmup) if training.ema_decay > 0 else None
    trained = TrainedModel(strategy)
    store = CheckpointStore(
        output_dir / "checkpoints", info, keep_last=training.keep_last, keep_every=training.keep_every
    )
    notes: list[str] = []  # the log opens after resuming, which decides from which step on it is kept
    state, checkpoint = resume(config, strategy, ema, store, stream, frozen, notes.append)
    last_step = plan_steps(training, stream)
    stop_at = min(last_step, training.max_steps or last_step)
    log = RunLog(output_dir, run, info, resume_step=state.step, settings=config.model_dump(mode="json"))
    was_done = from_main(steps_done(output_dir)) == state.step and (
        state.step >= stop_at or _patience_is_over(state, training)
    )
    if info.is_main:
        save_config(config, output_dir / "config.yaml")
        if not was_done:
            (output_dir / "DONE").unlink(missing_ok=True)
    trainable = sum(math.prod(strategy.shape(name)) for name in strategy.parameters)
    if training.save and state.step < stop_at:
        raise_together(_disk_error(output_dir, checkpoint_bytes(training, trainable)) if info.is_main else None)
    log.say(
        f"{title or output_dir}: {trainable:,} trainable and {strategy.frozen_count():,} frozen parameters; "
        f"{strategy.name} on {info.world} rank(s), {info.device}, {strategy.precision}; {stream.samples_per_step} "
        f"samples a step; steps {state.step} to {stop_at} of {last_step}; seed {run.seed}; restart {info.restart}; "
        f"process {os.getpid()}"
    )
    for note in notes:
        log.say(note)
    stream.start(state.data_step, state.stream)
    reader = ReadAhead(stream, info.device)
    log.start_bar(state.step, stop_at)
    metrics: dict[str, float] = {}
    reason = None if state.step >= stop_at or not was_done else _without_gain(training)
    error: Exception | None = None
    began, began_step = time.perf_counter(), state.step
    outcome = _Outcome(state, ema, log)

    def name_now() -> str:
        return checkpoint_folder_name(state, stream, checkpoint_name, epoch_checkpoint_name)

    def save() -> Path | None:
        outcome.take_in()
        if not training.save:
            return None
        if info.is_main and not (output_dir / "config.yaml").exists():  # the folder was removed under the run
            save_config(config, output_dir / "config.yaml")
            log.reopen()
        keep = keep_epochs and _epoch_due(state, stream, training.save_every_n_epochs)
        return save_run(name_now(), config, state, strategy, ema, store, frozen, export, keep=keep)

    def validated(hook: Callable) -> bool:
        """Validate, and say whether this is the best so far."""
        found, is_best = _validate(hook, trained, ema, state, training, log)
        metrics.update(found)
        if is_best:
            state.best_name = name_now()
        return is_best

    with StopFlag(run.time_limit_minutes) as stop, naming_late_ranks(), _garbage_waits(info.world > 1):
        while state.step < stop_at and reason is None:
            # Reseeding before every step is what makes resuming exact without saving any generator's state: dropout and
            # the like depend on (seed, rank, step) alone. What belongs to a sample is keyed by its place in the global
            # batch, batch["slot"], in the objective, so that it is the same on any number of ranks.
            seed_everything(run.seed, _STEP_STREAM, info.rank, state.step)
            heartbeat(state.step)
            waiting = time.perf_counter()
            try:
                batches = reader.next_step()
            except (UserError, OSError) as problem:
                error, batches = problem, []
            log.waited += time.perf_counter() - waiting
            heartbeat(state.step, phase=1)

            # All ranks turn together: one that left on its own signal or error would let the others wait in the next
            # collective until the timeout, with nothing saved.
            turn = max_over_ranks(2.0 if error else 1.0 if stop.reason else 0.0)
            if turn == 2:
                raise_together(error)
            if turn == 1:
                reason = stop.reason or "another rank's signal"
                break

            # The losses come one by one from a generator, so that the objective can count over all micro-batches before
            # the first backward, and only one graph is alive. Every rank makes the same number of backward calls.
            strategy.set_lr(lr_at(state.step, training, last_step))
            strategy.module.train()
            iterator = losses(trained, batches, state.step)
            for micro in range(len(batches)):
                with strategy.micro_step(is_last=micro == len(batches) - 1):
                    loss, extra = next(iterator)
                    heartbeat(state.step, phase=2 + micro)  # the forward pass of this micro-step is done
                    strategy.backward(loss)
                log.add({"train/micro_loss": loss, **{f"train/{name}": value for name, value in extra.items()}})
            if run.check_gradients_every and (state.step == began_step or state.step % run.check_gradients_every == 0):
                check_gradients_agree(strategy, state.step)

            # Whether the gradient was finite is a number on the device, and reading it would stop the queue. So the
            # last step's outcome (average, log, skipped steps) is taken in here, when the device has long done it.
            outcome.take_in()
            outcome.done = trained.last_step = strategy.optimizer_step()
            if after_step is not None:
                after_step(strategy.module, state.step)
            state.step, state.data_step, state.stream = state.step + 1, state.data_step + 1, reader.state()
            state.samples_seen += stream.samples_per_step
            log.step_done()
            at_end = state.step == stop_at
            if info.world > 1 and state.step % GARBAGE_STEPS == 0:
                gc.collect(1)

            # Whatever is written, or runs on the averaged weights, needs this step's outcome at once.
            if state.step % training.logging_steps == 0 or at_end:
                outcome.take_in()
                stream.agree()
                speed, means = log.speed(len(batches), stream.samples_per_step), log.close_window()
                mean_loss = means.pop("train/micro_loss") * len(batches)  # a step's micro-losses add up to its loss
                rate = lr_at(state.step - 1, training, last_step)
                epoch = state.step / stream.steps_per_epoch if stream.steps_per_epoch else 0.0
                row = {"train/loss": mean_loss, **means, "train/lr": rate, "train/epoch": round(epoch, 4), **speed}
                log.write(state.step, row)
                left = (time.perf_counter() - began) / (state.step - began_step) * (stop_at - state.step)
                log.say(
                    f"Step {state.step}, Loss: {mean_loss:.4f} | of {last_step} | epoch {epoch:.2f} | lr {rate:.2e} | "
                    f"grad norm {means.get('train/grad_norm', float('nan')):.3f} | "
                    f"{speed['perf/samples_per_second']:.1f} samples/s | {speed['perf/memory_gb']:.2f} GB | "
                    f"{_clock(left)} left"
                )
                metrics |= row
            if at_end:
                break  # what comes at the end follows below: saved first, then validated
            is_best = False
            if validate is not None and _due(state.step, training.eval_steps):
                outcome.take_in()
                is_best = validated(validate)
                if _patience_is_over(state, training):
                    reason = _without_gain(training)
            if sample is not None and _due(state.step, training.sample_steps):
                outcome.take_in()
                _run_hook(sample, trained, ema, state.step, output_dir / "samples")
            due = is_best or _due(state.step, training.save_steps)
            due = due or _epoch_due(state, stream, training.save_every_n_epochs)
            if due and reason is None:
                checkpoint = save() or checkpoint
        if state.step > 0 and not was_done and (state.step > began_step or reason):
            checkpoint = save() or checkpoint
        store.wait()

        # The last validation and the last samples come after the last checkpoint, so that a failure or a kill in them
        # costs nothing: the same command does them then. The checkpoint takes their outcome in without being written
        # a second time.
        if reason is None and not was_done and max_over_ranks(float(stop.reason is not None)):
            reason = stop.reason or "another rank's signal"
        if reason is None and not was_done and state.step > 0:
            seed_everything(run.seed, _STEP_STREAM, info.rank, state.step)  # the same, whoever does it
            strategy.set_lr(lr_at(state.step - 1, training, last_step))
            if validate is not None:
                is_best = validated(validate)
                if _patience_is_over(state, training):
                    reason = _without_gain(training)
                if training.save and checkpoint is not None:
                    save_again(checkpoint, config, state, strategy, ema, store, export if is_best else None)
            if sample is not None:
                _run_hook(sample, trained, ema, state.step, output_dir / "samples")
        late = max_over_ranks(float(stop.reason is not None)) > 0
    interrupted = (stop.reason or "another rank's signal") if late else None
    finished = was_done or reason is None or reason.startswith("no better")
    reader.close()
    if not finished:
        StopFlag.pending = None  # the caller is told; a signal that came too late to stop this run stops the next one
    if reason is not None:
        then = "the run is done" if finished else "the same command goes on from here"
        log.say(f"stopped at step {state.step} by {reason}; {then}")
    if finished and info.is_main:
        write_text(output_dir / "DONE", f"{state.step}\n")
    log.close()
    barrier()
    return FitResult(state.step, finished, reason, metrics, state.best, checkpoint, interrupted)


def plan_steps(training: Any, stream: Stream) -> int:
    """The planned number of optimizer steps: total_steps, or num_epochs times the steps of an epoch."""
    if training.total_steps is not None:
        return training.total_steps
    if training.num_epochs is None or stream.steps_per_epoch is None:
        raise UserError("training.total_steps is not set and cannot be derived; give --total-steps N or --num-epochs N")
    return training.num_epochs * stream.steps_per_epoch


# --- small steps of the loop ------------------------------------------------------------------------------------------


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _epoch_due(state: RunState, stream: Stream, every: int | None) -> bool:
    if every is None or not stream.steps_per_epoch:
        return False
    return state.step % (every * stream.steps_per_epoch) == 0


class _Outcome:
    """What the last optimizer step did: taken in before the next one, when the device has long done it and the loop
    need not wait; or earlier, where something is written or the averaged weights are used.
    """

    def __init__(self, state: RunState, ema: EMA | None, log: RunLog):
        self.state, self.ema, self.log = state, ema, log
        self.done: StepInfo | None = None

    def take_in(self) -> None:
        """Count it, average its weights and log it, once. Raises UserError when too many in a row were left out."""
        if self.done is None:
            return
        done, self.done = self.done, None
        self.state.skipped = 0 if done.applied else self.state.skipped + 1
        if self.state.skipped >= MAX_SKIPPED:
            raise UserError(
                f"the gradient was not finite in {MAX_SKIPPED} steps in a row, the last was step {self.state.step}; "
                "lower --learning-rate, use --precision fp32, or look at the data of these steps"
            )
        if done.applied and self.ema is not None:
            self.ema.update()
        self.log.add({"train/grad_norm": done.grad_norm} if done.applied else {"train/skipped": 1.0})


@contextlib.contextmanager
def _garbage_waits(waits: bool) -> Iterator[None]:
    """Whether Python's own collections wait for a step that is the same on all ranks. Each rank would else stop at
    moments of its own, and in every step all wait for the last one. What the body found is set again after it.
    """
    before = gc.isenabled()
    (gc.disable if waits else gc.enable)()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()


def _run_hook(hook: Callable, trained: TrainedModel, ema: EMA | None, *arguments: Any) -> Any:
    """Call a hook without gradients, in eval mode, with the averaged weights in place."""
    trained.module.eval()
    if isinstance(arguments[-1], Path) and trained.strategy.info.is_main:
        arguments[-1].mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), _garbage_waits(False), contextlib.nullcontext() if ema is None else ema.applied():
        return hook(trained, *arguments)


def _validate(
    validate: Callable, trained: TrainedModel, ema: EMA | None, state: RunState, training: Any, log: RunLog
) -> tuple[dict[str, float], bool]:
    """The validation's numbers, and whether the score that decides is the best so far."""
    found = mean_over_ranks(
        {f"val/{key}": float(value) for key, value in _run_hook(validate, trained, ema, state.step).items()}
    )
    default = type(training).model_fields["best_metric"].default
    if training.best_metric not in found and (training.best_metric != default or training.early_stopping_patience):
        raise UserError(f"--best-metric {training.best_metric}: the validation gives {', '.join(sorted(found))}")
    log.write(state.step, found)
    if not math.isfinite(found.get(training.best_metric, 0.0)):
        log.say(f"warning: {training.best_metric} is not finite; lower --learning-rate and go back to a checkpoint")
    log.say(f"Step {state.step}, " + ", ".join(f"{key}: {value:.4f}" for key, value in found.items()))
    score, sign = found.get(training.best_metric), 1 if training.best_mode == "min" else -1
    if score is None or not math.isfinite(score):
        return found, False
    is_best = state.best is None or sign * (state.best - score) > training.early_stopping_min_delta
    state.best = score if is_best else state.best
    state.validations_without_gain = 0 if is_best else state.validations_without_gain + 1
    return found, is_best


def _without_gain(training: Any) -> str:
    return f"no better {training.best_metric} in {training.early_stopping_patience} validations"


def _patience_is_over(state: RunState, training: Any) -> bool:
    return (
        training.early_stopping_patience is not None
        and state.validations_without_gain >= training.early_stopping_patience
    )


def _disk_error(output_dir: Path, needed: int) -> UserError | None:
    """What is wrong when the first checkpoint cannot fit."""
    free = shutil.disk_usage(output_dir).free
    if free >= needed:
        return None
    return UserError(
        f"{output_dir}: the disk is full: a checkpoint takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; free "
        "some space and run the same command again"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
