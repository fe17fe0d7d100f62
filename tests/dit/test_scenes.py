"""Scenes as the data of a run: drawings read from folders, the autoencoder's phase, figures and the grid."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dit import generate, metrics, train
from dit.config import PRESETS, Config, DataConfig
from dit.data.scenes import SceneDataset, read_drawings
from dit.dataset import TextImageDataset
from dit.evaluation.scenes import scene_bars, scene_grid
from dit.modules.autoencoder import ConvAutoencoder
from dit.modules.text import HashTextEncoder
from shared.config import load_config, save_config
from shared.errors import UserError
from shared.log import read_metrics
from shared.media.scene_scores import truth_pictures
from tests import launching
from tests.dit.small import picture, tiny

SCENES = {"dataset_name": "scenes", "dataset_path": "sample", "drawings": 8, "image_size": 16}
PARTS = {
    "data": SCENES,
    "vae": {"type": "conv", "patch": 4, "codec_steps": 4, "width": 8},
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "patch_size": 1, "in_channels": 4, "text_dim": 16},
}


def dataset(*, is_train: bool = True, **settings) -> SceneDataset:
    settings = {"dataset_name": "scenes", "dataset_path": "sample", "drawings": 8, "image_size": 16, **settings}
    return SceneDataset(DataConfig(**settings), is_train=is_train)


@pytest.fixture
def settings(tmp_path):
    """A file with the tiny settings of scenes, and the arguments that use it."""
    config = tiny(run={"output_dir": str(tmp_path / "out"), "device": "cpu"}, **PARTS).model_dump(mode="json")
    config["data"].pop("keep_in_memory"), config["data"].pop("flip_guard")
    save_config(Config.model_validate(config), tmp_path / "tiny.yaml")
    return ["--config", str(tmp_path / "tiny.yaml")]


def test_training_scenes_never_repeat_and_held_out_ones_never_change():
    trained, held_out = dataset(), dataset(is_train=False)
    texts = {
        trained.sample(index, epoch)["text"] + str(trained.truth(index, epoch))
        for index in range(50)
        for epoch in (0, 1)
    }
    assert len(texts) == 100
    assert held_out.sample(3, 0)["text"] == held_out.sample(3, 9)["text"] == held_out.items[3].captions[0]
    assert all(held_out.scenes.is_unseen(held_out.truth(index)) for index in range(50))
    assert not any(trained.scenes.is_unseen(trained.truth(index, 2)) for index in range(50))
    sample = trained.sample(0, 0, flip=True)
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.uint8 and sample["flip"] is False


def test_a_run_opens_scenes_by_the_usual_name():
    config = Config.model_validate({"data": SCENES, "vae": {"type": "pool"}})
    assert isinstance(TextImageDataset.from_config(config, is_train=True), SceneDataset)
    with pytest.raises(UserError, match="from_config"):
        TextImageDataset("scenes", "sample")


def test_few_drawings_are_of_many_kinds_and_follow_their_names():
    drawings, _ = read_drawings(DataConfig(**SCENES), dataset().root)
    more, _ = read_drawings(DataConfig(**{**SCENES, "drawings": 16}), dataset().root)
    assert [drawing.name for drawing in more][:8] == [drawing.name for drawing in drawings]
    other, _ = read_drawings(DataConfig(**{**SCENES, "subset_seed": 1}), dataset().root)
    assert {drawing.name for drawing in other} != {drawing.name for drawing in drawings}


def test_drawings_of_a_folder_of_ones_own(tmp_path):
    for number in range(4):
        image = Image.new("RGB", (32, 32), "white")
        image.paste((50 * number, 90, 200), (8, 8, 24, 24))
        image.save(tmp_path / f"{number}.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "blank.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [{"file": f"{number}.png", "captions": [f"A box {number % 3}.", "more"]} for number in range(4)]
    rows += [{"file": "blank.png", "text": "a ghost"}, {"file": "broken.png", "text": "a ruin"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    drawings, skipped = read_drawings(DataConfig(dataset_name="scenes"), tmp_path)
    assert sorted(drawing.name for drawing in drawings) == ["box 0", "box 1", "box 2"]
    reasons = dict(skipped)
    assert "there already" in reasons["3.png"] and "nothing but ground" in reasons["blank.png"]
    assert "not a readable picture" in reasons["broken.png"]


def test_a_folder_without_drawings_is_refused(tmp_path):
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a thing\n")
    Image.new("RGB", (20, 20), "white").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no drawing with a caption"):
        dataset(dataset_path=str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        dataset(dataset_path=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--flip", "0.7"], "contradict its sentence"),
        (["--num-samples", "9"], "data.drawings"),
        (["--crop", "random"], "composed at their size"),
        (["--cache-dir", "x"], "composed anew"),
        (["--val-fraction", "0.2"], "unseen_share"),
        (["--set", "vae.patch=3"], "power of two"),
        (["--set", "data.scene_kinds=[]"], "scene_kinds is empty"),
        (["--image-size", "30"], "multiple of 4"),
    ],
)
def test_what_does_nothing_with_scenes_is_refused(flags, wanted, capsys):
    with pytest.raises((SystemExit, UserError)) as stopped:
        load_config(Config, presets=PRESETS, argv=["--config", "small", *flags])
    assert wanted in str(stopped.value) + capsys.readouterr().err


def test_the_autoencoder_learns_and_its_latents_have_variance_one():
    torch.manual_seed(0)
    codec, images = ConvAutoencoder(channels=4, factor=4, width=8), truth_images(64)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    nothing, before = torch.zeros(64, 4, 4, 4), None
    for _ in range(120):
        decoded, latents = codec(images, nothing, torch.zeros(64))
        loss = (decoded - images).square().mean()
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * before
    codec.fit(images, seed=0)
    latents = codec.encode(images)
    assert latents.shape == (64, 4, 4, 4) and latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.equal(codec.latents(codec.moments(images)), latents) and not codec.encoder[1].weight.requires_grad


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_autoencoder_halves_as_often_as_asked(factor):
    codec = ConvAutoencoder(channels=6, factor=factor, width=8)
    latents = codec.encode(torch.zeros(2, 3, 32, 48))
    assert latents.shape == (2, 6, 32 // factor, 48 // factor) and codec.decode(latents).shape == (2, 3, 32, 48)


def test_noise_on_the_way_to_the_decoder_is_relative_to_the_sample():
    torch.manual_seed(0)
    codec, images = ConvAutoencoder(channels=4, factor=4, width=8), truth_images(8)
    seen = []
    codec.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    _, latents = codec(images, torch.ones(8, 4, 4, 4), torch.full((8,), 0.3))
    added = (seen[0] - latents).flatten(1).mean(1)
    assert torch.allclose(added, 0.3 * latents.detach().flatten(1).std(1), rtol=1e-4)


def test_order_of_words_counts_only_with_context():
    one, other = "a cat left of a dog", "a dog left of a cat"
    for context in (False, True):
        encoder = HashTextEncoder(width=64, length=12, context=context)
        found = encoder.encode([one, other])
        assert torch.allclose(found.states[0, 1], found.states[1, 5]) is not context
        assert torch.allclose(found.pooled[0], found.pooled[1], atol=1e-5)
        alone = encoder.encode([one])
        assert torch.equal(alone.states[0], found.states[0])  # a caption's states do not depend on its neighbours


def test_a_run_trains_the_autoencoder_first_and_resumes_inside_either_phase(settings, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train.main([*settings, "--output-dir", str(straight)])
    whole = (straight / "autoencoder.safetensors").read_bytes()
    assert (straight / "autoencoder" / "DONE").exists() and list((straight / "autoencoder" / "samples").glob("*.png"))
    assert any("val/psnr" in row for row in read_metrics(straight / "autoencoder" / "metrics.jsonl"))
    for limit in ("1e-9", "1e-9", None):  # each call is stopped after a step or so
        arguments = [*settings, "--output-dir", str(broken)]
        if limit is None:
            train.main(arguments)
            break
        with pytest.raises(SystemExit) as stopped:
            train.main([*arguments, "--time-limit-minutes", limit])
        assert stopped.value.code == 0 and not (broken / "autoencoder.safetensors").exists()
    assert (broken / "autoencoder.safetensors").read_bytes() == whole
    (broken / "autoencoder.safetensors").unlink()  # as if the run had been killed between the phases
    train.main([*settings, "--output-dir", str(broken)])
    assert (broken / "autoencoder.safetensors").read_bytes() == whole
    name = "checkpoints/checkpoint-step-4/model.safetensors"
    assert (broken / name).read_bytes() == (straight / name).read_bytes()


def test_an_autoencoder_cut_short_is_said_and_trained_on_where_nothing_stands_on_it(settings, tmp_path, capsys):
    train.main([*settings, "--output-dir", str(tmp_path / "whole")])
    whole = (tmp_path / "whole" / "autoencoder.safetensors").read_bytes()
    out = tmp_path / "out"
    train.main([*settings, "--max-steps", "2"])
    assert "ends the autoencoder at step 2 of 4" in capsys.readouterr().err
    short = (out / "autoencoder.safetensors").read_bytes()
    train.main(settings)  # the run's checkpoints stand on the short one
    assert "2 of 4 steps" in capsys.readouterr().err
    assert (out / "autoencoder.safetensors").read_bytes() == short != whole
    train.main([*settings, "--resume", "none"])
    assert (out / "autoencoder.safetensors").read_bytes() == whole
    assert "steps" not in capsys.readouterr().err


def test_figures_and_grid_of_a_run(settings, tmp_path):
    out = tmp_path / "out"
    train.main([*settings])
    found = metrics.main(["--checkpoint", str(out), "--num", "16", "--metrics", "scenes,caption"])
    assert 0 <= found["scenes"]["ground_right"] <= 1 and found["scenes"]["pictures"] == 16
    report = json.loads((out / "report.json").read_text())
    assert report["samples"][0]["path"] == "samples/scenes.png"
    assert {bar["name"] for bar in report["bars"]} >= {"ground colour right", "place right", "no caption costs (%)"}
    generate.main(["--checkpoint", str(out), "--output", str(tmp_path / "made.png")])
    assert Image.open(tmp_path / "made.png").width > 60


def test_metrics_of_scenes_are_refused_for_pictures_that_are_not_composed(tmp_path, capsys):
    save_config(tiny(run={"output_dir": str(tmp_path / "out"), "device": "cpu"}), tmp_path / "tiny.yaml")
    train.main(["--config", str(tmp_path / "tiny.yaml")])
    with pytest.raises(SystemExit):
        metrics.main(["--checkpoint", str(tmp_path / "out"), "--metrics", "scenes"])
    assert "not composed" in capsys.readouterr().err


def test_true_scenes_reach_every_bar(tmp_path):
    held_out = dataset(is_train=False, image_size=32)
    truths = [held_out.truth(index) for index in range(32)]
    drawn = truth_pictures(held_out.scenes, truths)
    from dit.evaluation.scenes import scene_figures

    bars = scene_bars(held_out, scene_figures(held_out, drawn, 4), {"null_cost_percent": 12.0, "null_p": 1e-9})
    assert all(bar.reached for bar in bars) and len(bars) == 7
    sample = scene_grid(held_out, drawn, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(sample.path))
    assert np.array_equal(pixels[:96], pixels[102:198]) and "never trained" in sample.caption


def test_presets_of_scenes_are_whole():
    for name in ("small", "small_cub"):
        config = load_config(Config, presets=PRESETS, argv=["--config", name])
        assert config.data.dataset_name == ("scenes" if name == "small" else "cub")
    assert yaml.safe_load((PRESETS / "small_cub.yaml").read_text())["training"]["total_steps"] == 700


def truth_images(count: int) -> torch.Tensor:
    scenes = dataset().scenes
    pictures = truth_pictures(scenes, [scenes.scene(index) for index in range(count)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_train_both_phases_as_one(settings, tmp_path):
    arguments = [*settings, "--global-batch-size", "8", "--batch-size", "4", "--precision", "fp32"]
    train.main([*arguments, "--output-dir", str(tmp_path / "one")])
    wanted = load_file(tmp_path / "one" / "autoencoder.safetensors")
    last = "checkpoints/checkpoint-step-4/model.safetensors"
    for strategy in ("ddp", "fsdp", "zero3"):
        launching.run(2, "dit/train.py", *arguments, "--strategy", strategy, "--output-dir", str(tmp_path / strategy))
        found = load_file(tmp_path / strategy / "autoencoder.safetensors")
        for name, value in wanted.items():
            assert (value - found[name]).abs().max() <= 1e-4 * max(1.0, value.abs().max()), (strategy, name)
        one, two = (load_file(tmp_path / run / last) for run in ("one", strategy))
        for name, value in one.items():
            assert (value.float() - two[name].float()).abs().max() <= 1e-4 * max(1.0, value.float().abs().max()), name
