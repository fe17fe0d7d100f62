"""Readers, transforms and samples: every documented layout, every malformed case."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import SAMPLE_DATA, DataConfig
from dit.data.readers import read
from dit.dataset import TextImageDataset, collate, decode, to_square, unit
from dit.sampling.drawing import grid, to_uint8
from shared.errors import BadSample, UserError
from shared.media.pictures import to_pixels
from shared.media.shards import Shards
from tests.dit.small import coco_folder, cub_folder, picture


def dataset(name, path, *, is_train=True, num_classes=None, **settings) -> TextImageDataset:
    settings = DataConfig(dataset_name=name, dataset_path=str(path), **{"image_size": 16, **settings})
    return TextImageDataset(settings=settings, is_train=is_train, num_classes=num_classes)


@pytest.mark.parametrize("year", [2017, 2014])
def test_coco_joins_captions_and_leaves_out_what_is_missing(tmp_path, year):
    found = dataset("coco", coco_folder(tmp_path, year=year))
    assert [item.id for item in found.items] == ["000000000001", "000000000004"]
    assert found.items[0].captions == ("a picture 1 number 0", "a picture 1 number 1")
    assert sorted(reason.split(":")[-1].strip() for _, reason in found.skipped) == ["no caption", "no such picture"]


def test_coco_without_annotations_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="captions_train2017.json"):
        dataset("coco", tmp_path)


def test_cub_follows_the_split_and_reads_latin1_captions(tmp_path):
    root = cub_folder(tmp_path / "CUB_200_2011", texts=True)
    for place in (root, tmp_path):
        training, held_out = dataset("cub", place), dataset("cub", place, is_train=False)
        assert (len(training), len(held_out)) == (3, 1)
        assert len(training.items[0].captions) == 10 and training.items[0].captions[-1] == "caf\xe9 bird"


def test_cub_captions_from_attributes_and_class_names(tmp_path):
    root = cub_folder(tmp_path / "CUB_200_2011", attributes=True)
    caption = dataset("cub", root).items[-1].captions[0]
    assert (
        caption.startswith("a photo of a Blue Footed Booby, a bird with")
        and "red wing" in caption
        and "small size" in caption
    )
    assert "bill" not in caption
    named = dataset("cub", root, caption_source="class").items[-1].captions
    assert named == ("a photo of a Blue Footed Booby, a type of bird",)
    with pytest.raises(UserError, match="text_c10"):
        dataset("cub", root, caption_source="text")


def test_cub_without_a_split_file_is_split_by_name(tmp_path):
    root = cub_folder(tmp_path, split=False, count=60)
    training, held_out = dataset("cub", root), dataset("cub", root, is_train=False)
    assert len(training) + len(held_out) == 60 and 1 <= len(held_out) <= 15
    assert not {item.id for item in training.items} & {item.id for item in held_out.items}


def test_custom_jsonl_reads_every_key_and_skips_malformed_rows(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    rows = [
        json.dumps({"file_name": "a.png", "text": "first"}),
        json.dumps({"image": "b.png", "captions": ["one", " two "], "other": 1}),
        "{broken",
        json.dumps({"caption": "no picture"}),
        json.dumps(["not", "an", "object"]),
        json.dumps({"image_path": "c.png", "prompt": "third"}),
        json.dumps({"file": "gone.png", "caption": "no file"}),
        json.dumps({"file": "d.png"}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found = dataset("custom", tmp_path)
    assert [item.captions for item in found.items] == [("first",), ("one", "two"), ("third",)]
    assert len(found.skipped) == 5
    with pytest.raises(UserError, match="metadata.jsonl:3"):
        dataset("custom", tmp_path, on_error="raise")


def test_custom_split_files_csv_pixart_sidecars_and_class_folders(tmp_path):
    for name in ("s", "c", "p", "t", "k"):
        picture(tmp_path / name / "images" / "x.png")
    for split in ("train", "val"):
        (tmp_path / "s" / f"{split}.jsonl").write_text(json.dumps({"file": "images/x.png", "text": split}))
    assert dataset("custom", tmp_path / "s", is_train=False).items[0].captions == ("val",)
    (tmp_path / "c" / "metadata.csv").write_text("file_name,caption\nimages/x.png,from csv\n")
    assert dataset("custom", tmp_path / "c").items[0].captions == ("from csv",)
    (tmp_path / "p" / "data_info.json").write_text(json.dumps([{"path": "x.png", "prompt": "pix", "ratio": 1.0}]))
    assert dataset("custom", tmp_path / "p").items[0].captions == ("pix",)
    (tmp_path / "t" / "images" / "x.caption").write_text("one\n\ntwo\n")
    assert dataset("custom", tmp_path / "t").items[0].captions == ("one", "two")
    classed = dataset("custom", tmp_path / "k", num_classes=3)
    assert classed[0]["label"] == 0
    for name in ("t", "k"):
        (tmp_path / name / "images" / "._x.png").write_bytes(b"a note of the file system")
    assert [len(dataset("custom", tmp_path / name, num_classes=3)) for name in ("t", "k")] == [1, 1]


def test_a_training_list_without_a_validation_list_is_divided_by_name(tmp_path):
    rows = [{"file": str(picture(tmp_path / "pictures" / f"{n}.png")), "text": f"number {n}"} for n in range(40)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(dataset("custom", tmp_path / "data")) == 40
    assert len(dataset("custom", tmp_path / "data", is_train=False)) == 0
    parts = [dataset("custom", tmp_path / "data", is_train=flag, val_fraction=0.3) for flag in (True, False)]
    names = [{item.id for item in part.items} for part in parts]
    assert len(names[0] | names[1]) == 40 and not names[0] & names[1] and len(names[1]) > 4


def test_odd_lists_are_read_or_named(tmp_path):
    """Latin-1 tables, line separators inside captions, names that no file can have, lists that are none."""
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file,text\na.png,caf\xe9\n".encode("latin-1"))
    assert dataset("custom", tmp_path).items[0].captions == ("caf\xe9",)
    rows = [{"file": "a.png", "text": "one\u2028two"}, {"file": "x" * 5000, "text": "b"}, {"file": "\0", "text": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join([*lines, "5", "[" * 100_000]), encoding="utf-8")
    found = dataset("custom", tmp_path)
    assert [item.captions for item in found.items] == [("one two",)] and len(found.skipped) == 4
    assert any("an object is expected, found int" in reason for _, reason in found.skipped)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "data_info.json").write_text('{"path": "a.png"}')
    with pytest.raises(UserError, match="data_info.json: a list of records is expected, found dict"):
        dataset("custom", tmp_path)


@pytest.fixture
def shards(tmp_path):
    """Two tar files of three samples; the first of each has its caption in a json."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"data-{shard:03d}.tar", "w") as tar:
            for number in range(3):
                image = io.BytesIO()
                Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(image, "png")
                note = (
                    ("txt", f"text {shard}{number}".encode())
                    if number
                    else ("json", json.dumps({"caption": f"json {shard}"}).encode())
                )
                for suffix, data in (("png", image.getvalue()), note):
                    add_member(tar, f"{shard}{number}.{suffix}", data)
    return tmp_path


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_webdataset_shards_are_read_at_random(shards):
    captions = ["json 0", "text 01", "text 02", "json 1", "text 11", "text 12"]
    for place in (shards, shards / "data-{000..001}.tar", shards / "data-*.tar"):
        found = dataset("custom", place)
        assert [item.captions[0] for item in found.items] == captions
    assert found[5]["image"].shape == (3, 16, 16)
    some = dataset("custom", shards, num_samples=4, subset_seed=1)
    assert [some[index]["text"] for index in range(4)] == sorted(
        (item.captions[0] for item in some.items), key=captions.index
    )


