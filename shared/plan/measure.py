"""The dry run: parameters, FLOPs, memory, traffic and time of a training step, known before renting.

Nothing is allocated: the model is built and run forward and backward at full size on fake tensors, on any machine.
"""

import math
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shared.config import RunSection, TrainingSection, accumulation_steps, checkpoint_bytes, writes_shards
from shared.engine.strategy import units_of
from shared.errors import UserError
from shared.optim import ZERO_STAYS_GATHERED, zero_bucket

ASSUMED_UTILISATION = 0.40  # share of the matrix peak that a well-fed transformer step reaches; printed with the time
ZERO_PREFETCHED = 50_000_000  # numbers that DeepSpeed gathers at once


@dataclass(frozen=True)
class GPU:
    """Data-sheet figures of a card.

    Dense matrix peaks in TFLOP/s: bf16, TF32 (fp32 products with allow_tf32) and plain fp32. Memory in GB and its rate
    in GB/s. What one card sends in GB/s: to cards of its node, and to other nodes over a usual network card.
    """

    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb: float
    memory_gb_per_second: float
    link_gb_per_second: float
    network_gb_per_second: float


GPUS = {
    "3070-ti": GPU(43.5, 21.7, 21.7, 8, 608, 16, 3),
    "3080": GPU(59, 30, 30, 10, 760, 16, 3),
    "3090": GPU(71, 36, 36, 24, 936, 16, 3),
    "4090": GPU(165, 83, 83, 24, 1008, 16, 3),
    "5090": GPU(210, 105, 105, 32, 1792, 32, 3),
    "a10": GPU(125, 62, 31, 24, 600, 16, 3),
    "l4": GPU(121, 60, 30, 24, 300, 16, 3),
    "l20": GPU(119.5, 59.8, 59.8, 48, 864, 32, 12),
    "l40": GPU(181, 90.5, 90.5, 48, 864, 32, 12),
    "l40s": GPU(362, 183, 92, 48, 864, 32, 12),
    "a6000": GPU(155, 77, 39, 48, 768, 28, 3),
    "a100-40gb": GPU(312, 156, 19.5, 40, 1555, 250, 25),
    "a100": GPU(312, 156, 19.5, 80, 2039, 250, 25),
    "a800": GPU(312, 156, 19.5, 80, 2039, 180, 25),
    "h20": GPU(148, 74, 44, 96, 4000, 400, 50),
    "h100": GPU(989, 494, 67, 80, 3350, 400, 50),
    "h200": GPU(989, 494, 67, 141, 4800, 400, 50),
    "h800": GPU(989, 494, 67, 80, 3350, 180, 50),
    "b200": GPU(2250, 1100, 80, 180, 8000, 800, 50),
    "mi300x": GPU(1307, 653, 163, 192, 5300, 400, 50),
    "910b": GPU(354, 177, 94, 64, 1600, 180, 25),
}
ADAMW_BYTES = 28  # a fused step reads weight, gradient and two moments in fp32 and writes back all but the gradient
EMA_BYTES = 12  # the average is read and written, the weight is read


def gpu_named(device_name: str) -> GPU | None:
    """The table's entry for a device's own name, such as "NVIDIA A100-SXM4-80GB"; None where the table has none.

    A model number counts as a whole only: an H20 is no H200, an A10G no A10, a laptop's chip not the desktop's.
    """
    name = re.sub(r"ascend(910b)\d*", r"\1", device_name.lower())
    if "laptop" in name:
        return None
    words = re.split(r"[^a-z0-9]+", name)
    for model in sorted(GPUS, key=len, reverse=True):  # "3070-ti" before a "3070", "a100-40gb" before "a100"
        parts = model.split("-")
        if all(part in words for part in parts):
            return GPUS[model]
    return None


