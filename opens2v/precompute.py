"""Store the frozen encoders' features, so that training needs neither the encoders nor their memory.

    torchrun --nproc_per_node=8 opens2v/precompute.py --config default --cache-dir CACHE ... --what text,clip,vae
    python opens2v/precompute.py --config my.yaml --shard 0/4

Resumes: clips whose features are complete are passed over. Settings are stored with the features; other settings make
other files.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import Any

from opens2v.config import PRESETS, Config
from opens2v.train import guide_arguments, sample_paths
from shared.config import load_config, setting
from shared.errors import UserError, command


class PrecomputeConfig(Config):
    """The settings of a training run, and what to store."""

    what: list[str] = setting(["text", "clip", "vae"], "features to store: text, clip, vae; comma separated")
    shard: str | None = setting(None, "i/n: only every n-th clip, from the i-th; null: by rank")
    cache_variants: int = setting(1, "clip starts and augmented pictures to store per clip", ge=1)


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
    if not config.data.json_paths:
        config.data = config.data.model_copy(update=sample_paths())
    return config


@command
def main(argv: list[str] | None = None) -> dict[str, int]:
    """Store what is missing; returns how many clips were stored, passed over and bad."""
    config = parse(argv)
    from opens2v.data.cache import EMPTY_PROMPT, FeatureCache
    from opens2v.dataset import create_dataset
    from opens2v.modules.conditions import load_encoders
    from opens2v.weights.base import base_path
    from shared.engine.dist import init_distributed, shutdown, sum_over_ranks

    info = init_distributed(config.run.device)
    first, step = shard_of(config.shard, info.rank, info.world)
    config.data = config.data.model_copy(
        update={"use_cached_text": "text" not in config.what, "use_cached_clip": "clip" not in config.what}
    )
    base = base_path(config)
    encoders = load_encoders(config, base if base.is_dir() else base.parent).to(info.device)
    dataset = create_dataset(
        config.data,
        seed=config.run.seed,
        time_range=(0.0, config.data.train_share),
        load_frames="vae" in config.what,
        load_subjects="clip" in config.what,
    )
    caches = {kind: FeatureCache(str(config.data.cache_dir), config, kind) for kind in config.what}
    if "text" in caches and info.is_main:
        caches["text"].write(*EMPTY_PROMPT, [text_rows(encoders, "")])
    counts = store(dataset, caches, encoders, range(first, len(dataset), step), config.cache_variants)
    import torch

    total = sum_over_ranks(torch.tensor(list(counts.values()))).tolist()
    if info.is_main:
        print(
            f"stored {total[0]}, there already {total[1]}, unreadable {total[2]} of {len(dataset)} clips in "
            f"{config.data.cache_dir}"
        )
    shutdown()
    return dict(zip(counts, total, strict=True))


def store(dataset: Any, caches: dict[str, Any], encoders: Any, indices: range, variants: int) -> dict[str, int]:
    """Encode and store the clips at `indices`."""
    from shared.errors import BadSample

    counts = {"stored": 0, "present": 0, "bad": 0}
    for index in indices:
        try:
            part, key = dataset.identity(index)
            missing = [
                kind for kind, cache in caches.items() if not cache.has(part, key, 1 if kind == "text" else variants)
            ]
            if not missing:
                counts["present"] += 1
                continue
            items = [dataset.sample(index, epoch) for epoch in range(variants)]
        except BadSample as error:
            print(f"passed over: {error}", flush=True)
            counts["bad"] += 1
            continue
        for kind in missing:
            caches[kind].write(part, key, features(kind, items, encoders))
        counts["stored"] += 1
    return counts


def features(kind: str, items: list[dict], encoders: Any) -> list:
    """The tensors of one kind, one per variant: text rows without padding, picture tokens, or latents."""
    import torch

    if kind == "text":
        return [text_rows(encoders, item["prompts"]) for item in items]
    if kind == "clip":
        if encoders.image is None:
            raise UserError("--what clip: the configuration has clip_path off, there is nothing to store")
        return [
            encoders.image(item["ref_clip_pixels"][None].to(encoders.device))[0].to(torch.bfloat16) for item in items
        ]
    return [encoders.codec.encode(item["frames"][None].to(encoders.device))[0].to(torch.bfloat16) for item in items]


def text_rows(encoders: Any, text: str) -> Any:
    """The rows of a text without the zero rows behind it, bf16."""
    import torch

    rows = encoders.encode_text([text])[0]
    length = int(rows.abs().sum(-1).gt(0).nonzero().max()) + 1 if rows.any() else 1
    return rows[:length].to(torch.bfloat16)


if __name__ == "__main__":
    main()
