"""Frames by their number in the order of presentation, in files of every kind of timing."""

import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from opens2v.data.video import fit_frame, frame_times, read_frames
from shared.errors import BadSample
from tests.opens2v.cases import part_paths


def write_clip(path, times_ms, codec="libx264", **options):
    """A clip whose frame i has the grey level 2 i, shown at times_ms[i]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"g": "12", **options}
        for place, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 2 * place, np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0])]


def phone(count: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(3).integers(20, 60, count))


TIMINGS = {
    "constant": lambda: np.arange(60) * 40,
    "phone": lambda: phone(60),
    "30 then 15": lambda: np.concatenate([np.arange(30) * 33, 1000 + np.arange(30) * 67]),
    "screen with a long rest": lambda: np.concatenate([np.arange(20) * 16, 5000 + np.arange(40) * 16]),
    "starts late": lambda: 2000 + phone(60),
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_a_number_is_the_same_frame_alone_together_and_counted(tmp_path, timing, b_frames, suffix):
    path = write_clip(tmp_path / f"clip.{suffix}", TIMINGS[timing](), bf=b_frames)
    truth = decoded(path)
    assert len(truth) == 60
    for number in (0, 1, 11, 12, 29, 30, 31, 47, 59):
        assert np.array_equal(read_frames(path, [number])[0], truth[number]), number
    several = [3, 3, 17, 40, 58, 80]
    assert np.array_equal(read_frames(path, several), np.stack([truth[min(number, 59)] for number in several]))
    assert np.allclose(frame_times(path), (TIMINGS[timing]() - TIMINGS[timing]()[0]) / 1000, atol=2e-3)


def without(source, path, lost):
    """A copy of a clip's packets without those that are lost."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for number, packet in enumerate(old.demux(stream)):
            if packet.dts is not None and number not in lost:
                packet.stream = copy
                new.mux(packet)
    return path


OPEN = {"bf": "3", "x264-params": "open-gop=1:keyint=12:min-keyint=12"}
HEVC = {"x265-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:log-level=none"}
CUTS = {  # codec, its options, the packets that are not there, container
    "before a key frame": ("libx264", {"bf": "3"}, range(5), "mkv"),
    "before a key frame, mp4": ("libx264", {"bf": "3"}, range(5), "mp4"),
    "open groups": ("libx264", OPEN, range(12), "mkv"),
    "open groups of H.265": ("libx265", HEVC, range(12), "mkv"),
    "H.265 before a key frame": ("libx265", HEVC, range(7), "mp4"),
    "in the middle": ("libx264", {"bf": "3"}, (20, 21, 30), "mp4"),
    "nothing, AVI": ("libx264", {"bf": "3"}, (), "avi"),
}


@pytest.mark.parametrize("cut", CUTS)
def test_frames_that_cannot_be_shown_do_not_move_the_others(tmp_path, cut):
    codec, options, lost, suffix = CUTS[cut]
    whole = write_clip(tmp_path / f"whole.{suffix if suffix == 'avi' else 'mp4'}", np.arange(60) * 40, codec, **options)
    path = without(whole, tmp_path / f"cut.{suffix}", lost) if lost else whole
    count, truth = len(frame_times(path)), decoded(path)
    alone = np.concatenate([read_frames(path, [number]) for number in range(count)])
    assert np.array_equal(alone, read_frames(path, range(count)))
    if cut != "in the middle":
        assert np.array_equal(alone, np.stack(truth))
    else:  # the frames lost are counted, and the one before each stands for it: grey level 2 i within a frame or two
        assert count == 57
        assert np.abs(alone.mean((1, 2, 3)) - np.delete(2 * np.arange(60), lost)).max() < 9


def test_a_cover_picture_is_not_the_clip(tmp_path):
    """Of several streams of pictures, the one that moves; and frames that change their size are no clip."""
    whole, path = write_clip(tmp_path / "whole.mp4", np.arange(60) * 40), tmp_path / "covered.mkv"
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        cover = new.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        copy = new.add_stream_from_template(old.streams.video[0])
        picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 255, np.uint8), format="rgb24")
        picture.pts, picture.time_base = 0, Fraction(1, 25)
        new.mux(cover.encode(picture))
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    assert len(frame_times(path)) == 60
    assert np.array_equal(read_frames(path, [7, 40]), read_frames(whole, [7, 40]))


def test_a_clip_that_states_a_turn_is_turned(tmp_path):
    path = part_paths("dataset1")[1] / "clip0001_part1.mp4"
    path = shutil.copy(path, tmp_path / "clip.mp4")
    upright = read_frames(path, [5])
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 4 * 9  # version and flags, nine words, then the matrix
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # 90 degrees
    path.write_bytes(data)
    turned = read_frames(path, [5])
    assert np.array_equal(turned[0], np.rot90(upright[0], -1))  # the matrix says clockwise


def test_what_is_no_clip_is_a_bad_sample(tmp_path):
    text, empty, folder = tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "c.mp4"
    text.write_text("no video")
    empty.write_bytes(b"")
    folder.mkdir()
    cut = write_clip(tmp_path / "d.mp4", np.arange(60) * 40)
    cut.write_bytes(cut.read_bytes()[:200])
    for path in (text, empty, folder, cut, tmp_path / "gone.mp4"):
        with pytest.raises(BadSample):
            read_frames(path, [0])


def test_one_frame_is_in_memory_at_a_time_and_grey_levels_agree():
    path = part_paths("dataset1")[1] / "clip0001_part1.mp4"
    seen = []
    frames = read_frames(path, [0, 5, 9], lambda frame: seen.append(frame.shape) or fit_frame(frame, 16, 32))
    assert frames.shape == (3, 16, 32, 3) and len(seen) == 3
