"""Settings that no preset gives: each one is seen to act."""

import json

import pytest
import torch

from bagel.config import PRESETS, Config, ModelConfig
from bagel.data.tokenizer import ByteTokenizer
from bagel.dataset import DataFormatError, UnifiedGenerationDataset, open_dataset
from bagel.modules.vision import FluxAutoencoder
from bagel.objective import UnifiedTrainer
from bagel.weights.pretrained import build_model, read_config
from shared.config import load_config
from shared.engine.dist import DistInfo
from shared.errors import UserError
from tests.bagel.conftest import TINY


def read(*flags: str) -> Config:
    return load_config(Config, presets=PRESETS, argv=[*TINY, *flags], default="small")


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_take_no_memory_for_nothing(preset):
    """No second copy of a 7B in host memory while a checkpoint is written; no bf16 on a CPU, where it is no faster."""
    config = load_config(Config, presets=PRESETS, argv=["--config", preset])
    if preset.startswith("7b"):
        assert not config.training.save_in_background or config.model.use_lora
    else:
        assert config.run.precision == "fp32"


def records(config: Config, path) -> UnifiedGenerationDataset:
    return open_dataset(config, config.model, ByteTokenizer(), str(path))


def test_relative_pictures_start_from_image_root(pictures):
    apart = pictures / "lists" / "data.jsonl"
    apart.parent.mkdir()
    apart.write_text('{"text_prompt": "A red apple", "image_path": "images/apple.png"}\n')
    dataset = records(read("--image-root", str(pictures)), apart)
    assert dataset.sample(0, 0) and not dataset.errors
    with pytest.raises(UserError, match="no valid record"):
        records(read(), apart)
    with pytest.raises(UserError, match="--image-root .*none"):
        records(read("--image-root", str(pictures / "none")), apart)


def test_strict_data_stops_at_the_first_malformed_record(pictures):
    path = pictures / "data.jsonl"
    path.write_text('{"text_prompt": "A red apple", "image_path": "images/apple.png"}\n{"nothing": 1}\n')
    dataset = records(read(), path)
    assert len(dataset) == 1 and [error.line for error in dataset.errors] == [2]
    with pytest.raises(DataFormatError, match="data.jsonl:2"):
        records(read("--strict-data"), path)


def test_freeze_llm_freezes_the_language_model_alone():
    model = build_model(read("--freeze-llm").model)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"vit_model", "connector", "time_embedder", "vae2llm", "llm2vae"}
    assert not model.language_model.training


def test_initializer_range_is_the_spread_of_fresh_matrices():
    spreads = []
    for flags in ((), ("--initializer-range", "0.08")):
        model = build_model(read(*flags).model)
        layer = model.language_model.model.layers[0]
        spreads.append([layer.mlp.down_proj.weight.std().item(), model.vit_pos_embed.pos_embed.std().item()])
        vision = model.vit_model.vision_model.encoder.layers[0].mlp.fc1.weight.std().item()
        assert vision == pytest.approx(read().model.vision_initializer_range, rel=0.1)  # has a setting of its own
    assert spreads[0][0] == pytest.approx(0.02, rel=0.1) and spreads[1][0] == pytest.approx(0.08, rel=0.1)
    assert spreads[0][1] == spreads[1][1]  # a fixed table


def test_pad_images_together_encodes_a_pack_on_one_canvas():
    """A network that looks around itself sees the zeros next to the smaller picture; alone it sees its border."""
    images, latents = [torch.rand(3, 8, 8), torch.rand(3, 16, 8)], []
    pack = {
        "vae_images": images, "packed_noise": torch.zeros(0, 16), "patchified_vae_latent_shapes": [[2, 2], [4, 2]],
        "posterior_noise": [torch.zeros(4, 4, 4), torch.zeros(4, 8, 4)],
    }  # fmt: skip
    for flags in ((), ("--pad-images-together",)):
        config = read(*flags)
        config.model.autoencoder = config.model.autoencoder.model_copy(
            update=dict(kind="flux", ch=32, ch_mult=[1, 1], z_channels=4, downsample=2, num_res_blocks=1)
        )
        torch.manual_seed(0)
        autoencoder = FluxAutoencoder(config.model.autoencoder).requires_grad_(False)
        info = DistInfo(device=torch.device("cpu"))
        trainer = UnifiedTrainer(config, info, build_model(config.model), autoencoder, ByteTokenizer(), None)
        latents.append(trainer.encoded(pack)["packed_latents"])
    assert latents[0].shape == latents[1].shape == (12, 16)
    assert (latents[0][:4] - latents[1][:4]).abs().max() > 1e-3
    assert torch.allclose(latents[0][4:], latents[1][4:], atol=1e-5)


def test_a_tower_of_other_channels_is_refused_by_name(tmp_path):
    for name in ("llm_config.json", "vit_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "vit_config.json").write_text(json.dumps({"num_channels": 4}))
    with pytest.raises(UserError, match="vit_config.json.*num_channels"):
        read_config(ModelConfig(model_path=str(tmp_path)))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--draw", "0", "--ask", "0", "--edit", "0", "--talk", "0"], "draw, ask, edit and talk are all 0"),
        (["--lora-target", "und"], "lora_target und changes nothing without use_lora"),
        (["--tokens-per-batch", "100000000000"], "less than or equal to 100000000"),
    ],
)
def test_shares_and_packs_out_of_range_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        read(*flags)