@dataclass(frozen=True)
class FrozenPart:
    """A frozen encoder that runs before the model: parameters, bytes on the device, FLOPs for one micro-batch.

    activations: the most bytes that live at one time while it encodes, besides its weights. precision: what it computes
    in, where that is not the run's. host_bytes: of its weights where every rank keeps them in host memory.
    """

    name: str
    parameters: int
    bytes: int
    flops: float = 0.0
    activations: int = 0
    precision: str | None = None
    host_bytes: int = 0


@dataclass(frozen=True)
class Moment:
    """Bytes until all weights were used, and from then or from a gradient that is complete until the next one is:
    activations go as gradients come.
    """

    scattered: int  # gradients of the units that are through
    whole: int  # gradients of the unit at work and of what lies in no unit
    flat: int  # those of `whole` that would be scattered together, were this one the last of them
    then: int  # other tensors when it began
    others: int  # most other tensors until the next one

    @property
    def gradients(self) -> int:
        """All so far."""
        return self.scattered + self.whole


@dataclass
class Measured:
    """What one symbolic micro-step showed."""

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int
    forward_flops: float
    step_flops: float  # forward and backward, with what checkpointing computes again
    live: tuple["Moment", ...] = ()
    unit: int = 0  # parameters of the largest unit that fsdp and zero3 gather
    in_units: int = 0  # parameters that are in units
    gathered: int = 0  # the same, as often as a forward pass calls each unit
    astray: int = 0  # parameters that fsdp gathers in the backward for nothing
    root: int = 0  # parameters that are in no unit
    block_bytes: int = 0  # of both
    recomputed_flops: float = 0.0  # of step_flops

    def live_bytes(self, share: float) -> int:
        """Most bytes at one time where a rank keeps this share of every gradient that is complete."""
        return max((math.ceil(moment.others + share * moment.gradients) for moment in self.live), default=0)

    def sharded_bytes(self, share: float, width: int, *, kept: bool = False) -> int:
        """The same under FSDP2, with the weights gathered at that time in `width` bytes a number.

        As counted on CPU ranks: what lies in no unit is there throughout; a unit, the next one, which comes flat and is
        then cut apart, and the flat copy of what the forward gathered last; the unit's whole gradients, and when the
        last one has come a flat copy of them, from which each rank gets its share. kept: whole gradients of earlier
        micro-steps stay.
        """
        most, whole = 0.0, 4 * self.trainable
        for moment in self.live:
            gradients = whole if kept else share * moment.scattered + moment.whole
            during = moment.others + gradients + 3 * width * self.unit
            scattering = moment.then + gradients + (1 + share) * moment.flat + 2 * width * self.unit
            most = max(most, during, scattering)
        return math.ceil(most) + width * self.root * (1 if self.unit else 2)

    def zero3_bytes(self, width: int) -> int:
        """The same under ZeRO-3 with weights that stay gathered, without gradients, whose shards are there throughout.

        As counted on CPU ranks: weights come in flat pieces and are cut apart when they are used, and the pieces last
        until all are; a weight goes when its gradient has come.
        """
        numbers = self.trainable + self.frozen
        first, *others = self.live or [Moment(0, 0, 0, 0, 0)]
        pieces = width * min(numbers, ZERO_PREFETCHED)
        during = (moment.others - width / 4 * moment.gradients for moment in others)
        return math.ceil(width * numbers + max([first.others + pieces, *during]))


