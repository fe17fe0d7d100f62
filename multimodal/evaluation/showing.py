"""What a person can look at: sheets of retrieved pictures, tables of retrieved captions, the run's report page."""

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from multimodal.config import ITEMS
from multimodal.data.image import center_crop, read_image
from multimodal.data.records import Record
from multimodal.evaluation.held_out import Split
from multimodal.weights.open import Embedder
from shared.report.page import Bar, Sample, write_report

CELL, TEXT_WIDTH, SHOWN = 112, 260, 5
RIGHT, WRONG = (30, 150, 70), (200, 200, 200)


def best_items(split: Split, caption: int, count: int = SHOWN) -> list[int]:
    """Items by falling similarity to a caption."""
    return (split.items_IE @ split.texts_CE[caption]).argsort(descending=True, stable=True)[:count].tolist()


def best_captions(split: Split, item: int, count: int = SHOWN) -> list[int]:
    """Captions by falling similarity to an item."""
    return (split.texts_CE @ split.items_IE[item]).argsort(descending=True, stable=True)[:count].tolist()


def spread(split: Split, count: int) -> list[int]:
    """Items that stand for the split, evenly spaced: no picking of good ones."""
    total = len(split.items_IE)
    return [place * total // min(count, total) for place in range(min(count, total))]


def captions_in_turn(split: Split, items: list[int]) -> list[int]:
    """One caption for each item: of the first its first, of the next its second, and so on around, so that a sheet
    shows every way of describing and not one alone. A user's texts, which belong to no item, as they stand.
    """
    own: dict[int, list[int]] = {}
    for caption, owner in enumerate(split.owners):
        own.setdefault(owner, []).append(caption)
    return [
        own[item][row % len(own[item])] if item in own else split.first_captions[item] for row, item in enumerate(items)
    ]


def picture_sheet(split: Split, sources: dict[str, Any], path: Path, *, rows: int = 8) -> Path:
    """For a caption of each of evenly spaced pictures the five nearest; the true one has a green frame."""
    items, font = spread(split, rows), ImageFont.load_default(13)
    sheet = Image.new("RGB", (TEXT_WIDTH + SHOWN * CELL, max(1, len(items)) * CELL), "white")
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions_in_turn(split, items)):
        draw.multiline_text((8, row * CELL + 12), textwrap.fill(split.caption_texts[caption], 36), "black", font)
        for column, found in enumerate(best_items(split, caption)):
            source = sources[split.ids[found]]
            picture = center_crop(read_image(source if isinstance(source, Path) else source.read()), CELL - 12)
            left, top = TEXT_WIDTH + column * CELL, row * CELL
            is_true = split.owners[caption] == found  # a user's text, of owner -1, belongs to none
            draw.rectangle(
                (left + 2, top + 2, left + CELL - 3, top + CELL - 3),
                outline=RIGHT if is_true else WRONG,
                width=4 if is_true else 1,
            )
            sheet.paste(picture, (left + 6, top + 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def caption_table(split: Split, item: int) -> str:
    """The five captions nearest to an item; its own are marked."""
    own = {place for place, owner in enumerate(split.owners) if owner == item}
    return "\n".join(
        f"{'*' if place in own else ' '} {split.caption_texts[place]}" for place in best_captions(split, item)
    )


def table(split: Split, *, rows: int = 8) -> list[dict[str, Any]]:
    """Retrieval both ways for evenly spaced items, as plain values."""
    found, items = [], spread(split, rows)
    for item, caption in zip(items, captions_in_turn(split, items), strict=True):
        found.append(
            {
                "query_text": split.caption_texts[caption],
                "wanted": split.ids[item],
                "found_items": [
                    {"id": split.ids[place], "right": place == item} for place in best_items(split, caption)
                ],
                "query_item": split.ids[item],
                "found_captions": [
                    {"text": split.caption_texts[place], "right": split.owners[place] == item}
                    for place in best_captions(split, item)
                ],
            }
        )
    return found


def write_run_report(
    run: Path,
    embedder: Embedder,
    splits: dict[str, Split],
    sources: dict[str, Record],
    found: dict[str, Any],
    bars: list[Bar],
    command: str,
) -> Path:
    """report.json, .md and .html of the run: recall next to chance, retrieved pictures, sounds with their nearest
    captions. sources: the records of all splits by id.
    """
    samples: list[Sample] = []
    for name, split in splits.items():
        if split.captions_CE is None or split.kind == "voice":
            continue
        if split.kind == "image":
            sheet = picture_sheet(
                split,
                {key: record.source for key, record in sources.items()},
                run / "samples" / f"{name}_text_to_picture.png",
            )
            samples.append(
                Sample(
                    sheet.resolve(),
                    "each row: a held-out caption and the five nearest held-out pictures; the true one is framed "
                    "in green",
                    f"{name}: text to picture",
                )
            )
        samples += _items_with_captions(run, name, split, sources)
    summary: dict[str, float | str] = {
        "model": f"{embedder.config.model.size}, {embedder.model.network.num_parameters():,} parameters",
        "checkpoint": embedder.what,
    }
    for kind, values in (("classification", found["classification"]), ("zero-shot", found.get("zeroshot", {}))):
        summary |= {f"{kind} {name}": str(value) for name, value in values.items()}
    return write_report(
        run,
        title="Multimodal: pictures, texts and sounds in one space",
        command=command,
        summary=summary,
        bars=bars,
        samples=samples,
        text="Held-out data; the rows are evenly spaced through the split, their captions in turn: none is chosen.",
        headline=headline(found["retrieval"]),
    )


def headline(retrieval: dict[str, Any]) -> str:
    """The one figure that matters, in words: of the first data set, how often a text finds what it describes."""
    for values in retrieval.values():
        own, item = values["text_to_item"], ITEMS[values["kind"]]
        return (
            f"{100 * own['R@10']:.0f} of 100 sentences that it never saw find their {item} among the first ten of "
            f"{values['items']}, guessing {100 * own['chance_R@10']:.0f}"
        )
    return ""


def _items_with_captions(run: Path, name: str, split: Split, sources: dict[str, Record]) -> list[Sample]:
    samples = []
    for item in spread(split, 6):
        source = sources[split.ids[item]].source
        if not isinstance(source, Path):
            continue
        samples.append(
            Sample(
                source.resolve(),
                "nearest captions (* its own):\n" + caption_table(split, item),
                f"{name}: item to text",
            )
        )
    return samples
