"""The first step of every training reads no number from the device, so on a GPU the host runs ahead of it."""

from pathlib import Path

import pytest

from tests.launching import run

TRAININGS = [
    ("bagel", 0),
    ("dit", 0),
    ("dit", 1),
    ("float", 0),
    ("float", 1),
    *(("multimodal", stage) for stage in range(3)),
]
TRAININGS += [("opens2v", 0), ("opens2v", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("system, number", TRAININGS)
def test_a_step_reads_no_number_from_the_device(tmp_path, system, number):
    assert "no number was read" in run(1, Path(__file__).parent / "reading.py", system, number, tmp_path).stdout
