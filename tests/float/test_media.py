"""One clock for picture and sound: any frame rate, late tracks, gaps, rotation, damage; and what is written."""

import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from float.data.media import (
    VideoWriter,
    count_frames,
    iterate_frames,
    picture_span,
    read_audio,
    read_image,
    seek_frame,
    sound_of_file,
    sound_start,
)
from float.modules.audio import SAMPLE_RATE
from shared.errors import BadSample

TICKS = 90000


def ramp(time: float) -> np.ndarray:
    """A grey picture that tells its time."""
    return np.full((32, 48, 3), round(20 + 60 * time), np.uint8)


def time_of(picture: np.ndarray) -> float:
    return (float(picture.mean()) - 20) / 60


def click_at(time: float, seconds: float, rate: int = 16000) -> np.ndarray:
    """Noise of 40 ms at a time, else silence."""
    wave = np.zeros(round(seconds * rate), np.float32)
    noise = np.random.default_rng(0).standard_normal(round(0.04 * rate)) * 0.3
    wave[round(time * rate) : round(time * rate) + len(noise)] = noise
    return wave


def write(
    path: Path, times: list[float], *, wave: np.ndarray | None = None, late_sound: float = 0.0, aspect: int = 1
) -> Path:
    """A video whose frame at time t shows ramp(t), with a sound that begins at `late_sound`."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "10", "bf": "2"})
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, TICKS)
        video.codec_context.sample_aspect_ratio = Fraction(aspect, 1)
        audio = None
        if wave is not None:
            audio = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=16000)
            audio.layout = "mono"
        for time in times:
            frame = av.VideoFrame.from_ndarray(ramp(time), format="rgb24")
            frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            for start in range(0, len(wave), 1024):
                part = wave[start : start + 1024]
                frame = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, start + round(late_sound * 16000)
                converted = av.AudioResampler(audio.format.name, "mono", 16000).resample(frame)
                for piece in converted:
                    container.mux(audio.encode(piece))
            container.mux(audio.encode())
    return path


def every(rate: float, seconds: float) -> list[float]:
    return [k / rate for k in range(round(seconds * rate))]


RATES = {
    "24": every(24, 3),
    "25": every(25, 3),
    "29.97": every(30000 / 1001, 3),
    "60": every(60, 3),
    "10": every(10, 3),
    "first slow, then fast": every(5, 1) + [1 + t for t in every(25, 2)],
    "uneven": np.cumsum(np.random.default_rng(3).uniform(0.01, 0.12, 45)).tolist(),
    "with a hole": [*every(25, 1), *[1.8 + t for t in every(25, 1)]],
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rate", RATES)
def test_a_frame_shows_what_a_player_shows_at_its_time(tmp_path, rate, suffix):
    """The last picture whose time has come, whatever the container's average rate says. A grey level is 0.017 s."""
    times = RATES[rate]
    path = write(tmp_path / f"a{suffix}", times)
    zero = times[0]  # a file begins with its first track
    found = [time_of(frame) for frame in iterate_frames(path, 25)]
    for index, shown in enumerate(found):
        middle = zero + (index + 0.5) / 25
        # Matroska rounds to a millisecond
        wanted = [max((t for t in times if t <= middle + early), default=times[0]) for early in (-1e-3, 1e-3)]
        assert min(abs(shown - time) for time in wanted) < 0.027, (index, shown, wanted)
    last = times[-1] - zero
    assert last * 25 <= len(found) <= last * 25 + 6
    assert abs(count_frames(path, 25) - len(found)) <= 1


