"""Reading clips, sound, pictures and cached features; what is refused, and in which words."""

import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from float.config import DataConfig, ModelConfig
from float.data.clips import Clip, find_clips
from float.data.face import Face, Framing, crop_centre, crop_to_box, prepare_portrait, read_boxes
from float.data.features import ClipEncoder, cached_metadata, encode_clips
from float.data.frames import ClipReader, FramePairs, FrameStore, collate_pairs, finished
from float.data.media import is_silent, iterate_frames, read_audio, read_image, seek_frame, write_video
from float.dataset import FeatureFile, FLOATDataset, collate_windows, create_dataloader
from float.modules.audio import frames_of
from float.modules.emotion import emotion_index, ravdess_emotion
from float.weights.open import make_autoencoder
from shared.errors import BadSample, UserError
from tests.float.material import SIDE, wave_of, write_clip, write_feature_clip, write_mp3
from tests.float.material import frames_of as pictures


def settings(**changes) -> tuple[ModelConfig, DataConfig]:
    model = ModelConfig(
        input_size=SIDE,
        dim_w=8,
        dim_m=3,
        dim_h=8,
        num_heads=1,
        channels={4: 8, 8: 8, 16: 8, 32: 8},
        autoencoder="compact",
        audio_features="logmel",
    )
    return model, DataConfig(**{"emotion_source": "label", "use_augmentation": False} | changes)


@pytest.fixture
def encoder():
    model, data = settings()
    return ClipEncoder(model, data, make_autoencoder(model).eval(), torch.device("cpu"))


# --- media ------------------------------------------------------------------------------------------------------------


def test_stereo_mp3_of_another_rate_becomes_mono_16_khz(tmp_path):
    write_mp3(tmp_path / "a.mp3", 1.5)
    wave = read_audio(tmp_path / "a.mp3")
    assert wave.dtype == np.float32 and wave.ndim == 1 and abs(len(wave) / 16000 - 1.5) < 0.1 and not is_silent(wave)


def test_a_video_keeps_its_frames_rate_and_sound(tmp_path):
    count = write_video(tmp_path / "a.mp4", iter(pictures(33)), fps=25, wave=wave_of(5))
    assert count == 33 == len(list(iterate_frames(tmp_path / "a.mp4", 25)))
    assert abs(len(read_audio(tmp_path / "a.mp4")) - 33 * 640) <= 2048  # AAC works in blocks of 1024
    assert len(list(iterate_frames(tmp_path / "a.mp4", 12.5))) in (16, 17)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failed_video_leaves_nothing_behind(tmp_path):
    def broken():
        yield pictures(1)[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "a.mp4", broken(), fps=25, wave=wave_of(1))
    assert not list(tmp_path.iterdir())


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF nothing")
    (tmp_path / "a.png").write_bytes(b"nothing")
    for reader, name, words in (
        (read_audio, "a.wav", "cannot be read as sound"),
        (read_image, "a.png", "cannot be read as a picture"),
        (read_audio, "b.wav", "no such file"),
    ):
        with pytest.raises(BadSample, match=words):
            reader(tmp_path / name)
    write_clip(tmp_path, "mute", sound="none")
    with pytest.raises(BadSample, match="no sound track"):
        read_audio(tmp_path / "mute.mp4")
    with pytest.raises(BadSample, match="cannot be read as video"):
        list(iterate_frames(tmp_path / "a.png", 25))


def test_another_rate_takes_the_frame_shown_in_the_middle(tmp_path):
    write_video(tmp_path / "a.mp4", (np.full((SIDE, SIDE, 3), 8 * index, np.uint8) for index in range(30)), fps=25)
    for fps, wanted in ((12.5, [1, 3, 5, 7]), (50, [0, 0, 1, 1]), (25, [0, 1, 2, 3])):
        found = [frame.mean() / 8 for frame in iterate_frames(tmp_path / "a.mp4", fps)][:4]
        assert np.abs(np.array(found) - wanted).max() < 0.5, fps


