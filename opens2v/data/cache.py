"""Features that precompute.py stored: one safetensors file per clip and kind.

Variant v of a clip is the whole sample that the data set gives in epoch v: caption, frames and subject pictures of one
draw. A cached run takes one variant for everything in a sample, cached or not, so that a text never meets the latents
of another draw. Each variant remembers what it was made from; features of an edited caption, mask or video are refused.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opens2v.data.clips import text_digest
from shared.errors import BadSample, UserError, written_aside

KINDS = {"text": "text_rows", "clip": "clip_tokens", "vae": "latents"}  # kind -> name in a sample
_CLIP = (
    "num_training_frames", "num_training_frames_unit", "pixel_height", "pixel_width", "sample_stride", "target_fps",
)  # fmt: skip
_SAMPLE = (
    *_CLIP, "train_share", "max_subjects_per_sample", "subject_selection", "use_bbox", "min_gme_score", "min_aes_score",
    "min_crop_ratio", "max_crop_ratio", "subject_tag_groups", "dedup_iou", "is_cross_frame", "cross_min_similarity",
    "cross_max_similarity", "ref_augment", "ref_clip_size", "caption_key", "recolour_probability",
    "other_scene_probability", "other_subject_probability", "scenes", "generic_caption_probability",
)  # fmt: skip


def cache_settings(config: Any, kind: str, split: str) -> dict[str, Any]:
    """What the features of a kind depend on. Kinds that no random change reaches depend on less and are kept longer."""
    data, model = config.data, config.model
    moves = bool(data.other_scene_probability or data.other_subject_probability)
    fields: Sequence[str] = _SAMPLE
    if kind == "text" and not moves and not data.generic_caption_probability:
        fields = ("caption_key",)
    elif kind == "vae" and not moves and not data.recolour_probability:
        fields = (*_CLIP, "train_share")
    encoder = {
        "text": {"encoder": model.text_encoder, "base": model.base_model_path, "rows": model.text_rows},
        "clip": {"encoder": model.image_encoder, "path": model.image_encoder_path},
        "vae": {"codec": model.codec, "base": model.base_model_path},
    }[kind]
    seed = {} if fields == ("caption_key",) else {"seed": config.run.seed}
    return {**encoder, **{name: data[name] for name in fields}, **seed, "split": split}


def content_of(kind: str, item: dict[str, Any]) -> str:
    """What a feature of a sample was made from, as a short text: the caption, or the pixels' sources."""
    return text_digest(item["prompts"]) if kind == "text" else item["meta"]["content"][kind]


class FeatureCache:
    """Reads and writes <folder>/<kind>/<part>/<key>.<settings>.safetensors."""

    def __init__(self, folder: str | Path, config: Any, kind: str, split: str = "train"):
        self.folder, self.kind = Path(folder) / kind, kind
        settings = cache_settings(config, kind, split)
        self.rows = config.model.text_rows
        self.settings = json.dumps(settings, sort_keys=True, ensure_ascii=True, default=str)
        self.digest = hashlib.sha256(self.settings.encode()).hexdigest()[:12]

    def path(self, part: str, key: str) -> Path:
        """The file of a clip; the settings are part of its name, so that other settings never overwrite it."""
        return self.folder / part / f"{key}.{self.digest}.safetensors"

    def contents(self, part: str, key: str) -> list[str]:
        """What the stored variants were made from; none where there is no complete file."""
        try:
            with safe_open(str(self.path(part, key)), "pt") as file:
                return json.loads((file.metadata() or {}).get("contents", "[]"))
        except (SafetensorError, OSError, ValueError):
            return []

    def write(self, part: str, key: str, variants: list[Tensor], contents: list[str]) -> None:
        """Store the variants of a clip, aside and renamed."""
        tensors = {str(place): value.contiguous().cpu() for place, value in enumerate(variants)}
        metadata = {"settings": self.settings, "contents": json.dumps(contents)}
        with written_aside(self.path(part, key)) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def read(self, part: str, key: str, variant: int, content: str) -> Tensor:
        """A variant, float32. UserError for one that was made from something else than `content`."""
        path, contents = self.path(part, key), self.contents(part, key)
        if not path.exists():
            raise BadSample(self._missing(part, key))
        if not contents:
            raise BadSample(f"cached features {path}: cannot be read; delete the file and run precompute.py")
        place = variant % len(contents)
        if contents[place] != content:
            if content not in contents or self.kind != "text":
                what = "caption" if self.kind == "text" else "annotation or video, or another draw of it,"
                raise UserError(
                    f"cached {self.kind} features of {part}/{key} were made from another {what} than the data set now "
                    "has; run opens2v/precompute.py again with this configuration: it makes only what changed"
                )
            place = contents.index(content)
        try:
            with safe_open(str(path), "pt") as file:
                rows = file.get_tensor(str(place)).float()
        except (SafetensorError, OSError) as error:
            raise BadSample(
                f"cached features {path}: cannot be read ({error}); delete the file and run precompute.py"
            ) from None
        return self.padded(rows) if self.kind == "text" else rows

    def padded(self, rows: Tensor) -> Tensor:
        """Text rows with zero rows behind them, up to the full count."""
        return torch.cat([rows, torch.zeros(self.rows - len(rows), rows.shape[1])])

    def _missing(self, part: str, key: str) -> str:
        others = sorted((self.folder / part).glob(f"{key}.*.safetensors"))
        if others:
            with safe_open(str(others[0]), "pt") as file:
                made_with = (file.metadata() or {}).get("settings", "unknown settings")
            return (
                f"cached {self.kind} features of {part}/{key} were made with other settings ({made_with}; now "
                f"{self.settings}); run opens2v/precompute.py again with this configuration"
            )
        return (
            f"cached {self.kind} features of {part}/{key}: not in {self.folder}; run opens2v/precompute.py "
            f"--what {self.kind}"
        )


