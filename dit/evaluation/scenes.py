"""How right the drawn scenes are, the bars of that, and the grid that shows them under the true ones."""

from pathlib import Path
from typing import Any

import numpy as np

from dit.data.scenes import SceneDataset
from dit.sampling.drawing import grid
from shared.media.scene_scores import summary
from shared.report.page import Bar, Sample

COLUMNS, ROWS = 8, 3  # of the grid: so many true scenes in a row, and rows of them


def scene_figures(dataset: SceneDataset, drawn: np.ndarray, patch: int) -> dict[str, Any]:
    """What of the first scenes of the data set is right in the drawn pictures (N, H, W, 3) uint8.

    patch: pixels of a side that the network puts out at once (latent cell times patch size).
    """
    truths = [dataset.truth(index) for index in range(len(drawn))]
    return summary(dataset.scenes, truths, drawn, patch=patch)


def scene_bars(dataset: SceneDataset, scenes: dict[str, Any], caption: dict[str, float]) -> list[Bar]:
    """The bars of drawn scenes; caption: what a missing caption costs, empty where it was not measured."""
    of = f"of {scenes['pictures']} scenes of {which(dataset)}"
    bars = [Bar("ground colour right", scenes["ground_right"], 0.99, baseline=1 / 8, note=of)]
    if "place_right" in scenes:
        bars.append(Bar("place right", scenes["place_right"], 0.97, baseline=1 / 4))
    if "relation_right" in scenes:
        bars.append(Bar("relation right", scenes["relation_right"], 0.97, baseline=1 / 4))
    bars.append(Bar("object nearest its own drawing among 16", scenes["object_right"], 0.95, baseline=1 / 16))
    if "second_right" in scenes:
        bars.append(Bar("second object nearest its own among 16", scenes["second_right"], 0.95, baseline=1 / 16))
    bars.append(Bar("squared error against the true scene", scenes["squared_error"], 0.03, "at most"))
    ratio, true = scenes["border_ratio"], scenes["border_ratio_true"]
    note = f"ratio {ratio:.3f}, of the true scenes {true:.3f}"
    bars.append(Bar("distance of the border ratio from 1", abs(ratio - 1), 0.15, "at most", note=note))
    if caption:
        bars.append(Bar("no caption costs (%)", caption["null_cost_percent"], 10.0, baseline=0.0))
        bars.append(Bar("p of that", caption["null_p"], 0.001, "at most"))
    return bars


def scene_headline(scenes: dict[str, Any]) -> str:
    """The one figure that matters, in words."""
    count = scenes["pictures"]
    right = round(scenes["object_right"] * count)
    return f"draws the right object in {right} of {count} scenes that it never trained on, guessing {count / 16:.0f}"


def scene_grid(dataset: SceneDataset, drawn: np.ndarray, path: Path) -> Sample:
    """Write rows of true scenes, each with the row of what was drawn for its sentences below it."""
    columns = min(COLUMNS, len(drawn))
    rows = min(ROWS, len(drawn) // columns)
    true = np.stack([dataset.scenes.picture(dataset.truth(index)) for index in range(rows * columns)])
    pairs = [pictures[row * columns :][:columns] for row in range(rows) for pictures in (true, drawn)]
    grid(np.concatenate(pairs), columns=columns, enlarge=max(1, round(96 / true.shape[1]))).save(path)
    sentences = "; ".join(dataset.items[index].captions[0] for index in range(columns))
    caption = (
        f"rows in turn: true scenes of {which(dataset)}, and what was drawn from their sentences alone. First row: "
    )
    return Sample(path, caption + sentences, "drawn")


def which(dataset: SceneDataset) -> str:
    """Which scenes they are, in words."""
    return "trained combinations" if dataset.is_train else "combinations never trained"
