"""The objective over micro-packs and ranks, exact resume with samples waiting, adapters, quantization, folders, the commands."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from bagel.config import PRESETS, Config, TrainingConfig
from bagel.dataset import make_collate
from bagel.flops import attention_flops_per_pair, dense_flops_per_token, peak_tflops, reference_flops, utilisation
from bagel.layout import layout_of, transforms_of
from bagel.lora import adapters, add_adapters, merge_adapters
from bagel.model import Bagel
from bagel.objective import joint_losses, with_latents
from bagel.packing import Dropout
from bagel.pretrained import build_model, export_folder, load_autoencoder, read_config
from bagel.quantization import QuantizedLinear, error_table, quantize_projections
from bagel.tokenizer import ByteTokenizer
from bagel.train import main
from bagel.vae import FluxAutoencoder
from shared.config import load_config
from shared.errors import UserError
from tests.bagel.conftest import TINY
from tests.bagel.golden import Case, language_config
from tests.launching import run

SAMPLE = Path(__file__).resolve().parents[2] / "bagel" / "sample_data" / "train.jsonl"


@pytest.fixture(scope="module")
def tiny() -> tuple[Config, Bagel]:
    """The small preset with a tiny model; the output head is random so that every weight gets a gradient."""
    config = load_config(Config, presets=PRESETS, argv=[*TINY], default="small")
    torch.manual_seed(0)
    model = build_model(config.model)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return config, model


def packs_of(config: Config, groups: list[list[int]]) -> list[dict]:
    """Packs of these training records, ready for the model."""
    from bagel.train import open_dataset
    dataset = open_dataset(config, config.model, ByteTokenizer(), str(SAMPLE))
    collate, autoencoder = make_collate(dataset.layout, Dropout(0.3, 0.3, 0.3), 1), load_autoencoder(config.model)
    return [with_latents(collate([dataset.sample(index, 0) for index in group]), autoencoder, config.model) for group in groups]


def gradients(model: Bagel, packs: list[dict], training: TrainingConfig) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for loss, _ in joint_losses(model, packs, training, 1):
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reweighting", [False, True])
def test_micro_packs_give_the_gradient_of_one_pack(tiny, reweighting):
    """Record 2 answers about a picture (text to learn, no latents), record 0 draws (no text), 3 does both: unequal counts."""
    config, model = tiny
    training = TrainingConfig(text_loss_weight=0.25, ce_loss_reweighting=reweighting)
    whole = gradients(model, packs_of(config, [[0, 2, 3, 4, 6]]), training)
    parts = gradients(model, packs_of(config, [[2, 6], [], [0], [3, 4]]), training)
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    assert whole[1].keys() == parts[1].keys()
    for name, gradient in whole[1].items():
        assert_close(parts[1][name], gradient, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    other = gradients(model, packs_of(config, [[2, 6], [], [0], [3, 4]]), training.model_copy(update={"loss_normalization": "micro"}))
    assert abs(other[0] - whole[0]) > 1e-3


def test_a_step_without_text_or_pictures_counts_zero_not_nan(tiny):
    config, model = tiny
    for group in ([0], [2], []):
        loss, grads = gradients(model, packs_of(config, [group]), TrainingConfig())
        assert math.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads.values())


def test_freezing_the_understanding_side_leaves_it_without_gradients(tiny):
    config, _ = tiny
    torch.manual_seed(0)
    model = build_model(config.model.model_copy(update={"freeze_und": True}))
    gradients(model, packs_of(config, [[0, 2, 3]]), TrainingConfig())
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    outside = {name.split(".")[0] if "lm_head" not in name else "lm_head" for name in trained if "_moe_gen" not in name}
    assert outside == {"lm_head", "time_embedder", "vae2llm", "llm2vae"}


def test_pictures_padded_together_differ_only_when_asked(tiny):
    config = tiny[0].model.model_copy(deep=True)
    config.autoencoder = config.autoencoder.model_copy(update=dict(kind="flux", ch=32, ch_mult=[1, 1], z_channels=4, downsample=2, num_res_blocks=1))
    torch.manual_seed(0)
    autoencoder = FluxAutoencoder(config.autoencoder).requires_grad_(False)
    images = [torch.rand(3, 8, 8), torch.rand(3, 16, 8), torch.rand(3, 8, 8)]
    pack = {"vae_images": images, "packed_noise": torch.zeros(0, 16), "patchified_vae_latent_shapes": [[2, 2], [4, 2], [2, 2]],
            "posterior_noise": [torch.randn(4, 4, 4), torch.randn(4, 8, 4), torch.randn(4, 4, 4)]}
    single = with_latents(pack, autoencoder, config)["packed_latents"]
    together = with_latents(pack, autoencoder, config, together=True)["packed_latents"]
    alone = with_latents({**pack, "vae_images": images[1:2], "posterior_noise": pack["posterior_noise"][1:2],
                          "patchified_vae_latent_shapes": [[4, 2]]}, autoencoder, config)["packed_latents"]
    assert single.shape == together.shape == (16, 16)
    assert_close(single[4:12], alone, atol=1e-5, rtol=1e-5)
    assert_close(single[4:12], together[4:12], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(single[:4], together[:4])


# --- runs -------------------------------------------------------------------------------------------------------------

def rows(output: Path) -> list[dict]:
    return [row for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact_with_samples_waiting(tmp_path, workers):
    flags = [*TINY, "--num-workers", str(workers), "--tokens-per-batch", "1024"]
    main([*flags, "--output-dir", str(tmp_path / "whole"), "--max-steps", "6"])
    main([*flags, "--output-dir", str(tmp_path / "parts"), "--max-steps", "3"])
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step_3" / "trainer.json").read_text())["run_state"]["stream"]
    assert state["waiting"] and state["cursor"] < 120
    main([*flags, "--output-dir", str(tmp_path / "parts"), "--max-steps", "6"])
    whole, parts = (load_file(tmp_path / name / "checkpoints" / "step_6" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [row["train/loss"] for row in rows(tmp_path / "whole")] == [row["train/loss"] for row in rows(tmp_path / "parts")]


def test_workers_do_not_change_what_is_learned(tmp_path):
    for workers in (0, 2):
        main([*TINY, "--output-dir", str(tmp_path / str(workers)), "--max-steps", "3", "--num-workers", str(workers)])
    assert [row["train/loss"] for row in rows(tmp_path / "0")] == [row["train/loss"] for row in rows(tmp_path / "2")]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_rank_learns(tmp_path, strategy):
    """Packs of 400 tokens, so that some lack pictures to draw and some lack text to learn."""
    flags = [*TINY, "--tokens-per-batch", "400", "--max-sequence-length", "400", "--max-steps", "3", "--gradient-accumulation-steps"]
    main([*flags, "2", "--output-dir", str(tmp_path / "one")])
    run(2, "bagel/train.py", *flags, "1", "--output-dir", str(tmp_path / "two"), "--strategy", strategy)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-6 if one["step"] == 1 else 2e-5)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)


def test_adapters_train_alone_and_resume(tmp_path):
    flags = [*TINY, "--use-lora", "--lora-rank", "2", "--quantization", "nf4", "--output-dir", str(tmp_path)]
    main([*flags, "--max-steps", "1"])
    main([*flags, "--max-steps", "2"])
    folder = tmp_path / "checkpoints" / "step_2"
    saved = load_file(folder / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert set(load_file(folder / "adapter.safetensors")) == set(saved)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_rank"] == 2


# --- adapters, quantization, folders ----------------------------------------------------------------------------------

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


def test_one_expert_can_be_adapted_alone(tiny):
    config, model = tiny[0].model.model_copy(update={"lora_target": "gen"}), copy.deepcopy(tiny[1])
    assert add_adapters(model, config) == 2 * 7
    assert all("_moe_gen" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind, bound, share", [("nf4", 0.11, 0.5625), ("int8", 0.01, 1.1)])
def test_quantized_projections(tiny, kind, bound, share):
    model = copy.deepcopy(tiny[1])
    table = error_table(model, kind)
    assert len(table) == 2 * 2 * 7 and all(row["relative_error"] < bound for row in table)
    assert all(row["bytes_stored"] <= row["bytes_bf16"] / 2 * share + 256 for row in table)
    torch.manual_seed(1)
    linear = torch.nn.Linear(100, 30)
    stored = QuantizedLinear.of(linear, kind)
    x = torch.randn(5, 100, requires_grad=True)
    stored(x).sum().backward()
    assert_close(x.grad, stored.weight_as(torch.float32).sum(0).expand(5, 100))
    assert (stored(x) - linear(x)).abs().max() < 0.2
    quantize_projections(model, kind)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 28
    assert isinstance(model.language_model.lm_head, torch.nn.Linear)


def test_nf4_keeps_its_own_levels_exactly():
    from bagel.quantization import NF4_LEVELS, dequantize_nf4, quantize_nf4
    weight = torch.tensor(NF4_LEVELS).repeat(8).view(2, 64) * 0.3
    assert_close(dequantize_nf4(*quantize_nf4(weight), (2, 64), torch.float32), weight)


def folder_of(tiny, path: Path) -> Path:
    """A folder of released form with a FLUX autoencoder."""
    config, model = tiny[0].model.model_copy(deep=True), tiny[1]
    config.autoencoder = config.autoencoder.model_copy(update=dict(kind="flux", ch=32, ch_mult=[1, 1], z_channels=12, downsample=2,
                                                                   num_res_blocks=1, scale_factor=0.3611, shift_factor=0.1159))
    export_folder(path, config, model.state_dict(), FluxAutoencoder(config.autoencoder))
    return path


def test_a_released_folder_loads_without_its_tables(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "model")
    (folder / "bagel_config.json").unlink()      # the released folder has none
    config = load_config(Config, presets=PRESETS, argv=["--model_path", str(folder), "--tokenizer", "bytes", "--max-latent-size", "4"],
                         default="7b")
    resolved = read_config(config.model)
    assert (resolved.autoencoder.ch_mult, resolved.autoencoder.z_channels, resolved.vision.num_hidden_layers) == ([1, 1], 12, 1)
    model = build_model(resolved)
    assert model.latent_pos_embed.pos_embed.shape[0] == 16
    for name, value in tiny[1].state_dict().items():
        if "pos_embed" not in name:
            assert torch.equal(model.state_dict()[name], value)
    load_autoencoder(resolved)
    assert layout_of(resolved, ByteTokenizer()).latent_stride == 4 and transforms_of(config.data, resolved)[0].stride == 4


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
    cases = [("llm_config.json", "llm_config.json"), ("vit_config.json", "vit_config.json"), ("ae.safetensors", "ae.safetensors"),
             ("ema.safetensors", "ema.safetensors")]
    for name, message in cases:
        moved = (folder / name).rename(tmp_path / name)
        with pytest.raises(SystemExit) as stopped:
            main(["--config", "7b_lora", "--model_path", str(folder), "--train_data_path", str(SAMPLE), "--output-dir", str(tmp_path / "out"),
                  "--strategy", "none", "--device", "cpu"])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        moved.rename(folder / name)
    language = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**language, "intermediate_size": 64}))
    from bagel.config import ModelConfig
    with pytest.raises(UserError, match=r"gate_proj.weight has shape \(48, 32\), expected \(64, 32\)"):
        build_model(read_config(ModelConfig(model_path=str(folder))))


@pytest.mark.parametrize("flags, message", [
    (["--model_path", "nowhere"], "no such folder"),
    (["--config", "7b"], "no data"),
    (["--train_data_path", "none.jsonl"], "no such record file"),
    (["--fp16", "--bf16"], "exclude each other"),
    (["--fp16"], "needs CUDA"),
    (["--quantization", "nf4"], "add --use-lora"),
    (["--max-sequence-length", "5000"], "above tokens_per_batch"),
    (["--text-loss-weight", "0", "--image-loss-weight", "0"], "nothing would be learned"),
    (["--deepspeed", "none.json"], "no such file"),
    (["--no-such-flag", "1"], "no-such-flag"),
])
def test_mistakes_end_with_one_sentence(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--output-dir", str(tmp_path), "--device", "cpu", *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_guides_flags_are_accepted():
    config = load_config(Config, presets=PRESETS, default="7b", argv=[
        "--model_path", "m", "--train_data_path", "t", "--val_data_path", "v", "--output_dir", "o", "--batch_size", "2",
        "--gradient_accumulation_steps", "8", "--num_epochs", "3", "--max_steps", "9", "--learning_rate", "2e-5", "--lr_scheduler_type", "linear",
        "--warmup_ratio", "0.1", "--text_loss_weight", "0.5", "--image_loss_weight", "1", "--bf16", "--wandb_project", "p", "--wandb_run_name",
        "r", "--resume_from_checkpoint", "c", "--save_steps", "5", "--save_total_limit", "3", "--eval_steps", "5", "--logging_steps", "5",
        "--max_sequence_length", "512", "--num_workers", "1", "--gradient_checkpointing", "--torch_compile", "--ema_decay", "0.99",
        "--timestep_shift", "4", "--text_cond_dropout_prob", "0.1", "--vit_cond_dropout_prob", "0.2", "--vae_cond_dropout_prob", "0.3",
        "--freeze_vit", "--max_latent_size", "32", "--seed", "7", "--metric_for_best", "val/text_loss", "--deepspeed", "d.json"])
    assert (config.run.precision, config.run.resume, config.training.keep_last, config.training.compile) == ("bf16", "c", 3, True)


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS.glob("*.yaml")])
def test_every_preset_is_valid(preset):
    config = load_config(Config, presets=PRESETS, argv=["--config", preset], default="small")
    assert config.data.max_sequence_length <= config.data.tokens_per_batch


def test_the_plan_of_the_small_preset(capsys):
    main(["--config", "small", "--dry-run", "--set", "data.tokens_per_batch=512"])
    text = capsys.readouterr().out
    assert "3,789,040 (3,764,464 trainable" in text and "memory a rank" in text


def test_flops_equal_the_recorded_ones():
    for row in Case("mfu_1").info["rows"]:
        config = language_config(row["config"])
        assert dense_flops_per_token(config) == pytest.approx(row["dense_token_factor"], rel=1e-9)
        assert attention_flops_per_pair(config) == pytest.approx(row["attn_factor"], rel=1e-9)
        flops = reference_flops(config, row["sample_lens"])
        assert flops == pytest.approx(row["flops"], rel=1e-9)
        assert utilisation(flops, row["elapsed_s"], row["peak_tflops"], row["world_size"]) == pytest.approx(row["mfu"], rel=1e-9)
    assert (peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA H20"), peak_tflops("NVIDIA L20"), peak_tflops("?")) == (989.0, 148.0, 119.5, None)
