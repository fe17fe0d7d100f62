"""Small data and models for the tests of BAGEL."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bagel.data.sources import ImageTransform
from bagel.data.tokenizer import ByteTokenizer
from bagel.dataset import UnifiedGenerationDataset
from bagel.packing import PackFormat

SAMPLE = Path(__file__).resolve().parents[2] / "bagel" / "sample_data" / "train.jsonl"
LAYOUT = PackFormat(ByteTokenizer.special, 4, 8, 4, 8, False, 2, 12)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with images/: a few small pictures in several modes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("apple", (200, 30, 30)), ("green", (30, 180, 40)), ("cat", (240, 160, 40))):
        image = Image.new("RGB", (40, 32), (255, 255, 255))
        image.paste(colour, (8, 8, 30, 28))
        image.save(folder / f"{name}.png")
    Image.new("RGBA", (20, 24), (10, 20, 200, 128)).save(folder / "glass.png")
    Image.new("RGB", (24, 24), (9, 9, 9)).quantize(4).save(folder / "palette.png")
    Image.new("RGB", (4000, 1), (1, 2, 3)).save(folder / "line.png")
    whole = (folder / "apple.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    return tmp_path


def open_dataset(path: Path, **settings) -> UnifiedGenerationDataset:
    """A dataset of bytes and of pictures of 16 to 32 pixels."""
    transform = ImageTransform(32, 16, 4)
    return UnifiedGenerationDataset(
        str(path),
        tokenizer=ByteTokenizer(),
        layout=LAYOUT,
        vae_transform=transform,
        vit_transform=transform,
        **{"max_sequence_length": 400, **settings},
    )


@pytest.fixture
def open_records(pictures: Path) -> Callable[..., UnifiedGenerationDataset]:
    """open_records(records, **settings): a dataset over a jsonl file of these records (strings are written as they
    are).
    """

    def make(records: list, **settings) -> UnifiedGenerationDataset:
        path = pictures / settings.pop("name", "data.jsonl")
        path.write_text(
            "".join(
                (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in records
            ),
            encoding="utf-8",
        )
        return open_dataset(path, **settings)

    return make


TINY = [
    "--config",
    "small_captions",
    "--set",
    "model.language.hidden_size=32",
    "--set",
    "model.language.intermediate_size=48",
    "--set",
    "model.language.num_hidden_layers=2",
    "--set",
    "model.language.num_attention_heads=4",
    "--set",
    "model.vision.hidden_size=32",
    "--set",
    "model.vision.intermediate_size=32",
    "--set",
    "model.vision.num_hidden_layers=1",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--logging-steps",
    "1",
    "--eval-steps",
    "1000",
    "--sample-records",
    "0",
    "--save-steps",
    "1000",
    "--num-epochs",
    "1",
]


@pytest.fixture(scope="session")
def tiny():
    """(settings, model) of a tiny small preset; tests that change the model copy it."""
    from tests.bagel.tiny import make_tiny

    return make_tiny()