@dataclass
class Plan:
    """The plan for one strategy and number of ranks; bytes per rank unless said otherwise."""

    title: str
    strategy: str
    world: int
    gpu_name: str
    precision: str
    micro_batch: int
    accumulation: int
    measured: Measured
    frozen_parts: list[FrozenPart]
    cpu_offload: bool = False
    reduce_each_micro_step: bool = False
    replicas: int = 1  # fsdp: copies of the sharded model
    ddp_bf16: bool = False
    starts_in_parts: bool = False
    built_in_fp32: bool = False
    built_once: bool = False
    tf32: bool = True
    gpus_per_node: int = 8
    memory: dict[str, int] = field(default_factory=dict)
    startup_bytes: int = 0  # of a card, while the weights are placed
    host_bytes: int = 0  # of a node: every rank builds the model, one holds a checkpoint on its way to the disk
    traffic_bytes: int = 0
    checkpoint_bytes: int = 0
    compute_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    traffic_seconds: float = 0.0

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the model is cut, under a strategy that cuts it."""
        return self.world // self.replicas

    @property
    def peak_memory(self) -> int:
        """Bytes of one rank, all parts together."""
        return sum(self.memory.values())

    @property
    def flops_per_step(self) -> float:
        """All ranks' work for one optimizer step, frozen encoders included."""
        return (
            self.world * self.accumulation * (self.measured.step_flops + sum(part.flops for part in self.frozen_parts))
        )

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.world * self.accumulation * self.micro_batch

    @property
    def seconds_per_step(self) -> float:
        """Traffic hides behind compute where it is the smaller one; the optimizer's step waits for both."""
        return max(self.compute_seconds, self.traffic_seconds) + self.optimizer_seconds

    @property
    def model_flops_share(self) -> float:
        """The share of the model's work that is not computed a second time (1 without checkpointing)."""
        return 1 - self.measured.recomputed_flops / max(self.measured.step_flops, 1.0)


