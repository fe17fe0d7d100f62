"""Model FLOPs utilisation of a training step against the matrix peak that is measured on the same device.

The step is that of shared/engine/strategy.py (precision, regional compilation, fused AdamW, clipping) around the
workload that each system's dry run describes; its FLOPs are counted on fake tensors, without what
checkpointing computes again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from scripts.bench.bench import Bench, Row, alternate
from scripts.bench.kernels import breakdown, clock_of
from shared.engine.dist import DistInfo
from shared.engine.parallel import make_strategy
from shared.optim import decay_groups
from shared.plan.measure import Measured
from shared.plan.table import Workload


def matrix_peak(device: torch.device, side: int = 8192, rounds: int = 10) -> float:
    """FLOP/s of the largest bf16 matrix product that this device repeats: side x side, the best of `rounds`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock = clock_of(device)
    seconds = alternate([lambda: a @ b], rounds, clock)[0]
    return 2 * side**3 / min(seconds)


def make_step(workload: Workload, config: Any, device: torch.device, compiled: bool) -> Callable[[], None]:
    """One optimizer step of the workload on the device, as the training loop runs it, on made-up inputs."""
    training = config.training.model_copy(update={"compile": compiled})
    info = DistInfo(device=device)
    with torch.device(device):
        model = workload.build(config)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():  # zero weights would make a step of zeros
            torch.nn.init.trunc_normal_(value.data, std=0.02) if value.ndim > 1 else None
    strategy = make_strategy("none", info, "bf16" if device.type == "cuda" else "fp32", training)
    strategy.prepare(model.train(), decay_groups(model, training.weight_decay), workload.blocks)
    loss_of = workload.step(config)

    def step() -> None:
        with torch.device(device):
            with strategy.micro_step(is_last=True):
                with strategy.autocast():
                    loss = loss_of(strategy.model)
                strategy.backward(loss)
            strategy.optimizer_step()

    return step


def model_flops(workload: Workload, config: Any) -> Measured:
    """The step without recomputation."""
    training = config.training.model_copy(update={"gradient_checkpointing": False})
    return workload.measure(config.model_copy(update={"training": training}))


def utilisation(
    bench: Bench,
    name: str,
    workload: Workload,
    config: Any,
    *,
    bar: float | None = None,
    device: torch.device | None = None,
    peak: float | None = None,
    compiled: tuple[bool, ...] = (False, True),
) -> None:
    """Rows with and without compilation, and where the time of the last one goes."""
    device = device or torch.device("cuda")
    peak = peak or matrix_peak(device)
    flops = model_flops(workload, config).step_flops
    for with_compiler in compiled:
        release(device)
        step = make_step(workload, config, device, with_compiler)
        seconds = sorted(alternate([step], bench.rounds, clock_of(device))[0])
        middle = seconds[len(seconds) // 2]
        note = (
            f"{flops:.3g} FLOPs, matrix peak {peak / 1e12:.0f} TFLOP/s{memory_text(device)}; {breakdown(step, device)}"
        )
        label = f"{name}, {'compiled' if with_compiler else 'not compiled'}"
        bench.add(Row(bench.part, label, flops / middle / peak, bar, "at least", 1000 * middle, note=note))
        del step


def memory_text(device: torch.device) -> str:
    """Peak memory of a GPU so far."""
    return f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else ""


def release(device: torch.device) -> None:
    """Give back what the former case held."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def largest_that_fits(sizes: list[int], attempt: Callable[[int], None]) -> int:
    """The first of `sizes` (descending) whose attempt does not run out of memory; the attempt leaves its rows."""
    for size in sizes:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            release(torch.device("cuda"))
    raise torch.OutOfMemoryError(f"not even {sizes[-1]} fits")


def parameters_of(model: nn.Module) -> int:
    """All values."""
    return sum(parameter.numel() for parameter in model.parameters())
