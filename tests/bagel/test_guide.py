"""The guide's own commands and snippets: released weights are what is trained, exported and opened again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel.config import PRESETS, Config, ModelConfig
from bagel.model import Bagel
from bagel.train import completed, main
from bagel.weights.export import main as export
from bagel.weights.open import open_model
from bagel.weights.pretrained import build_model, fitting_preset, open_released, read_config, weight_files
from shared.config import load_config
from shared.errors import UserError
from tests.bagel.released import LANGUAGE, VISION, released_weights, write_records, write_released
from tests.launching import ROOT

# Small pictures, so that a test takes seconds; everything else is as the guide writes it.
SMALL = ["--set", "data.vae_image.min_size=32", "--set", "data.vit_image.min_size=28", "--device", "cpu"]
SMALL += ["--set", "data.edit_vit_image.min_size=28", "--sample-records", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released") / "TINY")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def trained(folder, records, tmp_path_factory) -> Path:
    """A run of the guide's command."""
    output = tmp_path_factory.mktemp("run") / "out"
    command = f"""--model_path {folder} --train_data_path {records} --val_data_path {records} --output_dir {output}
        --batch_size 1 --gradient_accumulation_steps 2 --num_epochs 3 --learning_rate 1e-5"""
    main([*command.split(), *SMALL])
    return output


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one.float().flatten(), other.float().flatten()]))[0, 1].item()


def test_the_guides_command_trains_the_released_weights(trained, folder):
    released, found = (load_file(path) for path in (folder / "ema.safetensors", trained / "model" / "ema.safetensors"))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert correlation(released[name], found[name]) > 0.99 and not torch.equal(
        released[name].float(), found[name].float()
    )
    config = load_config(Config, presets=PRESETS, argv=["--config", str(trained / "config.yaml")])
    assert not config.model.from_scratch and config.model.tokenizer is None and config.run.strategy in (None, "none")
    assert (config.training.text_loss_weight, config.training.lr_scheduler_type) == (1.0, "cosine")


def test_what_the_command_line_says_counts_over_what_is_filled_in(folder):
    argv = completed(["--model-path", str(folder), "--text_loss_weight=0.5", "--no-export", "--warmup_steps", "3"])
    config = load_config(Config, presets=PRESETS, argv=argv)
    training = config.training
    assert (training.text_loss_weight, training.export, training.warmup_steps) == (0.5, False, 3)
    assert training.warmup_ratio == 0 and config.data.edit_vit_image.max_size == 518
    half = load_config(Config, presets=PRESETS, argv=completed(["--config", "7b", "--fp16"]))
    assert half.run.precision == "fp16"  # not the preset's bf16, which nobody gave


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model_path", "EMPTY"], "llm_config.json"),
        (["--config", "small", "--model_path", "TINY"], "holds weights, but this preset starts from random ones"),
        (["--model_path", "TINY"], "no data"),
    ],
)
def test_random_weights_are_never_trained_unasked(flags, message, folder, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    places = {"EMPTY": str(tmp_path / "EMPTY"), "TINY": str(folder)}
    with pytest.raises(SystemExit) as stopped:
        main([*(places.get(flag, flag) for flag in flags), "--output-dir", str(tmp_path / "out"), "--device", "cpu"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_random_weights_may_be_asked_for_by_name(folder, records, tmp_path):
    flags = ["--config", "small", "--model_path", str(folder), "--from-scratch", "--train_data_path", str(records)]
    main([*flags, "--output-dir", str(tmp_path), "--max-steps", "1", *SMALL, "--no-export"])
    config = load_config(Config, presets=PRESETS, argv=["--config", str(tmp_path / "config.yaml")])
    assert config.model.tokenizer is None  # the folder's, not the preset's bytes


@pytest.mark.parametrize("memory, preset", [(1e12, "7b"), (80e9, "7b_lora"), (24e9, "7b_nf4"), (8e9, None)])
def test_the_preset_of_a_7b_is_chosen_by_memory(folder, monkeypatch, memory, preset):
    from bagel.weights import pretrained

    monkeypatch.setattr(pretrained, "_memory", lambda: (memory, "GPU memory"))
    monkeypatch.setattr(pretrained, "count_weights", lambda folder: 14_607_260_128)
    monkeypatch.setattr(pretrained, "_read_json", lambda path: {"hidden_size": 3584, "num_hidden_layers": 28})
    if preset is None:
        with pytest.raises(UserError, match="do not fit 8 GB of GPU memory"):
            fitting_preset(folder, 1)
    else:
        chosen, why = fitting_preset(folder, 1)
        assert chosen == preset and f"preset {preset}" in why


def test_trained_model_pt_is_taken_strictly(trained):
    """model.load_state_dict(torch.load("trained_model.pt")), also where a part was frozen."""
    weights = torch.load(trained / "checkpoints" / "step_3" / "trained_model.pt", weights_only=True)
    Bagel(read_config(ModelConfig(model_path=str(trained / "model")))).load_state_dict(weights, strict=True)


def test_frozen_parts_are_in_trained_model_pt(folder, records, tmp_path):
    flags = ["--model_path", str(folder), "--train_data_path", str(records), "--freeze_vit", "--max_steps", "1"]
    main([*flags, "--output_dir", str(tmp_path), *SMALL])
    weights = torch.load(tmp_path / "checkpoints" / "step_1" / "trained_model.pt", weights_only=True)
    Bagel(read_config(ModelConfig(model_path=str(folder)))).load_state_dict(weights, strict=True)
    name = "vit_model.vision_model.post_layernorm.weight"
    assert torch.equal(weights[name], load_file(folder / "ema.safetensors")[name].float())


def test_a_project_switches_weights_and_biases_on():
    def read(*flags: str) -> Config:
        return load_config(Config, presets=PRESETS, argv=list(flags), default="small")

    assert read("--wandb_project", "p", "--wandb_run_name", "r").run.wandb
    assert not read().run.wandb and not read("--wandb_project", "p", "--no-wandb").run.wandb


def test_a_project_without_the_package_is_said_and_does_not_stop(folder, records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bagel.train.find_spec", lambda name: None)
    flags = ["--model_path", str(folder), "--train_data_path", str(records), "--wandb_project", "p", "--max-steps", "1"]
    main([*flags, "--output_dir", str(tmp_path / "a"), *SMALL, "--no-export"])
    assert "wandb-project p: the package wandb is missing" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--output_dir", str(tmp_path / "b"), "--wandb", *SMALL])
    assert stopped.value.code == 2 and not (tmp_path / "b").exists()


def test_the_inferencer_is_imported_from_its_folder():
    code = "from inferencer import InterleaveInferencer; print(InterleaveInferencer.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bagel", capture_output=True, text=True)
    assert done.stdout.strip() == "InterleaveInferencer", done.stderr


# --- out --------------------------------------------------------------------------------------------------------------


def test_a_run_is_exported_in_released_form(trained, tmp_path):
    export(["--checkpoint", str(trained), "--output", str(tmp_path / "whole")])
    export(["--checkpoint", str(trained), "--output", str(tmp_path / "cut"), "--shard-gb", "0.0005"])
    export(["--checkpoint", str(trained), "--output", str(tmp_path / "w.pt"), "--form", "file", "--dtype", "fp32"])
    whole = load_file(tmp_path / "whole" / "ema.safetensors")
    assert whole.keys() == released_weights().keys() and {value.dtype for value in whole.values()} == {torch.bfloat16}
    assert len(weight_files(tmp_path / "cut")) > 1 and not (tmp_path / "cut" / "ema.safetensors").exists()
    plain = torch.load(tmp_path / "w.pt", weights_only=True)
    for name in ("whole", "cut"):
        state = open_model(str(tmp_path / name), device="cpu").model.state_dict()
        assert all(torch.equal(state[key], whole[key].float()) for key in whole if "pos_embed" not in key)
    assert all(torch.equal(plain[key].to(torch.bfloat16), whole[key]) for key in whole)


@pytest.mark.parametrize("quantization, precision", [("none", "fp32"), ("none", "bf16"), ("nf4", "fp32")])
def test_adapters_are_merged_and_handed_to_peft(folder, records, tmp_path, quantization, precision):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    flags = ["--config", "7b_lora", "--model_path", str(folder), "--train_data_path", str(records), "--max-steps", "2"]
    flags += ["--quantization", quantization, "--precision", precision]
    flags += ["--learning-rate", "0.01", "--warmup-ratio", "0"]
    main([*flags, "--output_dir", str(tmp_path / "run"), *SMALL])
    export(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "merged"), "--dtype", "fp32"])
    export(
        ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "peft"), "--form", "peft", "--dtype", "fp32"]
    )
    merged, base = load_file(tmp_path / "merged" / "ema.safetensors"), load_file(folder / "ema.safetensors")
    assert merged.keys() == base.keys()
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    model = build_model(read_config(ModelConfig(model_path=str(folder))))
    wanted = LoraConfig(
        **{name: settings[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")}
    )
    inject_adapter_in_model(wanted, model)
    set_peft_model_state_dict(model, load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    for name in settings["target_modules"]:
        layer = model.get_submodule(name)
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight, merged[f"{name}.weight"], atol=1e-5, rtol=1e-5)
        assert not torch.equal(layer.base_layer.weight, base[f"{name}.weight"].float())


def test_an_export_never_replaces_what_it_did_not_write(trained, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        export(["--checkpoint", str(trained), "--output", str(tmp_path / "mine")])
    assert stopped.value.code == 2 and "was not written by this command" in capsys.readouterr().err


# --- in ---------------------------------------------------------------------------------------------------------------


def plain(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A plain Qwen2.5: no second expert, no norms of queries and keys."""
    prefix_length = len("language_model.")
    return {
        prefix + name[prefix_length:]: value
        for name, value in weights.items()
        if name.startswith("language_model.") and not any(part in name for part in ("moe_gen", "q_norm", "k_norm"))
    }


@pytest.mark.parametrize("prefix", ["", "language_model.", "module.language_model."])
def test_a_plain_language_model_is_a_start(tmp_path, prefix, capsys):
    folder = write_released(tmp_path / "plain", plain(released_weights(), prefix))
    state = build_model(read_config(ModelConfig(model_path=str(folder)))).state_dict()
    for name, value in state.items():
        if "moe_gen" in name:
            assert torch.equal(value, state[name.replace("_moe_gen", "")])
        if "q_norm" in name:
            assert torch.equal(value, torch.ones_like(value))
    said = capsys.readouterr().out
    assert "vision tower" in said and "start from random weights" in said


def test_qwen_and_siglip_are_a_start_together(tmp_path, folder):
    weights = released_weights()
    for name, sizes in (("qwen", LANGUAGE), ("siglip", {"vision_config": VISION})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes))
    save_file(plain(weights, ""), tmp_path / "qwen" / "model.safetensors")
    tower = {name.removeprefix("vit_model."): value for name, value in weights.items() if name.startswith("vit_model.")}
    patches = "vision_model.embeddings.patch_embedding.weight"
    conv = tower[patches].unflatten(1, (14, 14, 3)).permute(0, 3, 1, 2).contiguous()
    last = {
        name.replace("layers.1.", "layers.2."): value.clone() for name, value in tower.items() if "layers.1." in name
    }
    extra = {"vision_model.head.probe": torch.zeros(1), "logit_scale": torch.zeros(1)}
    save_file({**tower, **last, patches: conv, **extra}, tmp_path / "siglip" / "model.safetensors")
    paths = {"llm_path": tmp_path / "qwen", "vit_path": tmp_path / "siglip", "vae_path": folder / "ae.safetensors"}
    config = read_config(ModelConfig(**{name: str(path) for name, path in paths.items()}))
    state = build_model(config).state_dict()
    for name, value in weights.items():
        if name.startswith("vit_model."):
            assert torch.equal(state[name], value.float()), name
    assert torch.equal(state["language_model.lm_head.weight"], weights["language_model.lm_head.weight"].float())


def test_fsdp_reads_its_rows_of_the_released_weights(folder, records, tmp_path):
    """The model comes on the meta device and trains as the one that was built whole; what is not just read is built."""
    config = read_config(ModelConfig(model_path=str(folder)))
    model, values = open_released(config)
    built = build_model(config).state_dict()
    assert all(p.is_meta for p in model.parameters()) and model.state_dict().keys() == built.keys()
    assert all(torch.equal(values(name)[...].float(), value) for name, value in built.items())
    assert open_released(config, rows=LANGUAGE["vocab_size"] + 1) is None
    assert open_released(read_config(ModelConfig(model_path=str(folder), use_lora=True))) is None
    losses = {}
    for strategy in ("none", "fsdp"):
        command = f"--model_path {folder} --train_data_path {records} --output_dir {tmp_path / strategy} --no-export"
        main(
            [
                *command.split(),
                *SMALL,
                "--strategy",
                strategy,
                *"--precision fp32 --num-workers 0 --max-steps 2 --logging-steps 1".split(),
            ]
        )
        rows = map(json.loads, (tmp_path / strategy / "metrics.jsonl").read_text().splitlines())
        losses[strategy] = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses["fsdp"] == pytest.approx(losses["none"], rel=1e-5) and len(losses["none"]) == 2


def test_a_part_of_the_released_weights_is_no_start(tmp_path):
    weights = {name: value for name, value in released_weights().items() if "layers.1.mlp.up_proj" not in name}
    folder = write_released(tmp_path / "part", weights)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight is missing"):
        build_model(read_config(ModelConfig(model_path=str(folder))))


def test_shards_and_prefixes_are_read(tmp_path):
    weights = {f"module.{name}": value for name, value in released_weights().items()}
    folder = write_released(tmp_path / "cut", weights)
    (folder / "ema.safetensors").unlink()
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    state = build_model(read_config(ModelConfig(model_path=str(folder)))).state_dict()
    name = "language_model.model.norm.weight"
    assert torch.equal(state[name], weights[f"module.{name}"].float())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        read_config(ModelConfig(model_path=str(folder)))
