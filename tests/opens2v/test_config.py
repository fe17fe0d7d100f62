"""The guide's YAML and flags, the presets, and every setting that is refused before anything is loaded."""

import subprocess
import sys

import pytest
import yaml

from opens2v.config import PRESETS, Config, latent_frames, pixel_frames
from opens2v.precompute import shard_of
from opens2v.train import check_inputs, guide_arguments, parse
from shared.config import load_saved, save_config
from shared.errors import UserError
from tests.launching import ROOT

GUIDE = {
    "opens2v": {
        "json_paths": ["a.json"],
        "video_base_paths": ["v"],
        "background_base_paths": ["b"],
        "sample_stride": 3,
        "max_subjects_per_sample": 1,
        "subject_selection": "best_score",
        "cross_frames_cluster_path": None,
    },
    "is_cross_frame": False,
    "generator_ckpt": "wan.pt",
    "num_training_frames": 21,
    "pixel_height": 480,
    "pixel_width": 832,
    "lr": 1.0e-4,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "max_iters": 10000,
    "log_iters": 500,
    "batch_size": 1,
    "train_fused_path": False,
    "mixed_precision": True,
    "distributed": "fsdp",
    "fsdp_cpu_offload": True,
    "ema_weight": 0.99,
    "adapter": {"type": "lora", "rank": 32, "alpha": 16, "dropout": 0.1, "lr": 5.0e-5},
    "max_checkpoints": 0,
    "val_interval": 0,
    "wandb_project": None,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": 1.0e-8,
    "lr_scheduler": "constant",
    "print_iters": 7,
}


def guide_file(tmp_path, **changes):
    path = tmp_path / "train_opens2v.yaml"
    path.write_text(yaml.safe_dump({**GUIDE, **changes}))
    return path


