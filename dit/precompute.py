"""Write the frozen encoders' output to a cache, so that training needs neither pictures nor encoders.

  python dit/precompute.py --config default --data-root data/CUB_200_2011 --out data/cub_cache --flip
  torchrun --nproc_per_node=8 dit/precompute.py ...     shards are shared over the ranks; the same command again resumes
Then train with --cache-dir data/cub_cache. A codec that learns from the pictures (vae.type patches or pixels) must
have been fitted
by a training run first: give that run's folder with --codec.
"""

import json
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dit.config import PRESETS, PrecomputeOptions
from shared.config import load_config
from shared.errors import UserError, command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(PrecomputeOptions, presets=PRESETS, default="default", description=__doc__)

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit.data.cache import VERSION, as_json, cache_settings, file_digest, text_settings
from dit.dataset import TextImageDataset, unit
from dit.modules.text import CaptionEncoder, make_text_encoder
from dit.modules.vae import CODEC_FILE, Codec
from dit.weights.open import load_codec, make_vae
from shared.engine.dist import DistInfo, barrier, init_distributed, raise_together, shutdown
from shared.errors import remove_parts, write_text, written_aside

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def write_shard(
    number: int,
    rows: range,
    dataset: TextImageDataset,
    codec: Codec,
    encoder: CaptionEncoder | None,
    options: PrecomputeOptions,
    device: torch.device,
) -> dict:
    """Encode and write the files of one shard; returns its line of the manifest."""
    cache, folder = options.cache, Path(options.cache.out)
    variants, crops = [], []
    plan: list[tuple[int, bool | None]] = (
        [(0, False), (0, True)] if cache.mirrored else [(0, False)]
    )  # (epoch, flip) of every variant
    if cache.crops:
        plan = [(crop, None) for crop in range(cache.crops)]
    for epoch, flip in plan:
        parts = []
        for first in range(rows.start, rows.stop, cache.batch):
            samples = [
                dataset.sample(index, epoch, flip=flip) for index in range(first, min(first + cache.batch, rows.stop))
            ]
            images = unit(torch.stack([sample["image"] for sample in samples]).to(device))
            parts.append(codec.moments(images).to("cpu", DTYPES[cache.dtype]))
            crops += [sample["crop"] for sample in samples] if (epoch, flip) == plan[0] else []
        variants.append(torch.cat(parts))
    items = [dataset.items[index] for index in rows]
    files = {f"latents_{number:05d}.safetensors": {"moments": torch.stack(variants, dim=1).contiguous()}}
    if encoder is not None and cache.text:
        files[f"text_{number:05d}.safetensors"] = encode_captions(
            [item.captions for item in items], encoder, DTYPES[cache.dtype]
        )
    digests = {}
    for name, tensors in files.items():
        with written_aside(folder / name) as temporary:
            save_file(tensors, temporary)
            digests[name] = file_digest(temporary)
    line = {"file": f"latents_{number:05d}.safetensors", "count": len(items), "sha256": digests}
    listing = [
        json.dumps({"id": item.id, "captions": item.captions, "crop": crop}, ensure_ascii=False) + "\n"
        for item, crop in zip(items, crops, strict=True)
    ]
    write_text(folder / f"items_{number:05d}.jsonl", "".join(listing))
    write_text(folder / f"shard_{number:05d}.json", as_json(line))
    return line


