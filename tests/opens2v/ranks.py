"""One launch that trains under several strategies in turn: ranks.py FOLDER BASE STRATEGY..."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from opens2v.train import OpenS2VTrainer, parse
from shared.engine.dist import init_distributed, shutdown
from tests.opens2v.cases import QUICK

STEPS = [
    "--total-steps",
    "2",
    "--warmup-steps",
    "0",
    "--global-batch-size",
    "4",
    "--no_visualize",
    "--save-steps",
    "100",
]


def main(folder: str, base: str, *strategies: str) -> None:
    info = init_distributed("cpu", timeout_seconds=120)
    for name in strategies:
        places = ["--output-dir", f"{folder}/{name}", "--generator-ckpt", base, "--strategy", name]
        OpenS2VTrainer(parse([*QUICK, *STEPS, "--check-gradients-every", "1", *places]), info).train()
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
