"""Options of a sample, and which entries of a part are used."""

from dataclasses import dataclass, fields
from typing import Any

from opens2v.data.annotations import Annotations
from opens2v.data.subjects import CLIP_SIZE, SELECTIONS
from shared.errors import UserError


@dataclass(frozen=True)
class SampleOptions:
    """Everything about a sample beyond paths and sizes; the names are those of the `data` section of the
    configuration.
    """

    target_fps: float | None = None
    min_gme_score: float | None = None
    min_aes_score: float | None = None
    min_crop_ratio: float | None = None
    max_crop_ratio: float | None = None
    subject_tag_groups: tuple[str, ...] | None = None
    dedup_iou: float | None = None
    use_bbox: bool = False
    ref_augment: bool = True
    ref_clip_size: int = CLIP_SIZE
    caption_key: str = "face_cap_qwen"
    max_retries: int = 10
    strict: bool = False
    load_background: bool = False
    load_subjects: bool = True
    load_frames: bool = True
    cross_min_similarity: float = 0.6
    cross_max_similarity: float = 0.98
    recolour_probability: float = 0.0
    other_scene_probability: float = 0.0
    generic_caption_probability: float = 0.0
    time_range: tuple[float, float] = (0.0, 1.0)
    only_keys: tuple[str, ...] = ()
    without_keys: tuple[str, ...] = ()
    keep_decoded: bool = False
    seed: int = 0


def as_tuple(value: Any) -> Any:
    """A list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def sample_options(options: dict[str, Any]) -> SampleOptions:
    """The options of a data set from its keyword arguments; TypeError for an unknown name."""
    known = {field.name for field in fields(SampleOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"unknown options {unknown}; known are {sorted(known)}")
    return SampleOptions(**{name: as_tuple(value) for name, value in options.items()})


def check_arguments(num_frames: int, sample_stride: int, max_subjects: int, selection: str) -> None:
    """ValueError for numbers and choices that no sample could be made with."""
    if selection not in SELECTIONS:
        raise ValueError(f"subject_selection {selection!r} is not one of {', '.join(SELECTIONS)}")
    if num_frames < 1 or sample_stride < 1 or max_subjects < 1:
        raise ValueError(
            f"num_frames {num_frames}, sample_stride {sample_stride} and max_subjects_per_sample {max_subjects} must "
            "be at least 1"
        )


def chosen_positions(annotations: Annotations, options: SampleOptions) -> list[int] | None:
    """Positions of the entries whose keys contain one of only_keys and none of without_keys; None for all."""
    if not options.only_keys and not options.without_keys:
        return None
    keys = [annotations.key(position) for position in range(len(annotations))]
    chosen = [
        position for position, key in enumerate(keys)
        if (not options.only_keys or any(text in key for text in options.only_keys)) and not any(text in key for text in
        options.without_keys)
    ]  # fmt: skip
    if not chosen:
        raise UserError(
            f"{annotations.path}: no entry is left by only_keys {list(options.only_keys)} and without_keys "
            f"{list(options.without_keys)}"
        )
    return chosen
