"""What a run on composed scenes has learned, counted against the scenes' ground truth.

Groups: "combinations" of drawing, ground and direction that were never trained, and "subjects", drawings that were
never trained at all. Captions are as they are, with the noun in.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opens2v.data.scenes import SCENE_RATE, SceneDataset, scene_set
from opens2v.data.video import normalise, to_uint8, write_video
from opens2v.dataset import collate_opens2v_batch
from opens2v.evaluation.preview import reference_picture, side_by_side
from opens2v.evaluation.subject_use import PairedErrors, paired_errors
from opens2v.sampling.scheduler import FlowMatchScheduler
from shared.errors import write_text, written_aside
from shared.media.scene_scores import border_ratio, squared_error
from shared.media.scenes import Scene
from shared.report.page import Bar, Sample, write_report

OTHERS = 7  # drawings that the own one is compared with
GROUPS = {"combinations": "never trained combinations", "subjects": "never trained drawings"}


def measure_scenes(generator: Any, options: Any, batch: int) -> dict[str, float]:
    """Draw held-out scenes over several seeds, count what is right, write metrics.json, sheets and the report."""
    count = min(options.max_clips, 16)
    figures: dict[str, float] = {}
    samples: list[Sample] = []
    output = Path(options.output or Path(options.checkpoint) / "metrics.json")
    for group in GROUPS:
        dataset = scene_set(generator.config, group)
        scenes = _distinct(dataset, count)
        items = [dataset.shown(scene, place) for place, scene in enumerate(scenes)]
        losses = _losses(generator, items, batch)
        figures |= {f"{group}_{name}": value for name, value in losses.items()}
        drawn = np.stack([_draw(generator, items, seed, batch) for seed in range(options.seeds)])
        figures |= {f"{group}_{name}": value for name, value in scene_figures(dataset, scenes, drawn).items()}
        samples += _write(generator, items, drawn[0], output.parent / "samples" / "metrics", group)
    write_text(output, json.dumps({"checkpoint": str(generator.weights), **figures}, indent=1))
    own = figures["combinations_own_of_eight_percent"]
    write_report(
        output.parent,
        title="OpenS2V: a subject picture becomes a video",
        command=f"python opens2v/train.py --config {output.parent / 'config.yaml'}",
        summary=dict(figures),
        bars=scene_bars(figures),
        samples=samples,
        headline=f"shows the subject of its picture and no other of eight in {own:.0f} of 100 scenes that it never "
        "trained on, guessing 13",
    )
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    return figures


def _distinct(dataset: SceneDataset, count: int) -> list[Scene]:
    """The first `count` scenes, each of another drawing: the sheet then shows as many subjects as rows."""
    found: dict[int, Scene] = {}
    number = 0
    while len(found) < min(count, len(dataset.scenes.drawings)):
        scene = dataset.scene(number)
        found.setdefault(scene.objects[0], scene)
        number += 1
    return list(found.values())


def _losses(generator: Any, items: list[dict], batch: int) -> dict[str, float]:
    config, scheduler = generator.config, FlowMatchScheduler(generator.config.training.timestep_shift)
    conditions = generator.encoders.conditions(collate_opens2v_batch(items))
    with generator.autocast:
        errors: PairedErrors = paired_errors(
            generator.module, conditions, None, scheduler, config.model, generator.encoders.codec.variance,
            chunk=batch, references="next",
        )  # fmt: skip
    count = len(items)
    true = errors.whole_BB.diagonal()
    other = torch.stack([errors.whole_BB[i, (i + 1) % count] for i in range(count)])
    return {
        "loss": true.mean().item(),
        "below_none_percent": 100 * (1 - true.mean() / errors.whole_none_B.mean()).item(),
        "below_other_percent": 100 * (1 - true.mean() / other.mean()).item(),
        "pairs_won_percent": 100 * (true < other).float().mean().item(),
    }


def _draw(generator: Any, items: list[dict], seed: int, batch: int) -> np.ndarray:
    """uint8 (N, F, H, W, 3): one video of each item."""
    videos = []
    for first in range(0, len(items), batch):
        part = items[first : first + batch]
        places = list(range(first, first + len(part)))
        conditions = generator.encoders.conditions(collate_opens2v_batch(part))
        videos += [to_uint8(video) for video in generator.draw(conditions, places=places, seed=seed)]
    return np.stack(videos)


def scene_figures(dataset: SceneDataset, scenes: list[Scene], drawn: np.ndarray) -> dict[str, float]:
    """What is right in drawn videos (seeds, N, F, H, W, 3), percent, and how they look beside the true ones.

    Ground and direction: the true one is the nearest of all (8 grounds, 4 directions). Own subject: in the box that the
    subject passes through, the video is nearer to the own drawing than to that of seven others there.
    """
    world = dataset.scenes
    truth = np.stack([dataset.clip(scene) for scene in scenes])
    found: dict[str, list[float]] = {name: [] for name in ("ground", "direction", "own_of_two", "own_of_eight")}
    for videos in drawn:
        for scene, video in zip(scenes, videos, strict=True):
            for name, what in (("ground", "ground"), ("direction", "motion")):
                errors = [squared_error(video, dataset.clip(one)) for one in world.alternatives(scene, what)]
                found[name].append(float(np.argmin(errors) == 0))
            errors = [
                float(np.mean([_box_error(dataset, scene, one, picture, frame) for frame, picture in enumerate(video)]))
                for one in world.alternatives(scene, "object", among=OTHERS + 1)
            ]
            found["own_of_eight"].append(float(np.argmin(errors) == 0))
            found["own_of_two"] += [1.0 if errors[0] < other else 0.0 for other in errors[1:]]
    result = {f"{name}_percent": 100 * float(np.mean(values)) for name, values in found.items()}
    result["border_ratio"] = float(np.mean([border_ratio(videos, 4) for videos in drawn]))
    result["border_ratio_of_true_clips"] = border_ratio(truth, 4)
    result["squared_error"] = float(np.mean([squared_error(videos, truth) for videos in drawn]))
    return result


def _box_error(dataset: SceneDataset, scene: Scene, other: Scene, picture: np.ndarray, frame: int) -> float:
    """Squared error inside the box of the true subject, against a scene that shows another drawing there."""
    at = dataset.at(frame)
    rows, columns = np.nonzero(dataset.scenes.mask(scene, at) > 0.1)
    box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    return squared_error(picture[box], dataset.scenes.frame(other, at)[box])


def _write(generator: Any, items: list[dict], videos: np.ndarray, folder: Path, group: str) -> list[Sample]:
    """The videos beside their pictures, and one sheet: picture, true frames, drawn frames."""
    from PIL import Image

    samples, rows = [], []
    for item, video in zip(items, videos, strict=True):
        picture, truth = reference_picture(item["ref_pixels"][0]), to_uint8(normalise(item["frames"]))
        gap = np.full((video.shape[1], 3, 3), 128, np.uint8)
        shown = [side_by_side(picture, truth[:1])[0], *truth[1:], gap, *video]
        rows.append(np.concatenate(shown, 1))
        name = item["subject_names"][0].replace(" ", "_")
        joined = side_by_side(picture, video).repeat(6, 1).repeat(6, 2)
        path = write_video(folder / group / f"{name}.mp4", joined, SCENE_RATE)
        samples.append(Sample(path, item["prompts"], f"{GROUPS[group]}: subject picture | video"))
    sheet = np.concatenate(rows).repeat(3, 0).repeat(3, 1)
    with written_aside(folder / f"{group}.png") as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    caption = f"{GROUPS[group]}: rows are the subject picture, the true frames, the drawn frames"
    return [Sample(folder / f"{group}.png", caption, "overview"), *samples]


def scene_bars(figures: dict[str, float]) -> list[Bar]:
    """The figures that say whether the small preset learned, with their targets and what chance gives."""

    def bar(group: str, name: str, text: str, target: float, chance: float | None = None) -> Bar:
        return Bar(f"{GROUPS[group]}: {text}", figures.get(f"{group}_{name}"), target, "at least", chance)

    border = figures.get("combinations_border_ratio")
    return [
        bar("combinations", "ground_percent", "ground right, % of 8", 97, 12.5),
        bar("combinations", "direction_percent", "direction right, % of 4", 90, 25),
        bar("combinations", "own_of_eight_percent", "own subject nearest of 8 in its box, %", 90, 12.5),
        bar("combinations", "below_none_percent", "loss below no picture, %", 5, 0),
        bar("combinations", "below_other_percent", "loss below another's picture, %", 5, 0),
        Bar("border ratio (seams), lower bound", border, 0.85, "at least", None),
        Bar("border ratio (seams), upper bound", border, 1.2, "at most", None),
        bar("subjects", "own_of_two_percent", "own subject nearer than another, %", 95, 50),
        bar("subjects", "own_of_eight_percent", "own subject nearest of 8, %", 70, 12.5),
    ]
