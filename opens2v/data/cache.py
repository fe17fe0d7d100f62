"""Features that precompute.py stored: one safetensors file per clip and kind, with the settings they were made
under.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import BadSample, UserError, written_aside

EMPTY_PROMPT = ("_", "empty_prompt")  # part and key of the text that dropped samples get


def cache_settings(config: Any, kind: str) -> dict[str, Any]:
    """What the features of a kind depend on."""
    data, model = config.data, config.model
    subject = {
        name: data[name]
        for name in (
            "max_subjects_per_sample",
            "subject_selection",
            "use_bbox",
            "min_gme_score",
            "min_aes_score",
            "min_crop_ratio",
            "max_crop_ratio",
            "subject_tag_groups",
            "dedup_iou",
            "is_cross_frame",
            "ref_augment",
            "ref_clip_size",
        )
    }
    clip = {
        name: data[name]
        for name in (
            "num_training_frames",
            "num_training_frames_unit",
            "pixel_height",
            "pixel_width",
            "sample_stride",
            "target_fps",
            "train_share",
        )
    }
    return {
        "text": {
            "encoder": model.text_encoder,
            "base": model.base_model_path,
            "rows": model.text_rows,
            "caption": data.caption_key,
            "generic": data.generic_caption_probability,
        },
        "clip": {"encoder": model.image_encoder, "path": model.image_encoder_path, **subject},
        "vae": {"codec": model.codec, "base": model.base_model_path, **clip},
    }[kind]


class FeatureCache:
    """Reads and writes <folder>/<kind>/<part>/<key>.safetensors; variant v holds what epoch v of the data set gives."""

    def __init__(self, folder: str | Path, config: Any, kind: str):
        self.folder, self.kind = Path(folder) / kind, kind
        settings = {**cache_settings(config, kind), "seed": config.run.seed}
        self.settings = json.dumps(settings, sort_keys=True, ensure_ascii=True, default=str)
        self.digest = hashlib.sha256(self.settings.encode()).hexdigest()[:12]

    def path(self, part: str, key: str) -> Path:
        """The file of a clip; the settings are part of its name, so that other settings never overwrite it."""
        return self.folder / part / f"{key}.{self.digest}.safetensors"

    def has(self, part: str, key: str, variants: int) -> bool:
        """Whether a complete file with at least so many variants is there."""
        path = self.path(part, key)
        if not path.exists():
            return False
        try:
            with safe_open(str(path), "pt") as file:
                return len(file.keys()) >= variants
        except (SafetensorError, OSError):
            return False

    def write(self, part: str, key: str, variants: list[Tensor]) -> None:
        """Store the variants of a clip, aside and renamed."""
        path = self.path(part, key)
        tensors = {str(place): value.contiguous().cpu() for place, value in enumerate(variants)}
        with written_aside(path) as temporary:
            save_file(tensors, temporary, metadata={"settings": self.settings})

    def read(self, part: str, key: str, epoch: int) -> Tensor:
        """The variant of an epoch, float32."""
        path = self.path(part, key)
        if not path.exists():
            raise BadSample(self._missing(part, key))
        try:
            with safe_open(str(path), "pt") as file:
                return file.get_tensor(str(epoch % len(file.keys()))).float()
        except (SafetensorError, OSError, ZeroDivisionError) as error:
            raise BadSample(
                f"cached features {path}: cannot be read ({error}); delete the file and run precompute.py"
            ) from None

    def _missing(self, part: str, key: str) -> str:
        others = sorted((self.folder / part).glob(f"{key}.*.safetensors"))
        if others:
            with safe_open(str(others[0]), "pt") as file:
                made_with = (file.metadata() or {}).get("settings", "unknown settings")
            return (
                f"cached {self.kind} features of {part}/{key} were made with other settings ({made_with}; now "
                f"{self.settings}); "
                "run opens2v/precompute.py again with this configuration"
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
        """The sample, with text_rows, clip_tokens and latents added as far as they are cached."""
        item = self.dataset.sample(index, epoch)
        names = {"text": "text_rows", "clip": "clip_tokens", "vae": "latents"}
        for kind, cache in self.caches.items():
            item[names[kind]] = cache.read(item["meta"]["part"], item["key"], epoch)
        if "text" in self.caches:
            item["text_rows"] = _padded(item["text_rows"], self.caches["text"])
        if "vae" in self.caches:
            item.pop("frames", None)
        if "clip" in self.caches:
            item.pop("ref_clip_pixels", None)
        return item


def _padded(rows: Tensor, cache: FeatureCache) -> Tensor:
    """Zero rows behind the text, up to the full count."""
    count = json.loads(cache.settings)["rows"]
    if len(rows) > count:
        raise UserError(f"cached text has {len(rows)} rows, text_rows is {count}")
    return torch.cat([rows, torch.zeros(count - len(rows), rows.shape[1])])


def cached_null_text(config: Any) -> Tensor:
    """Rows of the empty prompt; UserError when precompute.py has not stored them."""
    cache = FeatureCache(config.data.cache_dir, config, "text")
    try:
        return _padded(cache.read(*EMPTY_PROMPT, 0), cache)
    except BadSample as error:
        raise UserError(str(error)) from None


def with_cached_features(dataset: Any, config: Any, *, latents: bool = True) -> Any:
    """The data set, or around it a CachedDataset when the configuration asks for cached features.

    latents=False leaves the frames to be encoded: validation looks at other windows than those that are stored.
    """
    data = config.data
    wanted = {"text": data.use_cached_text, "clip": data.use_cached_clip, "vae": latents and data.use_cached_latents}
    caches = {kind: FeatureCache(data.cache_dir, config, kind) for kind, use in wanted.items() if use}
    return CachedDataset(dataset, caches) if caches else dataset
