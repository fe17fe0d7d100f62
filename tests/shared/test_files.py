"""What is visible is whole, and nothing half-written stays."""

import os

import pytest

from shared.errors import command, remove_parts, write_text, written_aside


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "made" / "notes.txt"
    write_text(path, "old 一")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as temporary:
        temporary.write_text("ne")
        assert temporary.suffix == ".part" and temporary.parent == path.parent and path.read_text() == "old 一"
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old 一" and os.listdir(path.parent) == ["notes.txt"]
    write_text(path, "new", sync=True)
    assert path.read_text() == "new" and os.listdir(path.parent) == ["notes.txt"]


def test_what_fails_before_a_byte_is_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), written_aside(tmp_path / "notes.txt"):
        raise ValueError
    assert not os.listdir(tmp_path)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    write_text(tmp_path / "notes.txt", "whole")
    (tmp_path / ".notes.txt.123.part").write_text("ha")
    remove_parts(tmp_path)
    remove_parts(tmp_path / "none")
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("name", ["a folder", "below a file"])
def test_a_path_of_the_wrong_kind_ends_with_a_sentence(tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "notes.txt" if name == "below a file" else tmp_path

    @command
    def main(argv):
        write_text(path, "words") if name == "below a file" else path.read_text()

    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2 and str(tmp_path) in capsys.readouterr().err
