"""Adapters, quantized projections and folders of released form."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from bagel.config import PRESETS, Config
from bagel.data.tokenizer import ByteTokenizer
from bagel.dataset import layout_of, transforms_of
from bagel.modules.lora import LoRALinear, adapters, add_adapters, merge_adapters
from bagel.modules.quantization import QuantizedLinear, quantize_projections, stored_layers
from bagel.modules.vision import FluxAutoencoder
from bagel.train import main
from bagel.weights.pretrained import build_model, export_folder, load_autoencoder, read_config
from shared.config import load_config
from shared.errors import UserError
from tests.bagel.conftest import SAMPLE
from tests.bagel.tiny import packs_of


def test_adapters_merge_and_unmerge(tiny):
    config, model = tiny
    model = copy.deepcopy(model)
    pack = packs_of(config, [[0, 2, 3]])[0]
    before = model(pack)
    assert add_adapters(model, config.model) == 2 * 2 * 7
    assert_close(model(pack), before)
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters(model):
        torch.nn.init.normal_(adapter.lora_B, std=0.05, generator=generator)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    adapted = model(pack)
    assert not torch.allclose(adapted["mse"], before["mse"])
    for adapter in adapters(model):
        adapter.merge()
    assert_close(model(pack), adapted, atol=1e-5, rtol=1e-4)
    for adapter in adapters(model):
        adapter.unmerge()
    assert all((value - weights[name]).abs().max() < 1e-5 for name, value in model.named_parameters())
    merged = merge_adapters(model)
    assert merged.state_dict().keys() == tiny[1].state_dict().keys()
    assert_close(merged(pack), adapted, atol=1e-5, rtol=1e-4)


def test_an_adapter_adds_alpha_over_rank_times_its_product():
    adapter = LoRALinear(torch.nn.Linear(6, 5), rank=4, alpha=8.0, dropout=0.0)
    torch.nn.init.normal_(adapter.lora_B)
    x = torch.randn(3, 6)
    assert_close(adapter(x), adapter.base(x) + 2.0 * (x @ adapter.lora_A.T) @ adapter.lora_B.T)
    assert_close(adapter.delta(), 2.0 * adapter.lora_B @ adapter.lora_A)


def test_one_expert_can_be_adapted_alone(tiny):
    config, model = tiny[0].model.model_copy(update={"lora_target": "gen"}), copy.deepcopy(tiny[1])
    assert add_adapters(model, config) == 2 * 7
    assert all("_moe_gen" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind, bound, share", [("nf4", 0.11, 0.5625), ("int8", 0.01, 1.1)])
def test_quantized_projections(tiny, kind, bound, share):
    model = copy.deepcopy(tiny[1])
    before = copy.deepcopy(model)
    quantize_projections(model, kind)
    table = stored_layers(model)
    assert len(table) == 2 * 2 * 7
    for row in table:
        weight, stored = before.get_submodule(row["layer"]).weight, model.get_submodule(row["layer"])
        error = stored.weight_as(torch.float32) - weight
        assert error.norm() < bound * weight.norm()
        assert row["max_error"] == pytest.approx(error.abs().max().item())
    assert all(row["bytes_stored"] <= row["bytes_bf16"] / 2 * share + 256 for row in table)
    torch.manual_seed(1)
    linear = torch.nn.Linear(100, 30)
    stored = QuantizedLinear.of(linear, kind)
    x = torch.randn(5, 100, requires_grad=True)
    stored(x).sum().backward()
    assert_close(x.grad, stored.weight_as(torch.float32).sum(0).expand(5, 100))
    assert (stored(x) - linear(x)).abs().max() < 0.2
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 28
    assert isinstance(model.language_model.lm_head, torch.nn.Linear)


def test_nf4_keeps_its_own_levels_exactly():
    from bagel.modules.quantization import NF4_LEVELS, dequantize_nf4, quantize_nf4

    weight = torch.tensor(NF4_LEVELS).repeat(8).view(2, 64) * 0.3
    assert_close(dequantize_nf4(*quantize_nf4(weight), (2, 64), torch.float32), weight)


def folder_of(tiny, path: Path) -> Path:
    """A folder of released form with a FLUX autoencoder."""
    config, model = tiny[0].model.model_copy(deep=True), tiny[1]
    config.autoencoder = config.autoencoder.model_copy(
        update=dict(
            kind="flux",
            ch=32,
            ch_mult=[1, 1],
            z_channels=12,
            downsample=2,
            num_res_blocks=1,
            scale_factor=0.3611,
            shift_factor=0.1159,
        )
    )
    export_folder(path, config, model.state_dict(), FluxAutoencoder(config.autoencoder))
    return path


def test_a_released_folder_loads_without_its_tables(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "model")
    (folder / "bagel_config.json").unlink()  # the released folder has none
    config = load_config(
        Config,
        presets=PRESETS,
        argv=["--model_path", str(folder), "--tokenizer", "bytes", "--max-latent-size", "4"],
        default="7b",
    )
    resolved = read_config(config.model)
    assert (resolved.autoencoder.ch_mult, resolved.autoencoder.z_channels, resolved.vision.num_hidden_layers) == (
        [1, 1],
        12,
        1,
    )
    model = build_model(resolved)
    assert model.latent_pos_embed.pos_embed.shape[0] == 16
    for name, value in tiny[1].state_dict().items():
        if "pos_embed" not in name:
            assert torch.equal(model.state_dict()[name], value)
    load_autoencoder(resolved)
    assert (
        layout_of(resolved, ByteTokenizer()).latent_stride == 4 and transforms_of(config.data, resolved)[0].stride == 4
    )


def test_a_plain_language_model_gets_a_copied_expert(tiny, tmp_path):
    from safetensors.torch import save_file

    folder = folder_of(tiny, tmp_path / "model")
    weights = {name: value for name, value in load_file(folder / "ema.safetensors").items() if "_moe_gen" not in name}
    save_file(weights, folder / "ema.safetensors")
    from bagel.config import ModelConfig

    config = read_config(ModelConfig(model_path=str(folder)))
    state = build_model(config).state_dict()
    for name in state:
        if "_moe_gen" in name:
            assert torch.equal(state[name], state[name.replace("_moe_gen", "")])
    with pytest.raises(UserError, match="missing in the file"):
        build_model(config.model_copy(update={"copy_init_moe": False}))


def test_faults_of_a_model_folder_are_named(tiny, tmp_path, capsys):
    folder = folder_of(tiny, tmp_path / "model")
    cases = [
        ("llm_config.json", "llm_config.json"),
        ("vit_config.json", "vit_config.json"),
        ("ae.safetensors", "ae.safetensors"),
        ("ema.safetensors", "ema.safetensors"),
    ]
    for name, message in cases:
        moved = (folder / name).rename(tmp_path / name)
        with pytest.raises(SystemExit) as stopped:
            main(
                [
                    "--config",
                    "7b_lora",
                    "--model_path",
                    str(folder),
                    "--train_data_path",
                    str(SAMPLE),
                    "--output-dir",
                    str(tmp_path / "out"),
                    "--strategy",
                    "none",
                    "--device",
                    "cpu",
                ]
            )
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        moved.rename(folder / name)
    language = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**language, "intermediate_size": 64}))
    from bagel.config import ModelConfig

    with pytest.raises(UserError, match=r"gate_proj.weight has shape \(48, 32\), expected \(64, 32\)"):
        build_model(read_config(ModelConfig(model_path=str(folder))))