def test_seeking_finds_the_frame(tmp_path):
    write_video(tmp_path / "a.mp4", (np.full((SIDE, SIDE, 3), 8 * index, np.uint8) for index in range(30)), fps=25)
    for index in (0, 13, 29):
        assert abs(int(seek_frame(tmp_path / "a.mp4", (index + 0.5) / 25).mean()) - 8 * index) <= 4


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_folder_layouts_of_the_public_sets(tmp_path):
    write_clip(tmp_path / "train" / "Actor_01", "02-01-06-01-02-01-01_processed", frames=2)
    write_clip(tmp_path / "train" / "RD_Radio1", "RD_Radio1_000_processed", frames=2, sound="track")
    write_clip(tmp_path / "test" / "M003" / "disgusted", "001", frames=2)
    (tmp_path / "test" / "M003" / "disgusted" / "._001.mp4").write_bytes(b"a note of the file system")
    train, test = find_clips(tmp_path, "train"), find_clips(tmp_path, "test")
    assert {clip.identity: clip.emotion for clip in train} == {"Actor_01": 2, "RD_Radio1": None}
    assert {clip.audio.suffix for clip in train} == {".wav", ".mp4"}
    assert [(clip.identity, clip.emotion, clip.clip_id) for clip in test] == [("M003", 1, "M003__disgusted__001")]
    assert [ravdess_emotion(f"02-01-0{code}-01-01-01-01") for code in range(1, 9)] == [4, 4, 3, 5, 0, 2, 1, 6]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "no clips of split 'train'"),
        (
            lambda root: (root.mkdir(), (root / "metadata.csv").write_text("clip_id,video\na,b\n")),
            "columns split are missing",
        ),
        (
            lambda root: (
                root.mkdir(),
                (root / "metadata.csv").write_text("clip_id,video,video,split,,\na,b,c,train\n"),
            ),
            "column 'video' occurs twice",
        ),
        (
            lambda root: (
                root.mkdir(),
                (root / "metadata.csv").write_text("clip_id,video,split,emotion_index\na,b,train,9\n"),
            ),
            "emotion_index '9'",
        ),
        (
            lambda root: (
                root.mkdir(),
                (root / "metadata.csv").write_text("clip_id,video,split\na,b,train\na,c,train\n"),
            ),
            "occur twice: a",
        ),
        (
            lambda root: (root.mkdir(), (root / "metadata.csv").write_text("clip_id,video,split\n../../up,b,train\n")),
            "clip id '../../up' cannot name a file",
        ),
        (
            lambda root: (
                root.mkdir(),
                (root / "metadata.csv").write_bytes("clip_id,video,split\n\xe9,b,train\n".encode("latin-1")),
            ),
            "metadata.csv: not a table in UTF-8",
        ),
        (
            lambda root: (root.mkdir(), (root / "metadata.csv").write_text("clip_id,video,split\na,,train\n")),
            "line 2: video is empty",
        ),
        (
            lambda root: (root.mkdir(), (root / "metadata.csv").write_text("clip_id,split,video\n,,\na,train\n")),
            "line 3: video is empty",
        ),
    ],
)
def test_faulty_data_folders_are_explained(tmp_path, make, words):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=words):
        find_clips(tmp_path / "data", "train")


# --- faces ------------------------------------------------------------------------------------------------------------


def test_the_crop_is_square_around_the_box_and_black_outside():
    picture = np.full((60, 80, 3), 200, np.uint8)
    crop = crop_to_box(picture, (0, 20, 20, 40), 32)  # half side 10 x 1.6 = 16, centre (10, 30): 6 columns lie outside
    assert crop.shape == (32, 32, 3) and (crop[:, :6] == 0).all() and (crop[:, 6:] == 200).all()


def face_at(left: float, top: float, side: float) -> Face:
    return Face((left, top, left + side, top + side), 0.9, np.zeros((5, 2)))


def test_a_portrait_is_cropped_to_its_main_face():
    picture = np.full((60, 80, 3), 200, np.uint8)
    with pytest.raises(UserError, match="portrait.png: no face found; use another picture, give --face-box"):
        prepare_portrait(picture, 32, name="portrait.png", detector=lambda picture: [])
    picture[20:40, 30:50] = 90
    small, large = face_at(2, 2, 8), face_at(30, 20, 20)
    cropped, note = prepare_portrait(picture, 32, name="a", detector=lambda picture: [small, large])
    assert (cropped[16, 16] == 90).all() and (cropped[1, 1] == 200).all() and "2 faces" in note
    for wrong in ((10, 10, 5, 20), (200, 200, 240, 240)):
        with pytest.raises(UserError, match="face box"):
            crop_to_box(picture, wrong, 32)
    assert crop_centre(picture, 16).shape == (16, 16, 3)


