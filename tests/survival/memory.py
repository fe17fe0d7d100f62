"""The plan's memory and traffic against those of real steps, on one rank or several:

  python -m tests.survival.memory [--systems dit bagel] [--presets default --batch-size 1]
  torchrun --standalone --nproc_per_node=4 tests/survival/memory.py --strategies ddp fsdp
Presets (`small` of every system where none is named) on CPU ranks in fp32, without frozen encoders; further flags are
the systems' own and make a large one small. After two steps, on one rank after one of a single sample, a step runs
under the profiler, which adds up what torch's allocator gives and takes; what is there before it, weights, moments,
averages and buffers, is what all tensors of the process hold, and DDP's buckets. Traffic is what the step's collectives
carry, as a ring sends it.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.config import load_config
from shared.engine.dist import DistInfo, init_distributed, max_over_ranks, shutdown
from shared.engine.parallel import make_strategy
from shared.engine.strategy import EMA
from shared.optim import decay_groups
from shared.plan.table import Workload


def cases() -> dict[str, tuple[type, Path, Callable[[Any], Workload]]]:
    """Name -> (settings, folder of presets, workload of settings)."""
    from bagel import config as bagel_config
    from bagel import plan as bagel_plan
    from dit import config as dit_config
    from dit import plan as dit_plan
    from float import config as float_config
    from float import plan as float_plan
    from multimodal import config as multimodal_config
    from multimodal import plan as multimodal_plan
    from multimodal.trainer import adamw_of
    from opens2v import config as opens2v_config
    from opens2v import plan as opens2v_plan

    def alignment(config: Any) -> Workload:  # AdamW's settings are those of the stage
        config.training = config.training.model_copy(
            update=adamw_of(config.training, max(multimodal_config.stage_epochs(config.training)))
        )
        return multimodal_plan.workload(config)

    pictures = float_config.AutoencoderConfig, float_config.AUTOENCODER_PRESETS, float_plan.autoencoder_workload
    return {
        "dit": (dit_config.Config, dit_config.PRESETS, dit_plan.workload),
        "float phase 1": pictures,
        "float phase 2": (float_config.Config, float_config.PRESETS, float_plan.workload),
        "bagel": (bagel_config.Config, bagel_config.PRESETS, bagel_plan.workload),
        "opens2v": (opens2v_config.Config, opens2v_config.PRESETS, opens2v_plan.workload),
        "multimodal": (multimodal_config.Config, multimodal_config.PRESETS, alignment),
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


def held_bytes() -> int:
    """What all tensors of this process hold now; a sharded one counts by the part that is here."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter) and not found.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def compare(
    config: Any, workload: Callable[[Any], Workload], name: str, info: DistInfo
) -> tuple[float, float, float, float]:
    """Planned and measured bytes: the largest rank's memory, and traffic of a step."""
    config.run.precision, config.run.strategy, config.run.world_size = "fp32", name, info.world
    config.training.global_batch_size = None
    work = replace(workload(config), frozen_parts=lambda config: [])
    plan = work.plan(config)
    others = held_bytes()
    model = work.build(config).train()
    strategy = make_strategy(config.run, info, "fp32", config.training)
    strategy.prepare(model, decay_groups(model, 0.0), work.blocks)
    ema = EMA(strategy, 0.99) if config.training.ema_decay > 0 else None
    one = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": 1})})
    first, loss, traffic = work.step(one), work.step(config), Traffic(info.world)

    def step(loss: Callable[[nn.Module], Tensor]) -> None:
        accumulation = config.training.gradient_accumulation_steps
        for micro in range(accumulation):
            with strategy.micro_step(is_last=micro == accumulation - 1):
                strategy.backward(loss(strategy.model))
        strategy.optimizer_step()
        if ema:
            ema.update()

    # The optimizer makes its moments, DDP its buckets, which no tensor of Python holds, ZeRO its order of modules.
    if name == "none":
        step(first)
    if len(strategy.steps_taken()) < len(strategy.parameters):  # one sample does not need every module everywhere
        step(loss)
        step(loss)
    before = held_bytes() - others + 4 * sum(map(math.prod, map(strategy.shape, strategy.parameters))) * (name == "ddp")
    with traffic:
        measured = max_over_ranks(float(before + allocated(lambda: step(loss))))
    return plan.peak_memory, measured, plan.traffic_bytes, traffic.sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", help="names, default: all")
    parser.add_argument("--strategies", nargs="+", default=["none"], help="none, ddp, fsdp")
    parser.add_argument("--presets", nargs="+", default=["small"])
    options, others = parser.parse_known_args()
    info = init_distributed("cpu")
    torch.set_num_threads(1)
    if info.is_main:
        print(
            "| system | strategy | memory: planned, MB | measured | ratio | traffic: planned, MB | measured | ratio |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
    chosen = {name: case for name, case in cases().items() if not options.systems or name in options.systems}
    for name, (schema, folder, workload) in chosen.items():
        for preset in (name for name in options.presets if (folder / f"{name}.yaml").is_file()):
            for strategy in options.strategies:
                config = load_config(schema, presets=folder, argv=["--config", preset, *others])
                torch.manual_seed(0)
                planned, measured, carried, sent = compare(config, workload, strategy, info)
                cells = [f"{planned / 1e6:.1f}", f"{measured / 1e6:.1f}", f"{planned / measured:.3f}"]
                cells += [f"{carried / 1e6:.1f}", f"{sent / 1e6:.1f}", f"{carried / sent:.3f}" if sent else "-"]
                if info.is_main:
                    print(f"| {name} {preset} | {strategy}@{info.world} | {' | '.join(cells)} |", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
