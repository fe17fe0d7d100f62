"""Which strategy, micro-batch and number of GPUs for a recipe: one table from a few symbolic steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from shared.config import STRATEGIES, TrainingSection
from shared.engine.recompute import keep_products
from shared.plan.measure import GPUS, FrozenPart, Measured, Plan, describe, make_plan, measure

FILL = 0.94  # share of a card's memory that a plan may take: the rest goes to the context, libraries and fragments
DAY = 86_400.0


@dataclass(frozen=True)
class Workload:
    """One micro-step as the planner runs it on fake tensors.

    build(config) -> model; step(config) -> (model -> loss of one micro-batch); frozen_parts(config) of one micro-batch.
    blocks: the classes, and names of further modules, that fsdp and zero3 gather one at a time. starts_in_parts: under
    fsdp a rank reads its rows of the weights, and no model is built in host memory. built_in_fp32: elsewhere, one whose
    frozen weights then lie in bf16. built_once: under fsdp rank 0 alone builds it, and the others read their rows.
    """

    title: str
    build: Callable[[Any], nn.Module]
    step: Callable[[Any], Callable[[nn.Module], Tensor]]
    blocks: tuple[type | str, ...] = ()
    frozen_parts: Callable[[Any], list[FrozenPart]] = lambda config: []
    starts_in_parts: bool = False
    built_in_fp32: bool = False
    built_once: bool = False

    def measure(self, config: Any) -> Measured:
        """Parameters, FLOPs and memory of a micro-step with these settings."""
        keep_products(config.training.keep_products)
        return measure(lambda: self.build(config), self.step(config), config.run.precision or "bf16", self.blocks)

    def plan(self, config: Any) -> Plan:
        """The plan of exactly these settings."""
        parts = self.frozen_parts(config)
        return make_plan(
            self.title,
            self.measure(config),
            run=config.run,
            training=config.training,
            frozen_parts=parts,
            starts_in_parts=self.starts_in_parts,
            built_in_fp32=self.built_in_fp32,
            built_once=self.built_once,
        )


def plan_run(workload: Workload, config: Any, *, steps: int | None = None) -> str:
    """The text of --dry-run, or with --plan-table the table over strategies, micro-batches, checkpointing and GPUs.

    steps: the recipe's optimizer steps, for the days to its end.
    """
    if not config.run.plan_table:
        return describe(workload.plan(config))
    plans = []
    for checkpointing in (False, True):
        one, two = (_changed(config, batch_size=size, gradient_checkpointing=checkpointing) for size in (1, 2))
        pair = workload.measure(one), workload.measure(two)
        for size in _micro_batches(config.training):
            settings = _changed(config, batch_size=size, gradient_checkpointing=checkpointing)
            measured, parts = _extended(*pair, size), workload.frozen_parts(settings)
            plans += _plans(workload.title, settings, measured, parts, samples_of(config.training))
    return table(workload.title, config.training, plans, steps or config.training.total_steps)


def _changed(config: Any, **training: Any) -> Any:
    """A copy of the settings with other training settings."""
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def samples_of(training: TrainingSection) -> int:
    """Samples of one optimizer step of the recipe, on one rank where the global batch is not given."""
    return training.global_batch_size or training.batch_size * training.gradient_accumulation_steps


def _micro_batches(training: TrainingSection) -> list[int]:
    """Powers of two up to the recipe's samples of one optimizer step."""
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size <= samples_of(training)]


def _extended(one: Measured, two: Measured, size: int) -> Measured:
    """What `size` samples take, by the straight line through one and two: activations and FLOPs grow with samples."""

    def line(name: str) -> Any:
        first, second = getattr(one, name), getattr(two, name)
        return type(first)(first + (size - 1) * (second - first))

    live = tuple(
        replace(a, then=a.then + (size - 1) * (b.then - a.then), others=a.others + (size - 1) * (b.others - a.others))
        for a, b in zip(one.live, two.live, strict=True)
    )
    grown = ("forward_flops", "step_flops", "recomputed_flops")
    return replace(one, live=live, **{name: line(name) for name in grown})


def _plans(
    title: str, config: Any, measured: Measured, frozen_parts: list[FrozenPart], wanted: int
) -> list[tuple[Plan, bool]]:
    """One plan for each strategy and number of GPUs, with the wanted samples of a step kept where ranks allow."""
    training, found = config.training, []
    budget = config.run.world_size or 8
    for world in (count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count <= budget):
        micro = training.batch_size * world
        if micro > wanted and training.batch_size > 1:
            continue  # a smaller micro-batch keeps the recipe's samples
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
            cells += [f"{steps * samples_of(training) / plan.samples_per_step * seconds / DAY:.2f}"]
        lines.append("  ".join(f"{cell!s:>{len(head)}}" for cell, head in zip(cells, heads, strict=True)))
    return "\n".join(lines)


def _better(plan: Plan, other: Plan) -> bool:
    """Fits before not; then more samples a second; among those that do not fit, the smaller one."""
    if fits(plan) != fits(other):
        return fits(plan)
    if not fits(plan):
        return plan.peak_memory < other.peak_memory
    return plan.samples_per_step / plan.seconds_per_step > 1.001 * other.samples_per_step / other.seconds_per_step
