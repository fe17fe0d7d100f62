"""Data sets as they are out there: names, ids, captions and tables in all the forms that people have."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest

from multimodal.config import Config
from multimodal.data.records import Folder, MissingData, PackedRecords, json_items
from multimodal.data.sets import coco_class_names, missing_clips
from multimodal.data.sources import open_data, overlap, read_records
from multimodal.data.text import TextTokenizer
from shared.errors import UserError
from tests.multimodal.files import dataset, picture, wav


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- AudioCaps --------------------------------------------------------------------------------------------------------

TABLE = 'audiocap_id,youtube_id,start_time,caption\n91139,-0xzrMun0Rs,30,"a, b"\n58146,1PvkGXhqdKs,10,"he said ""x"""\n'


@pytest.mark.parametrize(
    "name",
    [
        "audio/train/-0xzrMun0Rs_30.wav",
        "train/-0xzrMun0Rs.flac",
        "audio/train/Y-0xzrMun0Rs.wav",
        "audio/train/-0xzrMun0Rs_30_40.wav",
        "audio/train/-0xzrMun0Rs_000030.wav",
        "audio/train/-0xzrMun0Rs_30000_40000.wav",
        "audio/train/Y-0xzrMun0Rs_30.000_40.000.wav",
        "audio/train/-0xzrMun0Rs_30.0.wav",
        "audio/train/-0xzrMun0Rs.30.wav",
        "audio/train/91139.wav",
        "audio/-0xzrMun0Rs_30.wav",
        "wavs/train/Y-0xzrMun0Rs.wav",
        "waveforms/train/Y-0xzrMun0Rs_30000.mp3",
    ],
)
def test_audiocaps_clips_under_the_names_that_people_give_them(tmp_path, name):
    touch(tmp_path / "train.csv", TABLE.encode())
    touch(tmp_path / name)
    touch((tmp_path / name).with_name("._" + Path(name).name))  # macOS
    touch(tmp_path / "audio/train/1PvkGXhqdKs_99.wav")  # another clip of the second video
    found = read_records("audiocaps", tmp_path, "train")
    assert [record.source for record in found.records] == [tmp_path / name] and found.missing == 1
    assert missing_clips(tmp_path, "train") == ([("1PvkGXhqdKs", "10")], 2)


def test_starts_of_one_clip_written_in_two_ways_are_one(tmp_path):
    rows = b"1,abc,30,x\n2, abc ,30.0,y\n3,cde,nan,z\n"
    touch(tmp_path / "train.csv", b"audiocap_id,youtube_id,start_time,caption\n" + rows)
    touch(tmp_path / "train" / "abc_30.wav")
    found = read_records("audiocaps", tmp_path, "train")
    assert [record.captions for record in found.records] == [("x", "y")] and not found.missing
    assert found.bad == ["cde: start_time 'nan' is no number"]
    assert missing_clips(tmp_path, "train") == ([], 1)


def test_classes_without_a_name_make_no_caption(tmp_path):
    for name in ("a.wav", "b.wav"):
        touch(tmp_path / "audio" / name)
        touch(tmp_path / "FSD50K.dev_audio" / name)
    touch(tmp_path / "meta" / "esc50.csv", b"filename,fold,target,category\na.wav,1,0,dog\nb.wav,1,1, \n")
    found = read_records("esc50", tmp_path, "train")
    assert [record.captions for record in found.records] == [("the sound of dog",)]
    assert found.bad == ["b.wav: its category has no name"]
    touch(tmp_path / "FSD50K.ground_truth" / "dev.csv", b'fname,labels,split\na,"Cat,,Big_dog",train\nb,",",train\n')
    found = read_records("fsd50k", tmp_path, "train")
    assert [record.captions for record in found.records] == [("the sound of cat and big dog",)] and found.missing == 1


def test_clips_that_cannot_be_told_apart_or_are_empty_are_missing(tmp_path):
    touch(tmp_path / "train.csv", b"audiocap_id,youtube_id,start_time,caption\n1,abc,30,x\n2,abc,90,y\n3,cde,5.0,z\n")
    touch(tmp_path / "audio/train/abc.wav")
    touch(tmp_path / "audio/train/cde_5.wav", b"")
    with pytest.raises(MissingData, match="3 are listed.*forms.gle"):
        read_records("audiocaps", tmp_path, "train")
    touch(tmp_path / "audio/train/abc_90.wav")
    assert [record.captions for record in read_records("audiocaps", tmp_path, "train").records] == [("y",)]


def test_a_set_without_its_clips_is_left_out_and_the_rest_trains(tmp_path):
    touch(tmp_path / "audiocaps" / "train.csv", TABLE.encode())
    for number in range(4):
        picture(tmp_path / "jsonl" / f"{number}.png")
    rows = [json.dumps({"file": f"{number}.png", "caption": "x"}) for number in range(4)]
    (tmp_path / "jsonl" / "train.jsonl").write_text("\n".join(rows))
    data = open_data(Config(data={"data_root": str(tmp_path), "datasets": ["jsonl", "audiocaps", "coco"]}))
    assert data.kinds == ["image"]
    assert any("2 are listed, their files are not there" in note and "forms.gle" in note for note in data.notes)
    with pytest.raises(UserError, match="none of the data sets is there.*forms.gle"):
        open_data(Config(data={"data_root": str(tmp_path), "datasets": ["audiocaps"]}))
    with pytest.raises(UserError, match="audiocaps"):  # a place that was given by name must hold the set
        open_data(Config(data={"datasets": ["audiocaps"], "paths": {"audiocaps": str(tmp_path / "audiocaps")}}))


def test_one_sound_among_pictures_does_not_stop_the_training(tmp_path):
    touch(tmp_path / "audiocaps" / "train.csv", TABLE.encode())
    wav(tmp_path / "audiocaps" / "train" / "-0xzrMun0Rs_30.wav")
    for number in range(4):
        picture(tmp_path / "jsonl" / f"{number}.png")
    rows = [json.dumps({"file": f"{number}.png", "caption": "x"}) for number in range(4)]
    (tmp_path / "jsonl" / "train.jsonl").write_text("\n".join(rows))
    data = open_data(Config(data={"data_root": str(tmp_path), "datasets": ["jsonl", "audiocaps"]}))
    assert data.kinds == ["image"] and any("1 audio sample is too little" in note for note in data.notes)


def test_all_and_glove_are_names_of_the_training_too():
    assert Config(data={"datasets": ["all"]}).data.datasets == ["coco", "clotho", "audiocaps", "voxceleb"]
    assert Config(data={"datasets": ["glove", "coco"]}).data.datasets == ["coco"]
    with pytest.raises(ValueError, match="empty"):
        Config(data={"datasets": ["glove"]})


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco(folder: Path, images: list, annotations: list, files: tuple[str, ...] = ("1.jpg",)) -> Path:
    for name in files:
        touch(folder / "train2017" / name)
    touch(
        folder / "annotations" / "captions_train2017.json",
        json.dumps({"images": images, "annotations": annotations}).encode(),
    )
    return folder


@pytest.mark.parametrize(
    "image,entry,file,captions",
    [
        ({"id": "1", "file_name": "1.jpg"}, {"image_id": "1", "caption": "a dog"}, "1.jpg", ("a dog",)),
        ({"id": 1, "file_name": "1.jpg"}, {"image_id": "1", "caption": "a dog"}, "1.jpg", ("a dog",)),
        ({"id": 1.0, "file_name": "1.jpg"}, {"image_id": 1, "caption": " a\n dog"}, "1.jpg", ("a dog",)),
        ({"id": "x-7", "file_name": "1.jpg"}, {"image_id": "x-7", "caption": "a dog"}, "1.jpg", ("a dog",)),
        (
            {"id": 12345678901234567890, "file_name": "1.jpg"},
            {"image_id": "12345678901234567890", "caption": "a"},
            "1.jpg",
            ("a",),
        ),
        (
            {"id": float("inf"), "file_name": "1.jpg"},
            {"image_id": float("inf"), "caption": "a dog"},
            "1.jpg",
            ("a dog",),
        ),
        ({"id": 1.5, "file_name": "1.jpg"}, {"image_id": 1.5, "caption": "a dog"}, "1.jpg", ("a dog",)),
        ({"id": 1, "file_name": "1.jpg"}, {"image_id": 1, "caption": ["a", None, "b"]}, "1.jpg", ("a", "b")),
        ({"id": 1}, {"image_id": 1, "caption": "a"}, "000000000001.jpg", ("a",)),
        ({"id": 1, "file_name": "sub/1.jpg"}, {"image_id": 1, "caption": "a"}, "sub/1.jpg", ("a",)),
        ({"id": 1, "file_name": "train2017/1.jpg"}, {"image_id": 1, "caption": "a"}, "train2017/1.jpg", ("a",)),
        ({"id": 1, "file_name": "train2017/1.jpg"}, {"image_id": 1, "caption": "a"}, "1.jpg", ("a",)),
        ({"id": 1, "file_name": "1.jpg"}, {"image_id": 1, "caption": "a"}, "1.JPG", ("a",)),
        ({"id": 1, "file_name": "1.jpg"}, {"image_id": 1, "caption": "a"}, "1.png", ("a",)),
        ({"id": 1, "file_name": "1.jpg"}, {"image_id": 1, "caption": "x \ud83d y\x00"}, "1.jpg", ("x y",)),
    ],
)
def test_coco_in_the_forms_that_people_write(tmp_path, image, entry, file, captions):
    found = read_records("coco", coco(tmp_path, [image, image], [entry], (file,)), "train")
    assert [record.captions for record in found.records] == [captions] and found.records[
        0
    ].source == tmp_path / "train2017" / file
    assert dataset(found.records, TextTokenizer()).tokenizer.encode(captions[0])


