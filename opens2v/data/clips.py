"""One clip of an OpenS2V part: its entry, frames, background and subjects."""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opens2v.data.annotations import Annotations
from opens2v.data.subjects import Subject, find_subjects, open_picture
from opens2v.data.video import Shape, crop_window, read_frames
from shared.errors import BadSample

# What a field of a wrong type or value ends in, deep inside: the entry is at fault, not the code.
UNUSABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
OTHER_CAPTIONS = ("face_cap_qwen", "face_cap_glm", "face_cap_Aria", "caption")


def frame_indices(start: int, end: int, count: int, stride: int, rng: random.Random) -> list[int]:
    """`count` positions out of [start, end): `stride` apart from a random start, closer where the range is short.

    A range shorter than `count` repeats frames in order. Raises BadSample for an empty range.
    """
    length = end - start
    if length <= 0:
        raise BadSample(f"frame range [{start}, {end}) is empty")
    if length <= count:
        offsets = sorted([*range(length), *(i % length for i in range(count - length))])
        return [start + offset for offset in offsets]
    clip = min(length, (count - 1) * stride + 1)
    first = rng.randint(start, end - clip)
    return [int(value) for value in np.floor(np.linspace(first, first + clip - 1, count))]


def usable_range(metadata: dict[str, Any]) -> tuple[int, int]:
    """The frames to sample from, half open and absolute: face_cut, else cut, else the whole clip."""
    for name in ("face_cut", "cut"):
        if metadata.get(name):
            return int(metadata[name][0]), int(metadata[name][1])
    return 0, int(metadata.get("num_frames") or 0)


def caption_of(metadata: dict[str, Any], first_key: str) -> str:
    """The first caption there is, stripped, runs of white space as one space."""
    for name in (first_key, *OTHER_CAPTIONS):
        text = metadata.get(name)
        if isinstance(text, str) and text.strip():
            return clean(re.sub(r"\s+", " ", text).strip())
    raise BadSample(f"no caption under {first_key} or {', '.join(OTHER_CAPTIONS)}")


def clean(text: str) -> str:
    """The text with "?" for halves of characters, as a caption cut within an emoji has them: no encoder takes those."""
    return text.encode("utf-8", "replace").decode()


