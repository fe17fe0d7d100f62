"""Scenes: what is trained and what never is, a record for each task, the autoencoder's phase, the counted figures."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bagel import generate, metrics
from bagel.config import PRESETS, AutoencoderConfig, Config, SceneConfig
from bagel.data.scenes import SCENES, UNSEEN, SceneFile, World
from bagel.data.tokenizer import load_tokenizer
from bagel.dataset import open_dataset
from bagel.evaluation.scenes import CHANGES, scene_bars
from bagel.modules.vision import ConvAutoencoder, build_autoencoder
from bagel.objective import with_latents
from bagel.packing import Dropout, make_collate
from bagel.train import main
from bagel.weights import phases
from bagel.weights.pretrained import build_model
from shared.config import load_config
from shared.engine.dist import DistInfo
from shared.errors import UserError
from shared.loop import FitResult

SIZES = """language.hidden_size=32 language.intermediate_size=48 language.num_hidden_layers=1
language.num_attention_heads=2 language.num_key_value_heads=2 vision.hidden_size=32 vision.intermediate_size=32
vision.num_hidden_layers=1 autoencoder.steps=4 vision_steps=4"""
SMALL = ["--config", "small", "--device", "cpu", "--sample-records", "0", "--set", "training.validation_records=4"]
SMALL += [word for size in SIZES.split() for word in ("--set", f"model.{size}")]


def sets(**changes):
    config = load_config(Config, presets=PRESETS, argv=["--config", "small"])
    config.data.scenes = config.data.scenes.model_copy(update=changes)
    tokenizer = load_tokenizer(config.model)
    return [open_dataset(config, config.model, tokenizer, path) for path in ("scenes", UNSEEN)]


def test_combinations_that_are_kept_back_are_never_trained():
    """Neither drawn, nor looked at, nor the outcome of an edit, in any epoch."""
    trained, held_out = (dataset.records.sources[0] for dataset in sets())
    scenes = trained.world.scenes
    for number in range(0, 9 * SCENES, 37):
        before, _, _, after = trained.world.edit(number, unseen=False)
        assert not any(scenes.is_unseen(scene) for scene in (trained.scene(number), before, after))
    for number in range(60):
        assert scenes.is_unseen(held_out.scene(number)) and scenes.is_unseen(
            held_out.world.edit(number, unseen=True)[3]
        )


def test_every_task_comes_as_often_as_asked_and_changes_with_the_epoch():
    dataset = sets(draw=0.5, ask=0.5, edit=0.0, talk=0.0)[0]
    kinds = dataset.describe()["formats"]
    assert set(kinds) == {"text_to_image", "conversation"} and abs(kinds["text_to_image"] / SCENES - 0.5) < 0.05
    first, again, later = (dataset.sample(3, epoch) for epoch in (0, 0, 1))
    assert [item.ids for item in first["items"]] == [item.ids for item in again["items"]]
    assert [item.ids for item in first["items"]] != [item.ids for item in later["items"]]
    assert dataset.room(3, 1) == dataset.length(3, 1) and not dataset.errors
    known = dataset.sample(3, 1)  # what told its length is not made again
    assert all(
        one.ids == other.ids and (one.image is None or torch.equal(one.image, other.image))
        for one, other in zip(known["items"], later["items"], strict=True)
    )


@pytest.mark.parametrize("task, items", [("draw", "tn"), ("ask", "v(tt){1,4}"), ("edit", "cvtn"), ("talk", "tncvtttn")])
def test_what_a_task_gives_and_learns(task, items):
    dataset = sets(**{name: float(name == task) for name in ("draw", "ask", "edit", "talk")})[0]
    letters = {"text": "t", "vit_image": "v"}
    for index in range(4):
        plan = dataset.plan(index, 0)
        found = "".join(letters.get(item.type) or ("n" if item.loss else "c") for item in plan)
        assert re.fullmatch(items, found), found


def test_no_answer_can_be_copied_from_what_was_said_before():
    """Else an answer is learned without a look at the picture."""
    source = sets(draw=0.0, ask=1.0, edit=0.0, talk=0.0)[0].records.sources[0]
    for place in range(64):
        said = ""
        for turn in source.read(place)["conversations"][1:]:
            if turn["role"] == "assistant":
                is_choice = turn["content"] in ("small", "large")  # the question names both
                assert is_choice or not re.search(rf"\b{turn['content']}\b", said), (turn, said)
            said += f" {turn['content']}"


def test_copies_of_a_picture_have_noise_and_time_of_their_own_and_are_encoded_once():
    config = load_config(Config, presets=PRESETS, argv=["--config", "small"])
    config.data.scenes = config.data.scenes.model_copy(update={"draw": 1.0, "ask": 0.0, "edit": 0.0, "talk": 0.0})
    one, three = (open_dataset(config, config.model, load_tokenizer(config.model), "scenes", copies=n) for n in (1, 3))
    assert three.describe()["targets"]["images"] == one.describe()["targets"]["images"]
    pack = make_collate(three.layout, Dropout(), 1)([three.sample(0, 0)])
    assert pack["sample_lens"] == [three.room(0, 0)] and pack["attn_modes"] == ["causal", "noise", "noise", "noise"]
    assert [image is None for image in pack["vae_images"]] == [False, True, True]
    times, noise = (pack[name].unflatten(0, (3, -1)) for name in ("packed_timesteps", "packed_noise"))
    assert len(times[:, 0].unique()) == 3 and (noise[0] - noise[1]).abs().min() > 0
    latents = with_latents(pack, build_autoencoder(config.model.autoencoder), config.model)["packed_latents"]
    assert torch.equal(*latents.unflatten(0, (3, -1))[:2])


def test_answers_follow_from_the_scene():
    world = World(SceneConfig(), 0)
    scene = world.scenes.scene(0)._replace(ground="purple", size="small", place="top left")
    name = world.scenes.name(scene)
    assert world.question(scene, "what") == ("what is in the picture?", name)
    assert world.question(scene, "where")[1] == "top left" and world.question(scene, "colour")[1] == "purple"
    assert world.is_described(scene, world.scenes.sentence(scene, 77))
    assert not world.is_described(scene, world.scenes.sentence(scene._replace(ground="red"), 77))
    for number in range(30):
        before, what, told, after = world.edit(number, unseen=False)
        differ = [
            kind for kind in ("objects", "ground", "place", "size") if getattr(before, kind) != getattr(after, kind)
        ]
        assert differ == ["objects" if what == "object" else what] and told and before.shifts == after.shifts


@pytest.mark.parametrize("fault", ["missing", "list", "one"])
def test_drawings_that_cannot_be_used_are_named(tmp_path, fault):
    path = tmp_path / "d.json"
    if fault != "missing":
        path.write_text(json.dumps([1] if fault == "list" else {"a.png": "a"}))
    with pytest.raises(UserError, match="d.json"):
        SceneFile("scenes", SceneConfig(drawings=str(path)), 0)
    with pytest.raises(UserError, match="give scenes"):
        SceneFile("scenes:other", SceneConfig(), 0)


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_the_autoencoder_settles_to_unit_variance(downsample):
    torch.manual_seed(0)
    config = AutoencoderConfig(kind="conv", ch=32, downsample=downsample, z_channels=6)
    autoencoder, images = ConvAutoencoder(config), torch.rand(8, 3, 32, 32) * 2 - 1
    autoencoder.settle(images)
    latents = autoencoder.encode(images)
    assert latents.shape == (8, 6, 32 // downsample, 32 // downsample)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert autoencoder.decode(latents).shape == images.shape
    with pytest.raises(ValueError, match="must be 2, 4, 8"):
        AutoencoderConfig(kind="conv", downsample=3)


def given_to_a_phase(monkeypatch, tmp_path, dataset, phase: str, rank: int, world: int) -> list[torch.Tensor]:
    """What a rank's first step of a phase is given: pictures, noise and its spread; pictures and words."""
    given = []

    def one_step(*, model, stream, losses, config, **others):
        def call(*inputs):
            given.extend(inputs)
            return (inputs[0], inputs[1]) if len(inputs) > 1 else model(inputs[0])

        stream.start(0, None)
        batches = stream.next_step()
        list(losses(call, batches, 0))
        given.extend(batch["words"] for batch in batches if "words" in batch)
        return FitResult(0, False, "a test", {}, None, None)

    monkeypatch.setattr(phases, "fit", one_step)
    config = load_config(Config, presets=PRESETS, argv=["--config", "small", "--output-dir", str(tmp_path)])
    info = DistInfo(rank=rank, world=world)
    with pytest.raises(UserError, match="stopped at step 0 of"):
        if phase == "tower":
            phases.prepare_tower(config, config.model, build_model(config.model), dataset, info)
        phases.train_autoencoder(config, config.model, dataset, info)
    return given


