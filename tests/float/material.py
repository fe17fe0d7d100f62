"""Small clips on disk and a small run, for tests."""

from pathlib import Path

import av
import numpy as np
import soundfile

from float.data.clips import Clip
from float.data.features import feature_path, write_features
from float.data.media import write_video

SIDE = 32


def wave_of(seconds: float, *, hertz: float = 220.0, rate: int = 16000) -> np.ndarray:
    """A tone that swells four times a second."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * time) * (1 + np.sin(2 * np.pi * 4 * time)) / 2).astype(np.float32)


def frames_of(count: int, *, seed: int = 0) -> np.ndarray:
    """A picture with a box that opens and closes."""
    generator = np.random.default_rng(seed)
    base = generator.integers(60, 200, (4, 4, 3)).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1).astype(np.uint8)
    frames = np.stack([base] * count)
    for index, frame in enumerate(frames):
        height = 1 + index % 5
        frame[22 : 22 + height, 12:20] = 20
    return frames


def write_clip(
    folder: Path, name: str, *, frames: int = 30, seconds: float | None = None, sound: str = "wav", seed: int = 0
) -> Path:
    """folder/name.mp4 with its sound beside it (wav), inside (track), or none (none)."""
    folder.mkdir(parents=True, exist_ok=True)
    wave = wave_of(frames / 25 if seconds is None else seconds)
    path = folder / f"{name}.mp4"
    write_video(path, iter(frames_of(frames, seed=seed)), fps=25, wave=wave if sound == "track" else None)
    if sound == "wav":
        soundfile.write(folder / f"{name}.wav", wave, 16000)
    return path


def write_mp3(path: Path, seconds: float) -> None:
    """Stereo, 44.1 kHz."""
    wave = np.stack([wave_of(seconds, rate=44100), wave_of(seconds, rate=44100) * 0.5])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mp3", rate=44100)
        stream.layout = "stereo"
        for start in range(0, wave.shape[1], 1152):
            part = np.ascontiguousarray(wave[:, start : start + 1152])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_feature_clip(folder: Path, name: str, frames: int, *, width: int = 5, audio: int = 3, **changes) -> Path:
    """Cached features whose values tell their frame."""
    import torch

    rows = torch.arange(frames, dtype=torch.float32)[:, None]
    tensors = {
        "motion": rows.expand(-1, width) + 0.5,
        "audio_raw": rows.expand(-1, audio) + 100,
        "emotion": torch.eye(7)[3],
        "has_emotion": torch.tensor([True]),
        **changes,
    }
    path = feature_path(folder, name)
    write_features(path, tensors, Clip(name, Path(), Path(), "nobody"), "test")
    return path
