"""Reads the recorded cases in tests/reference/bagel and builds our model from their settings."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bagel.config import AutoencoderConfig, LanguageConfig, ModelConfig, VisionConfig
from bagel.model import Bagel

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "bagel"
FLOAT = dict(atol=5e-5, rtol=1e-4)  # tolerances of the recordings
LOOSE = dict(atol=2e-4, rtol=1e-3)
TINY_TOKENS = dict(bos_token_id=60, eos_token_id=61, start_of_image=62, end_of_image=63)


def names(prefix: str) -> list[str]:
    """Recorded cases with this prefix."""
    return sorted(path.stem for path in REFERENCE.glob(f"{prefix}*.json"))


class Case:
    """One recording: `info` from the JSON, tensors by their full key."""

    def __init__(self, name: str):
        self.info: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text())
        path = REFERENCE / f"{name}.safetensors"
        self.tensors: dict[str, Tensor] = load_file(path) if path.exists() else {}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def weights(self, prefix: str = "weights.") -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value.float() for key, value in self.tensors.items() if key.startswith(prefix)
        }

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def language_config(info: dict[str, Any]) -> LanguageConfig:
    fields = {name: info[name] for name in LanguageConfig.model_fields if name in info}
    return LanguageConfig(**{"vocab_size": 64, "num_hidden_layers": 1, **fields})


def vision_config(info: dict[str, Any]) -> VisionConfig:
    return VisionConfig(**{name: info[name] for name in VisionConfig.model_fields if name in info})


def vae_config(info: dict[str, Any]) -> AutoencoderConfig:
    return AutoencoderConfig(**{name: info[name] for name in AutoencoderConfig.model_fields if name in info})


def model_config(info: dict[str, Any], **changes: Any) -> ModelConfig:
    fields = {
        name: info[name]
        for name in ("latent_patch_size", "max_latent_size", "interpolate_pos", "timestep_shift", "freeze_und")
    }
    return ModelConfig(
        language=language_config(info),
        vision=vision_config(info["vit"]),
        autoencoder=vae_config(info["vae"]),
        **{**fields, **changes},
    )


def build(case: Case, **changes: Any) -> Bagel:
    """The recorded model with its weights, strictly loaded."""
    model = Bagel(model_config(case.info["config"], **changes))
    weights = {name: value for name, value in case.weights().items() if not name.startswith("vae.")}
    model.load_state_dict(weights)
    return model


def splits(samples: list[dict]) -> dict[str, list]:
    """The pack's split lists from the recorded samples."""
    return {
        "split_lens": [length for sample in samples for length in sample["split_lens"]],
        "attn_modes": [mode for sample in samples for mode in sample["attn_modes"]],
    }


def grad_norms_match(module: torch.nn.Module, expected: dict[str, float | None]) -> None:
    """Every recorded gradient norm, 0 or null meaning that nothing arrives."""
    parameters = dict(module.named_parameters())
    for name, norm in expected.items():
        grad = parameters[name].grad
        found = 0.0 if grad is None else grad.norm().item()
        torch.testing.assert_close(
            found, norm or 0.0, **LOOSE, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )
