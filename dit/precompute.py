"""Write the frozen encoders' output to a cache, so that training opens neither pictures nor encoders.

  python dit/precompute.py --config default --data-root data/CUB_200_2011 --out data/cub_cache
  torchrun --nproc_per_node=8 dit/precompute.py ...     shards are shared over the ranks
Then train with --cache-dir data/cub_cache. The same command again goes on where it was stopped, mends what is damaged
and, after pictures or captions were changed, added or removed, encodes only those. Broken pictures are left out and
listed in bad_samples.jsonl. A codec that learns from the pictures (vae.type patches or pixels) must have been fitted by
a training run first: give that run's folder with --codec.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import PRESETS, PrecomputeOptions, refuse_unused
from shared.config import load_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(PrecomputeOptions, presets=PRESETS, default="default", description=__doc__)

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit.data import cache as held
from dit.data.readers import Item
from dit.dataset import TextImageDataset, unit
from dit.modules.autoencoder import Codec
from dit.modules.features import FeatureEncoder
from dit.modules.text import CaptionEncoder, make_text_encoder, warn_of_cut
from dit.modules.vae import CODEC_FILE
from dit.weights.open import load_codec, make_vae
from shared.engine.dist import DistInfo, barrier, init_distributed, shutdown
from shared.errors import BadSample, remove_parts, write_text, written_aside

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Writer:
    """Encodes and writes shards; what a former shard already holds is copied from there."""

    def __init__(self, options: PrecomputeOptions, datasets: dict[str, TextImageDataset], device: torch.device) -> None:
        self.options, self.datasets, self.device = options, datasets, device
        self.folder, self.dtype = Path(options.cache.out), DTYPES[options.cache.dtype]
        self.codec, self.encoder = self._encoders()
        aligned = options.repa.encoder_path
        self.features = None if aligned is None else FeatureEncoder(aligned).to(device).eval()
        codec_file = self.folder / CODEC_FILE
        vae_content, text_content = held.contents(options, codec=codec_file)
        cache = options.cache
        self.variants: int | str = cache.crops or ("mirrored" if cache.mirrored else 1)
        shape = {"dtype": cache.dtype, "variants": self.variants, "seed": options.run.seed if cache.crops else None}
        precision = {"bf16": getattr(self.codec, "precision", "fp32") == "bf16" or device.type == "cuda"}
        self.pictures = held.picture_settings(options, vae_content)
        self.texts = held.text_settings(options, text_content) if self.encoder is not None and cache.text else {}
        self.picture_key = held.key_of([self.pictures, shape, precision])
        self.text_key = held.key_of([self.texts, cache.dtype])
        self.former = held.Former(self.folder, self.picture_key, self.text_key)
        self.encoded_pictures = self.encoded_captions = 0

    def plan(self) -> list[tuple[str, list[tuple[Item, str, int]]]]:
        """(split, [(item, stamp, index)]) of every shard, in order."""
        size, shards = self.options.cache.shard_size, []
        for split, dataset in self.datasets.items():
            rows = []
            for index in range(len(dataset)):
                try:
                    item = dataset.items[index]
                except BadSample as error:
                    item = Item(f"{split} sample {index}", index, (str(error),))
                    rows.append((item, f"unreadable: {error}", index))
                    continue
                rows.append((item, held.stamp_of(dataset.items, item), index))
            shards += [(split, rows[first : first + size]) for first in range(0, len(rows), size)]
        return shards

    def shard(self, number: int, split: str, rows: list[tuple[Item, str, int]]) -> dict[str, Any]:
        """Write one shard, or find that it is there; returns its part of the manifest."""
        parts = [[item.id, stamp, item.captions, item.label] for item, stamp, _ in rows]
        key = held.key_of([self.picture_key, self.text_key, split, parts])
        name = f"{number:05d}_{key}"
        note = self.folder / f"shard_{name}.json"
        if (there := held.finished(note)) is not None:
            return there
        good: list[tuple[Item, str]] = []
        encoded: list[dict[str, Tensor]] = []
        waiting: list[int] = []  # places in it that hold pixels still
        crops, bad = [], []
        for item, stamp, index in rows:
            try:
                found, crop = self._encoded(item, stamp, index, split)
            except BadSample as error:
                if self.options.data.on_error == "raise":
                    raise UserError(f"{error}; mend or remove it, or use --on-error skip") from None
                bad.append((item.id, str(error)))
                continue
            good.append((item, stamp))
            encoded.append(found)
            crops.append(crop)
            waiting += [len(encoded) - 1] if "pixels" in found else []
            if len(waiting) == self.options.cache.batch:
                self._encode(encoded, waiting)
        self._encode(encoded, waiting)
        files: dict[str, dict[str, str]] = {}
        lines = [
            json.dumps(
                {
                    "id": item.id, "captions": item.captions, "crop": crop, "stamp": stamp, "label": item.label,
                    "split": split,
                }
            )
            for (item, stamp), crop in zip(good, crops, strict=True)
        ]  # fmt: skip
        self._write(files, "items", f"items_{name}.jsonl", "".join(line + "\n" for line in lines))
        if good:
            stacked = {kind: torch.stack([row[kind] for row in encoded]) for kind in encoded[0]}
            self._write(files, "latents", f"latents_{name}.safetensors", stacked)
            if self.texts:
                texts = self._texts([item.captions for item, _ in good])
                self._write(files, "text", f"text_{name}.safetensors", texts)
        line = {
            "name": name, "split": split, "count": len(good), "picture_key": self.picture_key,
            "text_key": self.text_key, "files": files, "bad": bad,
        }  # fmt: skip
        write_text(note, held.as_json(line))
        return line

    def null(self) -> None:
        """The encoded empty caption."""
        if self.texts and self.encoder is not None:
            states, mask, pooled = (part[0].cpu().clone() for part in self.encoder.encode([""]))
            with written_aside(self.folder / "null.safetensors") as temporary:
                save_file({"states": states, "mask": mask, "pooled": pooled}, temporary)

    def latents(self) -> dict[str, Any]:
        """How latents follow from moments, for a run that does not open the VAE."""
        mean, scale = getattr(self.codec, "mean", None), getattr(self.codec, "scale", None)
        if self.options.vae.type != "sd" or mean is None or scale is None:
            return {}
        return {"mean": mean.flatten().tolist(), "scale": scale.flatten().tolist()}

    def _encoders(self) -> tuple[Codec, CaptionEncoder | None]:
        codec, given = make_vae(self.options), self.options.cache.codec
        if given is not None and not codec.learns:
            raise UserError(f"--codec {given}: vae.type {self.options.vae.type} fits no codec; leave it out")
        if codec.learns:
            if given is None:
                raise UserError(
                    f"vae.type {self.options.vae.type} learns from the pictures; give the folder of a run that fitted "
                    "it with --codec"
                )
            path = Path(given) / CODEC_FILE if Path(given).is_dir() else Path(given)
            load_codec(codec, path)
            with written_aside(self.folder / CODEC_FILE) as temporary:
                shutil.copyfile(path, temporary)
        encoder = make_text_encoder(self.options) if self.options.cache.text else None
        return codec.to(self.device).eval(), None if encoder is None else encoder.to(self.device)

    def _encoded(self, item: Item, stamp: str, index: int, split: str) -> tuple[dict[str, Tensor], Any]:
        """What is stored of a picture, or its variants as pixels, which wait for a batch; and its crop."""
        if isinstance(item.image, int) and stamp.startswith("unreadable"):
            raise BadSample(item.captions[0])
        if (found := self.former.encoded(item, stamp, split)) is not None:
            return found
        dataset = self.datasets[split]
        if split == "val":
            plan: list[tuple[int, bool | None]] = [(0, False)]
        elif isinstance(self.variants, int):
            plan = [(crop, None) for crop in range(self.variants)]
        else:
            plan = [(0, False), (0, True)]
        samples = [dataset.sample(index, epoch, flip=flip) for epoch, flip in plan]
        self.encoded_pictures += 1
        return {"pixels": torch.stack([sample["image"] for sample in samples])}, samples[0]["crop"]

    def _encode(self, encoded: list[dict[str, Tensor]], places: list[int]) -> None:
        """Replace the pixels (V, 3, S, S) uint8 at these places by what is stored of them; no place waits any more."""
        if not places:
            return
        images = unit(torch.cat([encoded[place]["pixels"] for place in places]).to(self.device))
        found = {"moments": self.codec.moments(images)}
        if self.features is not None:
            side = self.options.latent_side // self.options.model.patch_size
            found["features"] = self.features(images, (side, side))
        parts = {kind: value.to("cpu", self.dtype).unflatten(0, (len(places), -1)) for kind, value in found.items()}
        for row, place in enumerate(places):
            encoded[place] = {kind: value[row].clone() for kind, value in parts.items()}
        places.clear()

    def _texts(self, captions: list[tuple[str, ...]]) -> dict[str, Tensor]:
        """States of real tokens only, end to end, with the place of every caption."""
        assert self.encoder is not None
        texts = [text for group in captions for text in group]
        owners = [item for item, group in enumerate(captions) for _ in group]
        held_already = {text: self.former.text(text) for text in set(texts)}
        missing = [text for text, found in held_already.items() if found is None]
        self.encoded_captions += len(missing)
        for first in range(0, len(missing), 256):
            part = missing[first : first + 256]
            states, mask, pooled = self.encoder.encode(part)
            for row, text in enumerate(part):
                real = states[row][mask[row]].to("cpu", self.dtype)
                held_already[text] = (real.clone(), pooled[row].to("cpu", self.dtype).clone())
        pairs = [held_already[text] for text in texts]
        lengths = [len(pair[0]) for pair in pairs if pair is not None]
        return {
            "states": torch.cat([pair[0] for pair in pairs if pair is not None]),
            "pooled": torch.stack([pair[1] for pair in pairs if pair is not None]),
            "item_index": torch.tensor(owners),
            "offsets": torch.tensor([0, *lengths]).cumsum(0),
        }

    def _write(self, files: dict, kind: str, name: str, content: str | dict[str, Tensor]) -> None:
        with written_aside(self.folder / name) as temporary:
            if isinstance(content, str):
                temporary.write_text(content, encoding="utf-8")
            else:
                save_file({key: value.contiguous() for key, value in content.items()}, temporary)
            files[kind] = {"name": name, "sha256": held.file_digest(temporary)}


def write_cache(options: PrecomputeOptions, info: DistInfo) -> None:
    """All shards of this rank, then the manifest."""
    folder, cache = Path(options.cache.out), options.cache
    if cache.crops and options.data.crop not in ("random", "random_resized"):
        raise UserError(
            f"--crops {cache.crops} needs --crop random or random_resized; a centre crop is always the same"
        )
    sets = {split: TextImageDataset.from_config(options, is_train=split == "train") for split in held.SPLITS}
    datasets = {split: dataset for split, dataset in sets.items() if len(dataset)}
    writer = Writer(options, datasets, info.device)
    shards = writer.plan()
    if info.is_main and writer.encoder is not None and writer.texts:
        first = [text for _, rows in shards for item, _, _ in rows[:256] for text in item.captions][:2048]
        warn_of_cut(writer.encoder, first, lambda text: print(text, file=sys.stderr))
    for number in range(info.rank, len(shards), info.world):
        before = writer.encoded_pictures, writer.encoded_captions
        line = writer.shard(number, *shards[number])
        new = writer.encoded_pictures - before[0], writer.encoded_captions - before[1]
        print(
            f"shard {number + 1} of {len(shards)}: {line['count']} pictures ({line['split']}), {new[0]} encoded, "
            f"{new[1]} captions encoded" + (f", {len(line['bad'])} broken" if line["bad"] else ""),
            flush=True,
        )
    barrier()
    if info.is_main:
        writer.null()
        lines = [writer.shard(number, *shard) for number, shard in enumerate(shards)]  # all are there now
        bad = [pair for line in lines for pair in line["bad"]]
        listing = [json.dumps({"index": name, "reason": reason}) + "\n" for name, reason in bad]
        write_text(folder / "bad_samples.jsonl", "".join(listing))
        manifest = {
            "version": held.VERSION, "pictures": writer.pictures, "texts": writer.texts, "dtype": cache.dtype,
            "variants": writer.variants, "latents": writer.latents(), "shards": lines,
            "num_items": sum(line["count"] for line in lines),
        }  # fmt: skip
        write_text(folder / "manifest.json", held.as_json(manifest))
        held.remove_superseded(folder, lines, print)
        remove_parts(folder)
        print(f"{manifest['num_items']} pictures cached in {folder}")
        if bad:
            print(
                f"warning: {len(bad)} pictures are left out, listed in {folder / 'bad_samples.jsonl'}; the first: "
                f"{bad[0][1]}",
                file=sys.stderr,
            )


@command
def main(argv: list[str] | None = None) -> None:
    """The command; see the head of the file."""
    options = load_config(PrecomputeOptions, presets=PRESETS, argv=argv, default="default", description=__doc__)
    if not options.cache.out:
        raise UserError("--out is not set; give the folder that receives the cache")
    refuse_unused(options)
    if options.data.dataset_name == "scenes":
        raise UserError(
            "data.dataset_name scenes: they are composed anew in every epoch, and a cache would hold one; train without"
        )
    if options.data.buckets:
        raise UserError(
            "data.buckets: a cache holds squares; give --set data.buckets=false here and to the run that reads it"
        )
    if options.cache.dtype not in DTYPES:
        raise UserError(f"--dtype {options.cache.dtype}: use one of {', '.join(DTYPES)}")
    info = init_distributed(options.run.device, 60 * options.run.timeout_minutes)
    write_cache(options, info)
    shutdown()


if __name__ == "__main__":
    main()
