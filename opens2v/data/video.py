"""Single frames out of a video file, and frames into an mp4, with PyAV."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from shared.errors import BadSample, write_text, written_aside


def read_frames(path: str | Path, indices: Sequence[int]) -> np.ndarray:
    """The frames at non-decreasing positions, uint8 RGB (F, H, W, 3). A position beyond the last frame gives the last.

    Seeks to the key frame before the first position and decodes forward. Raises BadSample for a file that cannot be
    read.
    """
    path = Path(path)
    if not path.exists():
        raise BadSample(f"video {path}: not found; check opens2v.video_base_paths")
    wanted = sorted(set(int(index) for index in indices))
    try:
        found = _decode(path, wanted, seek=True)
        if found is None:
            found = _decode(path, wanted, seek=False)
    except (av.error.FFmpegError, ValueError, IndexError, OSError) as error:
        raise BadSample(f"video {path}: cannot be decoded ({' '.join(str(error).split())[:160]})") from None
    if not found:
        raise BadSample(f"video {path}: holds no frame")
    last = found[max(found)]
    return np.stack([found.get(int(index), last) for index in indices])


def _decode(path: Path, wanted: list[int], seek: bool) -> dict[int, np.ndarray] | None:
    """Frames by position; None when the seek landed behind the first wanted one, and counting from the start must do.

    The last frame of the file is there under its own position when a wanted one lies behind it.
    """
    found: dict[int, np.ndarray] = {}
    # Real clips carry stream metadata that is not UTF-8; a plain open would raise UnicodeDecodeError.
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        rate, start = stream.average_rate or stream.guessed_rate, stream.start_time or 0
        base = stream.time_base
        use_time = seek and wanted[0] > 0 and rate is not None and base is not None
        if use_time:
            assert rate is not None and base is not None
            container.seek(start + int(Fraction(wanted[0]) / rate / base), stream=stream, backward=True)
        position, last = -1, None
        for frame in container.decode(stream):
            if not use_time:
                position += 1
            elif frame.pts is None:
                return None
            else:
                assert rate is not None and base is not None
                position = round((frame.pts - start) * base * rate)
            if use_time and last is None and position > wanted[0]:
                return None
            last = frame
            if position in wanted or (use_time and position >= wanted[0] and not found):
                found[position] = frame.to_ndarray(format="rgb24")
            if position >= wanted[-1]:
                break
        if last is not None and position < wanted[-1]:
            found[position] = last.to_ndarray(format="rgb24")
        elif last is None and use_time:
            return None  # sought behind the end
    return found


def crop_window(frames: np.ndarray, crop: Sequence[int] | None) -> np.ndarray:
    """frames[..., s_y:e_y, s_x:e_x, :] of crop = [s_x, e_x, s_y, e_y] (x first), clamped; an empty window means no
    crop.
    """
    height, width = frames.shape[-3:-1]
    if crop is None or len(crop) != 4:
        return frames
    left, right = (min(max(int(value), 0), width) for value in crop[:2])
    top, bottom = (min(max(int(value), 0), height) for value in crop[2:])
    if right <= left or bottom <= top:
        return frames
    return frames[..., top:bottom, left:right, :]


def cover_resize(frames: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (F, H, W, 3) -> float32 (3, F, height, width) in [-1, 1]: scaled until the target is covered, cut at the
    centre.
    """
    own_height, own_width = frames.shape[1:3]
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    scale = max(width / own_width, height / own_height)
    # Rounded up so that the target stays covered; the small number keeps 96 x (48 / 96) at 48.
    size = (max(height, int(np.ceil(own_height * scale - 1e-6))), max(width, int(np.ceil(own_width * scale - 1e-6))))
    if size != (own_height, own_width):
        images = functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = images[:, :, top : top + height, left : left + width].clamp(0, 255)
    return (cut / 127.5 - 1).permute(1, 0, 2, 3).contiguous()


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
