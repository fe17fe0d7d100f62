"""Sound and pictures are read by what they are: every container equally loud, every name, every special word."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from multimodal.data import audio
from multimodal.data.audio import read_audio
from multimodal.data.image import center_crop, read_image
from multimodal.data.records import ListRecords, Record
from multimodal.data.text import PAD, SPECIAL_TOKENS, TextTokenizer
from multimodal.objective import hard_negatives
from shared.errors import BadSample
from tests.multimodal.files import dataset, wav

RATE = 48000


def encoded(path: Path, samples_CT: np.ndarray, codec: str, form: str) -> Path:
    """Samples in a container by PyAV."""
    layout = "stereo" if len(samples_CT) == 2 else "mono"
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        stream.bit_rate = 192_000
        frame = av.AudioFrame.from_ndarray(samples_CT.astype(np.float32), format="fltp", layout=layout)
        frame.rate = RATE
        resampler = av.AudioResampler(format=stream.codec_context.format.name, layout=layout, rate=RATE)
        fifo = av.AudioFifo()
        for part in resampler.resample(frame):
            fifo.write(part)
        size = stream.codec_context.frame_size or 1024
        while (piece := fifo.read(size, partial=True)) is not None:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def stereo(seconds: float = 2.0) -> np.ndarray:
    """Two different channels."""
    time = np.arange(int(seconds * RATE)) / RATE
    return np.stack([0.6 * np.sin(2 * np.pi * 440 * time), 0.3 * np.sin(2 * np.pi * 660 * time)])


FORMS = [("a.m4a", "aac", "mp4"), ("a.aac", "aac", "adts"), ("a.mkv", "aac", "matroska"), ("a.mp4", "aac", "mp4")]


@pytest.mark.parametrize("name,codec,form", FORMS)
@pytest.mark.parametrize("channels", ["different", "equal", "mono"])
def test_every_container_is_as_loud_as_the_wav(tmp_path, name, codec, form, channels):
    samples = stereo()
    samples = {"different": samples, "equal": samples[[0, 0]], "mono": samples[:1]}[channels]
    soundfile.write(tmp_path / "a.wav", samples.T, RATE)
    expected, found = read_audio(tmp_path / "a.wav"), read_audio(encoded(tmp_path / name, samples, codec, form))
    middle = slice(8000, 24000)
    rms = [float(np.sqrt(np.square(part[middle]).mean())) for part in (expected, found)]
    assert rms[1] == pytest.approx(rms[0], rel=0.02)
    assert np.abs(found[middle]).max() < np.abs(expected[middle]).max() * 1.05  # the codec rings at a clip's ends


def test_titles_need_not_be_utf_8(tmp_path):
    path = encoded(tmp_path / "a.mkv", stereo(), "aac", "matroska")
    plain = read_audio(path)
    with av.open(str(tmp_path / "titled.mkv"), "w", format="matroska") as container:
        container.metadata["title"] = "caf**"
        with av.open(str(path)) as given:
            stream = container.add_stream_from_template(given.streams.audio[0])
            for packet in given.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
    data = (tmp_path / "titled.mkv").read_bytes()
    assert b"caf**" in data
    (tmp_path / "titled.mkv").write_bytes(data.replace(b"caf**", b"caf\xe9s"))
    assert np.array_equal(read_audio(tmp_path / "titled.mkv"), plain)


@pytest.mark.parametrize("name,codec,form", FORMS[:2])
@pytest.mark.parametrize("called", ["b.wav", "b.flac", "b.mp3", "b.ogg", "b.m4a"])
def test_a_sound_is_what_its_first_bytes_say(tmp_path, name, codec, form, called):
    path = encoded(tmp_path / name, stereo(), codec, form)
    expected = read_audio(path)
    path.rename(tmp_path / called)
    assert len(read_audio(tmp_path / called)) == len(expected) > 30_000
    assert len(read_audio((tmp_path / called).read_bytes())) == len(expected)


def test_a_wav_under_the_name_of_another_container_is_read(tmp_path):
    wav(tmp_path / "a.wav", 1.0).rename(tmp_path / "a.m4a")
    assert len(read_audio(tmp_path / "a.m4a")) == 16000
    for data in (b"", b"no sound at all", b"\xff\xf1" + bytes(100)):
        (tmp_path / "b.wav").write_bytes(data)
        with pytest.raises(BadSample, match="b.wav"):
            read_audio(tmp_path / "b.wav")


@pytest.mark.parametrize("rate", [1, 40, 2**31 - 1])
def test_a_rate_that_no_recording_has_is_a_bad_sample(tmp_path, rate):
    header = bytearray(wav(tmp_path / "a.wav").read_bytes())
    header[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(header)
    with pytest.raises(BadSample, match=f"{rate} samples a second"):
        read_audio(tmp_path / "a.wav")


def test_folders_links_and_numbers_beyond_all_sound_are_bad_samples(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to(tmp_path / "link.wav")
    soundfile.write(tmp_path / "loud.wav", np.full(900, 1e25), 44100, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", np.ones(1), 44100)  # not one sample at 16 kHz
    for name in ("folder.wav", "link.wav", "loud.wav", "gone.wav", "short.wav"):
        with pytest.raises(BadSample, match=name):
            read_audio(tmp_path / name)


def test_a_header_from_before_the_sound_was_written_hides_none(tmp_path):
    """A recorder that was killed leaves a length of 0."""
    data = bytearray(wav(tmp_path / "a.wav").read_bytes())
    data[40:44] = bytes(4)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav")) == 16000


@pytest.mark.parametrize("name,codec,form", FORMS[:1] + FORMS[2:3])
@pytest.mark.parametrize("position", [0.0, 0.4, 1.0])
def test_of_a_long_sound_only_the_stretch_is_decoded(tmp_path, monkeypatch, name, codec, form, position):
    time = np.arange(80 * RATE) / RATE
    sweep = 0.5 * np.sin(2 * np.pi * (200 * time + 10 * time**2))  # 200 Hz at first, 20 more each second
    path, counted, real = encoded(tmp_path / name, sweep[None], codec, form), [], audio._mono

    def counting(frames):
        counted.extend(kept := list(frames))
        return real(kept)

    monkeypatch.setattr(audio, "_mono", counting)
    found = read_audio(path, seconds=2.0, position=position)
    assert 31_000 < len(found) <= 32_000 and sum(frame.samples for frame in counted) < 4 * RATE
    middle = found[8000:24000]
    frequency = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))).argmax()
    assert frequency == pytest.approx(200 + 20 * (position * 78 + 1), abs=20)


def test_a_length_that_only_the_header_has_is_not_waited_for(tmp_path, monkeypatch):
    path = encoded(tmp_path / "a.m4a", stereo()[:1], "aac", "mp4")
    whole = read_audio(path)
    monkeypatch.setattr(audio, "LONG", -9.0)  # so that a stretch is asked for where there is nothing
    monkeypatch.setattr(audio, "_stretch", lambda *given: (np.zeros(0, np.float32), RATE))
    assert np.array_equal(read_audio(path, seconds=9.0), whole)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_line_of_pixels_is_not_blown_up(size):
    line = Image.new("RGB", size, 9)
    line.paste((200, 0, 0), (size[0] // 2 - 1, size[1] // 2 - 1, size[0] // 2 + 1, size[1] // 2 + 1))
    square = center_crop(line, 224)
    assert square.size == (224, 224) and square.getpixel((112, 112))[0] > 150


@pytest.mark.parametrize("suffix", ["tif", "tiff", "avif", "jfif", "gif", "bmp", "webp"])
def test_further_forms_of_pictures(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40, 30), (200, 40, 40)).save(path, {"jfif": "JPEG", "tif": "TIFF"}.get(suffix))
    assert read_image(path).size == (40, 30)


@pytest.mark.parametrize("damage", [b"", b"x", b"cut", np.ones((5, 3), np.float16), np.full((5, 80), np.nan, "f2")])
def test_a_damaged_spectrogram_of_the_cache_is_made_again(tmp_path, damage):
    records = ListRecords([Record("a", wav(tmp_path / "a.wav"), ("x",), "jsonl", "audio")])
    items = dataset(records, TextTokenizer(), data={"mel_cache": str(tmp_path / "cache")})
    first = items[0]["audio"]
    (stored,) = (tmp_path / "cache").glob("*.npy")
    if isinstance(damage, bytes):
        stored.write_bytes(stored.read_bytes()[:-100] if damage == b"cut" else damage)
    else:
        np.save(stored, damage)
    assert torch.equal(items[0]["audio"], first) and np.load(stored).shape == (100, 80)


def test_a_file_that_changes_is_not_served_from_the_cache(tmp_path):
    path = wav(tmp_path / "a.wav", 1.0)
    records = ListRecords([Record("a", path, ("x",), "jsonl", "audio")])
    items = dataset(records, TextTokenizer(), data={"mel_cache": str(tmp_path / "cache")})
    first = items[0]["audio"]
    assert torch.equal(items[0]["audio"], first)
    time = np.arange(16000) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 1760 * time), 16000)
    os.utime(path, ns=(1, 1))
    assert (items[0]["audio"] - first).abs().max() > 0.1


@pytest.mark.parametrize("text", ["a [PAD] b", "[CLS] dog [SEP] [MASK]", "[UNK]", "\ud83d x"])
def test_words_that_look_like_special_tokens_are_words(text):
    tokenizer = TextTokenizer()
    from multimodal.data.records import clean

    ids = tokenizer.encode(clean(text))
    assert all(index >= SPECIAL_TOKENS for index in ids[1:-1]) and PAD not in ids
    ids, mask = tokenizer.batch([clean(text), "x"])
    assert mask[0].sum() == len(tokenizer.encode(clean(text)))


def test_hard_negatives_are_chosen_in_full_precision():
    """Two wrong partners whose similarities bf16 cannot tell apart."""
    own = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    other = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1.0, 0.020, 0], [1.0, 0.021, 0.0]]), dim=1)
    keys = torch.arange(6).view(3, 2)
    scale = torch.tensor(1e6)
    exact, _ = hard_negatives(own, other, scale, keys, torch.full((3,), 0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = hard_negatives(own, other, scale, keys, torch.full((3,), 0.5))
    assert exact.tolist() == rounded.tolist() and exact[0] == 1