def test_another_photo_is_framed_as_the_training_clips_are():
    """Half the side of the clips is face, which sits above the middle: so in a photo of any size."""
    frames = [np.zeros((100, 100, 3), np.uint8)] * 4
    framing = Framing.of_frames(frames, lambda frame: [face_at(25, 15, 50)])
    assert framing is not None and np.allclose((framing.margin, *framing.shift), (2.0, 0.0, 0.1))
    photo = np.zeros((300, 400, 3), np.uint8)
    photo[100:160, 200:260] = 250  # a face of 60 pixels
    bright = framing.crop(photo, (200, 100, 260, 160), 120)[..., 0] > 125
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    assert abs(len(rows) - 60) <= 1 and abs(rows.mean() - 47.5) < 1.5 and abs(columns.mean() - 59.5) < 1.5
    assert Framing.of_frames(frames, lambda frame: []) is None


@pytest.mark.parametrize("shape", [(48, 80), (90, 40)])
def test_a_clip_that_is_not_square_is_cropped_and_never_squeezed(tmp_path, shape, monkeypatch):
    height, width = shape
    picture = np.full((height, width, 3), 100, np.uint8)
    picture[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8] = 250  # a square in the middle
    write_video(tmp_path / "a.mp4", [picture] * 10, fps=25)
    clip, side = Clip("a", tmp_path / "a.mp4", tmp_path / "a.mp4", "nobody"), min(shape)

    def bright(reader: ClipReader) -> tuple[int, int]:
        lit = next(reader.frames(clip))[..., 0] > 175
        return int(lit.any(1).sum()), int(lit.any(0).sum())

    monkeypatch.setattr("float.data.frames.default_detector", lambda: None)
    reader = ClipReader(side, settings()[1], {})
    assert all(abs(count - 16) <= 1 for count in bright(reader))
    assert f"{width} x {height} pixels" in reader.notes[0] and "centre square" in reader.notes[0]
    corner = (width // 2 - 10, height // 2 - 10, width // 2 + 10, height // 2 + 10)
    boxed = ClipReader(32, settings()[1], {"a": corner})
    assert all(abs(count - 16) <= 1 for count in bright(boxed)) and not boxed.notes  # 20 pixels x 1.6 are 32
    monkeypatch.setattr("float.data.frames.default_detector", lambda: lambda picture: [face_at(*corner[:2], 20)])
    assert all(abs(count - 16) <= 1 for count in bright(ClipReader(32, settings()[1], {})))


def test_a_table_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbfclip_id,video,split\r\na,a.mp4,train\r\n")
    assert [clip.clip_id for clip in find_clips(tmp_path, "train")] == ["a"]


def test_pictures_are_turned_upright_and_16_bits_keep_their_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (8, 4, 3)
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png")[0, 0].tolist() == [128, 128, 128]


def test_boxes_file(tmp_path):
    assert read_boxes(tmp_path) == {}
    (tmp_path / "boxes.json").write_text(json.dumps({"a": [1, 2, 3, 4]}))
    assert read_boxes(tmp_path) == {"a": (1.0, 2.0, 3.0, 4.0)}
    for wrong in ("[1]", "", '{"a": [1, 2, 3]}', '{"a": "abcd"}'):
        (tmp_path / "boxes.json").write_text(wrong)
        with pytest.raises(UserError, match="boxes.json"):
            read_boxes(tmp_path)


def test_emotion_names():
    assert emotion_index("Happy") == 3
    with pytest.raises(UserError, match="use one of angry"):
        emotion_index("bored")


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_encoding_resumes_and_follows_the_encoders(tmp_path, encoder):
    write_clip(tmp_path / "train" / "a", "one", frames=20)
    write_clip(tmp_path / "train" / "b", "two", frames=12)
    clips, folder = find_clips(tmp_path, "train"), tmp_path / "cache"
    first = encode_clips(encoder, clips, {}, folder, rank=0, world=2)
    assert first.encoded == ["a__one"]
    rest = encode_clips(encoder, clips, {}, folder)
    assert rest.encoded == ["b__two"] and rest.kept == ["a__one"]
    (folder / "a__one.safetensors").write_bytes(b"broken")
    assert encode_clips(encoder, clips, {}, folder).encoded == ["a__one"]
    model, data = settings()
    other = ClipEncoder(model, data, make_autoencoder(model).eval(), torch.device("cpu"))
    assert cached_metadata(folder / "a__one.safetensors")["encoders"] == encoder.hash != other.hash
    assert encode_clips(other, clips, {}, folder).encoded == ["a__one", "b__two"]


def test_poses_are_cached_where_they_are_a_condition(tmp_path, encoder):
    """One row a frame, across batches; other settings, other cache. A window has them against its reference frame."""
    write_clip(tmp_path / "train" / "a", "one", frames=40)
    clips, folder = find_clips(tmp_path, "train"), tmp_path / "cache"
    encode_clips(encoder, clips, {}, folder)
    model = encoder.model.model_copy(update={"pose_condition": True})
    posed = ClipEncoder(model, encoder.data, encoder.autoencoder, torch.device("cpu"))
    assert encode_clips(posed, clips, {}, folder).encoded == ["a__one"]
    with FeatureFile(folder / "a__one.safetensors") as file:
        pose = file.rows("pose")
    assert pose.shape == (40, 6) and pose[0].abs().max() < 1e-3 and torch.isfinite(pose).all()
    rows = {"pose": torch.arange(30.0)[:, None].repeat(1, 6), "motion_flipped": torch.zeros(30, 5)}
    write_feature_clip(tmp_path / "windows", "clip", 30, **rows)
    data = DataConfig(sequence_length=8, prev_frames=3, wav2vec_sec=0.32)
    fixed = FLOATDataset(tmp_path / "windows", data, train=False)
    first, second = fixed[0]["pose"], fixed[1]["pose"]
    assert first.shape == (11, 7) and not first[:3].any() and second[:, 6].all()
    assert second[:, 0].tolist() == [15.0 * frame for frame in range(5, 16)]
    mirrored = FLOATDataset(
        tmp_path / "windows", data.model_copy(update={"horizontal_flip_prob": 1.0}), train=True, seed=1
    )
    given = collate_windows([mirrored.sample(0, epoch) for epoch in range(6)])["pose"][:, 3:, :6]
    assert torch.equal(20 * given[..., 0], -15 * given[..., 1]) and given.diff(dim=1)[..., 1].eq(20).all()


def test_a_cache_for_two_data_folders_removes_and_replaces_nothing(tmp_path, encoder):
    for name in ("dsA", "dsB"):
        write_clip(tmp_path / name / "train" / "a", f"of_{name}", frames=12, seed=1)
        write_clip(tmp_path / name / "train" / "a", "both", frames=12, seed=len(name))
    write_clip(tmp_path / "dsB" / "train" / "a", "both", frames=16, seed=7)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "my_other_model.safetensors").write_bytes(b"of the user")
    assert encode_clips(encoder, find_clips(tmp_path / "dsA", "train"), {}, folder).encoded == ["a__both", "a__of_dsA"]
    before = (folder / "a__both.safetensors").read_bytes()
    with pytest.raises(UserError, match="a__both.safetensors: holds the clip .*dsA.*; give another --features-dir"):
        encode_clips(encoder, find_clips(tmp_path / "dsB", "train"), {}, folder)
    assert (folder / "a__both.safetensors").read_bytes() == before
    assert (folder / "my_other_model.safetensors").read_bytes() == b"of the user"
    dataset = FLOATDataset(folder, encoder.data, train=True, clips=["a__of_dsA"])
    assert [path.stem for path in dataset.paths] == ["a__of_dsA"]  # what lies there besides is not trained on
    (folder / "a__of_dsA.safetensors").write_bytes((folder / "my_other_model.safetensors").read_bytes())
    assert "a__of_dsA" in encode_clips(encoder, find_clips(tmp_path / "dsA", "train"), {}, folder).encoded


