"""Single frames out of a video file, and frames into an mp4, with PyAV.

A frame's number is its place in the order of presentation, whatever its time: clips from phones and screens have no
constant rate, and masks belong to one certain frame. Files that state a turn (phones held upright) are turned.
"""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from shared.errors import BadSample, write_text, written_aside

Shape = Callable[[np.ndarray], np.ndarray]  # what is made of a frame (H, W, 3) uint8 before the next one is decoded


def read_frames(path: str | Path, indices: Sequence[int], shape: Shape | None = None) -> np.ndarray:
    """The frames at non-decreasing positions, uint8 RGB (F, H, W, 3). A position beyond the last frame gives the last.

    Goes to the key frame before the first position and decodes forward. shape: applied to each frame as it comes, so
    that no more than one whole frame is in memory. Raises BadSample for a file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise BadSample(f"video {path}: not found; check opens2v.video_base_paths")
    wanted = sorted({int(index) for index in indices})
    if not wanted or wanted[0] < 0:
        raise BadSample(f"video {path}: frame numbers {wanted[:3]} are not from 0 on")
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(indices):
        rows.setdefault(int(index), []).append(row)
    result: list[np.ndarray] = []  # the whole clip, made when the first frame says how large one is

    def put(index: int, picture: np.ndarray) -> None:
        picture = picture if shape is None else shape(picture)
        if not result:
            result.append(np.empty((len(indices), *picture.shape), picture.dtype))
        if picture.shape != result[0].shape[1:]:
            raise ValueError(f"its frames change their size to {picture.shape[1]} x {picture.shape[0]}")
        for row in rows[index]:
            result[0][row] = picture

    try:
        times = presentation_times(path)
        if times is None or not _by_time(path, wanted, times, put):
            _by_counting(path, wanted, put)
    except (av.error.FFmpegError, ValueError, IndexError, OSError, MemoryError) as error:
        raise BadSample(f"video {path}: cannot be decoded ({' '.join(str(error).split())[:160]})") from None
    return result[0]


def frame_times(path: str | Path) -> np.ndarray:
    """When each frame is shown, seconds from the first one, float64 (F,). Raises BadSample for an unreadable file."""
    try:
        times = presentation_times(Path(path))
        with open_video(path) as container:
            stream = _stream_of(container)
            base = float(stream.time_base or Fraction(1, 1000))
            if times is None:  # no times in the file: the frames are counted, the stated rate is all that is known
                count = sum(1 for _ in container.decode(stream))
                return np.arange(count) / float(stream.average_rate or stream.guessed_rate or 25)
    except (av.error.FFmpegError, ValueError, IndexError, OSError) as error:
        raise BadSample(f"video {path}: cannot be read ({' '.join(str(error).split())[:160]})") from None
    return (times.shown - times.shown[0]) * base


def open_video(path: str | Path) -> av.container.InputContainer:
    """An open file. Real clips carry stream metadata that is not UTF-8, and a plain open would raise."""
    return av.open(str(path), metadata_errors="ignore")


def _stream_of(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")  # not the first one: that may be a cover picture
    if not isinstance(stream, av.VideoStream):
        raise ValueError("it holds no video stream")
    stream.thread_count = 1  # a loader process each; more threads would only wait for one another
    return stream


class Times:
    """Presentation times of a stream in units of its time base: of all frames that are shown, and of key frames."""

    def __init__(self, shown: np.ndarray, keys: np.ndarray):
        self.shown, self.keys = shown, keys


def presentation_times(path: Path) -> Times | None:
    """The times, read from the packets without decoding; None where they do not number the frames."""
    found = path.stat()
    return _times_of(str(path), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=512)
def _times_of(path: str, size: int, mtime_ns: int) -> Times | None:
    packets: list[tuple[int, bool, bool]] = []  # time, whether it is a key frame, whether it is shown
    with open_video(path) as container:
        stream = _stream_of(container)
        if container.format.name == "avi" and stream.codec_context.has_b_frames:
            return None  # AVI has times of decoding only
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.pts is None:
                return None
            # Discarded: before the first frame of an edit list, decoded and never shown.
            packets.append((packet.pts, packet.is_keyframe, not packet.is_discard))
    shown = np.sort(np.array([time for time, _, is_shown in packets if is_shown], np.int64))
    keys = np.sort(np.array([time for time, is_key, _ in packets if is_key], np.int64))
    if not len(shown) or not len(keys) or len(np.unique(shown)) < len(shown):
        return None
    if not packets[0][1] or shown[0] < packets[0][0]:
        # Cut out of a longer stream: what leans on frames that were cut away is not shown.
        shown = shown[shown >= _first_time(path)]
    return Times(shown, keys) if len(shown) else None


def _first_time(path: str) -> int:
    """When the first frame that can be decoded is shown."""
    with open_video(path) as container:
        return next((frame.pts for frame in container.decode(_stream_of(container)) if frame.pts is not None), 0)


def _by_time(path: Path, wanted: list[int], times: Times, put: Callable[[int, np.ndarray], None]) -> bool:
    """Put the frames by number, found by their times; False where the decoder gives no times.

    For a frame that was lost the one before it stands, so that the numbers of all others stay.
    """
    last = len(times.shown) - 1
    numbers: dict[int, list[int]] = {}
    for index in wanted:
        numbers.setdefault(int(times.shown[min(index, last)]), []).append(index)
    left = sorted(numbers, reverse=True)  # the next one last
    before = times.keys[times.keys <= left[-1]]

    def show(frame: av.VideoFrame) -> None:
        picture = _upright(frame)
        for index in numbers[left.pop()]:
            put(index, picture)

    # From the key frame before the first one; from the start of a file whose key frames are not what they say.
    for start in [int(before[-1]), None] if len(before) and before[-1] > times.shown[0] else [None]:
        with open_video(path) as container:
            stream, previous = _stream_of(container), None
            if start is not None:
                container.seek(start, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None:
                    return False
                if previous is None and frame.pts > left[-1] and start is not None:
                    break
                while left and left[-1] < frame.pts:
                    show(previous or frame)
                if left and left[-1] == frame.pts:
                    show(frame)
                if not left:
                    return True
                previous = frame
            else:
                while left and previous is not None:
                    show(previous)
                return not left
    return False


def _by_counting(path: Path, wanted: list[int], put: Callable[[int, np.ndarray], None]) -> None:
    """Put the frames by number, decoded from the first one on; the last one also stands for numbers behind it."""
    last, open_numbers = None, set(wanted)
    with open_video(path) as container:
        for position, frame in enumerate(container.decode(_stream_of(container))):
            last = frame
            if position in open_numbers:
                put(position, _upright(frame))
                open_numbers.discard(position)
            if position >= wanted[-1]:
                break
    if last is None:
        raise ValueError("it holds no frame")
    for index in open_numbers:
        put(index, _upright(last))


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """uint8 RGB (H, W, 3), turned as the file says."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def crop_window(frames: np.ndarray, crop: Sequence[int] | None) -> np.ndarray:
    """frames[..., s_y:e_y, s_x:e_x, :] of crop = [s_x, e_x, s_y, e_y] (x first), clamped; empty means no crop."""
    height, width = frames.shape[-3:-1]
    if crop is None or len(crop) != 4:
        return frames
    left, right = (min(max(int(value), 0), width) for value in crop[:2])
    top, bottom = (min(max(int(value), 0), height) for value in crop[2:])
    if right <= left or bottom <= top:
        return frames
    return frames[..., top:bottom, left:right, :]


