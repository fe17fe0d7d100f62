"""Settings that no preset gives: each one is seen to act, or is refused with a reason."""

import os
from itertools import combinations

import numpy as np
import pytest
import soundfile
import torch

from float.config import PRESETS, Config
from float.dataset import FLOATDataset, collate_windows
from float.generate import main as generate
from float.modules.audio import SAMPLE_RATE, LogMelEncoder
from float.rectified_flow import FlowMatchingTrainer
from float.sampling.animate import Animator
from float.sampling.live import LiveSound, is_live
from float.sampling.motion import SamplingOptions
from float.train import main as train
from float.weights.open import load_generator, make_autoencoder, make_generator
from shared.config import load_config
from shared.errors import BadSample, UserError
from tests.float.material import write_clip
from tests.launching import newest

TINY = "--config small --dim-h 32 --fmt-depth 1 --num-heads 2 --batch-size 4 --device cpu --precision fp32".split()
TINY_PICTURES = [
    "--input-size",
    "32",
    "--dim-w",
    "12",
    "--dim-m",
    "4",
    "--set",
    "model.channels={4: 8, 8: 8, 16: 8, 32: 8}",
]


@pytest.mark.parametrize("flag", ["--relative-motion", "--no-relative-motion"])
def test_relative_motion_trains_on_what_the_reference_is_taken_off(tmp_path, flag):
    """Another face moves all latents of a clip by a constant: the loss is then the same only where it is relative, but
    for what the network is told of the reference, which is dropped here.
    """
    flags = [*TINY, "--output-dir", str(tmp_path), flag, "--ref-dropout-prob", "1"]
    train([*flags, "--synthetic", "--max-steps", "1"])
    config = load_config(Config, presets=PRESETS, argv=flags, default="small")
    dataset = FLOATDataset(tmp_path / "features" / "train", config.data, train=False)
    generator = make_generator(config.model, config.data)
    load_generator(generator, newest(tmp_path))
    centred = config.model.relative_motion
    expected = make_generator(config.model, config.data)
    expected.set_motion_statistics(dataset.all_motion(), spread_TD=dataset.all_motion(centred=centred))
    for name in ("motion_mean", "motion_whiten", "motion_unwhiten"):
        assert torch.allclose(getattr(generator, name), getattr(expected, name), atol=1e-5), name

    batch = {**collate_windows([dataset[index] for index in range(4)]), "slot": torch.arange(4)}
    moved = {name: value + 2.0 if "motion" in name else value for name, value in batch.items()}
    trainer = FlowMatchingTrainer(config, generator, dataset)
    one, other = (next(trainer.losses(generator, [given], 0))[0].item() for given in (batch, moved))
    assert (abs(one - other) < 1e-4 * one) == centred


def test_a_pose_condition_trains_resumes_and_moves_the_head(tmp_path):
    flags = [*TINY, *TINY_PICTURES, "--output-dir", str(tmp_path), "--pose-condition", "--synthetic"]
    train([*flags, "--max-steps", "1"])
    assert train([*flags, "--max-steps", "2"]).step == 2
    config = load_config(Config, presets=PRESETS, argv=flags, default="small")
    generator = make_generator(config.model, config.data)
    load_generator(generator, newest(tmp_path))
    for parameter in generator.fmt.parameters():
        parameter.data.normal_(std=0.2)
    dataset = FLOATDataset(tmp_path / "features" / "train", config.data, train=False)
    batch = {**collate_windows([dataset[index] for index in range(4)]), "slot": torch.arange(4)}
    trainer = FlowMatchingTrainer(config, generator, dataset)
    given, none = trainer._pose(batch, None), trainer._pose({**batch, "pose": batch["pose"] + 1}, 7)
    assert torch.equal(given, batch["pose"]) and 0 < none.any((1, 2)).float().mean() < 1  # some samples are left out
    trainer.config.model.pose_dropout_prob = 1.0
    assert not trainer._pose(batch, 7).any()
    trainer.config.model.pose_dropout_prob = 0.5
    with pytest.raises(UserError, match="the cached clips hold no poses; run float/precompute.py --pose-condition"):
        next(trainer.losses(generator, [{name: value for name, value in batch.items() if name != "pose"}], 0))

    animator = Animator(generator, make_autoencoder(config.model), config, torch.device("cpu"))
    raw, motion, emotion = torch.randn(2, 1, 16, 160), torch.randn(1, config.model.dim_w), torch.zeros(7)
    write_clip(tmp_path, "nods", frames=21)
    made = [
        torch.cat(
            list(animator.motion_windows(iter(raw), motion, emotion, SamplingOptions(nfe=2), animator.poses(how)))
        )
        for how in ("free", "still", str(tmp_path / "nods.mp4"))
    ]
    assert all((one - other).abs().max() > 1e-4 for one, other in combinations(made, 2))
    windows = animator.poses(str(tmp_path / "nods.mp4"))
    rows = torch.cat([next(windows)[0] for _ in range(3)])  # 21 frames, gone through back and forth
    assert torch.equal(rows[21:41], rows[:20].flip(0))
    config.model.pose_condition = False
    with pytest.raises(UserError, match="--pose still: this checkpoint was trained without the head's pose"):
        animator.poses("still")


