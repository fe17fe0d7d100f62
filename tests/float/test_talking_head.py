"""The maker of the sample clips."""

import csv

import numpy as np
import pytest
import soundfile

from float.config import SAMPLE_DATA
from float.data.clips import find_clips
from float.data.media import iterate_frames
from float.evaluation.mouth_meter import read_truth
from float.sample_data.maker.make_talking_head import main, mouth_from_audio


def test_the_mouth_of_a_sample_clip_is_the_stated_function_of_its_sound():
    clip = find_clips(SAMPLE_DATA, "train")[0]
    wave, _ = soundfile.read(clip.audio)
    with open(clip.motion, newline="") as file:
        rows = list(csv.DictReader(file))
    curves = mouth_from_audio(wave, 25, len(rows))
    for name, curve in zip(("mouth_open", "mouth_wide", "teeth"), curves, strict=True):
        assert np.abs(curve - [float(row[name]) for row in rows]).max() < 0.03, name


def test_a_rendered_clip_is_a_data_folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.2 * np.sin(np.arange(8000) / 5), 16000)
    (tmp_path / "list.csv").write_text("clip_id,audio,identity,emotion,seed\none,a.wav,id05,happy,3\n")
    assert main(["--list", str(tmp_path / "list.csv"), "--out", str(tmp_path / "clips"), "--size", "64"]) == 1
    clip = find_clips(tmp_path / "clips", "train")[0]
    assert clip.emotion == 3 and len(read_truth(clip)) == 12 == len(list(iterate_frames(clip.video, 25)))
    again = [np.asarray(frame) for frame in iterate_frames(clip.video, 25)]
    assert again[0].shape == (64, 64, 3) and again[0].std() > 20


@pytest.mark.parametrize(
    "row, words",
    [
        ("one,a.wav,id09,happy,1", "identity 'id09'"),
        ("one,,id01,happy,1", "line 2: audio is empty"),
        ("one,a.wav,id01,happy,x", "line 2: seed 'x' is not a whole number"),
        ("one,a.wav,id01,happy,1", "3 samples of sound are shorter than a frame"),
    ],
)
def test_a_faulty_list_is_explained(tmp_path, row, words, capsys):
    (tmp_path / "list.csv").write_text(f"clip_id,audio,identity,emotion,seed\n{row}\n")
    soundfile.write(tmp_path / "a.wav", np.ones(3) * 0.5, 16000)
    with pytest.raises(SystemExit) as stopped:
        main(["--list", str(tmp_path / "list.csv"), "--out", str(tmp_path / "clips")])
    assert stopped.value.code == 2 and words in capsys.readouterr().err
