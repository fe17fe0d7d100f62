"""Reading clips, sound, pictures and cached features; what is refused, and in which words."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from float.config import DataConfig, ModelConfig
from float.data.clips import Clip, find_clips
from float.data.face import crop_centre, crop_to_box, detect_face, prepare_picture, read_boxes
from float.data.features import ClipEncoder, encode_clips, is_encoded, remove_unlisted
from float.data.frames import FramePairs, FrameStore, collate_pairs, finished, seek_frame
from float.data.media import is_silent, iterate_frames, read_audio, read_image, write_video
from float.dataset import FLOATDataset, collate_windows, create_dataloader
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


def test_a_picture_without_a_face():
    picture = np.full((60, 80, 3), 200, np.uint8)
    with pytest.raises(UserError, match="portrait.png: no face found"):
        prepare_picture(picture, 32, detector=lambda small: np.array([[1, 1, 9, 9, 0.5]]), name="portrait.png")
    with pytest.warns(UserWarning, match="no face box and no detector, the centre square is used"):
        assert prepare_picture(picture, 32).shape == (32, 32, 3)
    assert prepare_picture(picture, 32, crop=False).shape == (32, 32, 3)
    box = detect_face(picture, lambda small: np.array([[60, 60, 120, 120, 0.99]]))
    assert np.allclose(box, (10, 10, 20, 20))
    for wrong in ((10, 10, 5, 20), (200, 200, 240, 240)):
        with pytest.raises(UserError, match="face box"):
            crop_to_box(picture, wrong, 32)
    assert crop_centre(picture, 16).shape == (16, 16, 3)


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
    assert first["encoded"] == ["a__one"]
    rest = encode_clips(encoder, clips, {}, folder)
    assert rest["encoded"] == ["b__two"] and rest["kept"] == ["a__one"]
    (folder / "a__one.safetensors").write_bytes(b"broken")
    assert encode_clips(encoder, clips, {}, folder)["encoded"] == ["a__one"]
    model, data = settings()
    other = ClipEncoder(model, data, make_autoencoder(model).eval(), torch.device("cpu"))
    assert not is_encoded(folder / "a__one.safetensors", other.hash)
    assert encode_clips(other, clips, {}, folder)["encoded"] == ["a__one", "b__two"]


def test_features_of_clips_that_are_listed_no_more_are_removed(tmp_path):
    for name in ("kept", "moved"):
        write_feature_clip(tmp_path, name, 20)
    remove_unlisted([Clip("kept", Path(), Path(), "nobody")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_rules_for_odd_clips(tmp_path, encoder):
    folder = tmp_path / "train" / "a"
    write_clip(folder, "long_sound", frames=20, seconds=2.0)
    write_clip(folder, "short_sound", frames=30, seconds=0.6)
    write_clip(folder, "mute", frames=10, sound="none")
    path = write_clip(folder, "silent", frames=10)
    soundfile.write(path.with_suffix(".wav"), np.zeros(6400), 16000)
    done = encode_clips(encoder, find_clips(tmp_path, "train"), {}, tmp_path / "cache")
    assert sorted(done["encoded"]) == ["a__long_sound", "a__short_sound"]
    assert any("no sound track" in sentence for sentence in done["bad"]) and any(
        "is silent" in sentence for sentence in done["bad"]
    )
    assert len(done["notes"]) == 2 and "cut to the shorter" in done["notes"][0]
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


def test_frame_pairs_come_from_one_clip_and_by_key(tmp_path):
    for seed in range(2):
        write_clip(tmp_path / "train" / "a", f"c{seed}", frames=20, seed=seed)
    _, data = settings()
    store = FrameStore(find_clips(tmp_path, "train"), SIDE, data, {})
    pairs = FramePairs(store, pairs_per_second=10, seed=1, augment=False)
    assert len(pairs) == 16 and store.in_memory

    def pair_of(index: int, epoch: int) -> dict[str, torch.Tensor]:
        source, driving = finished(collate_pairs([pairs.sample(index, epoch)]))
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


def test_frames_are_counted_upwards():
    assert [frames_of(samples, 25) for samples in (1, 640, 641, 16000)] == [1, 1, 2, 25]
