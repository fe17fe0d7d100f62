"""One clip of an OpenS2V part: its entry, frames, background and subjects."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opens2v.data.annotations import Annotations
from opens2v.data.subjects import Subject, find_subjects
from opens2v.data.video import crop_window, read_frames
from shared.errors import BadSample
from shared.media.pictures import as_rgb

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
        if metadata.get(name):
            return re.sub(r"\s+", " ", str(metadata[name])).strip()
    raise BadSample(f"no caption under {first_key} or {', '.join(OTHER_CAPTIONS)}")


def generic_caption(caption: str, class_name: str, noun: str = "subject") -> str:
    """The caption with the subject's noun replaced, by "subject" when only the picture is to say what it is."""
    pattern = rf"\b(?P<article>an?|the)?\s*\b{re.escape(class_name)}\b"

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
    return [record["class_name"] for record in entry["annotation"]["mask_map"].values()]


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
        if (
            not isinstance(entry, dict)
            or "metadata" not in entry
            or "annotation" not in entry
            or "path" not in entry["metadata"]
        ):
            raise BadSample(f"{self.name}/{key}: the entry needs metadata (with path) and annotation")
        return key, entry

    def frames(self, entry: dict, indices: Sequence[int]) -> np.ndarray:
        """Cropped frames, uint8 RGB (F, H, W, 3)."""
        metadata = entry["metadata"]
        return crop_window(read_frames(self.videos / metadata["path"], indices), metadata.get("crop"))

    def subjects(self, key: str, entry: dict) -> list[Subject]:
        """All subjects of the annotated frame; BadSample, naming the key, when a mask or field is damaged."""
        try:
            frame = self.frames(entry, [entry["annotation"]["ann_frame_data"]["ann_frame_idx"]])[0]
            found = find_subjects(entry, frame, use_bbox=self.use_bbox, key=f"{self.name}/{key}")
        except (KeyError, TypeError, ValueError) as error:
            raise BadSample(
                f"{self.name}/{key}: {f'field {error} is missing' if isinstance(error, KeyError) else error}"
            ) from None
        if not found:
            raise BadSample(f"{self.name}/{key}: no subject with a mask that is not empty")
        return found

    def background_path(self, key: str) -> Path | None:
        """The picture of the scene without subjects. Its folder is called `foreground`; its last step may count one
        further.
        """
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
        try:
            pixels = np.array(as_rgb(Image.open(path)))
        except OSError as error:
            raise BadSample(f"background {path}: cannot be read ({error})") from None
        return _crop_background(pixels, entry["metadata"])


def _crop_background(pixels: np.ndarray, metadata: dict) -> np.ndarray:
    """A background of the size of the cropped frame is there already; one of the whole frame is cropped."""
    crop = metadata.get("crop")
    if crop and pixels.shape[:2] == (crop[3] - crop[2], crop[1] - crop[0]):
        return pixels
    return crop_window(pixels, crop)
