"""The report of an evaluated run: what was reached, what it is compared with, and what the samples are."""

from pathlib import Path
from typing import Any

from bagel.runs import Opened
from shared.report import Bar, Sample, write_report


def bars_of(figures: dict[str, Any]) -> list[Bar]:
    """The figures that the small preset is meant to reach, each with its trivial baseline."""
    unigram, trigram = figures.get("text_loss_unigram"), figures.get("text_loss_3-gram")
    best = figures.get("best_text_loss", figures.get("text_loss"))
    return [
        Bar("held-out text, best validation, nats a token", best, unigram and 0.4 * unigram, "at most", unigram, "baseline: unigram; target: 60 % below it"),
        Bar("the same against counting", best, trigram, "at most", trigram, "baseline and target: 3-gram of the training answers"),
        Bar("held-out text, weights evaluated, nats a token", figures.get("text_loss"), None, "at most", unigram, "for comparison: overfits late"),
        Bar("held-out velocity loss over the constant predictor's", figures.get("image_ratio"), 0.40, "at most", 1.0),
        Bar("right caption first of ten, training pictures", figures.get("caption_first_of_10"), 0.60, "at least", 0.1, "memorisation"),
        Bar("right caption first of ten, held-out pictures", figures.get("held_out_caption_first_of_10"), None, "at least", 0.1),
        Bar("colour agreement of pictures, training prompts", figures.get("train_colour_agreement"),
            figures.get("train_colour_agreement_shuffled"), "at least", figures.get("train_colour_agreement_shuffled"),
            f"shuffled p = {figures.get('train_colour_agreement_p')}"),
        Bar("colour agreement of pictures, held-out prompts", figures.get("held_out_colour_agreement"), None, "at least",
            figures.get("held_out_colour_agreement_shuffled"), f"shuffled p = {figures.get('held_out_colour_agreement_p')}"),
    ]


def write_bagel_report(folder: Path, opened: Opened, figures: dict[str, Any], samples: list[tuple[Path, str, str]], command: str) -> None:
    """report.json, report.md and report.html in `folder`."""
    summary = {name: ("null: " + str(figures.get(f"{name}_reason", "not computed")) if value is None else value)
               for name, value in figures.items() if not name.endswith("_reason")}
    shown = [Sample(path.relative_to(folder), caption, group) for path, caption, group in samples]
    write_report(folder, title="BAGEL: text and pictures in one model", command=command, summary=summary, bars=bars_of(figures), samples=shown,
                 curves=["train/text_loss", "train/image_loss", "val/text_loss", "val/image_loss"],
                 text="Pictures and descriptions come from held-out records unless a group says otherwise. The text of so small a set is "
                      "soon overfitted; the least held-out text loss of the run and that of the evaluated weights are given apart.")
