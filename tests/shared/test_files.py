"""What is visible is whole, and nothing half-written stays."""

import os
import signal
import subprocess
import sys

import pytest

from shared.errors import command, remove_parts, write_text, written_aside
from tests.launching import ENVIRONMENT, ROOT


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "made" / "notes.txt"
    write_text(path, "old 一")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as temporary:
        temporary.write_text("ne")
        assert temporary.suffix == ".part" and temporary.parent.parent == path.parent and path.read_text() == "old 一"
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


def test_a_folder_of_another_program_is_not_taken_for_a_dead_writers(tmp_path):
    for name, files in ((".mine.part", ("a.txt",)), (".empty.part", ()), (".dead.part", ("lock", "half"))):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("x")
    write_text(tmp_path / "notes.txt", "whole")
    assert sorted(os.listdir(tmp_path)) == [".mine.part", "notes.txt"] and (tmp_path / ".mine.part" / "a.txt").exists()


WRITER = """
import os, signal, sys, time
from shared.errors import written_aside
with written_aside(sys.argv[1]) as temporary:
    temporary.write_text("ha")
    (temporary.parent / ".tmpAbC123").write_text("a library's own")
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("here", flush=True)
    time.sleep(60)
"""


def start_writer(path, end):
    arguments = [sys.executable, "-c", WRITER, str(path), end]
    return subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def test_the_next_writer_clears_all_that_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    living = start_writer(tmp_path / "other.safetensors", "live")
    try:
        assert living.stdout.readline() == "here\n"
        assert start_writer(tmp_path / "cache.safetensors", "die").wait(30) == -signal.SIGKILL
        (dead,) = tmp_path.glob(".cache*.part")
        (alive,) = tmp_path.glob(".other*.part")
        assert len(list(dead.iterdir())) == len(list(alive.iterdir())) == 3  # both hold the library's own file
        write_text(tmp_path / "cache.safetensors", "whole")
        with written_aside(tmp_path / "more.txt") as temporary:
            temporary.write_text("more")
            remove_parts(os.path.relpath(tmp_path))  # this process's own stays too
        assert {path.name for path in tmp_path.iterdir()} == {"cache.safetensors", "more.txt", alive.name}
    finally:
        living.kill()
        living.wait()
    remove_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["cache.safetensors", "more.txt"]


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    write_text(tmp_path / ("x" * 250), "long")
    assert os.listdir(tmp_path) == ["x" * 250]


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
