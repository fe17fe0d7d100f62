"""ddp and fsdp (FSDP2) behind the interface of strategy.py, and the choice of a strategy by its name."""

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
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
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import RunSection, TrainingSection
from shared.engine.checkpoint import Spec, StoredTensors, attempt, write_safetensors
from shared.engine.dist import DistInfo, from_main, gather_objects, raise_together
from shared.engine.strategy import Strategy, ensure_group, give_memory, rows_of, units_of
from shared.errors import UserError, own_folder
from shared.optim import adamw

Model = TypeVar("Model", bound=nn.Module)


class DDP(Strategy):
    """Every rank holds everything; gradients are averaged in the last micro-step."""

    def __init__(self, *arguments: Any, in_bf16: bool = False):
        super().__init__(*arguments)
        self.in_bf16 = in_bf16

    def _wrap(self, groups: list[dict]) -> None:
        ids = [self.info.device.index] if self.info.device.type == "cuda" else None
        self.model = self.replicas = DistributedDataParallel(
            self.module, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        if self.in_bf16:
            self.replicas.register_comm_hook(None, _averaged_in_bf16)
        self.optimizer = adamw(groups, self.parameters, self.training)

    def micro_step(self, is_last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if is_last else self.replicas.no_sync()


def _averaged_in_bf16(_: Any, bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook: a bucket goes to the other ranks in bf16. torch's own of this kind works with NCCL alone."""
    half = bucket.buffer().to(torch.bfloat16).div_(torch_dist.get_world_size())
    sum_of_all = torch_dist.all_reduce(half, async_op=True).get_future()
    return sum_of_all.then(lambda done: bucket.buffer().copy_(done.value()[0]))


class FSDP(Strategy):
    """FSDP2: parameters, gradients and moments are sharded; blocks are gathered when they run."""

    def __init__(self, *arguments: Any, replicas: int = 1):
        super().__init__(*arguments)
        self.replicas, self.shards = replicas, self.info.world // replicas
        sizes, names = (replicas, self.shards), ("replicas", "shards")  # neighbouring ranks share a copy
        drop = int(replicas == 1)
        self.mesh = init_device_mesh(self.info.device.type, sizes[drop:], mesh_dim_names=names[drop:])

    def _place(self, wrap_classes: tuple[type | str, ...]) -> None:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        # Inputs keep their dtype (times and positions must stay fp32); autocast does the casting inside.
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
        )
        # fully_shard moves the weights of its unit to the device and keeps this rank's part, one unit after another:
        # the device never holds the whole model. One on meta gets the memory of its parts alone, filled in prepare().
        on_gpu = self.info.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if self.cpu_offload else OffloadPolicy()
        # What lies in no unit stays gathered from the forward to the backward, where it is needed first and last.
        for unit in units_of(self.module, wrap_classes):
            fully_shard(unit, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True, offload_policy=offload)
            for name in getattr(unit, "forward_methods", ()):  # called from outside in place of forward
                register_fsdp_forward_method(unit, name)
        fully_shard(self.module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False, offload_policy=offload)
        give_memory(self.module, torch.device("cpu") if self.cpu_offload else self.info.device)
        if self.cpu_offload:  # parameters stay in host memory, buffers are read on the device
            for module in self.module.modules():
                for name, buffer in list(module.named_buffers(recurse=False)):
                    module._buffers[name] = buffer.to(self.info.device)

    @contextlib.contextmanager
    def swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """As in the base; first drops what is still gathered from a forward, which would be stale."""
        assert isinstance(self.module, FSDPModule)
        self.module.reshard()
        with super().swapped(values):
            yield
            self.module.reshard()

    @contextlib.contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        # Without the sync a rank keeps whole fp32 gradients until the last micro-step: fewer bytes sent, more held.
        self.module.set_requires_gradient_sync(is_last or self.training.reduce_each_micro_step)
        self.module.set_requires_all_reduce(is_last)  # over the replicas, where there are some
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

    def _shard(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The rows that this rank holds."""
        return rows_of(shape, self.info.rank % self.shards, self.shards)

    def rows(self, name: str) -> tuple[int, int]:
        first, last = self._shard(self.shape(name))
        start, stop = rows_of((last - first,), self.info.rank // self.shards, self.replicas)
        return first + start, first + stop

    def local_rows(self, name: str, local: Tensor) -> Tensor:
        (first, _), (start, stop) = self._shard(self.shape(name)), self.rows(name)
        return local[start - first : stop - first]

    def _local(self, value: Tensor) -> Tensor:
        return value.to_local() if isinstance(value, DTensor) else value

    def _held(self, value: Any) -> Tensor:
        start, stop = self._shard(tuple(value.shape))
        return value[start:stop]


def check_strategy(run: RunSection, world: int) -> str:
    """The strategy that is meant. UserError for what cannot work."""
    name = run.strategy or ("ddp" if world > 1 else "none")
    if name == "none" and world > 1:
        raise UserError(f"--strategy none runs on one rank, {world} were started; use ddp, fsdp, zero1, zero2 or zero3")
    if run.cpu_offload and name in ("none", "ddp"):
        raise UserError(f"--cpu-offload works with the strategies fsdp, zero1, zero2 and zero3, not with {name}")
    if run.fsdp_replicas > 1 and name != "fsdp":
        raise UserError(f"--fsdp-replicas {run.fsdp_replicas} works with the strategy fsdp, not with {name}")
    if run.ddp_bf16 and name != "ddp":
        raise UserError(f"--ddp-bf16 works with the strategy ddp, not with {name}; --precision bf16 is for all")
    if world % run.fsdp_replicas:
        fits = [count for count in range(1, world + 1) if world % count == 0]
        raise UserError(
            f"--fsdp-replicas {run.fsdp_replicas}: {world} ranks cannot be dealt to so many copies of the model; use "
            f"{', '.join(map(str, fits))}"
        )
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--strategy {name} needs DeepSpeed: pip install 'deepspeed>=0.19,<0.20'")
    return name


def make_strategy(run: RunSection, info: DistInfo, precision: str, training: TrainingSection) -> Strategy:
    """The strategy that is set; null means ddp on several ranks and none on one. UserError for what cannot work."""
    name = check_strategy(run, info.world)
    if name == "none":
        return Strategy(name, info, precision, training)
    ensure_group()
    if name == "ddp":
        return DDP(name, info, precision, training, in_bf16=run.ddp_bf16)
    if name == "fsdp":
        return FSDP(name, info, precision, training, run.cpu_offload, replicas=run.fsdp_replicas)
    from shared.engine.zero import Zero  # DeepSpeed takes a second to import: only where it is used

    return Zero(name, info, precision, training, run.cpu_offload)


class _OnDisk(TorchDispatchMode):
    """New tensors of a CPU from 1 MB on lie in files of a folder, under no name: the system takes their pages out of
    memory when it needs it. Parameters are such, empty or as copies (a base that is cast); other results are not.
    """

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / "tensor"

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named, is_copy = named or {}, function in self.COPIES
        if is_copy:
            kind = {name: value for name, value in named.items() if name != "non_blocking"}
            made = torch.empty_like(arguments[0], **kind)
        else:
            made = function(*arguments, **named)
        plain = (is_copy or function is torch.ops.aten.empty.memory_format) and made.is_contiguous()
        if plain and made.device.type == "cpu" and made.nbytes >= 2**20:
            made = self._placed(made)
        return made.copy_(arguments[0]) if is_copy else made

    def _placed(self, made: Tensor) -> Tensor:
        try:
            with open(self.path, "wb") as file:  # a full disk is an error here, and would be a signal later
                os.posix_fallocate(file.fileno(), 0, made.nbytes)
            flat = torch.from_file(str(self.path), shared=True, size=made.numel(), dtype=made.dtype)
        finally:
            self.path.unlink(missing_ok=True)
        return flat.view(made.shape)


def built_once(build: Callable[[], Model], run: RunSection, info: DistInfo) -> Model:
    """What `build` makes, to be given to fit(). Under fsdp on several ranks rank 0 alone makes it, on its disk, and
    writes its parameters; every rank gets it with its buffers and its parameters on the meta device, and fit() fills in
    the rows that a rank keeps. The file is gone as soon as all have opened it. Where nodes do not share --output-dir,
    every rank builds as under the other strategies. A collective.
    """
    if run.strategy != "fsdp" or info.world == 1:
        return build()
    with contextlib.ExitStack() as stack:
        made: list[tuple[Model, Path]] = []

        def make() -> None:
            folder = stack.enter_context(own_folder(run.output_dir, "first_weights"))
            with _OnDisk(folder):
                model = build()
            path = folder / "weights.safetensors"
            values = {name: parameter.detach() for name, parameter in model.named_parameters()}
            specs: list[Spec] = [(name, tuple(value.shape), value.dtype) for name, value in values.items()]
            write_safetensors(path, specs, iter(values.values()))
            on_meta = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
            made.append((copy.deepcopy(model, on_meta), path))  # tied parameters stay tied

        raise_together(attempt(make) if info.is_main else None)
        model, path = from_main(made[0] if made else None)
        if not all(gather_objects(path.exists())):
            return build()
        raise_together(attempt(lambda: setattr(model, "first_values", StoredTensors(path).__getitem__)))
        return model