def test_a_file_of_another_program_is_not_overwritten(tmp_path, encoder):
    from safetensors.torch import save_file

    write_clip(tmp_path / "train" / "a", "one", frames=12)
    (tmp_path / "cache").mkdir()
    save_file({"weights": torch.zeros(3)}, tmp_path / "cache" / "a__one.safetensors")
    with pytest.raises(UserError, match="was not written by this program"):
        encode_clips(encoder, find_clips(tmp_path, "train"), {}, tmp_path / "cache")


def test_a_clip_that_changes_on_disk_is_encoded_again_and_a_moved_one_is_not(tmp_path, encoder):
    write_clip(tmp_path / "data" / "train" / "a", "one", frames=12)
    folder = tmp_path / "cache"
    assert encode_clips(encoder, find_clips(tmp_path / "data", "train"), {}, folder).encoded
    (tmp_path / "data").rename(tmp_path / "moved")
    assert encode_clips(encoder, find_clips(tmp_path / "moved", "train"), {}, folder).kept == ["a__one"]
    write_clip(tmp_path / "moved" / "train" / "a", "one", frames=20, seed=3)
    assert encode_clips(encoder, find_clips(tmp_path / "moved", "train"), {}, folder).encoded == ["a__one"]
    assert oct((folder / "a__one.safetensors").stat().st_mode)[-3:] == "644"


