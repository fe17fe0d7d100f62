"""A cache that is damaged is named; what it holds is mirrored only where no caption names a side."""

import json
import shutil

import pytest

from dit import precompute
from dit.data.cache import CachedDataset
from dit.dataset import TextImageDataset
from shared.config import save_config
from shared.errors import UserError
from tests.dit.small import tiny


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the sample data, and settings that read a copy of it."""
    folder = tmp_path_factory.mktemp("cached")
    save_config(tiny(run={"device": "cpu"}), folder / "tiny.yaml")
    precompute.main(["--config", str(folder / "tiny.yaml"), "--out", str(folder / "cache"), "--shard-size", "120"])

    def opened(place) -> CachedDataset:
        config = tiny(data={"cache_dir": str(place), "flip": 1.0})
        return CachedDataset(config, TextImageDataset.from_config(config, is_train=True))

    return folder / "cache", opened


def test_a_cache_spares_pictures_whose_captions_name_a_side(cache, tmp_path):
    folder, opened = cache
    shutil.copytree(folder, tmp_path / "cache")
    listing = tmp_path / "cache" / "items_00000.jsonl"
    items = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    items[3]["captions"] = ["an arrow to the left", "a bird"]
    listing.write_text("".join(json.dumps(item) + "\n" for item in items))
    flips = [opened(tmp_path / "cache").sample(index, 0)["flip"] for index in (2, 3, 4)]
    assert flips == [True, False, True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "[]", "no manifest"),
        ("manifest.json", '{"shards": []}', "no manifest"),
        ("items_00000.jsonl", '{"id": "a", "capt', "items_00000.jsonl: cannot be read"),
        ("items_00001.jsonl", "", "holds 0 items, 76 expected"),
        ("text_00000.safetensors", "", "text_00000.safetensors: cannot be read"),
        ("text_00001.safetensors", None, "lacks item_index"),
    ],
)
def test_a_damaged_cache_is_named(cache, tmp_path, name, content, message):
    folder, opened = cache
    shutil.copytree(folder, tmp_path / "cache")
    if content is None:
        shutil.copy(tmp_path / "cache" / "latents_00001.safetensors", tmp_path / "cache" / name)
    else:
        (tmp_path / "cache" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "cache")
