"""Every strategy on two ranks trains like one rank, also when one rank's samples miss a modality."""

import json
from pathlib import Path

import pytest

from tests.launching import losses, run
from tests.multimodal.small import QUICK

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
MICRO_BATCH, STEPS = 4, 3


def case(folder: Path, name: str, strategy: str, accumulation: int) -> dict:
    flags = f"--strategy {strategy} --stages 3 --batch-size {MICRO_BATCH} --grad-accum {accumulation}".split()
    flags += [*f"--max-steps {STEPS} --precision fp32 --epochs 3 --output-dir".split(), str(folder / name)]
    return {"what": "training", "flags": [*QUICK, *flags], "micro_batch": MICRO_BATCH}


def start(folder: Path, world: int, cases: list[dict]) -> None:
    path = folder / f"cases_{world}.json"
    path.write_text(json.dumps(cases))
    run(world, "tests/multimodal/ranks.py", str(path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    start(folder, 1, [case(folder, "one", "none", 4)])
    start(folder, 2, [case(folder, name, name, 2) for name in STRATEGIES])
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_give_the_losses_of_one(runs, strategy):
    expected, found = losses(runs / "one" / "stage3_finetune"), losses(runs / strategy / "stage3_finetune")
    assert len(expected) == len(found) == STEPS
    for step, value in expected.items():
        assert found[step] == pytest.approx(value, rel=2e-6 if step < STEPS else 1e-4), step