def test_training_with_a_pose_condition_may_start_from_weights_without_one(tmp_path):
    flags = [*TINY, "--synthetic", "--max-steps", "1"]
    train([*flags, "--output-dir", str(tmp_path / "plain")])
    weights = str(newest(tmp_path / "plain"))
    assert train([*flags, "--output-dir", str(tmp_path / "posed"), "--pose-condition", "--fmt-path", weights]).step == 1
    config = load_config(Config, presets=PRESETS, argv=[*TINY, "--pose-condition"], default="small")
    with pytest.raises(UserError, match="p_embedder"):
        load_generator(make_generator(config.model, config.data), weights)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--aud-path {talk} --output {talk}", "is --aud-path itself and would be overwritten"),
        ("--ref-path {talk} --aud-path {talk} --output {here}/x/../talk.mp4", "is --ref-path itself"),
        ("--set-direction 3=nan", "direction '3=nan': K=VALUE expected"),
        ("--pose nods.mp4", "--pose nods.mp4: not free, not still, and no such file; give a video"),
        ("--shift-direction 3=-inf", "direction '3=-inf': K=VALUE expected"),
    ],
)
def test_what_generation_refuses_before_it_loads_anything(tmp_path, flags, words, capsys):
    (tmp_path / "talk.mp4").write_bytes(b"sound")
    (tmp_path / "x").mkdir()
    with pytest.raises(SystemExit) as stopped:
        generate(["--checkpoint", "run", *flags.format(talk=tmp_path / "talk.mp4", here=tmp_path).split()])
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert (tmp_path / "talk.mp4").read_bytes() == b"sound"


def test_a_recording_that_is_written_by_the_second_is_live_and_a_whole_file_is_not(tmp_path, monkeypatch):
    path, clock = tmp_path / "a.wav", iter(range(100))
    path.write_bytes(bytes(32))

    def sleep(seconds: float) -> None:
        if next(clock) * seconds > 1.0 and path.stat().st_size == 32:
            path.write_bytes(bytes(64))

    monkeypatch.setattr("float.sampling.live.time.sleep", sleep)
    assert is_live(str(path))
    monkeypatch.setattr("float.sampling.live.time.sleep", lambda seconds: None)
    assert not is_live(str(path))
    os.utime(path, (0, 0))
    assert not is_live(str(path))


def test_a_pipe_that_brings_no_sound_is_said_to_bring_none(tmp_path, monkeypatch):
    monkeypatch.setattr("float.sampling.live.STILL_SECONDS", 0.0)
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    live = LiveSound(str(tmp_path / "a.wav"), LogMelEncoder(), fps=25.0, length=16)
    with pytest.raises(BadSample, match=r"a\.wav: the sound track is empty"):
        next(live.windows())
