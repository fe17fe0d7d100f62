"""What a run hands on, opened in the library that it is for; each function returns one that takes the run's folder."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

Opener = Callable[[Path], object]


def plain_torch(name: str) -> Opener:
    """A file of weights."""
    return lambda run: _finite(torch.load(run / name, weights_only=True))


def safetensors(name: str) -> Opener:
    """All weights in a folder; one of its files may be empty, as that of a codec without weights."""
    from safetensors.torch import load_file

    def opened(run: Path) -> None:
        files = [load_file(path) for path in _some(run / name, "*.safetensors")]
        _finite({key: value for tensors in files for key, value in tensors.items()})

    return opened


def guide_file_of_bagel(run: Path) -> None:
    """trained_model.pt in the model, strictly, as the guide opens it."""
    from bagel.weights.open import open_model

    for path in _some(run / "checkpoints", "*/trained_model.pt"):
        open_model(str(run), device="cpu").model.load_state_dict(torch.load(path, weights_only=True))


def peft_adapter(name: str) -> Opener:
    """An adapter's folder: its settings and its weights."""

    def opened(run: Path) -> None:
        from peft import LoraConfig
        from peft.utils import load_peft_weights

        assert LoraConfig.from_pretrained(run / name).r > 0
        _finite(load_peft_weights(str(run / name), device="cpu"))

    return opened


def wan(has_lora: bool) -> Opener:
    """The merged transformer in diffusers' class, and its adapter laid onto it."""

    def opened(run: Path) -> None:
        from diffusers import WanTransformer3DModel

        model, told = WanTransformer3DModel.from_pretrained(run / "merged" / "transformer", output_loading_info=True)
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        _finite(model.state_dict())
        if has_lora:
            model.load_lora_adapter(run / "lora", weight_name=_some(run / "lora", "*.safetensors")[0].name)
            assert any("lora_" in key for key, _ in model.named_parameters()), "no layer took its adapter"
        safetensors("references")(run)

    return opened


def transformers(name: str) -> Opener:
    """A model and tokenizer that bring their own code."""

    def opened(run: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(run / name, trust_remote_code=True).eval()
        words = AutoTokenizer.from_pretrained(run / name, trust_remote_code=True)(["a bell"], return_tensors="pt")
        with torch.no_grad():
            assert model.get_text_features(words["input_ids"], words["attention_mask"]).isfinite().all()

    return opened


def _some(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    assert found, f"{folder} holds no {pattern}"
    return found


def _finite(tensors: dict) -> None:
    assert tensors, "no tensors"
    for key, value in tensors.items():
        assert not torch.is_tensor(value) or value.float().isfinite().all(), f"{key} is not finite"


def validated(run: Path) -> str:
    """What is wrong with the held-out losses in a run's metrics.jsonl, or empty."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [value for row in rows for key, value in row.items() if key.startswith("val/")]
    return "" if found and all(isinstance(value, float | int) for value in found) else "no held-out figures"
