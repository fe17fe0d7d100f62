"""Access to the golden numbers: tests/reference/dit, or another folder of the same form given by DIT_REFERENCE."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dit.model import DiTModel

REFERENCE = Path(os.environ.get("DIT_REFERENCE", Path(__file__).resolve().parents[1] / "reference" / "dit"))
MANIFEST = json.loads((REFERENCE / "manifest.json").read_text())


def cases(name: str) -> dict[str, Tensor]:
    """The tensors of one file."""
    return load_file(REFERENCE / f"{name}.safetensors")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest absolute expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert equality to a relative tolerance."""
    error = relative_error(found, expected)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def golden_model(*, learn_sigma: bool = True) -> DiTModel:
    """The fixtures' class-conditional DiT: 8x8x4 latents, width 48, 2 blocks, 10 classes."""
    model = DiTModel(48, 2, 4, input_size=8, num_classes=10, text_conditioning="none", learn_sigma=learn_sigma)
    weights = cases("dit_weights")
    if not learn_sigma:
        weights |= cases("dit_weights_final_linear_learn_sigma_false")
    model.load_state_dict(weights)
    return model.eval()


torch.manual_seed(0)
