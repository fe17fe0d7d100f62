"""Exported models give the embeddings of the original, loaded by other libraries' own classes and processors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from multimodal.config import Config
from multimodal.data.text import TextTokenizer
from multimodal.model import create_model
from multimodal.weights import export
from tests.launching import ROOT

SIDE, FRAMES, LENGTH = 64, 200, 24


def checkpoint(path: Path, **more) -> Path:
    """A payload of a model whose every parameter differs from its start."""
    torch.manual_seed(0)
    settings = {"embed_dim": 64, "image_size": SIDE, "image_patch": 8, **more}
    network = create_model("mini", 80, **settings)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokenizer = TextTokenizer(max_length=LENGTH)
    model = {"size": "mini", "max_text_length": LENGTH, **settings}
    model.pop("contrastive_loss", None)
    config = Config(model=model, data={"audio_frames": FRAMES - FRAMES % 16})
    payload = {
        "model_state_dict": network.state_dict(),
        "model_config": network.config,
        "config": config.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer.sha256,
        "stage": 2,
        "epoch": 1,
        "best_val_loss": None,
    }
    torch.save(payload, path)
    return path


CHECK = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer
folder, found = sys.argv[3], {}
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()  # where this repository is not
sys.path.insert(0, sys.argv[1])
from multimodal.data.audio import log_mel
from multimodal.data.image import center_crop, normalise
from multimodal.weights.files import load_model
from shared.media.pictures import to_pixels

network, tokenizer, _ = load_model(sys.argv[2])
texts = ["a red dog", "two birds on a very long wire near the sea [PAD] x", "\\u00e9t\\u00e9"]
words = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(texts, padding=True, return_tensors="pt")
ids, mask = tokenizer.batch(texts)
picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 131, 3), dtype=np.uint8))
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
pixels, own = processor(picture, return_tensors="pt")["pixel_values"], normalise(to_pixels(center_crop(picture, 64)))
wave = torch.randn(16000 * int(sys.argv[4]) // 100, generator=torch.Generator().manual_seed(0)) * 0.1
extractor = AutoFeatureExtractor.from_pretrained(folder + "/audio")
mel = torch.as_tensor(extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"])
with torch.no_grad():
    out = model(pixel_values=pixels.expand(3, -1, -1, -1), **words)
    found["ids"] = float((words["input_ids"] != ids[:, : words["input_ids"].shape[1]]).sum())
    found["text"] = (out["text_embeds"] - network.encode_text(ids, mask)).abs().max().item()
    found["image"] = (out["image_embeds"][0] - network.encode_image(own[None])[0]).abs().max().item()
    found["audio"] = (model.get_audio_features(mel) - network.encode_audio(log_mel(wave)[None])).abs().max().item()
    found["logits"] = float(out["logits"].shape == (3, 80))
print(json.dumps(found))
"""


@pytest.mark.parametrize("linear_path", [False, True])
def test_transformers_loads_the_model_and_all_its_processors(tmp_path, linear_path):
    path = checkpoint(tmp_path / "a.pt", linear_path=linear_path)
    export.main(["--checkpoint", str(path), "--form", "transformers", "--output", str(tmp_path / "exported")])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [str(ROOT), str(path), str(tmp_path / "exported"), str(FRAMES - FRAMES % 16)]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("logits") == 1 and found.pop("ids") == 0 and max(found.values()) < 1e-5, found