def test_a_listed_folder_that_is_not_there_does_not_mix_pictures_up(tmp_path):
    images = [
        {"id": n, "file_name": name} for n, name in enumerate(("a/x.jpg", "b/x.jpg", "train2017\\y.jpg", "c/z.jpg"))
    ]
    entries = [{"image_id": n, "caption": f"of {n}"} for n in range(4)]
    found = read_records("coco", coco(tmp_path, images, entries, ("x.jpg", "y.jpg", "z.jpg")), "train")
    assert [(record.captions[0], record.source.name) for record in found.records] == [
        ("of 2", "y.jpg"),
        ("of 3", "z.jpg"),
    ]
    assert found.missing == 2  # whose x.jpg it is cannot be told


@pytest.mark.parametrize("rest", ['{"images": [], "annotations": []}', "x"])
def test_two_lists_joined_in_one_file_are_not_read_as_the_first(tmp_path, rest):
    coco(tmp_path, [{"id": 1, "file_name": "1.jpg"}], [{"image_id": 1, "caption": "a dog"}])
    path = tmp_path / "annotations" / "captions_train2017.json"
    path.write_text(path.read_text() + " \n\n")
    assert len(read_records("coco", tmp_path, "train").records) == 1
    path.write_text(path.read_text() + rest)
    with pytest.raises(UserError, match="captions_train2017.json: .*something follows its end"):
        read_records("coco", tmp_path, "train")


def test_categories_listed_twice_shift_no_class(tmp_path):
    coco(tmp_path, [{"id": 1, "file_name": "1.jpg"}], [{"image_id": 1, "caption": "a dog"}])
    categories = [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}, {"id": "1", "name": "person"}]
    for name in ("train", "val"):
        touch(
            tmp_path / "annotations" / f"instances_{name}2017.json",
            json.dumps({"annotations": [{"image_id": 1, "category_id": 3}], "categories": categories}).encode(),
        )
    assert read_records("coco", tmp_path, "train").records[0].labels == (1,)
    assert coco_class_names(tmp_path) == ["person", "car"]
    touch(tmp_path / "annotations" / "instances_val2017.json", b'{"annotations": [], "categories": [{"id": 1}]}')
    with pytest.raises(UserError, match="instances_val2017.json: a category has no name"):
        coco_class_names(tmp_path)


@pytest.mark.parametrize(
    "caption,bad,missing", [({"caption": None}, 0, 1), ({"caption": 7}, 1, 0), ({}, 1, 0), ({"caption": " "}, 0, 1)]
)
def test_captions_that_are_none_are_counted(tmp_path, caption, bad, missing):
    images = [{"id": number, "file_name": "1.jpg"} for number in (1, 2)]
    entries = [{"image_id": 1, **caption}, {"image_id": 2, "caption": "a cat"}]
    found = read_records("coco", coco(tmp_path, images, entries), "train")
    assert [record.captions for record in found.records] == [("a cat",)] and len(found.bad) == bad
    many = [{"image_id": 1, "caption": 7}] * 3 + entries[1:]
    with pytest.raises(UserError, match="3 of .* rows cannot be used; the first: annotations entry 2.*7"):
        read_records("coco", coco(tmp_path / "many", images, many), "train")


