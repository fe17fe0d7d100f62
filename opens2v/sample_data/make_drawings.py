"""Made drawings.webp and drawings.json from pictures of `@lobehub/fluent-emoji-3d` 1.1.0 (MIT); not needed to train.

    python opens2v/sample_data/make_drawings.py --pictures FOLDER/train.jsonl --output opens2v/sample_data

The list has a JSON object a line with file, name and group. Symbols and flags are left out, names are kept once.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import math

import numpy as np
from PIL import Image

from shared.media.scenes import cut_out

SIDE, COUNT = 32, 416
GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities", "Smileys & Emotion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.pictures.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["group"] in GROUPS]
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))
    names: dict[str, Image.Image] = {}
    for place in order:
        name = rows[place]["name"].split(":")[0].strip().lower()
        if len(names) == COUNT or name in names or len(name.split()) > 3:
            continue
        picture = cut_out(Image.open(given.pictures.parent / rows[place]["file"]))
        names[name] = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    columns = 26
    sheet = Image.new("RGBA", (columns * SIDE, math.ceil(len(names) / columns) * SIDE))
    for place, small in enumerate(names.values()):
        sheet.paste(small, (place % columns * SIDE, place // columns * SIDE))
    sheet.save(given.output / "drawings.webp", quality=95, method=6)
    listed = {"side": SIDE, "columns": columns, "names": list(names)}
    (given.output / "drawings.json").write_text(json.dumps(listed, ensure_ascii=False, indent=0), encoding="utf-8")


if __name__ == "__main__":
    main()