def generic_caption(caption: str, class_name: str, noun: str = "subject") -> str:
    """The caption with the subject's noun replaced, by "subject" when only the picture is to say what it is."""
    class_name = class_name.strip()
    if not class_name:
        return caption
    pattern = rf"\b(?P<article>an?|the)?\s*(?<!\w){re.escape(class_name)}(?!\w)"

    def swap(found: re.Match) -> str:
        article = found["article"]
        if article is None:
            return f" {noun}"
        indefinite = "An" if noun[0].lower() in "aeiou" else "A"
        return f"{'The' if article.lower() == 'the' else indefinite} {noun}"

    text = re.sub(pattern, swap, caption, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip()


def class_names(entry: dict[str, Any]) -> list[str]:
    """What the subjects of an entry are called, in file order."""
    return [clean(record["class_name"]) for record in entry["annotation"]["mask_map"].values()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_position(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _are_numbers(count: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == count and all(map(_is_number, value))


# Where it lies, what it must be, in words, and whether it may be missing or null.
_FIELDS: tuple[tuple[str, Callable[[Any], bool], str, bool], ...] = (
    ("metadata", lambda value: isinstance(value, dict), "an object", False),
    ("metadata.path", lambda value: isinstance(value, str) and value != "", "a file name", False),
    ("metadata.crop", _are_numbers(4), "four numbers [s_x, e_x, s_y, e_y]", True),
    ("metadata.face_cut", _are_numbers(2), "two frame numbers", True),
    ("metadata.cut", _are_numbers(2), "two frame numbers", True),
    ("metadata.fps", lambda value: _is_number(value) and value > 0, "a number above 0", True),
    ("metadata.num_frames", _is_number, "a number", True),
    ("word_tags", lambda value: isinstance(value, dict), "an object of lists", True),
    ("annotation", lambda value: isinstance(value, dict), "an object", False),
    ("annotation.ann_frame_data", lambda value: isinstance(value, dict), "an object", False),
    (
        "annotation.ann_frame_data.ann_frame_idx",
        lambda value: _is_number(value) and value >= 0,
        "a frame number",
        False,
    ),
)


_FIELDS_OF_ALL = ("metadata", "metadata.path", "annotation")


def fault_of(entry: Any) -> str | None:
    """What is wrong with an entry's fields, or None."""
    if not isinstance(entry, dict):
        return f"the entry is {type(entry).__name__}, an object with metadata and annotation is needed"
    for path, fits, wanted, is_optional in _FIELDS:
        *parents, name = path.split(".")
        node = entry
        for parent in parents:
            node = node[parent]  # checked before
        value = node.get(name)
        if value is None and is_optional:
            continue
        if not fits(value):
            found = "missing" if name not in node else f"{json.dumps(value, default=str)[:60]}"
            frame = "the entry needs metadata (with path) and annotation; " if path in _FIELDS_OF_ALL else ""
            return f"{frame}{path} is {found}, {wanted} is needed"
    return None


def text_digest(*parts: Any) -> str:
    """A short text that stands for texts, numbers and lists of them."""
    return hashlib.sha256(clean("\n".join(map(str, parts))).encode()).hexdigest()[:16]


def file_digest(path: Path, pieces: int = 16, piece: int = 1 << 16) -> bytes:
    """Changes with a file: of its size and up to 16 pieces of 64 KiB. BadSample for one that cannot be read."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest = hashlib.sha256(str(size).encode())
            step = max(piece, (size - piece) // max(1, pieces - 1))
            for offset in range(0, max(1, size), step):
                file.seek(offset)
                digest.update(file.read(piece))
            file.seek(max(0, size - piece))
            digest.update(file.read(piece))
    except OSError as error:
        raise BadSample(f"{path}: cannot be read ({error.strerror}); check the data folders") from None
    return digest.digest()


@dataclass
class Part:
    """One annotation file with its video and background folders."""

    name: str
    annotations: Annotations
    videos: Path
    backgrounds: Path | None
    use_bbox: bool = False
    memory: dict[int, dict] = field(default_factory=dict)

    def entry(self, index: int) -> tuple[str, dict]:
        """(key, entry); BadSample when the entry lacks what every entry has."""
        try:
            key, entry = self.annotations.item(index)
        except ValueError as error:
            raise BadSample(f"{self.name}, entry {index}: no valid JSON ({error})") from None
        fault = fault_of(entry)
        if Path(key).is_absolute() or ".." in Path(key).parts:  # features and videos are named by it
            fault = "the key leads out of a folder; keys are file names"
        if fault is not None:
            raise BadSample(f"{self.name}/{key}: {fault}")
        return key, entry

    def frames(self, entry: dict, indices: Sequence[int], shape: Shape | None = None) -> np.ndarray:
        """Cropped frames, uint8 RGB (F, H, W, 3), or what `shape` makes of each."""
        crop = entry["metadata"].get("crop")

        def cropped(frame: np.ndarray) -> np.ndarray:
            frame = crop_window(frame, crop)
            return frame if shape is None else shape(frame)

        return read_frames(self.videos / entry["metadata"]["path"], indices, cropped)

    def content(self, key: str, entry: dict, *, background: bool = False, tags: bool = False) -> str:
        """A short text that changes with the clip's pixels, masks or times, and not with its caption.

        background, tags: also with the scene without subjects, and with the tags that choose among subjects. Of the
        files their size and up to 16 pieces of 64 KiB are read: enough to see that a file is another one.
        """
        metadata = {name: value for name, value in entry["metadata"].items() if "cap" not in name or name == "caption"}
        metadata.pop("caption", None)
        parts = [metadata, entry["annotation"], *([entry.get("word_tags")] if tags else [])]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        files = [self.videos / entry["metadata"]["path"], *([self.background_path(key)] if background else [])]
        records = entry["annotation"].get("mask_map") or {}
        files += [Path(record["image"]) for record in records.values() if record.get("image")]  # see prepare.py
        for path in files:
            digest.update(file_digest(path) if path is not None else b"none")
        return digest.hexdigest()[:16]

    def subjects(self, key: str, entry: dict) -> list[Subject]:
        """All subjects of the annotated frame; BadSample, naming the key, when a mask or field is damaged."""
        try:
            frame = self.frames(entry, [entry["annotation"]["ann_frame_data"]["ann_frame_idx"]])[0]
            found = find_subjects(entry, frame, use_bbox=self.use_bbox, key=f"{self.name}/{key}")
        except UNUSABLE as error:
            raise BadSample(
                f"{self.name}/{key}: {f'field {error} is missing' if isinstance(error, KeyError) else error}"
            ) from None
        if not found:
            raise BadSample(f"{self.name}/{key}: no subject with a mask that is not empty")
        return found

    def background_path(self, key: str) -> Path | None:
        """The scene without subjects, from the folder called `foreground`; its last step may count one further."""
        if self.backgrounds is None:
            return None
        further = re.sub(r"_step(\d+)$", lambda found: f"_step{int(found[1]) + 1}", key)
        for name in (key, further):
            if (self.backgrounds / f"{name}.png").exists():
                return self.backgrounds / f"{name}.png"
        return None

    def background(self, key: str, entry: dict) -> np.ndarray | None:
        """The cropped background, uint8 RGB (H, W, 3), or None where there is no file."""
        path = self.background_path(key)
        if path is None:
            return None
        return _crop_background(np.array(open_picture(path, "background")), entry["metadata"])


def _crop_background(pixels: np.ndarray, metadata: dict) -> np.ndarray:
    """A background of the size of the cropped frame is there already; one of the whole frame is cropped."""
    crop = metadata.get("crop")
    if crop and pixels.shape[:2] == (crop[3] - crop[2], crop[1] - crop[0]):
        return pixels
    return crop_window(pixels, crop)
