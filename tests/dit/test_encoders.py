"""The frozen encoders with tiny random weights, the codecs, the colour meter and the distances."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dit.modules.autoencoder import PatchAutoencoder
from dit.modules.features import FeatureEncoder
from dit.modules.text import HashTextEncoder, TextEncoder, make_text_encoder
from dit.modules.vae import PixelCodec, PoolCodec, VAEEncoder
from dit.plan import encoder_part
from dit.weights.open import make_vae
from shared.errors import UserError
from shared.metrics import agreement, colour_shares, named_colours
from tests.dit.golden import assert_close
from tests.dit.small import encoder_folder, tiny


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
    with pytest.raises(UserError, match="--text-len 77"):
        TextEncoder(str(clip), length=120, local_files_only=True)
    assert encoder_part("clip", str(clip), tokens=1).parameters == sum(
        weight.numel() for weight in CLIPTextModel.from_pretrained(clip).parameters()
    )
    assert encoder_part("clip", "openai/clip-vit-base-patch32", tokens=1) is None


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


def tiny_vae(path, *, blocks: int = 4, channels: int = 4, groups: int = 4, width: int = 8, **options):
    """A tiny AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=[width] * blocks, down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks, layers_per_block=1, norm_num_groups=groups,
        latent_channels=channels, **options,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.mark.parametrize(("blocks", "channels", "factor"), [(2, 4, 2), (5, 8, 16), (4, 16, 8)])
def test_factor_and_channels_are_the_vaes_own(tmp_path, blocks, channels, factor):
    folder = tiny_vae(tmp_path / "pipe" / "vae", blocks=blocks, channels=channels)
    config = tiny(
        data={"image_size": 64}, model={"in_channels": channels},
        vae={"type": "sd", "pretrained_model_name": str(tmp_path / "pipe")},
    )  # fmt: skip
    codec = make_vae(config)
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    assert codec.factor == config.vae_factor == factor and config.latent_side == 64 // factor
    assert codec.encode(images).shape == (3, channels, 64 // factor, 64 // factor)
    assert codec.decode(codec.encode(images)).shape == images.shape
    with pytest.raises(UserError, match="--in-channels"):
        make_vae(tiny(data={"image_size": 64}, model={"in_channels": channels + 1},
                      vae={"type": "sd", "pretrained_model_name": str(folder)}))  # fmt: skip
    with pytest.raises(ValueError, match="multiple of"):
        tiny(data={"image_size": 64 + factor // 2}, model={"in_channels": channels, "patch_size": 1},
             vae={"type": "sd", "pretrained_model_name": str(folder)})  # fmt: skip


def test_dc_ae_and_flux2_are_vaes_too(tmp_path):
    from diffusers import AutoencoderDC, AutoencoderKLFlux2

    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.5,
    ).save_pretrained(tmp_path / "dc")  # fmt: skip
    flux = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    flux.bn.running_mean.copy_(torch.arange(16.0) / 10)
    flux.bn.running_var.fill_(4.0)
    flux.save_pretrained(tmp_path / "flux2")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    dc, flux2 = VAEEncoder(str(tmp_path / "dc")), VAEEncoder(str(tmp_path / "flux2"))
    assert dc.factor == 4 and torch.equal(dc.encode(images), dc.encode(images))  # it has no distribution
    assert torch.allclose(dc.encode(images), 0.5 * dc.vae.encode(images).latent, atol=1e-6)
    assert flux2.factor == 2 and torch.allclose(flux2.mean.flatten(), torch.tensor([0.15, 0.55, 0.95, 1.35]))
    assert abs(flux2.scale.mean() - 0.5) < 0.01 and flux2.decode(flux2.encode(images)).shape == images.shape


def test_one_file_is_a_vae_by_its_shapes_or_the_config_next_to_it(tmp_path):
    folder = tiny_vae(tmp_path / "vae", width=32, groups=32)
    weights = folder / "diffusion_pytorch_model.safetensors"
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    want = VAEEncoder(str(folder), posterior="mode").encode(images)
    assert torch.allclose(VAEEncoder(str(weights), posterior="mode").encode(images), want)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match="--scaling-factor"):
        VAEEncoder(str(alone))
    found = VAEEncoder(str(alone), posterior="mode", scaling_factor=0.18215)
    assert torch.allclose(found.encode(images), want, atol=1e-5) and found.factor == 8
    config = tiny(vae={"type": "sd", "pretrained_model_name": str(alone), "scaling_factor": 0.18215})
    assert config.vae_factor == 8
    (tmp_path / "other.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match="other.safetensors"):
        VAEEncoder(str(tmp_path / "other.safetensors"))


def test_weights_that_lack_a_tensor_are_refused_and_not_filled_at_random(tmp_path, clip):
    weights = tiny_vae(tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}  # names of the first files
    state = load_file(weights)
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    save_file(state, weights)
    assert VAEEncoder(str(tmp_path / "vae")).factor == 8
    shutil.copytree(clip, tmp_path / "clip")
    encoder_folder(tmp_path / "dino")
    for name, kind in {"vae": VAEEncoder, "clip": TextEncoder, "dino": FeatureEncoder}.items():
        path = next((tmp_path / name).glob("*.safetensors"))
        state = load_file(path)
        del state[next(key for key in state if "norm" in key)]
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match="1 of its weights are missing"):
            kind(str(tmp_path / name))
    path = tiny_vae(tmp_path / "shift") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift_factor": "x"}))
    with pytest.raises(UserError, match="shift_factor"):
        VAEEncoder(str(tmp_path / "shift"))


