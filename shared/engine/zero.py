"""DeepSpeed ZeRO stages 1 to 3 behind the interface of shared/engine/strategy.py.

The private names used here (the flat fp32 partitions and the lazy initialisation) are those of deepspeed 0.19.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.nn import functional

from shared.engine.strategy import MOMENTS, StepInfo, Strategy
from shared.errors import UserError
from shared.optim import ZERO_STAYS_GATHERED, adamw, zero_bucket


def import_deepspeed():
    """deepspeed, told not to compile its CPU collective (gloo does that work, and a compiler may be missing)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "the strategies zero1, zero2 and zero3 need DeepSpeed: pip install 'deepspeed>=0.19,<0.20'"
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Zero(Strategy):
    """stage 1 shards the moments, stage 2 also the gradients, stage 3 also the weights."""

    optimizer: Any  # DeepSpeed's own, around ours

    @property
    def stage(self) -> int:
        """ZeRO's stage, 1 to 3."""
        return int(self.name[-1])

    def _wrap(self, groups: list[dict]) -> None:
        deepspeed = import_deepspeed()
        optimizer = adamw(groups, self.parameters, self.training)
        os.environ.setdefault("LOCAL_RANK", str(self.info.local_rank))  # without torchrun DeepSpeed asks for it
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=self._settings(), dist_init_required=False
        )
        self.model, self.module = self.engine, self.engine.module
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._linked = False
        self._seen: set[str] = set()
        for name, parameter in self.parameters.items():  # p.grad is empty after ZeRO's own hooks
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._seen.add(name))

    def _settings(self) -> dict:
        bucket = zero_bucket(sum(p.numel() for p in self.parameters.values()))
        stays = sum(p.numel() for p in self.module.parameters()) <= ZERO_STAYS_GATHERED
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop owns the micro-steps, see micro_step
            "gradient_clipping": self.training.max_grad_norm or 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": 0,
                "overlap_comm": False,
                # DeepSpeed's linear layer lets go of the weights between forward and backward, where there are too many
                # to stay; for that it holds the inputs of frozen layers, which no gradient needs.
                "stage3_max_live_parameters": ZERO_STAYS_GATHERED,
                "memory_efficient_linear": not stays,
                "reduce_bucket_size": bucket,  # memory of this size is taken; DeepSpeed's own is 2 GB in fp32
                "allgather_bucket_size": bucket,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if self.cpu_offload:
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            if self.stage == 3:
                settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
        if self.precision == "bf16":
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        elif self.precision == "fp16":
            settings["fp16"] = {"enabled": True}
        return settings

    # --- one step -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        yield
        if not is_last:
            self.engine.step()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def optimizer_step(self) -> StepInfo:
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        applied = not getattr(self.optimizer, "overflow", False)  # DeepSpeed's fp32 optimizers have no such attribute
        if applied and not self._linked:
            self._link_moments()
        self._seen.clear()
        return StepInfo(norm if applied else float("nan"))

    def with_gradient(self) -> dict[str, bool]:
        return {name: name in self._seen for name in self.parameters}

    # --- state by name ------------------------------------------------------------------------------------------------

    def frozen_count(self) -> int:
        if self.stage < 3:
            return super().frozen_count()
        frozen: list[Any] = [p for p in self.module.parameters() if not p.requires_grad]
        return sum(p.ds_numel for p in frozen)

    def shape(self, name: str) -> tuple[int, ...]:
        parameter: Any = self.parameters[name]
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def full(self, kind: str, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if kind == "weight":
            value = safe_get_full_fp32_param(parameter)
            value = parameter.detach() if value is None else value
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        return value.float().cpu().reshape(self.shape(name))

    def part(self, kind: str, name: str) -> Tensor:
        return Strategy.local_rows(self, name, self.full(kind, name)).clone()

    def local_rows(self, name: str, local: Tensor) -> Tensor:
        return super().local_rows(name, self.gather_local(name, local) if self.stage == 3 else local).clone()

    def load_full(self, kind: str, name: str, value: Any) -> None:
        from deepspeed import utils

        parameter = self.parameters[name]
        if self.stage < 3:
            value = value[...].to(self.info.device, torch.float32)
            if kind == "weight":
                utils.safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, kind)
            return
        part = self.split_full(name, value)
        if kind == "weight":
            utils.safe_set_local_fp32_param(parameter, part)
            self.compute_part(name).view(-1).copy_(part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)

    def _flat_partitions(self) -> list[Tensor]:
        inner = self.optimizer
        return inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups

    def steps_taken(self) -> dict[str, int]:
        states = [self.optimizer.optimizer.state.get(flat, {}) for flat in self._flat_partitions()]
        steps = {int(state["step"]) for state in states if "step" in state}
        return dict.fromkeys(self.parameters, max(steps)) if steps else {}

    def load_steps_taken(self, steps: dict[str, int]) -> None:
        """Make the empty optimizer state that DeepSpeed would make at the first step: the moments need a place."""
        if not steps:
            return
        for flat in self._flat_partitions():
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            count = torch.tensor(float(max(steps.values())), dtype=torch.float32, device=flat.device)
            self.optimizer.optimizer.state[flat] = {"step": count, **moments}
        self._link_moments()

    def _link_moments(self) -> None:
        """Link moments to parameters; stages 1 and 2 did so after the first group's step, when the others had none."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def local_value(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        parameter = self.parameters[name]
        if self.stage == 3:
            return safe_get_local_fp32_param(parameter).detach().flatten()
        return parameter.detach() if self.precision == "fp32" else safe_get_full_fp32_param(parameter).detach()

    def gather_local(self, name: str, local: Tensor) -> Tensor:
        if self.stage < 3:
            return super().gather_local(name, local)
        parameter: Any = self.parameters[name]
        parts = [torch.empty_like(local) for _ in range(self.info.world)]
        torch_dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)[: parameter.ds_numel].reshape(self.shape(name)).float().cpu()

    def split_full(self, name: str, full: Any) -> Tensor:
        if self.stage < 3:
            return super().split_full(name, full)
        parameter: Any = self.parameters[name]
        shape, length = self.shape(name), parameter.ds_tensor.numel()
        width = math.prod(shape[1:])  # stage 3 cuts the flattened tensor, within rows: those that the cut goes through
        first, last = (min(place * length, math.prod(shape)) for place in (self.info.rank, self.info.rank + 1))
        above = first // width
        value = (full[above : -(-last // width)] if shape else full[...]).flatten()[first - above * width :][
            : last - first
        ]
        return functional.pad(value.to(self.info.device, torch.float32), (0, length - len(value)))

    def compute_part(self, name: str) -> Tensor:
        parameter: Any = self.parameters[name]
        return parameter.ds_tensor.data if self.stage == 3 else parameter.data

    @contextlib.contextmanager
    def swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """As in the base; stage 3 first drops the gathered copies, which would be stale."""
        with super().swapped(values):
            if self.stage == 3:
                self.engine.empty_partition_cache()
            yield
            if self.stage == 3:
                self.engine.empty_partition_cache()
