"""Sound to log-mel frames: 16 kHz mono, 25 ms windows every 10 ms, 80 Slaney bands, as Whisper's features.

Legend: T frames of 10 ms, W samples of a window (400), F frequency bins (201), M mel bands (80).
"""

import functools
import io
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from shared.errors import BadSample

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

SAMPLE_RATE, WINDOW, HOP, BANDS = 16000, 400, 160, 80
BLOCK = 256  # frames transformed at once: their spectra stay in a processor's cache
RATES = (1000, 1_000_000)  # Hz that a recording may have: at 1 Hz, as a damaged header says, a minute takes 16 hours
LONG, SETTLE = 60.0, 1.0  # seconds; of a longer sound a stretch is decoded alone, from so much before it on
LOUDEST = 1e12  # full scale is 1; above 1e16 the power of a window is infinite
POWER_FLOOR = 1e-10  # log10 of it is -10
DYNAMIC_RANGE = 8.0  # decades below a clip's own maximum that are kept
BY_SOUNDFILE = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
BY_AV = (".m4a", ".mp4", ".aac", ".webm", ".mkv", ".mov", ".wma")
AUDIO_SUFFIXES = BY_SOUNDFILE + BY_AV


# --- reading ----------------------------------------------------------------------------------------------------------


def read_audio(
    source: Path | bytes, *, seconds: float | None = None, position: float = 0.0, name: str | None = None
) -> np.ndarray:
    """Mono float32 at 16 kHz. seconds: read at most so much, starting at `position` (0 to 1) of what is left over.
    name: what bytes are called where they cannot be read.

    Raises BadSample for a file that does not decode, is empty, or holds a rate or numbers that no recording has.
    """
    name = name or ("audio bytes" if isinstance(source, bytes) else str(source))
    readers = (_read_by_soundfile, _read_by_av)
    try:
        # What a file is stands in its first bytes, not in its name. What one decoder cannot read, the other tries.
        for reader in readers[::-1] if _is_for_av(source) else readers:
            try:
                samples, rate = reader(source, seconds, position)
                if samples.size:
                    break
                problem = "holds no sound"  # or a header from before the sound was written, which the other passes over
            except BadSample as error:
                raise BadSample(f"{name}: {error}") from None
            except Exception as error:  # decoders raise many kinds; all mean a broken file
                problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            raise BadSample(f"{name}: cannot be decoded as sound ({problem})")
    except OSError as error:  # of opening it: not there, a folder, a link to itself
        raise BadSample(f"{name}: {error.strerror}") from None
    if not RATES[0] <= rate <= RATES[1]:
        raise BadSample(f"{name}: its header says {rate} samples a second; {RATES[0]} to {RATES[1]:,} are read")
    if not (np.abs(samples) < LOUDEST).all():
        raise BadSample(f"{name}: holds numbers that are not finite, or beyond {LOUDEST:.0e}")
    found = resample(samples, rate)
    if found.size == 0:  # less than one sample at 16 kHz
        raise BadSample(f"{name}: holds no sound")
    return found


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz with a windowed-sinc filter (soxr, high quality)."""
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(samples, np.float32)
    import soxr

    return soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)


def _read_by_soundfile(source: Path | bytes, seconds: float | None, position: float) -> tuple[np.ndarray, int]:
    import soundfile

    with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
        rate, total = file.samplerate, file.frames
        wanted = total if seconds is None else min(total, round(seconds * rate))
        if wanted < total:
            file.seek(round(position * (total - wanted)))
        samples_TC = file.read(wanted, dtype="float32", always_2d=True)
        return samples_TC[:, 0] if samples_TC.shape[1] == 1 else samples_TC.mean(1), rate


def _is_for_av(source: Path | bytes) -> bool:
    """Whether the first bytes are those of MP4, Matroska, ADTS (AAC without a container) or ASF."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with open(source, "rb") as file:
            head = file.read(12)
    is_adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0  # an MP3 frame has other layer bits
    return head[4:8] == b"ftyp" or head[:4] in (b"\x1aE\xdf\xa3", b"0&\xb2u") or is_adts


def _read_by_av(source: Path | bytes, seconds: float | None, position: float) -> tuple[np.ndarray, int]:
    import av

    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    with av.open(opened, "r", metadata_errors="ignore") as container:  # a title may be of any encoding
        if not container.streams.audio:
            raise BadSample("holds no sound track")
        stream = container.streams.audio[0]
        length = (container.duration or 0) / 1e6  # as its header says
        if seconds is not None and length > LONG + seconds:
            samples, rate = _stretch(container, stream, seconds, position * (length - seconds))
            if samples.size:
                return samples, rate
            container.seek(0)  # its header says more than there is
        samples, rate = _mono(container.decode(stream))
    wanted = len(samples) if seconds is None else min(len(samples), round(seconds * rate))
    start = round(position * (len(samples) - wanted))
    return samples[start : start + wanted].astype(np.float32), rate


def _mono(decoded: Iterable["AudioFrame"]) -> tuple[np.ndarray, int]:
    """The mean of the channels of these frames, and their rate."""
    import av

    # To floats alone: swresample's own mix to mono is sqrt(2) louder than the mean of the channels.
    resampler, parts, rate = av.AudioResampler(format="fltp"), [], SAMPLE_RATE
    for one in chain(decoded, (None,)):
        for frame in resampler.resample(one):
            parts.append(frame.to_ndarray().mean(0))
            rate = frame.sample_rate
    return np.concatenate(parts) if parts else np.zeros(0, np.float32), rate


