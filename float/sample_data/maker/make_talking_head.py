"""Render short talking-portrait clips from recorded speech: the maker of the sample clips.

  python float/sample_data/maker/make_talking_head.py --list speech.csv --out CLIPS [--size 256] [--fps 25]

A drawn face speaks a real recording. The shape of the mouth is a fixed function of the sound around each frame, so a
model that hears the sound can learn it, and a test can compare a generated mouth with the true one. Head, lids and
brows move by smoothed noise that does not follow the sound. speech.csv: clip_id, audio (relative to the list),
identity (id01 to id08), emotion, and if wanted seed, split and more, which are copied to metadata.csv. Output:
video/ID.mp4 (H.264, AAC), audio/ID.wav (16 kHz mono), motion/ID.csv, metadata.csv.
"""

import csv
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import numpy as np

from float.sample_data.maker.drawn_face import IDENTITIES, Face
from shared.config import Section, load_config, setting
from shared.errors import UserError, command

SAMPLE_RATE = 16000
WINDOW = 1024  # samples of sound that a frame sees, 64 ms
PEAK = 0.7
# smile, height of the brows, their tilt (inner end down is positive), opening of the eyes
EMOTION_POSE = {
    "angry": (-0.25, -0.50, 0.80, 0.90),
    "disgust": (-0.35, -0.30, 0.35, 0.70),
    "fear": (-0.20, 0.60, -0.70, 1.20),
    "happy": (0.80, 0.20, 0.00, 0.90),
    "neutral": (0.00, 0.00, 0.00, 1.00),
    "sad": (-0.55, 0.15, -0.80, 0.80),
    "surprise": (0.10, 0.90, 0.00, 1.30),
}


class RenderOptions(Section):
    """What to render."""

    list: str | None = setting(None, "table of clips: clip_id, audio, identity, emotion[, seed, split, ...]")
    out: str = setting("talking_heads", "folder to fill")
    size: int = setting(256, "side of the pictures, pixels, even", ge=16)
    fps: int = setting(25, "frames per second", ge=1)