def test_instances_with_unknown_and_with_too_many_categories(tmp_path):
    coco(
        tmp_path / "coco",
        [{"id": n, "file_name": "1.jpg"} for n in range(20)],
        [{"image_id": n, "caption": "a"} for n in range(20)],
    )
    instances = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    entries = [{"image_id": 1, "category_id": 3}, {"image_id": 1, "category_id": 999}]
    instances.write_text(json.dumps({"annotations": entries, "categories": [{"id": 1}, {"id": "3"}]}))
    found = read_records("coco", tmp_path / "coco", "train")
    assert found.records[1].labels == (1,) and found.records[2].labels == () and "999" in found.bad[0]
    instances.write_text(
        json.dumps({"annotations": [{"image_id": 1, "category_id": 80}], "categories": [{"id": n} for n in range(81)]})
    )
    with pytest.raises(
        UserError, match="class number 80, the model has 80 classes; use --num-classes 81 --label-set images"
    ):
        open_data(Config(data={"data_root": str(tmp_path), "datasets": ["coco"]}))


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [{"id": 1, "file_n',
        "[1]",
        '{"images": []}',
        "",
        "{}",
        '{"images": [1 2], "annotations": []}',
        "\xff",
        '{"images": ' + "[" * 100_000,
    ],
)
def test_files_that_are_no_coco_json_are_named(tmp_path, text):
    touch(tmp_path / "annotations" / "captions_train2017.json", text.encode("latin-1"))
    with pytest.raises(UserError, match="captions_train2017.json.*download it again"):
        read_records("coco", tmp_path, "train")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    coco(tmp_path, [{"id": 1, "file_name": "1.jpg"}], [{"image_id": 1, "caption": "a"}])
    path = tmp_path / "annotations" / "captions_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_records("coco", tmp_path, "train").records) == 1


def test_json_is_read_item_by_item_as_the_whole_would_be(tmp_path, monkeypatch):
    tree = {
        "info": {"a": [1, {"b": ']}\\"'}]},
        "images": [{"id": n, "t": "x" * n} for n in range(90)],
        "n": 12.5e3,
        "annotations": [[]],
    }
    for indent in (None, 2):
        path = touch(tmp_path / "a.json", json.dumps(tree, indent=indent).encode())
        for chunk in (1, 7, 64, 1 << 20):
            monkeypatch.setattr("multimodal.data.records._CHUNK", chunk)
            found = list(json_items(path, ("images", "annotations")))
            assert found == [("images", item) for item in tree["images"]] + [("annotations", [])]


def test_coco_has_no_captioned_test_split(tmp_path):
    coco(tmp_path, [{"id": 1, "file_name": "1.jpg"}], [{"image_id": 1, "caption": "a"}])
    assert not read_records("coco", tmp_path, "test").records


# --- tables of sounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "listed,file",
    [
        ("a.wav", "a.wav"),
        (unicodedata.normalize("NFC", "écho.wav"), unicodedata.normalize("NFD", "écho.wav")),
        (unicodedata.normalize("NFD", "écho.wav"), unicodedata.normalize("NFC", "écho.wav")),
        ("a.wav ", "a.wav"),
        (" a.wav", " a.wav"),
        ("a", "a.wav"),
        ("a.wav", "a.flac"),
        ("A;[1]'&%.WAV", "a;[1]'&%.wav"),
    ],
)
def test_clotho_names_in_every_form(tmp_path, listed, file):
    touch(tmp_path / "development" / file)
    with open(tmp_path / "clotho_captions_development.csv", "w", encoding="utf-8-sig", newline="") as table:
        csv.writer(table).writerows(
            [["file_name", "caption_1", "caption_2"], [], [listed, "one, with comma", "two\nlines"]]
        )
    found = read_records("clotho", tmp_path, "train")
    assert [record.captions for record in found.records] == [("one, with comma", "two lines")]
    assert found.records[0].source.exists()


def test_tables_with_semicolons_short_rows_and_other_encodings(tmp_path):
    touch(tmp_path / "development" / "a.wav")
    path = tmp_path / "clotho_captions_development.csv"
    path.write_text('file_name;caption_1;caption_2\na.wav;"one; two";three\n')
    assert read_records("clotho", tmp_path, "train").records[0].captions == ("one; two", "three")
    path.write_text("file_name,caption_1,caption_2\na.wav,one\nb.wav\n")
    found = read_records("clotho", tmp_path, "train")
    assert found.records[0].captions == ("one",) and found.bad == ["row 3 has too few columns"]
    path.write_bytes("file_name,caption_1\na.wav,café\n".encode("latin-1"))
    with pytest.raises(UserError, match="not readable as CSV.*iconv"):
        read_records("clotho", tmp_path, "train")
    path.write_text("file_name,caption_1\na.wav,café\n", encoding="utf-16")
    assert read_records("clotho", tmp_path, "train").records[0].captions == ("café",)


