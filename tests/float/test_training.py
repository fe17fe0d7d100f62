"""Both phases through the loop: learning, exact resume, ranks, what moves, settings, and what users see."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from float.config import AUTOENCODER_PRESETS, PRESETS, AutoencoderConfig, Config, settle
from float.data.clips import Clip
from float.data.media import iterate_frames, read_audio
from float.data.synthetic import write_synthetic_features
from float.dataset import FLOATDataset, collate_windows
from float.generate import main as generate
from float.metrics import main as metrics
from float.precompute import main as precompute
from float.train import main as train
from float.train_autoencoder import main as train_autoencoder
from shared.config import load_config, load_saved
from shared.engine.dist import DistInfo
from shared.errors import UserError
from tests.float.material import write_clip
from tests.launching import ROOT, final_tensors, losses, run, same_bits

TINY = "--config small --dim-h 32 --fmt-depth 1 --num-heads 2 --batch-size 4 --device cpu --precision fp32".split()
TINY += "--eval-steps 3 --save-steps 3 --logging-steps 1".split()
TINY_PICTURES = "--input-size 32 --dim-w 12 --dim-m 4".split()
TINY_PICTURES += ["--set", "model.channels={4: 8, 8: 8, 16: 8, 32: 8}"]


@pytest.fixture
def clips(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for index in range(count):
            write_clip(tmp_path / "data" / split / f"id{index}", "clip", frames=30, seed=index)
    return tmp_path / "data"


def test_synthetic_run_resumes_bit_for_bit(tmp_path):
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    train([*TINY, "--synthetic", "--output-dir", whole, "--max-steps", "6"])
    train([*TINY, "--synthetic", "--output-dir", halves, "--max-steps", "3"])
    train([*TINY, "--synthetic", "--output-dir", halves, "--max-steps", "6"])
    assert losses(whole) == losses(halves)
    assert same_bits(final_tensors(whole), final_tensors(halves))
    rows = [json.loads(line) for line in (Path(whole) / "metrics.jsonl").read_text().splitlines()]
    found = {name for row in rows for name in row}
    assert {
        "train/loss",
        "val/loss",
        "train/grad_norm",
        "train/lr",
        "train/loss_flow",
        "train/loss_vel",
        "train/loss_prev",
    } <= found


@pytest.mark.parametrize(
    "changes",
    [[], ["--lambda-adversarial", "1", "--lambda-style", "1", "--lambda-perceptual", "1", "--lambda-component", "1"]],
)
def test_phase_one_resumes_bit_for_bit(tmp_path, clips, changes):
    flags = [
        "--config",
        "small",
        *TINY_PICTURES,
        "--data-root",
        str(clips),
        "--batch-size",
        "2",
        "--logging-steps",
        "1",
        "--save-steps",
        "2",
        "--eval-steps",
        "2",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        *changes,
    ]
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    train_autoencoder([*flags, "--output-dir", whole, "--max-steps", "4"])
    train_autoencoder([*flags, "--output-dir", halves, "--max-steps", "2"])
    train_autoencoder([*flags, "--output-dir", halves, "--max-steps", "4"])
    assert losses(whole) == losses(halves)
    assert same_bits(final_tensors(whole), final_tensors(halves))
    assert list((Path(whole) / "samples").glob("*.png"))


def test_a_setting_that_changes_nothing_in_phase_one_is_refused(tmp_path, capsys):
    for flags in (["--num-heads", "4"], ["--set", "model.nfe=5"], ["--dim-h", "64", "--autoencoder-path", "x"]):
        with pytest.raises(SystemExit) as leaving:
            train_autoencoder([*flags, "--output-dir", str(tmp_path / "out")])
        assert leaving.value.code == 2 and "no part of phase 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_released_network_trains_in_phase_one(tmp_path, clips):
    output = tmp_path / "run"
    result = train_autoencoder(
        [
            "--config",
            "small",
            *TINY_PICTURES,
            "--autoencoder",
            "lia",
            "--data-root",
            str(clips),
            "--batch-size",
            "2",
            "--max-steps",
            "2",
            "--device",
            "cpu",
            "--output-dir",
            str(output),
        ]
    )
    assert result.finished and np.isfinite(result.metrics["val/psnr"])


def speaks_while_the_sound_comes_in(tmp_path, run, portrait):
    """From a pipe, and from a file that a recorder is writing; the video grows under its own name."""
    data, made = (tmp_path / "speech.wav").read_bytes(), tmp_path / "live.mp4"
    flags = ["--checkpoint", str(run), "--ref-path", portrait, "--emo", "sad", "--stream", "--device", "cpu"]
    grown = []

    def play(target) -> None:
        for start in range(0, len(data), 16000):  # half a second
            target.write(data[start : start + 16000])
            target.flush()
            time.sleep(0.4)
            grown.append(made.stat().st_size if made.exists() else 0)

    def play_pipe() -> None:
        with open(tmp_path / "pipe", "wb") as target:
            play(target)

    os.mkfifo(tmp_path / "pipe")
    player = threading.Thread(target=play_pipe)
    player.start()
    generate([*flags, "--aud-path", str(tmp_path / "pipe"), "--output", str(made)])
    player.join()
    assert len(list(iterate_frames(made, 25))) == 75
    assert any(0 < size < made.stat().st_size for size in grown), grown
    assert abs(len(read_audio(made)) - 48000) <= 2048

    target = open(tmp_path / "growing.wav", "wb")
    target.write(data[:8000])
    target.flush()
    player = threading.Thread(target=lambda: [time.sleep(0.1), play_rest()])

    def play_rest() -> None:
        for start in range(8000, len(data), 4000):
            target.write(data[start : start + 4000])
            target.flush()
            time.sleep(0.02)
        target.close()

    player.start()
    generate([*flags, "--aud-path", str(tmp_path / "growing.wav"), "--output", str(made)])
    player.join()
    assert len(list(iterate_frames(made, 25))) == 75


@pytest.mark.slow
def test_from_clips_to_a_talking_video(tmp_path, clips, capsys):
    output = tmp_path / "run"
    flags = [*TINY, *TINY_PICTURES, "--data-root", str(clips), "--batch-size", "2"]
    flags += ["--output-dir", str(output), "--max-steps", "3"]
    assert train(flags).finished
    assert sorted(path.name for path in (output / "samples").iterdir())[0].startswith("step_00000003")
    steps = len(losses(output))
    assert train(flags).step == 3 and len(losses(output)) == steps  # the same command again finds everything done
    soundfile.write(tmp_path / "speech.wav", np.sin(np.arange(16000 * 3) / 9) * 0.3, 16000)
    made = tmp_path / "talk.mp4"
    portrait = str(clips / "val" / "id0" / "clip.mp4")
    generate(
        [
            "--checkpoint",
            str(output),
            "--ref-path",
            portrait,
            "--aud-path",
            str(tmp_path / "speech.wav"),
            "--output",
            str(made),
            "--emo",
            "happy",
            "--set-direction",
            "1=0.5",
            "--device",
            "cpu",
        ]
    )
    assert len(list(iterate_frames(made, 25))) == 75 and len(read_audio(made)) >= 48000
    wide = tmp_path / "wide.png"
    Image.new("RGB", (80, 40), (90, 120, 150)).save(wide)
    flags_of_use = ["--checkpoint", str(output), "--aud-path", str(tmp_path / "speech.wav"), "--device", "cpu"]
    for number, changes in enumerate(
        (["--no-crop"], ["--shift-direction", "1=0.5", "--moving", "lips"], ["--face-box", "20,0,60,40"])
    ):
        folder = tmp_path / f"results{number}"
        generate([*flags_of_use, "--ref-path", str(wide), "--emo", "sad", "--res-dir", str(folder), *changes])
        assert "wide" in next(folder.iterdir()).name
    assert "squeezed to a square, as --no-crop asks" in capsys.readouterr().err
    speaks_while_the_sound_comes_in(tmp_path, output, portrait)
    scores = metrics(["--checkpoint", str(output), "--seeds", "1", "--max-sounds", "2", "--device", "cpu"])
    assert {"talking_id0__clip.png", "talking_id0__clip.mp4"} <= {p.name for p in (output / "samples").iterdir()}
    assert scores["held_out_clips"] == 2 and not scores["uses_meter"]
    assert (
        json.loads((output / "metrics.json").read_text())["psnr"] == scores["psnr"]
        and (output / "report.html").exists()
    )
    again = precompute([*flags[: flags.index("--max-steps")], "--autoencoder-path", str(output / "autoencoder")])
    assert again == {"train_encoded": 0, "train_kept": 3, "train_bad": 0, "val_encoded": 0, "val_kept": 2, "val_bad": 0}
    # a folder of test clips alone is scored
    held_out = tmp_path / "heldout"
    (clips / "val").rename(held_out / "heldout") if held_out.mkdir() is None else None
    scores = metrics(
        ["--checkpoint", str(output), "--data-root", str(held_out), "--split", "heldout", "--seeds", "1"]
        + ["--device", "cpu", "--output", str(tmp_path / "scores.json")]
    )
    assert scores["held_out_clips"] == 2


@pytest.mark.slow
def test_a_longer_run_keeps_the_auto_encoder_that_phase_two_was_trained_on(tmp_path, clips, capsys):
    output = tmp_path / "run"
    flags = [*TINY, *TINY_PICTURES, "--data-root", str(clips), "--batch-size", "2", "--output-dir", str(output)]
    train([*flags, "--max-steps", "3"])
    first = final_tensors(output / "autoencoder")
    capsys.readouterr()
    assert train([*flags, "--max-steps", "5"]).step == 5 and max(losses(output)) == 5
    assert "phase 1 stays at its step 3 of 5" in capsys.readouterr().out
    assert same_bits(final_tensors(output / "autoencoder"), first)
    other = tmp_path / "other"
    train_autoencoder(
        ["--config", "small", *TINY_PICTURES, "--data-root", str(clips), "--max-steps", "2", "--batch-size", "2"]
        + ["--seed", "7", "--device", "cpu", "--output-dir", str(other)]
    )
    with pytest.raises(SystemExit) as stopped:
        train([*flags, "--max-steps", "7", "--autoencoder-path", str(other)])
    assert stopped.value.code == 2 and "phase 2 was trained on the auto-encoder of" in capsys.readouterr().err
    assert max(losses(output)) == 5


def test_previews_show_the_emotion_that_training_sees(tmp_path, clips, monkeypatch):
    """The cached one, which the recogniser heard where the clip has no label."""
    from safetensors.torch import load_file

    from float.data.features import write_features
    from float.evaluation.preview import make_sampler
    from float.sampling.animate import Animator
    from float.weights.open import load_autoencoder, make_generator

    flags = [*TINY, *TINY_PICTURES, "--data-root", str(clips), "--batch-size", "2", "--max-steps", "1"]
    train([*flags, "--output-dir", str(tmp_path / "run")])
    config = load_saved(Config, tmp_path / "run" / "config.yaml")
    heard, seen = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1]), []
    for path in (tmp_path / "run" / "features" / "val").glob("*.safetensors"):
        clip = Clip(path.stem, Path(), Path(), "nobody")
        write_features(path, {**load_file(path), "emotion": heard}, clip, "test")
    generator = make_generator(config.model, config.data)
    autoencoder = load_autoencoder(config.model, str(tmp_path / "run" / "autoencoder"))
    shown = Animator.motion_windows
    monkeypatch.setattr(Animator, "motion_windows", lambda *given: seen.append(given[3]) or shown(*given))
    make_sampler(config, generator, autoencoder, DistInfo())(generator, 1, tmp_path / "samples")
    assert len(seen) == 2 and all(torch.equal(emotion, heard) for emotion in seen)


def test_epochs_and_batch_of_the_guide_count_in_both_phases(tmp_path, clips, capsys):
    flags = ["--config", "small", "--dim-h", "32", "--fmt-depth", "1", "--num-heads", "2", *TINY_PICTURES]
    flags += [
        "--data-root",
        str(clips),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    result = train([*flags, "--num-epochs", "1", "--batch-size", "1"])
    text = capsys.readouterr().out
    # 3 clips of 30 frames: 90 pairs and 3 windows an epoch
    assert "1 samples a step; steps 0 to 90 of 90" in text and "1 samples a step; steps 0 to 3 of 3" in text
    assert result.step == 3


@pytest.mark.parametrize("phase", ["one", "two"])
def test_a_time_limit_ends_either_phase_in_peace(tmp_path, clips, phase, capsys):
    flags = [*TINY, *TINY_PICTURES, "--data-root", str(clips), "--output-dir", str(tmp_path), "--batch-size", "2"]
    if phase == "two":
        train([*flags, "--max-steps", "1"])
    capsys.readouterr()
    limit = "1e-9" if phase == "one" else "0.01"
    result = train([*flags, "--time-limit-minutes", limit, "--num-epochs", "2000" if phase == "two" else "2"])
    assert not result.finished and "the same command" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(tmp_path, strategy):
    flags = [*TINY, "--synthetic", "--max-steps", "4", "--global-batch-size", "4", "--batch-size"]
    run(1, "float/train.py", *flags, "4", "--output-dir", tmp_path / "one")
    run(2, "float/train.py", *flags, "2", "--output-dir", tmp_path / "two", "--strategy", strategy)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and max(abs(one[step] - two[step]) for step in one) < 1e-5
    # the ranks share the held-out windows out
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([row["val/loss"] for row in map(json.loads, lines) if "val/loss" in row] for lines in rows)
    assert len(one) == len(two) == 2 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_count_the_previous_frames_of_both(tmp_path):
    """loss_prev is a mean over the rows that count, wherever they lie: a rank with fewer does not weigh them more."""
    flags = [*TINY, "--synthetic", "--prev-loss-weight", "2", "--max-steps", "4", "--global-batch-size", "4"]
    run(1, "float/train.py", *flags, "--batch-size", "1", "--output-dir", tmp_path / "one")
    run(2, "float/train.py", *flags, "--batch-size", "2", "--output-dir", tmp_path / "two", "--strategy", "ddp")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and max(abs(one[step] - two[step]) for step in one) < 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_train_the_autoencoder_as_one(tmp_path, clips):
    flags = ["--config", "small", *TINY_PICTURES, "--data-root", clips, "--device", "cpu", "--precision", "fp32"]
    flags += ["--logging-steps", "1", "--max-steps", "4", "--global-batch-size", "4", "--batch-size"]
    train_autoencoder([*map(str, flags), "4", "--output-dir", str(tmp_path / "one")])
    run(2, "float/train_autoencoder.py", *flags, "2", "--output-dir", tmp_path / "two", "--strategy", "ddp")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 4 and one.keys() == two.keys() and max(abs(one[step] - two[step]) for step in one) < 1e-5


@pytest.mark.slow
def test_overfits_eight_clips(tmp_path):
    """The reference network of the spec: below a quarter of the starting flow loss after 400 steps."""
    from float.rectified_flow import FlowMatchingTrainer
    from float.weights.open import make_generator

    config = Config()
    config.run.output_dir, config.training.learning_rate = str(tmp_path), 1e-3
    for name, value in {
        "dim_w": 64,
        "dim_h": 128,
        "dim_a": 64,
        "num_heads": 4,
        "fmt_depth": 2,
        "dim_m": 8,
        "audio_features": "logmel",
        "audio_dropout_prob": 0.0,
        "ref_dropout_prob": 0.0,
        "emotion_dropout_prob": 0.0,
        "prev_frame_dropout_prob": 0.0,
    }.items():
        setattr(config.model, name, value)
    config.data.use_augmentation = False
    write_synthetic_features(config, DistInfo())
    dataset = FLOATDataset(tmp_path / "features" / "train", config.data, train=True)
    torch.manual_seed(0)
    trainer = FlowMatchingTrainer(config, make_generator(config.model, config.data), dataset)
    history = []
    for step in range(400):
        batch = collate_windows([dataset.sample((step + k * 6) % len(dataset), step) for k in range(8)])
        history.append(trainer.train_step(batch, step)["loss_flow"])
    assert np.mean(history[-20:]) < 0.25 * history[0]


def test_trainer_steps_callbacks_and_what_moves(tmp_path):
    from float.rectified_flow import FlowMatchingTrainer
    from float.weights.open import make_generator

    config = load_config(
        Config,
        presets=PRESETS,
        argv=[*TINY, "--output-dir", str(tmp_path), "--num-epochs", "2", "--total-steps", "none"],
        default="small",
    )
    write_synthetic_features(config, DistInfo())
    dataset = FLOATDataset(tmp_path / "features" / "train", config.data, train=True)
    generator = make_generator(config.model, config.data)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    seen = []
    trainer = FlowMatchingTrainer(
        config,
        generator,
        dataset,
        dataset,
        callbacks=[lambda trainer, epoch, metrics: seen.append((epoch, sorted(metrics)))],
    )
    batch = collate_windows([dataset[index] for index in range(4)])
    first = trainer.validate_step(batch)
    assert first["val_loss"] == trainer.validate_step(batch)["val_loss"]
    assert {"loss", "loss_flow", "loss_vel", "loss_prev", "grad_norm"} == set(trainer.train_step(batch))
    for step in range(1, 4):
        trainer.train_step(batch, step)
    moved = {name for name, value in generator.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in generator.named_parameters() if value.requires_grad}
    trainer.train(tmp_path / "run")
    assert [epoch for epoch, _ in seen] == [1, 2]
    assert {"train/loss", "train/grad_norm", "train/lr", "val/loss"} <= set(seen[0][1])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_of_the_guide_trains_and_resumes(tmp_path, optimizer):
    flags = [*TINY, "--synthetic", "--optimizer", optimizer, "--learning-rate", "0.01"]
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    train([*flags, "--output-dir", whole, "--max-steps", "4"])
    train([*flags, "--output-dir", halves, "--max-steps", "2"])
    train([*flags, "--output-dir", halves, "--max-steps", "4"])
    assert losses(whole) == losses(halves) and same_bits(final_tensors(whole), final_tensors(halves))


def test_the_optimizers_are_torchs_own():
    from shared.optim import adamw, decay_groups

    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        torch.manual_seed(0)
        ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        theirs.load_state_dict(ours.state_dict())
        training = Config(training={"optimizer": name, "weight_decay": 0.1, "learning_rate": 0.05}).training
        optimizer = adamw(decay_groups(ours, training.weight_decay), dict(ours.named_parameters()), training)
        decay = 0.0 if name == "sgd" else 0.1
        groups = [{"params": [theirs.weight], "weight_decay": decay}, {"params": [theirs.bias], "weight_decay": 0.0}]
        reference = kind(groups, lr=0.05)
        for step in range(3):
            for module, stepper in ((ours, optimizer), (theirs, reference)):
                module(torch.full((4, 3), float(step + 1))).square().sum().backward()
                stepper.step()
                stepper.zero_grad()
        if name != "sgd":
            assert torch.allclose(ours.weight, theirs.weight, atol=1e-6) and torch.allclose(ours.bias, theirs.bias)


def test_each_condition_is_dropped_as_often_as_its_own_setting_says(tmp_path):
    """And a window at the start of its clip is given no previous motion, whatever whitening makes of zeros."""
    from float.rectified_flow import FlowMatchingTrainer
    from float.weights.open import make_generator

    config = load_config(Config, presets=PRESETS, argv=[*TINY, "--output-dir", str(tmp_path)], default="small")
    write_synthetic_features(config, DistInfo())
    dataset = FLOATDataset(tmp_path / "features" / "train", config.data, train=False)
    batch = {**collate_windows([dataset[index] for index in range(4)]), "slot": torch.arange(4)}
    generator = make_generator(config.model, config.data)
    generator.set_motion_statistics(dataset.all_motion() + 3.0)
    names = ("audio_dropout_prob", "ref_dropout_prob", "emotion_dropout_prob", "prev_frame_dropout_prob")
    for chosen, expected in zip(names, ([0], [1], [2], [3, 4]), strict=True):
        for name in names:
            setattr(config.model, name, float(name == chosen))
        seen = []
        generator.register_forward_hook(
            lambda _, args, kwargs, __, seen=seen: seen.append((args[5], kwargs["drop_B5"])), with_kwargs=True
        )
        next(FlowMatchingTrainer(config, generator, dataset).losses(generator, [batch], 0))
        previous, drop_B5 = seen[0]
        assert drop_B5.all(0).nonzero().flatten().tolist() == expected == drop_B5.any(0).nonzero().flatten().tolist()
        starts = ~batch["has_previous"]
        assert starts.any() and previous[starts].abs().max() == 0 and previous[~starts].abs().max() > 0


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_load_and_survive_saving(preset, tmp_path):
    config = load_config(Config, presets=PRESETS, argv=["--config", preset], default="default")
    config.save(tmp_path / "a.yaml")
    assert Config.load(tmp_path / "a.yaml") == config == Config.from_dict(config.to_dict())


@pytest.mark.parametrize("preset", sorted(path.stem for path in AUTOENCODER_PRESETS.glob("*.yaml")))
def test_phase_one_presets_load(preset):
    assert load_config(
        AutoencoderConfig, presets=AUTOENCODER_PRESETS, argv=["--config", preset], default="small"
    ).training.total_steps


def test_the_guides_names_and_values():
    config = load_config(Config, presets=PRESETS, argv=[], default="default")
    training, model, data = config.training, config.model, config.data
    assert (training.batch_size, training.num_epochs, training.learning_rate, training.weight_decay) == (
        8,
        100,
        1e-4,
        1e-5,
    )
    assert (model.dim_w, model.dim_h, model.fmt_depth, model.num_heads, model.nfe, model.dim_m) == (
        512,
        1024,
        12,
        16,
        10,
        20,
    )
    assert (data.sequence_length, data.prev_frames, data.wav2vec_sec, data.data_root) == (16, 4, 0.64, "datasets")
    flags = [
        "--gradient_clip_val",
        "0.5",
        "--val-check-interval",
        "7",
        "--max_checkpoints_to_keep",
        "3",
        "--save-checkpoint-interval",
        "9",
    ]
    training = load_config(Config, presets=PRESETS, argv=flags, default="default").training
    assert (training.max_grad_norm, training.eval_steps, training.keep_last, training.save_steps) == (0.5, 7, 3, 9)


def test_the_config_without_settings_is_the_preset_default():
    assert Config() == load_config(Config, presets=PRESETS, argv=["--config", "default"])


def test_a_config_saved_as_json_is_json(tmp_path):
    config = Config()
    config.training.batch_size = 16
    config.save(tmp_path / "my_config.json")
    assert json.loads((tmp_path / "my_config.json").read_text())["training"]["batch_size"] == 16
    assert Config.load(tmp_path / "my_config.json") == config


def test_a_file_in_the_authors_style_is_read(tmp_path):
    path = tmp_path / "author.json"
    tree = {
        "model": {"dim_m": 512},
        "training": {"use_wandb": False, "wandb_project": "mine", "wandb_entity": None, "use_ddp": False}
        | {"local_rank": -1, "lr_scheduler": "cosine", "optimizer": "sgd"},
        "data": {"image_size": 256, "num_workers": 3, "pin_memory": True},
        "experiment_name": "first",
        "output_dir": "here",
        "resume_from_checkpoint": None,
        "device": "cpu",
        "rank": 0,
        "seed": 5,
    }
    path.write_text(json.dumps(tree))
    config = Config.load(path)
    run = config.run
    assert (run.run_name, run.output_dir, run.resume, run.device, run.seed) == ("first", "here", "auto", "cpu", 5)
    assert (config.model.input_size, config.training.num_workers, run.wandb_project) == (256, 3, "mine")
    path.write_text(json.dumps(tree | {"data": {"image_sise": 256}}))
    with pytest.raises(UserError, match="data.image_sise: unknown setting"):
        Config.load(path)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--config", "default"], (500, 0.01)),
        (["--config", "default", "--warmup-steps", "7", "--min-lr-ratio", "0.5"], (7, 0.5)),
        (["--config", "large", "--warmup-steps", "0"], (0, 0.02)),
        (["--config", "small"], (50, 0.02)),
        (["--config", "small", "--lr-warmup-epochs", "3", "--lr-min", "1e-3"], (300, 0.5)),
        (["--config", "official"], (0, 0.0)),
    ],
)
def test_a_flag_for_the_warm_up_wins_over_the_preset_under_either_name(flags, expected):
    config = load_config(Config, presets=PRESETS, argv=flags)
    settle(config, steps_per_epoch=100, device_type="cpu")
    assert (config.training.warmup_steps, pytest.approx(config.training.min_lr_ratio)) == expected


@pytest.mark.parametrize("preset", ["small", "default", "official"])
def test_epochs_on_the_command_line_take_the_place_of_steps(preset):
    training = load_config(Config, presets=PRESETS, argv=["--config", preset, "--num-epochs", "2"]).training
    assert (training.num_epochs, training.total_steps) == (2, None)
    both = ["--config", preset, "--num-epochs", "2", "--total-steps", "9"]
    assert load_config(Config, presets=PRESETS, argv=both).training.total_steps == 9


def test_file_over_preset_and_flag_over_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(
        json.dumps(
            {"training": {"batch_size": 3, "learning_rate": 0.5}, "model": {"dim_m": 512, "ode_method": "dopri5"}}
        )
    )
    from float.train import _guide_arguments

    argv = _guide_arguments(["--config-file", "mine.json", "--batch-size", "5"])
    config = load_config(Config, presets=PRESETS, argv=argv, default="default", aliases={"--config-file": "--config"})
    assert (config.training.batch_size, config.training.learning_rate, config.model.dim_m) == (5, 0.5, 512)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--fmt-dept", "3"], "fmt"),
        (["--num-heads", "7"], "dim_h 1024 is not divisible by num_heads 7"),
        (["--sequence-length", "20"], "set wav2vec_sec 0.8"),
        (["--optimizer", "sdg"], "optimizer"),
        (["--set", "training.loss_type=cosine"], "loss_type"),
        (["--dim-m", "600"], "do not fit into dim_w"),
        (["--config", "smal"], "small"),
    ],
)
def test_wrong_settings_end_with_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(flags)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_what_would_stop_phase_two_is_said_before_phase_one(tmp_path, clips, capsys):
    base = [*TINY, *TINY_PICTURES, "--data-root", str(clips), "--output-dir", str(tmp_path / "out")]
    nowhere, bert, empty = (str(tmp_path / name) for name in ("nowhere", "bert", "empty"))
    for folder, kind in ((bert, "bert"), (empty, "wav2vec2")):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": kind}))
    wav2vec = ["--audio-features", "wav2vec2", "--wav2vec-model-path"]
    for flags, words in [
        ([*wav2vec, bert], "bert: a bert, not a wav2vec2"),
        ([*wav2vec, empty], "empty: cannot be loaded"),
        (["--emotion-source", "ser", "--audio2emotion-path", empty], "empty: no weights here"),
        (["--emotion-source", "ser", "--audio2emotion-path", nowhere], "or use --emotion-source label or none"),
        (["--audio-features", "wav2vec2", "--wav2vec-model-path", nowhere], "nowhere: no wav2vec2 model here"),
        (["--emotion-source", "ser", "--audio2emotion-path", nowhere], "nowhere: no wav2vec2 model here"),
        (["--resume", nowhere], "nowhere: no such checkpoint"),
        (["--batch-size", "16"], "3 windows of 16 frames, one optimizer step takes 16; use --batch-size 3"),
        (["--fmt-path", nowhere], "--fmt-path"),
        (["--features-dir", f"{bert}/config.json"], "config.json is not a folder"),
        (["--sigma-min", "2"], "sigma_min 2.0 must be below sigma_max 1.0"),
        (["--fmt-path", f"{bert}/config.json"], "config.json: cannot be read as weights"),
        (["--ode-method", "eular"], "'eular'"),
        (["--val-split", "nothing"], "no clips of split 'nothing'"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            train([*base, *flags])
        assert stopped.value.code == 2 and words in capsys.readouterr().err, words
        assert not (tmp_path / "out").exists(), words


def test_one_silent_clip_is_left_out_and_more_are_refused(tmp_path, clips, capsys):
    flags = [*TINY, *TINY_PICTURES, "--data-root", str(clips), "--batch-size", "1", "--max-steps", "1"]
    for index in (0, 1):
        soundfile.write(clips / "train" / f"id{index}" / "clip.wav", np.zeros(19200), 16000)
        if index == 0:
            assert train([*flags, "--output-dir", str(tmp_path / "one")]).finished
            assert "1 of 3 clips of 'train' are left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train([*flags, "--output-dir", str(tmp_path / "two")])
    assert "2 of 3 clips of 'train' cannot be used" in capsys.readouterr().err
    assert train([*flags, "--output-dir", str(tmp_path / "two"), "--max-bad-share", "0.7"]).finished


@pytest.mark.parametrize("samples", [160, 10240, 64000, 64100, 64399, 70000])
def test_the_emotion_is_heard_in_every_window_whatever_the_length(samples, monkeypatch, tmp_path):
    """One for each window of sound features; the last hears as much sound as the others, or all there is."""
    import types

    from float.generate import GenerateOptions, emotion_of
    from float.modules.audio import frames_of
    from float.modules.emotion import Audio2Emotion

    config, heard = Config(), []
    config.model.audio2emotion_path = str(tmp_path)

    def recogniser(wave):
        heard.append(wave.shape[-1])
        return torch.full((1, 7), 1 / 7)

    recogniser.to = lambda device: recogniser
    monkeypatch.setattr(Audio2Emotion, "from_pretrained", classmethod(lambda cls, path: recogniser))
    animator = types.SimpleNamespace(config=config, device=torch.device("cpu"))
    sound = torch.randn(samples)
    emotions = list(emotion_of(GenerateOptions(dynamic_emotion=True), animator, sound))
    assert len(emotions) == -(-frames_of(samples, 25.0) // 16)
    assert set(heard) == {min(samples, 10240)}


def test_given_features_are_scored(tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 8))
    for name, values in {"a": rows, "b": rows + 1, "c": rows[0]}.items():
        np.save(tmp_path / f"{name}.npy", values)
    a, b, c = (str(tmp_path / f"{name}.npy") for name in "abc")
    scores = metrics(["--video-embeddings", a, "--audio-embeddings", a, "--features-real", a, "--features-made", b])
    assert scores["lse_offset_frames"] == 0 and scores["lse_d"] < 1e-6 and abs(scores["frechet_distance"] - 8) < 0.5
    assert -1 <= metrics(["--frame-embeddings", b, "--source-embedding", c])["csim"] <= 1


def test_missing_things_end_with_one_sentence(tmp_path, capsys):
    out, empty = ["--output-dir", str(tmp_path / "out"), "--device", "cpu"], tmp_path / "empty.npy"
    empty.write_bytes(b"")
    for command, flags, words in [
        (train, ["--config", "small", "--data-root", str(tmp_path / "none"), *out], "no such folder"),
        (train, ["--config", "small", "--autoencoder-path", str(tmp_path / "none"), *out], "no such checkpoint"),
        (train, ["--config", "small", "--audio-features", "wav2vec2", "--synthetic", "--vgg", "x"], "--vgg"),
        (generate, ["--ref-path", "a.png", "--aud-path", "b.wav"], "--checkpoint is missing"),
        (generate, ["--checkpoint", str(tmp_path / "none")], "no such file or folder"),
        (metrics, [], "nothing to score"),
        (metrics, ["--features-real", str(tmp_path / "a.npy")], "no such file"),
        (metrics, ["--features-real", str(empty), "--features-made", str(empty)], "not a readable .npy file"),
        (metrics, ["--set", "seeds=[]"], "--seeds is empty"),
        (precompute, ["--config", "default"], "--autoencoder-path is not given"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            command(flags)
        assert stopped.value.code == 2 and words in capsys.readouterr().err, words
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_plan_needs_no_memory(capsys):
    train(["--config", "official", "--dry-run", "--strategy", "fsdp", "--world-size", "8", "--gpu", "h100"])
    text = capsys.readouterr().out
    assert "161,356,800 trainable" in text and "fits h100" in text


def test_help_answers_from_any_folder(tmp_path):
    for script in ("train", "train_autoencoder", "precompute", "generate", "metrics"):
        done = subprocess.run(
            [sys.executable, ROOT / "float" / f"{script}.py", "--help"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and f"float/{script}.py" in done.stdout, done.stderr


def test_a_finished_run_keeps_its_settings(tmp_path):
    train([*TINY, "--synthetic", "--output-dir", str(tmp_path), "--max-steps", "1"])
    saved = load_saved(Config, tmp_path / "config.yaml")
    assert saved.model.dim_h == 32 and saved.training.batch_size == 4


def test_an_unreadable_mark_of_phase_one_is_no_end(tmp_path):
    """An empty DONE, as a full disk leaves it, was a traceback on every start."""
    from float.train import _steps_done

    for text in ("", "4", "not a number"):
        (tmp_path / "DONE").write_text(text)
        assert _steps_done(tmp_path) is None  # and no checkpoint is there that reached step 4