def mouth_from_audio(wave: np.ndarray, fps: int, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Opening, width and teeth of every frame, each (frames,) within 0..1.

    A 64 ms Hann window stands at the middle of each frame. With E(a, b) the power between a and b hertz:
      loud   = 10 log10 E(80, 4000), the clip's 20th percentile (at least 35 dB under the top) at 0, the 95th at 1
      first  = power-weighted mean frequency of 250..1000 Hz, 330 -> 0, 700 -> 1
      second = power-weighted mean frequency of 900..2800 Hz, 1200 -> 0, 2000 -> 1
      hiss   = E(3500, 7600) / (E(3500, 7600) + E(80, 3500))
      open   = loud^1.3 (0.35 + 0.65 first) (1 - 0.7 hiss)
      wide   = 0.5 + (second - 0.5) min(1, 2 loud)
      teeth  = max(hiss, 0.6 open)
    Each curve is then smoothed over three frames with weights 1/4, 1/2, 1/4.
    """
    padded = np.concatenate([np.zeros(WINDOW), wave, np.zeros(WINDOW + SAMPLE_RATE // fps)])
    starts = [int(round((i + 0.5) * SAMPLE_RATE / fps)) + WINDOW // 2 for i in range(frames)]
    pieces = np.stack([padded[start : start + WINDOW] for start in starts])
    power = np.abs(np.fft.rfft(pieces * np.hanning(WINDOW))) ** 2
    hertz = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)

    def energy(low: float, high: float) -> np.ndarray:
        return power[:, (hertz >= low) & (hertz < high)].sum(1)

    def centre(low: float, high: float) -> np.ndarray:
        chosen = (hertz >= low) & (hertz < high)
        return (power[:, chosen] * hertz[chosen]).sum(1) / (power[:, chosen].sum(1) + 1e-9)

    level = 10 * np.log10(energy(80, 4000) + 1e-6)
    top = np.percentile(level, 95)
    floor = max(np.percentile(level, 20), top - 35.0)
    loud = np.clip((level - floor) / max(top - floor, 6.0), 0, 1)
    first = np.clip((centre(250, 1000) - 330) / 370, 0, 1)
    second = np.clip((centre(900, 2800) - 1200) / 800, 0, 1)
    high, low = energy(3500, 7600), energy(80, 3500)
    hiss = high / (high + low + 1e-6) * (loud > 0.02)
    opening = loud**1.3 * (0.35 + 0.65 * first) * (1 - 0.7 * hiss)
    wide = 0.5 + (second - 0.5) * np.minimum(1, 2 * loud)
    return _smoothed(opening), _smoothed(wide), _smoothed(np.maximum(hiss, 0.6 * opening))


def _smoothed(curve: np.ndarray) -> np.ndarray:
    padded = np.pad(curve, 1, mode="edge")
    return 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]


def slow_noise(random: np.random.Generator, frames: int, fps: int, seconds: float) -> np.ndarray:
    """Gaussian noise smoothed over `seconds`, unit variance."""
    width = max(1, int(seconds * fps))
    raw = random.standard_normal(frames + 6 * width)
    kernel = np.exp(-0.5 * (np.arange(-3 * width, 3 * width + 1) / width) ** 2)
    return np.convolve(raw, kernel / np.sqrt((kernel**2).sum()), mode="same")[3 * width : 3 * width + frames]


def blinks(random: np.random.Generator, frames: int, fps: int) -> np.ndarray:
    """1 = eyes shut. A blink lasts about 0.25 s and comes every 1.5 to 4.5 s."""
    shut, at = np.zeros(frames), random.uniform(0.3, 2.0)
    while at * fps < frames:
        for offset, value in enumerate((0.35, 0.85, 1.0, 0.75, 0.45, 0.15)):
            index = int(at * fps) + offset
            if index < frames:
                shut[index] = max(shut[index], value)
        at += random.uniform(1.5, 4.5)
    return shut


def motion_track(wave: np.ndarray, frames: int, fps: int, emotion: str, seed: int) -> dict[str, np.ndarray]:
    """All motion curves of a clip, each (frames,); angles in degrees."""
    random = np.random.default_rng(seed)
    opening, wide, teeth = mouth_from_audio(wave, fps, frames)
    smile, brow, tilt, eyes = EMOTION_POSE[emotion]

    def noise(scale: float, seconds: float) -> np.ndarray:
        return scale * slow_noise(random, frames, fps, seconds)

    return {
        "mouth_open": opening,
        "mouth_wide": wide,
        "teeth": teeth,
        "yaw": noise(7.0, 0.5),
        "pitch": noise(4.0, 0.5),
        "roll": noise(3.0, 0.7),
        "shift_x": noise(0.008, 0.8),
        "shift_y": noise(0.006, 0.8),
        "blink": blinks(random, frames, fps),
        "brow": brow + noise(0.15, 0.4),
        "brow_tilt": np.full(frames, tilt),
        "smile": smile + noise(0.05, 0.6),
        "eye_open": np.full(frames, eyes),
        "gaze_x": noise(0.35, 0.35),
        "gaze_y": noise(0.2, 0.35),
    }


def render_clip(wave: np.ndarray, row: dict[str, str], out: Path, *, size: int, fps: int) -> int:
    """Write video, sound and motion of one clip; returns its number of frames."""
    import soundfile

    from float.data.media import write_video

    frames = int(len(wave) * fps / SAMPLE_RATE)
    if frames < 1:
        raise UserError(f"clip {row['clip_id']}: {len(wave)} samples of sound are shorter than a frame")
    wave = wave[: frames * SAMPLE_RATE // fps]
    track = motion_track(wave, frames, fps, row["emotion"], int(row.get("seed") or 0))
    face, pictures, rows = Face(IDENTITIES[row["identity"]], size), [], []
    for index in range(frames):
        motion = {name: float(curve[index]) for name, curve in track.items()}
        picture, truth = face.draw(motion)
        pictures.append(np.asarray(picture))
        values = {name: round(value, 5) for name, value in motion.items()} | {
            name: round(float(value), 3) for name, value in truth.items()
        }
        rows.append({"frame": index, "time": round(index / fps, 4), **values})
    for folder in ("video", "audio", "motion"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_video(out / "video" / f"{row['clip_id']}.mp4", iter(pictures), fps=fps, wave=wave)
    soundfile.write(str(out / "audio" / f"{row['clip_id']}.wav"), wave, SAMPLE_RATE, subtype="PCM_16")
    _write_table(out / "motion" / f"{row['clip_id']}.csv", rows)
    return frames


def _write_table(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_list(path: Path) -> list[dict[str, str]]:
    """The rows of speech.csv; UserError names what is wrong with it."""
    from float.data.clips import read_table

    rows = read_table(path, ("clip_id", "audio", "identity", "emotion"))
    if not rows:
        raise UserError(f"--list {path}: holds no rows")
    for number, row in enumerate(rows, 2):
        if not (row.get("seed") or "0").isdecimal():
            raise UserError(f"--list {path}, line {number}: seed {row['seed']!r} is not a whole number")
        lacking = [name for name in ("clip_id", "audio", "identity", "emotion") if not row.get(name)]
        if lacking:
            raise UserError(f"--list {path}, line {number}: {', '.join(lacking)} missing")
        if row["identity"] not in IDENTITIES or row["emotion"] not in EMOTION_POSE:
            raise UserError(
                f"--list {path}, line {number}: identity {row['identity']!r} or emotion {row['emotion']!r} unknown; "
                f"use {', '.join(IDENTITIES)} and {', '.join(EMOTION_POSE)}"
            )
    return rows


@command
def main(argv: list[str] | None = None) -> int:
    """Render every clip of the list."""
    options = load_config(RenderOptions, argv=argv, description=__doc__)
    if options.list is None:
        raise UserError("--list is missing: a table with clip_id, audio, identity, emotion")
    from float.data.media import read_audio
    from float.modules.emotion import EMOTIONS

    source, out, table = Path(options.list), Path(options.out), []
    for row in read_list(source):
        wave = read_audio(source.parent / row["audio"]).astype(np.float64)
        peak = np.abs(wave).max()
        wave = wave * (PEAK / peak) if peak > 1e-6 else wave
        frames = render_clip(wave, row, out, size=options.size, fps=options.fps)
        name = row["clip_id"]
        files = {"video": f"video/{name}.mp4", "audio": f"audio/{name}.wav", "motion": f"motion/{name}.csv"}
        more = {
            key: value for key, value in row.items() if key not in ("clip_id", "audio", "identity", "emotion", "seed")
        }
        table.append(
            {
                "clip_id": name,
                **files,
                "identity": row["identity"],
                "emotion": row["emotion"],
                "emotion_index": EMOTIONS.index(row["emotion"]),
                "n_frames": frames,
                "fps": options.fps,
                "split": "train",
                **more,
            }
        )
        print(f"{name}: {frames} frames", flush=True)
    _write_table(out / "metadata.csv", table)
    return len(table)


if __name__ == "__main__":
    main()
