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
