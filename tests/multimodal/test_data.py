"""Every documented layout is read; broken files and tables end in a sentence or are skipped; augmentation is keyed."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from multimodal.config import PRESETS, Config
from multimodal.data.audio import compress, fit_frames, log_mel, read_audio, spec_augment
from multimodal.data.image import read_image
from multimodal.data.sources import open_data, read_records
from multimodal.data.text import TextTokenizer
from shared.config import load_config
from shared.errors import BadSample, UserError
from tests.multimodal.files import dataset, picture, wav

SAMPLE = Path(__file__).resolve().parents[2] / "multimodal" / "sample_data"


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer()


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,train,val,captions", [("coco", 160, 40, 5), ("clotho", 64, 16, 5), ("audiocaps", 32, 8, 1)]
)
def test_the_sample_data(name, train, val, captions):
    for split, count in (("train", train), ("val", val)):
        found = read_records(name, SAMPLE / name, split)
        assert len(found.records) == count and found.missing == 0
        assert len(found.records[0].captions) == (5 if split == "val" else captions)


def test_small_trains_on_all_of_the_sample_data_and_on_nothing_that_is_held_out():
    data = open_data(load_config(Config, presets=PRESETS, argv=["--config", "small"]))
    assert {kind: (len(data.train[kind]), len(data.val[kind])) for kind in data.kinds} == {
        "image": (160, 40),
        "audio": (96, 24),
    }
    train, val = (
        [record.source.read_bytes() for records in part.values() for record in records]
        for part in (data.train, data.val)
    )
    assert len({*train}) == len(train) == 256 and not {*train} & {*val}


def test_coco_labels_skip_the_gaps_of_the_category_ids(tmp_path):
    folder = tmp_path / "coco"
    for number in (7, 9, 12):
        picture(folder / "train2017" / f"{number:012d}.jpg")
    (folder / "annotations").mkdir()
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (12, 7, 9, 13)]
    captions = [{"image_id": image["id"], "caption": "a  dog\n runs "} for image in images]
    (folder / "annotations" / "captions_train2017.json").write_text(
        json.dumps({"images": images, "annotations": captions})
    )
    (folder / "annotations" / "instances_train2017.json").write_text(
        json.dumps(
            {
                "categories": [{"id": key, "name": str(key)} for key in (90, 1, 13)],
                "annotations": [
                    {"image_id": 7, "category_id": 90},
                    {"image_id": 7, "category_id": 1},
                    {"image_id": 7, "category_id": 90},
                ],
            }
        )
    )
    found = read_records("coco", folder, "train")
    assert [record.id for record in found.records] == [f"coco/{n:012d}" for n in (7, 9, 12)] and found.missing == 1
    assert (
        found.records[0].labels == (0, 2)
        and found.records[1].labels == ()
        and found.records[0].captions == ("a dog runs",)
    )


def test_karpathys_splits(tmp_path):
    picture(tmp_path / "coco" / "val2014" / "x.jpg")
    picture(tmp_path / "coco" / "train2017" / "000000000005.jpg")
    rows = [
        {"split": split, "filepath": place, "filename": name, "cocoid": key, "sentences": [{"raw": "one"}]}
        for split, place, name, key in (
            ("test", "val2014", "x.jpg", 4),
            ("restval", "val2014", "gone.jpg", 5),
            ("train", "a", "b.jpg", 6),
        )
    ]
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    train, test = (read_records("coco", tmp_path / "coco", split, karpathy=True) for split in ("train", "test"))
    assert [r.id for r in train.records] == ["coco/000000000005"] and train.missing == 1 and len(test.records) == 1


def test_audiocaps_accepts_all_names_and_counts_what_is_gone(tmp_path):
    folder = tmp_path / "audiocaps"
    rows = [("-ab", 30, "first"), ("-ab", 30, "second"), ("cd", 0, "x"), ("ef", 10, "y"), ("gone", 0, "z")]
    folder.mkdir()
    (folder / "train.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n"
        + "".join(f"{i},{key},{start},{text}\n" for i, (key, start, text) in enumerate(rows))
    )
    for name in ("audio/train/-ab_30.wav", "audio/train/cd.wav", "train/Yef.wav"):
        wav(folder / name)
    found = read_records("audiocaps", folder, "train")
    assert [record.captions for record in found.records] == [("first", "second"), ("x",), ("y",)] and found.missing == 1


def test_voxceleb_splits_and_speakers(tmp_path):
    folder = tmp_path / "voxceleb"
    for name in ("id10001/aa/00001.wav", "id10001/bb/00001.wav", "id10002/cc/00001.wav"):
        wav(folder / "wav" / name, 0.2)
    (folder / "iden_split.txt").write_text("1 id10001/aa/00001.wav\n2 id10001/bb/00001.wav\n3 id10002/cc/00001.wav\n")
    by_split = {split: read_records("voxceleb", folder, split).records for split in ("train", "val", "test")}
    assert [[r.labels for r in by_split[s]] for s in by_split] == [[(0,)], [(0,)], [(1,)]]
    config = Config(data={"data_root": str(tmp_path), "datasets": ["voxceleb"]})
    with pytest.raises(UserError, match="no videos.*label-set voxceleb1"):
        open_data(config)
    (folder / "iden_split.txt").write_text("4 id10001/aa/00001.wav\n")
    with pytest.raises(UserError, match="iden_split.txt"):
        read_records("voxceleb", folder, "train")


def test_json_lines_and_shards(tmp_path, tokenizer):
    picture(tmp_path / "jsonl" / "a.png")
    (tmp_path / "jsonl" / "train.jsonl").write_text(
        '{"file": "a.png", "captions": ["one", "two"], "labels": [3]}\n{"file": "b.png", "caption": "x"}\n'
    )
    found = read_records("jsonl", tmp_path / "jsonl", "train")
    assert found.missing == 1 and found.records[0].labels == (3,) and found.records[0].captions == ("one", "two")
    (tmp_path / "shards").mkdir()
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(8000) + 0.1, 16000, format="WAV")
    with tarfile.open(tmp_path / "shards" / "train-000.tar", "w") as archive:
        members = {
            "k1.png": (tmp_path / "jsonl" / "a.png").read_bytes(),
            "k1.json": b'{"captions": ["a cat"]}',
            "k2.wav": sound.getvalue(),
            "k2.txt": b"a hum\na low hum\n",
        }
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    records = read_records("shards", tmp_path / "shards", "train").records
    assert [(record.kind, record.captions) for record in records] == [
        ("image", ("a cat",)),
        ("audio", ("a hum", "a low hum")),
    ]
    items = dataset(records, tokenizer)
    assert items[0]["images"].shape == (3, 32, 32) and items[1]["audio"].shape == (64, 80)


@pytest.mark.parametrize(
    "content",
    [
        b"not json\n",
        b'{"file": "a.png"}\n',
        b'{"file": "a", "captions": [3]}\n',
        b'{"file": "a", "captions": [" "]}\n',
        b'{"file": "a", "caption": "caf\xe9"}\n',
        b"[1, 2]\n",
        b'{"file": "", "caption": "a", "labels": "cat"}\n{"file": "a.png", "caption": "a", "labels": [-1]}\n',
    ],
)
def test_broken_json_lines_name_the_line(tmp_path, content):
    picture(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_bytes(b"\n" + content)
    with pytest.raises(UserError, match="line [23]"):
        read_records("jsonl", tmp_path, "train")


def test_blank_captions_and_lines_are_passed_over(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_text('\n{"file": "a.png", "captions": ["", "one", "  "]}\n\n')
    assert read_records("jsonl", tmp_path, "train").records[0].captions == ("one",)
    (tmp_path / "development").mkdir()
    (tmp_path / "development" / "a.wav").touch()
    (tmp_path / "development" / "b.wav").touch()
    table = "file_name,caption_1,caption_2\na.wav,,two\nb.wav,\n"
    (tmp_path / "clotho_captions_development.csv").write_text(table)
    found = read_records("clotho", tmp_path, "train")
    assert [record.captions for record in found.records] == [("two",)] and found.missing == 1
    (tmp_path / "train.csv").write_text("audiocap_id,youtube_id,start_time,caption\n1,x,0,a\n2,y\n")
    with pytest.raises(UserError, match="row 3 has too few columns"):
        read_records("audiocaps", tmp_path, "train")


@pytest.mark.parametrize(
    "name,make,message",
    [
        ("coco", lambda folder: None, "download_datasets.py --datasets coco"),
        ("coco", lambda folder: (folder / "annotations").mkdir(parents=True), "captions_train2017.json"),
        ("clotho", lambda folder: folder.mkdir(), "clotho_captions_development.csv"),
        ("voxceleb", lambda folder: folder.mkdir(), "neither wav/ nor"),
    ],
)
def test_a_missing_part_is_named_with_its_remedy(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message):
        read_records(name, tmp_path / name, "train")


def test_broken_tables_are_named(tmp_path):
    (tmp_path / "clotho_captions_development.csv").write_text("name,caption_1\na,b\n")
    with pytest.raises(UserError, match="no column file_name"):
        read_records("clotho", tmp_path, "train")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train2017.json").write_text('{"images": [')
    with pytest.raises(UserError, match="not readable as JSON"):
        read_records("coco", tmp_path, "train")


def test_data_that_is_partly_there_is_used_and_noted(tmp_path):
    picture(tmp_path / "jsonl" / "a.png")
    picture(tmp_path / "jsonl" / "b.png")
    rows = [json.dumps({"file": name, "caption": name}) for name in ("a.png", "b.png")]
    (tmp_path / "jsonl" / "train.jsonl").write_text("\n".join(rows))
    data = open_data(Config(data={"data_root": str(tmp_path), "datasets": ["jsonl", "clotho"]}))
    assert data.kinds == ["image"] and any("clotho" in note for note in data.notes) and data.val["image"]
    with pytest.raises(UserError, match="none of the data sets"):
        open_data(Config(data={"data_root": str(tmp_path), "datasets": ["clotho"]}))
    with pytest.raises(UserError, match="no such folder.*download_datasets.py"):
        open_data(Config(data={"data_root": str(tmp_path / "nowhere")}))


# --- broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [np.zeros(0), np.array([0.1, np.nan, 0.2] * 900), np.array([np.inf] * 900)])
def test_bad_sound_is_a_bad_sample(tmp_path, data):
    soundfile.write(tmp_path / "a.wav", data, 16000, subtype="FLOAT")
    with pytest.raises(BadSample, match="a.wav"):
        read_audio(tmp_path / "a.wav")


def test_bad_pictures_are_bad_samples(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("cut.jpg", "text.jpg", "gone.jpg"):
        with pytest.raises(BadSample, match=name):
            read_image(tmp_path / name)
    Image.new("1", (20000, 5001)).save(tmp_path / "huge.png")
    with pytest.raises(BadSample, match="100,020,000|more than 100,000,000"):
        read_image(tmp_path / "huge.png")


@pytest.mark.parametrize("mode,suffix", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("LA", "png")])
def test_every_colour_mode_becomes_rgb(tmp_path, mode, suffix):
    assert read_image(picture(tmp_path / f"a.{suffix}", mode)).mode == "RGB"


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


# --- sound ------------------------------------------------------------------------------------------------------------


def test_sound_is_mixed_resampled_and_cut(tmp_path):
    full = read_audio(wav(tmp_path / "a.wav", 2.0, 44100, 2))
    assert abs(len(full) - 32000) <= 2
    spectrum = np.abs(np.fft.rfft(full[4000:20000] * np.hanning(16000)))
    assert spectrum.argmax() == 440 and spectrum[600:].max() < 1e-3 * spectrum.max()
    middle = read_audio(tmp_path / "a.wav", seconds=1.0, position=0.5)
    assert abs(len(middle) - 16000) <= 2


def test_short_clips_are_repeated_or_padded():
    clip = torch.rand(10, 80)
    repeated, mask = fit_frames(clip, 32)
    assert mask is None and torch.equal(repeated[:30], torch.cat([clip] * 3)) and (repeated[30:] == -10).all()
    padded, mask = fit_frames(clip, 32, fill="pad")
    assert mask.sum() == 10 and torch.equal(padded[:10], clip) and (padded[10:] == -10).all()
    assert torch.equal(
        fit_frames(torch.arange(50.0)[:, None].expand(-1, 80), 16, position=1.0)[0][:, 0], torch.arange(34.0, 50.0)
    )
    assert log_mel(torch.zeros(100)).shape == (2, 80) and torch.isfinite(log_mel(torch.zeros(16000))).all()


def test_the_maximum_is_that_of_each_clip():
    quiet, loud = torch.randn(8000) * 1e-3, torch.randn(8000)
    assert torch.allclose(compress(torch.log10(torch.full((4, 80), 1e-3))), torch.full((4, 80), 0.25))
    assert (log_mel(loud).max() - log_mel(quiet).max()).item() == pytest.approx(1.5, abs=0.2)


def test_spec_augment_fills_with_the_minimum():
    mel = torch.rand(128, 80)
    changed = [spec_augment(mel, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for out in changed:
        assert ((out == mel) | (out == mel.min())).all()
    assert max((out != mel).float().mean().item() for out in changed) > 0.1
    assert max((out != mel).all(1).sum().item() for out in changed) <= 32
