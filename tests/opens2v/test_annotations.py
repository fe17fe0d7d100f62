"""Annotation files of any size and form: one entry in memory at a time, an index that streams and follows changes."""

import json
import os
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


def test_windows_files_are_read_and_escaped_keys_found(tmp_path):
    entries = {"a/é": {"n": 1}, 'quoted "b"': {"n": 2, "key": "x"}}
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(entries).encode().replace(b", ", b",\r\n"))
    lines = [json.dumps({"n": entry["n"], "key": key}) for key, entry in entries.items()]
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf [" + b",\r\n".join(line.encode() for line in lines) + b"]\r\n")
    for name in ("a.json", "b.jsonl", "c.json"):
        found = Annotations(tmp_path / name)
        assert [found.item(place)[0] for place in range(2)] == list(entries)
        assert [found.item(place)[1]["n"] for place in range(2)] == [1, 2] and found.find('quoted "b"') == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"key": "a"}, {"n": 1}]', "entry 2 of the list has no"),
        ('[{"key": 3}]', "entry 1 of the list"),
        ('[{"key": "a"}, 5]', "expected"),
        ('[{"key": "a"}, {"key": "b"', "cut or damaged"),
        ('[{"key": "a"}', "ends at byte"),
    ],
)
def test_a_list_that_is_no_list_of_entries_says_where(tmp_path, text, message):
    (tmp_path / "part.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Annotations(tmp_path / "part.json")


def test_an_index_is_kept_when_its_file_was_touched_and_made_again_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "INDEX_ABOVE_BYTES", 10)
    path, calls = tmp_path / "part.json", []
    real = annotations.write_index
    monkeypatch.setattr(annotations, "write_index", lambda *given: calls.append(given) or real(*given))
    path.write_text(json.dumps({"aa": {"n": 1}, "bb": {"n": 2}}))
    assert len(Annotations(path)) == 2 and len(calls) == 1
    os.utime(path, (1, 1))
    assert Annotations(path).entry(1) == {"n": 2} and len(calls) == 1
    path.write_text(json.dumps({"aa": {"n": 1}, "cc": {"n": 2}}))
    assert Annotations(path).key(1) == "cc" and len(calls) == 2


def test_the_index_lies_where_it_is_wished_and_read_only_folders_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "INDEX_ABOVE_BYTES", 10)
    path = tmp_path / "data" / "part.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"aa": {"n": 1}}))
    Annotations(path, index_dir=tmp_path / "here")
    assert list((tmp_path / "here").glob("part-*.json.idx")) and not list(path.parent.glob("*.idx"))
    monkeypatch.setattr(annotations.os, "access", lambda *given: False)  # root may write everywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Annotations(path)
    assert list((tmp_path / "cache/opens2v").glob("part-*.json.idx")) and not list(path.parent.glob("*.idx"))


def test_ranks_that_start_together_write_one_index(tmp_path):
    path = tmp_path / "part.json"
    path.write_text(json.dumps({f"{place}": {"n": place} for place in range(2000)}))
    code = (
        "import sys; from opens2v.data import annotations as a; a.INDEX_ABOVE_BYTES = 10; real = a.write_index\n"
        "a.write_index = lambda *g: print('wrote') or real(*g)\n"
        "print(len(a.Annotations(sys.argv[1])))"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in "abc"
    ]
    said = "".join(rank.communicate()[0] for rank in ranks)
    assert said.count("wrote") == 1 and said.count("2000") == 3
