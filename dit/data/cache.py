"""The cache of the frozen encoders' output: precompute.py writes it, training reads it in place of pictures.

manifest.json               settings it was made with, SHA-256 of the item list, shards with count and SHA-256
latents_00000.safetensors   "moments" (n, V, 2C, h, w), unscaled; V variants: [original, mirrored], or k random crops
items_00000.jsonl           {"id", "captions", "crop"} a line, in the same order
text_00000.safetensors      "states" (sum of lengths, E), "offsets" (captions + 1,), "pooled" (captions, E),
                            "item_index" (captions,)
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from dit.config import Config
from dit.dataset import names_sides
from shared.errors import UserError
from shared.rng import keyed_generator

_CHOICE = 13  # random stream
VERSION = 1
MANIFEST_KEYS = ("item_ids_sha256", "flips", "variants", "shards")
TENSORS = {"latents": ("moments",), "text": ("states", "offsets", "pooled", "item_index")}
MEND = "run dit/precompute.py again, it mends what is damaged"


def cache_settings(config: Config) -> dict[str, Any]:
    """What must agree between a cache and the run that reads it."""
    return {
        "vae": config.vae.pretrained_model_name if config.vae.type == "sd" else config.vae.type,
        "latent_stats": config.vae.latent_stats,
        "image_size": config.data.image_size,
        "crop": config.data.crop,
        "channels": config.model.in_channels,
    }


def text_settings(config: Config) -> dict[str, Any]:
    """The same for the captions."""
    name = config.text.pretrained_model_name if config.text.type == "clip" else config.text.type
    name += " with context" if config.text.context else ""
    return {"text_encoder": name, "text_dim": config.model.text_dim, "text_len": config.model.text_len}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(tree: Any) -> str:
    """The text of a JSON file of the cache."""
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


class CachedDataset(Dataset):
    """Samples of a cache: moments (2C, h, w) float32, text_embeddings (T, E), text_mask (T,), text_pooled (E,),
    image_id, index, flip.

    `pictures` is the data set that the run would read without the cache; its list of items must be the cache's.
    """

    def __init__(self, config: Config, pictures: Any) -> None:
        assert config.data.cache_dir is not None
        self.folder, self.seed, self.length = Path(config.data.cache_dir), config.run.seed, config.model.text_len
        manifest = self._manifest()
        wanted = cache_settings(config) | (text_settings(config) if config.model.text_conditioning != "none" else {})
        differing = [
            f"{key} is {manifest.get(key)!r}, the run wants {value!r}"
            for key, value in wanted.items()
            if manifest.get(key) != value
        ]
        if differing:
            raise UserError(
                f"data.cache_dir {self.folder} was made with other settings: {'; '.join(differing)}; run "
                "dit/precompute.py again with --out elsewhere"
            )
        if manifest["item_ids_sha256"] != pictures.fingerprint:
            raise UserError(
                f"data.cache_dir {self.folder} holds another list of pictures than {pictures.root}; run "
                "dit/precompute.py again"
            )
        self.reads_text, self.num_classes = config.model.text_conditioning != "none", config.model.num_classes
        self.fingerprint, self.skipped = pictures.fingerprint, pictures.skipped
        self.labels = [item.label for item in pictures.items] if self.num_classes else []
        self.flip = config.data.flip if manifest["flips"] and pictures.may_flip else 0.0
        self.variants = manifest["variants"] if not manifest["flips"] else 1
        self.ends = np.cumsum([shard["count"] for shard in manifest["shards"]])
        shards = enumerate(manifest["shards"])
        items = [item for number, shard in shards for item in self._items(number, shard["count"])]
        self.ids = [item["id"] for item in items]
        self.is_spared = [bool(config.data.flip_guard) and names_sides(item["captions"]) for item in items]
        self._captions = [self._caption_rows(number) for number in range(len(self.ends))] if self.reads_text else []
        self._open: dict[tuple[int, str], Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, 0)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # each process opens its own files

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """Item `index` as seen in `epoch`; caption, mirroring and crop follow from (seed, epoch, index)."""
        caption, flip, variant = torch.rand(3, generator=keyed_generator(self.seed, _CHOICE, epoch, index)).tolist()
        mirrored = flip < self.flip and not self.is_spared[index]
        shard = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[shard - 1]) if shard else 0)
        chosen = int(mirrored) if self.flip else int(variant * self.variants)
        moments = self._file(shard, "latents").get_slice("moments")[row : row + 1, chosen : chosen + 1][0, 0].float()
        sample = {"moments": moments, "image_id": self.ids[index], "index": index, "flip": mirrored}
        if self.reads_text:
            sample |= self._text(shard, self._captions[shard][row], caption)
        if self.num_classes:
            sample["label"] = self.labels[index]
        return sample

    def _text(self, shard: int, captions: list[int], draw: float) -> dict[str, Tensor]:
        file = self._file(shard, "text")
        which = captions[int(draw * len(captions))]
        first, last = file.get_slice("offsets")[which : which + 2].tolist()
        real = file.get_slice("states")[first:last].float()
        states = torch.zeros(self.length, real.shape[1])
        states[: len(real)] = real
        pooled = file.get_slice("pooled")[which : which + 1][0].float()
        return {"text_embeddings": states, "text_mask": torch.arange(self.length) < len(real), "text_pooled": pooled}

    def _items(self, shard: int, count: int) -> list[dict]:
        """The lines of a shard's list of items."""
        path = self.folder / f"items_{shard:05d}.jsonl"
        try:
            items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {MEND}") from None
        if len(items) != count:
            raise UserError(f"{path}: holds {len(items)} items, {count} expected; {MEND}")
        return items

    def _caption_rows(self, shard: int) -> list[list[int]]:
        """The captions of every item of a shard."""
        rows: list[list[int]] = [[] for _ in range(int(self.ends[shard] - (self.ends[shard - 1] if shard else 0)))]
        with self._opened(shard, "text") as file:
            for caption, item in enumerate(file.get_tensor("item_index").tolist()):
                rows[item].append(caption)
        return rows

    def _file(self, shard: int, kind: str) -> Any:
        key = (os.getpid(), f"{kind}_{shard:05d}")
        if key not in self._open:
            self._open[key] = self._opened(shard, kind)
        return self._open[key]

    def _opened(self, shard: int, kind: str) -> Any:
        path = self.folder / f"{kind}_{shard:05d}.safetensors"
        try:
            file = safe_open(str(path), "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {MEND}") from None
        missing = set(TENSORS[kind]) - set(file.keys())
        if missing:
            raise UserError(f"{path}: lacks {', '.join(sorted(missing))}; {MEND}")
        return file

    def _manifest(self) -> dict:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(
                f"{path}: no such file; data.cache_dir must be a folder that dit/precompute.py finished"
            ) from None
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}); run dit/precompute.py again") from None
        if not isinstance(manifest, dict) or not set(MANIFEST_KEYS) <= set(manifest):
            raise UserError(f"{path}: is no manifest of dit/precompute.py, which writes {', '.join(MANIFEST_KEYS)}")
        return manifest
