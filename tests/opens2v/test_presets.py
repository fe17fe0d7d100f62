"""Every public preset, shrunk: its own settings, with tiny models of the public classes in place of the weights."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from opens2v import export, generate, metrics, precompute, train
from opens2v.model import RefWanTransformer3DModel, is_reference_name
from opens2v.train import sample_paths
from tests.launching import losses

SIZE = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=32, freq_dim=32, text_dim=16)
SMALL = (
    "--device cpu --num-training-frames 5 --pixel-height 32 --pixel-width 48 --ref-height 32 --ref-width 32 "
    "--text-rows 12 --batch-size 1 --num-workers 0 --logging-steps 1 --val-steps 1 --val-batches 1 --total-steps 2 "
    "--warmup-steps 0"
).split()


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> list[str]:
    """Folders as the public weights have them: transformer, vae, text_encoder, tokenizer, image_encoder."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")
    model = RefWanTransformer3DModel(**SIZE)
    base = {name: value.contiguous() for name, value in model.state_dict().items() if not is_reference_name(name)}
    (folder / "transformer").mkdir()
    torch.save(base, folder / "transformer" / "diffusion_pytorch_model.bin")
    words = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", "a", "the", "dolphin", "subject"])}
    text = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    clip = CLIPVisionConfig(hidden_size=1280, intermediate_size=32, num_hidden_layers=2, num_attention_heads=16)
    clip.image_size, clip.patch_size = 224, 14
    CLIPVisionModel(clip).save_pretrained(folder / "image_encoder")
    sizes = [word for name, value in SIZE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    paths = [word for name, (value,) in sample_paths().items() for word in (f"--{name.replace('_', '-')}", value)]
    where = ["--generator-ckpt", str(folder), "--base-model-path", str(folder)]
    return [*sizes, *paths, *where, "--image-encoder-path", str(folder / "image_encoder")]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "40gb", "80gb", "140gb"])
def test_a_preset_trains_resumes_draws_is_measured_and_exported(public, tmp_path, preset):
    folder = tmp_path / "out"
    command = ["--config", preset, *public, *SMALL, "--output-dir", str(folder)]
    if preset != "default":
        command += ["--r", "2", "--lora-alpha", "4"]
    train.main([*command, "--max-steps", "1"])
    train.main(command)
    assert losses(folder).keys() == {1, 2} and list((folder / "samples").glob("*.mp4"))
    draw = ["--checkpoint", str(folder), "--steps", "1", "--device", "cpu"]
    generate.main([*draw, "--prompt", "a dolphin", "--output", str(tmp_path / "x.mp4"), "--vae-tiling"])
    settings = json.loads((tmp_path / "x.json").read_text())
    assert settings["prompt"] == "a dolphin"
    few = ["--seeds", "1", "--windows", "1", "--max-clips", "2", "--output", str(tmp_path / "m.json")]
    assert all(np.isfinite(value) for value in metrics.main([*draw, *few]).values())
    kinds = ["references", "merged"] if preset == "default" else ["lora", "references", "merged"]
    for kind in kinds:
        export.main(["--checkpoint", str(folder), "--output", str(tmp_path / kind), "--what", kind, "--dtype", "bf16"])
    merged = load_file(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors")
    base = {name for name in RefWanTransformer3DModel(**SIZE).state_dict() if not is_reference_name(name)}
    assert merged.keys() == base and all(value.dtype == torch.bfloat16 for value in merged.values())


@pytest.mark.slow
def test_the_documented_way_onto_24_gb_trains_from_caches_and_draws(public, tmp_path):
    command = ["--config", "default", *public, *SMALL, "--output-dir", str(tmp_path / "out")]
    command += ["--cache-dir", str(tmp_path / "cache"), "--only-keys", "dolphin", "girl"]
    assert precompute.main([*command, "--what", "text,clip,vae"])["stored"] == 2
    train.main([*command, "--use-cached-text", "--use-cached-clip", "--use-cached-latents"])
    assert losses(tmp_path / "out").keys() == {1, 2} and list((tmp_path / "out/samples").glob("*.mp4"))


@pytest.mark.slow
def test_a_reference_in_self_attention_trains_under_a_public_preset(public, tmp_path):
    command = ["--config", "default", *public, *SMALL, "--output-dir", str(tmp_path / "out")]
    train.main([*command, "--ref-in-self-attention"])
    trained = load_file(tmp_path / "out/checkpoints/checkpoint_opens2v_000002/model.safetensors")
    assert any(".attn1.k_ref." in name for name in trained) and all(is_reference_name(name) for name in trained)
