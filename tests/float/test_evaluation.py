"""Evaluation formulas against closed forms, and the meter."""

import numpy as np
import pytest

from float.config import SAMPLE_DATA, DataConfig
from float.data.clips import find_clips
from float.data.media import read_audio, resize
from float.evaluation.formulas import (
    best_lag,
    best_lag_of_clips,
    correlation,
    cosine_similarity,
    frechet_distance,
    lip_sync_error,
    log_energy,
    mouth_activity,
)
from float.evaluation.mouth_meter import MouthMeter, loudness, read_truth
from float.evaluation.scoring import Material
from float.metrics import BY_ACTIVITY, BY_LOUDNESS, BY_TRUTH, meter_of

RANDOM = np.random.default_rng(0)


def test_frechet_distance_of_samples():
    a = RANDOM.standard_normal((20000, 4))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 3) == pytest.approx(36, rel=1e-6)
    few = RANDOM.standard_normal((3, 50))  # singular covariances
    assert np.isfinite(frechet_distance(few, few + 1))
    for wrong in (np.zeros(4), np.zeros((1, 4)), np.full((5, 4), np.nan), np.zeros((5, 3))):
        with pytest.raises(ValueError):
            frechet_distance(a, wrong)


def test_identity_similarity():
    rows = RANDOM.standard_normal((5, 8))
    assert cosine_similarity(rows, 3 * rows) == pytest.approx(1)
    assert cosine_similarity(np.eye(2), np.array([1.0, 0.0])) == pytest.approx(0.5)


@pytest.mark.parametrize("shift", [-4, 0, 3])
def test_lip_sync_error_finds_the_offset(shift):
    audio = RANDOM.standard_normal((200, 16))
    video = np.roll(audio, -shift, axis=0)  # the sound comes `shift` frames later
    distance, confidence, offset = lip_sync_error(video, audio)
    assert offset == shift and confidence > 3 and distance < 1


def test_correlation_and_lag():
    wave = np.sin(np.arange(100) / 3)
    assert correlation(wave, 2 * wave + 1) == pytest.approx(1) and correlation(wave, np.ones(100)) == 0
    assert best_lag(wave[5:65], wave[7:67])[0] == 2 and best_lag(wave, wave)[0] == 0
    # a clip in which nothing is said counts by as little as its mouth moves
    moving, still = (wave[5:65], wave[7:67]), (RANDOM.standard_normal(60) / 100, RANDOM.standard_normal(60) / 100)
    lag, r = best_lag_of_clips([moving, still])
    assert lag == 2 and r > 0.99 and abs(correlation(*still)) < 0.5
    assert len(log_energy(np.ones(1000, np.float32), fps=25, frames=4)) == 4


def test_mouth_activity_follows_the_mouth_only():
    frames = np.full((10, 64, 64, 3), 100, np.uint8)
    frames[4, 40:44, 28:36] = 0
    frames[7, :10] = 0  # outside the box
    activity = mouth_activity(frames, [0.28, 0.47, 0.72, 0.82])
    assert activity.argmax() == 4 and activity[7] == 0


@pytest.mark.slow
def test_the_meter_reads_mouths_that_it_has_not_seen():
    from float.data.media import iterate_frames
    from float.evaluation.mouth_meter import train_meter

    box, loaded = [0.28, 0.47, 0.72, 0.82], {}
    for split in ("train", "val"):
        clips = find_clips(SAMPLE_DATA, split)
        frames = [np.stack([resize(frame, 64) for frame in iterate_frames(clip.video, 25)]) for clip in clips]
        loaded[split] = frames, [read_truth(clip) for clip in clips]
    meter = train_meter(*loaded["train"], box)
    assert isinstance(meter, MouthMeter)
    for frames, truth in zip(*loaded["val"], strict=True):
        assert correlation(meter.measure(frames), truth) > 0.9


def test_mouths_of_filmed_clips_are_read_by_what_true_frames_show_of_loudness(tmp_path, monkeypatch):
    """Activity has no sign: where the mouth is open most of the time, the open mouth is its rest."""
    clips, data = find_clips(SAMPLE_DATA, "train")[:5], DataConfig()
    truths = [read_truth(clip) for clip in clips]
    waves = [read_audio(clip.audio) for clip in clips]
    levels = [loudness(wave, fps=25, frames=len(truth)) for wave, truth in zip(waves, truths, strict=True)]
    assert all(0 <= level.min() and level.max() <= 1 for level in levels)
    assert np.mean([correlation(level, truth) for level, truth in zip(levels, truths, strict=True)]) > 0.7
    monkeypatch.setattr("float.evaluation.mouth_meter.STEPS", 2)
    frames = [RANDOM.integers(0, 255, (len(truth), 32, 32, 3), np.uint8) for truth in truths]
    filmed, drawn = (
        [Material(*parts) for parts in zip(clips, frames, waves, column, strict=True)]
        for column in ([None] * 5, truths)
    )
    found = [
        meter_of(held_out, train, data, tmp_path / f"{number}.safetensors", "clips")
        for number, (held_out, train) in enumerate(
            [(drawn[:1], drawn[1:]), (filmed[:1], filmed[1:]), (filmed[:1], drawn[1:]), (filmed[:1], filmed[1:4])]
        )
    ]
    assert [rule for _, rule in found] == [BY_TRUTH, BY_LOUDNESS, BY_LOUDNESS, BY_ACTIVITY]
    assert found[0][0].deviation > 1 > found[1][0].deviation and found[3][0] is None
