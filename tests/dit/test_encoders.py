"""The frozen encoders with tiny random weights, the codecs, the colour meter and the distances."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from dit.modules.autoencoder import PatchAutoencoder
from dit.modules.text import HashTextEncoder, TextEncoder
from dit.modules.vae import PixelCodec, PoolCodec, VAEEncoder
from shared.errors import UserError
from shared.metrics import agreement, colour_shares, named_colours
from tests.dit.golden import assert_close


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP text tower with a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=len(words) - 1,
        bos_token_id=len(words) - 2,
        pad_token_id=len(words) - 1,
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_clip_masks_after_the_first_end_and_pools_there(clip):
    encoder = TextEncoder(str(clip), local_files_only=True)
    ids = encoder.tokenize(["abc", ""])["input_ids"]
    assert ids.shape == (2, 77)
    found = encoder.encode(["abc", ""])
    assert found.states.shape == (2, 77, 16) and found.mask.sum(1).tolist() == [5, 2]
    assert torch.equal(found.pooled[0], found.states[0, 4]) and torch.equal(found.pooled[1], found.states[1, 1])
    expected = encoder.model(input_ids=ids[:1, :5]).last_hidden_state[0]
    assert_close(found.states[0, :5], expected, 1e-5)  # causal attention: padding changes nothing
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().training


def test_a_long_caption_is_cut(clip):
    found = TextEncoder(str(clip), local_files_only=True).encode(["ab " * 100])
    assert found.mask.all() and torch.equal(found.pooled[0], found.states[0, 76])


def test_hashed_text_repeats_and_tells_words_apart():
    first, second = (
        HashTextEncoder(width=64, length=8).encode(["a red heart", "a blue heart", "", "红 心"]) for _ in range(2)
    )
    assert torch.equal(first.states, second.states) and first.mask.sum(1).tolist() == [4, 4, 1, 3]
    assert torch.equal(first.states[0, 2], first.states[1, 2]) and not torch.equal(
        first.states[0, 1], first.states[1, 1]
    )
    assert HashTextEncoder.words("It's a 3D Apple-pie, naïve 红心") == [
        "it",
        "s",
        "a",
        "3d",
        "apple",
        "pie",
        "naïve",
        "红",
        "心",
    ]

    def likeness(one: str, other: str) -> float:
        states = HashTextEncoder(width=512, length=4).encode([one, other]).states[:, 0]
        return torch.cosine_similarity(states[0], states[1], dim=0).item()

    assert likeness("orange", "oranges") > 0.35 > 0.2 > likeness("orange", "purple")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A tiny AutoencoderKL that makes latents an eighth of the size."""
    folder = tmp_path_factory.mktemp("pipeline")
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


def test_vae_scales_and_inverts(vae_folder):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    whole, sliced = (
        VAEEncoder(str(vae_folder), flag, posterior="mode", local_files_only=True) for flag in (False, True)
    )
    latents = whole.encode(images)
    assert latents.shape == (2, 4, 4, 4) and whole.scaling_factor == pytest.approx(0.18215)
    assert_close(latents, whole.vae.encode(images).latent_dist.mean * 0.18215, 1e-5)
    assert_close(sliced.encode(images), latents, 1e-4)
    assert_close(whole.decode(latents), whole.vae.decode(latents / 0.18215).sample.clamp(-1, 1), 1e-4)
    direct = VAEEncoder(str(vae_folder / "vae"), local_files_only=True)
    noise = torch.randn(2, 4, 4, 4)
    moments = direct.moments(images)
    mean, variance = moments.chunk(2, 1)
    assert_close(direct.latents(moments, noise), (mean + (0.5 * variance.clamp(-30, 20)).exp() * noise) * 0.18215, 1e-6)
    assert not torch.equal(direct.encode(images), direct.encode(images))


def test_absent_encoders_say_what_to_give(tmp_path):
    with pytest.raises(UserError, match="stabilityai/sd-vae-ft-mse"):
        VAEEncoder(str(tmp_path / "none"), local_files_only=True)
    with pytest.raises(UserError, match="text-encoder-path"):
        TextEncoder(str(tmp_path / "none"), local_files_only=True)


def test_patch_codec_keeps_variance_and_is_exact_with_all_channels():
    torch.manual_seed(0)
    images = (torch.randn(12, 3, 16, 16).cumsum(2).cumsum(3) / 12).clamp(-1, 1)
    whole = PatchAutoencoder(channels=48, patch=4, decoder_steps=0)
    figures = whole.fit(images, seed=0)
    assert figures["variance_kept"] == pytest.approx(1.0, abs=1e-6)
    assert_close(whole.decode(whole.encode(images)), images, 1e-4)
    latents = torch.cat([whole.encode(images), whole.encode(images.flip(3))])
    assert latents.square().mean().item() == pytest.approx(1.0, abs=1e-3)
    few = PatchAutoencoder(channels=6, patch=4, decoder_steps=40)
    figures = few.fit(images, seed=0)
    assert figures["psnr"] > figures["psnr_linear"] - 0.5 and few.encode(images).shape == (12, 6, 4, 4)
    again = PatchAutoencoder(channels=6, patch=4, decoder_steps=40)
    again.fit(images, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(few.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="48 numbers"):
        PatchAutoencoder(channels=49, patch=4, decoder_steps=0)


def test_pixel_and_pool_codecs():
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    pixels = PixelCodec()
    pixels.fit(images, seed=0)
    latents = pixels.encode(images)
    assert latents.mean().abs() < 1e-5 and abs(latents.std() - 1) < 1e-2
    assert_close(pixels.decode(latents), images, 1e-5)
    assert PoolCodec().encode(images).shape == (4, 4, 2, 2) and PoolCodec().decode(torch.zeros(1, 4, 2, 2)).shape == (
        1,
        3,
        16,
        16,
    )


def test_colour_meter():
    plain = {
        "red": (220, 20, 20),
        "green": (30, 180, 60),
        "blue": (30, 80, 220),
        "black": (10, 10, 10),
        "brown": (120, 60, 20),
    }
    pictures = np.full((len(plain), 8, 8, 3), 255, dtype=np.uint8)
    for row, colour in enumerate(plain.values()):
        pictures[row, 2:6, 2:6] = colour
    found = agreement(pictures, [f"a {name} thing" for name in plain])
    assert found["own"] == 1.0 and found["shuffled"] == 0.0 and found["p"] < 0.05
    assert named_colours("A violet, gray and WHITE cup") == {"purple", "grey"}
    assert colour_shares(np.full((1, 4, 4, 3), 255, np.uint8)).sum() == 0
    assert agreement(pictures, ["no hue"] * 5) == {"pictures": 0.0}