class _LiveMemory(TorchDispatchMode):
    """Adds up the storages that operations make, takes off those that are freed, and keeps the peak.

    units: parameter's id -> number of the unit that it is in.
    """

    def __init__(self, known: list[Tensor], units: dict[int, int] | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.moments = [Moment(0, 0, 0, 0, 0)]
        self._units, self._unit, self._in_unit, self._in_none = units or {}, -1, 0, 0
        self._seen: dict[int, weakref.ref] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        last = self.moments[-1]
        if self.live - last.gradients > last.others:
            self.moments[-1] = replace(last, others=self.live - last.gradients)

    def note_use(self) -> None:
        """Weights are used for the first time."""
        most = max(moment.others for moment in self.moments)
        self.moments = [replace(self.moments[0], others=most), Moment(0, 0, 0, self.live, self.live)]

    def note_gradient(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is complete: from now on it counts as such."""
        assert parameter.grad is not None
        size, unit, scattered = _bytes(parameter.grad), self._units.get(id(parameter)), self.moments[-1].scattered
        if unit is None:
            self._in_none += size
        elif unit == self._unit:
            self._in_unit += size
        else:
            scattered += self._in_unit
            self._unit, self._in_unit = unit, size
        whole = self._in_unit + self._in_none
        others = max(0, self.live - scattered - whole)
        self.moments.append(Moment(scattered, whole, self._in_none if unit is None else self._in_unit, others, others))

    def _forget(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.live -= size


class _Counter(FlopCounterMode):
    """Also counts, apart, what checkpointing computes again: within backward only that runs with gradients enabled."""

    def __init__(self):
        super().__init__(display=False, custom_mapping=_FLOPS)
        self.in_backward, self.recomputed = False, 0

    def _count_flops(self, function, result, arguments, named):
        before = self.get_total_flops()
        result = super()._count_flops(function, result, arguments, named)
        if self.in_backward and torch.is_grad_enabled():
            self.recomputed += self.get_total_flops() - before
        return result


def _attention_flops(query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size) -> int:
    """Two matrix products over (batch, heads, query tokens, key tokens)."""
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[-2] * (width + value_shape[-1])


def _attention_forward(query, key, value, *_, out_val=None, **__) -> int:
    return _attention_flops(query, key, value)


def _attention_backward(grad, query, key, value, *_, out_val=None, **__) -> int:
    return 2 * _attention_flops(query, key, value)  # the model's work: recomputation inside the kernel is not counted


def _added_product(_, first: torch.Size, second: torch.Size, **__) -> int:
    return 2 * first[0] * first[1] * second[1]


# What torch's counter has no formula for: products summed in place, and the attention kernel of the CPU.
_FLOPS = {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def measure(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module], Tensor],
    precision: str,
    blocks: tuple[type | str, ...] = (),
) -> Measured:
    """Build the model and run `step(model) -> loss` for one micro-batch, forward and backward, on fake tensors.

    `step` makes its own inputs with torch.randn and the like. Attention must go through scaled_dot_product_attention to
    be planned as the fused kernel that it is.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build().train()
        parameters = list(model.parameters())
        units = units_of(model, blocks)
        number_of = {id(p): number for number, unit in enumerate(units) for p in unit.parameters()}
        memory = _LiveMemory([*parameters, *model.buffers()], number_of)
        half = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}.get(precision)
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(memory.note_gradient)
        counter = _Counter()
        autocast = torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None)
        gathered: list[tuple[int, bool]] = []  # at each call of a unit: its parameters, whether gradients are wanted

        def note(unit: nn.Module, _: object) -> None:
            gathered.append((_numbers(unit), torch.is_grad_enabled()))

        def note_use(layer: nn.Module, _: object) -> None:
            if layer in unused:
                unused.remove(layer)
                memory.note_use()

        unused = {layer for layer in model.modules() if list(layer.parameters(recurse=False))}
        calls = [unit.register_forward_pre_hook(note) for unit in units]
        calls += [layer.register_forward_pre_hook(note_use) for layer in unused]
        with memory:  # apart from the counting, which keeps tensors alive
            with autocast:
                loss = step(model)
            for call in calls:
                call.remove()
            loss.backward()
            del loss
        live = tuple(memory.moments)
        with counter:
            with autocast:
                loss = step(model)
            forward = counter.get_total_flops()
            counter.in_backward = True
            loss.backward()
        trainable = [p for p in parameters if p.requires_grad]
        frozen = [p for p in parameters if not p.requires_grad]
        root = [p for p in parameters if id(p) not in number_of]
        return Measured(
            trainable=sum(p.numel() for p in trainable),
            frozen=sum(p.numel() for p in frozen),
            trainable_bytes=sum(map(_bytes, trainable)),
            frozen_bytes=sum(map(_bytes, frozen)),
            forward_flops=float(forward),
            step_flops=float(counter.get_total_flops()),
            live=live,
            unit=max(map(_numbers, units), default=0),
            in_units=sum(map(_numbers, units)),
            gathered=sum(count for count, _ in gathered),
            # before the backward is through with a unit FSDP2 gathers the one that the forward called before it
            astray=next((one for (one, wanted), (_, next_) in pairwise(gathered) if next_ and not wanted), 0),
            root=sum(p.numel() for p in root),
            block_bytes=sum(map(_bytes, root)) + max((sum(map(_bytes, u.parameters())) for u in units), default=0),
            recomputed_flops=float(counter.recomputed),
        )


