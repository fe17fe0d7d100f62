"""A cache is never stale: what changed is encoded again and nothing else, what is damaged or differs is named."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from dit import precompute, train
from dit.data.cache import CachedDataset, content_of, finished, read_manifest
from dit.dataset import TextImageDataset
from shared.config import save_config
from shared.errors import UserError
from shared.log import read_metrics
from tests.dit.small import encoder_folder, picture, tiny


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the sample data, and settings that read a copy of it."""
    folder = tmp_path_factory.mktemp("cached")
    save_config(tiny(run={"device": "cpu"}), folder / "tiny.yaml")
    precompute.main(["--config", str(folder / "tiny.yaml"), "--out", str(folder / "cache"), "--shard-size", "120"])

    def opened(place) -> CachedDataset:
        return CachedDataset(tiny(data={"cache_dir": str(place), "flip": 1.0}))

    return folder / "cache", opened


@pytest.fixture
def own(tmp_path):
    """A folder of 24 pictures with captions; make(...) caches it, run(...) trains on it and gives the losses."""
    data = tmp_path / "data"
    for number in range(24):
        picture(data / f"{number:03d}.png", size=(40, 40), colour=(9 * number, 200, 30))
        (data / f"{number:03d}.txt").write_text(f"picture number {number}\nthe same in other words {number}")
    settings = tiny(
        run={"device": "cpu", "precision": "fp32"},
        data={"dataset_name": "custom", "dataset_path": str(data), "val_fraction": 0.2},
        training={"total_steps": 3, "batch_size": 4},
    )
    save_config(settings, tmp_path / "own.yaml")
    base, number = ["--config", str(tmp_path / "own.yaml")], iter(range(99))

    def make(*arguments: str) -> None:
        out = ["--out", str(tmp_path / "cache"), "--shard-size", "8", "--cache.dtype", "float32"]
        precompute.main([*base, *out, *arguments])

    def run(*arguments: str, cached: bool = True) -> list[dict]:
        where = ["--cache-dir", str(tmp_path / "cache")] if cached else []
        out = tmp_path / f"run{next(number)}"
        train.main([*base, *where, "--output-dir", str(out), *arguments])
        rows = read_metrics(out / "metrics.jsonl")
        return [{name: row[name] for name in ("train/loss", "val/loss") if name in row} for row in rows]

    return data, tmp_path / "cache", make, run


def encoded(output: str) -> tuple[int, int]:
    """Pictures and captions that the printed lines say were encoded."""
    lines = [line for line in output.splitlines() if line.startswith("shard ")]
    words = [line.replace(",", "").split() for line in lines]
    return (
        sum(int(row[row.index("encoded") - 1]) for row in words),
        sum(int(row[row.index("captions") - 1]) for row in words),
    )


def test_only_what_changed_is_encoded_again_and_losses_are_those_of_the_pictures(own, capsys):
    data, folder, make, run = own
    make()
    assert encoded(capsys.readouterr().out) == (24, 48)
    assert run() == run(cached=False)
    make()
    assert encoded(capsys.readouterr().out) == (0, 0)
    (data / "005.txt").write_text("quite another caption")
    with pytest.raises(SystemExit):  # the run sees it, and says what to do
        run()
    assert "005.png" in capsys.readouterr().err
    make()
    assert encoded(capsys.readouterr().out) == (0, 1)
    assert run() == run(cached=False)
    picture(data / "007.png", size=(40, 40), colour=(1, 2, 3))
    os.utime(data / "007.png", ns=(1, 1))
    make()
    assert encoded(capsys.readouterr().out) == (1, 0)
    assert run() == run(cached=False)
    (data / "000.png").unlink()
    picture(data / "100.png", size=(40, 40))
    (data / "100.txt").write_text("a new one")
    make()
    assert encoded(capsys.readouterr().out) == (1, 1)
    assert run() == run(cached=False)
    left = list(map(finished, folder.glob("shard_*.json")))
    assert None not in left and len(left) == len(read_manifest(folder)["shards"])  # nothing stale is left


def test_a_broken_picture_is_left_out_and_listed(own, capsys):
    data, folder, make, run = own
    (data / "003.png").write_bytes((data / "003.png").read_bytes()[:40])
    make()
    said = capsys.readouterr()
    assert "1 broken" in said.out and "003.png" in said.err
    assert "003.png" in (folder / "bad_samples.jsonl").read_text() and len(run()) == 4
    (data / "003.png").unlink()
    make()
    assert encoded(capsys.readouterr().out) == (0, 0) and not (folder / "bad_samples.jsonl").read_text()
    with pytest.raises(SystemExit):
        (data / "004.png").write_bytes(b"")
        make("--on-error", "raise")
    assert "004.png" in capsys.readouterr().err


def test_a_shard_whose_pictures_are_all_broken_is_empty(own):
    data, folder, make, run = own
    for number in range(8):
        (data / f"{number:03d}.png").write_bytes(b"no picture")
    make("--data.val_fraction", "0")
    cached = CachedDataset(tiny(data={"cache_dir": str(folder)}))
    assert len(cached) == 16 and cached.sample(0, 0)["image_id"] == "008.png"


def test_training_needs_no_pictures(own):
    data, folder, make, run = own
    make()
    before = run()
    shutil.rmtree(data)
    assert run() == before