@pytest.mark.parametrize(
    "text",
    [
        "file_name\tcaption_1\tcaption_2\na.wav\tone, two\tthree\n",
        "file_name|caption_1|caption_2\na.wav|one, two|three\n",
        'File_Name, CAPTION_1 ,caption_2\r\na.wav,"one, two", three\r\n',
        'file_name,caption_1,caption_2\na.wav,"one,\ntwo",three\n',
        'file_name, caption_1, caption_2\na.wav, "one, two", three\n',
    ],
)
def test_tables_between_whose_columns_stand_other_signs(tmp_path, text):
    touch(tmp_path / "development" / "a.wav")
    (tmp_path / "clotho_captions_development.csv").write_text(text, newline="")
    assert read_records("clotho", tmp_path, "train").records[0].captions == ("one, two", "three")


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    touch(tmp_path / "development" / "a.wav")
    (tmp_path / "clotho_captions_development.csv").write_text("file_name,caption_1,Caption_1\na.wav,one,two\n")
    with pytest.raises(UserError, match="column 'caption_1' occurs twice"):
        read_records("clotho", tmp_path, "train")


def test_a_quotation_mark_that_stays_open_takes_no_rows_with_it_unsaid(tmp_path):
    for number in range(9):
        touch(tmp_path / "development" / f"{number}.wav")
    rows = [f"{number}.wav,a sound,another" for number in range(9)]
    rows[3] = '3.wav,"a sound,another'
    rows[6] = '6.wav,"a sound",another'
    (tmp_path / "clotho_captions_development.csv").write_text(
        "\n".join(["file_name,caption_1,caption_2", *rows]) + "\n"
    )
    with pytest.raises(UserError, match="row 5 opens a quotation mark"):
        read_records("clotho", tmp_path, "train")


# --- further sets -----------------------------------------------------------------------------------------------------


