"""Encode clips once with the frozen encoders: motion latents, raw audio features, emotion.

  python float/precompute.py --config official --autoencoder-path float.pth --data-root datasets --features-dir CACHE
  torchrun --nproc_per_node=8 float/precompute.py ...        the clips are shared out over the ranks
The same command again goes on where it stopped; clips of other encoders' weights are encoded anew. float/train.py does
this itself.
"""

import sys
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

MAX_BAD_SHARE = 0.01


def precompute(config: Config, encoder: "ClipEncoder", info: "DistInfo") -> dict[str, int]:
    """Fill the cache of both splits, features_dir/{train,val}/<clip>.safetensors; -> counts. Over 1 % bad: UserError.

    Files of clips that the split does not list (any more) are removed: every file of the folder is trained on.
    """
    from float.data.clips import find_clips
    from float.data.face import read_boxes
    from float.data.features import encode_clips, remove_unlisted
    from shared.engine.dist import gather_objects
    from shared.errors import remove_parts

    root, folder = data_root(config.data), features_dir(config)
    boxes = read_boxes(root)
    counts: dict[str, int] = {}
    for name, split in (("train", config.data.train_split), ("val", config.data.val_split)):
        clips = find_clips(root, split)
        if info.is_main:
            remove_unlisted(clips, folder / name)
        mine = encode_clips(encoder, clips, boxes, folder / name, rank=info.rank, world=info.world)
        parts = gather_objects(mine)
        total = {key: [entry for part in parts for entry in part[key]] for key in mine}
        if info.is_main:
            remove_parts(folder / name)
            for sentence in total["notes"]:
                print(f"note: {sentence}")
            _list_bad(folder, name, total["bad"])
        if len(total["bad"]) > max(0, MAX_BAD_SHARE * len(clips)):
            raise UserError(
                f"{len(total['bad'])} of {len(clips)} clips of '{split}' cannot be used, over {MAX_BAD_SHARE:.0%}; "
                f"the first: {total['bad'][0]} (all in {folder / f'bad_{name}.txt'}); mend or remove them"
            )
        counts |= {f"{name}_{key}": len(value) for key, value in total.items() if key != "notes"}
    return counts


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
        counts = precompute(config, ClipEncoder(config.model, config.data, autoencoder, info.device), info)
        if info.is_main:
            print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
        return counts
    finally:
        shutdown()


if __name__ == "__main__":
    main()
