"""What the time of a step goes to, by kind of kernel."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = (  # part of a kernel's or operator's name -> what it does; the first that fits counts
    (
        "matrix products",
        ("gemm", "gemv", "cutlass", "cublas", "nvjet", "aten::mm", "aten::addmm", "bmm", "matmul", "mkldnn::_linear"),
    ),
    ("attention", ("flash", "fmha", "attention", "attn")),
    ("convolutions", ("conv",)),
    ("optimizer", ("adam", "lerp", "multi_tensor", "_foreach")),
    ("compiled pointwise", ("triton",)),
    ("norms and reductions", ("norm", "reduce", "sum", "softmax", "mean")),
    ("copies and casts", ("copy", "memcpy", "memset", "cat", "fill")),
    ("pointwise", ("elementwise", "gelu", "silu", "mul", "add", "vectorized", "sigmoid", "div", "sub")),
    ("views and bookkeeping", ("autograd", "backward", "view", "transpose", "aten::t", "expand", "slice", "strided")),
)


def breakdown(step: Callable[[], None], device: torch.device) -> str:
    """Shares of one step by kind of kernel; on a GPU also the share in which no kernel ran."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    clock = clock_of(device)
    with profile(activities=activities) as seen:
        began = clock()
        step()
        wall = clock() - began
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0.0) + micros / 1e6
    total = wall if on_gpu else sum(spent.values())
    if on_gpu:
        spent["no kernel"] = max(0.0, wall - sum(spent.values()))
    shares = sorted(((value / total, name) for name, value in spent.items()), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.01)


def kind_of(name: str) -> str:
    """What a kernel or operator does, by its name."""
    lower = name.lower()
    return next((kind for kind, words in KINDS if any(word in lower for word in words)), "other")


def clock_of(device: torch.device) -> Callable[[], float]:
    """Wall seconds, after what was queued on the device is done."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
