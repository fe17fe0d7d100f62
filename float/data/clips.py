"""Finding clips on disk: a metadata.csv, or datasets/{train,test}/<identity>/<clip>.mp4 of HDTF, RAVDESS and MEAD."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from float.data.media import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from float.modules.emotion import MEAD_CLASSES, ravdess_emotion
from shared.errors import UserError, check_columns
from shared.media.folders import is_junk

# the same split under the names in use
SPLIT_NAMES = {"test": ("test", "val"), "val": ("val", "test")}


@dataclass(frozen=True)
class Clip:
    """One talking-head clip."""

    clip_id: str
    video: Path
    audio: Path  # a sound file, or the video itself
    identity: str
    emotion: int | None = None  # class index, None where the data set has no label
    motion: Path | None = None  # csv with true mouth motion (rendered clips only)


def find_clips(root: Path, split: str, *, required: bool = True) -> list[Clip]:
    """The clips of one split, ordered by id. UserError when the folder holds none and the split is required."""
    if not root.is_dir():
        raise UserError(
            f"--data-root {root}: no such folder; give one with metadata.csv, or with {split}/<identity>/<clip>.mp4"
        )
    names = SPLIT_NAMES.get(split, (split,))
    clips = _from_table(root, names) if (root / "metadata.csv").is_file() else _from_folders(root, names)
    if not clips and required:
        raise UserError(
            f"{root}: no clips of split '{split}'; rows with that split in metadata.csv, "
            f"or {split}/<identity>/<clip>.mp4 expected"
        )
    counts = Counter(clip.clip_id for clip in clips)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise UserError(f"{root}: clip ids occur twice: {', '.join(repeated[:5])}; rename them")
    unfit = [name for name in counts if name != Path(name).name]
    if unfit:
        raise UserError(f"{root}: clip id {unfit[0]!r} cannot name a file of the cache; use one without a slash")
    return sorted(clips, key=lambda clip: clip.clip_id)


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a csv file in UTF-8 that hold anything; UserError when it is not one, lacks one of the columns, or
    what one of them should name (but a split).
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            check_columns(path, reader.fieldnames)
            lacking = sorted(set(columns) - set(reader.fieldnames or ()))
            lines = [(reader.line_num, row) for row in reader if any(row.values())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); save it as CSV UTF-8") from None
    if lacking:
        raise UserError(f"{path}: columns {', '.join(lacking)} are missing")
    for line, row in lines:
        if empty := [name for name in columns if not row[name] and name != "split"]:
            raise UserError(f"{path}, line {line}: {empty[0]} is empty; fill it in, or remove the line")
    return [row for _, row in lines]


def emotion_of_row(path: Path, row: dict[str, str]) -> int | None:
    """The class that a row names; UserError where it is none."""
    index = row.get("emotion_index") or ""
    if index and index not in tuple("0123456"):
        raise UserError(f"{path}: {row['video']}: emotion_index {index!r} is not 0 to 6")
    return int(index) if index else None


def _from_table(root: Path, splits: tuple[str, ...]) -> list[Clip]:
    path, clips = root / "metadata.csv", []
    rows = read_table(path, ("clip_id", "video", "split"))
    chosen = next((name for name in splits if any(row["split"] == name for row in rows)), splits[0])
    for row in rows:
        if row["split"] != chosen:
            continue
        motion = row.get("motion")
        clips.append(
            Clip(
                clip_id=row["clip_id"],
                video=root / row["video"],
                audio=root / (row.get("audio") or row["video"]),
                identity=row.get("identity") or row["clip_id"],
                emotion=emotion_of_row(path, row),
                motion=root / motion if motion else None,
            )
        )
    return clips


def _from_folders(root: Path, splits: tuple[str, ...]) -> list[Clip]:
    folder = next((root / name for name in splits if (root / name).is_dir()), None)
    clips: list[Clip] = []
    if folder is None:
        return clips
    folders: dict[Path, dict[str, Path]] = {}
    for video in sorted(folder.rglob("*")):
        if video.suffix.lower() not in VIDEO_SUFFIXES or is_junk(video, folder):
            continue
        inside = video.relative_to(folder)
        if video.parent not in folders:
            folders[video.parent] = {path.name.lower(): path for path in video.parent.iterdir()}
        clips.append(
            Clip(
                clip_id="/".join(inside.with_suffix("").parts).replace("/", "__"),
                video=video,
                audio=sound_beside(video, folders[video.parent]),
                identity=inside.parts[0] if len(inside.parts) > 1 else video.stem,
                emotion=label_of(inside),
            )
        )
    return clips


def sound_beside(video: Path, beside: dict[str, Path] | None = None) -> Path:
    """A sound file of the same name, with or without the ending _processed; else the video's own track. beside: the
    files of its folder by their names in small letters, where they are known.
    """
    beside = {path.name.lower(): path for path in video.parent.iterdir()} if beside is None else beside
    for stem in (video.stem, video.stem.removesuffix("_processed")):
        for suffix in AUDIO_SUFFIXES:
            path = beside.get((stem + suffix).lower())
            if path is not None:
                return path
    return video


def label_of(inside: Path) -> int | None:
    """The class by a RAVDESS file name or a MEAD folder name; None for HDTF."""
    ravdess = ravdess_emotion(inside.stem)
    if ravdess is not None:
        return ravdess
    return next(
        (MEAD_CLASSES[part.lower()] for part in reversed(inside.parts[:-1]) if part.lower() in MEAD_CLASSES), None
    )
