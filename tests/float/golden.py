"""Recorded cases of the released modules, and the smallest models and data that the tests use."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from float.model import FlowMatchingTransformer

FOLDER = Path(__file__).resolve().parent.parent / "reference" / "float"


class Case:
    """One recorded case: `inputs`, `outputs`, `weights` by name, `config`."""

    def __init__(self, name: str):
        tensors = load_file(FOLDER / f"{name}.safetensors")
        self.config = json.loads((FOLDER / f"{name}.json").read_text())
        self.inputs, self.outputs, self.weights = (
            {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("in.", "out.", "weights.")
        )

    def close(self, found: Tensor, name: str, tolerance: float) -> None:
        """Assert that a result agrees with the recorded one."""
        difference = (found - self.outputs[name]).abs().max().item()
        assert found.shape == self.outputs[name].shape and difference <= tolerance, f"{name}: {difference}"


def transformer_of(case: Case) -> FlowMatchingTransformer:
    """The recorded transformer with its weights, in eval mode."""
    config = case.config["config"]
    model = FlowMatchingTransformer(
        dim_w=config["dim_w"],
        dim_a=config["dim_a"],
        dim_e=config["dim_e"],
        dim_h=config["dim_h"],
        depth=config["fmt_depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        attention_window=config["attention_window"],
        num_frames=case.config["L"],
        num_prev_frames=case.config["L_prev"],
    )
    weights = {name: value.bool() if name == "alignment_mask" else value for name, value in case.weights.items()}
    model.load_state_dict(weights)
    return model.eval()


def small_transformer(seed: int = 0, **changes) -> FlowMatchingTransformer:
    """A small transformer whose zero-initialised parts are random, so that every path shows."""
    torch.manual_seed(seed)
    settings = {"dim_w": 8, "dim_a": 6, "dim_h": 16, "depth": 2, "num_heads": 2, "num_frames": 6, "num_prev_frames": 2}
    model = FlowMatchingTransformer(**settings | changes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def formula_values(name: str, shape: tuple[int, ...], amplitude: float, centre: float = 0.0) -> Tensor:
    """Values from the integer hash of the fixtures' README."""
    count = int(np.prod(shape)) if shape else 1
    z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(count, dtype=np.uint64)
    z += np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.from_numpy((centre + amplitude * (2 * uniform - 1)).astype(np.float32)).reshape(shape)
