"""Video and sound files by PyAV: frames at a chosen rate, mono 16 kHz sound, mp4 with sound.

Frames: uint8 (H, W, 3) RGB. Sound: float32 (n,), mono, 16 kHz, in [-1, 1].
"""

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from float.modules.audio import SAMPLE_RATE
from shared.errors import BadSample
from shared.media.pictures import as_rgb

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".mpg", ".webm")
SILENCE = 1e-4  # peak below which a sound counts as silent
AUDIO_CHUNK = 1024
VIDEO_CRF = "18"


def read_audio(path: Path | str) -> np.ndarray:
    """The first sound track of any file, mixed to mono and resampled to 16 kHz. BadSample when there is none or it is
    broken.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise BadSample(f"{path}: has no sound track; put a .wav of the same name beside it")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            parts = []
            for frame in container.decode(audio=0):
                parts += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
            parts += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file") from None
    except av.FFmpegError as error:
        raise BadSample(f"{path}: cannot be read as sound ({error.strerror}); convert or remove it") from None
    wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(wave):
        raise BadSample(f"{path}: the sound track is empty")
    if not np.isfinite(wave).all():
        raise BadSample(f"{path}: the sound holds values that are not numbers")
    return wave.astype(np.float32)


def is_silent(wave: np.ndarray) -> bool:
    """Whether nothing can be heard."""
    return float(np.abs(wave).max(initial=0.0)) < SILENCE


def iterate_frames(path: Path | str, fps: float) -> Iterator[np.ndarray]:
    """Frames at `fps` frames per second of playing time; a file of another rate has frames left out or repeated."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadSample(f"{path}: has no picture track")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or fps)
            emitted = 0
            for index, frame in enumerate(container.decode(stream)):
                picture = None
                # the source frame shown at the middle of target frame `emitted`
                while (emitted + 0.5) / fps < (index + 1) / rate - 1e-9:
                    picture = frame.to_ndarray(format="rgb24") if picture is None else picture
                    yield picture
                    emitted += 1
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file") from None
    except av.FFmpegError as error:
        raise BadSample(f"{path}: cannot be read as video ({error.strerror}); convert or remove it") from None


def read_image(path: Path | str) -> np.ndarray:
    """A picture, turned upright by its EXIF note, or the first frame of a video, as RGB."""
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        frame = next(iterate_frames(path, 25), None)
        if frame is None:
            raise BadSample(f"{path}: holds no frame")
        return frame
    try:
        with Image.open(path) as picture:
            return np.asarray(as_rgb(picture))
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}: cannot be read as a picture ({error})") from None


def resize(picture: np.ndarray, side: int) -> np.ndarray:
    """To side x side: area averaging when it shrinks, cubic when it grows."""
    if picture.shape[:2] == (side, side):
        return picture
    method = Image.Resampling.BOX if side <= min(picture.shape[:2]) else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((side, side), method))


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    return scaled(torch.from_numpy(np.array(pictures)))


def scaled(pictures: Tensor) -> Tensor:
    """The same from a tensor, on its device."""
    return pictures.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """float (..., 3, H, W), clamped to [-1, 1] and truncated, -> uint8 (..., H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()


class VideoWriter:
    """H.264 with AAC sound, frame by frame; the file appears under its name when it is complete.

    with VideoWriter(path, fps=25, wave=wave) as video: video.add(frame)
    The sound is cut, or filled with silence, to the length of the picture.
    """

    def __init__(self, path: Path | str, *, fps: float, wave: np.ndarray | None = None):
        self.path, self.fps, self.wave, self.sounded = Path(path), fps, wave, 0
        self.temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}{self.path.suffix or '.mp4'}")
        self.frames = 0

    def __enter__(self) -> "VideoWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.container = av.open(str(self.temporary), "w", format="mp4")
        self.video = self.container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
        self.video.pix_fmt, self.video.options = "yuv420p", {"crf": VIDEO_CRF}
        self.audio = None
        if self.wave is not None:
            self.audio = self.container.add_stream("aac", rate=SAMPLE_RATE)
            self.audio.layout, self.audio.bit_rate = "mono", 64000
        return self

    def add(self, picture: np.ndarray) -> None:
        """Append one frame, uint8 (H, W, 3), even sides."""
        if self.frames == 0:
            self.video.height, self.video.width = picture.shape[:2]
        for packet in self.video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
            self.container.mux(packet)
        self.frames += 1
        self._add_sound(self.frames)

    def _add_sound(self, frames: int) -> None:
        """Sound up to the end of the frames written, so that both tracks grow together."""
        if self.audio is None or self.wave is None:
            return
        until = round(frames / self.fps * SAMPLE_RATE)
        for start in range(self.sounded, until, AUDIO_CHUNK):
            part = self.wave[start : min(start + AUDIO_CHUNK, until)].astype(np.float32)
            part = np.pad(part, (0, min(AUDIO_CHUNK, until - start) - len(part)))
            frame = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, start
            for packet in self.audio.encode(frame):
                self.container.mux(packet)
        self.sounded = until

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None and self.frames:
                self.container.mux(self.video.encode())
                if self.audio is not None:
                    self.container.mux(self.audio.encode())
        finally:
            self.container.close()
            if kind is None and self.frames:
                os.replace(self.temporary, self.path)
            else:
                self.temporary.unlink(missing_ok=True)


def write_video(path: Path | str, pictures: Iterable[np.ndarray], *, fps: float, wave: np.ndarray | None = None) -> int:
    """Write all frames; returns their number."""
    with VideoWriter(path, fps=fps, wave=wave) as video:
        for picture in pictures:
            video.add(picture)
    return video.frames
