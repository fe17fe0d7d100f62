"""From a folder of videos and public weights (tiny stand-ins of the right classes) to an adapter in another tool."""

import shlex

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from PIL import Image

from opens2v import export, generate, prepare, train
from opens2v.weights.open import load_trained_model
from tests.opens2v.test_prepare import masks, videos  # noqa: F401
from tests.opens2v.test_presets import SMALL, public  # noqa: F401

pytestmark = pytest.mark.slow


def test_own_videos_become_an_adapter_that_diffusers_loads(videos, masks, public, tmp_path, capsys):  # noqa: F811
    data, run = tmp_path / "data", tmp_path / "run"
    prepare.main(["--videos", str(videos), "--output", str(data), "--masks", str(masks)])
    own = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].split("--config ...")[1])  # what it says to do
    lora = ["--r", "2", "--lora-alpha", "4", "--learning-rate", "0.1"]
    train.main(["--config", "40gb", *public, *SMALL, *own, *lora, "--output-dir", str(run)])
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "square.png")
    drawn = ["--ref-image", str(tmp_path / "square.png"), "--prompt", "A red square slides.", "--device", "cpu"]
    generate.main(["--checkpoint", str(run), *drawn, "--steps", "1", "--output", str(tmp_path / "drawn.mp4")])
    assert (tmp_path / "drawn.mp4").stat().st_size > 1000
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "lora"), "--what", "lora"])
    trained, *_ = load_trained_model(run)
    theirs = WanTransformer3DModel.from_config(export.diffusers_config(trained)).eval()
    x, text = torch.randn(1, 16, 2, 4, 8), torch.randn(1, 12, 16)
    with torch.no_grad():
        before = theirs(x, torch.tensor([500.0]), text).sample
        state = WanLoraLoaderMixin.lora_state_dict(str(tmp_path / "lora"))
        WanLoraLoaderMixin.load_lora_into_transformer(state, theirs)
        after = theirs(x, torch.tensor([500.0]), text).sample
    assert (after - before).abs().max() > 1e-3
