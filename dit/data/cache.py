"""The cache of the frozen encoders' output: precompute.py writes it, training reads it in place of pictures.

manifest.json                 what it was made with, the mean and scale of the latents, and its shards
shard_00000_KEY.json          one shard: files with their SHA-256, the keys of its pictures and texts, broken pictures
latents_00000_KEY.safetensors "moments" (n, V, 2C, h, w), unscaled; V variants: [original, mirrored], or k random crops;
                              with repa.encoder_path also "features" (n, V, tokens, E) of that encoder
items_00000_KEY.jsonl         {"id", "captions", "crop", "stamp", "label", "split"} a line, in the same order
text_00000_KEY.safetensors    "states" (sum of lengths, E), "offsets" (captions + 1,), "pooled" (captions, E),
                              "item_index" (captions,)
null.safetensors              states, mask and pooled vector of the empty caption
autoencoder.safetensors       a codec that was fitted on the pictures
bad_samples.jsonl             pictures that could not be read; they are left out

KEY stands for everything that shaped the shard: the content of the encoders, the settings, and of each picture its
name, size, time and captions. A shard whose key is there already is not made again; of others, what did not change is
copied.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from dit.config import Config
from dit.data.readers import Item, Items, Strings
from dit.dataset import TextImageDataset, draws_of_visit, fingerprint_of, names_sides
from shared.errors import BadSample, UserError

VERSION = 2
MANIFEST_KEYS = ("pictures", "texts", "shards", "latents")
TENSORS = {"latents": ("moments",), "text": ("states", "offsets", "pooled", "item_index")}
MEND = "run dit/precompute.py again, it mends what is damaged and encodes only what changed"
SPLITS = ("train", "val")
BIG = 1 << 31  # bytes; of larger files a sample is hashed


# --- keys -------------------------------------------------------------------------------------------------------------


def picture_settings(config: Config, vae_content: str | None) -> dict[str, Any]:
    """Every setting that decides what the latents of a picture are."""
    data, vae, side = config.data, config.vae, config.latent_side // config.model.patch_size
    encoder = config.repa.encoder_path
    features = {} if encoder is None else {"feature_content": content_of(encoder), "feature_grid": side}
    return features | {
        "vae_type": vae.type,
        "vae_content": vae_content,
        "factor": config.vae_factor,
        "channels": config.model.in_channels,
        "use_tiling": vae.use_tiling,
        "image_size": data.image_size,
        "crop": data.crop,
        "use_bbox": data.use_bbox,
    }


def text_settings(config: Config, text_content: str | None) -> dict[str, Any]:
    """The same for the states of a caption; empty for a model that reads none."""
    if config.model.text_conditioning == "none":
        return {}
    return {
        "text_type": config.text.type,
        "context": config.text.context,
        "text_content": text_content,
        "text_dim": config.model.text_dim,
        "text_len": config.model.text_len,
    }


def content_of(name: str, *subfolders: str) -> str | None:
    """SHA-256 of what a local folder, file or downloaded hub repository of weights holds; None where it is not on this
    disk. The same files in another place are the same content. subfolders: the parts of a pipeline that are meant,
    where the folder is one.
    """
    path = Path(name)
    if path.is_file():
        beside = [path.parent / "config.json"] if subfolders else []  # of a VAE in one file: its sizes and scale
        files = [path, *(file for file in beside if file.is_file())]
    elif path.is_dir():
        folders = [path / part for part in subfolders if (path / part).is_dir()] or [path]
        kinds = (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model")
        files = sorted(file for place in folders for file in place.iterdir() if file.suffix in kinds and file.is_file())
    else:
        from huggingface_hub import try_to_load_from_cache

        for wanted in (*(f"{part}/config.json" for part in subfolders), "config.json"):
            try:
                found = try_to_load_from_cache(name, wanted)
            except ValueError:  # no name that the hub could have
                return None
            if isinstance(found, str):
                return content_of(str(Path(found).parent))
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name if len(files) > 1 else ''} {file_digest(file)}".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of more than 2 GiB, of its size, its ends and 256 evenly spread MiB."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= BIG:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for part in range(257):
            file.seek(min(size * part // 256, size - (1 << 20)))
            digest.update(file.read(1 << 20))
        return digest.hexdigest()


def key_of(value: Any) -> str:
    """A short name for a tree of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def stamp_of(items: Items, item: Item) -> str:
    """What tells a picture from its former state: size and time of its file, and its box; "gone" without a file."""
    try:
        return items.stamp(item) + ("" if item.box is None else f" {item.box}")
    except BadSample:
        return "gone"


