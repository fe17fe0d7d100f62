"""Video and sound files by PyAV, on one clock.

Time 0 of a file is where its picture or its sound begins, whichever is first: what a player shows. Frames and samples
are placed by their presentation timestamps, so that variable frame rates, late tracks, edit lists and gaps keep picture
and sound together. Frames: uint8 (H, W, 3) RGB, upright, with square pixels. Sound: float32, in [-1, 1].
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from float.modules.audio import SAMPLE_RATE
from shared.errors import BadSample
from shared.media.pictures import as_rgb

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".mpg", ".mpeg", ".webm", ".m4v", ".ts", ".flv", ".wmv", ".mts",
                  ".m2ts", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".asf")  # fmt: skip
AUDIO_SUFFIXES = (".wav", ".m4a", ".mp3", ".flac", ".ogg", ".opus", ".aac", ".oga", ".aif", ".aiff", ".wma", ".caf")
SILENCE = 1e-4  # peak below which a sound counts as silent
AUDIO_CHUNK = 1024
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
VIDEO_CRF = "18"
ROUNDING = 5e-4  # seconds: Matroska rounds timestamps to a millisecond
GAP = 0.03  # seconds of missing sound that count as a gap and not as jitter of the timestamps
MOST_MIXED = 8  # channels of which two can be made; more have no common order
RESET = 1.0  # a sound that jumps back by more has broken timestamps: its samples are taken as they come
MAX_BROKEN = 0.2  # share of packets that may be damaged
EXACT_HEADS = ("mov,mp4", "matroska")  # containers whose heads give the exact length


# --- the clock --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """When a track plays, seconds on its file's clock."""

    start: float
    end: float


@contextmanager
def _opened(path: Path | str, kind: str, source: Any = None) -> Iterator[av.container.InputContainer]:
    """An open file, or file object `source`; what goes wrong becomes a BadSample that names it."""
    try:
        # of a sound that is still coming in little is looked at first, else seconds of it
        look = {} if source is None else {"probesize": "8192", "analyzeduration": "100000"}
        # titles and the like are not read: they need not be UTF-8
        with av.open(str(path) if source is None else source, options=look, metadata_errors="ignore") as container:
            yield container
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file") from None
    except av.FFmpegError as error:
        raise BadSample(f"{path}: cannot be read as {kind} ({error.strerror}); convert or remove it") from None


def _video_stream(container: av.container.InputContainer, path: Path | str) -> av.VideoStream:
    """The first track of moving pictures; the cover of a song is none."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    raise BadSample(f"{path}: has no picture track")


def _zero(container: av.container.InputContainer) -> float:
    """Time 0 of the file on its own timestamps, seconds."""
    tracks: list[av.VideoStream | av.AudioStream] = [*container.streams.video, *container.streams.audio]
    return min((_start(stream) for stream in tracks if stream.start_time is not None), default=0.0)


def _start(stream: av.VideoStream | av.AudioStream) -> float:
    """Where a track begins on its container's own timestamps, seconds; 0 where the head does not say."""
    return 0.0 if stream.start_time is None else float(stream.start_time * (stream.time_base or 0))


