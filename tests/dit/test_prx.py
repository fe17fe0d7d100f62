"""PRX: a folder of diffusers is loaded, gives the same numbers, is trained on and drawn with."""

import json
import shutil

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, PRXTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from dit import generate, train
from dit.config import PRESETS, Config, refuse_unused
from dit.modules.text import condition_of, make_text_encoder
from dit.plan import workload
from dit.weights.convert import load_pretrained
from dit.weights.open import build_model, load_trained, make_vae
from shared.config import load_config, save_config
from shared.errors import UserError
from shared.log import read_metrics
from shared.plan.table import plan_run
from tests.dit.small import TINY, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("prx"), resolution_embeds=True)


def made(path, **options):
    """A tiny PRX with random weights, the zeros of its modulation too."""
    torch.manual_seed(0)
    model = PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=24, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[6, 6], **options,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    model.save_pretrained(path)
    return path


def settings(folder, **sections) -> Config:
    model = {**TINY["model"], "type": "prx", "pretrained_path": str(folder), **sections.pop("model", {})}
    return tiny(model=model, **sections)


def test_a_folder_gives_the_velocity_of_diffusers_turned_round(folder):
    config = settings(folder)
    assert config.model.hidden_size == 24 and config.model.patch_size == 2 and config.model.resolution_embeds
    model, theirs = build_model(config), PRXTransformer2DModel.from_pretrained(folder)
    load_pretrained(model, folder)
    x, text, t = torch.randn(3, 4, 8, 12), torch.randn(3, 8, 16), torch.tensor([0.0, 0.3, 0.9])
    mask = torch.arange(8)[None] < torch.tensor([8, 3, 1])[:, None]
    wanted = theirs(x, 1 - t, text, attention_mask=mask).sample
    found = model(x, 1000 * t, text, text_mask=mask)
    assert torch.allclose(found, -wanted, atol=1e-5) and found.abs().max() > 0.1
    null, null_mask = torch.randn(8, 16), torch.arange(8) < 2
    model.set_null_text(null, null_mask, torch.zeros(16))
    dropped = model(x, 1000 * t, text, text_mask=mask, drop=torch.tensor([False, True, False]))
    assert torch.allclose(dropped[::2], found[::2], atol=1e-6)
    alone = theirs(x[1:2], 1 - t[1:2], null[None], attention_mask=null_mask[None]).sample
    assert torch.allclose(dropped[1:2], -alone, atol=1e-5)


def test_a_folder_with_a_bottleneck_in_its_patches_is_loaded(tmp_path):
    config = settings(made(tmp_path, bottleneck_size=8))
    assert config.model.bottleneck_size == 8
    model, theirs = build_model(config), PRXTransformer2DModel.from_pretrained(tmp_path)
    load_pretrained(model, tmp_path)
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 16), torch.tensor([0.2, 0.9])
    assert torch.allclose(model(x, 1000 * t, text), -theirs(x, 1 - t, text).sample, atol=1e-5)


def test_a_folder_is_fine_tuned_resumed_without_it_and_drawn_with(folder, tmp_path):
    config = settings(folder, run={"output_dir": str(tmp_path / "out"), "device": "cpu"})
    save_config(config, tmp_path / "tiny.yaml")
    words = ["--config", str(tmp_path / "tiny.yaml")]
    train.main([*words, "--max-steps", "2"])
    begun = load_trained(tmp_path / "out", device=torch.device("cpu"), use_ema=False).model.state_dict()
    theirs = PRXTransformer2DModel.from_pretrained(folder).state_dict()
    moved = {name: (begun[f"prx.{name}"] - value).abs().max() for name, value in theirs.items()}
    assert max(moved.values()) < 0.02 and all(change > 0 for change in moved.values())
    train.main([*words, "--set", "model.pretrained_path=null"])
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "train/loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    generate.main(["--checkpoint", str(tmp_path / "out"), "--prompt", "a red box", "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 100


def test_what_a_prx_does_not_have_is_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="is a PRX; use --config prx"):
        tiny(model={**TINY["model"], "pretrained_path": str(folder)})
    with pytest.raises(ValueError, match="a flow's velocity from text"):
        settings(folder, diffusion={"objective": "ddpm"})
    for words, reason in (
        ({"model": {"qk_norm": True}}, "model.qk_norm True would change nothing: model.type is prx"),
        ({"training": {"optimizer": "muon"}}, "knows the matrices of model.type dit"),
        ({"training": {"gradient_checkpointing": 2}}, "every so-manieth"),
    ):
        with pytest.raises(UserError, match=reason):
            refuse_unused(settings(folder, **words))
    other = tmp_path / "other"
    other.mkdir()
    tree = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**tree, "theta": 500}))
    with pytest.raises(ValueError, match="theta 500 is not supported"):
        settings(other)


def test_the_preset_is_the_public_size():
    config = load_config(Config, presets=PRESETS, argv=["--config", "prx", "--strategy", "fsdp", "--world-size", "8"])
    refuse_unused(config)
    assert "PRX 1792/16/28" in plan_run(workload(config), config)


def test_a_pipelines_folder_gives_transformer_vae_and_text_encoder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "transformer")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "vae")
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "bird"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    part = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    part |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    both = transformers.T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False, vocab_size=8)
    T5GemmaEncoder(both.encoder).save_pretrained(tmp_path / "text_encoder")
    places = [word for flag in ("pretrained", "vae-path", "text-encoder-path") for word in (f"--{flag}", str(tmp_path))]
    config = load_config(Config, presets=PRESETS, argv=["--config", "prx", "--image-size", "32", *places])
    codec, encoder, model = make_vae(config), make_text_encoder(config), build_model(config)
    load_pretrained(model, tmp_path)
    latents = codec.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    condition = condition_of(["a red bird", ""], None, encoder, torch.device("cpu"))
    assert model(latents, torch.tensor([100.0, 900.0]), **condition).shape == latents.shape == (2, 4, 32, 32)