def test_esc50_fsd50k_and_audioset(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav"):
        touch(tmp_path / "esc50" / "audio" / name)
    rows = "filename,fold,target,category\na.wav,1,0,dog\nb.wav,4,3,sea_waves\nc.wav,5,7,cat\nd.wav,2,7,cat\n"
    touch(tmp_path / "esc50" / "meta" / "esc50.csv", rows.encode())
    found = {split: read_records("esc50", tmp_path / "esc50", split) for split in ("train", "val", "test")}
    assert [part.records[0].captions[0] for part in found.values()] == [
        "the sound of dog",
        "the sound of sea waves",
        "the sound of cat",
    ]
    assert found["val"].records[0].labels == (3,) and found["train"].missing == 1

    touch(tmp_path / "fsd50k" / "FSD50K.dev_audio" / "64760.wav")
    touch(tmp_path / "fsd50k" / "FSD50K.eval_audio" / "37199.wav")
    touch(
        tmp_path / "fsd50k" / "FSD50K.ground_truth" / "dev.csv",
        b'fname,labels,mids,split\n64760,"Electric_guitar,Music","/m/0,/m/1",train\n16399,Music,/m/1,val\n',
    )
    touch(tmp_path / "fsd50k" / "FSD50K.ground_truth" / "eval.csv", b"fname,labels,mids\n37199,Music,/m/1\n")
    found = {split: read_records("fsd50k", tmp_path / "fsd50k", split) for split in ("train", "val", "test")}
    assert found["train"].records[0].captions == ("the sound of electric guitar and music",)
    assert found["val"].missing == 1 and found["test"].records[0].id == "fsd50k/eval/37199.wav"

    touch(tmp_path / "audioset" / "audio" / "Y--4gqARaEJE_0.000.wav")
    touch(
        tmp_path / "audioset" / "class_labels_indices.csv",
        b'index,mid,display_name\n73,/m/068hy,"Domestic animals, pets"\n0,/m/07q6cd_,Squeak\n',
    )
    text = "# Segments csv created\n# YTID, start_seconds, end_seconds, positive_labels\n"
    text += '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n--x, 1.000, 11.000, "/m/07q6cd_"\n'
    touch(tmp_path / "audioset" / "balanced_train_segments.csv", text.encode())
    found = read_records("audioset", tmp_path / "audioset", "train")
    assert found.records[0].captions == ("the sound of domestic animals, pets and squeak",) and found.missing == 1
    assert found.records[0].labels == (0, 73)


def esc50(folder: Path, *rows: str) -> None:
    for name in "abcdef":
        touch(folder / "audio" / f"{name}.wav")
    touch(folder / "meta" / "esc50.csv", "\n".join(["filename,fold,target,category", *rows]).encode())


def test_a_fold_or_split_that_is_none_is_no_training_data(tmp_path):
    esc50(tmp_path, "a.wav,1,0,dog", "b.wav,4.0,1.0,cat", "c.wav, 5 ,2,cow", "d.wav,,3,hen")
    found = {split: read_records("esc50", tmp_path, split) for split in ("train", "val", "test")}
    assert [[record.labels for record in part.records] for part in found.values()] == [[(0,)], [(1,)], [(2,)]]
    assert found["train"].bad == ["d.wav: fold '' and target '3', 1 to 5 and 0 to 49 wanted"]
    esc50(tmp_path, "a.wav,1,0,dog", "b.wav,7,1,cat", "c.wav,x,2,cow")
    with pytest.raises(UserError, match="fold '7'"):
        read_records("esc50", tmp_path, "train")

    touch(tmp_path / "FSD50K.dev_audio" / "1.wav")
    table = tmp_path / "FSD50K.ground_truth" / "dev.csv"
    touch(table, b"fname,labels,split\n1.wav,Cat, Validation\n1,Dog,trian\n")
    found = read_records("fsd50k", tmp_path, "val")
    assert len(found.records) == 1 and found.bad == ["1: split 'trian' is none of train, val and test"]
    touch(tmp_path / "0.png")
    touch(tmp_path / "validation.jsonl", b'{"file": "0.png", "caption": "x"}')
    assert len(read_records("jsonl", tmp_path, "val").records) == 1
    touch(table, b"fname,labels\n1,Cat\n")
    with pytest.raises(UserError, match="no column split"):
        read_records("fsd50k", tmp_path, "train")


@pytest.mark.parametrize(
    "change,captions,bad",
    [
        ({"split": "Train "}, ("a dog",), 0),
        ({"split": "restval"}, ("a dog",), 0),
        ({"split": "trian"}, None, 1),
        ({"split": None}, None, 1),
        ({"cocoid": "9"}, ("a dog",), 0),
        ({"cocoid": "9.0"}, ("a dog",), 0),
        ({"cocoid": float("inf")}, ("a dog",), 0),
        ({"cocoid": None}, None, 1),
        ({"sentences": [{"raw": None}, {"raw": "a cat"}]}, ("a cat",), 0),
        ({"sentences": None}, None, 0),
        ({"sentences": [{"tokens": ["a"]}]}, None, 1),
    ],
)
def test_karpathys_list_in_the_forms_that_people_write(tmp_path, change, captions, bad):
    touch(tmp_path / "train2014" / "a.jpg")
    sound = {
        "split": "train",
        "cocoid": 1,
        "filepath": "train2014",
        "filename": "a.jpg",
        "sentences": [{"raw": "a dog"}],
    }
    touch(tmp_path / "dataset_coco.json", json.dumps({"images": [sound, {**sound, **change}]}).encode())
    found = read_records("coco", tmp_path, "train", karpathy=True)
    assert [record.captions for record in found.records[1:]] == ([captions] if captions else [])
    assert len(found.bad) == bad


def test_audioset_says_what_its_lists_lack(tmp_path):
    touch(tmp_path / "audio" / "Yx_1.000_11.000.wav")
    touch(tmp_path / "balanced_train_segments.csv", b"x\t1.000\t11.000\t/m/0\n")
    with pytest.raises(MissingData, match="class_labels_indices.csv, which names the classes"):
        read_records("audioset", tmp_path, "train")
    touch(tmp_path / "class_labels_indices.csv", b"index,mid,display_name\n0,/m/0,Dog\nx,/m/1,Cat\n")
    found = read_records("audioset", tmp_path, "train")
    assert found.records[0].captions == ("the sound of dog",) and "index 'x'" in found.bad[0]
    for name in ("balanced_train_segments.csv", "results_20130124.token"):
        touch(tmp_path / name, "# caf\xe9, 1, 2, 3\n".encode("latin-1"))
        with pytest.raises(UserError, match=f"{name}: not readable as text.*iconv"):
            read_records("flickr30k" if name.endswith("token") else "audioset", tmp_path, "train")


@pytest.mark.parametrize(
    "name,text",
    [
        ("results_20130124.token", "1.jpg#0\tA dog , runs .\n1.jpg#1\tA cat\n2.jpg#0\tgone\n"),
        (
            "results.csv",
            "image_name| comment_number| comment\n1.jpg| 0| A dog , runs .\n1.jpg| 1| A cat\n2.jpg| 0| gone\n",
        ),
        ("captions.txt", 'image,caption\n1.jpg,"A dog , runs ."\n1.jpg,A cat\n2.jpg,gone\n'),
        ("captions.txt", "image;caption\n1.jpg;A dog , runs .\n1.jpg;A cat\n2.jpg;gone\n"),
        (
            "results.csv",  # one row of Kaggle's lacks the bar behind the number
            "image_name| comment_number| comment\n1.jpg| 0| A dog , runs .\n1.jpg| 4   A cat\n2.jpg| 0| gone\n",
        ),
        ("captions.txt", "image_name,comment_number,comment\n1.jpg, 0, A dog , runs .\n1.jpg,1,A cat\n2.jpg,0,gone\n"),
        ("captions.txt", "image\tcaption_number\tcaption\n1.jpg\t0\tA dog , runs .\n1.jpg\t1\tA cat\n2.jpg\t0\tgone\n"),
        ("results.csv", '"a","b","c"\n"1.jpg","0","A dog , runs ."\n"1.jpg","1","A cat"\n"2.jpg","0","gone"\n'),
    ],
)
def test_flickr30k_lists(tmp_path, name, text):
    touch(tmp_path / "flickr30k-images" / "1.jpg")
    touch(tmp_path / name, text.encode())
    found = read_records("flickr30k", tmp_path, "train")
    assert (
        [record.captions for record in found.records] == [("A dog , runs .", "A cat")]
        and found.missing == 1
        and not found.bad
    )


def test_captions_that_begin_with_a_number_keep_it(tmp_path):
    touch(tmp_path / "Images" / "1.jpg")
    touch(tmp_path / "captions.txt", b"image,caption\n1.jpg,2 dogs\n1.jpg,7\n")
    assert read_records("flickr30k", tmp_path, "train").records[0].captions == ("2 dogs", "7")
    touch(tmp_path / "results.csv", b"image_name| comment_number| comment\n1.jpg| 0| 2 dogs\n1.jpg| 1 3 dogs\n")
    assert read_records("flickr30k", tmp_path, "train").records[0].captions == ("2 dogs", "3 dogs")
    touch(tmp_path / "results_20130124.token", b"1.jpg#0\tNumber 5 runs\n1.jpg#1\t2 dogs\n")
    assert read_records("flickr30k", tmp_path, "train").records[0].captions == ("Number 5 runs", "2 dogs")


def test_flickr30k_in_karpathys_splits(tmp_path):
    touch(tmp_path / "flickr30k-images" / "1.jpg")
    images = [{"split": "test", "filename": "1.jpg", "imgid": 0, "sentences": [{"raw": "a dog"}]}]
    touch(tmp_path / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}).encode())
    assert read_records("flickr30k", tmp_path, "test").records[0].captions == ("a dog",)