def test_picture_and_sound_of_a_clip_begin_together(tmp_path, encoder):
    """A picture that begins 0.4 s after the sound: these frames are left out of both."""
    from tests.float.test_media import click_at, every, write

    (tmp_path / "train" / "a").mkdir(parents=True)
    path = write(tmp_path / "train" / "a" / "late.mp4", [0.4 + t for t in every(25, 2)], wave=click_at(1.0, 2.4))
    clip, reader = find_clips(tmp_path, "train")[0], ClipReader(SIDE, encoder.data, {})
    assert reader.first(clip) == 10 and abs(np.abs(reader.sound(clip, 10)).argmax() / 16000 - 0.62) < 0.03
    tensors, notes = encoder.encode(clip, {})
    assert 48 <= len(tensors["motion"]) <= 50 == 50 and "the picture begins at 0.40 s" in notes[0]
    assert path.exists() and len(tensors["audio_raw"]) == len(tensors["motion"])


def test_sound_next_to_the_video_is_found_whatever_its_letters_and_kind(tmp_path):
    for index, suffix in enumerate((".WAV", ".Wav", ".ogg", ".opus", ".aac", ".mp3", ".FLAC")):
        path = write_clip(tmp_path / "train" / f"id{index}", "Clip", frames=4, sound="none")
        path.rename(path.with_suffix(".MP4"))
        path.with_name("clip" + suffix).write_bytes(b"sound")
    found = find_clips(tmp_path, "train")
    assert [clip.audio.suffix for clip in found] == [".WAV", ".Wav", ".ogg", ".opus", ".aac", ".mp3", ".FLAC"]


def test_a_long_clip_is_encoded_as_it_is_read(tmp_path, encoder, monkeypatch):
    """No more than a batch of its frames is in memory at once."""
    write_clip(tmp_path / "train" / "a", "one", frames=100)
    reading, encoding, plain = [], [], ClipEncoder.motion
    frames = ClipReader.frames
    monkeypatch.setattr(ClipReader, "frames", lambda *given: (reading.append(0) or frame for frame in frames(*given)))
    monkeypatch.setattr(
        ClipEncoder, "motion", lambda self, x: encoding.append((len(reading), len(x))) or plain(self, x)
    )
    assert encode_clips(encoder, find_clips(tmp_path, "train"), {}, tmp_path / "cache").encoded == ["a__one"]
    assert encoding == [(32, 32), (64, 32), (96, 32), (100, 4)]


def test_rules_for_odd_clips(tmp_path, encoder):
    folder = tmp_path / "train" / "a"
    write_clip(folder, "long_sound", frames=20, seconds=2.0)
    write_clip(folder, "short_sound", frames=30, seconds=0.6)
    write_clip(folder, "mute", frames=10, sound="none")
    path = write_clip(folder, "silent", frames=10)
    soundfile.write(path.with_suffix(".wav"), np.zeros(6400), 16000)
    done = encode_clips(encoder, find_clips(tmp_path, "train"), {}, tmp_path / "cache")
    assert sorted(done.encoded) == ["a__long_sound", "a__short_sound"]
    assert any("no sound track" in sentence for sentence in done.bad) and any(
        "is silent" in sentence for sentence in done.bad
    )
    assert len(done.notes) == 2 and "cut to the shorter" in done.notes[0]
    dataset = FLOATDataset(tmp_path / "cache", encoder.data, train=False)
    lengths = {path.stem: FLOATDataset._frames(path) for path in dataset.paths}
    assert lengths == {"a__long_sound": 20, "a__short_sound": 15}


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_hold_the_right_frames(tmp_path):
    write_feature_clip(tmp_path, "clip", 50)
    _, data = settings()
    dataset = FLOATDataset(tmp_path, data, train=False)
    assert len(dataset) == 3
    first, second = dataset[0], dataset[1]
    assert not first["has_previous"] and first["motion_latent_prev"].abs().max() == 0
    assert second["motion_latent_cur"][:, 0].tolist() == [16.5 + k for k in range(16)]
    assert second["motion_latent_prev"][:, 0].tolist() == [12.5, 13.5, 14.5, 15.5]
    assert second["audio_cur"][0, 0] == 116 and second["audio_prev"][-1, 0] == 115
    assert (
        second["reference_motion"][0] == 0.5
        and second["emotion_features"].shape == (1, 7)
        and second["clip_id"] == "clip"
    )


