"""The plan's memory against that of real steps: python -m tests.survival.memory [--systems dit bagel]

Every system's `small` preset on one CPU rank in fp32: two optimizer steps under the profiler, which adds up what
torch's allocator gives and takes. Weights and the moving average are there before and are counted by their sizes.
"""

import argparse
import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from shared.config import load_config
from shared.engine.dist import DistInfo
from shared.engine.strategy import EMA, Strategy
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


def compare(make: Callable[[], Any], workload: Callable[[Any], Workload]) -> tuple[int, int]:
    """Planned and measured bytes."""
    config = make()
    config.run.precision, config.run.strategy = "fp32", "none"
    work = workload(config)
    planned = work.plan(config).peak_memory
    model = work.build(config).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    strategy = Strategy("none", DistInfo(), "fp32", config.training)
    strategy.prepare(model, decay_groups(model, 0.0))
    ema = EMA(strategy, 0.99) if config.training.ema_decay > 0 else None
    sizes = {name: value.nbytes for name, value in [*model.named_parameters(), *model.named_buffers()]}
    before = sum(sizes.values()) + (sum(sizes[name] for name in trainable) if ema else 0)

    def two_steps() -> None:
        for _ in range(2):
            for _ in range(config.training.gradient_accumulation_steps):
                strategy.backward(work.step(config)(strategy.model))
            strategy.optimizer_step()
            if ema:
                ema.update()

    return planned, before + allocated(two_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", help="names, default: all")
    options = parser.parse_args()
    print("| system | planned, MB | measured, MB | planned / measured |\n|---|---|---|---|")
    for name, (make, workload) in cases().items():
        if not options.systems or name in options.systems:
            planned, measured = compare(make, workload)
            print(f"| {name} | {planned / 1e6:.1f} | {measured / 1e6:.1f} | {planned / measured:.3f} |", flush=True)


if __name__ == "__main__":
    main()