@pytest.mark.parametrize(
    ("changed", "encodes"),
    [
        (["--crop", "resize"], (24, 0)),
        (["--use-bbox", "true", "--dataset-name", "custom"], None),
        (["--image-size", "48"], (24, 0)),
        (["--text-dim", "32"], (0, 48)),
    ],
)
def test_other_settings_are_other_keys(own, capsys, changed, encodes):
    _, _, make, run = own
    make()
    with pytest.raises(SystemExit):
        run(*changed)
    assert "data.cache_dir" in (said := capsys.readouterr().err) or "would change nothing" in said
    if encodes is not None:
        make(*changed)
        assert encoded(capsys.readouterr().out) == encodes


def test_content_is_what_files_hold_and_not_where_they_lie(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "vae" / "config.json").write_text("{}")
        (tmp_path / name / "vae" / "weights.safetensors").write_bytes(b"weights")
    assert content_of(str(tmp_path / "one"), "vae") == content_of(str(tmp_path / "two" / "vae"))
    (tmp_path / "two" / "vae" / "weights.safetensors").write_bytes(b"Weights")
    assert content_of(str(tmp_path / "one"), "vae") != content_of(str(tmp_path / "two"), "vae")
    for part in ("text_encoder", "tokenizer", "unet"):  # a pipeline: its parts decide, others do not
        (tmp_path / "pipe" / part).mkdir(parents=True)
        before = content_of(str(tmp_path / "pipe"), "text_encoder", "tokenizer")
        (tmp_path / "pipe" / part / "model.safetensors").write_bytes(b"new")
        assert (content_of(str(tmp_path / "pipe"), "text_encoder", "tokenizer") != before) is (part != "unet")
    alone = content_of(str(tmp_path / "pipe" / "unet" / "model.safetensors"), "vae")  # and the config next to one file
    (tmp_path / "pipe" / "unet" / "config.json").write_text('{"scaling_factor": 2}')
    assert content_of(str(tmp_path / "pipe" / "unet" / "model.safetensors"), "vae") != alone
    assert content_of("nobody/nothing") is None and content_of("a b c/!!") is None


def test_a_cache_spares_pictures_whose_captions_name_a_side(cache, tmp_path):
    folder, opened = cache
    shutil.copytree(folder, tmp_path / "cache")
    listing = next((tmp_path / "cache").glob("items_00000_*"))
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
        ("manifest.json", '{"version": 1, "shards": []}', "earlier version"),
        ("items_00000", '{"id": "a", "capt', "items_00000.*: cannot be read"),
        ("items_00001", "", "holds 0 items, 76 expected"),
        ("text_00000", "", "text_00000.*: cannot be read"),
        ("text_00001", None, "lacks item_index"),
    ],
)
def test_a_damaged_cache_is_named(cache, tmp_path, name, content, message):
    folder, opened = cache
    shutil.copytree(folder, tmp_path / "cache")
    place = next((tmp_path / "cache").glob(f"{name}*"))
    if content is None:
        shutil.copy(next((tmp_path / "cache").glob("latents_00001_*")), place)
    else:
        place.write_text(content)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "cache")


def test_a_fitted_codec_lies_in_the_cache(own, tmp_path):
    data, folder, make, run = own
    patches = ["--set", "vae.type=patches", "--set", "vae.patch=4", "--decoder-steps", "2", "--in-channels", "8"]
    run(*patches, cached=False)
    make(*patches, "--codec", str(tmp_path / "run0"))
    before = run(*patches)
    shutil.rmtree(data)
    shutil.rmtree(tmp_path / "run0")
    assert run(*patches) == before


def test_the_picture_is_seen_as_it_is_in_the_cache(cache):
    folder, opened = cache
    plain, held = TextImageDataset.from_config(tiny(data={"flip": 1.0}), is_train=True), opened(folder)
    assert held.fingerprint == plain.fingerprint and len(held) == len(plain)
    for index in (0, 60, 150):
        one, other = plain.sample(index, 3), held.sample(index, 3)
        assert (one["flip"], one["image_id"]) == (other["flip"], other["image_id"])
    assert torch.is_tensor(held.sample(0, 0)["moments"]) and Image.open(plain.items[0].image).size


def test_features_to_align_with_are_cached_and_told_by_their_encoder(own, tmp_path, capsys):
    _, folder, make, run = own
    words = ["--encoder-path", encoder_folder(tmp_path / "dino"), "--align-layer", "1", "--align-hidden", "8"]
    make()
    with pytest.raises(SystemExit):
        run(*words)
    assert "feature_content is None" in capsys.readouterr().err
    make(*words)
    pictures = run(*words, cached=False)
    shutil.move(tmp_path / "dino" / "model.safetensors", tmp_path / "kept")  # training opens no encoder
    with pytest.raises(SystemExit):
        run(*words)
    assert "feature_content" in capsys.readouterr().err  # as it sees that it changed
    shutil.move(tmp_path / "kept", tmp_path / "dino" / "model.safetensors")
    found = run(*words)
    assert all(a[name] == pytest.approx(b[name], rel=1e-5) for a, b in zip(found, pictures, strict=True) for name in b)
    assert run(*words, "--route-share", "0.5", "--route-start", "0", "--route-end", "1")
    capsys.readouterr()
    make(*words)
    assert encoded(capsys.readouterr().out) == (0, 0)
    assert len(run()) == len(found)  # the latents serve a run without it
