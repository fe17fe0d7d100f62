"""How a command ends when the disk, the console or a stored file fails: one sentence, exit code 2, nothing lost."""

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from shared.data import BadSamples, check_shared_memory
from shared.engine.checkpoint import load_weights
from shared.errors import CheckpointError, Stopped, UserError, command, write_text, written_aside
from shared.report.page import write_report
from tests.launching import ENVIRONMENT, ROOT, losses, newest
from tests.shared.test_resume import TOY, case, write
from tests.shared.test_shards import make_shard

# --- disk and console -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("filename", [None, "place/file"])
def test_what_a_disk_answers_is_a_sentence(capsys, number, filename):
    @command
    def main(argv):
        raise OSError(number, os.strerror(number), filename) if filename else OSError(number, os.strerror(number))

    with pytest.raises(SystemExit) as left:
        main([])
    said = capsys.readouterr().err
    assert left.value.code == 2 and os.strerror(number) in said and (filename or "reading or writing") in said


def test_a_failing_fsync_names_the_file(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="notes.txt|content.part") as found:
        write_text(tmp_path / "notes.txt", "words", sync=True)
    assert str(tmp_path) in found.value.filename and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "action, said",
    [
        (lambda: json.loads("[" * 50_000 + "]" * 50_000), "nested too deeply"),
        (lambda: "name \udcff".encode(), "not UTF-8"),
        (lambda: b"\xff\xfe".decode(), "not UTF-8"),
    ],
)
def test_input_that_cannot_be_read_as_text_is_a_sentence(capsys, action, said):
    with pytest.raises(SystemExit) as left:
        command(lambda argv: action())([])
    assert left.value.code == 2 and said in capsys.readouterr().err


def full(how: str, path: Path) -> None:
    """What libraries make of a disk that is full."""
    if how == "safetensors":  # as its Rust says it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with open("/dev/full", "wb") as file:
        torch.save({"a": torch.zeros(100_000)}, file) if how == "torch" else file.write(bytes(100_000))


@pytest.mark.parametrize("how", ["safetensors", "torch", "plain"])
def test_a_full_disk_is_a_sentence_whatever_the_library_raises(tmp_path, capsys, how):
    @command
    def alone(argv):
        full(how, tmp_path / "a")

    @command
    def aside(argv):
        with written_aside(tmp_path / "a.bin") as temporary:
            full(how, temporary)

    for main, place in ((alone, "output folder"), (aside, f"{tmp_path}/a.bin")):
        with pytest.raises(SystemExit) as leaving:
            main([])
        assert leaving.value.code == 2
        assert f"error: {place}: the disk is full" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_error_that_only_follows_one_of_a_disk_stays_what_it_is(tmp_path):
    with pytest.raises(UserError, match="not wanted"), written_aside(tmp_path / "a"):
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            raise UserError("not wanted") from None
    with pytest.raises(KeyError), written_aside(tmp_path / "a"):
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            raise KeyError("a") from None
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_system_keep_their_traceback():
    @command
    def main(argv):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        main([])


