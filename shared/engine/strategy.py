"""How ranks share one model, behind one interface: one rank here, ddp and fsdp in parallel.py, ZeRO in zero.py.

The loop sees: micro_step (a context around forward and backward), backward, optimizer_step, set_lr.
Checkpoint and EMA see: full tensors by parameter name, and local values (the part of a parameter that this rank holds
in fp32). Every method that gathers is a collective: all ranks call it, in the same order.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.config import TrainingSection
from shared.engine.checkpoint import frozen_digest
from shared.engine.dist import DistInfo, gather_objects, use_tf32
from shared.engine.products import use_fast_products
from shared.engine.recompute import keep_products, use_float8
from shared.errors import UserError
from shared.optim import FusedOptimizer, adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


class StepInfo:
    """What one optimizer step did: the gradient's norm before clipping, and whether it was finite; if it was not, the
    step was left out, on all ranks.

    The number is on its way from the device: making this waits for nothing, reading it does.
    """

    def __init__(self, norm: Tensor | float):
        self._norm, self._arrived = norm, None
        if isinstance(norm, Tensor) and norm.is_cuda:
            self._norm = norm.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.current_stream(norm.device).record_event()

    @property
    def grad_norm(self) -> float:
        """Before clipping; not a finite number when the step was left out."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._norm)

    @property
    def applied(self) -> bool:
        """Whether the weights were changed."""
        return math.isfinite(self.grad_norm)


