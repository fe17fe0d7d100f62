"""Subject pictures: cut out of the annotated frame by masks, filtered, chosen, brought to the two input forms."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opens2v.data.augment import WHITE, augment
from shared.errors import BadSample
from shared.media.pictures import as_rgb

SELECTIONS = ("first", "random", "best_score")
# What Pillow's decoders raise for broken files, RuntimeError from those of AVIF.
BROKEN_PICTURE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SIZE = 224


@dataclass
class Subject:
    """One detection with its cut-out."""

    annotation_idx: str  # "1" .. "n", belongs to annotations[int - 1]
    class_name: str
    image: Image.Image  # RGB, white outside the mask
    gme_score: float | None
    aes_score: float | None
    crop_ratio: float  # area of the cut-out over area of the cropped frame
    mask_area: int  # pixels
    mask: np.ndarray  # uint8 (H, W) in the cropped frame


@dataclass(frozen=True)
class SubjectFilter:
    """Optional rules; None or an empty list is off. When the rules leave nothing, the unfiltered list counts."""

    min_gme_score: float | None = None
    min_aes_score: float | None = None
    min_crop_ratio: float | None = None
    max_crop_ratio: float | None = None
    subject_tag_groups: tuple[str, ...] | None = None
    dedup_iou: float | None = None

    def apply(self, subjects: list[Subject], word_tags: dict[str, list[str]]) -> list[Subject]:
        """The subjects that pass, in file order."""
        named = {str(tag).lower() for group in self.subject_tag_groups or () for tag in word_tags.get(group) or ()}
        kept: list[Subject] = []
        for subject in subjects:
            if _below(subject.gme_score, self.min_gme_score) or _below(subject.aes_score, self.min_aes_score):
                continue
            if _below(subject.crop_ratio, self.min_crop_ratio):
                continue
            if self.max_crop_ratio is not None and subject.crop_ratio > self.max_crop_ratio:
                continue
            if self.subject_tag_groups and subject.class_name.lower() not in named:
                continue
            if self.dedup_iou is not None and any(_iou(subject.mask, other.mask) > self.dedup_iou for other in kept):
                continue
            kept.append(subject)
        return kept or subjects


def _below(value: float | None, limit: float | None) -> bool:
    return limit is not None and (value is None or value < limit)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 0.0


def find_subjects(entry: dict[str, Any], frame: np.ndarray, *, use_bbox: bool = False, key: str = "") -> list[Subject]:
    """All subjects of an entry in file order; detections with an empty mask are left out.

    frame: the CROPPED annotated frame, uint8 RGB (H, W, 3). use_bbox keeps the background inside the box.
    Raises ValueError, naming the key, for run-length text that does not fit its size.
    """
    annotation = entry["annotation"]
    frame_index = str(annotation["ann_frame_data"]["ann_frame_idx"])
    details = annotation["ann_frame_data"]["annotations"]
    masks = annotation["mask_annotation"].get(frame_index, {})
    found = []
    for annotation_idx, record in annotation["mask_map"].items():
        is_picture = record.get("image") is not None  # prepare.py: a picture stands for the subject
        if not is_picture and annotation_idx not in masks:
            continue
        if not isinstance(record["class_name"], str) or not record["class_name"].strip():
            raise ValueError(f"{key}, mask {annotation_idx}: class_name is {record['class_name']!r}, a noun is needed")
        if is_picture:
            found.append(_from_picture(annotation_idx, record, frame))
            continue
        mask = decode_rle(
            masks[annotation_idx]["counts"], masks[annotation_idx]["size"], f"{key}, mask {annotation_idx}"
        )
        mask = mask[: frame.shape[0], : frame.shape[1]]
        if not mask.any():
            continue
        top, bottom, left, right = _tight_box(mask)
        cut = frame[top : bottom + 1, left : right + 1].copy()
        if not use_bbox:
            cut[mask[top : bottom + 1, left : right + 1] == 0] = 255
        place = int(annotation_idx) - 1
        detail = details[place] if 0 <= place < len(details) else {}
        ratio = cut.shape[0] * cut.shape[1] / (frame.shape[0] * frame.shape[1])
        found.append(
            Subject(
                annotation_idx,
                record["class_name"],
                Image.fromarray(cut),
                detail.get("gme_score"),
                detail.get("aes_score"),
                ratio,
                int(mask.sum()),
                mask,
            )
        )
    return found


def open_picture(path: str | Path, what: str = "reference picture") -> Image.Image:
    """A picture, RGB on white. Raises BadSample, naming what it is, for what is not there or cannot be read."""
    try:
        return as_rgb(Image.open(path))
    except FileNotFoundError:
        raise BadSample(f"{what} {path}: not found") from None
    except BROKEN_PICTURE as error:
        raise BadSample(f"{what} {path}: cannot be read ({error}); give a PNG or JPEG") from None


def _from_picture(annotation_idx: str, record: dict[str, Any], frame: np.ndarray) -> Subject:
    """A subject of a picture of its own, which no mask of the frame belongs to."""
    image = open_picture(Path(record["image"]), "subject picture")
    none = np.zeros(frame.shape[:2], np.uint8)
    return Subject(annotation_idx, record["class_name"], image, None, None, 1.0, image.width * image.height, none)


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row and column of the mask, inclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def select_subjects(subjects: list[Subject], strategy: str, count: int, rng: random.Random) -> list[Subject]:
    """Up to `count` subjects: first (file order), random (no replacement) or best_score (aes_score, missing last)."""
    if strategy == "first":
        return subjects[:count]
    if strategy == "random":
        return rng.sample(subjects, min(count, len(subjects)))
    if strategy == "best_score":
        score = [-np.inf if subject.aes_score is None else subject.aes_score for subject in subjects]
        order = sorted(range(len(subjects)), key=lambda place: -score[place])  # stable: ties stay in file order
        return [subjects[place] for place in order[:count]]
    raise ValueError(f"subject_selection {strategy!r} is not one of {', '.join(SELECTIONS)}")


# --- the two input forms ----------------------------------------------------------------------------------------------


# Of a subject in a training frame, pixels: upper row, height, how far right of the frame's middle its own middle is.
Place = tuple[float, float, float] | None


def place_in_frame(mask: np.ndarray, size: tuple[int, int]) -> Place:
    """Where a subject (mask (H, W) of the cropped frame) stands when the frame covers `size`; None: nowhere."""
    if not mask.any():
        return None
    factor = max(size[0] / mask.shape[0], size[1] / mask.shape[1])
    top, bottom, left, right = _tight_box(mask)
    upper = top * factor - (mask.shape[0] * factor - size[0]) / 2
    return upper, (bottom + 1 - top) * factor, (left + right + 1 - mask.shape[1]) / 2 * factor


def reference_pixels(image: Image.Image, height: int, width: int, scale: float = 1.0, place: Place = None) -> Tensor:
    """float32 (3, height, width) in [-1, 1] on white: fitted inside the canvas (Lanczos, aspect kept) and centred, or
    with a place as it is in the frame, the canvas over the frame's middle, as far as the canvas goes.
    """
    factor = min(height / image.height, width / image.width)
    factor = scale * (factor if place is None else min(factor, place[1] / image.height))
    size = (min(width, max(1, round(image.width * factor))), min(height, max(1, round(image.height * factor))))
    canvas = Image.new("RGB", (width, height), WHITE)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    if place is not None:
        left = min(max(0, round((width - size[0]) / 2 + place[2])), width - size[0])
        top = min(max(0, round(place[0])), height - size[1])
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), (left, top))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 127.5 - 1


def clip_pixels(image: Image.Image, size: int = CLIP_SIZE) -> Tensor:
    """float32 (3, size, size), CLIP-normalised: padded to a white square first, so slim subjects keep their shape."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.array(square.resize((size, size), Image.Resampling.BICUBIC))
    return normalise_clip(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def normalise_clip(pixels: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] -> CLIP's normalisation."""
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def picture_tensors(
    images: list[Image.Image],
    count: int,
    size: tuple[int, int],
    clip_size: int,
    scales: list[float] | None = None,
    places: Sequence[Place] | None = None,
) -> dict[str, Tensor]:
    """ref_pixels (count, 3, *size), ref_clip_pixels (count, 3, clip_size, clip_size) and ref_mask (count,) of pictures.

    Slots behind the last picture are white and False in the mask. scales, places: see reference_pixels.
    """
    pixels = torch.ones(count, 3, *size)
    features = normalise_clip(torch.ones(3, clip_size, clip_size)).repeat(count, 1, 1, 1)
    for slot, image in enumerate(images):
        scale, place = 1.0 if scales is None else scales[slot], None if places is None else places[slot]
        pixels[slot] = reference_pixels(image, *size, scale=scale, place=place)
        features[slot] = clip_pixels(image, clip_size)
    return {"ref_pixels": pixels, "ref_clip_pixels": features, "ref_mask": torch.arange(count) < len(images)}


def reference_tensors(
    subjects: list[Subject],
    images: list[Image.Image],
    rng: random.Random | None,
    *,
    count: int,
    size: tuple[int, int],
    clip_size: int = CLIP_SIZE,
    places: Sequence[Place] | None = None,
) -> dict[str, Any]:
    """What a sample holds of its subjects, in `count` slots; empty slots are white, without name, with NaN scores.

    images: the pictures of `subjects`. rng: augments them; None leaves them as they are. size: of ref_pixels;
    clip_size: side of ref_clip_pixels. places: see reference_pixels.
    """
    shown = [(image, 1.0) if rng is None else augment(image, rng) for image in images]
    scores = torch.full((count, 2), torch.nan)
    for slot, subject in enumerate(subjects):
        for column, score in enumerate((subject.gme_score, subject.aes_score)):
            if score is not None:
                scores[slot, column] = score
    names = [subject.class_name for subject in subjects]
    return {
        **picture_tensors([image for image, _ in shown], count, size, clip_size, [s for _, s in shown], places),
        "subject_names": names + [""] * (count - len(names)),
        "subject_scores": scores,
    }


# COCO compressed run-length masks in plain Python: column-major runs of 0 and 1, differences in base 32 as ASCII
# text.


def decode_rle(counts: str | bytes, size: tuple[int, int] | list[int], where: str = "mask") -> np.ndarray:
    """uint8 mask (height, width) of 0 and 1. `where` names the mask in the ValueError on text that does not fit."""
    height, width = size
    runs = _numbers(counts, where)
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(
            f"{where}: the runs sum to {sum(runs)}, a mask of {height} x {width} has {height * width} pixels; the "
            "text is damaged"
        )
    values = np.arange(len(runs), dtype=np.uint8) & 1
    return np.repeat(values, runs).reshape(width, height).T.copy()


def _numbers(counts: str | bytes, where: str) -> list[int]:
    """The run lengths: 5 bits a character, lowest first; from the fourth on each is a difference to two before."""
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for code in text:
        bits = code - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{where}: character {chr(code)!r} is not part of compressed run-length text")
        value |= (bits & 31) << (5 * shift)
        shift += 1
        if bits & 32:
            continue
        if bits & 16:
            value |= -1 << (5 * shift)
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError(f"{where}: compressed run-length text ends in the middle of a number")
    return runs


def encode_rle(mask: np.ndarray) -> dict:
    """{"size": [height, width], "counts": text} of a mask; the inverse of decode."""
    height, width = mask.shape
    flat = (np.asarray(mask).T.reshape(-1) != 0).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    text = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(bits + (32 if more else 0) + 48))
    return {"size": [height, width], "counts": "".join(text)}