def _decoded(
    container: av.container.InputContainer,
    stream: av.VideoStream | av.AudioStream,
    path: Path | str,
    kind: str,
    lost: list[float] | None = None,
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Frames in the order of presentation. Damaged packets are passed over; BadSample where they are too many.

    lost: receives the seconds that timestamps do not know of. MP3 has none of its own: they are counted in packets, and
    a damaged stretch of any length counts as one, so its bytes tell how long it is.
    """
    whole, broken, reason, size, counts = 0, 0, "", 0, "mp3" in container.format.name
    packets = container.demux(stream)
    packet: av.Packet | None = None
    while True:
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else None
        except av.FFmpegError as error:
            broken, reason = broken + 1, str(error.strerror)
            if lost is not None and counts and packet is not None and whole and packet.duration:
                seconds = float(packet.duration * (packet.time_base or 0))
                lost.append(max(0.0, (packet.size * whole / size - 1) * seconds))
            if broken > whole + 10:  # nothing but damage: not worth going on
                break
            continue
        if frames is None:
            break
        whole, size = whole + 1, size + (packet.size if packet is not None else 0)
        yield from (frame for frame in frames if isinstance(frame, av.VideoFrame | av.AudioFrame))
    if broken > MAX_BROKEN * (whole + broken):
        raise BadSample(
            f"{path}: cannot be read as {kind} ({reason}; {broken} of {whole + broken} packets are damaged); "
            "convert or remove it"
        )


def picture_span(path: Path | str) -> Span:
    """When the picture track plays. From the file's head where that is exact, else from its packets' timestamps."""
    with _opened(path, "video") as container:
        stream = _video_stream(container, path)
        zero, base = _zero(container), float(stream.time_base or 1)
        if container.format.name.startswith(EXACT_HEADS) and stream.start_time is not None and stream.duration:
            start = stream.start_time * base - zero
            return Span(start, start + stream.duration * base)
        shown = [(packet.pts * base, (packet.duration or 0) * base) for packet in container.demux(stream)
                 if packet.pts is not None]  # fmt: skip
        if not shown:
            frames = sum(1 for _ in _decoded(container, stream, path, "video"))
            return Span(0.0, frames / float(stream.average_rate or 25))
        step = max(shown[-1][1], 1 / float(stream.average_rate or 25))
        return Span(min(shown)[0] - zero, max(shown)[0] - zero + step)


def sound_start(path: Path | str) -> float:
    """When the sound track begins, seconds on the file's clock; BadSample when there is none."""
    with _opened(path, "sound") as container:
        stream = _audio_stream(container, path)
        return 0.0 if stream.start_time is None else _start(stream) - _zero(container)


# --- picture ----------------------------------------------------------------------------------------------------------


def iterate_frames(
    path: Path | str, fps: float, *, start: float = 0.0, stop: float | None = None
) -> Iterator[np.ndarray]:
    """Frames at `fps` frames per second of the file's clock, from `start` to `stop` seconds.

    Frame k of the clock is the picture shown in the middle of its time, (k + 0.5) / fps. Before a picture track that
    begins late its first picture is held.
    """
    index, last = round(start * fps), None if stop is None else round(stop * fps)
    with _opened(path, "video") as container:
        stream = _video_stream(container, path)
        shown: av.VideoFrame | None = None
        picture: np.ndarray | None = None
        end = 0.0
        for time, frame in _timed(container, stream, path, start):
            while (index + 0.5) / fps < time - ROUNDING and (last is None or index < last):
                if picture is None:
                    picture = _upright(shown or frame, stream)
                yield picture
                index += 1
            if last is not None and index >= last:
                return
            shown, picture = frame, None
            end = time + max(float((frame.duration or 0) * (frame.time_base or 0)), 0.0)
            end = end if end > time else time + 1 / float(stream.average_rate or fps)
        while shown is not None and (index + 0.5) / fps < end - ROUNDING and (last is None or index < last):
            picture = _upright(shown, stream) if picture is None else picture
            yield picture
            index += 1


def _timed(
    container: av.container.InputContainer, stream: av.VideoStream, path: Path | str, start: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds on the file's clock, frame). Where timestamps are missing or go back, the frame rate stands in."""
    zero, step, time = _zero(container), 1 / float(stream.average_rate or 25), None
    if start > 1 and stream.time_base and container.format.name.startswith(EXACT_HEADS):
        container.seek(int((start + zero - step) / stream.time_base), stream=stream)  # to the key frame before
    for frame in _decoded(container, stream, path, "video"):
        assert isinstance(frame, av.VideoFrame)
        given = None if frame.time is None else frame.time - zero
        if given is None or (time is not None and given <= time):
            given = 0.0 if time is None else time + step
        time = given
        yield time, frame


def _upright(frame: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
    """Pixels as a player shows them: square, turned and mirrored by the display matrix."""
    picture: np.ndarray = frame.to_ndarray(format="rgb24")
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        width = max(1, round(picture.shape[1] * aspect))
        picture = np.asarray(Image.fromarray(picture).resize((width, picture.shape[0]), Image.Resampling.BILINEAR))
    notes: Any = frame.side_data  # whose stubs know motion vectors only
    if "DISPLAYMATRIX" in notes:  # a pixel at x, y is shown at a x + c y, b x + d y
        a, b, _, c, d = np.frombuffer(bytes(notes["DISPLAYMATRIX"]), np.int32)[:5].astype(np.int64)
        if abs(b) + abs(c) > abs(a) + abs(d):
            picture, a, d = picture.swapaxes(0, 1), c, b
        picture = np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return picture


def count_frames(path: Path | str, fps: float) -> int:
    """Frames that iterate_frames gives; 0 when the file cannot be read."""
    try:
        return max(1, round((picture_span(path).end - ROUNDING) * fps))
    except BadSample:
        return 0


def seek_frame(path: Path | str, seconds: float) -> np.ndarray:
    """The frame shown at a time on the file's clock: the same as iteration gives, without decoding all before it."""
    fps = 1e4  # a frame of the clock so short that its middle is the time asked for
    for picture in iterate_frames(path, fps, start=seconds, stop=seconds + 1 / fps):
        return picture
    raise BadSample(f"{path}: holds no frame at {seconds:.2f} s")


def read_image(path: Path | str) -> np.ndarray:
    """A picture, turned upright by its EXIF note, or the first frame of a video, as RGB."""
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        for frame in iterate_frames(path, 25):
            return frame
        raise BadSample(f"{path}: holds no frame")
    try:
        with Image.open(path) as picture:
            return np.asarray(as_rgb(picture))
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}: cannot be read as a picture ({error})") from None


def resize(picture: np.ndarray, side: int) -> np.ndarray:
    """A square picture to side x side: area averaging when it shrinks, cubic when it grows."""
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


# --- sound ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """A sound as it streams in: pieces float32 (channels, n), one after another from time 0 of its file's clock."""

    rate: int
    layout: str  # mono or stereo
    pieces: Iterator[np.ndarray]


def _audio_stream(container: av.container.InputContainer, path: Path | str) -> av.AudioStream:
    if not container.streams.audio:
        raise BadSample(f"{path}: has no sound track; put a .wav of the same name beside it")
    return container.streams.audio[0]


def sound_of_file(path: Path | str, *, rate: int | None = None, mono: bool = False) -> Sound:
    """The first sound track of any file. rate None: its own; mono False: mono stays mono, up to 7.1 becomes stereo.
    BadSample when there is no track, or it is broken.
    """
    with _opened(path, "sound") as container:
        stream = _audio_stream(container, path)
        own, channels = stream.rate, stream.channels
    layout = "mono" if mono or channels == 1 or channels > MOST_MIXED else "stereo"
    rate = rate or (own if own in AAC_RATES else 48000)
    return Sound(rate, layout, sound_pieces(path, rate, layout))


def sound_of_wave(wave: np.ndarray) -> Sound:
    """A mono sound (n,) at 16 kHz that is in memory."""
    return Sound(SAMPLE_RATE, "mono", iter([np.asarray(wave, np.float32)[None]]))


def sound_pieces(path: Path | str, rate: int, layout: str, source: Any = None) -> Iterator[np.ndarray]:
    """A file's sound, or that of a file object `source`, resampled; pieces (channels, n) as they are decoded.

    Mono is the mean of all channels, and nothing is louder for having been mixed.
    """
    with _opened(path, "sound", source) as container:
        stream, zero = _audio_stream(container, path), _zero(container)
        resampler, form, written, heard, lost = None, None, 0, 0.0, [0.0]
        timed = container.format.name != "aac"  # bare AAC has no timestamps, and the counted ones know one rate only
        for frame in _decoded(container, stream, path, "sound", lost):
            assert isinstance(frame, av.AudioFrame)
            # heard: where the next sample should lie
            gap = 0.0 if frame.time is None or not timed else frame.time - zero + sum(lost) - heard
            samples, begun = frame.samples / frame.sample_rate, form is not None
            hole = max(0.0, gap) if gap > (GAP if begun else 1e-4) else 0.0  # silence where nothing was recorded
            now = frame.format.name, frame.layout.name, frame.sample_rate  # joined files change it on the way
            if hole or now != form:
                rest = _mixed([] if resampler is None else resampler.resample(None), layout)
                resampler, form, heard = _resampler(frame, layout, rate), now, heard + hole
                silence = max(0, round(heard * rate) - written - rest.shape[1]) if hole else 0
                rest = np.pad(rest, ((0, 0), (0, silence)))
                written += rest.shape[1]
                yield rest
            assert resampler is not None, "made for the first frame"
            twice = -gap if -RESET < gap < -GAP else 0.0  # what is said a second time
            heard += max(0.0, samples - twice)
            if twice >= samples:
                continue
            piece = _mixed(resampler.resample(frame), layout)[:, round(twice * rate) :]
            written += piece.shape[1]
            yield piece
        if resampler is not None:
            yield _mixed(resampler.resample(None), layout)


def _resampler(frame: av.AudioFrame, layout: str, rate: int) -> av.AudioResampler:
    """To a rate; to mono only in _mixed, and to stereo by whole numbers, whose sum of many channels stays in range."""
    many = layout == "stereo" and frame.layout.nb_channels > 2
    return av.AudioResampler("s32" if many else "flt", frame.layout if layout == "mono" else layout, rate)


def _mixed(frames: list[av.AudioFrame], layout: str) -> np.ndarray:
    """Resampled frames joined, float32 (channels, n)."""
    channels = 1 if layout == "mono" else 2
    if not frames:
        return np.zeros((channels, 0), np.float32)
    packed = np.concatenate([frame.to_ndarray().reshape(-1, frame.layout.nb_channels) for frame in frames])
    values = packed if packed.dtype == np.float32 else (packed / 2.0**31).astype(np.float32)
    return (values.mean(1, keepdims=True) if values.shape[1] > channels else values).T


def read_audio(path: Path | str) -> np.ndarray:
    """The first sound track of any file from time 0 of its clock, mixed to mono, at 16 kHz. BadSample when there is
    none or it is broken.
    """
    samples = bytearray()  # grows where it lies: pieces that are joined at the end would take twice the memory
    for piece in sound_of_file(path, rate=SAMPLE_RATE, mono=True).pieces:
        samples += piece[0].astype(np.float32, copy=False).tobytes()
    wave = np.frombuffer(samples, np.float32)
    if not len(wave):
        raise BadSample(f"{path}: the sound track is empty")
    if not (np.isfinite(wave.min()) and np.isfinite(wave.max())):
        raise BadSample(f"{path}: the sound holds values that are not numbers")
    return wave


def is_silent(wave: np.ndarray) -> bool:
    """Whether nothing can be heard."""
    return max(float(wave.max(initial=0.0)), -float(wave.min(initial=0.0))) < SILENCE


# --- writing ----------------------------------------------------------------------------------------------------------


class VideoWriter:
    """H.264 with AAC sound, frame by frame; the file appears under its name when it is complete.

    with VideoWriter(path, fps=25, sound=sound_of_file("speech.mp3")) as video: video.add(frame)
    The sound keeps its rate and channels; it is cut, or filled with silence, to the length of the picture. live: the
    file can be watched while it grows (fragments of half a second), under its own name.
    """

    def __init__(self, path: Path | str, *, fps: float, sound: Sound | None = None, live: bool = False):
        self.path, self.fps, self.sound, self.live = Path(path), fps, sound, live
        self.temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}{self.path.suffix or '.mp4'}")
        self.temporary = self.path if live else self.temporary
        self.frames = self.sounded = 0
        self.waiting = np.zeros((1, 0), np.float32)  # sound that was read and not written

    def __enter__(self) -> "VideoWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fragments = {"movflags": "frag_keyframe+delay_moov+default_base_moof", "flush_packets": "1"}
        self.container = av.open(str(self.temporary), "w", format="mp4", options=fragments if self.live else {})
        self.video = self.container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
        self.video.pix_fmt, self.video.options = "yuv420p", {"crf": VIDEO_CRF}
        if self.live:
            self.video.options |= {"tune": "zerolatency", "g": str(max(1, round(self.fps / 2)))}
        self.audio: av.AudioStream | None = None
        if self.sound is not None:
            self.audio = self.container.add_stream("aac", rate=self.sound.rate)
            self.audio.layout = self.sound.layout
            self.audio.bit_rate = (64000 if self.sound.rate <= 16000 else 128000) * self.audio.channels
        return self

    def add(self, picture: np.ndarray) -> None:
        """Append one frame, uint8 (H, W, 3), even sides."""
        if self.frames == 0:
            self.video.height, self.video.width = picture.shape[:2]
        self.container.mux(self.video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        self.frames += 1
        self._add_sound(self.frames)

    def _add_sound(self, frames: int) -> None:
        """Sound up to the end of the frames written, so that both tracks grow together."""
        if self.audio is None or self.sound is None:
            return
        until = round(frames / self.fps * self.sound.rate)
        while self.sounded < until:
            count = min(AUDIO_CHUNK, until - self.sounded)
            part = self._take(count)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self.sound.layout)
            frame.sample_rate, frame.pts = self.sound.rate, self.sounded
            self.container.mux(self.audio.encode(frame))
            self.sounded += count

    def _take(self, count: int) -> np.ndarray:
        """The next samples (channels, count), silence behind the sound's end."""
        assert self.sound is not None and self.audio is not None
        while self.waiting.shape[1] < count:
            piece = next(self.sound.pieces, None)
            if piece is None:
                piece = np.zeros((self.audio.channels, count), np.float32)
            self.waiting = piece if not self.waiting.shape[1] else np.concatenate([self.waiting, piece], 1)
        part, self.waiting = self.waiting[:, :count], self.waiting[:, count:]
        return np.ascontiguousarray(np.nan_to_num(part))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None and self.frames:
                self.container.mux(self.video.encode())
                if self.audio is not None:
                    self.container.mux(self.audio.encode())
        finally:
            self.container.close()
            if kind is None and self.frames:
                if not self.live:
                    os.replace(self.temporary, self.path)
            else:
                self.temporary.unlink(missing_ok=True)


def write_video(path: Path | str, pictures: Iterable[np.ndarray], *, fps: float, wave: np.ndarray | None = None) -> int:
    """Write all frames, with a mono sound at 16 kHz; returns their number."""
    with VideoWriter(path, fps=fps, sound=None if wave is None else sound_of_wave(wave)) as video:
        for picture in pictures:
            video.add(picture)
    return video.frames
