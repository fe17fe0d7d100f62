"""Whole runs of seconds: train, resume, generate, evaluate, precompute, and the guide's checkpoint file."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opens2v import generate, metrics, precompute, train
from opens2v.config import Config
from opens2v.data.video import read_frames
from opens2v.model import is_reference_name
from opens2v.plan import workload
from opens2v.weights.base import base_path, load_generator, new_transformer
from opens2v.weights.open import load_trained_generator
from shared.config import load_saved
from shared.engine.parallel import _OnDisk
from shared.errors import UserError
from tests.launching import final_tensors, losses, run, same_bits
from tests.opens2v.cases import QUICK, SCENES
from tests.survival.sharded import Peak

LORA = ["--adapter-type", "lora", "--r", "2", "--lora-alpha", "2", "--adapter-lr", "1e-3"]
STEPS = ["--base-steps", "2", "--total-steps", "4", "--warmup-steps", "0"]


def arguments(folder, *more) -> list[str]:
    return [*QUICK, *STEPS, "--output-dir", str(folder), *map(str, more)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of four steps with LoRA."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train.main(arguments(folder, *LORA))
    return folder


def test_run_folder_holds_what_is_promised(run_folder):
    for name in (
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "DONE",
        "base/generator.safetensors",
        "base/codec.safetensors",
    ):
        assert (run_folder / name).exists(), name
    assert (run_folder / "checkpoints/checkpoint_opens2v_000004/model.pt").exists()
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    row = rows[-2] if "val/gap" in rows[-1] else rows[-1]
    assert {"train/loss", "train/grad_norm", "train/lr", "train/gate_clip", "train/v_vae_norm"} <= set().union(*rows), (
        row
    )
    assert {"val/loss", "val/loss_none", "val/loss_other", "val/gap"} <= set().union(*rows)
    assert list((run_folder / "samples").glob("step_000004_0.mp4"))


def test_the_same_command_again_does_nothing_more(run_folder):
    before = (run_folder / "metrics.jsonl").read_text()
    train.main(arguments(run_folder, *LORA))
    assert losses(run_folder).keys() == {1, 2, 3, 4} and (run_folder / "metrics.jsonl").read_text().startswith(
        before[:200]
    )


def test_guide_checkpoint_loads_with_strict_false(run_folder):
    state = torch.load(run_folder / "checkpoints/checkpoint_opens2v_000004/model.pt", weights_only=True)
    assert state["step"] == 4 and state["format"] == "opens2v-1" and state["ref_config"]["clip_path"] == "shared"
    assert all(is_reference_name(name) for name in state["generator"]) and all(
        v.dtype == torch.float32 for v in state["generator"].values()
    )
    assert state["generator"].keys() == state["generator_ema"].keys()
    assert state["generator_lora"] and all(
        name.endswith(("lora_A.weight", "lora_B.weight")) for name in state["generator_lora"]
    )
    config = load_saved(Config, run_folder / "config.yaml")
    model, _ = load_generator(config, base_path(config))
    missing, unexpected = model.load_state_dict(state["generator"], strict=False)
    assert not unexpected and not any(is_reference_name(name) for name in missing)
    for use_ema, suffix in ((True, "_ema"), (False, "")):
        path = run_folder / "checkpoints/checkpoint_opens2v_000004"
        from_file, from_folder = (
            load_trained_generator(item, use_ema=use_ema)[0] for item in (path / "model.pt", path)
        )
        assert torch.equal(from_file.vae_proj.weight, state[f"generator{suffix}"]["vae_proj.weight"])
        assert same_bits(dict(from_file.state_dict()), dict(from_folder.state_dict()))


def test_base_is_bit_unchanged_and_all_trainable_tensors_moved(run_folder):
    config = load_saved(Config, run_folder / "config.yaml")
    fresh, _ = load_generator(config, base_path(config))
    trained = load_file(run_folder / "checkpoints/checkpoint_opens2v_000004/model.safetensors")
    names = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert names == trained.keys()
    own = dict(fresh.named_parameters())
    assert not [name for name in names if torch.equal(own[name], trained[name])]
    base = load_file(base_path(config))
    frozen = {name.replace(".base_layer.", "."): value for name, value in own.items() if name not in names}
    assert base.keys() == frozen.keys() and all(torch.equal(base[name], frozen[name]) for name in base)


def test_resume_is_bit_exact_and_passes_over_a_damaged_checkpoint(run_folder, tmp_path):
    folder = tmp_path / "out"
    train.main(arguments(folder, *LORA, "--max-steps", "2", "--save-steps", "1"))
    newest = folder / "checkpoints/checkpoint_opens2v_000002/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    train.main(arguments(folder, *LORA))
    assert "passed over" in (folder / "train.log").read_text()
    assert losses(folder) == losses(run_folder)
    assert same_bits(final_tensors(folder), final_tensors(run_folder))


def test_a_run_without_checkpoints_and_a_seed_that_is_drawn(tmp_path, capsys):
    train.main(
        arguments(
            tmp_path / "a", "--seed", "0", "--no_save", "--no_visualize", "--max-steps", "1", "--generator-ckpt", "none"
        )
    )
    assert "(drawn)" in capsys.readouterr().out
    assert (
        not list((tmp_path / "a" / "checkpoints").glob("*"))
        and load_saved(Config, tmp_path / "a" / "config.yaml").run.seed > 0
    )


@pytest.mark.parametrize(
    "options", [["--guidance", "dual"], ["--guidance", "text", "--sampler", "euler", "--lora-scale", "0.5"]]
)
def test_generate_writes_a_video_its_first_frame_and_settings(run_folder, tmp_path, options):
    crops = sorted((train.SAMPLE_DATA / "subject_crops/dataset1").glob("*.png"))
    out = tmp_path / "made.mp4"
    prompt = ["--prompt", "A subject moves.", "--ref-image", str(crops[0]), "--rembg", "white", "--steps", "2"]
    generate.main(["--checkpoint", str(run_folder), *prompt, "--output", str(out), *options])
    assert read_frames(out, [0, 4]).shape == (2, 16, 32, 3) and out.with_suffix(".png").exists()
    assert json.loads(out.with_suffix(".json").read_text())["prompt"] == "A subject moves."
    if options[1] == "dual":
        lines = [{"prompt": "x", "ref_image": str(crops[1]), "output": "b.mp4"}, {"prompt": "y"}]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
        made = generate.main(
            [
                "--checkpoint",
                str(run_folder),
                "--prompt-file",
                str(tmp_path / "list.jsonl"),
                "--output-dir",
                str(tmp_path / "many"),
                "--steps",
                "1",
            ]
        )
        assert [path.name for path in made] == ["b.mp4", "0002.mp4"] and all(path.exists() for path in made)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-frames", "20"], "4k \\+ 1 frames"),
        (["--height", "100"], "not a multiple of 16"),
        (["--ref-image", "nowhere.png", "--prompt", "x"], "nowhere.png: not found"),
        (["--ref-image", "a.png"], "without --prompt"),
        (["--prompt-file", "nowhere.jsonl"], "not found"),
    ],
)
def test_generate_refuses_what_it_cannot_do(run_folder, options, message):
    with pytest.raises(SystemExit) as end:
        generate.main(["--checkpoint", str(run_folder), "--output", "never.mp4", *options])
    assert end.value.code == 2
    with pytest.raises(UserError, match=message):
        generate.main.__wrapped__(["--checkpoint", str(run_folder), "--output", "never.mp4", *options])


def test_metrics_and_report(run_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved)
    figures = metrics.main(
        [
            "--checkpoint",
            str(moved),
            "--output",
            str(moved / "metrics.json"),
            "--windows",
            "1",
            "--seeds",
            "1",
            "--max-clips",
            "4",
            "--others",
            "1",
            "--steps",
            "1",
        ]
    )
    for name in (
        "seen_subject_below_other_percent",
        "seen_autocorrelation",
        "unseen_subject_win_percent",
        "x0_error_sigma_0.5",
    ):
        assert np.isfinite(figures[name]), name
    assert json.loads((moved / "metrics.json").read_text())["seen_subject_true"] == figures["seen_subject_true"]
    report = json.loads((moved / "report.json").read_text())
    assert len(report["bars"]) >= 8 and all((moved / sample["path"]).exists() for sample in report["samples"])
    assert "<video" in (moved / "report.html").read_text()


def test_benchmark_videos_carry_their_ids(run_folder, tmp_path):
    crop = sorted((train.SAMPLE_DATA / "subject_crops/dataset1").glob("*.png"))[0]
    entries = {"singleobj_1": {"prompt": "a", "img_paths": [str(crop)], "class_label": ["x"]}}
    (tmp_path / "eval.json").write_text(json.dumps(entries))
    made = metrics.main(
        [
            "--checkpoint",
            str(run_folder),
            "--eval-json",
            str(tmp_path / "eval.json"),
            "--output-dir",
            str(tmp_path / "videos"),
            "--steps",
            "1",
        ]
    )
    assert [path.name for path in made] == ["singleobj_1.mp4"] and made[0].exists()


def test_cached_features_train_and_other_settings_are_refused(run_folder, tmp_path):
    base = str(run_folder / "base/generator.safetensors")
    cache = [
        "--cache-dir",
        str(tmp_path / "cache"),
        "--generator-ckpt",
        base,
        "--recolour-probability",
        "0",
        "--other-scene-probability",
        "0",
        "--generic-caption-probability",
        "0",
    ]
    command = arguments(tmp_path / "out", *cache)
    assert precompute.main([*command, "--what", "text,clip,vae", "--cache-variants", "2"]) == {
        "stored": 8,
        "present": 0,
        "bad": 0,
    }
    assert precompute.main([*command, "--what", "text,clip,vae", "--cache-variants", "2"])["present"] == 8
    use = ["--use-cached-text", "--use-cached-latents", "--use-cached-clip", "--max-steps", "2"]
    train.main([*command, *use])
    assert losses(tmp_path / "out").keys() == {1, 2}
    with pytest.raises(UserError, match="made with other settings"):
        train.main.__wrapped__([*arguments(tmp_path / "b", *cache), *use, "--sample-stride", "2"])


def test_causal_teacher_forced_run(tmp_path, run_folder):
    base = ["--generator-ckpt", str(run_folder / "base/generator.safetensors")]
    causal = [
        "--causal",
        "--num-training-frames",
        "9",
        "--num-frame-per-block",
        "2",
        "--independent-first-frame",
        "--teacher-forcing",
        "--noise-augmentation-max-timestep",
        "50",
        "--max-steps",
        "1",
        "--train-fused-path",
        "--gradient-checkpointing",
    ]
    train.main(arguments(tmp_path / "out", *base, *causal))
    assert np.isfinite(losses(tmp_path / "out")[1])


def test_plan_of_a_small_preset():
    config = train.parse([*QUICK, "--batch-size", "2"])
    plan = workload(config).plan(config)
    assert plan.measured.forward_flops > 0 and plan.measured.trainable > 0 and not plan.frozen_parts


@pytest.mark.slow
def test_the_24_gb_preset_fits_and_its_work_agrees_with_the_table():
    config = train.parse(["--config", "default"])
    plan = workload(config).plan(config)
    assert plan.measured.trainable == 143_689_758 and plan.peak_memory < 24e9
    assert plan.measured.forward_flops == pytest.approx(42.8e12, rel=0.03)  # 40.6 base + 0.4 CLIP + 1.8 VAE path
    assert plan.measured.step_flops == pytest.approx(147e12, rel=0.03)


@pytest.mark.parametrize(("form", "precision"), [("safetensors", "bf16"), ("pt", "bf16"), ("pt", "fp32")])
def test_rank_0_holds_no_base_while_it_builds_the_model(tmp_path, form, precision):
    """Read from pages of its file and cast on the disk: one weight at a time is held (half of all or all before)."""
    sizes = "--num-attention-heads 16 --attention-head-dim 64 --ffn-dim 2048 --num-layers 6 --base-dtype bf16"
    config, path = train.parse([*SCENES, *sizes.split()]), tmp_path / f"base.{form}"
    state = {name: value for name, value in new_transformer(config).state_dict().items() if not is_reference_name(name)}
    save_file(state, path) if form == "safetensors" else torch.save({"generator": state}, path)
    size = sum(value.nbytes for value in state.values())
    del state
    plain = load_generator(config, path, precision=precision)[0].state_dict()  # also imports what takes memory
    with Peak() as peak, _OnDisk(tmp_path):
        model, _ = load_generator(config, path, precision=precision)
    assert peak.peak < size / 8
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.distributed
def test_strategies_on_two_ranks_train_like_one(tmp_path, run_folder):
    base = str(run_folder / "base/generator.safetensors")
    strategies = ("ddp", "fsdp", "zero2", "zero3")
    run(2, "tests/opens2v/ranks.py", str(tmp_path), base, *strategies)
    run(1, "tests/opens2v/ranks.py", str(tmp_path), base, "none")
    expected = losses(tmp_path / "none")
    for name in strategies:
        found = losses(tmp_path / name)
        assert found.keys() == expected.keys() == {1, 2}
        assert all(found[step] == pytest.approx(expected[step], rel=2e-6) for step in expected), name
