"""Retrieve with a trained model, into a file a person can look at.

python multimodal/generate.py --checkpoint outputs/multimodal --output sheet.png     held-out captions and pictures
python multimodal/generate.py --checkpoint outputs/multimodal --dataset clotho --output sounds.json
python multimodal/generate.py --checkpoint outputs/multimodal --prompt "a red circle" --output circle.png
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from multimodal.config import DatasetName  # noqa: E402
from multimodal.metrics import DataOptions, records_of  # noqa: E402
from multimodal.metrics import Options as MetricsOptions  # noqa: E402
from shared.config import Section, load_config, setting  # noqa: E402
from shared.errors import UserError, check_output, command, write_text, written_aside  # noqa: E402


class Options(Section):
    """Flags of this command."""

    checkpoint: str = setting("outputs/multimodal", "a run's folder, a checkpoint folder or a .pt file")
    output: str = setting("retrieval.png", ".png: pictures; .json: pictures or sounds with their captions")
    dataset: DatasetName | None = setting(None, "what is searched; null: the first data set of the run", "datasets")
    data: DataOptions = DataOptions()
    split: Literal["train", "val", "test"] = setting("val", "part of the data that is searched")
    prompt: list[str] = setting([], "texts to search for; none: captions of the data")
    rows: int = setting(8, "queries shown", ge=1, le=50)
    batch_size: int = setting(64, "items at a time", ge=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


@command
def main(argv: list[str] | None = None) -> None:
    """Embed one split and write what lies nearest."""
    options = load_config(Options, argv=argv, description=__doc__)
    output = check_output(options.output, (".png", ".json"))
    from multimodal.data.records import ListRecords
    from multimodal.weights.open import Embedder

    embedder = Embedder.load(options.checkpoint, device=options.device, batch_size=options.batch_size)
    name = options.dataset or embedder.config.data.datasets[0]
    found = records_of(
        embedder, MetricsOptions(checkpoint=options.checkpoint, datasets=[name], split=options.split, data=options.data)
    )
    records = found.get(name, ListRecords())
    kinds = records.by_kind()
    kind = "image" if "image" in kinds or not kinds else next(iter(kinds))
    records = ListRecords(record for record in records if record.kind == kind and record.captions)
    if not records:
        raise UserError(f"data set {name} has no captioned {options.split} samples to search")
    is_sheet = output.suffix.lower() == ".png"
    if is_sheet and kind != "image":
        raise UserError(f"--output {output}: data set {name} holds sounds; give a .json file")
    if is_sheet and len(options.prompt) > len(records):
        raise UserError(
            f"--prompt: {len(options.prompt)} texts, and {len(records)} pictures are searched; a sheet has a row "
            "for as many texts as pictures, so give fewer, or a .json file"
        )
    split = with_prompts(embedder, embedder.split(records, kind), options.prompt)
    output.parent.mkdir(parents=True, exist_ok=True)
    from multimodal.evaluation.showing import best_items, picture_sheet, table

    if is_sheet:
        sources = {record.id: record.source for record in records}
        with written_aside(output) as temporary:
            own = temporary.with_name("sheet.png")  # Pillow goes by the suffix
            picture_sheet(split, sources, own, rows=len(options.prompt) or options.rows).replace(temporary)
    elif options.prompt:
        rows: list[dict[str, Any]] = [
            {"query_text": text, "found_items": [split.ids[place] for place in best_items(split, index)]}
            for index, text in enumerate(options.prompt)
        ]
        write_text(output, json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        write_text(output, json.dumps(table(split, rows=options.rows), indent=1, ensure_ascii=False))
    print(output)


def with_prompts(embedder: Any, split: Any, prompts: list[str]) -> Any:
    """The split with the user's texts instead of its captions; no item is the true one then."""
    if not prompts:
        return split
    from multimodal.evaluation.showing import spread

    split.captions_CE, split.caption_texts, split.owners = embedder.texts(prompts), prompts, [-1] * len(prompts)
    # The sheet goes by evenly spaced items and takes the first caption of each: here those are the texts in turn.
    split.first_captions = [0] * len(split.items_IE)
    for number, item in enumerate(spread(split, len(prompts))):
        split.first_captions[item] = number
    return split


if __name__ == "__main__":
    main()