def test_shards_open_and_tell_their_names_without_reading_a_sample(shards, monkeypatch):
    dataset("custom", shards)  # writes the index

    def read(*arguments):
        raise AssertionError("a sample was read")

    monkeypatch.setattr(Shards, "_read", read)
    found = dataset("custom", shards, num_samples=5)
    assert len(found) == 5 and len(found.fingerprint) == 64
    held = [dataset("custom", shards, is_train=train, val_fraction=0.5) for train in (True, False)]
    assert sorted(name for part in held for name in part.items.ids()) == ["00", "01", "02", "10", "11", "12"]


def test_a_bad_sample_of_a_shard_is_told_when_it_is_used(shards):
    with tarfile.open(shards / "data-002.tar", "w") as tar:
        add_member(tar, "bare.png", b"x")
        add_member(tar, "words.txt", b"no picture")
        add_member(tar, "wrong.png", b"x")
        add_member(tar, "wrong.json", b"{")
    found = dataset("custom", shards)
    assert len(found) == 8 and found.skipped == [("words", "no picture in the shard")]
    for index, reason in ((6, "no caption"), (7, "unreadable json")):
        with pytest.raises(BadSample, match=reason):
            found[index]


def test_num_samples_keeps_a_seeded_choice(tmp_path):
    root = cub_folder(tmp_path, count=20)
    first, again, other = (dataset("cub", root, num_samples=5, subset_seed=seed) for seed in (0, 0, 1))
    assert len(first) == 5 and first.fingerprint == again.fingerprint != other.fingerprint
    assert len(dataset("cub", root, num_samples=500)) == 19


def test_missing_and_empty_folders_name_the_path(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        dataset("cub", tmp_path / "nowhere")
    with pytest.raises(UserError, match=str(tmp_path)):
        dataset("custom", tmp_path)


def test_adm_centre_crop_halves_then_scales_then_cuts():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 101, 3), dtype=np.uint8))
    square, where = to_square(image, 16)
    by_hand = image.resize((50, 35), Image.Resampling.BOX).resize((25, 17), Image.Resampling.BOX)
    by_hand = by_hand.resize((round(25 * 16 / 17), 16), Image.Resampling.BICUBIC)
    left = (by_hand.width - 16) // 2
    assert np.array_equal(np.asarray(square), np.asarray(by_hand.crop((left, 0, left + 16, 16))))
    assert where == (0, left, 16, by_hand.width)