# --- own data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content,captions",
    [
        (b'{"file": "a.png", "captions": "a red dog"}', ("a red dog",)),
        (b'{"file": "a.png", "caption": ["a red dog", "b"]}', ("a red dog", "b")),
        (b'{"image": "a.png", "text": "x"}', ("x",)),
        (b'{"file_name": "a.png", "text": "x"}', ("x",)),
        (b'\xef\xbb\xbf{"file": "a.png", "caption": "x"}', ("x",)),
        ('{"file": "a.png", "caption": "x"}\n'.encode("utf-16"), ("x",)),
        (b'[{"file": "a.png", "caption": "x"}]', ("x",)),
        (b'{"file": "sub\\\\b.png", "caption": "x"}', ("x",)),
        (b'{"file": "A.PNG", "caption": "x"}', ("x",)),
        (b'{"file": "a.png", "caption": "None"}', ("None",)),
        (b'{"file": "a.png", "caption": "x \\ud83d \\u0000y"}', ("x y",)),
        (b'{"file": "a.png", "captions": null, "text": "x"}', ("x",)),
    ],
)
def test_own_lists_in_the_forms_that_people_write(tmp_path, content, captions):
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    (tmp_path / "train.jsonl").write_bytes(content)
    found = read_records("jsonl", tmp_path, "train")
    assert found.records[0].captions == captions and not found.bad


def test_a_line_with_a_picture_and_a_sound_is_one_of_each(tmp_path):
    picture(tmp_path / "a.png")
    wav(tmp_path / "a.wav")
    line = {"image": "a.png", "audio": "a.wav", "image_path": "/elsewhere/a.png", "text": "x"}
    touch(tmp_path / "train.jsonl", json.dumps(line).encode())
    found = read_records("jsonl", tmp_path, "train")
    assert [(record.kind, record.captions) for record in found.records] == [("image", ("x",)), ("audio", ("x",))]
    (tmp_path / "a.wav").unlink()
    assert read_records("jsonl", tmp_path, "train").missing == 1


