"""Settings that no preset gives: each one is seen to act."""

import pytest
import torch

from float.config import PRESETS, Config
from float.dataset import FLOATDataset, collate_windows
from float.rectified_flow import FlowMatchingTrainer
from float.train import main as train
from float.weights.open import load_generator, make_generator
from shared.config import load_config
from tests.launching import newest

TINY = "--config small --dim-h 32 --fmt-depth 1 --num-heads 2 --batch-size 4 --device cpu --precision fp32".split()


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