def readable_items(items: Items) -> Iterator[Item]:
    """The items, without those of shards whose captions cannot be read."""
    for index in range(len(items)):
        try:
            yield items[index]
        except BadSample:
            continue


def contents(config: Config, *, codec: Path | None = None) -> tuple[str | None, str | None]:
    """What VAE and text encoder hold; None where they are not on this disk. codec: the file of a fitted codec."""
    vae, text = config.vae, config.text
    if vae.type == "sd":
        found = content_of(vae.pretrained_model_name, "vae")
        stats = None if vae.latent_stats is None else content_of(vae.latent_stats)
        changed = (vae.scaling_factor, stats)
        vae_content = found if found is None or changed == (None, None) else key_of([found, *changed])
    elif vae.type == "pool":
        vae_content = "pool"
    else:
        vae_content = file_digest(codec) if codec is not None and codec.is_file() else None
    if config.model.text_conditioning == "none":
        return vae_content, None
    parts = ("text_encoder", "tokenizer") if text.type == "language" else ()
    return vae_content, "words" if text.type == "hash" else content_of(text.pretrained_model_name, *parts)


def as_json(tree: Any) -> str:
    """The text of a JSON file of the cache."""
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path}: no such file; data.cache_dir must be a folder that dit/precompute.py finished"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {MEND}") from None
    if isinstance(manifest, dict) and manifest.get("version") == 1:
        raise UserError(
            f"{path}: was written by an earlier version, which did not note what pictures and encoders held; run "
            "dit/precompute.py again with the same --out"
        )
    if not isinstance(manifest, dict) or not set(MANIFEST_KEYS) <= set(manifest):
        raise UserError(f"{path}: is no manifest of dit/precompute.py, which writes {', '.join(MANIFEST_KEYS)}")
    return manifest


def refuse_other_settings(folder: Path, manifest: dict[str, Any], config: Config) -> None:
    """UserError when the run that reads the cache wants other latents or text states than it holds. What an encoder
    holds is compared where the encoder is on this disk.
    """
    vae_content, text_content = contents(config, codec=folder / "autoencoder.safetensors")
    wanted = picture_settings(config, vae_content) | text_settings(config, text_content)
    held = {**manifest["pictures"], **manifest["texts"]}
    if any(name.startswith("text") for name in wanted) and not manifest["texts"]:
        raise UserError(f"data.cache_dir {folder} holds no captions; run dit/precompute.py again without --text false")
    differing = [
        f"{name} is {held.get(name)!r}, the run wants {value!r}"
        for name, value in wanted.items()
        if held.get(name) != value and not (value is None and name.endswith("content"))
    ]
    if differing:
        raise UserError(
            f"data.cache_dir {folder} was made with other settings: {'; '.join(differing)}; run dit/precompute.py "
            "again (with --out elsewhere to keep both)"
        )


def refuse_changed_pictures(folder: Path, manifest: dict[str, Any], datasets: dict[str, TextImageDataset]) -> None:
    """UserError when pictures or captions on this disk are no longer those of the cache: sizes and times are looked at,
    no picture is opened.
    """
    for split, dataset in datasets.items():
        shards = shards_of(folder, manifest, split)
        held = {line["id"]: line for shard in shards for line in shard.lines()}
        bad = {name for shard in shards for name, _ in shard.note["bad"]}
        changed = []
        for item in readable_items(dataset.items):
            line = held.pop(item.id, None)
            if item.id in bad:
                continue
            now = (stamp_of(dataset.items, item), list(item.captions), item.label)
            if line is None or (line["stamp"], line["captions"], line["label"]) != now:
                changed.append(item.id)
        if changed or held:
            first = [*changed, *held][0]
            raise UserError(
                f"data.cache_dir {folder}: {len(changed) + len(held)} pictures or captions of {dataset.root} are new, "
                f"changed or gone since it was written, the first: {first}; {MEND}"
            )


# --- reading ----------------------------------------------------------------------------------------------------------


def shards_of(folder: Path, manifest: dict[str, Any], split: str) -> list["Shard"]:
    """The shards of a split, in order."""
    return [Shard(folder, note) for note in manifest["shards"] if note["split"] == split]


