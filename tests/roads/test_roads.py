"""The fast part of the roads: no preset is forgotten, each small command is accepted, and one road is walked whole."""

import pytest

from tests import forking
from tests.launching import ROOT
from tests.roads.__main__ import walk
from tests.roads.roads import ROADS


def test_every_shipped_preset_has_a_road():
    shipped = {(path.parts[-3], path.stem) for path in ROOT.glob("*/configs/*.yaml")}
    walked = {(road.system, road.preset) for road in ROADS if road.script == "train.py"}
    assert walked == shipped
    first = {path.stem for path in ROOT.glob("float/configs/autoencoder/*.yaml")}
    assert {road.preset for road in ROADS if road.script == "train_autoencoder.py"} == first


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    forking.preload()
    return tmp_path_factory.mktemp("files")


@pytest.mark.slow
@pytest.mark.parametrize("road", [road for road in ROADS if road.ranks == 1], ids=lambda road: road.name)
def test_the_small_command_is_accepted(road, files, tmp_path):
    if road.system == "bagel" and not road.preset.startswith("small"):
        pytest.skip("its base is made by a run; python -m tests.roads does so")
    done = forking.run(*road.train(files, tmp_path / "out"), CHECK_ARGUMENTS="1")
    assert done.returncode == 0 and not (tmp_path / "out").exists(), done.stderr


@pytest.mark.slow
def test_one_road_is_walked_from_end_to_end(files, tmp_path):
    road = next(road for road in ROADS if road.name == "dit xl")
    found = walk(road, files, tmp_path)
    assert [name for name, fault in found if fault] == [], found
    parts = "plan train validate samples kill resume equal generate metrics".split()
    assert [name for name, _ in found] == [*parts, "generate on 2 ranks"]