class LossScale:
    """Dynamic loss scale for fp16: halve when a gradient overflows, double after 2,000 good steps."""

    def __init__(self, enabled: bool):
        self.value, self.good_steps, self.enabled = (2.0**16 if enabled else 1.0), 0, enabled

    def update(self, finite: bool) -> None:
        """Take in whether the gradient of one step was finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % 2000 == 0:
            self.value *= 2


class Strategy:
    """No wrapper at all: one rank. Also the base of the others, which override what differs."""

    def __init__(self, name: str, info: DistInfo, precision: str, training: TrainingSection, cpu_offload: bool = False):
        self.name, self.info, self.precision, self.training = name, info, precision, training
        self.cpu_offload = cpu_offload
        self.scale = LossScale(precision == "fp16")
        self.frozen_sha256: str | None = None  # of a model that came on the meta device
        self.module: nn.Module
        self.model: nn.Module  # what the objective calls
        self.parameters: dict[str, nn.Parameter]
        self.optimizer: FusedOptimizer

    # --- set-up -------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        model: nn.Module,
        groups: list[dict],
        wrap_classes: tuple[type | str, ...] = (),
        first_values: Callable[[str], Any] | None = None,
    ) -> None:
        """Place, compile and wrap the model; make the optimizer over its trainable parameters, grouped by name.

        first_values(name): for a model on the meta device, each parameter and buffer, as a tensor or a file's (Stored),
        of which fsdp reads the rows that a rank holds. Buffers that are not on meta stay.
        """
        self.module = model
        use_fast_products(model)
        use_tf32(self.training.allow_tf32)
        keep_products(self.training.keep_products)
        if self.training.float8 and self.training.compile:  # phases that train a codec compile nothing
            use_float8(blocks_of(model, wrap_classes))
        buffers = [name for name, buffer in model.named_buffers() if buffer.is_meta]
        self._place(wrap_classes)
        if first_values is not None:
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    self._local(parameter.detach()).copy_(self._held(first_values(name)))
                for name in buffers:
                    self.module.get_buffer(name).copy_(first_values(name)[...])
            self.frozen_sha256 = frozen_digest(self.module)  # before ZeRO takes the weights apart
        if self.training.compile:
            for block in blocks_of(model, wrap_classes):
                block.compile()
        self.parameters = trainable_parameters(self.module)
        self._wrap(groups)

    def _place(self, wrap_classes: tuple[type | str, ...]) -> None:
        give_memory(self.module, self.info.device)
        self.module.to(self.info.device)

    def _wrap(self, groups: list[dict]) -> None:
        self.model = self.module
        self.optimizer = adamw(groups, self.parameters, self.training)

    # --- one step -----------------------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of model calls; weights, losses and optimizer state stay fp32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.info.device.type, dtype=dtype)

    def micro_step(self, is_last: bool) -> contextlib.AbstractContextManager:
        """The context of one micro-step's forward and backward; gradients are reduced over ranks in the last one."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pre-weighted loss."""
        (loss * self.scale.value).backward()

    def optimizer_step(self) -> StepInfo:
        """Clip, step and clear. A gradient that is not finite leaves the weights as they are, on all ranks alike.

        The fused optimizer scales the gradients, or leaves the step out, by numbers on the device (FusedOptimizer's
        attributes): nothing waits here but fp16, whose next loss scale depends on this step.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm) / self.scale.value
        done = StepInfo(norm)
        if limit := self.training.max_grad_norm:
            self.optimizer.grad_scale = self.scale.value * ((norm + 1e-6) / limit).clamp(min=1.0)
        elif self.scale.enabled:
            self.optimizer.grad_scale = torch.full_like(norm, self.scale.value)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        if self.scale.enabled:
            self.scale.update(done.applied)
        self.optimizer.zero_grad(set_to_none=True)
        return done

    def set_lr(self, learning_rate: float) -> None:
        """Set the learning rate of this step, times each group's scale."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)

    def with_gradient(self) -> dict[str, bool]:
        """Which trainable parameters have a gradient on this rank, after a backward."""
        return {name: parameter.grad is not None for name, parameter in self.parameters.items()}

    # --- state by name ------------------------------------------------------------------------------------------------

    def frozen_count(self) -> int:
        """Numbers in the frozen parameters."""
        return sum(p.numel() for p in self.module.parameters() if not p.requires_grad)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return tuple(self.parameters[name].shape)

    def full(self, kind: str, name: str) -> Tensor:
        """The whole fp32 tensor of a parameter's weight or moment, on the CPU. Moments: of those in steps_taken()."""
        value = self.parameters[name] if kind == "weight" else self.optimizer.state[self.parameters[name]][kind]
        return self._gather(value.detach()).float().cpu()

    def load_full(self, kind: str, name: str, value: Any) -> None:
        """Put a whole tensor into place; every rank passes the same one, as a tensor or as a file's (Stored), of which
        only the rows are read that this rank holds.
        """
        parameter = self.parameters[name]
        if kind == "weight":
            place = parameter.detach()
        else:  # laid out in memory as the parameter is: the fused optimizer walks both side by side
            place = self.optimizer.state[parameter][kind] = torch.empty_like(parameter).detach()
        self._local(place).copy_(self._held(value))

    def steps_taken(self) -> dict[str, int]:
        """The optimizer's own step count of each parameter."""
        states = ((name, self.optimizer.state.get(parameter, {})) for name, parameter in self.parameters.items())
        return {name: int(state["step"]) for name, state in states if "step" in state}

    def load_steps_taken(self, steps: dict[str, int]) -> None:
        """Restore steps_taken(); called before the moments are loaded."""
        for name, step in steps.items():
            parameter = self.parameters[name]
            device = self.info.device if self.optimizer.defaults["fused"] else "cpu"
            self.optimizer.state[parameter]["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)

    def local_value(self, name: str) -> Tensor:
        """This rank's part of the fp32 weight."""
        return self.parameters[name].detach()

    def gather_local(self, name: str, local: Tensor) -> Tensor:
        """The whole CPU tensor of a value laid out as local_value (an EMA)."""
        return local.float().cpu()

    def split_full(self, name: str, full: Any) -> Tensor:
        """This rank's part, laid out as local_value, of a whole tensor (or a file's)."""
        return self._held(full).to(self.info.device, torch.float32)

    def rows(self, name: str) -> tuple[int, int]:
        """The rows of a parameter, from and up to, that this rank writes into a checkpoint in shards. (A scalar has
        one.)
        """
        return rows_of(self.shape(name), self.info.rank, self.info.world)

    def part(self, kind: str, name: str) -> Tensor:
        """These rows of a weight or a moment; a collective under ZeRO, which does not hold rows."""
        value = self.parameters[name] if kind == "weight" else self.optimizer.state[self.parameters[name]][kind]
        return self.local_rows(name, self._local(value.detach()))

    def local_rows(self, name: str, local: Tensor) -> Tensor:
        """These rows of a value laid out as local_value."""
        start, stop = self.rows(name)
        if local.ndim:
            return local[start:stop]
        return local if start < stop else local.new_empty(0)

    @contextlib.contextmanager
    def swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Run with other weights (laid out as local_value), then put the own ones back."""
        own = {name: self.compute_part(name).clone() for name in values}
        try:
            for name, value in values.items():
                self.compute_part(name).copy_(value.reshape(self.compute_part(name).shape))
            yield
        finally:
            for name, value in own.items():
                self.compute_part(name).copy_(value)

    def compute_part(self, name: str) -> Tensor:
        """The storage that the forward pass reads this rank's part of a parameter from."""
        return self.parameters[name].data

    def _gather(self, value: Tensor) -> Tensor:
        return value

    def _local(self, value: Tensor) -> Tensor:
        return value

    def _held(self, value: Any) -> Tensor:
        return value[...]


def rows_of(shape: tuple[int, ...], place: int, places: int) -> tuple[int, int]:
    """The rows, from and up to, of the place-th of so many parts, as torch.chunk cuts them; a scalar is one row."""
    height = shape[0] if shape else 1
    size = -(-height // places)
    return min(place * size, height), min((place + 1) * size, height)


def choose_precision(precision: str | None, device: torch.device) -> str:
    """null: bf16 where the device multiplies it natively, else fp32. fp16 on a CPU is refused."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError(
            "--precision fp16 needs CUDA (on a CPU it is about 17 times slower than fp32); use bf16 or fp32"
        )
    if precision is not None:
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def ensure_group() -> None:
    """A process group of one where there is none, for the strategies that always talk to one."""
    if not torch_dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)


def blocks_of(model: nn.Module, wrap_classes: tuple[type | str, ...]) -> list[nn.Module]:
    """The modules to compile one by one, in order."""
    classes = tuple(kind for kind in wrap_classes if isinstance(kind, type))
    return [module for module in model.modules() if isinstance(module, classes)]


def units_of(model: nn.Module, wrap_classes: tuple[type | str, ...]) -> list[nn.Module]:
    """The modules to shard one by one: the blocks, and those that wrap_classes names, such as an embedding or a head
    that is called as a module and shares no parameter with others.
    """
    blocks = {id(block) for block in blocks_of(model, wrap_classes)}
    return [module for name, module in model.named_modules() if id(module) in blocks or name in wrap_classes]


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Memory without values for what a module has on the meta device; tied parameters stay tied."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return
    first: dict[int, tuple[nn.Module, str]] = {}
    ties, real = [], []
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and first.setdefault(id(parameter), (owner, name)) != (owner, name):
                ties.append((owner, name, *first[id(parameter)]))
        real += [(owner, name, b.to(device)) for name, b in owner._buffers.items() if b is not None and not b.is_meta]
    module.to_empty(device=device)
    for owner, name, other, its in ties:
        owner._parameters[name] = other._parameters[its]
    for owner, name, buffer in real:
        owner._buffers[name] = buffer


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a tied one appears once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_gradients_agree(strategy: Strategy, step: int) -> None:
    """Raise when ranks differ in which parameters have a gradient, or when one has none anywhere.

    Without this FSDP2 and ZeRO add the gradients of different parameters to one another, silently.
    """
    masks = gather_objects(strategy.with_gradient())
    for name in strategy.parameters:
        having = [rank for rank, mask in enumerate(masks) if mask.get(name, False)]
        if len(having) == len(masks):
            continue
        if having:
            lacking = next(rank for rank in range(len(masks)) if rank not in having)
            raise RuntimeError(
                f"step {step}: parameter {name} has a gradient on rank {having[0]} and none on rank {lacking}; "
                "every rank must run the same modules in every step: feed a placeholder input at weight 0"
            )
        raise RuntimeError(
            f"step {step}: trainable parameter {name} has no gradient on any rank; freeze it, or use it at weight 0"
        )


# Moving average of the trainable weights, kept where the fp32 weights live (sharded under fsdp and zero3).


class EMA:
    """values <- decay values + (1 - decay) weights after every applied optimizer step.

    warmup: decay min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that short runs forget their start.
    """

    def __init__(self, strategy: Strategy, decay: float, warmup: bool = True):
        self.strategy, self.decay, self.warmup, self.updates = strategy, decay, warmup, 0
        self.values = {name: strategy.local_value(name).clone() for name in strategy.parameters}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of this step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = [self.strategy.local_value(name) for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), weights, 1 - decay)
        self.updates += 1

    def applied(self) -> contextlib.AbstractContextManager:
        """A context in which the model runs with the averaged weights."""
        return self.strategy.swapped(self.values)

    def full(self, name: str) -> Tensor:
        """The whole averaged tensor on the CPU; a collective."""
        return self.strategy.gather_local(name, self.values[name])

    def part(self, name: str) -> Tensor:
        """The averaged rows that this rank writes into a checkpoint in shards."""
        return self.strategy.local_rows(name, self.values[name])

    def load_full(self, name: str, value: Any) -> None:
        """Put a whole tensor, or a file's, into place; every rank passes the same one."""
        self.values[name].copy_(self.strategy.split_full(name, value))
