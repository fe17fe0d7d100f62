"""Tiny frozen encoders of the classes that the full-size presets load, and small data in the layouts that they read."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image


def tokenizer_of_letters(folder: Path) -> int:
    """A CLIP tokenizer whose words are single letters; the number of its tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(words)


def clip_text(folder: Path, width: int = 16) -> Path:
    """A CLIPTextModel with its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    if not folder.exists():
        count = tokenizer_of_letters(folder)
        torch.manual_seed(0)
        size = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2)
        ends = dict(eos_token_id=count - 1, bos_token_id=count - 2, pad_token_id=count - 1)
        CLIPTextModel(CLIPTextConfig(vocab_size=count, **size, **ends)).save_pretrained(folder)
    return folder


def picture_vae(folder: Path) -> Path:
    """An AutoencoderKL whose latents are an eighth of the size, as in a pipeline's folder."""
    from diffusers import AutoencoderKL

    if not folder.exists():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
            sample_size=32,
        ).save_pretrained(folder / "vae")
    return folder


def wav2vec(folder: Path, width: int = 16) -> Path:
    """A Wav2Vec2Model with the released model's strides, so that its frames have the same rate."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    if not folder.exists():
        torch.manual_seed(0)
        Wav2Vec2Model(_sound_config(Wav2Vec2Config, width)).save_pretrained(folder)
        Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def emotion(folder: Path, width: int = 16) -> Path:
    """The speech emotion recogniser with its seven classes, whose head has other names than transformers' class."""
    from safetensors.torch import save_file
    from transformers import Wav2Vec2Config

    from float.modules.emotion import Audio2Emotion

    if not folder.exists():
        torch.manual_seed(0)
        config = _sound_config(Wav2Vec2Config, width)
        config.save_pretrained(folder)
        model = Audio2Emotion.from_config(config).wav2vec2_for_emotion
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def _sound_config(kind: type, width: int, **more):
    return kind(
        hidden_size=width,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=2 * width,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        **more,
    )


WAN = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=32, freq_dim=32, text_dim=16)


def wan(folder: Path) -> Path:
    """The folder of a Wan pipeline: transformer, AutoencoderKLWan, UMT5 encoder with tokenizer, and CLIP's vision
    tower in image_encoder.
    """
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    from opens2v.model import RefWanTransformer3DModel, is_reference_name

    if folder.exists():
        return folder
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder / "vae")
    model = RefWanTransformer3DModel(**WAN)
    (folder / "transformer").mkdir()
    base = {name: value.contiguous() for name, value in model.state_dict().items() if not is_reference_name(name)}
    torch.save(base, folder / "transformer" / "diffusion_pytorch_model.bin")
    words = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", "a", "the", "dolphin", "subject"])}
    text = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    ends = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder / "tokenizer")
    clip = CLIPVisionConfig(hidden_size=1280, intermediate_size=32, num_hidden_layers=2, num_attention_heads=16)
    clip.image_size, clip.patch_size = 224, 14
    CLIPVisionModel(clip).save_pretrained(folder / "image_encoder")
    return folder


def class_folders(folder: Path, classes: int = 3, each: int = 6) -> Path:
    """Pictures of one plain colour, one folder a class."""
    for number in range(classes):
        place = folder / f"class_{number}"
        place.mkdir(parents=True, exist_ok=True)
        for index in range(each):
            colour = tuple(30 + (70 * number + 9 * index + 60 * part) % 220 for part in range(3))
            Image.new("RGB", (72, 64), colour).save(place / f"{index}.png")
    return folder


def captioned(folder: Path, count: int = 24) -> Path:
    """Pictures of two shapes, each with its caption in a text file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        size = ((72, 64), (64, 96))[number % 2]
        Image.new("RGB", size, (10 * number % 256, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a wall, number {number}\n")
    return folder


def downloaded(folder: Path) -> Path:
    """COCO with instances, Clotho and AudioCaps as their owners lay them out."""
    for split, numbers in (("train", range(32)), ("val", range(32, 40))):
        _coco_split(folder / "coco", split, numbers)
        _audiocaps_split(folder / "audiocaps", split, numbers)
    for split, numbers in (("development", range(32)), ("validation", range(32, 40))):
        rows = ["file_name,caption_1,caption_2", *(f"{n}.wav,a tone number {n},a sound" for n in numbers)]
        for number in numbers:
            tone(folder / "clotho" / split / f"{number}.wav", number)
        (folder / "clotho" / f"clotho_captions_{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


def _coco_split(folder: Path, split: str, numbers: range) -> None:
    (folder / f"{split}2017").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    listed = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers]
    for entry in listed:
        colour = tuple((37 * entry["id"] + 80 * part) % 256 for part in range(3))
        Image.new("RGB", (48, 40), colour).save(folder / f"{split}2017" / entry["file_name"])
    texts = [{"id": n, "image_id": n, "caption": f"a wall, number {n}"} for n in numbers]
    boxes = [{"image_id": n, "category_id": 1 + n % 3} for n in numbers]
    names = [{"id": n + 1, "name": f"class {n}"} for n in range(80)]
    trees = {
        "captions": {"images": listed, "annotations": texts},
        "instances": {"images": listed, "annotations": boxes, "categories": names},
    }
    for kind, tree in trees.items():
        (folder / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(tree))


def _audiocaps_split(folder: Path, split: str, numbers: range) -> None:
    rows = [f"{n},clip{n},{n},a bell number {n}" for n in numbers]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.csv").write_text("\n".join(["audiocap_id,youtube_id,start_time,caption", *rows]) + "\n")
    for number in numbers:
        tone(folder / "audio" / split / f"clip{number}_{number}.wav", number)


def tone(path: Path, number: int) -> None:
    """Half a second of one pitch, 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(8000) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * time), 16000)