@pytest.mark.parametrize("phase, values", [("autoencoder", 3), ("tower", 2)])
def test_two_ranks_give_a_phase_what_one_rank_does(monkeypatch, tmp_path, phase, values):
    """Pictures, noise, spread and words belong to a sample's place in the step, whoever computes it."""
    dataset = sets()[0]
    whole = given_to_a_phase(monkeypatch, tmp_path, dataset, phase, 0, 1)
    halves = [given_to_a_phase(monkeypatch, tmp_path, dataset, phase, rank, 2) for rank in (0, 1)]
    assert len(whole) == values and len(whole[0].unique(dim=0)) == 16
    for value, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(value, torch.cat(parts))


def test_phases_without_pictures_of_their_kind(monkeypatch, tmp_path, capsys):
    """The autoencoder cannot do without them; the tower starts from random weights then."""
    draw, ask = (
        sets(**{name: float(name == task) for name in ("draw", "ask", "edit", "talk")})[0] for task in ("draw", "ask")
    )
    config, info = (
        load_config(Config, presets=PRESETS, argv=["--config", "small", "--output-dir", str(tmp_path)]),
        DistInfo(),
    )
    with pytest.raises(UserError, match="no record draws a picture"):
        phases.train_autoencoder(config, config.model, ask, info)
    monkeypatch.setattr(phases, "fit", None)
    phases.prepare_tower(config, config.model, build_model(config.model), draw, info)
    assert "nothing is said about a picture" in capsys.readouterr().out