def encode_captions(captions: list[tuple[str, ...]], encoder: CaptionEncoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """States of real tokens only, end to end, with the place of every caption."""
    texts = [text for group in captions for text in group]
    owners = [item for item, group in enumerate(captions) for _ in group]
    states, pooled, lengths = [], [], []
    for first in range(0, len(texts), 256):
        found = encoder.encode(texts[first : first + 256])
        lengths += found.mask.sum(1).tolist()
        states.append(found.states[found.mask].to("cpu", dtype))
        pooled.append(found.pooled.to("cpu", dtype))
    return {
        "states": torch.cat(states),
        "pooled": torch.cat(pooled),
        "item_index": torch.tensor(owners),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
    }


def finished(number: int, folder: Path) -> dict | None:
    """The manifest line of a shard whose files are all there and undamaged."""
    try:
        line = json.loads((folder / f"shard_{number:05d}.json").read_text(encoding="utf-8"))
        whole = all(file_digest(folder / name) == digest for name, digest in line["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return line if whole and (folder / f"items_{number:05d}.jsonl").exists() else None


def write_cache(options: PrecomputeOptions, info: DistInfo) -> None:
    """All shards of this rank, then the manifest."""
    folder, cache = Path(options.cache.out), options.cache
    if cache.crops and options.data.crop not in ("random", "random_resized"):
        raise UserError(
            f"--crops {cache.crops} needs --crop random or random_resized; a centre crop is always the same"
        )
    dataset = TextImageDataset.from_config(options, is_train=True)
    codec = make_vae(options)
    if codec.learns:
        if cache.codec is None:
            raise UserError(
                f"vae.type {options.vae.type} learns from the pictures; give the folder of a run that fitted it with "
                "--codec"
            )
        load_codec(codec, Path(cache.codec) / CODEC_FILE if Path(cache.codec).is_dir() else Path(cache.codec))
    encoder = make_text_encoder(options)
    codec, encoder = codec.to(info.device).eval(), None if encoder is None else encoder.to(info.device)
    folder.mkdir(parents=True, exist_ok=True)
    made_with = cache_settings(options) | (text_settings(options) if encoder is not None and cache.text else {})
    made_with |= {
        "dtype": cache.dtype,
        "flips": cache.mirrored and not cache.crops,
        "variants": cache.crops or 1 + cache.mirrored,
        "shard_size": cache.shard_size,
        "item_ids_sha256": dataset.fingerprint,
    }
    _claim(folder, made_with, info)
    count = -(-len(dataset) // cache.shard_size)
    for number in range(info.rank, count, info.world):
        rows = range(number * cache.shard_size, min((number + 1) * cache.shard_size, len(dataset)))
        if finished(number, folder) is None:
            write_shard(number, rows, dataset, codec, encoder, options, info.device)
            print(f"shard {number + 1} of {count}: {len(rows)} pictures", flush=True)
        else:
            print(f"shard {number + 1} of {count}: already there", flush=True)
    barrier()
    if info.is_main:
        remove_parts(folder)
        shards = [finished(number, folder) for number in range(count)]
        factor = getattr(codec, "scaling_factor", None)
        head = {"version": VERSION, "scaling_factor": factor, "moments": True}
        manifest = {**head, **made_with, "num_items": len(dataset), "shards": shards}
        write_text(folder / "manifest.json", as_json(manifest))
        print(f"{len(dataset)} pictures cached in {folder}")


def _claim(folder: Path, made_with: dict, info: DistInfo) -> None:
    """Note the settings of a cache in the making; refuse to go on with others."""
    note, error = folder / "settings.json", None
    if info.is_main and not note.exists():
        write_text(note, as_json(made_with))
    elif info.is_main and note.read_text(encoding="utf-8") != as_json(made_with):
        error = UserError(f"{folder} holds a cache with other settings or pictures; use another --out, or remove it")
    raise_together(error)


@command
def main(argv: list[str] | None = None) -> None:
    options = load_config(PrecomputeOptions, presets=PRESETS, argv=argv, default="default", description=__doc__)
    if not options.cache.out:
        raise UserError("--out is not set; give the folder that receives the cache")
    if options.cache.dtype not in DTYPES:
        raise UserError(f"--dtype {options.cache.dtype}: use one of {', '.join(DTYPES)}")
    info = init_distributed(options.run.device, 60 * options.run.timeout_minutes)
    write_cache(options, info)
    shutdown()


if __name__ == "__main__":
    main()