@pytest.mark.parametrize("rate", ["29.97", "first slow, then fast", "uneven"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_seeking_and_starting_late_give_the_frames_of_iteration(tmp_path, rate, suffix):
    path = write(tmp_path / f"a{suffix}", RATES[rate])
    frames = list(iterate_frames(path, 25))
    for index in (0, 7, 31, len(frames) - 1):
        assert np.array_equal(seek_frame(path, (index + 0.5) / 25), frames[index]), index
    part = list(iterate_frames(path, 25, start=1.2, stop=1.6))
    assert len(part) == 10 and all(np.array_equal(a, b) for a, b in zip(part, frames[30:40], strict=True))


def test_a_picture_that_begins_late_stays_with_its_sound(tmp_path):
    path = write(tmp_path / "a.mp4", [0.4 + t for t in every(25, 2)], wave=click_at(1.0, 2.4))
    frames = [time_of(frame) for frame in iterate_frames(path, 25)]
    assert abs(picture_span(path).start - 0.4) < 0.01 and abs(sound_start(path)) < 0.03
    assert np.abs(np.array(frames[10:]) - (np.arange(10, len(frames)) + 0.5) / 25).max() < 0.07
    assert max(frames[:10]) < 0.45  # its first picture is held till then
    assert abs(np.abs(read_audio(path)).argmax() / 16000 - 1.02) < 0.03


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_sound_that_begins_late_stays_with_its_picture(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", every(25, 3), wave=click_at(0.5, 2.0), late_sound=0.8)
    wave = read_audio(path)
    assert abs(sound_start(path) - 0.8) < 0.08 and abs(np.abs(wave).argmax() / 16000 - 1.32) < 0.03
    assert np.abs(wave[: round(0.75 * 16000)]).max() < 1e-3


def test_a_hole_in_the_sound_is_silence(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for start in (0, 16000 + 8000):  # half a second is missing
            frame = av.AudioFrame.from_ndarray(np.full((1, 16000), 8000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    wave = read_audio(tmp_path / "a.mkv")
    assert abs(len(wave) - 40000) < 20 and np.abs(wave[16100:23900]).max() == 0 and wave[24100] > 0.2


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = write(tmp_path / "a.mp4", every(25, 0.2), aspect=2)
    assert next(iterate_frames(path, 25)).shape == (32, 96, 3)


MATRICES = {  # a, b, c, d: a pixel at x, y is shown at a x + c y, b x + d y
    "counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "upside down": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "mirrored upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "mirrored and turned": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "mirrored and turned back": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    "empty": ((0, 0, 0, 0), lambda p: p),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_phones_video_is_turned_upright(tmp_path, matrix):
    """By its display matrix, which stands in the head of its track; a front camera's is a mirror's."""
    (a, b, c, d), turned = MATRICES[matrix]
    path = tmp_path / "a.mp4"
    marked = np.full((32, 48, 3), 40, np.uint8)
    marked[:8, :16] = 220
    with VideoWriter(path, fps=25) as video:
        video.add(marked)
    plain = next(iterate_frames(path, 25))
    data, place = bytearray(path.read_bytes()), path.read_bytes().index(b"tkhd") + 4 + 4 + 20 + 16
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(data)
    assert np.array_equal(next(iterate_frames(path, 25)), turned(plain))
    assert np.array_equal(read_image(path), turned(plain))


def test_titles_need_not_be_utf_8(tmp_path):
    """Old cameras, AVI and MP3 files have them in the code page of a country."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf**"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for time in every(25, 0.2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ramp(time), format="rgb24")))
        container.mux(stream.encode())
    assert b"caf**" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"caf**", b"caf\xe9s"))
    assert len(list(iterate_frames(path, 25))) == 5 and count_frames(path, 25) == 5


def test_damage_in_the_middle_of_a_sound_costs_that_part_only(tmp_path):
    wave = click_at(4.0, 5.0) + 0.01 * np.sin(np.arange(80000) / 7, dtype=np.float32)
    with VideoWriterOfSound(tmp_path / "a.mp3", wave):
        pass
    data = bytearray((tmp_path / "a.mp3").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = b"\xff" * 400
    (tmp_path / "a.mp3").write_bytes(data)
    found = read_audio(tmp_path / "a.mp3")
    assert abs(len(found) / 16000 - 5.0) < 0.2 and abs(np.abs(found).argmax() / 16000 - 4.02) < 0.1
    (tmp_path / "b.mp3").write_bytes(bytes(400) + b"\xff\xfb" * 3000)
    with pytest.raises(BadSample, match="b.mp3"):
        read_audio(tmp_path / "b.mp3")


class VideoWriterOfSound:
    """An mp3 of a mono wave."""

    def __init__(self, path: Path, wave: np.ndarray):
        self.path, self.wave = path, wave

    def __enter__(self) -> None:
        with av.open(str(self.path), "w") as container:
            stream = container.add_stream("mp3", rate=16000, layout="mono")
            for start in range(0, len(self.wave), 576):
                part = self.wave[None, start : start + 576].astype(np.float32)
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

    def __exit__(self, *raised: object) -> None:
        pass


@pytest.mark.parametrize("rate, channels", [(44100, 2), (48000, 1), (8000, 1), (96000, 2), (192000, 1), (48000, 6)])
def test_the_sound_of_a_written_video_is_as_it_came_in(tmp_path, rate, channels):
    wave = np.stack([click_at(0.5, 1.0, rate) * (1 - 0.1 * c) for c in range(channels)], 1)
    soundfile.write(tmp_path / "in.wav", wave, rate)
    with VideoWriter(tmp_path / "a.mp4", fps=25, sound=sound_of_file(tmp_path / "in.wav")) as video:
        for time in every(25, 1.4):
            video.add(ramp(time))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        assert stream.rate == (rate if rate <= 96000 else 48000) and stream.channels == min(channels, 2)
        assert abs(float(stream.duration * stream.time_base) - 1.4) < 0.1
    assert abs(np.abs(read_audio(tmp_path / "a.mp4")).argmax() / 16000 - 0.52) < 0.03


@pytest.mark.parametrize("rate, channels, kind", [(44100, 2, "PCM_16"), (48000, 6, "FLOAT"), (16000, 8, "FLOAT"),
                                                  (8000, 9, "PCM_16"), (22050, 2, "FLOAT")])  # fmt: skip
def test_loud_sound_of_any_layout_and_length_is_neither_clipped_nor_lost(tmp_path, rate, channels, kind):
    """The writer asks for more than a sound holds that does not end with a frame."""
    wave = 0.9 * np.sin(2 * np.pi * 220 * np.arange(round(0.333 * rate)) / rate)
    soundfile.write(tmp_path / "in.wav", np.stack([wave] * channels, 1), rate, subtype=kind)
    mono = read_audio(tmp_path / "in.wav")
    assert abs(np.abs(mono).max() - 0.9) < 0.05 and abs(len(mono) - 0.333 * 16000) < 40
    with VideoWriter(tmp_path / "a.mp4", fps=25, sound=sound_of_file(tmp_path / "in.wav")) as video:
        for time in every(25, 0.48):
            video.add(ramp(time))
    written = read_audio(tmp_path / "a.mp4")[: round(0.32 * 16000)]
    assert 0.85 < np.abs(written).max() < 1.05 and abs(np.std(written) - 0.9 / np.sqrt(2)) < 0.03


def test_a_sound_may_change_its_rate_and_channels_on_the_way(tmp_path):
    """Joined files, as podcasts and broadcasts are."""
    parts = [(22050, "mono"), (44100, "stereo")]
    for number, (rate, layout) in enumerate(parts):
        wave = np.stack([click_at(0.5, 1.0, rate)] * (1 + number))
        with av.open(str(tmp_path / f"{number}.mp3"), "w") as container:
            stream = container.add_stream("mp3", rate=rate, layout=layout)
            for start in range(0, wave.shape[1], 1152):
                part = np.ascontiguousarray(wave[:, start : start + 1152])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.sample_rate, frame.pts = rate, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    (tmp_path / "a.mp3").write_bytes(b"".join((tmp_path / f"{k}.mp3").read_bytes() for k in (0, 1)))
    wave = np.abs(read_audio(tmp_path / "a.mp3"))
    first, second = wave[:16000].argmax() / 16000, 1 + wave[16000:].argmax() / 16000
    assert abs(first - 0.52) < 0.05 and abs(second - 1.6) < 0.15 and 2.0 <= len(wave) / 16000 < 2.3


def test_a_long_sound_is_read_in_the_memory_that_it_fills(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(120 * SAMPLE_RATE, np.float32) + 0.1, SAMPLE_RATE)
    read_audio(tmp_path / "long.wav")
    tracemalloc.start()
    wave = read_audio(tmp_path / "long.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(wave) == 120 * SAMPLE_RATE and peak < 1.4 * wave.nbytes
