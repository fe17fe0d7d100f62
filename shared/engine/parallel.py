"""ddp and fsdp (FSDP2) behind the interface of strategy.py, and the choice of a strategy by its name."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shared.config import TrainingSection
from shared.engine.dist import DistInfo
from shared.engine.strategy import Strategy, blocks_of, ensure_group
from shared.errors import UserError
from shared.optim import adamw


class DDP(Strategy):
    """Every rank holds everything; gradients are averaged in the last micro-step."""

    def _wrap(self, groups: list[dict]) -> None:
        ids = [self.info.device.index] if self.info.device.type == "cuda" else None
        self.model = self.replicas = DistributedDataParallel(
            self.module, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        self.optimizer = adamw(groups, self.parameters, self.training)

    def micro_step(self, is_last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if is_last else self.replicas.no_sync()


class FSDP(Strategy):
    """FSDP2: parameters, gradients and moments are sharded; blocks are gathered when they run."""

    def _place(self, wrap_classes: tuple[type, ...]) -> None:
        mesh = init_device_mesh(self.info.device.type, (self.info.world,))
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        # Inputs keep their dtype (times and positions must stay fp32); autocast does the casting inside.
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
        )
        if self.cpu_offload:  # parameters stay in host memory, buffers are read on the device
            for module in self.module.modules():
                for name, buffer in list(module.named_buffers(recurse=False)):
                    module._buffers[name] = buffer.to(self.info.device)
        # fully_shard moves the weights of its unit to the device and keeps this rank's part, one unit after another:
        # the device never holds the whole model.
        # Reshard after every forward, the root's too: swapped weights must not be seen in a stale gathered copy.
        on_gpu = self.info.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if self.cpu_offload else OffloadPolicy()
        for module in [*blocks_of(self.module, wrap_classes), self.module]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, offload_policy=offload)
            for name in getattr(module, "forward_methods", ()):  # called from outside in place of forward
                register_fsdp_forward_method(module, name)

    @contextlib.contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        # Without the sync a rank keeps whole fp32 gradients until the last micro-step: fewer bytes sent, more held.
        self.module.set_requires_gradient_sync(is_last or self.training.reduce_each_micro_step)
        self.module.set_is_last_backward(is_last)
        yield

    def _sharded(self, name: str) -> DTensor:
        parameter = self.parameters[name]
        assert isinstance(parameter, DTensor)
        return parameter

    def local_value(self, name: str) -> Tensor:
        return self._sharded(name).to_local().detach()

    def compute_part(self, name: str) -> Tensor:
        return self._sharded(name).to_local().detach()

    def gather_local(self, name: str, local: Tensor) -> Tensor:
        parameter = self._sharded(name)
        whole = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return whole.full_tensor().float().cpu()

    def _gather(self, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def local_rows(self, name: str, local: Tensor) -> Tensor:
        return local

    def _local(self, value: Tensor) -> Tensor:
        return value.to_local() if isinstance(value, DTensor) else value

    def _held(self, name: str, value: Any) -> Tensor:
        start, stop = self.rows(name)
        return value[start:stop]


def check_strategy(name: str | None, world: int, cpu_offload: bool) -> str:
    """The strategy that is meant. UserError for what cannot work."""
    name = name or ("ddp" if world > 1 else "none")
    if name == "none" and world > 1:
        raise UserError(f"--strategy none runs on one rank, {world} were started; use ddp, fsdp, zero1, zero2 or zero3")
    if cpu_offload and name in ("none", "ddp"):
        raise UserError(f"--cpu-offload works with the strategies fsdp, zero1, zero2 and zero3, not with {name}")
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--strategy {name} needs DeepSpeed: pip install 'deepspeed>=0.19,<0.20'")
    return name


def make_strategy(
    name: str | None, info: DistInfo, precision: str, training: TrainingSection, cpu_offload: bool = False
) -> Strategy:
    """The strategy of that name; null means ddp on several ranks and none on one. UserError for what cannot work."""
    name = check_strategy(name, info.world, cpu_offload)
    if name == "none":
        return Strategy(name, info, precision, training)
    ensure_group()
    if name == "ddp":
        return DDP(name, info, precision, training)
    if name == "fsdp":
        return FSDP(name, info, precision, training, cpu_offload)
    from shared.engine.zero import Zero  # DeepSpeed takes a second to import: only where it is used

    return Zero(name, info, precision, training, cpu_offload)