def test_pictures_pass_the_vae_in_parts(tmp_path, monkeypatch):
    folder = tiny_vae(tmp_path / "vae")
    images = torch.rand(5, 3, 256, 256) * 2 - 1
    sizes = []
    encoder = VAEEncoder(str(folder), posterior="mode")
    whole = encoder.encode(images)
    monkeypatch.setattr("dit.modules.vae.AT_A_TIME", 2)
    encoder.vae.encoder.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    assert torch.allclose(whole, encoder.encode(images), atol=1e-5) and sizes == [2, 2, 1]


@pytest.mark.parametrize("kind", ["t5", "qwen", "gemma", "t5gemma", "pipeline"])
def test_language_models_by_path_are_text_encoders(tmp_path, kind):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "bird"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer" if kind == "pipeline" else tmp_path)
    torch.manual_seed(0)
    common = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    models_of = {
        "t5": lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "qwen": lambda: transformers.Qwen2Model(
            transformers.Qwen2Config(hidden_size=16, intermediate_size=16, **common)
        ),
        "gemma": lambda: transformers.GemmaModel(
            transformers.GemmaConfig(hidden_size=16, intermediate_size=16, head_dim=8, **common)
        ),
    }
    part = {**common, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    both = transformers.T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False, vocab_size=8)
    models_of["t5gemma"] = lambda: transformers.T5GemmaEncoderModel(both)
    models_of["pipeline"] = lambda: T5GemmaEncoder(both.encoder)  # of PRX
    models_of[kind]().save_pretrained(tmp_path / "text_encoder" if kind == "pipeline" else tmp_path)
    config = tiny(text={"type": "language", "pretrained_model_name": str(tmp_path)}, model={"text_len": 6})
    encoder = make_text_encoder(config)
    planned = encoder_part("text", str(tmp_path), tokens=10)
    assert planned.parameters == sum(weight.numel() for weight in encoder.model.parameters())
    assert planned.bytes == 4 * planned.parameters and 0 < planned.flops < 20 * planned.parameters
    states, mask, pooled = encoder.encode(["a red bird", "", "a bird a bird a bird a bird"])
    assert states.shape == (3, 6, 16) and pooled.shape == (3, 16) and bool(mask.any(1).all())
    if kind == "qwen":  # transformers puts a tokenizer of its own in front of this one
        return
    assert mask.sum(1).tolist() == [3, 1, 6]
    alone = encoder.encode(["a red bird"])
    assert torch.allclose(alone.states[0, :3], states[0, :3], atol=1e-5)
    assert encoder.is_cut(["a red bird", "a bird a bird a bird a bird"]) == [False, True]
    with pytest.raises(UserError, match="text_dim"):
        make_text_encoder(
            tiny(text={"type": "language", "pretrained_model_name": str(tmp_path)}, model={"text_dim": 8})
        )
