"""A network of half a million parameters in place of the mini size, and settings that train it in seconds."""

from pathlib import Path

from multimodal import model, train
from multimodal import objective as objectives

WIDTHS, DECODER = model.Widths((64, 2), (64, 1), (64, 2), (64, 1), 16), (64, 1)
MODEL = "--image-size 32 --image-patch 8 --embed-dim 32 --model-size mini".split()
DATA = "--datasets synthetic --synthetic-items 64 --audio-frames 64".split()
TRAINING = (
    "--batch-size 8 --stage-epochs 1 1 1 --num-classes 12 --device cpu --label-set images --no-tensorboard "
    "--keep-last 3 --logging-steps 1 --eval-every 4 --save-every 100"
)
QUICK = ["--config", "small", *MODEL, *DATA, *TRAINING.split()]


def shrink() -> None:
    """Make `mini` small in this process."""
    model.SIZES["mini"], objectives.DECODERS["mini"] = WIDTHS, DECODER


def run(folder: Path, *flags: str) -> Path:
    """Train into a folder."""
    train.main([*QUICK, "--output-dir", str(folder), *flags])
    return folder
