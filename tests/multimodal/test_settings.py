"""Settings: the guide's YAML and flags, stage lengths, refused values; and the measures by hand."""

from pathlib import Path

import numpy as np
import pytest

from multimodal.config import PRESETS, Config, TrainingConfig, stage_epochs
from multimodal.evaluation.retrieval import (
    average_precision_at,
    chance_recall,
    mean_average_precision,
    micro_f1,
    summarise,
)
from shared.config import load_config, validate
from shared.errors import UserError


@pytest.mark.parametrize(
    "epochs,stages,expected",
    [
        (100, None, {1: 20, 2: 40, 3: 40}),
        (1, None, {3: 1}),
        (3, None, {1: 1, 2: 1, 3: 1}),
        (10, [2, 3], {2: 5, 3: 5}),
        (50, [1], {1: 50}),
        (7, None, {1: 1, 2: 3, 3: 3}),
        (2, None, {2: 1, 3: 1}),
    ],
)
def test_stage_epochs(epochs, stages, expected):
    assert stage_epochs(TrainingConfig(num_epochs=epochs, stages=stages)) == expected


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("--config small", {1: 6, 2: 36, 3: 4}),
        ("--config small --epochs 92", {1: 12, 2: 72, 3: 8}),
        ("--config small --epochs 10 --stage-fractions 0.2 0.4 0.4", {1: 2, 2: 4, 3: 4}),
        ("--config few_samples", {2: 8}),
        ("--config few_samples --epochs 20", {2: 20}),
        ("--config few_samples --epochs 1", {2: 1}),
        ("--config few_samples --stage-epochs 1 2 3", {1: 1, 2: 2, 3: 3}),
        ("--epochs 1 --stage-epochs 1 2 3", {1: 1, 2: 2, 3: 3}),
    ],
)
def test_epochs_act_under_every_preset(flags, expected):
    assert (
        stage_epochs(load_config(Config, presets=PRESETS, argv=flags.split(), default="default").training) == expected
    )


def test_stages_without_epochs_are_refused():
    with pytest.raises(ValueError, match="no epochs"):
        stage_epochs(TrainingConfig(stages=[1], stage_epochs=[0, 2, 2]))


def test_the_guides_yaml_and_flags(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {size: small, embed_dim: 256, use_checkpoint: false}\n"
        "training: {epochs: 7, batch_size: 3, learning_rate: 2e-4, use_amp: false, gradient_accumulation_steps: 2}\n"
        "paths: {data_root: ./d, output_dir: ./o}\n"
    )
    config = load_config(Config, presets=Path("."), argv=["--config", str(path), "--batch-size", "5", "--lr", "3e-4"])
    assert (config.model.size, config.model.embed_dim, config.training.gradient_checkpointing) == ("small", 256, False)
    assert (config.training.num_epochs, config.training.batch_size, config.training.learning_rate) == (7, 5, 3e-4)
    assert (config.data.data_root, config.run.output_dir, config.training.use_amp) == ("./d", "./o", False)


GUIDE = """
model: {size: base, embed_dim: 512, use_checkpoint: true}
training: {epochs: 100, batch_size: 8, learning_rate: 1e-4, use_amp: true, gradient_accumulation_steps: 4}
paths: {data_root: ./data, output_dir: ./outputs}
"""


@pytest.mark.parametrize(
    "text",
    [GUIDE, "{}", "paths: {output_dir: ./outputs}", "run: {seed: 1}", "model: {size: base}", "training: {epochs: 3}"],
)
def test_a_file_leaves_what_it_does_not_name_at_the_guides_defaults(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    config = load_config(Config, presets=Path("."), argv=["--config", str(path)])
    assert config.run.tensorboard and config.run.output_dir in ("outputs", "./outputs")
    assert config.data.data_root == "./data" and config.training.learning_rate == 1e-4
    assert config.training.batch_size == 8 and config.training.gradient_accumulation_steps == 4


@pytest.mark.parametrize(
    "tree,message",
    [
        ({"model": {"siz": "base"}}, "did you mean size"),
        ({"paths": {"data": "x"}}, "paths.data"),
        ({"paths": ["data"]}, "paths: a section"),
        ({"paths": {"data_root": "x"}, "data": ["x"]}, "data: expected a section with keys"),
        ({"model": {"use_checkpoint": True}, "training": None}, "training: expected a section with keys"),
        ({"model": {"use_checkpoint": True}, "training": 5}, "training: expected a section with keys"),
        ({"data": {"datasets": [["coco"]]}}, r"data.datasets.0: .*got \['coco'\]"),
        ({"data": {"data_root": ""}}, "data.data_root: .*is empty"),
        ({"data": {"mel_cache": " "}}, "data.mel_cache: .*is empty"),
        ({"data": {"paths": {"jsonl": ""}}}, "is empty"),
        ({"training": {"init_from": ""}}, "training.init_from: .*is empty"),
        ({"tokenizer": ""}, "tokenizer: .*is empty"),
        ({"training": {"stages": [4]}}, "1, 2, 3"),
        ({"data": {"audio_frames": 100}}, "multiple of 16"),
        ({"model": {"num_classes": 12}}, "num_classes 80"),
        ({"training": {"label_set": "voxceleb1"}}, "needs voxceleb"),
        ({"data": {"datasets": []}}, "empty"),
        ({"data": {"paths": {"cocoa": "x"}}}, "cocoa"),
        ({"model": {"image_size": 100}}, "image_patch"),
        ({"training": {"stage_fractions": [1.0]}}, "three numbers"),
    ],
)
def test_wrong_settings_are_named(tree, message):
    with pytest.raises(UserError, match=message):
        validate(Config, tree, "test")


def test_intervals_draw_whole_items():
    ranks = [np.array([0 if number < 50 else 99]) for number in range(100)]
    alone, grouped = summarise(ranks), summarise(ranks, [number // 50 for number in range(100)])
    assert alone["R@5"] == grouped["R@5"] == 0.5
    assert (grouped["R@5_low"], grouped["R@5_high"]) == (0, 1)  # two items: both, one or none of them
    assert 0.38 < alone["R@5_low"] < 0.44 and 0.56 < alone["R@5_high"] < 0.62
    assert {f"R@{k}_{end}" for k in (1, 5, 10) for end in ("low", "high")} <= set(alone)


def test_measures():
    assert average_precision_at(np.array([0, 2, 30])) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision_at(np.array([2, 0])) == pytest.approx((1 + 2 / 3) / 2)  # ranks need not come sorted
    assert chance_recall(242, 10) == pytest.approx(10 / 242) and chance_recall(5, 10) == 1
    assert mean_average_precision(
        np.array([[0.9, 0], [0.1, 0], [0.5, 0]]), np.array([[0, 0], [1, 0], [1, 0]])
    ) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert micro_f1(np.array([[1.0, -1], [2, 3]]), np.array([[1, 1], [0, 1]])) == pytest.approx(2 * 2 / 6)