@pytest.mark.parametrize(("size", "window"), [((40, 25), (10, 0, 26, 16)), ((25, 40), (0, 10, 16, 26))])
def test_a_random_window_lies_where_it_says(size, window):
    """On wide and on tall pictures: the first draw goes across, the second down."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    draws = iter([0.99, 0.0] if size[0] > size[1] else [0.0, 0.99])
    square, (top, left, height, width) = to_square(image, 16, crop="random", draw=lambda: next(draws))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    assert (left, top) == window[:2] and np.array_equal(np.asarray(square), np.asarray(resized.crop(window)))


@pytest.mark.parametrize("crop", ["center", "random", "random_resized", "resize"])
def test_every_crop_gives_the_size(crop):
    for size in ((40, 25), (16, 16), (9, 30)):
        square, _ = to_square(Image.new("RGB", size), 16, crop=crop, draw=lambda: 0.99)
        assert square.size == (16, 16)


def test_decoding_of_unusual_pictures():
    def encoded(image, **options):
        buffer = io.BytesIO()
        image.save(buffer, "png", **options)
        return buffer.getvalue()

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode(encoded(clear), "clear")).min() == 255
    wide = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    assert np.asarray(decode(encoded(wide), "wide"))[0, 0].tolist() == [128, 128, 128]
    grey = decode(encoded(Image.new("L", (4, 4), 9)), "grey")
    assert grey.mode == "RGB"
    with pytest.raises(BadSample, match="torn"):
        decode(encoded(Image.new("RGB", (40, 40), 7))[:60], "torn")


def test_turned_by_exif():
    image, buffer = Image.new("RGB", (8, 4)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, "jpeg", exif=exif)
    assert decode(buffer.getvalue(), "turned").size == (4, 8)


def test_samples_depend_on_seed_epoch_and_index_only(tmp_path):
    root = cub_folder(tmp_path, texts=True)
    first, second = (dataset("cub", root, crop="random", flip_guard=False) for _ in range(2))
    seen = [first.sample(1, epoch) for epoch in range(12)]
    for epoch in reversed(range(12)):
        again = second.sample(1, epoch)
        assert torch.equal(seen[epoch]["image"], again["image"]) and seen[epoch]["text"] == again["text"]
    assert len({sample["text"] for sample in seen}) > 3 and len({sample["flip"] for sample in seen}) == 2
    plain = dataset("cub", root, is_train=False)
    assert plain.sample(0, 3)["text"] == plain.items[0].captions[0] and not plain.sample(0, 3)["flip"]


def test_mirroring_turns_the_picture_and_captions_can_forbid_it(tmp_path, capsys):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows = [{"file": "a.png", "text": "an arrow to the LEFT."}, {"file": "b.png", "text": "a leftover bright sign"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    guarded = dataset("custom", tmp_path, flip=1.0)
    assert not guarded[0]["flip"] and not guarded[1]["flip"] and "left or right" in capsys.readouterr().err
    spared = dataset("custom", tmp_path, flip=1.0, flip_guard="picture")
    assert not spared[0]["flip"] and spared[1]["flip"]
    assert torch.equal(spared[1]["image"], guarded[1]["image"].flip(2))


def test_items_and_batches_have_the_documented_keys():
    settings = DataConfig(dataset_name="cub", dataset_path="sample", image_size=32)
    found = TextImageDataset(settings=settings)
    batch = collate([found[0], found[1]])
    assert batch["image"].shape == (2, 3, 32, 32) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert found.sample(0, 0)["image"].dtype == torch.uint8
    assert batch["index"].tolist() == [0, 1] and isinstance(batch["text"][0], str) and len(batch["crop"][0]) == 4
    assert TextImageDataset("cub", SAMPLE_DATA, 32, 5, True)[4]["image"].shape == (3, 32, 32)


def test_boxes_enlarge_and_stay_inside(tmp_path):
    root = cub_folder(tmp_path)
    plain, boxed = (dataset("cub", root, use_bbox=flag, flip=0.0)[0]["image"] for flag in (False, True))
    assert not torch.equal(plain, boxed)


def test_sample_data_are_whole():
    found = read(DataConfig(dataset_name="cub", dataset_path="sample"), SAMPLE_DATA, is_train=True)
    assert len(found.items) == 196 and not found.skipped and all(len(item.captions) == 10 for item in found.items)


def test_eight_bits_round_or_follow_adm():
    values = torch.tensor([-1.0, 0.0, 0.004, 1.0]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 128, 128, 255]
    assert to_uint8(values, rule="adm")[0, 0, :, 0].tolist() == [0, 128, 128, 255]
    assert grid(np.zeros((5, 4, 4, 3), np.uint8), 2).size == (10, 16)
    back = to_uint8(unit(to_pixels(Image.new("RGB", (2, 2), (3, 200, 255))))[None])
    assert back[0, 0, 0].tolist() == [3, 200, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(unit(every), torch.from_numpy(every.numpy().astype("float32") / 127.5 - 1))
