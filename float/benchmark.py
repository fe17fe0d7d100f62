"""Step time of the transformer: forward and backward, fp32.

OMP_NUM_THREADS=1 python float/benchmark.py                     depth 4, width 256, batch 2, L 50 + 10
python float/benchmark.py --depth 8 --width 1024 --batch 8 --device cuda
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Section, load_config, setting
from shared.errors import command


class BenchmarkOptions(Section):
    """The size of the step."""

    depth: int = setting(4, "blocks", ge=1)
    width: int = setting(256, "dim_h", ge=8)
    heads: int = setting(8, "attention heads", ge=1)
    batch: int = setting(2, "windows", ge=1)
    frames: int = setting(50, "frames of a window", ge=1)
    prev_frames: int = setting(10, "frames before it", ge=0)
    threads: int = setting(1, "CPU threads", ge=1)
    repeats: int = setting(15, "measured steps", ge=3)
    device: str = setting("cpu", "cpu or cuda")


@command
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure and print median and best in milliseconds."""
    options = load_config(BenchmarkOptions, argv=argv, description=__doc__)
    import statistics
    import time

    import torch

    from float.model import FlowMatchingTransformer

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = FlowMatchingTransformer(
        dim_h=options.width,
        depth=options.depth,
        num_heads=options.heads,
        num_frames=options.frames,
        num_prev_frames=options.prev_frames,
    ).to(options.device)
    shapes = [
        (options.frames, 512),
        (options.frames, 512),
        (512,),
        (1, 7),
        (options.prev_frames, 512),
        (options.prev_frames, 512),
    ]
    arguments = [torch.randn(options.batch, *shape, device=options.device) for shape in shapes]
    t_B = torch.rand(options.batch, device=options.device)
    seconds, cpu_seconds = [], []
    for _ in range(options.repeats + 3):
        started, cpu_started = time.perf_counter(), time.process_time()
        model(t_B, *arguments)[:, options.prev_frames :].square().mean().backward()
        model.zero_grad(set_to_none=True)
        if options.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)  # does not count the waiting for other programs
    found = {
        "median_ms": 1000 * statistics.median(seconds[3:]),
        "best_ms": 1000 * min(seconds[3:]),
        "median_cpu_ms": 1000 * statistics.median(cpu_seconds[3:]),
    }
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(
        f"transformer of {size:,} parameters, batch {options.batch}, {options.frames} + {options.prev_frames} frames, "
        f"fp32, {options.threads} thread(s), {options.device}: both passes {found['median_ms']:.1f} ms median, "
        f"{found['best_ms']:.1f} ms best, {found['median_cpu_ms']:.1f} ms median of CPU time"
    )
    return found


if __name__ == "__main__":
    main()