def make_plan(
    title: str,
    measured: Measured,
    *,
    run: RunSection,
    training: TrainingSection,
    strategy: str | None = None,
    world: int | None = None,
    gpu: str | None = None,
    frozen_parts: list[FrozenPart] | None = None,
    starts_in_parts: bool = False,
    built_in_fp32: bool = False,
    built_once: bool = False,
) -> Plan:
    """Memory, traffic and time of one optimizer step from the measured micro-step."""
    world = world or run.world_size or 1
    strategy = strategy or run.strategy or ("ddp" if world > 1 else "none")
    if strategy == "none" and world > 1:
        raise UserError(
            f"--strategy none plans for one rank, --world-size is {world}; use ddp, fsdp, zero1, zero2 or zero3"
        )
    if world % run.fsdp_replicas and not run.plan_table:
        raise UserError(f"--fsdp-replicas {run.fsdp_replicas} do not divide the {world} ranks of --world-size")
    gpu_name = (gpu or run.gpu or "a100").lower()
    if gpu_name not in GPUS:
        raise UserError(f"--gpu {gpu_name}: not in the table; use one of {', '.join(GPUS)}")
    plan = Plan(
        title,
        strategy,
        world,
        gpu_name,
        run.precision or "bf16",
        training.batch_size,
        accumulation_steps(training, world),
        measured,
        frozen_parts or [],
        run.cpu_offload,
        training.reduce_each_micro_step,
        math.gcd(run.fsdp_replicas, world) if strategy == "fsdp" else 1,
        run.ddp_bf16,
        starts_in_parts and strategy == "fsdp",
        built_in_fp32,
        built_once and strategy == "fsdp",
        training.allow_tf32,
        run.gpus_per_node,
    )
    has_ema = training.ema_decay > 0
    plan.memory = _memory(plan, has_ema)
    plan.checkpoint_bytes = checkpoint_bytes(training, measured.trainable)
    writers = world if writes_shards(training, measured.trainable, world) else 1
    plan.startup_bytes, plan.host_bytes = _startup(plan, training.save_in_background, writers)
    shared, over_copies = _traffic(plan)
    plan.traffic_bytes = math.ceil(shared + over_copies)
    card, share = GPUS[gpu_name], plan.shards if strategy in ("fsdp", "zero3") else 1
    peak = 1e12 * ASSUMED_UTILISATION
    plan.compute_seconds = plan.accumulation * (
        measured.step_flops / (peak * _matrix_peak(plan, plan.precision))
        + sum(part.flops / (peak * _matrix_peak(plan, part.precision or plan.precision)) for part in plan.frozen_parts)
    )
    touched = ADAMW_BYTES / (world if strategy.startswith("zero") else share) + EMA_BYTES * has_ema / share
    plan.optimizer_seconds = measured.trainable * touched / (card.memory_gb_per_second * 1e9)
    plan.traffic_seconds = (shared / _link(plan, plan.shards) + over_copies / _link(plan, world)) / 1e9
    return plan


def _matrix_peak(plan: Plan, precision: str) -> float:
    """TFLOP/s of the card's matrix units at a precision; fp32 uses TF32 only where the run allows it."""
    card = GPUS[plan.gpu_name]
    if precision != "fp32":
        return card.bf16_tflops
    return card.tf32_tflops if plan.tf32 else card.fp32_tflops


def _link(plan: Plan, ranks: int) -> float:
    """GB/s that one of so many ranks sends: a ring over several nodes is as fast as the network between them."""
    card = GPUS[plan.gpu_name]
    return card.link_gb_per_second if ranks <= plan.gpus_per_node else card.network_gb_per_second


def _memory(plan: Plan, has_ema: bool) -> dict[str, int]:
    """Bytes per rank by part; sharded parts are divided by the ranks."""
    found, world, width = plan.measured, plan.shards, 4 if plan.precision == "fp32" else 2
    weights_sharded = plan.strategy in ("fsdp", "zero3")
    shard = 1 if plan.strategy in ("none", "ddp") else world
    weights = found.trainable_bytes / (world if weights_sharded else 1)
    if plan.strategy.startswith("zero"):  # fp32 masters in shards, and a copy to compute with
        weights = found.trainable_bytes / world + width * found.trainable / (world if weights_sharded else 1)
    gradient_share = 1 / world if plan.strategy in ("fsdp", "zero2", "zero3") else 1.0
    if plan.strategy == "fsdp" and plan.accumulation > 1 and not plan.reduce_each_micro_step:
        gradient_share = 1.0  # FSDP2 keeps them whole, in fp32, until the last micro-step scatters their sum
    gradients = 4 * found.trainable * gradient_share
    # DDP's buckets, ZeRO-3's shards and the sum of earlier micro-steps are there from the beginning of a backward
    whole = plan.strategy in ("ddp", "zero3") or plan.accumulation > 1
    activations = found.live_bytes(0.0) if whole else max(0.0, found.live_bytes(gradient_share) - gradients)
    # the frozen encoders run before the model, and what they held is free again when it starts
    activations = max([activations, *(part.activations for part in plan.frozen_parts)])
    kept = plan.accumulation > 1 and not plan.reduce_each_micro_step
    gathered = max(0.0, found.sharded_bytes(1 / world, width, kept=kept) - gradients - activations)
    if plan.strategy == "zero3" and _stays_gathered(found):
        gathered = max(0, found.zero3_bytes(width) - activations)
    parts = {
        "weights": weights + found.frozen_bytes / (world if weights_sharded else 1),
        "gathered units": gathered if weights_sharded else 0,
        "gradients": gradients,
        "bucket": width * zero_bucket(found.trainable) if plan.strategy.startswith("zero") else 0,
        "Adam moments": 8 * found.trainable / shard,
        "moving average": 4 * found.trainable / (world if weights_sharded else 1) if has_ema else 0,
        "activations": activations,
        "frozen encoders": sum(part.bytes for part in plan.frozen_parts),
    }
    if plan.cpu_offload:  # these stay in host memory
        for name in ("weights", "gradients", "Adam moments", "moving average"):
            parts[name] = 0
    return {name: math.ceil(value) for name, value in parts.items() if value}


