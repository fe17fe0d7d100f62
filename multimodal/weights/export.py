"""A trained model in the forms of other libraries.

  python multimodal/weights/export.py --checkpoint OUT --form transformers --output DIR
  python multimodal/weights/export.py --checkpoint OUT --form open_clip --output DIR
transformers: AutoModel.from_pretrained(DIR, trust_remote_code=True), with AutoTokenizer, AutoImageProcessor and, in
DIR/audio, AutoFeatureExtractor. open_clip: the picture and text towers by open_clip's names, with its configuration;
it has no place for a linear path, so that the model must be trained with --linear-path false.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
from safetensors.torch import save_file
from torch import Tensor

from multimodal.data.image import MEAN, STD
from multimodal.data.text import CLS, MASK, PAD, SEP, UNKNOWN, TextTokenizer
from multimodal.model import SIZES, MultimodalModel
from multimodal.weights.files import load_model
from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command, own_folder, write_text, written_aside

CODE = Path(__file__).resolve().parent.parent
SHARED = CODE.parent / "shared" / "engine"
SPECIAL = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK, "unk_token": UNKNOWN}
RECOMPUTE = '''"""Blocks computed again in the backward pass; written by weights/export.py."""

from torch.utils import checkpoint as torch_checkpoint


def checkpoint(block, *arguments):
    return torch_checkpoint.checkpoint(block, *arguments, use_reentrant=False)
'''
MODELING = '''"""The towers as a transformers model; written by weights/export.py next to copies of their code."""

from transformers import PretrainedConfig, PreTrainedModel

from . import blocks, products, recompute  # noqa: F401  (so that the files travel with this one)
from .towers import create_model


class MultimodalConfig(PretrainedConfig):
    model_type = "multimodal_towers"

    def __init__(self, network=None, **options):
        self.network = network or {"size": "mini", "num_classes": 80}
        super().__init__(**options)


class MultimodalTowers(PreTrainedModel):
    config_class = MultimodalConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        settings = dict(config.network)
        self.network = create_model(settings.pop("size"), settings.pop("num_classes"), **settings)
        self.post_init()

    def _init_weights(self, module):
        return

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None, input_features=None, **options):
        """pixel_values (B, 3, H, W); input_ids (B, L); input_features (B, T, 80) log-mel frames, or (B, 80, T)."""
        audio = input_features
        if audio is not None and audio.shape[-1] != 80:
            audio = audio.transpose(1, 2)
        mask = None if attention_mask is None else attention_mask.bool()
        return self.network(images=pixel_values, input_ids=input_ids, attention_mask=mask, audio=audio, **options)

    def get_image_features(self, pixel_values):
        return self.network.encode_image(pixel_values)

    def get_text_features(self, input_ids, attention_mask=None):
        return self.network.encode_text(input_ids, attention_mask)

    def get_audio_features(self, input_features):
        audio = input_features if input_features.shape[-1] == 80 else input_features.transpose(1, 2)
        return self.network.encode_audio(audio)
'''


class Options(Section):
    """Flags of this command."""

    checkpoint: str = setting("outputs/multimodal", "a run's folder, a checkpoint folder or a .pt file")
    form: Literal["transformers", "open_clip"] = setting("transformers", "library that reads it")
    output: str = setting("exported", "folder to make; it must not exist")


@command
def main(argv: list[str] | None = None) -> Path:
    """Write the folder."""
    options = load_config(Options, argv=argv, description=__doc__)
    output = check_output(options.output, folder=True)
    if output.exists():
        raise UserError(f"--output {output}: exists already; name a new folder")
    network, tokenizer, payload = load_model(options.checkpoint)
    if options.form == "open_clip":
        check_open_clip(network)
    with own_folder(output.parent, output.name) as own:
        made = own / "content"
        made.mkdir()
        (to_transformers if options.form == "transformers" else to_open_clip)(network, tokenizer, payload, made)
        made.rename(output)
    print(output)
    return output


def put_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file."""
    with written_aside(path) as temporary:
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, temporary, {"format": "pt"})


# --- transformers -----------------------------------------------------------------------------------------------------


def to_transformers(network: MultimodalModel, tokenizer: TextTokenizer, payload: dict[str, Any], folder: Path) -> None:
    """Weights, configuration, the code of the towers, and the files of the three processors."""
    config = {
        "model_type": "multimodal_towers",
        "architectures": ["MultimodalTowers"],
        "auto_map": {
            "AutoConfig": "modeling_multimodal.MultimodalConfig",
            "AutoModel": "modeling_multimodal.MultimodalTowers",
        },
        "network": network.config,
        "dtype": "float32",
    }
    write_text(folder / "config.json", json.dumps(config, indent=1))
    put_tensors(
        folder / "model.safetensors", {f"network.{name}": value for name, value in network.state_dict().items()}
    )
    write_text(folder / "modeling_multimodal.py", MODELING)
    _write_code(folder)
    write_tokenizer(tokenizer, folder)
    settings = payload["config"]
    side = settings["model"]["image_size"]
    picture = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }
    write_text(folder / "preprocessor_config.json", json.dumps(picture, indent=1))
    frames = settings["data"]["audio_frames"]
    sound = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 80,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": frames / 100 if frames % 100 else frames // 100,
        "padding_value": 0.0,
    }
    (folder / "audio").mkdir()
    write_text(folder / "audio" / "preprocessor_config.json", json.dumps(sound, indent=1))