def test_guide_keys_reach_their_sections(tmp_path):
    config = parse(["--config_path", str(guide_file(tmp_path)), "--logdir", str(tmp_path / "run")])
    assert (config.training.learning_rate, config.training.total_steps, config.training.save_steps) == (
        1e-4,
        10000,
        500,
    )
    assert config.run.strategy == "fsdp" and config.run.cpu_offload and config.run.precision == "bf16"
    assert config.run.output_dir == str(tmp_path / "run") and config.run.resume == "auto"
    adapter = config.adapter
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.adapter_lr) == (32, 16, 0.1, 5e-5)
    assert config.data.subject_selection == "best_score" and config.model.generator_ckpt == "wan.pt"
    assert (
        config.training.keep_last >= 1_000_000
        and config.training.eval_steps is None
        and config.training.ema_decay == 0.99
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(Config, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("preset", ["small", "80gb"])
def test_keys_of_the_guide_are_taken_on_the_command_line_as_well(preset):
    words = ["adapter=null", "distributed=fsdp", "mixed_precision=true", "max_checkpoints=1"]
    config = parse(["--config", preset, *(word for one in words for word in ("--set", one))])
    assert config.adapter is None and config.run.strategy == "fsdp" and config.run.precision == "bf16"
    assert config.training.keep_last == 1


def test_guide_flags(tmp_path):
    flags = [
        "--no-auto-resume",
        "--no_save",
        "--no_visualize",
        "--disable-wandb",
        "--max_iters",
        "9",
        "--device",
        "cpu",
        "--set",
        "lr=5e-5",
        "opens2v.sample_stride=2",
        "--set",
        "training.beta2=0.9",
    ]
    config = parse(["--config_path", str(guide_file(tmp_path)), *flags])
    assert (
        config.run.resume == "none" and not config.training.save and not config.run.visualize and not config.run.wandb
    )
    assert config.training.total_steps == 9 and config.training.learning_rate == 5e-5 and config.data.sample_stride == 2
    assert guide_arguments(["--set", "a=1", "opens2v.b=2", "--x", "y"]) == [
        "--set",
        "a=1",
        "--set",
        "data.b=2",
        "--x",
        "y",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_iter": 5}, "max_iter: unknown setting; did you mean max_iters"),
        ({"opens2v": {"json_path": ["a"]}}, "did you mean json_paths"),
        ({"num_training_frames": 20}, "4k \\+ 1 frames and drops the last 3 silently; use 17 or 21"),
        ({"num_training_frames": 13, "causal": True}, "gives 4 latent frames, which causal blocks of 3 do not fill"),
        ({"teacher_forcing": True}, "teacher_forcing needs causal"),
        ({"pixel_height": 470}, "pixel_height 470 is not a multiple of 16; use 464 or 480"),
        ({"patch_size": 3}, "pixel_width 832 is not a multiple of 48; use 816 or 864"),
        ({"ref_in_self_attention": True, "opens2v": {"ref_height": 248}}, "ref_height 248 is not a multiple of 16"),
        ({"num_attention_heads": 3, "attention_head_dim": 10}, "all together one divisible by 4"),
        ({"num_attention_heads": 4, "attention_head_dim": 7}, "heads need an even width"),
        ({"opens2v": {"json_paths": ["a", "b"], "video_base_paths": ["v"]}}, "they have 2, 1 and 0 entries"),
        ({"p_drop_text": 0.6, "p_drop_ref": 0.6}, "exceeds 1"),
        ({"use_cached_text": True}, "use_cached_text needs cache_dir"),
        ({"wandb_key": "secret"}, "WANDB_API_KEY"),
        ({"opens2v": {"subject_selection": "last"}}, "subject_selection"),
        ({"val_prompts": ["a", "b"], "val_ref_images": ["c"]}, "one picture per prompt"),
        ({"denoising_loss_type": "x0"}, "denoising_loss_type"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        parse(["--config_path", str(guide_file(tmp_path, **change))])


def test_frames_in_pixels_and_latents(tmp_path):
    for frames, unit, pixels, latents in (
        (21, "pixel", 21, 6),
        (21, "latent", 81, 21),
        (13, "pixel", 13, 4),
        (49, "pixel", 49, 13),
    ):
        config = parse(
            ["--config_path", str(guide_file(tmp_path, num_training_frames=frames, num_training_frames_unit=unit))]
        )
        assert (pixel_frames(config), latent_frames(config)) == (pixels, latents)
    independent = {"num_training_frames": 13, "causal": True, "independent_first_frame": True}
    assert latent_frames(parse(["--config_path", str(guide_file(tmp_path, **independent))])) == 4


def test_missing_weights_are_named_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="generator_ckpt wan.pt: not found"):
        check_inputs(parse(["--config_path", str(guide_file(tmp_path))]))
    with pytest.raises(UserError, match="generator_ckpt is not set"):
        check_inputs(parse(["--config", "default"]))


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_valid_and_commented(preset):
    config = parse(["--config", preset])
    lines = (PRESETS / f"{preset}.yaml").read_text().splitlines()
    assert lines[0].startswith(f"# {preset}: ") and config.training.total_steps > 0
    assert {path.stem for path in PRESETS.glob("*.yaml")} == {"small", "default", "40gb", "80gb", "140gb"}


@pytest.mark.parametrize("script", ["train", "generate", "metrics", "precompute", "annotations"])
def test_help_needs_no_torch(script):
    if script == "annotations":  # numpy only, and its help is short
        code = "import sys; from opens2v.data.annotations import main; sys.argv = ['x', '--help']"
    else:
        code = f"import sys; from opens2v.{script} import main; sys.argv = ['x', '--help']"
    code += "\ntry:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("0 False"), done.stdout[-200:] + done.stderr[-500:]


@pytest.mark.parametrize("script", ["generate", "metrics"])
def test_a_missing_checkpoint_ends_with_one_sentence(script):
    done = subprocess.run(
        [sys.executable, f"opens2v/{script}.py", "--checkpoint", "nowhere"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr[
        -600:
    ]


def test_shards():
    assert shard_of("1/4", 0, 1) == (1, 4) and shard_of(None, 2, 3) == (2, 3)
    for text in ("4/4", "a/b", "1", "-1/2"):
        with pytest.raises(UserError, match="expected i/n"):
            shard_of(text, 0, 1)