def test_the_tower_learns_what_is_said_about_a_picture_it_looks_at():
    dataset = sets(draw=0.5, ask=0.5, edit=0.0, talk=0.0)[0]
    pictures, source = phases.Pictures(dataset, "vit_image"), dataset.records.sources[0]
    for place in range(8):
        number = SCENES + pictures.indices[place]
        scene, found = source.scene(number), pictures.sample(place, 1)
        said = [turn.get("content") for turn in source.read(pictures.indices[place], 1)["conversations"]]
        ids = dataset.tokenizer.encode(scene.ground)
        assert scene.ground not in said or found["words"][ids].min() > 0
        assert found["words"].sum().item() == pytest.approx(1) and found["image"].shape == (3, 32, 32)


@pytest.mark.slow
def test_a_stop_in_the_autoencoders_phase_goes_on_to_the_same(tmp_path, capsys):
    """Stopped by the time limit, or cut short by --max-steps before anything was trained on it."""
    straight, broken = ([*SMALL, "--output-dir", str(tmp_path / name)] for name in ("straight", "broken"))
    main([*straight, "--total-steps", "1"])
    with pytest.raises(SystemExit) as stopped:
        main([*broken, "--total-steps", "1", "--time-limit-minutes", "1e-9"])
    assert stopped.value.code == 0 and "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "broken" / "autoencoder.safetensors").exists()
    main([*broken, "--total-steps", "1", "--max-steps", "2"])
    shutil.rmtree(tmp_path / "broken" / "checkpoints")
    main([*broken, "--total-steps", "1"])
    one, two = (load_file(tmp_path / name / "autoencoder.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_run_of_scenes_trains_resumes_exports_and_is_counted(tmp_path, capsys):
    """The autoencoder comes first, once; the same command goes on; the exported folder draws what the run draws."""
    main([*SMALL, "--output-dir", str(tmp_path / "a"), "--max-steps", "3"])
    first = (tmp_path / "a" / "autoencoder.safetensors").read_bytes()
    for phase in ("autoencoder", "tower"):  # --max-steps bounds the phases too
        assert (tmp_path / "a" / phase / "DONE").read_text() == "3\n"
    main([*SMALL, "--output-dir", str(tmp_path / "a"), "--max-steps", "5"])
    assert (tmp_path / "a" / "autoencoder.safetensors").read_bytes() == first
    said = capsys.readouterr().out
    assert "had 3 of 4 steps" in said and said.count("the vision tower is trained first") == 1
    drawn = []
    for name in ("a", "a/model"):
        flags = ["--checkpoint", str(tmp_path / name), "--prompt", "a small dog at the top left on a red ground"]
        generate.main([*flags, "--output", str(tmp_path / "x.png"), "--num-timesteps", "3", "--device", "cpu"])
        drawn.append((tmp_path / "x.png").read_bytes())
    assert drawn[0] == drawn[1]
    metrics.main(["--checkpoint", str(tmp_path / "a"), "--scenes", "4", "--max-records", "4", "--device", "cpu"])
    figures = json.loads((tmp_path / "a" / "metrics.json").read_text())
    wanted = {f"answer_{kind}" for kind in ("what", "where", "colour", "size")} | {
        "edit_changed",
        "edit_kept",
        "described",
    }
    wanted |= {f"drawn_{kind}_right" for kind in CHANGES} | {"drawn_border_over_true", "text_loss", "image_ratio"}
    assert wanted <= figures.keys() and all(0 <= figures[name] <= 1 for name in wanted if "right" in name)
    assert (
        len(scene_bars(figures)) == 12
        and "user: what is in the picture?" in (tmp_path / "a" / "report.html").read_text()
    )


def test_pictures_of_scenes_are_those_of_the_truth():
    dataset = sets(draw=1.0, ask=0.0, edit=0.0, talk=0.0)[1]
    source = dataset.records.sources[0]
    image = dataset.sample(5, 0)["items"][1].image
    assert np.array_equal(
        ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), source.world.scenes.picture(source.scene(5))
    )