def test_training_windows_are_a_function_of_seed_epoch_and_index(tmp_path):
    write_feature_clip(tmp_path, "clip", 60)
    _, data = settings()
    dataset = FLOATDataset(tmp_path, data, train=True, seed=3)
    starts = {int(dataset.sample(0, epoch)["motion_latent_cur"][0, 0]) for epoch in range(40)}
    assert len(starts) > 15 and min(starts) >= 0 and max(starts) <= 44
    again = FLOATDataset(tmp_path, data, train=True, seed=3)
    assert torch.equal(dataset.sample(1, 7)["motion_latent_cur"], again.sample(1, 7)["motion_latent_cur"])


def test_a_clip_shorter_than_a_window_is_filled_with_its_last_frame(tmp_path):
    write_feature_clip(tmp_path, "clip", 5)
    _, data = settings()
    for train in (True, False):
        item = FLOATDataset(tmp_path, data, train=train)[0]
        assert item["motion_latent_cur"][:, 0].tolist() == [0.5, 1.5, 2.5, 3.5] + [4.5] * 12
        assert not item["has_previous"]


def test_half_precision_sound_is_widened_after_the_loader(tmp_path):
    sound = (torch.arange(50.0)[:, None] * 60).expand(-1, 3).half()  # the sum of a window is beyond float16
    write_feature_clip(tmp_path, "clip", 50, audio_raw=sound)
    dataset = FLOATDataset(tmp_path, settings()[1], train=False)
    stored, item = dataset.sample(1, 0), dataset[1]
    assert stored["audio_cur"].dtype == stored["audio_prev"].dtype == torch.float16
    assert item["audio_cur"].dtype == torch.float32 and torch.equal(item["audio_cur"], sound[16:32].float())


def test_broken_caches(tmp_path):
    _, data = settings()
    with pytest.raises(UserError, match="no encoded clips"):
        FLOATDataset(tmp_path, data, train=True)
    motion = torch.zeros(20, 5)
    motion[7, 2] = float("nan")
    write_feature_clip(tmp_path, "bad", 20, motion=motion)
    with pytest.raises(BadSample, match="bad.safetensors: motion_latent_cur holds numbers that are not finite"):
        FLOATDataset(tmp_path, data, train=False)[0]
    whole = (tmp_path / "bad.safetensors").read_bytes()
    dataset = FLOATDataset(tmp_path, data, train=False)
    headers = [b'["list"]', b'{"motion": 3}', b'{"motion": {"dtype": "F32", "shape": [-4, 5], "data_offsets": [0, 9]}}']
    other = [len(header).to_bytes(8, "little") + header for header in headers]
    for part in (b"nothing", whole[:40], whole[:-300], b"", whole.replace(b"audio_raw", b"audio_rav"), *other):
        (tmp_path / "bad.safetensors").write_bytes(part)
        with pytest.raises(BadSample, match="not a readable cache"):
            dataset.sample(0, 0)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable cache"):
        FLOATDataset(tmp_path, data, train=False)


def test_augmentation_and_transforms(tmp_path):
    write_feature_clip(tmp_path, "clip", 60, motion_flipped=torch.full((60, 5), -1.0))
    _, data = settings(use_augmentation=True, horizontal_flip_prob=0.5, gaussian_noise_prob=1.0)
    dataset = FLOATDataset(tmp_path, data, train=True, transforms=[lambda item: {**item, "clip_id": "changed"}])
    items = [dataset.sample(1, epoch) for epoch in range(40)]
    flipped = [bool((item["motion_latent_cur"] == -1).all()) for item in items]
    assert 8 < sum(flipped) < 32 and all(item["clip_id"] == "changed" for item in items)
    plain = next(
        item for item, is_flipped in zip(items, flipped, strict=True) if not is_flipped and item["has_previous"]
    )
    assert torch.equal(plain["motion_latent_prev_clean"][:, 0].diff(), torch.ones(3))  # what a loss may ask for
    gaps = plain["motion_latent_prev"][:, 0].diff()
    assert not torch.equal(gaps, torch.ones(3)) and (gaps - 1).abs().max() < 3
    assert dataset.sample(1, 0)["audio_cur"].min() >= 100


