"""Encode clips once with the frozen encoders: motion latents, raw audio features, emotion.

  python float/precompute.py --config official --autoencoder-path float.pth --data-root datasets --features-dir CACHE
  torchrun --nproc_per_node=8 float/precompute.py ...        the clips are shared out over the ranks
The same command again goes on where it stopped; clips of other encoders' weights are encoded again. float/train.py does
this itself.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from float.config import PRESETS, Config, data_root, features_dir
from shared.config import load_config
from shared.errors import UserError, command

if TYPE_CHECKING:
    from float.data.features import ClipEncoder
    from shared.engine.dist import DistInfo


@dataclass
class Cache:
    """What the cache holds of a run's clips: their ids by split (train, val), and counts of what was done."""

    clips: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def precompute(config: Config, encoder: "ClipEncoder", info: "DistInfo") -> Cache:
    """Fill the cache of both splits, features_dir/{train,val}/<clip>.safetensors.

    UserError where more clips cannot be used than data.max_bad_share allows; one of a split always may.
    """
    from float.data.clips import find_clips
    from float.data.face import read_boxes
    from float.data.features import Encoded, encode_clips
    from shared.engine.dist import gather_objects, raise_together

    root, folder, cache = data_root(config.data), features_dir(config), Cache()
    boxes, share = read_boxes(root), config.data.max_bad_share
    for name, split in (("train", config.data.train_split), ("val", config.data.val_split)):
        clips, mine, total, error = find_clips(root, split), Encoded(), Encoded(), None
        try:
            mine = encode_clips(encoder, clips, boxes, folder / name, rank=info.rank, world=info.world)
        except (UserError, OSError) as problem:
            error = problem
        raise_together(error)  # else the other ranks would wait for this one
        for part in gather_objects(mine):
            total.add(part)
        if info.is_main:
            for sentence in total.notes:
                print(f"note: {sentence}")
            if total.bad:
                print(f"note: {len(total.bad)} of {len(clips)} clips of '{split}' are left out: {total.bad[0]}")
            _list_bad(folder, name, total.bad)
        if len(total.bad) > max(1, share * len(clips)) or len(total.bad) == len(clips):
            raise UserError(
                f"{len(total.bad)} of {len(clips)} clips of '{split}' cannot be used, over {share:.0%}; "
                f"the first: {total.bad[0]} (all in {folder / f'bad_{name}.txt'}); mend or remove them, "
                "or raise --max-bad-share"
            )
        cache.clips[name] = total.encoded + total.kept
        cache.counts |= {
            f"{name}_encoded": len(total.encoded),
            f"{name}_kept": len(total.kept),
            f"{name}_bad": len(total.bad),
        }
    return cache


def _list_bad(folder: Path, name: str, sentences: list[str]) -> None:
    path = folder / f"bad_{name}.txt"
    if sentences:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


@command
def main(argv: list[str] | None = None) -> dict[str, int]:
    """Read the settings, encode, print the counts."""
    config = load_config(Config, presets=PRESETS, argv=argv, default="default", description=__doc__)
    if config.model.autoencoder_path is None:
        raise UserError("--autoencoder-path is not given; name a phase-1 run (float/train_autoencoder.py) or float.pth")
    from float.data.features import ClipEncoder
    from float.weights.open import load_autoencoder
    from shared.engine.dist import init_distributed, shutdown

    info = init_distributed(config.run.device, config.run.timeout_minutes * 60)
    try:
        autoencoder = load_autoencoder(config.model, config.model.autoencoder_path)
        counts = precompute(config, ClipEncoder(config.model, config.data, autoencoder, info.device), info).counts
        if info.is_main:
            print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
        return counts
    finally:
        shutdown()


if __name__ == "__main__":
    main()
