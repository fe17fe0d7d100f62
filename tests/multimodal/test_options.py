"""Settings that no preset gives: each one is seen to act."""

import json

import pytest
from PIL import Image

from tests.launching import losses
from tests.multimodal.small import run

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture
def alike(tmp_path):
    """Sixteen pictures of two captions, as `jsonl` below the folder."""
    folder = tmp_path / "data" / "jsonl"
    folder.mkdir(parents=True)
    rows = []
    for number in range(16):
        Image.new("RGB", (40, 30), (15 * number, 90, 240 - 15 * number)).save(folder / f"{number}.png")
        rows.append({"file": f"{number}.png", "captions": [("a warm colour", "a cold colour")[number % 2]]})
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder.parent


@pytest.mark.parametrize("cache", ["--gradient-cache", "--no-gradient-cache"])
@pytest.mark.parametrize("loss", [["siglip"], ["infonce", "--caption-drop", "0.4"]])
def test_mask_duplicates_makes_equal_captions_positives(alike, tmp_path, loss, cache):
    """InfoNCE's equal shares of the target sum up to the plain loss while equal captions have equal embeddings, so
    some of their words are left out.
    """
    first = {}
    for flag in ("--mask-duplicates", "--no-mask-duplicates"):
        flags = [
            "--stages",
            "2",
            "--max-steps",
            "1",
            "--grad-accum",
            "2",
            "--datasets",
            "jsonl",
            "--data-root",
            str(alike),
        ]
        run(tmp_path / flag, *flags, "--label-set", "none", "--contrastive-loss", *loss, cache, flag)
        first[flag] = losses(tmp_path / flag / "stage2_align")[1]
    assert abs(first["--no-mask-duplicates"] - first["--mask-duplicates"]) > 0.01
