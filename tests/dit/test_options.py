"""Settings that no preset gives: each one is seen to act."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from dit.config import Config
from dit.modules.vae import VAEEncoder
from dit.objective import make_objective
from dit.train import main
from dit.weights.open import make_vae
from shared.config import load_saved, save_config
from shared.errors import UserError
from tests.dit.small import tiny


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A tiny AutoencoderKL whose tiles are 32 pixels wide."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def opened(vae_folder):
    """opened(**settings of the section vae): the VAE of a run with them; it gives the mean of its latents."""

    def make(**settings) -> VAEEncoder:
        vae = {"type": "sd", "pretrained_model_name": str(vae_folder), "posterior": "mode", **settings}
        return make_vae(tiny(vae=vae))

    return make


def images(side: int = 32, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def sizes_of(module: torch.nn.Module) -> list[tuple[int, int]]:
    """(pictures, width) of every later pass through `module`."""
    found: list[tuple[int, int]] = []
    module.register_forward_pre_hook(lambda _, given: found.append((given[0].shape[0], given[0].shape[-1])))
    return found


def test_use_slicing_passes_one_picture_at_a_time(opened):
    whole, sliced = opened(), opened(use_slicing=True)
    together, alone, drawn = sizes_of(whole.vae.encoder), sizes_of(sliced.vae.encoder), sizes_of(sliced.vae.decoder)
    latents = whole.encode(images())
    assert torch.allclose(sliced.encode(images()), latents, atol=1e-5)
    sliced.decode(latents)
    assert together == [(3, 32)] and alone == [(1, 32)] * 3 and drawn == [(1, 4)] * 3


def test_use_tiling_passes_parts_of_a_picture(opened):
    whole, tiled = opened(), opened(use_tiling=True)
    together, parts = sizes_of(whole.vae.encoder), sizes_of(tiled.vae.encoder)
    latents = whole.encode(images(64)), tiled.encode(images(64))
    assert latents[0].shape == latents[1].shape == (3, 4, 8, 8) and not torch.equal(*latents)
    assert together == [(3, 64)] and len(parts) > 1 and max(width for _, width in parts) == 32


def test_latent_stats_normalise_every_channel_and_are_undone(opened, tmp_path):
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 4.0])
    save_file({"mean": mean, "std": std}, tmp_path / "stats.safetensors")
    plain, normalised = opened(), opened(latent_stats=str(tmp_path / "stats.safetensors"))
    raw, latents = plain.moments(images())[:, :4], normalised.encode(images())
    assert torch.allclose(latents, (raw - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1), atol=1e-5)
    assert torch.allclose(normalised.decode(latents), plain.decode(plain.encode(images())), atol=1e-4)
    save_file({"mean": mean[:3], "std": std[:3]}, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="vae.latent_stats .*3 means.* 4 of each"):
        opened(latent_stats=str(tmp_path / "short.safetensors"))


def test_vae_precision_is_that_of_the_network_and_latents_stay_float32(opened):
    latents = {}
    for name, kind in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        encoder = opened(vae_precision=name)
        latents[name] = encoder.encode(images())
        assert encoder.vae.dtype == kind and latents[name].dtype == torch.float32
    assert torch.equal(latents["auto"], latents["fp32"]) and not torch.equal(latents["bf16"], latents["fp32"])
    assert torch.allclose(latents["bf16"], latents["fp32"], atol=0.05)


def test_num_train_timesteps_is_the_length_of_the_noise_table():
    config = tiny(diffusion={"objective": "ddpm", "num_train_timesteps": 50}, sample={"sampler": "ddim"})
    objective = make_objective(config.diffusion, config.flow, learn_sigma=False, latent_size=config.latent_size)
    times = objective.times(torch.linspace(0, 0.9999, 500))
    assert times.min() == 0 and times.max() == 49 and max(objective.levels) < 50
    asked = []

    def predict(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        asked.append(int(t_B[0]))
        return torch.zeros_like(x)

    objective.sample(predict, torch.randn(1, 4, 4, 4), method="ddim", steps=5)
    assert asked == [41, 31, 21, 11, 1]


def test_logit_mean_and_logit_std_are_those_of_the_training_times():
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    flow = {"timestep_sampling": "logit_normal", "logit_mean": -0.7, "logit_std": 0.4}
    config = tiny(flow=flow)
    objective = make_objective(config.diffusion, config.flow, learn_sigma=False, latent_size=config.latent_size)
    logits = torch.logit(objective.times(uniform))
    assert logits.mean() == pytest.approx(-0.7, abs=1e-3) and logits.std() == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize(("keep", "expected"), [("true", [2, 4, 5, 6]), ("false", [5, 6])])
def test_keep_epochs_decides_whether_the_checkpoints_of_epochs_stay(tmp_path, keep, expected):
    training = {"batch_size": 16, "save_steps": 1, "save_every_n_epochs": 1, "total_steps": 6, "keep_last": 2}
    settings = tiny(
        run={"output_dir": str(tmp_path / "out"), "device": "cpu"}, training=training, data={"num_samples": 32}
    )  # fmt: skip
    save_config(settings, tmp_path / "tiny.yaml")
    main(["--config", str(tmp_path / "tiny.yaml"), "--keep-epochs", keep])
    listed = (tmp_path / "out" / "checkpoints").glob("*/manifest.json")
    assert sorted(json.loads(path.read_text())["step"] for path in listed) == expected


def test_a_file_that_names_a_former_setting_is_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("vae: {type: pool, vae_chunk: 4}\n")
    assert load_saved(Config, path).vae == Config(vae={"type": "pool"}).vae