class Shard:
    """One shard of a cache: its note in the manifest, its lines, and its tensors, whose files each process opens."""

    def __init__(self, folder: Path, note: dict[str, Any]) -> None:
        self.folder, self.note = folder, note
        self._open: dict[tuple[int, str], Any] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its list of items."""
        path = self.folder / self.note["files"]["items"]["name"]
        try:
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            items = [json.loads(line) for line in text.split("\n") if line]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {MEND}") from None
        if len(items) != self.note["count"]:
            raise UserError(f"{path}: holds {len(items)} items, {self.note['count']} expected; {MEND}")
        return items

    def encoded(self, row: int, variants: slice = slice(None), names: Sequence[str] = ()) -> dict[str, Tensor]:
        """moments (V, 2C, h, w) of an item, and features (V, tokens, E) where there are any, as stored."""
        file = self.file("latents")
        return {name: file.get_slice(name)[row : row + 1, variants][0] for name in names or file.keys()}

    def text(self, which: int) -> tuple[Tensor, Tensor]:
        """Real states (t, E) and pooled vector (E,) of a caption, as stored."""
        file = self.file("text")
        first, last = file.get_slice("offsets")[which : which + 2].tolist()
        return file.get_slice("states")[first:last], file.get_slice("pooled")[which : which + 1][0]

    def caption_rows(self) -> list[np.ndarray]:
        """The numbers of every item's captions."""
        if not self.note["count"]:  # all its pictures are broken
            return []
        owners = self.file("text").get_tensor("item_index").numpy()
        self._open.clear()  # all shards are looked through at once, and a large set has thousands
        starts = np.searchsorted(owners, np.arange(self.note["count"] + 1))  # owners ascend
        return [np.arange(first, last) for first, last in zip(starts[:-1], starts[1:], strict=True)]

    def file(self, kind: str) -> Any:
        """An open safetensors file: latents or text."""
        key = (os.getpid(), kind)
        if key not in self._open:
            path = self.folder / self.note["files"][kind]["name"]
            try:
                self._open[key] = file = safe_open(str(path), "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}); {MEND}") from None
            missing = set(TENSORS[kind]) - set(file.keys())
            if missing:
                raise UserError(f"{path}: lacks {', '.join(sorted(missing))}; {MEND}")
        return self._open[key]


def null_text(folder: Path) -> tuple[Tensor, Tensor, Tensor] | None:
    """States (T, E), mask (T,) and pooled vector (E,) of the empty caption; None in a cache without captions."""
    path = folder / "null.safetensors"
    if not path.is_file():
        return None
    try:
        held = load_file(path)
        return held["states"], held["mask"].bool(), held["pooled"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {MEND}") from None


class CachedDataset(Dataset):
    """Samples of one split of a cache: moments (2C, h, w) float32, features (tokens, E) where a run aligns with them,
    text_embeddings (T, E), text_mask (T,), text_pooled (E,), image_id, index, flip, label. Caption and mirroring are
    those that the pictures would have on the same visit.
    """

    def __init__(self, config: Config, *, is_train: bool = True) -> None:
        assert config.data.cache_dir is not None
        self.folder, self.seed, self.length = Path(config.data.cache_dir), config.run.seed, config.model.text_len
        self.is_train, self.num_classes = is_train, config.model.num_classes
        self.reads_text = config.model.text_conditioning != "none"
        self.names_read = ("moments",) if config.repa.encoder_path is None else ("moments", "features")
        manifest = read_manifest(self.folder)
        self.shards = shards_of(self.folder, manifest, SPLITS[0 if is_train else 1])
        self.skipped = [tuple(pair) for shard in self.shards for pair in shard.note["bad"]]
        if is_train and not self.shards:
            raise UserError(f"data.cache_dir {self.folder}: holds no training pictures; {MEND}")
        self.ends = np.cumsum([0, *(shard.note["count"] for shard in self.shards)])
        lines = [line for shard in self.shards for line in shard.lines()]
        self.ids = Strings([line["id"] for line in lines])
        self.captions = Strings(["\n".join(line["captions"]) for line in lines])
        self.labels = np.array([-1 if line["label"] is None else line["label"] for line in lines], dtype=np.int64)
        is_spared = [bool(config.data.flip_guard) and names_sides(line["captions"]) for line in lines]
        self.is_spared = np.array(is_spared, dtype=bool)
        has_mirrored = manifest["variants"] == "mirrored" and is_train
        guarded = config.data.flip_guard is True and bool(self.is_spared.any())
        self.flip = config.data.flip if has_mirrored and not guarded else 0.0
        self.variants = manifest["variants"] if isinstance(manifest["variants"], int) and is_train else 1
        self._rows = [shard.caption_rows() for shard in self.shards] if self.reads_text else []

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, 0)

    @property
    def fingerprint(self) -> str:
        """As TextImageDataset.fingerprint: a run may go on from pictures to their cache."""
        return fingerprint_of(self.names())

    def names(self) -> Iterator[str]:
        """The samples' names, in order."""
        return (self.ids[number] for number in range(len(self)))

    def captions_of(self, index: int) -> tuple[str, ...]:
        """All captions of an item."""
        return tuple(self.captions[index].split("\n"))

    def sample(self, index: int, epoch: int, *, flip: bool | None = None, caption: int | None = None) -> dict[str, Any]:
        """Item `index` as seen in `epoch`. Evaluation: not mirrored, the first caption, or the one of a number."""
        caption_draw, flip_draw, draw = draws_of_visit(self.seed, epoch, index)
        mirrored = flip_draw < self.flip and not self.is_spared[index] if flip is None else flip
        shard = int(np.searchsorted(self.ends, index, side="right")) - 1
        row = index - int(self.ends[shard])
        variant = int(mirrored) if self.flip else int(draw() * self.variants) if self.variants > 1 else 0
        encoded = self.shards[shard].encoded(row, slice(variant, variant + 1), self.names_read)
        sample: dict[str, Any] = {name: value[0].float() for name, value in encoded.items()}
        sample |= {"image_id": self.ids[index], "index": index, "flip": mirrored}
        if self.reads_text:
            rows = self._rows[shard][row]
            chosen = int(caption_draw * len(rows)) if self.is_train else 0
            sample |= self._text(shard, int(rows[chosen if caption is None else caption]))
        if self.num_classes:
            sample["label"] = int(self.labels[index])
        return sample

    def _text(self, shard: int, which: int) -> dict[str, Tensor]:
        real, pooled = (part.float() for part in self.shards[shard].text(which))
        states = torch.zeros(self.length, real.shape[1])
        states[: len(real)] = real
        return {"text_embeddings": states, "text_mask": torch.arange(self.length) < len(real), "text_pooled": pooled}


