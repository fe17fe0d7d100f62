"""Annotation files of any size and form: one entry in memory at a time, an index that streams and follows changes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from opens2v.data import annotations
from opens2v.data.annotations import Annotations, write_index
from shared.errors import UserError
from tests.opens2v.cases import part_paths


def test_json_jsonl_and_folder_give_the_same_entries(tmp_path):
    source = part_paths("dataset1")[0]
    tree = json.loads(source.read_text())
    lines, folder = tmp_path / "part.jsonl", tmp_path / "part"
    lines.write_text("".join(json.dumps({"key": key, **entry}) + "\n" for key, entry in tree.items()))
    folder.mkdir()
    for key, entry in tree.items():
        (folder / f"{key}.json").write_text(json.dumps(entry))
    for path in (source, lines, folder):
        found = Annotations(path)
        assert len(found) == 2
        for key, entry in tree.items():
            read = found.entry(found.find(key))
            assert found.item(found.find(key)) == (key, read)
            assert {name: read[name] for name in entry} == entry
        assert found.find("nothing") is None


def test_index_streams_over_small_windows_and_follows_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "_CHUNK", 97)
    tree = {
        f'clip "{i}" é中_{i}': {"metadata": {"path": "x{}[]\\", "n": i}, "annotation": {"text": "ü\n" * i}}
        for i in range(40)
    }
    for style in ({"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        path = tmp_path / "part.json"
        path.write_text(json.dumps(tree, **style), encoding="utf-8")
        write_index(path)
        found = Annotations(path)
        assert isinstance(found.table, np.memmap)
        assert [found.key(i) for i in range(40)] == list(tree) and all(
            found.item(found.find(key)) == (key, tree[key]) for key in tree
        )
    path.write_text(json.dumps({"other": {"metadata": {}}}))
    assert len(Annotations(path)) == 1  # the index was made anew
    assert len(Annotations(_empty(tmp_path))) == 0


def _empty(folder):
    path = folder / "empty.json"
    path.write_text(" { } ")
    return path


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": {"b": 1}, "c": {"d"', "cut or damaged"),
        ("[1, 2]", "expected {"),
        ('{"a": 5}', "no object"),
        ("", "ends at byte 0"),
        ('{"a": {}', "ends at byte"),
    ],
)
def test_damaged_annotation_files_are_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "part.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Annotations(path)


def test_index_command(tmp_path):
    path = tmp_path / "part.json"
    shutil.copy(part_paths("dataset1")[0], path)
    done = subprocess.run(
        [sys.executable, str(annotations.__file__), "--json", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 entries" in done.stdout
    failed = subprocess.run(
        [sys.executable, str(annotations.__file__), "--json", "nowhere.json"], capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
