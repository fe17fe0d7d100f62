"""How long a save keeps training waiting: written in the foreground, and copied first and written in the background.

  python -m tests.survival.saving [--millions 4 40 200] [--steps 50] [--rounds 5] [--threads 1]
One rank, AdamW and averaged weights in fp32, so 16 bytes a parameter reach the disk. The share is that of a run which
saves every --steps steps of the time measured here; in the background it counts what the writing takes from them, so
that it means something on a quiet machine only.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from shared.config import TrainingSection
from shared.engine.checkpoint import CheckpointStore
from shared.engine.dist import DistInfo
from shared.engine.state import tensors_to_save, trainer_state
from shared.engine.strategy import EMA, Strategy
from shared.optim import decay_groups

WIDTH, ROWS = 1024, 64  # layers of a million parameters; samples of a step


def make(millions: int) -> tuple[Strategy, EMA]:
    """A chain of linear layers that has taken its first optimizer step."""
    layers = [layer for _ in range(millions) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    model, training = nn.Sequential(*layers), TrainingSection(ema_decay=0.999)
    strategy = Strategy("none", DistInfo(), "fp32", training)
    strategy.prepare(model, decay_groups(model, 0.0))
    return strategy, EMA(strategy, 0.999, warmup=False)


def steps(strategy: Strategy, ema: EMA, count: int) -> float:
    """Seconds of so many optimizer steps."""
    began = time.perf_counter()
    for _ in range(count):
        strategy.backward(strategy.model(torch.ones(ROWS, WIDTH)).square().mean())
        strategy.optimizer_step()
        ema.update()
    return time.perf_counter() - began


def save(store: CheckpointStore, strategy: Strategy, ema: EMA, number: int, background: bool) -> float:
    """Seconds until training may go on."""
    began = time.perf_counter()
    tensors, trainer = tensors_to_save(strategy, ema), trainer_state(strategy, ema)
    store.save(f"step_{number}", step=number, trainer=trainer, tensors=tensors, meta={}, background=background)
    return time.perf_counter() - began


def measure(millions: int, options: argparse.Namespace, folder: Path) -> str:
    """One row of the table: medians over the rounds."""
    strategy, ema = make(millions)
    store = CheckpointStore(folder / str(millions), DistInfo(), keep_last=1)
    steps(strategy, ema, 2)
    found: dict[str, list[float]] = {"plain": [], "front": [], "back": [], "beside": []}
    for number in range(options.rounds):
        found["plain"].append(steps(strategy, ema, options.steps))
        found["front"].append(save(store, strategy, ema, 2 * number, background=False))
        found["back"].append(save(store, strategy, ema, 2 * number + 1, background=True))
        found["beside"].append(steps(strategy, ema, options.steps))
        store.wait()
    plain, front, back, beside = (statistics.median(found[name]) for name in ("plain", "front", "back", "beside"))
    shares = 100 * front / (plain + front), 100 * (back + beside - plain) / (back + beside)
    cells = [f"{plain / options.steps:.3f}", f"{front:.2f}", f"{back:.2f}", f"{shares[0]:.1f} %", f"{shares[1]:.1f} %"]
    return f"| {millions} M | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[4, 40, 200], help="parameters")
    parser.add_argument("--steps", type=int, default=50, help="steps between saves")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the steps, as torchrun sets it for every rank")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = ["parameters", "s a step", "save in front, s", "in the background, s", "share in front", "share behind"]
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for millions in options.millions:
            print(measure(millions, options, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
