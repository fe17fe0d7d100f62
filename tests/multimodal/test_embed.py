"""Embedding folders with breaks, indexes in both formats, the search page; what metrics say of training data."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from multimodal import embed, generate, metrics, train
from multimodal.evaluation import showing
from multimodal.evaluation.held_out import Split
from multimodal.evaluation.transfer import names_of, transfer
from multimodal.weights.open import Embedder
from tests.multimodal import small
from tests.multimodal.files import wav

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Own pictures and sounds, some of them in both splits."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(24):
        place = folder / "jsonl" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(place)
        wav(folder / "jsonl" / f"{number}.wav", 0.4 + number / 50)
    for split, numbers in (("train", range(16)), ("val", range(12, 24))):
        rows = [{"file": f"{n}.{suffix}", "caption": f"thing {n}"} for n in numbers for suffix in ("png", "wav")]
        (folder / "jsonl" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    own = ("--datasets", "jsonl", "--data-root", str(data), "--label-set", "none", "--stages", "2", "--max-steps", "2")
    train.main([*small.QUICK, "--output-dir", str(folder), *own])
    return folder


def failing(capsys, command, *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        command.main(list(argv))
    assert leaving.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
@pytest.mark.parametrize("kind,pattern", [("images", "*.png"), ("audio", "*.wav")])
def test_a_folder_is_embedded_in_parts_and_gives_what_one_piece_gives(out, data, tmp_path, suffix, kind, pattern):
    paths = sorted((data / "jsonl").glob(pattern))
    command = ["encode", "--checkpoint", str(out), f"--{kind}", str(data / "jsonl")]
    whole, parts = tmp_path / f"whole.{suffix}", tmp_path / f"parts.{suffix}"
    embed.main([*command, "--output", str(whole)])
    embed.main([*command, "--output", str(parts), "--part-size", "7", "--workers", "1"])
    one, two = embed.read_index(whole), embed.read_index(parts)
    assert one.ids == two.ids == [str(path) for path in paths] and one.kind == two.kind == kind
    assert torch.allclose(one.vectors, two.vectors, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([whole.name, parts.name])


def test_a_stopped_encode_goes_on_where_it_was(out, data, tmp_path, monkeypatch):
    command = ["encode", "--checkpoint", str(out), "--images", str(data / "jsonl"), "--part-size", "5", "--output"]
    read, own = [], Embedder.files

    def stopped(self, paths, kind, workers=0):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(paths)
        return own(self, paths, kind, workers)

    monkeypatch.setattr(Embedder, "files", stopped)
    with pytest.raises(KeyboardInterrupt):
        embed.main([*command, str(tmp_path / "e.safetensors")])
    monkeypatch.setattr(Embedder, "files", lambda self, paths, *rest: (read.append(paths), own(self, paths, *rest))[1])
    embed.main([*command, str(tmp_path / "e.safetensors")])
    assert len(read) == 5 and len({path for part in read for path in part}) == 24  # none twice
    embed.main([*command, str(tmp_path / "w.safetensors"), "--part-size", "24"])
    assert torch.equal(
        embed.read_index(tmp_path / "e.safetensors").vectors, embed.read_index(tmp_path / "w.safetensors").vectors
    ) or torch.allclose(
        embed.read_index(tmp_path / "e.safetensors").vectors,
        embed.read_index(tmp_path / "w.safetensors").vectors,
        atol=1e-6,
    )


def test_a_file_that_was_replaced_after_a_stop_is_read_again(out, tmp_path, monkeypatch):
    for name in "ab":
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    command = ["encode", "--checkpoint", str(out), "--images", str(tmp_path), "--part-size", "1", "--output"]
    own = Embedder.files
    monkeypatch.setattr(
        Embedder, "files", lambda self, paths, *rest: 1 / 0 if "b.png" in str(paths) else own(self, paths, *rest)
    )
    with pytest.raises(ZeroDivisionError):
        embed.main([*command, str(tmp_path / "e.safetensors")])
    monkeypatch.undo()
    Image.new("RGB", (64, 64), "green").save(tmp_path / "a.png")
    embed.main([*command, str(tmp_path / "e.safetensors")])
    embed.main([*command, str(tmp_path / "w.safetensors")])
    assert torch.equal(*(embed.read_index(tmp_path / f"{name}.safetensors").vectors for name in "ew"))


def test_files_that_cannot_be_read_are_left_out_and_listed(out, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no")
    shutil.copy(folder / "good.png", os.fsencode(folder) + b"/caf\xe9.png")  # a name of another encoding
    (folder / "._good.png").write_bytes(b"what a Mac leaves beside a file")
    command = ["encode", "--checkpoint", str(out), "--images", str(folder), "--output", str(tmp_path / "e.parquet")]
    embed.main(command)
    assert embed.read_index(tmp_path / "e.parquet").ids == [str(folder / "good.png")]
    assert "bad.png" in (tmp_path / "e.parquet.bad.jsonl").read_text() and "2 files left out" in capsys.readouterr().out
    (folder / "good.png").unlink()
    assert "none of 2 files" in failing(capsys, embed, *command[:-1], str(tmp_path / "f.parquet"))
    assert "none of 2 files" in failing(capsys, embed, *command[:-1], str(tmp_path / "new" / "er" / "f.parquet"))
    assert ": a folder; give the name of a file" in failing(capsys, embed, *command[:-1], str(tmp_path))
    assert not [*tmp_path.glob("f.*"), *tmp_path.glob("new")] and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_is_a_line_whatever_it_holds_and_how_it_is_encoded(tmp_path, encoding):
    texts = ["a dog", "two\u2028parts of one line\x85here", "un café\x0cnoir"]
    (tmp_path / "t.txt").write_bytes("\r\n".join([*texts, "\x00", " ", ""]).encode(encoding))
    assert embed.read_lines(str(tmp_path / "t.txt")) == texts


def test_a_query_is_one_file_or_a_text_with_a_word(out, data, tmp_path, capsys):
    vectors = torch.nn.functional.normalize(torch.randn(2, 32), dim=1)
    embed.write_index(tmp_path / "i.parquet", vectors, ["x", "y"], "texts", embed.weights_mark(Embedder.load(str(out))))
    command = ["search", "--checkpoint", str(out), "--index", str(tmp_path / "i.parquet")]
    for query in ("", " ", "\x00"):
        assert "holds no word" in failing(capsys, embed, *command, "--query-text", query)
    embed.main([*command, "--query-text", os.fsdecode(b"caf\xe9")])  # typed in another encoding
    assert "holds 24 files; give one" in failing(capsys, embed, *command, "--query-image", str(data / "jsonl"))
    assert "holds 24 files; give one" in failing(capsys, embed, *command, "--query-audio", str(data / "jsonl"))


def test_an_index_of_many_ids(out, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "MOST_IDS", 2)
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\n\nun café\nthird\n", encoding="utf-8")
    embed.main(["encode", "--checkpoint", str(out), "--texts", str(texts), "--output", str(tmp_path / "t.safetensors")])
    assert embed.read_index(tmp_path / "t.safetensors").ids == ["a dog", "un café", "third"]
    found = embed.search(
        embed.SearchOptions(
            checkpoint=str(out), index=str(tmp_path / "t.safetensors"), query_text="un café", device="cpu", top_k=1
        )
    )
    assert found[0][0] == "un café" and found[0][1] == pytest.approx(1, abs=1e-5)


def test_files_that_are_no_index_are_named(out, tmp_path, capsys):
    for name in ("a.safetensors", "a.parquet"):
        (tmp_path / name).write_bytes(b"nothing")
        error = failing(
            capsys, embed, "search", "--checkpoint", str(out), "--index", str(tmp_path / name), "--query-text", "x"
        )
        assert "not an index that embed.py wrote" in error
    assert "expected encode, search or page" in failing(capsys, embed, "find")


VECTORS = torch.nn.functional.normalize(torch.arange(96.0).reshape(3, 32), dim=1)
FOREIGN = {  # what other programs, and damaged disks, make of an index: its tensors, and what is said of them
    "one row": ({"embeddings": VECTORS[0].clone()}, {}, "of shape (32,)"),
    "three axes": ({"embeddings": VECTORS[None].clone()}, {}, "of shape (1, 3, 32)"),
    "whole numbers": ({"embeddings": VECTORS.int()}, {}, "its vectors are torch.int32"),
    "not finite": ({"embeddings": VECTORS * float("nan")}, {}, "not finite"),
    "nothing": ({"embeddings": VECTORS[:0].clone()}, {"ids": "[]"}, "of shape (0, 32)"),
    "few ids": ({"embeddings": VECTORS}, {"ids": '["a"]'}, "3 vectors need as many names"),
    "many ids": ({"embeddings": VECTORS}, {"ids": '["a", "b", "c", "d"]'}, "3 vectors need as many names"),
    "ids of numbers": ({"embeddings": VECTORS}, {"ids": "[1, 2, 3]"}, "3 vectors need as many names"),
    "ids by name": ({"embeddings": VECTORS}, {"ids": '{"a": 1, "b": 2, "c": 3}'}, "3 vectors need as many names"),
    "no ids": ({"embeddings": VECTORS}, {"ids": "null"}, "3 vectors need as many names"),
    "other kind": ({"embeddings": VECTORS}, {"kind": "videos"}, "it holds videos"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_indexes_of_others_are_refused_by_search_and_page(out, tmp_path, capsys, case):
    tensors, facts, said = FOREIGN[case]
    mark = embed.weights_mark(Embedder.load(str(out), device="cpu"))
    place = tmp_path / "i.safetensors"
    save_file(tensors, place, {"ids": '["a", "b", "c"]', "kind": "texts", "model": mark, **facts})
    search = ("search", "--checkpoint", str(out), "--query-text", "x")
    for command in (search, ("page", "--output", str(tmp_path / "p.html"))):
        assert said in failing(capsys, embed, *command, "--index", str(place))
    assert not (tmp_path / "p.html").exists()


def test_tables_of_others_and_other_widths_are_refused(out, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    mark = embed.weights_mark(Embedder.load(str(out), device="cpu"))
    search = ("search", "--checkpoint", str(out), "--query-text", "x", "--index")
    embed.write_index(tmp_path / "i.parquet", VECTORS, ["a", "b", "c"], "texts", mark)
    table = pyarrow.parquet.read_table(tmp_path / "i.parquet")
    for name, column, said in (
        ("ids", pyarrow.array([1, 2, 3]), "as many names"),
        ("none", table["id"], "no 'model"),
    ):
        own = pyarrow.table({"id": column, "embedding": table["embedding"]})
        own = own.replace_schema_metadata(table.schema.metadata if name == "ids" else None)
        pyarrow.parquet.write_table(own, tmp_path / f"{name}.parquet")
        assert said in failing(capsys, embed, *search, str(tmp_path / f"{name}.parquet"))
    embed.write_index(tmp_path / "w.safetensors", VECTORS[:, :7].clone(), ["a", "b", "c"], "texts", mark)
    assert "other weights" in failing(capsys, embed, *search, str(tmp_path / "w.safetensors"))
    both = (str(tmp_path / "i.parquet"), str(tmp_path / "w.safetensors"))
    assert "other weights" in failing(capsys, embed, "page", "--output", str(tmp_path / "p.html"), "--index", *both)


def test_a_suffix_in_capitals_is_the_same_suffix(out, data, tmp_path):
    (tmp_path / "t.txt").write_text("a dog")
    texts = ("--checkpoint", str(out), "--texts", str(tmp_path / "t.txt"))
    embed.main(["encode", *texts, "--output", str(tmp_path / "t.PARQUET")])
    assert (tmp_path / "t.PARQUET").read_bytes()[:4] == b"PAR1"
    assert embed.read_index(tmp_path / "t.PARQUET").ids == ["a dog"]
    generate.main(["--checkpoint", str(out), "--output", str(tmp_path / "s.PNG")])
    assert Image.open(tmp_path / "s.PNG").format == "PNG"


def test_a_part_that_a_failing_disk_left_half_written_is_made_again(out, data, tmp_path, monkeypatch):
    command = ["encode", "--checkpoint", str(out), "--images", str(data / "jsonl"), "--part-size", "5", "--output"]
    monkeypatch.setattr(embed, "write_index", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed.main([*command, str(tmp_path / "e.safetensors")])
    monkeypatch.undo()
    parts = tmp_path / ".e.safetensors.parts"
    (parts / "000000.safetensors").write_bytes(b"")
    whole = (parts / "000002.safetensors").read_bytes()
    (parts / "000002.safetensors").write_bytes(whole[:-40])
    embed.main([*command, str(tmp_path / "e.safetensors")])
    embed.main([*command, str(tmp_path / "w.safetensors")])
    assert torch.equal(*(embed.read_index(tmp_path / f"{name}.safetensors").vectors for name in "ew"))


def test_the_page_holds_everything_and_its_vectors_find_the_same(out, data, tmp_path):
    indexes = []
    for kind in ("images", "audio"):
        indexes.append(str(tmp_path / f"{kind}.safetensors"))
        embed.main(["encode", "--checkpoint", str(out), f"--{kind}", str(data / "jsonl"), "--output", indexes[-1]])
    (tmp_path / "t.txt").write_text("a </script> dog\nthing 3 <!-- <script>\n")
    indexes.append(str(tmp_path / "t.safetensors"))
    embed.main(["encode", "--checkpoint", str(out), "--texts", str(tmp_path / "t.txt"), "--output", indexes[-1]])
    embed.main(["page", "--index", *indexes, "--output", str(tmp_path / "p.html"), "--limit", "10"])
    text = (tmp_path / "p.html").read_text()
    assert text.count("</script>") == 1 and "<!--" not in text and not re.search(r"(?:src|href)=['\"]?https?:", text)
    items = json.loads(re.search(r"const items=(\[.*?\]);const width", text)[1])
    assert [sum(item["kind"] == kind for item in items) for kind in ("images", "audio", "texts")] == [10, 10, 2]
    assert all(item["shown"].startswith("data:") for item in items[:20]) and items[20]["name"] == "a </script> dog"
    import base64

    rows = np.frombuffer(base64.b64decode(re.search(r"packed='(.*?)'", text)[1]), np.int8).reshape(22, -1)
    rows = torch.nn.functional.normalize(torch.from_numpy(rows.astype(np.float32)), dim=1)
    original = embed.read_index(Path(indexes[0])).vectors[0]
    assert float(rows[0] @ original) > 0.999


def test_indexes_of_other_weights_do_not_share_a_page(out, data, tmp_path, capsys):
    vectors = torch.nn.functional.normalize(torch.randn(2, 32), dim=1)
    for name in "ab":
        embed.write_index(tmp_path / f"{name}.safetensors", vectors, ["x", "y"], "texts", f"mark {name}")
    indexes = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert "other weights" in failing(capsys, embed, "page", "--index", *indexes, "--output", str(tmp_path / "p.html"))
    assert not (tmp_path / "p.html").exists()


def test_a_page_of_nothing_or_in_place_of_a_folder_is_refused(tmp_path, capsys):
    assert "--index names no file" in failing(capsys, embed, "page", "--index", "--output", str(tmp_path / "p.html"))
    assert "give the name of a file" in failing(capsys, embed, "page", "--index", "x", "--output", str(tmp_path))
    assert not list(tmp_path.iterdir())


# --- measuring --------------------------------------------------------------------------------------------------------


def test_samples_seen_in_training_are_counted_and_said(out, data, tmp_path, capsys):
    metrics.main(["--checkpoint", str(out), "--output", str(tmp_path / "m.json")])
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["retrieval"]["jsonl_image"]["seen_in_training"] == 8  # four pictures and four sounds are in both
    assert "warning: jsonl: 8 of these 24 samples were in the training data" in capsys.readouterr().err
    command = ["--checkpoint", str(out), "--split", "train", "--output", str(tmp_path / "t.json")]
    metrics.main(command)
    assert json.loads((tmp_path / "t.json").read_text())["retrieval"]["jsonl_audio"]["seen_in_training"] == 32


def coco(folder: Path, ids: dict[str, list[int]]) -> None:
    for split, numbers in ids.items():
        tree = {
            "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers],
            "annotations": [{"id": n, "image_id": n, "caption": f"thing {n}"} for n in numbers],
        }
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(tree))
        for n in numbers:
            (folder / f"{split}2017").mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (n * 9 % 255, 40, 80)).save(folder / f"{split}2017" / f"{n:012d}.jpg")


def test_karpathys_test_pictures_in_train2017_are_said(tmp_path, capsys):
    coco(tmp_path / "coco", {"train": list(range(16)), "val": list(range(16, 20))})
    rows = [
        {
            "split": "test",
            "filepath": "val2014",
            "filename": f"x{n}.jpg",
            "cocoid": n,
            "sentences": [{"raw": f"thing {n}"}],
        }
        for n in (3, 5, 17)
    ]
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    own = (
        "--datasets",
        "coco",
        "--data-root",
        str(tmp_path),
        "--label-set",
        "none",
        "--stages",
        "2",
        "--max-steps",
        "1",
    )
    train.main([*small.QUICK, "--output-dir", str(tmp_path / "out"), *own])
    command = ["--checkpoint", str(tmp_path / "out"), "--output", str(tmp_path / "m.json")]
    metrics.main([*command, "--protocol", "karpathy"])
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["split"] == "test" and found["retrieval"]["coco"]["seen_in_training"] == 2
    assert "warning: coco: 2 of these 3" in capsys.readouterr().err
    assert "no captions" in failing(capsys, metrics, *command, "--split", "test")
    metrics.main(command)
    assert json.loads((tmp_path / "m.json").read_text())["retrieval"]["coco"]["seen_in_training"] == 0


def test_own_data_elsewhere_are_measured_and_shown(out, data, tmp_path):
    (data / "jsonl").parent.joinpath("elsewhere").symlink_to(data / "jsonl")
    place = f"data.paths={{jsonl: {data / 'elsewhere'}}}"
    metrics.main(["--checkpoint", str(out), "--set", place, "--output", str(tmp_path / "m.json")])
    assert json.loads((tmp_path / "m.json").read_text())["retrieval"]["jsonl_image"]["items"] == 12
    shown = (out / "report.html").read_bytes()
    metrics.main(["--checkpoint", str(out), "--set", place, "--output", str(tmp_path / "t.json"), "--split", "train"])
    assert (out / "report.html").read_bytes() == shown  # which speaks of held-out data
    generate.main(["--checkpoint", str(out), "--set", place, "--output", str(tmp_path / "s.png")])
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_a_sheet_that_cannot_be_written_leaves_no_file(out, tmp_path, monkeypatch, capsys):
    def full(self, target, *given, **named):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "disk is full" in failing(capsys, generate, "--checkpoint", str(out), "--output", str(tmp_path / "s.png"))
    assert not list(tmp_path.iterdir())


def test_every_prompt_has_its_row_however_many_there_are(out, tmp_path, capsys, monkeypatch):
    drawn, own = [], showing.best_items
    monkeypatch.setattr(
        showing, "best_items", lambda split, text, *more: (drawn.append(text), own(split, text, *more))[1]
    )
    for count in (1, 2, 5, 12):  # of 12 pictures
        prompts = [f"thing {number}" for number in range(count)]
        drawn.clear()
        generate.main(["--checkpoint", str(out), "--output", str(tmp_path / "s.png"), "--prompt", *prompts])
        assert drawn == list(range(count)) and Image.open(tmp_path / "s.png").height == count * showing.CELL
    sheet = ("--checkpoint", str(out), "--output", str(tmp_path / "t.png"))
    error = failing(capsys, generate, *sheet, "--prompt", *map(str, range(13)))
    assert "13 texts, and 12 pictures are searched" in error and not (tmp_path / "t.png").exists()


def test_options_of_measuring_are_looked_at_before_the_work(out, data, tmp_path, capsys, monkeypatch):
    common = ("--checkpoint", str(out), "--output", str(tmp_path / "m.json"))
    for flags, said in (
        (("--data-root", "nowhere"), "--data-root nowhere: no such folder"),
        (("--data-root", ""), "--data-root is empty"),
        (("--paths", "{foo: x}"), "no data set called foo"),
        (("--paths", "{coco: x}"), "--paths names coco, which is not measured"),
        (("--protocol", "karpathy", "--split", "train"), "leave --split train out"),
        (("--zeroshot", ""), "--zeroshot is empty"),
        (("--zeroshot", "coco80", "--datasets", "jsonl"), "measured on coco"),
        (
            ("--split", "test"),
            "has a test split here; give --data-root, --set data.paths='{NAME: FOLDER}'",
        ),
    ):
        assert said in failing(capsys, metrics, *common, *flags)
    assert "called foo" in failing(capsys, generate, *common, "--paths", "{foo: x}")
    monkeypatch.setattr(Embedder, "split", lambda *given, **named: 1 / 0)  # nothing is embedded
    assert "12 of jsonl are present" in failing(capsys, metrics, *common, "--protocol", "1k")
    assert "measured on coco" in failing(capsys, metrics, *common, "--zeroshot", "coco80")
    assert not (tmp_path / "m.json").exists()


def test_a_sheet_shows_one_way_of_describing_after_the_other():
    owners = [0, 0, 0, 1, 2, 2, 3, 3, 3]  # captions of four pictures
    split = Split("image", list("abcd"), torch.zeros(4, 2), torch.zeros(9, 2), owners, [0, 3, 4, 6], [""] * 9)
    assert showing.captions_in_turn(split, [0, 1, 2, 3]) == [0, 3, 4, 6]
    assert showing.captions_in_turn(split, [3, 2, 0]) == [6, 5, 2]


def test_a_users_text_has_no_true_picture(out, tmp_path):
    """Whatever lies nearest, no frame of the sheet is green."""
    generate.main(["--checkpoint", str(out), "--output", str(tmp_path / "s.png"), "--prompt", "thing 12", "thing 13"])
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    corners = pixels[4 :: showing.CELL, showing.TEXT_WIDTH + 4 :: showing.CELL]
    assert not (corners == np.array(showing.RIGHT)).all(-1).any()


@pytest.mark.parametrize(
    "folders,said",
    [
        (("Dog", "dog_"), "'Dog' and 'dog_' name one class"),
        (("___", "cat"), "'___' names no class"),
        (("train", "val"), "its folders are splits"),
    ],
)
def test_folders_that_are_no_classes_are_refused(out, data, tmp_path, capsys, folders, said):
    for name in folders:
        (tmp_path / "z" / name).mkdir(parents=True)
        shutil.copy(data / "jsonl" / "1.png", tmp_path / "z" / name)
    common = ("--checkpoint", str(out), "--zeroshot", str(tmp_path / "z"), "--output", str(tmp_path / "m.json"))
    assert said in failing(capsys, metrics, *common)


def test_zero_shot_on_a_folder_says_what_it_does_not_use(out, data, tmp_path, capsys):
    for name in "ab":
        (tmp_path / "classes" / name).mkdir(parents=True)
        shutil.copy(data / "jsonl" / "1.wav", tmp_path / "classes" / name)
    common = ("--checkpoint", str(out), "--zeroshot", str(tmp_path / "classes"), "--output", str(tmp_path / "m.json"))
    metrics.main(list(common))
    assert "warning" not in capsys.readouterr().err
    metrics.main([*common, "--audio-crops", "3", "--protocol", "1k"])
    assert "whole: --protocol, --audio-crops is not used" in capsys.readouterr().err


def test_pictures_find_sounds_above_chance_only_where_they_do():
    generator = torch.Generator().manual_seed(0)
    words = ["violin", "trumpet", "drum", "piano", "guitar", "bell"]
    centres = torch.nn.functional.normalize(torch.randn(6, 16, generator=generator), dim=1)

    def split(kind: str, count: int, aligned: bool) -> Split:
        classes = [n % 6 for n in range(count)]
        noise = torch.randn(count, 16, generator=generator)
        rows = centres[classes] + 0.2 * noise if aligned else noise
        texts = [
            f"a red {words[c]} in a picture" if kind == "image" else f"the sound of two {words[c]}s" for c in classes
        ]
        rows = torch.nn.functional.normalize(rows, dim=1)
        return Split(kind, [str(n) for n in range(count)], rows, rows, list(range(count)), list(range(count)), texts)

    found = transfer({"a": split("image", 30, True), "b": split("audio", 24, True)})
    assert found["classes"] == sorted(words) and found["chance"] == pytest.approx(1 / 6)
    assert found["precision@5"] > 0.7 and found["AUC"] > 0.95 and found["p"] < 0.01
    assert found["AUC_chance"] == pytest.approx(0.5, abs=0.02)
    found = transfer({"a": split("image", 30, True), "b": split("audio", 24, False)})
    assert found["p"] > 0.05
    assert transfer({"a": split("image", 30, True)}) == {}


def test_sounds_of_one_class_that_lie_together_are_no_transfer():
    """Six pictures by chance near one cluster of sounds each: by single sounds that looks like much."""
    generator, found = torch.Generator().manual_seed(1), []
    words = ["violin", "trumpet", "drum", "piano", "guitar", "bell"]

    def split(kind: str, each: int) -> Split:
        centres = torch.nn.functional.normalize(torch.randn(6, 16, generator=generator), dim=1)
        rows = centres.repeat_interleave(each, 0) + 0.01 * torch.randn(6 * each, 16, generator=generator)
        texts = [f"a {word}" for word in words for _ in range(each)]
        count = range(6 * each)
        return Split(kind, [str(n) for n in count], rows, rows, list(count), list(count), texts)

    for _ in range(40):
        found.append(transfer({"a": split("image", 1), "b": split("audio", 8)})["p"])
    assert sum(p < 0.05 for p in found) <= 5


def test_a_class_is_what_most_captions_of_an_item_name():
    captions = [
        "A drum plays four rising notes.",
        "A rising line on drums.",
        "Quietly, a drum.",
        "Rising: drums",
        "One drum",
    ]
    assert names_of(captions) == {"drum", "rising"}
    assert names_of(["a dog"]) == {"dog"} and names_of([]) == set()
