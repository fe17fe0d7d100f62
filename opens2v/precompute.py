"""Store the frozen encoders' features, so that training needs neither the encoders nor their memory.

    torchrun --nproc_per_node=8 opens2v/precompute.py --config default --cache-dir CACHE ... --what text,clip,vae
    python opens2v/precompute.py --config my.yaml --shard 0/4

The same command again stores what is missing, and what was made from another caption, mask or video. Settings are part
of the files' names: other settings make other files. The clips and prompts of the run's validation are stored as well.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import Any

from opens2v.config import PRESETS, Config
from opens2v.train import guide_arguments, with_sample_data
from shared.config import load_config, setting
from shared.errors import UserError, command


class PrecomputeConfig(Config):
    """The settings of a training run, and what to store."""

    what: list[str] = setting(["text", "clip", "vae"], "features to store: text, clip, vae; comma separated")
    shard: str | None = setting(None, "i/n: only every n-th clip, from the i-th; null: by rank")
    cache_variants: int = setting(1, "samples to store per clip: clip start, subject picture and caption each", ge=1)


def shard_of(text: str | None, rank: int, world: int) -> tuple[int, int]:
    """(first clip, step). UserError for a text that is not i/n with 0 <= i < n."""
    if text is None:
        return rank, world
    part, _, count = text.partition("/")
    if not (part.isdigit() and count.isdigit() and int(part) < int(count)):
        raise UserError(f"--shard {text}: expected i/n with i from 0 to n - 1, such as 0/4")
    return int(part), int(count)


def parse(argv: list[str] | None) -> PrecomputeConfig:
    """The settings; UserError when the folder or the kinds of features are missing."""
    config = load_config(
        PrecomputeConfig,
        presets=PRESETS,
        argv=guide_arguments(sys.argv[1:] if argv is None else list(argv)),
        default="small",
        description=__doc__,
        aliases={"--config_path": "--config"},
    )
    unknown = sorted(set(config.what) - {"text", "clip", "vae"})
    if unknown or not config.what:
        raise UserError(f"--what {','.join(config.what)}: choose among text, clip, vae")
    if config.data.cache_dir is None:
        raise UserError("--cache-dir is needed: the folder that receives the features")
    if "clip" in config.what and config.model.clip_path == "off":
        raise UserError("--what clip: the configuration has clip_path off, there is nothing to store")
    config.data = with_sample_data(config.data)
    if not config.data.json_paths:
        raise UserError("data.scenes: composed scenes are not stored, they never repeat; give --json-paths")
    return config


@command
def main(argv: list[str] | None = None) -> dict[str, int]:
    """Store what is missing or was made from something else; returns how many clips were stored, there and bad."""
    config = parse(argv)
    from opens2v.data.cache import FeatureCache
    from opens2v.dataset import training_set, validation_set
    from opens2v.evaluation.preview import validation_count
    from opens2v.modules.conditions import load_encoders
    from opens2v.weights.base import base_path
    from shared.engine.dist import init_distributed, shutdown, sum_over_ranks

    info = init_distributed(config.run.device)
    first, step = shard_of(config.shard, info.rank, info.world)
    flags = {f"use_cached_{name}": False for name in ("text", "clip", "latents")}
    config.data = config.data.model_copy(update=flags)
    base = base_path(config)
    encoders = load_encoders(config, base if base.is_dir() else base.parent, kinds=config.what).to(info.device)
    counts, of_validation = {"stored": 0, "present": 0, "bad": 0}, {"stored": 0, "present": 0, "bad": 0}
    training, validation = training_set(config, with_content=True), validation_set(config, with_content=True)
    held_back = max(validation_count(config), config.training.val_num_samples)
    for split, dataset, variants, end in (
        ("train", training, config.cache_variants, len(training)),
        ("val", validation, 1, min(held_back, len(validation))),
    ):
        caches = {kind: FeatureCache(str(config.data.cache_dir), config, kind, split) for kind in config.what}
        if info.is_main and split == "train":
            store_single(config, encoders)
        tally = counts if split == "train" else of_validation
        store(dataset, caches, encoders, range(first, end, step), variants, tally)
    import torch

    total = sum_over_ranks(torch.tensor(list(counts.values()))).tolist()
    if info.is_main:
        print(
            f"stored {total[0]}, there already {total[1]}, unreadable {total[2]} of {len(training)} clips in "
            f"{config.data.cache_dir}, and the validation's"
        )
    shutdown()
    return dict(zip(counts, total, strict=True))


def store(
    dataset: Any, caches: dict[str, Any], encoders: Any, indices: range, variants: int, counts: dict[str, int]
) -> None:
    """Encode and store the clips at `indices` whose features are missing or were made from something else."""
    from opens2v.data.cache import content_of
    from shared.errors import BadSample

    for index in indices:
        try:
            part, key = dataset.identity(index)
            items = [dataset.sample(index, variant) for variant in range(variants)]
        except BadSample as error:
            print(f"passed over: {error}", flush=True)
            counts["bad"] += 1
            continue
        contents = {kind: [content_of(kind, item) for item in items] for kind in caches}
        missing = [kind for kind, cache in caches.items() if cache.contents(part, key)[:variants] != contents[kind]]
        for kind in missing:
            caches[kind].write(part, key, features(kind, items, encoders), contents[kind])
        counts["stored" if missing else "present"] += 1


def store_single(config: PrecomputeConfig, encoders: Any) -> None:
    """The empty and the negative prompt, and the prompts and pictures of the sample videos."""
    from opens2v.data.cache import FeatureCache, StoredFeatures
    from opens2v.data.subjects import clip_pixels
    from opens2v.evaluation.preview import open_picture

    part, training = StoredFeatures.PART, config.training
    if "text" in config.what:
        cache = FeatureCache(str(config.data.cache_dir), config, "text", "single")
        for text in dict.fromkeys(["", training.negative_prompt, *training.val_prompts]):
            key = StoredFeatures.text_key(text)
            if not cache.contents(part, key):
                cache.write(part, key, [text_rows(encoders, text)], [key])
    if "clip" in config.what:
        cache = FeatureCache(str(config.data.cache_dir), config, "clip", "single")
        for path in training.val_ref_images:
            pixels = clip_pixels(open_picture(path), config.data.ref_clip_size)
            item = {"ref_clip_pixels": pixels[None]}
            tokens = features("clip", [item], encoders)[0][0]
            cache.write(part, StoredFeatures.picture_key(pixels), [tokens], ["picture"])


def features(kind: str, items: list[dict], encoders: Any) -> list:
    """The tensors of one kind, one per variant: text rows without padding, picture tokens, or latents."""
    import torch

    from opens2v.data.video import normalise

    if kind == "text":
        return [text_rows(encoders, item["prompts"]) for item in items]
    if kind == "clip":
        return [
            encoders.image(item["ref_clip_pixels"][None].to(encoders.device))[0].to(torch.bfloat16) for item in items
        ]
    clips = (normalise(item["frames"][None].to(encoders.device)) for item in items)
    return [encoders.codec.encode(clip)[0].to(torch.bfloat16) for clip in clips]


def text_rows(encoders: Any, text: str) -> Any:
    """The rows of a text without the zero rows behind it, bf16."""
    import torch

    rows = encoders.encode_text([text])[0]
    length = int(rows.abs().sum(-1).gt(0).nonzero().max()) + 1 if rows.any() else 1
    return rows[:length].to(torch.bfloat16)


if __name__ == "__main__":
    main()