# --- what a cache already holds ---------------------------------------------------------------------------------------


class Former:
    """Rows of the shards that lie in a folder, finished or not, for what has not changed since: a picture by its name
    and stamp, a caption by its words.
    """

    def __init__(self, folder: Path, picture_key: str, text_key: str) -> None:
        self.pictures: dict[tuple[str, str, str], tuple[Shard, int, Any]] = {}
        self.captions: dict[str, tuple[Shard, int]] = {}
        for note in filter(None, map(finished, sorted(folder.glob("shard_*.json")))):
            shard = Shard(folder, note)
            lines = shard.lines()
            if note["picture_key"] == picture_key:
                for row, line in enumerate(lines):
                    self.pictures[line["id"], line["stamp"], note["split"]] = shard, row, line["crop"]
            if note["text_key"] == text_key and "text" in note["files"]:
                texts = [text for line in lines for text in line["captions"] or ()]
                self.captions |= {text: (shard, row) for row, text in enumerate(texts)}

    def encoded(self, item: Item, stamp: str, split: str) -> tuple[dict[str, Tensor], Any] | None:
        """Shard.encoded and the crop of a picture that is there."""
        shard, row, crop = self.pictures.get((item.id, stamp, split), (None, 0, None))
        return None if shard is None else (shard.encoded(row), crop)

    def text(self, caption: str) -> tuple[Tensor, Tensor] | None:
        """Real states (t, E) and pooled vector (E,) of a caption that is there."""
        shard, row = self.captions.get(caption, (None, 0))
        return None if shard is None else shard.text(row)


def finished(path: Path) -> dict[str, Any] | None:
    """The shard that a shard_*.json describes, if its files are all there and undamaged."""
    try:
        shard = json.loads(path.read_text(encoding="utf-8"))
        whole = all(file_digest(path.parent / file["name"]) == file["sha256"] for file in shard["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return shard if whole else None


def remove_superseded(folder: Path, shards: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Remove shards of this cache that its manifest no longer names: their pictures lie in newer ones."""
    kept = {file["name"] for shard in shards for file in shard["files"].values()}
    kept |= {f"shard_{shard['name']}.json" for shard in shards}
    old = [
        path
        for pattern in ("shard_*_*.json", "latents_*_*.safetensors", "text_*_*.safetensors", "items_*_*.jsonl")
        for path in folder.glob(pattern)
        if path.name not in kept
    ]
    for path in old:
        path.unlink(missing_ok=True)
    if old:
        say(f"{len(old)} files of shards that were replaced are removed")
