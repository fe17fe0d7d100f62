"""A folder of the form of BAGEL-7B-MoT with tiny sizes, and a few records to train on."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bagel.config import AutoencoderConfig, LanguageConfig, ModelConfig, VisionConfig
from bagel.data.tokenizer import SPECIAL_STRINGS
from bagel.model import Bagel
from bagel.modules.vision import FluxAutoencoder

LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 512,
    "model_type": "qwen2",
}
VISION = {
    "hidden_size": 32,
    "image_size": 980,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}


def released_weights() -> dict[str, torch.Tensor]:
    """bf16, under the released names."""
    language = LanguageConfig(**{name: value for name, value in LANGUAGE.items() if name != "model_type"})
    vision = VisionConfig(**{**VISION, "num_hidden_layers": VISION["num_hidden_layers"] - 1})
    torch.manual_seed(0)
    model = Bagel(ModelConfig(language=language, vision=vision)).initialize()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.05)
    return {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}


def write_released(folder: Path, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """The folder, with these weights or released ones."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=list(SPECIAL_STRINGS))
    tokenizer.train_from_iterator(["a red cat, make it blue"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "llm_config.json").write_text(json.dumps(LANGUAGE))
    (folder / "vit_config.json").write_text(json.dumps(VISION))
    autoencoder = FluxAutoencoder(AutoencoderConfig(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1))
    save_file({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, folder / "ae.safetensors")
    save_file(released_weights() if weights is None else weights, folder / "ema.safetensors")
    return folder


def write_records(folder: Path) -> Path:
    """Three records: a text, a picture to look at, a picture to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), (200, 40, 30)).save(folder / "a.png")
    records = [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a red cat"}]},
        {"image_path": "a.png", "question": "what is it?", "answer": "a red cat"},
        {"text_prompt": "a red cat", "image_path": "a.png"},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "train.jsonl"
