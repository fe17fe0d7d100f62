"""Captions in any encoding, folders as people leave them, pictures that are odd, wide, cut or broken."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dit.config import DataConfig
from dit.data.readers import FileItems, Item, read
from dit.data.texts import TextFiles, clean_captions, decode_text
from dit.dataset import TextImageDataset, decode, spread, to_square
from dit.evaluation.held_out import readable
from shared.errors import BadSample, UserError
from tests.dit.small import picture


def opened(root, *, num_classes=None, is_train=True, name="custom", **settings) -> TextImageDataset:
    config = DataConfig(dataset_name=name, dataset_path=str(root), image_size=32, **settings)
    return TextImageDataset(settings=config, is_train=is_train, num_classes=num_classes)


@pytest.mark.parametrize(
    ("text", "encoding", "guessed"),
    [
        ("a caf\u00e9", "utf-8", None),
        ("a caf\u00e9", "utf-8-sig", None),
        ("a red bird\u2019s wing", "utf-16", None),
        ("a red bird", "utf-16-le", "utf-16-le"),
        ("the dog\u2019s \u201cball\u201d \u2013 blue", "cp1252", "cp1252"),
        ("una ni\u00f1a con un perro", "latin-1", "cp1252"),
        ("\u4e00\u53ea\u84dd\u8272\u7684\u732b", "gb18030", "gb18030"),
        ("\u9752\u3044\u8eca\u304c\u3042\u308b", "cp932", "cp932"),
        ("\u9752\u3044\u8eca\u304c\u3042\u308b", "euc_jp", "euc_jp"),
        ("\u0441\u0438\u043d\u044f\u044f \u043c\u0430\u0448\u0438\u043d\u0430", "cp1251", "cp1251"),
        ("\u0441\u0438\u043d\u044f\u044f \u043c\u0430\u0448\u0438\u043d\u0430", "koi8-r", "koi8-r"),
        ("\u0434\u043e\u043c \u0443 \u0440\u0435\u043a\u0438".upper(), "cp1251", "cp1251"),
        (
            "\u03ad\u03bd\u03b1 \u03ba\u03cc\u03ba\u03ba\u03b9\u03bd\u03bf \u03c0\u03bf\u03c5\u03bb\u03af",
            "cp1253",
            "cp1253",
        ),
        ("d\u00f3\u0142 jest \u017c\u00f3\u0142ty", "cp1250", "cp1250"),
        ("k\u0131rm\u0131z\u0131 bir ku\u015f", "cp1254", "cp1254"),
        ("the dog\u2019s caf\u00e9 \u2014 red", "mac_roman", "mac_roman"),
        ("\ube68\uac04 \uc790\ub3d9\ucc28", "cp949", "cp949"),
        ("\ube68\uac04 \uc790\ub3d9\ucc28", "utf-16-be", "utf-16-be"),
        ("\u85cd\u8272\u7684\u8c93\u5750\u5728\u6a39\u4e0a", "big5", "big5"),
        ("\u6ce8\u518c\u3002", "gb18030", "gb18030"),  # by its bytes nearly UTF-8
    ],
)
def test_captions_of_any_encoding_are_read(tmp_path, capsys, text, encoding, guessed):
    assert decode_text(text.encode(encoding)) == (text, guessed)
    picture(tmp_path / "0.png")
    (tmp_path / "0.txt").write_bytes(text.encode(encoding))
    assert opened(tmp_path).items[0].captions == (text,)
    assert ("not UTF-8" in capsys.readouterr().err) is (guessed is not None)


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ("une fen\u00eatre \u00e0 c\u00f4t\u00e9 \u00e9".encode()[:-1], "une fen\u00eatre \u00e0 c\u00f4t\u00e9"),
        (b"caf\xc3\xa9 \xc3\xa0 c\xc3\xb4t\xc3\xa9\xff", "caf\u00e9 \u00e0 c\u00f4t\u00e9"),
        ("\u4e00\u53ea\u84dd\u8272\u7684\u732b".encode()[:-1], "\u4e00\u53ea\u84dd\u8272\u7684"),
        ("a red bird".encode("utf-16") + b"\0", "a red bird"),
    ],
)  # fmt: skip
def test_a_damaged_place_costs_its_own_sign(data, kept):
    assert clean_captions(decode_text(data)[0]) == (kept,)


def test_captions_end_where_lines_end_and_hold_no_control_characters():
    texts = TextFiles()
    lines = {name: clean_captions(texts.decode(data, name).split("\n")) for name, data in {
        "crlf": b"one\r\ntwo\r\n\r\n", "cr": b"one\rtwo", "nul": b"a bird\x00", "tab": b"one\x0btwo\x1cthree",
    }.items()}  # fmt: skip
    assert lines["crlf"] == lines["cr"] == ("one", "two")
    assert lines["nul"] == ("a bird",) and lines["tab"] == ("one two three",)
    assert clean_captions("half \ud83d sign") == ("half sign",)  # JSON may hold one, no file can
    assert clean_captions(["", "a"]) == ("a",) and clean_captions([" \n"]) == ("",) and clean_captions(None) == ()


def test_an_empty_caption_is_a_picture_without_one(tmp_path, capsys):
    for name in ("0", "1"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "0.txt").write_text("a bird")
    (tmp_path / "1.txt").write_text(" \n")
    assert [item.captions for item in opened(tmp_path).items] == [("a bird",), ("",)]
    assert "1 captions are empty" in capsys.readouterr().err


def test_sidecars_of_every_suffix_and_no_stray_folders(tmp_path):
    for suffix in (".tif", ".TIFF", ".jfif", ".avif", ".gif", ".PNG"):
        image = Image.new("RGB", (40, 40), "red")
        image.save(tmp_path / f"x{suffix[1:]}{suffix}", "JPEG" if suffix == ".jfif" else None)
        (tmp_path / f"x{suffix[1:]}.TXT").write_text("a square")
    for junk in (".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/1.png", "._2.png"):
        picture(tmp_path / junk)
    (tmp_path / "photo.heic").write_bytes(b"x")
    data = opened(tmp_path)
    assert len(data) == 6 and all(item.captions == ("a square",) for item in data.items)
    assert [name for name, _ in data.skipped] == ["photo.heic"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('File_Name, Text\n0.png, "hello, you"\n', [("hello, you",)]),
        ("file_name,text\n0.png,hello, you\n0.png,two\n", [("two",)]),
        ('file_name,text\n0.png,one\n\n0.png,"two\nlines"\n', [("one",), ("two lines",)]),
        ("0.png,hello\n", "must name the columns"),
        ("", "must name the columns"),
        ("file_name,text,Text \n0.png,one,two\n", "metadata.csv: column 'text' occurs twice"),
        ('file_name,text\n0.png,"hello\n0.png,two\n', "metadata.csv:2: .*quote"),
        ('file_name,text\n0.png,one\n0.png,"hello' + "\n0.png,word" * 20_000, "metadata.csv:3: .*quote"),
    ],
)
def test_tables_are_read_as_meant_or_named_by_line(tmp_path, text, found):
    picture(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(text)
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            opened(tmp_path)
        return
    data = opened(tmp_path)
    assert [item.captions for item in data.items] == found
    assert len(data.skipped) == text.count("hello, you\n0")  # more cells than columns: nothing is cut off in silence


def test_names_that_no_file_can_have_and_labels_that_are_none_are_left_out(tmp_path):
    picture(tmp_path / "0.png")
    rows = [{"file_name": "0.png", "label": 2.0}, {"file_name": "\ud83d.png", "label": 1}]
    rows += [{"file_name": "0.png", "label": value} for value in (-1, "cat", True, None, "1.0")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = opened(tmp_path, num_classes=3)
    assert [item.label for item in data.items] == [2, 1] and len(data.skipped) == 5
    assert sum("no class" in reason for _, reason in data.skipped) == 4


@pytest.mark.parametrize("name", ["brace {new}", "star*", "brackets [a]", "dot.tar.d"])
def test_folders_with_signs_in_their_names(tmp_path, name):
    picture(tmp_path / name / "0.png")
    (tmp_path / name / "0.txt").write_text("a bird")
    assert len(opened(tmp_path / name)) == 1


def test_lists_with_other_separators_paths_of_windows_and_hugging_face_folders(tmp_path):
    for folder in ("semi", "tab", "win", "hf/train", "hf/validation"):
        picture(tmp_path / folder / "sub" / "0.png")
    (tmp_path / "semi" / "metadata.csv").write_text("file_name;text\nsub/0.png;hello, you\n")
    (tmp_path / "tab" / "metadata.tsv").write_text("file_name\ttext\nsub/0.png\thello, you\n")
    (tmp_path / "win" / "metadata.jsonl").write_text(json.dumps({"file_name": "sub\\0.png", "text": "hello, you"}))
    for folder in ("semi", "tab", "win"):
        assert opened(tmp_path / folder).sample(0, 0)["text"] == "hello, you"
    for split in ("train", "validation"):
        (tmp_path / "hf" / split / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/0.png", "text": split}))
    assert opened(tmp_path / "hf").items[0].captions == ("train",)
    assert opened(tmp_path / "hf", is_train=False).items[0].captions == ("validation",)


def test_parquet_rows_are_pictures(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "blue").save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}, "text": f"number {n}", "label": n} for n in range(5)]
    (tmp_path / "data").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data" / "train-00000.parquet", row_group_size=2)
    parquet.write_table(arrow.Table.from_pylist(rows[:2]), tmp_path / "data" / "validation-00000.parquet")
    data = opened(tmp_path)
    assert len(data) == 5 and data.sample(4, 0)["text"] == "number 4" and data.sample(0, 0)["image"][2].min() == 255
    assert len(opened(tmp_path, is_train=False)) == 2 and opened(tmp_path, num_classes=5).sample(3, 0)["label"] == 3
    (tmp_path / "data" / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="train-00000.parquet"):
        opened(tmp_path)


def test_stray_folders_are_no_classes_and_too_many_are_refused(tmp_path, capsys):
    for name in ("n01", "n02", "n10"):
        picture(tmp_path / name / "0.JPEG")
    for stray in (".ipynb_checkpoints", "$RECYCLE.BIN", "#recycle", "lost+found", "__pycache__"):
        picture(tmp_path / stray / "x.png")
    for empty in ("__MACOSX", "empty"):
        (tmp_path / empty).mkdir()
    assert [item.label for item in opened(tmp_path, num_classes=3).items] == [0, 1, 2]
    opened(tmp_path, num_classes=1000)
    assert "3 folders hold pictures" in capsys.readouterr().err
    with pytest.raises(UserError, match="--num-classes 3"):
        opened(tmp_path, num_classes=2)
    picture(tmp_path / "deep" / "n01" / "images" / "0.png")
    with pytest.raises(UserError, match="no folder with pictures directly in it"):
        opened(tmp_path / "deep", num_classes=1)
    with pytest.raises(UserError, match="is a file"):
        opened(tmp_path / "n01" / "0.JPEG")


def test_an_imagenet_root_has_its_split_and_one_numbering(tmp_path):
    for name in ("train/n01", "train/n02", "val/n02"):
        picture(tmp_path / name / "0.JPEG")
    assert len(opened(tmp_path, num_classes=2)) == 2
    assert [item.label for item in opened(tmp_path, num_classes=2, is_train=False).items] == [1]
    with pytest.raises(UserError, match="--num-classes"):
        opened(tmp_path)
    picture(tmp_path / "val" / "n09" / "0.JPEG")
    with pytest.raises(UserError, match="n09"):
        opened(tmp_path, num_classes=2, is_train=False)


def test_shards_may_hold_classes(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "JPEG")
    members = [("0.jpg", buffer.getvalue()), ("0.cls", b"7\n"), ("1.jpg", buffer.getvalue()),
               ("1.json", b'{"label": 3, "text": "caf\xe9"}'), ("2.jpg", buffer.getvalue())]  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = opened(tmp_path, num_classes=10)
    assert [data.sample(index, 0)["label"] for index in (0, 1)] == [7, 3]
    with pytest.raises(BadSample, match="no class"):
        data.sample(2, 0)


def test_coco_with_names_for_numbers_and_a_chosen_year(tmp_path):
    for year, key in ((2014, "7"), (2017, "img_b")):
        picture(tmp_path / f"train{year}" / "x.jpg")
        notes = [{"id": key, "image_id": int(key) if key == "7" else key, "caption": str(year)}]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"captions_train{year}.json").write_text(
            json.dumps({"images": [{"id": key, "file_name": "x.jpg"}], "annotations": notes})
        )
    assert opened(tmp_path, name="coco").items[0].id == "img_b"
    assert opened(tmp_path, name="coco", coco_year="2014").items[0].captions == ("2014",)


def jpeg() -> bytes:
    y, x = np.mgrid[0:64, 0:96]
    buffer = io.BytesIO()
    Image.fromarray(np.stack([2 * x, 3 * y, x + y], -1).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_a_jpeg_without_its_end_mark_is_whole_and_one_without_data_is_not():
    data = jpeg()
    whole = decode(data, "x")
    assert np.array_equal(whole, decode(data[:-2], "x")) and np.array_equal(whole, decode(data[:-1], "x"))
    for cut in (len(data) // 2, len(data) - 10, 20):
        with pytest.raises(BadSample):
            decode(data[:cut], "x")


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "WEBP", "PNG"])
def test_damaged_pictures_are_bad_samples_and_nothing_else(kind):
    buffer = io.BytesIO()
    decode(jpeg(), "x").resize((32, 24)).save(buffer, kind)
    generator, refused = np.random.default_rng(5), 0
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for place in generator.integers(len(data), size=4):
            data[place] = generator.integers(256)
        try:
            decode(bytes(data[: generator.integers(8, len(data))]), "x")
        except BadSample:
            refused += 1
    assert refused > 20


def test_sixteen_bits_stay_dark():
    pixels = (np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 32).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 0, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert np.asarray(decode(png, "dark.png")).max() <= 1


@pytest.mark.parametrize("size", [(20000, 8), (3, 9000)])
def test_very_wide_pictures_are_cut_before_they_are_scaled(size):
    image = Image.new("RGB", size, (10, 200, 30))
    square, (top, left, height, width) = to_square(image, 64)
    assert square.size == (64, 64) and np.ptp(np.asarray(square)[..., 1]) == 0
    assert min(height, width) == 64 and abs((width - 64) // 2 - left) <= 1 and abs((height - 64) // 2 - top) <= 1


def test_squares_are_kept_in_memory_and_not_the_pictures_they_were_cut_from(tmp_path):
    picture(tmp_path / "0.png", size=(400, 300))
    (tmp_path / "0.txt").write_text("a square")
    data = opened(tmp_path, keep_in_memory=True, flip=0.0)
    first = data.sample(0, 0)["image"]
    assert data._memory[0][0].size == (32, 32) and data.sample(0, 3)["image"].equal(first)


def test_packed_items_are_what_was_packed():
    items = [
        Item(f"n{n}/x{n}.jpg", __import__("pathlib").Path(f"/data/n{n}/x{n}.jpg"), ("one", f"two {n}")[: n % 3],
             (1.0, 2.0, 3.0, 4.5) if n % 2 else None, n if n % 4 else None)
        for n in range(9)
    ]  # fmt: skip
    packed = FileItems(items)
    assert list(packed) == items and packed[-1] == items[-1] and list(packed.take([3, 5])) == [items[3], items[5]]
    with pytest.raises(IndexError):
        packed[9]


def test_evaluation_sees_all_classes_and_not_the_first(tmp_path):
    for label in range(20):
        for number in range(10):
            picture(tmp_path / f"c{label:02d}" / f"{number}.png", size=(8, 8))
    data = opened(tmp_path, num_classes=20)
    chosen = [data.items[index].label for index in spread(data, 40)[:40]]
    assert len(set(chosen)) >= 15 and spread(data, 500) == list(range(200))
    assert read(data.settings, tmp_path, is_train=True, num_classes=20).items[0].label == 0


def test_a_set_of_which_nothing_can_be_read_is_a_sentence():
    class Broken:
        def names(self):
            return (str(index) for index in range(36))

        def __len__(self):
            return 36

        def sample(self, index, epoch, *, flip):
            raise BadSample(f"{index}.png: not a picture")

    with pytest.raises(UserError, match=r"none of 36 pictures can be read, the last: \d+.png: not a picture"):
        readable(Broken(), 16)
