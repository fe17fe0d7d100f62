"""Which strategy, micro-batch and number of GPUs for a recipe: one table from a few symbolic steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from shared.config import STRATEGIES, TrainingSection
from shared.plan import GPUS, FrozenPart, Measured, Plan, describe, make_plan, measure

FILL = 0.94  # share of a card's memory that a plan may take: the rest goes to the context, libraries and fragments
DAY = 86_400.0


def plan_run(
    title: str,
    config: Any,
    *,
    build: Callable[[Any], nn.Module],
    step: Callable[[Any], Callable[[nn.Module], Tensor]],
    blocks: tuple[type, ...] = (),
    frozen_parts: Callable[[Any], list[FrozenPart]] = lambda config: [],
    steps: int | None = None,
) -> str:
    """The text of --dry-run, or with --plan-table the table over strategies, micro-batches, checkpointing and GPUs.

    build(config) -> model; step(config) -> (model -> loss of one micro-batch); frozen_parts(config) of one micro-batch.
    Both run on fake tensors. steps: the recipe's optimizer steps, for the days to its end.
    """
    precision = config.run.precision or "bf16"

    def measured(settings: Any) -> Measured:
        return measure(lambda: build(settings), step(settings), precision, blocks)

    if not config.run.plan_table:
        plan = make_plan(
            title, measured(config), run=config.run, training=config.training, frozen_parts=frozen_parts(config)
        )
        return describe(plan)
    plans = []
    for checkpointing in (False, True):
        one, two = (_changed(config, batch_size=size, gradient_checkpointing=checkpointing) for size in (1, 2))
        pair = measured(one), measured(two)
        for size in _micro_batches(config.training):
            settings = _changed(config, batch_size=size, gradient_checkpointing=checkpointing)
            plans += _plans(title, settings, _extended(*pair, size), frozen_parts(settings))
    return table(title, config.training, plans, steps or config.training.total_steps)


def _changed(config: Any, **training: Any) -> Any:
    """A copy of the settings with other training settings."""
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def _micro_batches(training: TrainingSection) -> list[int]:
    """Powers of two up to the preset's samples of one optimizer step."""
    largest = training.global_batch_size or training.batch_size * training.gradient_accumulation_steps
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size <= largest]


def _extended(one: Measured, two: Measured, size: int) -> Measured:
    """What `size` samples take, by the straight line through one and two: activations and FLOPs grow with samples."""

    def line(name: str) -> Any:
        first, second = getattr(one, name), getattr(two, name)
        return type(first)(first + (size - 1) * (second - first))

    grown = ("forward_flops", "step_flops", "peak_bytes", "activation_bytes")
    return replace(one, **{name: line(name) for name in grown})


def _plans(title: str, config: Any, measured: Measured, frozen_parts: list[FrozenPart]) -> list[tuple[Plan, bool]]:
    """One plan for each strategy and number of GPUs, with the samples of one optimizer step kept where ranks allow."""
    training, found = config.training, []
    wanted = training.global_batch_size or training.batch_size * training.gradient_accumulation_steps
    budget = config.run.world_size or 8
    for world in (count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count <= budget):
        micro = training.batch_size * world
        accumulation = max(1, wanted // micro)
        settings = training.model_copy(update={"global_batch_size": None, "gradient_accumulation_steps": accumulation})
        for strategy in STRATEGIES[1:] if world > 1 else STRATEGIES[:1]:
            plan = make_plan(
                title,
                measured,
                run=config.run,
                training=settings,
                strategy=strategy,
                world=world,
                frozen_parts=frozen_parts,
            )
            found.append((plan, training.gradient_checkpointing))
    return found


def fits(plan: Plan) -> bool:
    """Whether the plan's peak stays within the card."""
    return plan.peak_memory < FILL * 1e9 * GPUS[plan.gpu_name].memory_gb


def table(title: str, training: TrainingSection, plans: list[tuple[Plan, bool]], steps: int | None) -> str:
    """For each number of GPUs and strategy the fastest plan that fits, or the smallest where none does."""
    best: dict[tuple[int, str], tuple[Plan, bool]] = {}
    for plan, checkpointing in plans:
        key = (plan.world, plan.strategy)
        if key not in best or _better(plan, best[key][0]):
            best[key] = (plan, checkpointing)
    first = plans[0][0]
    heads = [
        "GPUs",
        "strategy",
        "micro",
        "accum",
        "recompute",
        "samples/step",
        "memory GB",
        "weights",
        "gradients",
        "moments",
    ]
    heads += ["activations", "fits", "traffic GB", "s/step", "samples/s"] + (["days"] if steps else [])
    lines = [
        f"plans: {title} on {first.gpu_name} ({GPUS[first.gpu_name].memory_gb:g} GB) in {first.precision}",
        "  ".join(heads),
    ]
    for (world, strategy), (plan, checkpointing) in sorted(best.items(), key=lambda item: item[0][0]):
        part = {name: f"{size / 1e9:.2f}" for name, size in plan.memory.items()}
        seconds = plan.seconds_per_step
        cells = [world, strategy, plan.micro_batch, plan.accumulation, "yes" if checkpointing else "no"]
        cells += [plan.samples_per_step, f"{plan.peak_memory / 1e9:.2f}"]
        cells += [part.get(name, "0") for name in ("weights", "gradients", "Adam moments", "activations")]
        cells += ["yes" if fits(plan) else "NO", f"{plan.traffic_bytes / 1e9:.2f}", f"{seconds:.3g}"]
        cells += [f"{plan.samples_per_step / max(seconds, 1e-12):.1f}"]
        if steps:  # the recipe's samples, whatever one step holds
            recipe = steps * (training.global_batch_size or training.batch_size * training.gradient_accumulation_steps)
            cells += [f"{recipe / plan.samples_per_step * seconds / DAY:.2f}"]
        lines.append("  ".join(f"{cell!s:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)))
    return "\n".join(lines)


def _better(plan: Plan, other: Plan) -> bool:
    """Fits before not; then more samples a second; among those that do not fit, the smaller one."""
    if fits(plan) != fits(other):
        return fits(plan)
    if not fits(plan):
        return plan.peak_memory < other.peak_memory
    return plan.samples_per_step / plan.seconds_per_step > 1.001 * other.samples_per_step / other.seconds_per_step
