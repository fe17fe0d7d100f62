"""Runs: exact resume with samples waiting, workers, ranks, mistakes, the guide's flags, plans."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagel.config import PRESETS, Config
from bagel.data.tokenizer import ByteTokenizer
from bagel.dataset import open_dataset
from bagel.evaluation.validation import held_out_packs
from bagel.modules.transformer import MoTDecoderLayer
from bagel.modules.vision import EncoderLayer
from bagel.objective import parameter_groups, with_latents
from bagel.plan import attention_flops_per_pair, dense_flops_per_token, peak_tflops, reference_flops, utilisation
from bagel.train import main
from bagel.weights.pretrained import load_autoencoder
from shared.config import load_config
from tests.bagel.conftest import SAMPLE, TINY
from tests.bagel.golden import Case, language_config
from tests.bagel.tiny import make_tiny, packs_of
from tests.launching import run


def rows(output: Path) -> list[dict]:
    return [row for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact_with_samples_waiting(tmp_path, workers):
    flags = [*TINY, "--num-workers", str(workers), "--tokens-per-batch", "1024"]
    main([*flags, "--output-dir", str(tmp_path / "whole"), "--max-steps", "6"])
    main([*flags, "--output-dir", str(tmp_path / "parts"), "--max-steps", "3"])
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step_3" / "trainer.json").read_text())["run_state"][
        "stream"
    ]
    assert state["waiting"] and state["cursor"] < 120
    main([*flags, "--output-dir", str(tmp_path / "parts"), "--max-steps", "6"])
    whole, parts = (
        load_file(tmp_path / name / "checkpoints" / "step_6" / "model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [row["train/loss"] for row in rows(tmp_path / "whole")] == [
        row["train/loss"] for row in rows(tmp_path / "parts")
    ]


def test_workers_do_not_change_what_is_learned(tmp_path):
    for workers in (0, 2):
        main([*TINY, "--output-dir", str(tmp_path / str(workers)), "--max-steps", "3", "--num-workers", str(workers)])
    assert [row["train/loss"] for row in rows(tmp_path / "0")] == [row["train/loss"] for row in rows(tmp_path / "2")]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_rank_learns(tmp_path, strategy):
    """Packs of 400 tokens, so that some lack pictures to draw and some lack text to learn."""
    flags = [
        *TINY,
        "--tokens-per-batch",
        "400",
        "--max-sequence-length",
        "400",
        "--max-steps",
        "3",
        "--gradient-accumulation-steps",
    ]
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
    layers = json.loads((tmp_path / "quantization.json").read_text())
    assert len(layers) == 28 and all(0 < layer["max_error"] < 0.05 for layer in layers)


@pytest.mark.parametrize(
    "flags, message",
    [
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
    ],
)
def test_mistakes_end_with_one_sentence(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--output-dir", str(tmp_path), "--device", "cpu", *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


GUIDE_FLAGS = """
--model_path m --train_data_path t --val_data_path v --output_dir o --batch_size 2 --num_epochs 3 --max_steps
9 --gradient_accumulation_steps 8 --learning_rate 2e-5 --lr_scheduler_type linear --warmup_ratio 0.1
--text_loss_weight 0.5 --image_loss_weight 1 --bf16 --wandb_project p --wandb_run_name r
--resume_from_checkpoint c --save_steps 5 --save_total_limit 3 --eval_steps 5 --logging_steps 5
--max_sequence_length 512 --num_workers 1 --gradient_checkpointing --torch_compile --ema_decay 0.99
--timestep_shift 4 --text_cond_dropout_prob 0.1 --vit_cond_dropout_prob 0.2 --vae_cond_dropout_prob 0.3
--freeze_vit --max_latent_size 32 --seed 7 --metric_for_best val/text_loss --deepspeed d.json
"""


def test_the_guides_flags_are_accepted():
    config = load_config(Config, presets=PRESETS, default="7b", argv=GUIDE_FLAGS.split())
    run, training = config.run, config.training
    assert (run.precision, run.resume, training.keep_last, training.compile) == ("bf16", "c", 3, True)


def test_the_vision_tower_may_have_a_decay_of_its_own():
    config, model = make_tiny()
    for vision, expected in ((0.25, 0.25), (None, 2.0)):
        training = config.training.model_copy(update=dict(weight_decay=2.0, vision_weight_decay=vision))
        groups = parameter_groups(model, training)
        names = [name for group in groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, value in model.named_parameters() if value.requires_grad)
        decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
        assert (
            decay["vit_model.vision_model.encoder.layers.0.mlp.fc1.weight"] == decay["connector.fc2.weight"] == expected
        )
        assert decay["language_model.lm_head.weight"] == 2.0 and decay["connector.fc2.bias"] == 0.0


@pytest.mark.slow
def test_packs_of_new_lengths_need_no_new_graph():
    """Compiled layers serve every length with the graphs of the first pack; of validation, too."""
    config, model = make_tiny()
    dataset = open_dataset(config, config.model, ByteTokenizer(), str(SAMPLE))
    autoencoder = load_autoencoder(config.model)
    groups = [[0, 1, 2], [3, 4, 5, 6], [7], [10, 11, 12]]
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(assume_static_by_default=False):
        for module in model.modules():
            if isinstance(module, (MoTDecoderLayer, EncoderLayer)):
                module.compile(backend=note)
        counts = []
        for pack in packs_of(config, groups):
            losses = model(pack)
            (losses["ce"].sum() + losses["mse"].sum()).backward()
            counts.append(len(graphs))
        held_out = []
        with torch.no_grad():
            for pack in held_out_packs(dataset, 8, 1024, 1.0):
                model(with_latents(pack, autoencoder, config.model))
                held_out.append(len(graphs))
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[-1] < 12 and len(held_out) > 2 and held_out[0] == held_out[-1] < 24, (
        counts,
        held_out,
    )


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS.glob("*.yaml")])
def test_every_preset_is_valid(preset):
    config = load_config(Config, presets=PRESETS, argv=["--config", preset], default="small")
    assert config.data.max_sequence_length <= config.data.tokens_per_batch


@pytest.mark.parametrize(
    ("preset", "parameters"), [("small", "1,126,784 (1,123,712"), ("small_captions", "3,789,040 (3,764,464")]
)
def test_the_plan_of_the_small_presets(preset, parameters, capsys):
    """`small` puts samples of about one length side by side, which fake tensors must be able to follow."""
    main(["--config", preset, "--dry-run", "--set", "data.tokens_per_batch=512"])
    text = capsys.readouterr().out
    assert f"{parameters} trainable" in text and "memory a rank" in text


def test_dense_masks_are_planned_too(capsys):
    main(["--config", "small", "--dry-run", "--set", "data.tokens_per_batch=512"])
    assert "memory a rank" in capsys.readouterr().out


def test_flops_equal_the_recorded_ones():
    for row in Case("mfu_1").info["rows"]:
        config = language_config(row["config"])
        assert dense_flops_per_token(config) == pytest.approx(row["dense_token_factor"], rel=1e-9)
        assert attention_flops_per_pair(config) == pytest.approx(row["attn_factor"], rel=1e-9)
        flops = reference_flops(config, row["sample_lens"])
        assert flops == pytest.approx(row["flops"], rel=1e-9)
        assert utilisation(flops, row["elapsed_s"], row["peak_tflops"], row["world_size"]) == pytest.approx(
            row["mfu"], rel=1e-9
        )
    assert (peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA H20"), peak_tflops("NVIDIA L20"), peak_tflops("?")) == (
        989.0,
        148.0,
        119.5,
        None,
    )
