"""The smallest folder of each system, as the README's table "Your own data" shows it, and the table's command on it."""

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launching import ROOT, losses

pytestmark = pytest.mark.slow
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def pictures(folder: Path, count: int) -> list[str]:
    """Cards of one colour with a dark border as NUMBER.png; what each shows."""
    folder.mkdir(parents=True)
    captions = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        card = np.full((80, 100, 3), colour, np.uint8)
        card[: 1 + number % 20], card[:, :3] = 0, 0
        Image.fromarray(card).save(folder / f"{number}.png")
        captions.append(f"a {name} card, number {number}")
    return captions


def of_float(place: Path) -> None:
    sample = ROOT / "float" / "sample_data"
    for split, clip in (("train/anna/one", "th001"), ("test/anna/two", "th002")):
        target = place / "datasets" / f"{split}_processed.mp4"
        target.parent.mkdir(parents=True)
        shutil.copy(sample / "video" / f"{clip}.mp4", target)
        shutil.copy(sample / "audio" / f"{clip}.wav", target.with_suffix(".wav"))


def of_opens2v(place: Path) -> None:
    sample = ROOT / "opens2v" / "sample_data"
    shutil.copy(next((sample / "step5" / "merge_final_json").glob("*.json")), place / "PART.json")
    shutil.copytree(next((sample / "step0" / "videos").iterdir()), place / "videos" / "PART")
    shutil.copytree(next((sample / "step5" / "final_output").glob("*/foreground")), place / "foreground")


def of_bagel(place: Path) -> None:
    rows = [
        {"text_prompt": text, "image_path": f"cards/{number}.png"}
        for number, text in enumerate(pictures(place / "cards", 8))
    ]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def of_dit(place: Path) -> None:
    for number, text in enumerate(pictures(place / "pictures", 12)):
        (place / "pictures" / f"{number}.txt").write_text(text)


def of_multimodal(place: Path) -> None:
    texts = pictures(place / "captions", 12)
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        rows = [{"file": f"{number}.png", "captions": [texts[number]]} for number in numbers]
        (place / "captions" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


MADE: dict[str, Callable[[Path], None]] = {
    "float": of_float, "opens2v": of_opens2v, "bagel": of_bagel, "dit": of_dit, "multimodal": of_multimodal,
}  # fmt: skip


@pytest.mark.parametrize("system", MADE)
def test_the_command_trains_on_the_smallest_folder(system, tmp_path, monkeypatch):
    table = (ROOT / "README.md").read_text().split("## Your own data")[1].split("\n## ")[0]
    row = re.search(rf"^\| {system} \|.*`python {system}/train\.py (.*)` \|$", table, re.M)
    assert row is not None
    MADE[system](tmp_path)
    monkeypatch.chdir(tmp_path)
    train = importlib.import_module(f"{system}.train")
    train.main(
        [*shlex.split(row[1]), "--output-dir", "run", "--batch-size", "4", "--max-steps", "2", "--device", "cpu"]
    )
    found = {step: loss for path in Path("run").rglob("metrics.jsonl") for step, loss in losses(path.parent).items()}
    assert found and all(np.isfinite(loss) for loss in found.values())
    assert list(Path("run").rglob("*.safetensors"))