class CachedDataset:
    """The data set with stored features in place of what they were made from."""

    def __init__(self, dataset: Any, caches: dict[str, FeatureCache]):
        self.dataset, self.caches, self.fingerprint = dataset, caches, dataset.fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The sample of one variant, with text_rows, clip_tokens and latents added as far as they are cached."""
        part, key = self.dataset.identity(index)
        stored = {kind: len(cache.contents(part, key)) for kind, cache in self.caches.items()}
        counts = [count for kind, count in stored.items() if kind != "text"] or list(stored.values())
        variant = epoch % max(1, min(counts))
        item = self.dataset.sample(index, variant)
        for kind, cache in self.caches.items():
            item[KINDS[kind]] = cache.read(part, key, variant, content_of(kind, item))
        if "vae" in self.caches:
            item.pop("frames", None)
        if "clip" in self.caches:
            item.pop("ref_clip_pixels", None)
        return item


class StoredFeatures:
    """Features of single texts and pictures that a run needs beside its clips: the empty and the negative prompt, the
    prompts and pictures of its sample videos. Named by what they show.
    """

    PART = "_"

    def __init__(self, config: Any):
        folder, data = config.data.cache_dir, config.data
        self.text_cache = FeatureCache(folder, config, "text", "single") if data.use_cached_text else None
        self.clip_cache = FeatureCache(folder, config, "clip", "single") if data.use_cached_clip else None

    @staticmethod
    def text_key(text: str) -> str:
        """The key of a text."""
        return f"text_{text_digest(text)}"

    @staticmethod
    def picture_key(pixels: Tensor) -> str:
        """The key of a picture as it goes into the image encoder."""
        return f"picture_{hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:16]}"

    def text(self, text: str) -> Tensor:
        """Rows (R, D); UserError when precompute.py has not stored them."""
        return self._read(self.text_cache, self.text_key(text), f"the text {text[:60]!r}")

    def picture(self, pixels: Tensor) -> Tensor:
        """Tokens (S, C) of a picture (3, H, W); UserError when precompute.py has not stored them."""
        return self._read(self.clip_cache, self.picture_key(pixels), "a subject picture of val_ref_images")

    def _read(self, cache: FeatureCache | None, key: str, what: str) -> Tensor:
        if cache is None or not cache.contents(self.PART, key):
            raise UserError(
                f"{what} is needed and neither its encoder is loaded nor its features are stored; run "
                "opens2v/precompute.py again with this configuration"
            )
        return cache.read(self.PART, key, 0, cache.contents(self.PART, key)[0])


def with_cached_features(dataset: Any, config: Any, *, split: str = "train") -> Any:
    """The data set, or around it a CachedDataset when the configuration asks for cached features."""
    data = config.data
    wanted = {"text": data.use_cached_text, "clip": data.use_cached_clip, "vae": data.use_cached_latents}
    caches = {kind: FeatureCache(data.cache_dir, config, kind, split) for kind, use in wanted.items() if use}
    return CachedDataset(dataset, caches) if caches else dataset


def cached_changes(config: Any) -> dict[str, Any]:
    """Options of a data set whose cached features are read."""
    data = config.data
    is_cached = data.use_cached_text or data.use_cached_clip or data.use_cached_latents
    return {"load_frames": not data.use_cached_latents, "with_content": is_cached}