@pytest.mark.parametrize("shell", ["{command} | head -1", "{command} > /dev/full"])
def test_training_goes_on_when_the_console_is_closed_or_full(tmp_path, shell):
    path = write(tmp_path, **case(tmp_path / "run", training={"total_steps": 40}))
    line = shell.format(command=f"{sys.executable} {TOY} {path}")
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and len(losses(tmp_path / "run")) == 40
    assert newest(tmp_path / "run").name == "step_00000040" and (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("shell, said", [("{command} | true", "console"), ("{command} > /dev/full", "console")])
def test_a_closed_or_full_console_is_named(tmp_path, shell, said):
    script = tmp_path / "talk.py"
    script.write_text(
        f"import sys, time\nsys.path[0] = {str(ROOT)!r}\nfrom shared.errors import command\n"
        "@command\ndef main(argv=None):\n    time.sleep(0.3)\n    print('words', flush=True)\nmain()\n"
    )
    line = "set -o pipefail; " + shell.format(command=f"{sys.executable} {script}")
    done = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr


def test_a_full_shared_memory_is_said_before_processes_start(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(16384, 16384, 0))
    with pytest.raises(UserError, match="--num-workers 2: .* has 0 kB free.*--shm-size"):
        check_shared_memory(2, tmp_path)
    check_shared_memory(0, tmp_path)


# --- stored files -----------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def another(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3, np.int32))


def pickled(path):
    with open(path, "wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, empty, zero, another, pickled])
@pytest.mark.parametrize("part", ["starts", "members"])
def test_a_damaged_shard_index_is_made_again(tmp_path, damage, part):
    from shared.media.shards import Shards

    shard = tmp_path / "a.tar"
    make_shard(shard, {str(i): {"txt": b"x%d" % i} for i in range(5)})
    whole = [Shards([shard])[i] for i in range(5)]
    (index,) = tmp_path.glob(f".a.tar.*{part}.npy")
    damage(index)
    assert [Shards([shard])[i] for i in range(5)] == whole
    sizes = index.stat().st_size
    assert [Shards([shard])[i] for i in range(5)] == whole and index.stat().st_size == sizes


def test_a_file_of_python_objects_is_refused_without_the_advice_to_trust_it(tmp_path):
    torch.save({"model": Thing()}, tmp_path / "thing.pt")
    with pytest.raises(CheckpointError, match="Python objects") as found:
        load_weights(tmp_path / "thing.pt")
    assert "weights_only" not in str(found.value)
    (tmp_path / "words.pt").write_text('{"a": 1}\n')
    with pytest.raises(CheckpointError, match="cannot be read as weights .neither"):
        load_weights(tmp_path / "words.pt")


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_file_of_weights_that_is_cut_anywhere_is_a_sentence(tmp_path, kind):
    weights = {f"block.{number}.weight": torch.ones(40, 40) for number in range(8)}
    path = tmp_path / f"cut.{kind}"
    (torch.save if kind == "pt" else save_file)(weights, path)
    whole = path.read_bytes()
    for length in (0, 1, 4, 100, 5000, 20000, len(whole) - 1000, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_weights(path)


class Thing:
    pass


def test_bytes_without_a_name_are_not_named_by_their_address(tmp_path):
    bad = BadSamples(tmp_path / "bad.jsonl", 500)
    bad.note([(3, "cannot identify image file <_io.BytesIO object at 0x7f12ab>")])
    assert json.loads((tmp_path / "bad.jsonl").read_text())["reason"] == "cannot identify image file the file"


# --- the report -------------------------------------------------------------------------------------------------------

NASTY = '<script>alert(1)</script> | [x](javascript:y) `z`\n# heading "quoted"'


def test_no_text_becomes_markup_in_either_page(tmp_path):
    from shared.report.page import Bar, Sample, write_index

    bars = [Bar(NASTY, 1.0, baseline=2.0, target=3.0, note=NASTY)]
    samples = [Sample(f"{NASTY[:7]}.txt", caption=NASTY, group=NASTY)]
    (tmp_path / f"{NASTY[:7]}.txt").write_text(NASTY)
    path = write_report(
        tmp_path, title=NASTY, command=NASTY, summary={NASTY: NASTY}, bars=bars, samples=samples, text=NASTY
    )
    text = (tmp_path / "report.md").read_text()
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert (
        "<script" not in outside
        and not re.search(r"(?<!\\)\]\(javascript", outside)
        and not any(line.startswith("# heading") for line in text.splitlines())
    )
    assert all(line.count(" | ") == 4 for line in text.splitlines() if line.startswith("| &lt;"))
    report = json.loads(path.read_text())
    report["bars"][0].update(value=NASTY, baseline=NASTY, target=NASTY, direction=NASTY, reached=NASTY)
    path.write_text(json.dumps(report))
    write_index([path], tmp_path / "index.html")
    for name in ("report.html", "index.html"):
        assert "<script>alert" not in (tmp_path / name).read_text()


# --- folders of public models -----------------------------------------------------------------------------------------

DAMAGED = {
    "cut": b'{"model": {"type": "BP',
    "empty": b"",
    "a list": b"[]",
    "no keys": b"{}",
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_folder_of_a_public_model_is_a_sentence_in_every_system(tmp_path, content):
    """Configuration, tokenizer and weights alike; the libraries raise what they like, down to a bare Exception."""
    from bagel.data.tokenizer import FolderTokenizer
    from dit.modules.features import FeatureEncoder
    from dit.modules.text import LanguageEncoder, TextEncoder
    from float.modules.audio import AudioEncoder
    from opens2v.modules.encoders import load_clip
    from shared.metrics import ClipScorer

    for name in ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
    folder = str(tmp_path)
    for opened in (
        lambda: FolderTokenizer(tmp_path),
        lambda: TextEncoder(folder, local_files_only=True),
        lambda: LanguageEncoder(folder, length=8, local_files_only=True),
        lambda: FeatureEncoder(folder),
        lambda: AudioEncoder.from_pretrained(folder, only_last_features=True),
        lambda: load_clip(folder),
        lambda: ClipScorer(folder),
    ):
        with pytest.raises(UserError, match="cannot be loaded") as found:
            opened()
        assert folder in str(found.value) and "\n" not in str(found.value)


def test_a_public_model_that_lacks_weights_is_not_filled_with_random_numbers(tmp_path):
    """transformers and diffusers only warn: a run would train on a frozen encoder of noise."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, Wav2Vec2Model

    from dit.modules.text import TextEncoder
    from dit.modules.vae import VAEEncoder
    from float.modules.audio import AudioEncoder
    from opens2v.modules.encoders import load_clip, load_umt5, load_wan_vae
    from shared.errors import load_whole
    from tests.roads import encoders

    text, vae, sound, wan = (tmp_path / name for name in ("text", "vae", "sound", "wan"))
    encoders.clip_text(text), encoders.picture_vae(vae), encoders.wav2vec(sound), encoders.wan(wan)
    vae = vae / "vae" if (vae / "vae").is_dir() else vae
    cases = [
        (text, lambda: TextEncoder(str(text), length=8, local_files_only=True)),
        (vae, lambda: VAEEncoder(str(vae), local_files_only=True)),
        (sound, lambda: AudioEncoder.from_pretrained(str(sound), only_last_features=True)),
        (wan / "vae", lambda: load_wan_vae(str(wan))),
        (wan / "text_encoder", lambda: load_umt5(str(wan))),
        (wan / "image_encoder", lambda: load_clip(str(wan / "image_encoder"))),
    ]
    for folder, opened in cases:
        opened()
        (file,) = folder.glob("*.safetensors")
        weights = load_file(file)
        save_file(dict(sorted(weights.items())[: len(weights) // 2]), file, {"format": "pt"})
        with pytest.raises(UserError, match="of its weights are missing or of another shape, such as"):
            opened()
    for loader, folder in ((CLIPTextModel, text), (AutoencoderKL, vae), (Wav2Vec2Model, sound)):
        with pytest.raises(ValueError, match="are missing"):
            load_whole(loader, folder)


def test_a_phase_that_was_stopped_ends_the_command_with_code_0(capsys, monkeypatch):
    @command
    def main(argv):
        raise Stopped("the autoencoder was stopped at step 3 of 8; the same command goes on from there")

    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            main([])
        found = capsys.readouterr()
        assert left.value.code == 0 and found.out.count("stopped at step 3 of 8") == said and not found.err


def outputs(folder: Path) -> list[tuple[str, str]]:
    """(a path that cannot be written to, what is said of it); the folder gets a file and a folder."""
    (folder / "file").write_text("")
    return [
        (str(folder / "file" / "a.mp4"), "is not a folder"),
        (str(folder / "there.mp4"), "a folder; give the name"),
        ("/proc/1/a.mp4", "permission denied"),
        (" ", "is empty"),
    ]


@pytest.mark.parametrize(
    "module, suffix",
    [
        ("dit.generate", ".png"), ("dit.metrics", ".json"), ("float.generate", ".mp4"), ("float.metrics", ".json"),
        ("float.weights.released", ".pth"), ("bagel.generate", ".png"), ("bagel.metrics", ".json"),
        ("opens2v.generate", ".mp4"), ("opens2v.metrics", ".json"), ("multimodal.generate", ".png"),
        ("multimodal.metrics", ".json"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_said_before_anything_is_opened(tmp_path, capsys, module, suffix):
    main = importlib.import_module(module).main
    for path, said in outputs(tmp_path):
        (tmp_path / f"there{suffix}").mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as leaving:
            main(["--checkpoint", "/nowhere", "--output", path.replace(".mp4", suffix)])
        error = capsys.readouterr().err
        assert leaving.value.code == 2 and "--output" in error and said in error, error


@pytest.mark.parametrize(
    "module, name, said",
    [
        ("dit.generate", "a.gif", "pictures are written as .png"), ("float.generate", "a.txt", "ends in .mp4"),
        ("bagel.generate", "a.mp3", "ends in .png or .txt"), ("bagel.metrics", "a.txt", "ends in .json"),
        ("opens2v.generate", "a.xyz", "ends in .mp4"), ("multimodal.generate", "a.mp4", "ends in .png or .json"),
    ],
)  # fmt: skip
def test_an_output_of_another_kind_is_refused(tmp_path, capsys, module, name, said):
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(module).main(["--checkpoint", "/nowhere", "--output", str(tmp_path / name)])
    assert leaving.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module, words",
    [
        ("multimodal.download_datasets", ["--datasets", "coco", "--dry-run", "--data-root", "FILE/below"]),
        ("float.prepare", ["--data-root", ".", "--output-dir", "FILE/below"]),
        ("float.prepare", ["--data-root", "FILE", "--output-dir", "OUT"]),
        ("shared.engine.convert", ["/nowhere", "--output", "FILE/below"]),
        ("shared.report.page", ["/nowhere.json", "--output", "FILE/below"]),
    ],
)
def test_places_of_the_other_commands_are_looked_at_first(tmp_path, capsys, module, words):
    (tmp_path / "file").write_text("words")
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(module).main(
            [word.replace("FILE", f"{tmp_path}/file").replace("OUT", f"{tmp_path}/out") for word in words]
        )
    assert leaving.value.code == 2 and f"{tmp_path}/file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_reader_of_weights_passes_on_the_advice_to_trust_a_file(tmp_path):
    from dit.weights.guide import read_weights_file as of_dit
    from multimodal.weights.files import read_payload
    from opens2v.weights.export import read_trained
    from opens2v.weights.wan import read_tensors_file

    torch.save({"model": Thing()}, tmp_path / "thing.pt")
    (tmp_path / "words.pt").write_text("words")
    for read in (of_dit, read_payload, read_trained, read_tensors_file, load_weights):
        for name, said in (("thing.pt", "holds Python objects"), ("words.pt", "cannot be read as weights")):
            with pytest.raises(CheckpointError, match=said) as found:
                read(tmp_path / name)
            assert "weights_only" not in str(found.value)