def _stretch(
    container: "InputContainer", stream: "AudioStream", seconds: float, start: float
) -> tuple[np.ndarray, int]:
    """Only the stretch from `start`: an hour of AAC decoded whole takes 1.5 GB and 8 s."""
    scale = float(stream.time_base or 1)
    begin = start + (stream.start_time or 0) * scale
    if start > SETTLE:
        container.seek(int((begin - SETTLE) / scale), stream=stream)
    kept: list[AudioFrame] = []
    for frame in container.decode(stream):
        if frame.time is not None and frame.time + frame.samples / frame.sample_rate > begin:
            kept.append(frame)
            if frame.time >= begin + seconds:
                break
    samples, rate = _mono(kept)
    skipped = max(0, round((begin - (kept[0].time or 0.0)) * rate)) if kept else 0
    return samples[skipped : skipped + round(seconds * rate)].astype(np.float32), rate


# --- spectrogram ------------------------------------------------------------------------------------------------------


def _slaney_hz(mel: np.ndarray) -> np.ndarray:
    """Slaney's scale: 200/3 Hz per mel up to 1000 Hz (mel 15), above it mel = 15 + 27 ln(f / 1000) / ln 6.4."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


@functools.cache
def mel_filters() -> Tensor:
    """(80, 201) triangles from 0 to 8000 Hz, each scaled by 2 / its width in Hz (Slaney's area norm)."""
    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    corners = _slaney_hz(np.linspace(0, top, BANDS + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    low, middle, high = (corners[i : i + BANDS, None] for i in range(3))
    triangles = np.maximum(0, np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)))
    return torch.from_numpy((triangles * 2 / (high - low)).astype(np.float32))


@functools.cache
def _window() -> Tensor:
    return torch.hann_window(WINDOW, periodic=True)


def mel_power(waveform: Tensor) -> Tensor:
    """(samples // 160, 80) mel power of a mono 16 kHz waveform, mirrored at its edges; the frame after the last whole
    hop is dropped.
    """
    edge = WINDOW // 2
    if waveform.numel() <= WINDOW:  # the mirrored edge needs more than half a window
        waveform = torch.nn.functional.pad(waveform, (0, WINDOW + 1 - waveform.numel()))
    wave = waveform.float()
    wave = torch.cat([wave[1 : edge + 1].flip(0), wave, wave[-edge - 1 : -1].flip(0)])
    parts = []
    for frames_TW in wave.unfold(0, WINDOW, HOP)[:-1].split(BLOCK):
        squares_TF2 = torch.view_as_real(torch.fft.rfft(frames_TW * _window())).square_()
        parts.append((squares_TF2[..., 0] + squares_TF2[..., 1]) @ mel_filters().T)
    return torch.cat(parts)


def log_power(waveform: Tensor) -> Tensor:
    """(T, 80) log10 of the mel power, at least -10. Not yet relative to the clip's maximum."""
    return mel_power(waveform).clamp_min(POWER_FLOOR).log10()


def compress(log_power_TM: Tensor) -> Tensor:
    """Keep eight decades below this clip's own maximum, and bring speech to about [-1, 1]: (x + 4) / 4."""
    return log_power_TM.clamp_min(log_power_TM.max() - DYNAMIC_RANGE).add_(4).div_(4)


def log_mel(waveform: Tensor) -> Tensor:
    """(samples // 160, 80) features of one clip, float32."""
    return compress(log_power(waveform))


def fit_frames(
    log_power_TM: Tensor, frames: int, *, position: float = 0.0, fill: str = "repeat_pad"
) -> tuple[Tensor, Tensor | None]:
    """Cut or fill a clip to `frames`; returns the clip and a bool mask over frames, None where all count.

    A longer clip is cut at `position` (0 start, 1 end). A shorter one is repeated whole times and then filled with
    silence (repeat_pad, all frames count), or filled with silence that does not count (pad).
    """
    length = len(log_power_TM)
    if length >= frames:
        start = round(position * (length - frames))
        return log_power_TM[start : start + frames], None
    repeats = frames // length if fill == "repeat_pad" else 1
    silence = log_power_TM.new_full((frames - repeats * length, BANDS), np.log10(POWER_FLOOR))
    mask = None if fill == "repeat_pad" else torch.arange(frames) < length
    return torch.cat([log_power_TM] * repeats + [silence]), mask


def spec_augment(mel_TM: Tensor, generator: torch.Generator, *, max_frames: int = 64, max_bands: int = 12) -> Tensor:
    """Fill one span of frames (at most a quarter of the clip) and one of bands with the clip's minimum (Park et al.
    2019).
    """
    mel_TM, floor = mel_TM.clone(), mel_TM.min()
    for axis, limit in ((0, min(max_frames, mel_TM.shape[0] // 4)), (1, max_bands)):
        width = int(torch.randint(0, limit + 1, (), generator=generator))
        start = int(torch.randint(0, mel_TM.shape[axis] - width + 1, (), generator=generator))
        mel_TM.narrow(axis, start, width).fill_(floor)
    return mel_TM