def _covering(own_height: int, own_width: int, height: int, width: int) -> tuple[int, int]:
    """The smallest size of the same shape that covers height x width."""
    scale = max(width / own_width, height / own_height)
    # Rounded up so that the target stays covered; the small number keeps 96 x (48 / 96) at 48.
    return max(height, int(np.ceil(own_height * scale - 1e-6))), max(width, int(np.ceil(own_width * scale - 1e-6)))


def cover_resize(frames: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (F, H, W, 3) -> float32 (3, F, height, width) in [-1, 1]: scaled to cover the target, cut at the centre."""
    own_height, own_width = frames.shape[1:3]
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    size = _covering(own_height, own_width, height, width)
    if size != (own_height, own_width):
        images = functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = images[:, :, top : top + height, left : left + width].clamp(0, 255)
    return (cut / 127.5 - 1).permute(1, 0, 2, 3).contiguous()


def fit_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """One uint8 frame (H, W, 3) -> (height, width, 3), as cover_resize but in whole grey levels; cheaper."""
    own_height, own_width = frame.shape[:2]
    size = _covering(own_height, own_width, height, width)
    if size != (own_height, own_width):
        image = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
        image = functional.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        frame = image[0].permute(1, 2, 0).numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])


def normalise(frames: Tensor) -> Tensor:
    """uint8 frames 0 to 255 as float32 in [-1, 1], where they are; float ones as they came."""
    return frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames


def to_uint8(frames: Tensor) -> np.ndarray:
    """float (3, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3)."""
    return (
        ((frames.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    )


def write_video(path: str | Path, frames: np.ndarray, fps: float = 16, settings: dict | None = None) -> Path:
    """uint8 (F, H, W, 3) -> H.264 yuv420p mp4, plus the first frame as .png and, when given, the settings as .json.

    Odd sizes lose their last row or column, since yuv420p needs even ones. Written aside and renamed.
    """
    path = Path(path)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with written_aside(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "16"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    with written_aside(path.with_suffix(".png")) as temporary:
        Image.fromarray(frames[0]).save(temporary, format="PNG")
    if settings is not None:
        write_text(path.with_suffix(".json"), json.dumps(settings, indent=1, ensure_ascii=False, default=str))
    return path
