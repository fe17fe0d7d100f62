"""The first step of every training reads no number from the device and, once the batch was moved, copies nothing there
that the host waits for: on a GPU it runs ahead.
"""

from pathlib import Path

import pytest

from tests.launching import run

# phases of small in their order: an autoencoder first in all but multimodal, which has three stages
PHASES = {"bagel": 3, "dit": 2, "float": 2, "multimodal": 3, "opens2v": 3}
TRAININGS = [(system, phase) for system, count in PHASES.items() for phase in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("system, number", TRAININGS)
def test_a_step_reads_no_number_from_the_device(tmp_path, system, number):
    said = run(1, Path(__file__).parent / "reading.py", system, number, tmp_path).stdout
    assert "no number was read" in said and "blocking copies: 0" in said, said