def test_the_loader_gives_whole_batches_whatever_the_workers(tmp_path):
    for name in "abc":
        write_feature_clip(tmp_path, name, 50)
    _, data = settings()
    dataset = FLOATDataset(tmp_path, data, train=True)
    batches = []
    for workers in (0, 1):
        stream = create_dataloader(dataset, batch_size=4, seed=5, num_workers=workers)
        stream.start(1, None)
        batches.append(stream.next_step()[0])
        stream.close()
    assert batches[0]["motion_latent_cur"].shape == (4, 16, 5) and batches[0]["clip_id"] == batches[1]["clip_id"]
    assert torch.equal(batches[0]["motion_latent_cur"], batches[1]["motion_latent_cur"])
    assert set(collate_windows([dataset[0]])) == set(batches[0]) - {"slot"}


def test_a_dataloader_is_gone_through_epoch_by_epoch(tmp_path):
    for name in "abc":
        write_feature_clip(tmp_path, name, 50)
    loader = create_dataloader(FLOATDataset(tmp_path, settings()[1], train=True), batch_size=4, seed=5)
    epochs = [[batch["motion_latent_cur"] for batch in loader] for _ in range(2)]
    assert len(loader) == 2 == len(epochs[0]) == len(epochs[1]) and epochs[0][0].shape == (4, 16, 5)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))  # another order in every epoch
    again = create_dataloader(FLOATDataset(tmp_path, settings()[1], train=True), batch_size=4, seed=5)
    assert torch.equal(next(iter(again))["motion_latent_cur"], epochs[0][0])


def test_frame_pairs_come_from_one_clip_and_by_key(tmp_path):
    for seed in range(2):
        write_clip(tmp_path / "train" / "a", f"c{seed}", frames=20, seed=seed)
    _, data = settings()
    store = FrameStore(find_clips(tmp_path, "train"), SIDE, data, {})
    pairs = FramePairs(store, pairs_per_second=10, seed=1, augment=False)
    assert len(pairs) == 16 and store.in_memory

    def pair_of(index: int, epoch: int) -> dict[str, torch.Tensor]:
        source, driving, wanted, back = finished(collate_pairs([pairs.sample(index, epoch)]))
        assert torch.equal(wanted, driving) and torch.equal(back, source)  # no colours are changed here
        return {"source": source[0], "driving": driving[0]}

    first, again = pair_of(3, 2), pair_of(3, 2)
    assert torch.equal(first["source"], again["source"]) and first["source"].shape == (3, SIDE, SIDE)
    for index in range(16):
        pair = pair_of(index, 0)
        assert (pair["source"][:, :20] - pair["driving"][:, :20]).abs().mean() < 0.05  # the same background
    changed = [not torch.equal(pair["source"], pair["driving"]) for pair in (pair_of(index, 0) for index in range(16))]
    assert sum(changed) > 8  # as a rule two different frames
    store.in_memory, kept = False, store.frame(1, 7)
    store._frames.clear()
    assert np.abs(store.frame(1, 7).astype(int) - kept).mean() < 2


def test_a_pair_has_two_colours_and_is_wanted_in_both(tmp_path):
    write_clip(tmp_path / "train" / "a", "c0", frames=20)
    _, data = settings()
    data.color_jitter_prob, data.horizontal_flip_prob = 1.0, 0.0
    pairs = FramePairs(
        FrameStore(find_clips(tmp_path, "train"), SIDE, data, {}), pairs_per_second=10, seed=1, augment=True
    )
    batch = collate_pairs([pairs.sample(index, 0) for index in range(4)])
    source, driving, wanted, back = finished(batch)
    plain = finished({**batch, "colour": torch.zeros(4, 2, 2, 3)})
    for made, frame, colour in ((source, 0, 0), (driving, 1, 1), (wanted, 1, 0), (back, 0, 1)):
        contrast, brightness = batch["colour"][:, colour, :, :, None, None].unbind(1)
        assert torch.equal(made, (plain[frame] * (1 + contrast) + brightness).clamp(-1, 1))
    assert not torch.allclose(wanted, driving, atol=0.05)


def test_frames_are_counted_upwards():
    assert [frames_of(samples, 25) for samples in (1, 640, 641, 16000)] == [1, 1, 2, 25]