def _write_code(folder: Path) -> None:
    """The network's own code with what it needs of this repository: it opens where that is not."""
    sources = {
        "towers": CODE / "model.py",
        "blocks": CODE / "modules" / "blocks.py",
        "products": SHARED / "products.py",
    }
    moved = {
        "multimodal.modules.blocks": ".blocks",
        "shared.engine.products": ".products",
        "shared.engine.recompute": ".recompute",
    }
    for name, source in sources.items():
        code = source.read_text(encoding="utf-8")
        for module, beside in moved.items():
            code = code.replace(f"from {module} import", f"from {beside} import")
        write_text(folder / f"{name}.py", code)
    write_text(folder / "recompute.py", RECOMPUTE)


def write_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """tokenizer.json and what transformers and open_clip want to know of it."""
    shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
    names = {name: tokenizer.token_of(index) for name, index in SPECIAL.items()}
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.max_length,
        "padding_side": "right",
        "split_special_tokens": True,  # a caption that says [PAD] is text
        **names,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(facts, indent=1))
    write_text(folder / "special_tokens_map.json", json.dumps(names, indent=1))


# --- open_clip --------------------------------------------------------------------------------------------------------


def check_open_clip(network: MultimodalModel) -> None:
    """UserError for a model that has no place there."""
    if network.config["linear_path"]:
        raise UserError(
            "--form open_clip: it has no linear path, which this model has; use --form transformers, or train with "
            "--linear-path false"
        )


def to_open_clip(network: MultimodalModel, tokenizer: TextTokenizer, payload: dict[str, Any], folder: Path) -> None:
    """The picture and text towers as open_clip's CustomTextCLIP: open_clip_config.json and open_clip_model.safetensors.

    Two things of ours have no place there and are folded into others: the bias of the patches into their positions, the
    projection of the words into their table. open_clip masks padding only with model.text.use_pad_mask = True, which
    its configuration cannot say.
    """
    config = network.config
    bias = None if config["contrastive_loss"] == "infonce" else float(network.bias.detach())
    widths = SIZES[config["size"]]
    norm = {"eps": 1e-6}
    tree = {
        "model_cfg": {
            "embed_dim": config["embed_dim"],
            "custom_text": True,
            **({} if bias is None else {"init_logit_bias": bias}),
            "vision_cfg": {
                "image_size": config["image_size"],
                "patch_size": config["image_patch"],
                "width": widths.image[0],
                "layers": widths.image[1],
                "head_width": 64,
                "no_ln_pre": True,
                "norm_kwargs": norm,
            },
            "text_cfg": {
                "context_length": tokenizer.max_length,
                "vocab_size": config["vocabulary"],
                "hf_tokenizer_name": ".",
                "tokenizer_kwargs": {"clean": "whitespace"},
                "width": widths.text[0],
                "layers": widths.text[1],
                "heads": widths.text[0] // 64,
                "no_causal_mask": True,
                "pool_type": "first",
                "pad_id": PAD,
                "norm_kwargs": norm,
            },
        },
        "preprocess_cfg": {
            "mean": list(MEAN),
            "std": list(STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    write_text(folder / "open_clip_config.json", json.dumps(tree, indent=1))
    put_tensors(
        folder / "open_clip_model.safetensors", open_clip_weights(network, tokenizer.max_length, bias is not None)
    )
    write_tokenizer(tokenizer, folder)


@torch.no_grad()
def open_clip_weights(network: MultimodalModel, length: int, with_bias: bool) -> dict[str, Tensor]:
    """Tensors by open_clip's names. length: positions of the text tower."""
    state = network.state_dict()
    positions = state["image_positions"][0].clone()
    positions[1:] += state["image_patches.bias"]
    found = {
        "visual.conv1.weight": state["image_patches.weight"],
        "visual.class_embedding": state["image_class"].flatten(),
        "visual.positional_embedding": positions,
        "visual.proj": state["embed.image.weight"].T,
        "text.token_embedding.weight": state["words.weight"] @ state["word_projection.weight"].T,
        "text.positional_embedding": state["text_positions"][0, :length],
        "text.text_projection": state["embed.text.weight"].T,
        "logit_scale": state["log_scale"].squeeze(0),
    }
    if with_bias:
        found["logit_bias"] = state["bias"].squeeze(0)
    parts = {
        "norm1": "ln_1",
        "attention.output": "attn.out_proj",
        "norm2": "ln_2",
        "expand": "mlp.c_fc",
        "contract": "mlp.c_proj",
    }
    for own, other, last in (("image_tower", "visual", "ln_post"), ("text_tower", "text", "ln_final")):
        depth = len({name.split(".")[2] for name in state if name.startswith(f"{own}.blocks.")})
        for kind in ("weight", "bias"):
            found[f"{other}.{last}.{kind}"] = state[f"{own}.norm.{kind}"]
            for number in range(depth):
                block = f"{other}.transformer.resblocks.{number}"
                found[f"{block}.attn.in_proj_{kind}"] = state[f"{own}.blocks.{number}.attention.qkv.{kind}"]
                for ours, theirs in parts.items():
                    found[f"{block}.{theirs}.{kind}"] = state[f"{own}.blocks.{number}.{ours}.{kind}"]
    return found


if __name__ == "__main__":
    main()
