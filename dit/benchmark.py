"""Time one training step of DiT-S/2 (16x16 latents, batch 4, fp32, one thread) against diffusers' DiT of the same size.

  python dit/benchmark.py --rounds 10
The two take turns in one process, so that a busy machine slows both alike. A step is forward, error and backward.
"""

import statistics
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.options import BenchmarkOptions
from shared.config import load_config
from shared.errors import command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(BenchmarkOptions, description=__doc__)

import torch
from torch import nn

from dit.model import DiTModel

WIDTH, LAYERS, HEADS, SIDE, CLASSES = 384, 12, 6, 16, 1000


def step_seconds(model: nn.Module, arguments: tuple, named: dict, target: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    output = model(*arguments, **named)
    output = output if isinstance(output, torch.Tensor) else output.sample
    (output - target).square().mean().backward()
    return time.perf_counter() - began


@command
def main(argv: list[str] | None = None) -> float:
    options = load_config(BenchmarkOptions, argv=argv, description=__doc__)
    from diffusers import DiTTransformer2DModel

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ours = DiTModel(WIDTH, LAYERS, HEADS, input_size=SIDE, text_conditioning="none", num_classes=CLASSES)
    theirs = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, num_layers=LAYERS, sample_size=SIDE
    )
    x, target = torch.randn(2, options.batch_size, 4, SIDE, SIDE)
    t, labels = torch.randint(0, 1000, (options.batch_size,)), torch.randint(0, CLASSES, (options.batch_size,))
    jobs = [(ours, (x, t), {"labels": labels}), (theirs, (x, t, labels), {})]
    seconds: list[list[float]] = [[], []]
    for round_ in range(options.rounds + 1):
        for place, (model, arguments, named) in enumerate(jobs):
            taken = step_seconds(model, arguments, named, target)
            if round_:  # the first round warms up
                seconds[place].append(taken)
    found = [statistics.median(rows) for rows in seconds]
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    print(f"dit       {1000 * found[0]:.0f} ms a step ({sum(p.numel() for p in ours.parameters()):,} parameters)")
    print(f"diffusers {1000 * found[1]:.0f} ms a step ({sum(p.numel() for p in theirs.parameters()):,} parameters)")
    print(f"ratio     {ratio:.3f} (median over {options.rounds} rounds; {options.threads} thread)")
    return ratio


if __name__ == "__main__":
    main()