def test_a_place_that_is_not_read_is_said(tmp_path):
    data = {"datasets": ["synthetic"], "paths": {"shards": "nowhere", "jsonl": str(tmp_path)}}
    notes = open_data(Config(data=data)).notes
    assert any("data.paths names jsonl, shards" in note and "not read" in note for note in notes)


def test_a_file_in_several_lines_is_said(tmp_path):
    data = tmp_path / "jsonl"
    for name in ("a.png", "b.png"):
        picture(data / name)
    lines = [{"file": name, "caption": f"{name} {number}"} for number in range(2) for name in ("a.png", "b.png")]
    touch(data / "train.jsonl", "\n".join(map(json.dumps, lines)).encode())
    notes = open_data(Config(data={"data_root": str(tmp_path), "datasets": ["jsonl"]})).notes
    assert any("2 rows are of a file that an earlier row has" in note for note in notes)


def test_one_bad_line_among_good_ones_is_counted_and_many_stop(tmp_path):
    for name in ("a.png", "b.gif"):
        touch(tmp_path / name)
    touch(tmp_path / "c.xyz")
    good = '{"file": "a.png", "caption": "x"}\n'
    for bad in (
        '{"file": "c.xyz", "caption": "x"}',
        '{"file": "a.png", "caption": "x", "labels": ["dog"]}',
        '{"file": "a.png"',
        "{}",
        '{"file": "a.png", "caption": 3}',
        "[" * 100_000,
    ):
        (tmp_path / "train.jsonl").write_text(good * 3 + bad + "\n")
        found = read_records("jsonl", tmp_path, "train")
        assert len(found.records) == 3 and len(found.bad) == 1 and found.bad[0].startswith("line 4: ")
        (tmp_path / "train.jsonl").write_text(good * 3 + (bad + "\n") * 2)
        with pytest.raises(UserError, match="2 of 5 rows cannot be used; the first: line 4"):
            read_records("jsonl", tmp_path, "train")


def test_records_are_packed_and_come_back_as_they_were(tmp_path):
    names = [f"{n}.png" for n in range(5)]
    for name in names:
        touch(tmp_path / name)
    rows = [{"file": name, "captions": [f"caption {name}", "é"], "labels": [n]} for n, name in enumerate(names)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = read_records("jsonl", tmp_path, "train").records
    assert isinstance(records, PackedRecords) and records.all_labelled() and records.largest_label() == 4
    assert [record.captions[0] for record in records] == [f"caption {name}" for name in names]
    assert records[-1].labels == (4,) and [record.id for record in records[1:3]] == ["train/1.png", "train/2.png"]
    assert list(records.names()) == [f"train/{name}" for name in names]
    with pytest.raises(IndexError):
        records[5]


def test_what_is_in_two_splits_is_found(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        touch(tmp_path / "jsonl" / name)
    for split, names in (("train", ("a.png", "b.png")), ("val", ("b.png", "c.png"))):
        (tmp_path / "jsonl" / f"{split}.jsonl").write_text(
            "\n".join(json.dumps({"file": n, "caption": n}) for n in names)
        )
    train, val = (read_records("jsonl", tmp_path / "jsonl", split).records for split in ("train", "val"))
    assert overlap(train, val) == 1
    data = open_data(Config(data={"data_root": str(tmp_path), "datasets": ["jsonl"]}))
    assert any(
        "warning: 1 samples of jsonl are in its training and its validation split" in note for note in data.notes
    )


def test_a_cover_is_not_taken_for_the_sound_of_its_name(tmp_path):
    for name in ("song.jpg", "other.png", "other.flac"):
        touch(tmp_path / name)
    folder = Folder(tmp_path)
    assert folder.find("song.mp3") is None and folder.find("song.png") == tmp_path / "song.jpg"
    assert folder.find("other.wav") == tmp_path / "other.flac" and folder.find("song") == tmp_path / "song.jpg"


def test_a_folder_finds_the_exact_name_first(tmp_path):
    for name in ("a.png", "A.png", "a.jpg"):
        touch(tmp_path / name)
    folder = Folder(tmp_path)
    assert [folder.find(name).name for name in ("a.png", "A.png", "a.jpg")] == ["a.png", "A.png", "a.jpg"]
    assert folder.find("b.png") is None and folder.find("") is None
