"""A network of half a million parameters in place of the mini size, and settings that train it in seconds."""

from multimodal import model
from multimodal import objective as objectives

WIDTHS = model.Widths((64, 2), (64, 1), (64, 2), (64, 1), 16)
MODEL = ["--image-size", "32", "--image-patch", "8", "--embed-dim", "32", "--model-size", "mini"]
DATA = ["--datasets", "synthetic", "--synthetic-items", "64", "--audio-frames", "64"]
QUICK = [
    "--config",
    "small",
    *MODEL,
    *DATA,
    "--batch-size",
    "8",
    "--stage-epochs",
    "1",
    "1",
    "1",
    "--num-classes",
    "12",
    "--device",
    "cpu",
    "--label-set",
    "images",
    "--no-tensorboard",
    "--keep-last",
    "3",
    "--logging-steps",
    "1",
    "--eval-every",
    "4",
    "--save-every",
    "100",
]


def shrink() -> None:
    """Make `mini` small in this process."""
    model.SIZES["mini"] = WIDTHS
    objectives.DECODERS["mini"] = (64, 1)
