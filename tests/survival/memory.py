"""The plan's memory and traffic against those of real steps, on one rank or several:

  python -m tests.survival.memory [--systems dit bagel]
  torchrun --standalone --nproc_per_node=4 tests/survival/memory.py --strategies ddp fsdp
Every system's `small` preset on CPU ranks in fp32: two optimizer steps under the profiler, which adds up what torch's
allocator gives and takes. Weights, the moving average and DDP's buckets are there before and are counted by their
sizes. Traffic is what the collectives of the second step carry, as a ring sends it.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.config import load_config
from shared.engine.dist import DistInfo, init_distributed, max_over_ranks, shutdown
from shared.engine.parallel import make_strategy
from shared.engine.strategy import EMA
from shared.optim import decay_groups
from shared.plan.table import Workload


def cases() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Workload]]]:
    """Name -> (settings of the small preset, workload of settings)."""
    from bagel import config as bagel_config
    from bagel import plan as bagel_plan
    from dit import config as dit_config
    from dit import train as dit_train
    from float import config as float_config
    from float import plan as float_plans
    from multimodal import config as multimodal_config
    from multimodal import plan as multimodal_planning
    from opens2v import config as opens2v_config
    from opens2v import plan as opens2v_plan

    def preset(module: Any, name: str = "Config", presets: str = "PRESETS") -> Callable[[], Any]:
        return lambda: load_config(getattr(module, name), presets=getattr(module, presets), argv=[], default="small")

    pictures = preset(float_config, "AutoencoderConfig", "AUTOENCODER_PRESETS")
    return {
        "dit": (preset(dit_config), dit_train.workload),
        "float phase 1": (pictures, float_plans.autoencoder_workload),
        "float phase 2": (preset(float_config), float_plans.workload),
        "bagel": (preset(bagel_config), bagel_plan.workload),
        "opens2v": (preset(opens2v_config), opens2v_plan.workload),
        "multimodal": (preset(multimodal_config), multimodal_planning.workload),
    }


def allocated(work: Callable[[], None]) -> int:
    """The largest sum of bytes that torch's CPU allocator holds for what `work` makes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = sorted(
        (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Traffic(TorchDispatchMode):
    """Adds up what a rank sends in a ring's collectives, but for single numbers."""

    def __init__(self, world: int):
        super().__init__()
        self.share, self.sent = (world - 1) / world, 0.0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace == "c10d":
            kind = function.overloadpacket.__name__
            size = max([t.nbytes for t in tree_leaves(arguments) if isinstance(t, Tensor)], default=0)
            if size > 1000:
                self.sent += self.share * size * (2 if kind.startswith("allreduce") else 1)
        return function(*arguments, **(named or {}))


def local_bytes(value: Tensor) -> int:
    return value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes


def compare(
    make: Callable[[], Any], workload: Callable[[Any], Workload], name: str, info: DistInfo
) -> tuple[float, float, float, float]:
    """Planned and measured bytes: the largest rank's memory, and traffic of a step."""
    config = make()
    config.run.precision, config.run.strategy, config.run.world_size = "fp32", name, info.world
    config.training.global_batch_size = None
    work = workload(config)
    plan = work.plan(config)
    model = work.build(config).train()
    strategy = make_strategy(config.run, info, "fp32", config.training)
    strategy.prepare(model, decay_groups(model, 0.0), work.blocks)
    ema = EMA(strategy, 0.99) if config.training.ema_decay > 0 else None
    trainable = sum(local_bytes(value) for value in strategy.parameters.values())
    before = sum(map(local_bytes, [*model.parameters(), *model.buffers()]))
    before += trainable * ((ema is not None) + (name == "ddp"))
    traffic = Traffic(info.world)

    def two_steps() -> None:
        accumulation = config.training.gradient_accumulation_steps
        for micro in range(2 * accumulation):
            if micro == accumulation:
                traffic.__enter__()
            is_last = micro % accumulation == accumulation - 1
            with strategy.micro_step(is_last):
                strategy.backward(work.step(config)(strategy.model))
            if is_last:
                strategy.optimizer_step()
                if ema:
                    ema.update()
        traffic.__exit__(None, None, None)

    measured = max_over_ranks(float(before + allocated(two_steps)))
    return plan.peak_memory, measured, plan.traffic_bytes, traffic.sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", help="names, default: all")
    parser.add_argument("--strategies", nargs="+", default=["none"], help="none, ddp, fsdp")
    options = parser.parse_args()
    info = init_distributed("cpu")
    torch.set_num_threads(1)
    if info.is_main:
        print(
            "| system | strategy | memory: planned, MB | measured | ratio | traffic: planned, MB | measured | ratio |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, (make, workload) in cases().items():
        for strategy in options.strategies if not options.systems or name in options.systems else ():
            torch.manual_seed(0)
            planned, measured, carried, sent = compare(make, workload, strategy, info)
            cells = [f"{planned / 1e6:.1f}", f"{measured / 1e6:.1f}", f"{planned / measured:.3f}"]
            cells += [f"{carried / 1e6:.1f}", f"{sent / 1e6:.1f}", f"{carried / sent:.3f}" if sent else "-"]
            if info.is_main:
                print(f"| {name} | {strategy}@{info.world} | {' | '.join(cells)} |", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
