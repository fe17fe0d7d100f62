"""The report of an evaluated run: what was reached, what it is compared with, and what the samples are."""

from pathlib import Path
from typing import Any

from shared.report.page import Bar, Sample, write_report

REMARK = (
    "Pictures and descriptions come from held-out records unless a group says otherwise. The text of so small a set is "
    "soon overfitted: the least held-out text loss of the run and that of the evaluated weights are given apart."
)


def text_bars(figures: dict[str, Any]) -> list[Bar]:
    """Held-out text in nats a token, beside what counting the training answers can do."""
    unigram, trigram = figures.get("text_loss_unigram"), figures.get("text_loss_3-gram")
    best = figures.get("best_text_loss", figures.get("text_loss"))
    target = None if unigram is None else 0.4 * unigram
    last = figures.get("text_loss")
    return [
        Bar("held-out text, best validation", best, target, "at most", unigram, "target: 60 % below the unigram"),
        Bar("held-out text, best validation", best, trigram, "at most", trigram, "target: the Kneser-Ney 3-gram"),
        Bar("held-out text, weights evaluated", last, None, "at most", unigram, "overfits late"),
    ]


def bars_of(figures: dict[str, Any]) -> list[Bar]:
    """The figures that the small preset is meant to reach, each with its trivial baseline."""
    get = figures.get
    shuffled = [get(f"{name}_colour_agreement_shuffled") for name in ("train", "held_out")]
    notes = [f"shuffled p = {get(f'{name}_colour_agreement_p')}" for name in ("train", "held_out")]
    seen, unseen = get("caption_first_of_10"), get("held_out_caption_first_of_10")
    colours = [get(f"{name}_colour_agreement") for name in ("train", "held_out")]
    return [
        *text_bars(figures),
        Bar("held-out velocity loss over the constant predictor's", get("image_ratio"), 0.40, "at most", 1.0),
        Bar("right caption first of ten, training pictures", seen, 0.60, "at least", 0.1, "memorisation"),
        Bar("right caption first of ten, held-out pictures", unseen, None, "at least", 0.1),
        Bar("colour agreement, training prompts", colours[0], shuffled[0], "at least", shuffled[0], notes[0]),
        Bar("colour agreement, held-out prompts", colours[1], None, "at least", shuffled[1], notes[1]),
    ]


def write_bagel_report(
    folder: Path, figures: dict[str, Any], samples: list[tuple[Path, str, str]], command: str
) -> None:
    """report.json, report.md and report.html in `folder`."""
    summary = {
        name: f"null: {figures.get(f'{name}_reason', 'not computed')}" if value is None else value
        for name, value in figures.items()
        if not name.endswith("_reason")
    }
    write_report(
        folder,
        title="BAGEL: text and pictures in one model",
        command=command,
        summary=summary,
        bars=bars_of(figures),
        samples=[Sample(path.relative_to(folder), caption, group) for path, caption, group in samples],
        curves=["train/text_loss", "train/image_loss", "val/text_loss", "val/image_loss"],
        text=REMARK,
    )