def _stays_gathered(found: Measured) -> bool:
    """Whether ZeRO-3 keeps the weights of the forward until the backward."""
    return found.trainable + found.frozen <= ZERO_STAYS_GATHERED


def _startup(plan: Plan, save_in_background: bool, writers: int) -> tuple[int, int]:
    """Bytes of a card while the weights are placed, and of a node's host memory while it starts or saves.

    fsdp moves and shards one unit after another, so that a card holds its shards and one whole unit; the other
    strategies move the whole model. Every rank of a node builds the model in host memory first, in fp32 where a frozen
    base is cast once its weights are in, but where it reads its parts alone or rank 0 builds for all. A background save
    keeps what it writes in host memory until it is on the disk: all of it on the node of rank 0, or every rank its
    shards.
    """
    found, local = plan.measured, min(plan.world, plan.gpus_per_node)
    whole = found.trainable_bytes + found.frozen_bytes
    placed = math.ceil(whole / plan.shards) + found.block_bytes if plan.strategy == "fsdp" else whole
    staging = plan.checkpoint_bytes // writers * min(writers, local) if save_in_background else 0
    offloaded = (whole + 12 * found.trainable) // plan.shards * local if plan.cpu_offload else 0
    by_rank = 4 * (found.trainable + found.frozen) if plan.built_in_fp32 else whole
    # One rank builds on its disk, but for what it reads to put into place.
    built = 0 if plan.starts_in_parts else found.block_bytes if plan.built_once else by_rank * local
    encoders = sum(part.host_bytes for part in plan.frozen_parts) * local
    return 0 if plan.cpu_offload else placed, encoders + max(built, staging + offloaded)


def _traffic(plan: Plan) -> tuple[float, float]:
    """Bytes that one rank sends in one optimizer step, to those with whom it shares a copy of the model, and to the
    other copies; a ring's all-gather or reduce-scatter moves (W-1)/W.
    """
    found, share = plan.measured, (plan.shards - 1) / plan.shards
    weight = 2 if plan.precision != "fp32" else 4
    # A unit is gathered whenever a forward calls it, and in the backward; fsdp keeps what is in no unit for both.
    gathers = weight * plan.accumulation * (found.gathered + found.in_units + 2 * found.root)
    kept = weight * plan.accumulation * found.root
    once = weight * plan.accumulation * (found.in_units + found.root)
    over_copies = 2 * 4 * found.trainable / plan.shards * (plan.replicas - 1) / plan.replicas
    scatters = plan.accumulation if plan.reduce_each_micro_step else 1
    moved = {
        "none": 0,
        "ddp": 2 * (2 if plan.ddp_bf16 else 4) * found.trainable,
        # ZeRO-1 and 2 all-reduce their buckets and keep a part; ZeRO-3 keeps a small model gathered for the backward
        "zero1": 3 * weight * found.trainable,
        "zero2": (2 * weight * plan.accumulation + weight) * found.trainable,
        "fsdp": 4 * found.trainable * scatters + gathers - kept + weight * plan.accumulation * found.astray,
        "zero3": weight * found.trainable * plan.accumulation + (once if _stays_gathered(found) else gathers),
    }
    return share * moved[plan.strategy], over_copies