def reference_towers(weights: dict, config: dict, images: torch.Tensor, ids: torch.Tensor) -> tuple:
    """open_clip's two towers as its paper and its names describe them, in plain functions."""

    def block(x: torch.Tensor, name: str, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
        width = x.shape[-1]
        y = functional.layer_norm(x, (width,), weights[f"{name}.ln_1.weight"], weights[f"{name}.ln_1.bias"], 1e-6)
        y, _ = functional.multi_head_attention_forward(
            *(y.transpose(0, 1),) * 3, width, heads,
            weights[f"{name}.attn.in_proj_weight"], weights[f"{name}.attn.in_proj_bias"], None, None, False, 0.0,
            weights[f"{name}.attn.out_proj.weight"], weights[f"{name}.attn.out_proj.bias"],
            need_weights=False, key_padding_mask=mask,
        )  # fmt: skip
        x = x + y.transpose(0, 1)
        y = functional.layer_norm(x, (width,), weights[f"{name}.ln_2.weight"], weights[f"{name}.ln_2.bias"], 1e-6)
        y = functional.linear(y, weights[f"{name}.mlp.c_fc.weight"], weights[f"{name}.mlp.c_fc.bias"])
        return x + functional.linear(
            functional.gelu(y), weights[f"{name}.mlp.c_proj.weight"], weights[f"{name}.mlp.c_proj.bias"]
        )

    vision, text = config["vision_cfg"], config["text_cfg"]
    x = (
        functional.conv2d(images, weights["visual.conv1.weight"], stride=vision["patch_size"])
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + weights["visual.positional_embedding"]
    for number in range(vision["layers"]):
        x = block(x, f"visual.transformer.resblocks.{number}", vision["width"] // 64, None)
    x = functional.layer_norm(x, x.shape[-1:], weights["visual.ln_post.weight"], weights["visual.ln_post.bias"], 1e-6)
    pictures = functional.normalize(x[:, 0] @ weights["visual.proj"], dim=-1)
    x = weights["text.token_embedding.weight"][ids] + weights["text.positional_embedding"][: ids.shape[1]]
    for number in range(text["layers"]):
        x = block(x, f"text.transformer.resblocks.{number}", text["heads"], ids == text["pad_id"])
    x = functional.layer_norm(x, x.shape[-1:], weights["text.ln_final.weight"], weights["text.ln_final.bias"], 1e-6)
    return pictures, functional.normalize(x[:, 0] @ weights["text.text_projection"], dim=-1)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_open_clips_form_gives_the_same_embeddings(tmp_path, loss):
    """open_clip itself needs torchvision, which has no build next to this torch; its towers are written out here."""
    path = checkpoint(tmp_path / "a.pt", contrastive_loss=loss)
    export.main(["--checkpoint", str(path), "--form", "open_clip", "--output", str(tmp_path / "exported")])
    config = json.loads((tmp_path / "exported" / "open_clip_config.json").read_text())["model_cfg"]
    weights = load_file(tmp_path / "exported" / "open_clip_model.safetensors")
    network, tokenizer, _ = export.load_model(path)
    ids, mask = tokenizer.batch(["a red dog", "two birds on a wire"])
    whole = functional.pad(ids, (0, LENGTH - ids.shape[1]))
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        pictures, texts = reference_towers(weights, config, images, whole)
        assert (pictures - network.encode_image(images)).abs().max() < 2e-6
        assert (texts - network.encode_text(ids, mask)).abs().max() < 2e-6
    assert ("logit_bias" in weights) == (loss == "siglip") == ("init_logit_bias" in config)
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        item.name for item in (tmp_path / "exported").iterdir()
    }


def test_what_cannot_be_exported_leaves_nothing(tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", linear_path=True)
    (tmp_path / "link").symlink_to(tmp_path / "a disk that is not mounted")
    cases = [
        (("--form", "open_clip", "--output", str(tmp_path / "x")), "no linear path"),
        (("--form", "open_clip", "--output", str(tmp_path / "new" / "folders" / "x")), "no linear path"),
        (("--output", str(tmp_path / "link")), "link is not a folder"),
        (("--output", str(path / "x")), "a.pt is not a folder"),
        (("--output", ""), "--output is empty"),
        (("--form", "onnx", "--output", str(tmp_path / "x")), "form"),
        (("--output", str(tmp_path)), "exists already"),
    ]
    for flags, message in cases:
        with pytest.raises(SystemExit) as leaving:
            export.main(["--checkpoint", str(path), *flags])
        assert leaving.value.code == 2 and message in capsys.readouterr().err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.pt", "link"]


def test_an_export_deletes_nothing_beside_it(tmp_path):
    path, own = checkpoint(tmp_path / "a.pt"), tmp_path / ".x.part"
    own.mkdir()
    (own / "mine.txt").write_text("mine")
    export.main(["--checkpoint", str(path), "--output", str(tmp_path / "x")])
    assert (own / "mine.txt").read_text() == "mine" and (tmp_path / "x" / "config.json").exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == [".x.part", "a.pt", "x"]
