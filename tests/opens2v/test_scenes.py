"""The small preset's composed scenes: what is held out stays held out, and the measures count what they say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from opens2v import train
from opens2v.config import SAMPLE_DATA
from opens2v.data.scenes import UNSEEN, read_drawings, scene_set
from opens2v.dataset import training_set, validation_set
from opens2v.evaluation.preview import conditions_for
from opens2v.evaluation.scene_use import scene_figures
from shared.errors import UserError
from shared.media.pictures import as_rgb
from tests.opens2v.cases import QUICK, SCENES

SHEET = SAMPLE_DATA / "drawings.json"


@pytest.fixture(scope="module")
def config():
    return train.parse(["--config", "small"])


def test_drawings_and_combinations_are_held_out(config):
    trained, held, unseen = (scene_set(config, which) for which in ("train", "combinations", "subjects"))
    names = [drawing.name for drawing in read_drawings(SHEET)]
    assert len(names) == len(set(names)) == 416
    assert {one.name for one in unseen.scenes.drawings} == set(names[-UNSEEN:])
    assert not {one.name for one in trained.scenes.drawings} & set(names[-UNSEEN:])

    def words(dataset, place):
        scene = dataset.scene(place)
        return scene.objects, scene.ground, scene.motion

    seen = {words(trained, place) for place in range(1500)}
    assert not any(words(held, place) in seen for place in range(300)) and len(seen) > 1000


def test_a_sample_is_a_function_of_seed_and_number(config):
    one, again = training_set(config).sample(5, 3), training_set(config).sample(5, 3)
    assert one["prompts"] == again["prompts"] and torch.equal(one["frames"], again["frames"])
    assert one["frames"].shape == (3, 5, 32, 32) and one["frames"].dtype == torch.uint8
    assert one["ref_pixels"].shape == (1, 3, 28, 28) and one["ref_mask"].tolist() == [True]
    assert not torch.equal(one["frames"], training_set(config).sample(5, 4)["frames"])
    item = validation_set(config).sample(0, 0)
    assert item["subject_names"][0] in item["prompts"], "held-out captions keep the noun"


def test_subjects_start_half_a_cell_off_and_captions_say_where(config):
    dataset, places = scene_set(config, "train"), set()
    for number in range(200):
        scene, item = dataset.scene(number), dataset.sample(number, 0)
        (_, top, left), (_, *end) = (dataset.scenes._placed(scene, dataset.at(frame))[0] for frame in (0, 4))
        assert top % 4 == left % 4 == 2 and abs(end[0] - top) + abs(end[1] - left) == 4
        places.add((scene.motion, top, left))
        upright = scene.motion in ("up", "down")
        before, behind = ("on the left", "on the right") if upright else ("at the top", "at the bottom")
        assert item["prompts"].endswith(before if (left if upright else top) == 2 else behind)
        # The picture holds the same pixels as the first frame, as far off the cells: copying is moving whole cells.
        drawing = np.array(dataset.reference(scene))[2:-2, 2:-2]
        solid = dataset.scenes.mask(scene, dataset.at(0))[top : top + 24, left : left + 24] > 0.999
        assert np.abs(dataset.clip(scene)[0, top : top + 24, left : left + 24][solid] - drawing[solid]).max() <= 1
    assert len(places) == 8


def test_a_picture_that_a_user_gives_lies_in_its_canvas_as_those_of_training(config):
    dataset = scene_set(config, "subjects")
    scene = dataset.scene(0)
    given = Image.fromarray(dataset.scenes.drawings[scene.objects[0]].rgba)
    encoders = SimpleNamespace(conditions=lambda batch: batch)
    batch = conditions_for(config, encoders, ["a thing"], [[as_rgb(given)]])
    item = dataset.shown(scene, 0)
    assert (batch["ref_pixels"][0] - item["ref_pixels"]).abs().mean() < 0.02
    assert (batch["ref_pixels"][0, 0, :, [0, 1, -2, -1]] == 1).all() and batch["ref_mask"].tolist() == [[True]]


def test_true_clips_are_all_right_and_others_are_not(config):
    dataset = scene_set(config, "combinations")
    scenes = [dataset.scene(place) for place in range(8)]
    truth = np.stack([dataset.clip(scene) for scene in scenes])
    found = scene_figures(dataset, scenes, truth[None])
    for name in ("ground", "direction", "own_of_two", "own_of_eight"):
        assert found[f"{name}_percent"] == 100, name
    assert found["border_ratio"] == found["border_ratio_of_true_clips"] and found["squared_error"] == 0
    wrong = scene_figures(dataset, scenes, np.roll(truth, 1, 0)[None])
    assert wrong["own_of_eight_percent"] < 50 and wrong["ground_percent"] < 50
    grey = scene_figures(dataset, scenes, np.full_like(truth, 128)[None])
    assert grey["own_of_eight_percent"] < 60


def test_a_folder_of_pictures_and_what_is_none(tmp_path):
    for place in range(UNSEEN + 2):
        picture = Image.new("RGBA", (20, 20))
        picture.paste((200, 10 * place, 30, 255), (4, 4, 16, 16))
        picture.save(tmp_path / f"thing_{place}.png")
    (tmp_path / "._thing_0.png").write_bytes(b"what a Mac leaves beside a file")
    command = [*SCENES, "--scenes", str(tmp_path), "--base-steps", "1", "--total-steps", "1"]
    config = train.parse([*command, "--output-dir", str(tmp_path / "out")])
    assert scene_set(config, "train").sample(0, 0)["subject_names"][0].startswith("thing")
    (tmp_path / "thing_0.png").write_text("no picture")
    with pytest.raises(UserError, match="thing_0.png cannot be used"):
        train.main.__wrapped__([*command, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    sheet = tmp_path / "sheet.json"
    sheet.write_text(json.dumps({"names": ["a"]}))
    for path, message in (
        (tmp_path / "none.json", "not found"), (sheet, "no sheet of drawings"), (SAMPLE_DATA / "step0", "0 pictures"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_drawings(path)


def test_clips_that_are_given_win_over_the_presets_scenes():
    config = train.parse(["--config", "small", "--json-paths", "a.json", "--video-base-paths", "v"])
    assert config.data.scenes is None and config.data.json_paths == ["a.json"]


@pytest.mark.parametrize(
    "option", [["--only-keys", "cat"], ["--sample-stride", "2"], ["--use-bbox"], ["--recolour-probability", "0.5"]]
)
def test_a_choice_among_clips_is_refused_for_scenes(option):
    with pytest.raises(UserError, match=f"{option[0][2:].replace('-', '_')}: for clips alone.*give json_paths"):
        train.parse(["--config", "small", *option])
    train.parse([*QUICK, *option])