def describe(plan: Plan) -> str:
    """The plan as text."""
    found, card, samples = plan.measured, GPUS[plan.gpu_name], plan.micro_batch
    rate = plan.samples_per_step / max(plan.seconds_per_step, 1e-12)
    fits = "fits" if plan.peak_memory < 0.94e9 * card.memory_gb else "DOES NOT FIT"
    lines = [
        f"plan: {plan.title}",
        f"parameters          {found.trainable + found.frozen:,} "
        f"({found.trainable:,} trainable, {found.frozen:,} frozen)",
        *(
            f"frozen encoder      {part.name}: {part.parameters:,} parameters, {part.flops:.4g} FLOPs a micro-batch"
            for part in plan.frozen_parts
        ),
        f"samples per step    {plan.samples_per_step} = {samples} a micro-batch x {plan.accumulation} micro-steps "
        f"x {plan.world} ranks",
        f"forward             {found.forward_flops / samples:.4e} FLOPs a sample "
        f"({found.forward_flops / samples / 2e9:.2f} G multiply-adds)",
        f"training step       {plan.flops_per_step:.4e} FLOPs over all ranks "
        f"({found.step_flops / samples:.4e} a sample, {found.recomputed_flops / samples:.4e} of them computed again)",
        f"memory a rank       {plan.peak_memory / 1e9:.2f} GB under {plan.strategy} on {plan.world} ranks in "
        f"{plan.precision}: {fits} {plan.gpu_name} ({card.memory_gb:g} GB)",
        *(f"  {name:<18}{size / 1e9:.3f} GB" for name, size in plan.memory.items()),
        f"start-up            {plan.startup_bytes / 1e9:.2f} GB of a card; host memory of a node "
        f"{plan.host_bytes / 1e9:.2f} GB",
        f"traffic a rank      {plan.traffic_bytes / 1e9:.3f} GB a step at {_link(plan, plan.shards):g} GB/s "
        f"({'within a node' if plan.shards <= plan.gpus_per_node else 'between nodes'})",
        f"checkpoint          {plan.checkpoint_bytes / 1e9:.3f} GB",
        f"expected step       {plan.seconds_per_step:.4g} s on {plan.gpu_name} ({rate:.1f} samples/s): compute "
        f"{plan.compute_seconds:.4g} s at {ASSUMED_UTILISATION:.0%} of the {_peak_name(plan)} matrix peak (assumed; "
        f"{ASSUMED_UTILISATION * plan.model_flops_share:.0%} without what is computed again), traffic "
        f"{plan.traffic_seconds:.4g} s, optimizer {plan.optimizer_seconds:.4g} s",
    ]
    return "\n".join(lines)


def _peak_name(plan: Plan) -> str:
    if plan.precision != "fp32":
        return plan.precision
    return "TF32" if plan.tf32 else "fp32"


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def measure_frozen(build: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> tuple[int, int, int, float]:
    """(parameters, their bytes, largest sum of live tensors next to them, FLOPs) of a frozen module in one run(module)
    without gradients, on fake tensors.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = build().eval()
        parameters = list(module.parameters())
        memory = _LiveMemory([*parameters, *module.buffers()])
        with memory:
            run(module)
        with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            run(module)
        flops = float(counter.get_total_flops())
    return sum(p.numel() for p in parameters), sum(map(_bytes, parameters)), memory.peak, flops
