"""Reading the recorded cases."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "reference" / "multimodal"


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def numbers(name: str):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
