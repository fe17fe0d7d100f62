"""What a model of scenes can do with combinations that it was never trained on: draw, answer, describe, change, talk.

Everything is counted against the ground truth (shared/media/scene_scores.py): a drawn picture is right in its ground
if, of all scenes that differ from the true one in the ground alone, the true one is nearest.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel.config import MetricsOptions
from bagel.data.scenes import DESCRIBE, QUESTIONS, SceneFile, World
from bagel.evaluation.validation import grid
from bagel.inferencer import Input, InterleaveInferencer
from bagel.sampling.generation import Guidance
from bagel.weights.open import Opened
from shared.media.scene_scores import rights, summary, truth_pictures
from shared.media.scenes import Scene
from shared.report.page import Bar

CHANGES = ("object", "ground", "place", "size")
# Time runs evenly and guidance holds throughout: the latents are few, and their colours are decided late as well.
GUIDANCE = Guidance(
    cfg_text_scale=2.0,
    cfg_img_scale=1.0,
    cfg_interval=(0.0, 1.0),
    cfg_renorm_min=1.0,
    num_timesteps=31,
    timestep_shift=1.0,
)
ENLARGED = 3


def scene_figures(
    opened: Opened, source: SceneFile, options: MetricsOptions, folder: Path, samples: list[tuple[Path, str, str]]
) -> dict[str, Any]:
    """Shares that are right over options.scenes scenes of never-trained combinations, and pictures of a few."""
    inferencer, world = opened.inferencer(seed=options.seed), source.world
    numbers = range(options.scenes)
    truths = [source.scene(number) for number in numbers]
    true = truth_pictures(world.scenes, truths)
    figures: dict[str, Any] = {"scenes": options.scenes}
    figures |= _drawn(inferencer, world, truths, true, options, folder, samples)
    figures |= _answered(inferencer, world, truths, true)
    figures |= _changed(inferencer, world, options, folder, samples)
    _talk(inferencer, world, options, folder, samples)
    return figures


def _size(pictures: np.ndarray) -> tuple[int, int]:
    return pictures.shape[1], pictures.shape[2]


def _drawn(
    inferencer: InterleaveInferencer,
    world: World,
    truths: list[Scene],
    true: np.ndarray,
    options: MetricsOptions,
    folder: Path,
    samples: list[tuple[Path, str, str]],
) -> dict[str, Any]:
    sentences = [world.scenes.sentence(truth, number) for number, truth in enumerate(truths)]
    pictures = inferencer.draw_batch([[text] for text in sentences], GUIDANCE, _size(true))
    drawn = np.stack([np.asarray(picture) for picture in pictures])
    found = summary(world.scenes, truths, drawn, patch=inferencer.config.latent_stride)
    pairs = [Image.fromarray(picture) for pair in zip(drawn[:16], true[:16], strict=True) for picture in pair]
    path = folder / "scenes_drawn.png"
    grid(pairs, columns=8, scale=ENLARGED).save(path)
    samples.append((path, "drawn and true, in pairs: " + "; ".join(sentences[:16]), "scenes never trained, drawn"))
    ratio = found["border_ratio"] / found["border_ratio_true"]
    return {f"drawn_{name}": value for name, value in found.items()} | {"drawn_border_over_true": ratio}


def _answered(inferencer: InterleaveInferencer, world: World, truths: list[Scene], true: np.ndarray) -> dict[str, Any]:
    """Answers that are the right words, and descriptions that name object, ground, place and size rightly."""
    found: dict[str, Any] = {}
    pictures = [Image.fromarray(picture) for picture in true]
    for kind in QUESTIONS:
        turns = [world.question(truth, kind) for truth in truths]
        asked: list[list[Input]] = [[picture, question] for picture, (question, _) in zip(pictures, turns, strict=True)]
        answers = inferencer.answer_batch(asked, 16)
        found[f"answer_{kind}"] = float(
            np.mean([answer.strip() == right for answer, (_, right) in zip(answers, turns, strict=True)])
        )
    texts = inferencer.answer_batch([[picture, DESCRIBE] for picture in pictures], 40)
    found["described"] = float(
        np.mean([world.is_described(truth, text.strip()) for text, truth in zip(texts, truths, strict=True)])
    )
    return found


def _changed(
    inferencer: InterleaveInferencer,
    world: World,
    options: MetricsOptions,
    folder: Path,
    samples: list[tuple[Path, str, str]],
) -> dict[str, Any]:
    """How often an edit changes what was asked, and keeps all the rest."""
    edits = [world.edit(number, unseen=True) for number in range(options.scenes)]
    before = truth_pictures(world.scenes, [edit[0] for edit in edits])
    inputs: list[list[Input]] = [
        [Image.fromarray(picture), edit[2]] for picture, edit in zip(before, edits, strict=True)
    ]
    drawn = np.stack([np.asarray(picture) for picture in inferencer.draw_batch(inputs, GUIDANCE, _size(before))])
    right = rights(world.scenes, [edit[3] for edit in edits], drawn)
    asked = np.array([right[edit[1]][row] for row, edit in enumerate(edits)])
    kept = np.array([min(right[name][row] for name in CHANGES if name != edit[1]) for row, edit in enumerate(edits)])
    trios = [(before[row], drawn[row], world.scenes.picture(edits[row][3])) for row in range(min(12, len(edits)))]
    path = folder / "scenes_changed.png"
    grid([Image.fromarray(picture) for trio in trios for picture in trio], columns=9, scale=ENLARGED).save(path)
    told = "; ".join(edit[2] for edit in edits[:12])
    samples.append((path, f"before, changed by the model, truly changed: {told}", "scenes never trained, changed"))
    by_kind = {
        f"edit_{kind}": float(np.mean([value for value, edit in zip(asked, edits, strict=True) if edit[1] == kind]))
        for kind in CHANGES
        if any(edit[1] == kind for edit in edits)
    }
    return {"edit_changed": float(asked.mean()), "edit_kept": float(kept.mean()), **by_kind}


def _talk(
    inferencer: InterleaveInferencer,
    world: World,
    options: MetricsOptions,
    folder: Path,
    samples: list[tuple[Path, str, str]],
) -> None:
    """Conversations: a picture is drawn, asked about, and changed, each turn seeing what the model itself drew."""
    for number in range(3):
        before, _, told, _ = world.edit(options.scenes + number, unseen=True)
        sentence = world.scenes.sentence(before, number)
        side = (world.scenes.height, world.scenes.width)
        first = inferencer.draw_batch([[sentence]], GUIDANCE, side)[0]
        said = [f"user: {sentence}", "model: (first picture)"]
        heard: list[Input] = [sentence, first]
        for kind in ("what", "where", "colour"):
            question = world.question(before, kind)[0]
            answer = inferencer.gen_text(inferencer.read([*heard, question]).main, 16, do_sample=False).strip()
            said += [f"user: {question}", f"model: {answer}"]
        second = inferencer.draw_batch([[*heard, told]], GUIDANCE, side)[0]
        said += [f"user: {told}", "model: (second picture)"]
        path = folder / f"conversation_{number}.png"
        grid([first, second], columns=2, scale=2 * ENLARGED).save(path)
        samples.append((path, " | ".join(said), "conversations about scenes never trained"))


def scene_headline(figures: dict[str, Any]) -> str:
    """The one figure that matters of drawing and of reading, in words."""
    drawn, named = (100 * figures[name] for name in ("drawn_object_right", "answer_what"))
    return (
        f"draws the right object in {drawn:.0f} and names it in {named:.0f} of 100 scenes that it never trained on, "
        "guessing 6"
    )


def scene_bars(figures: dict[str, Any]) -> list[Bar]:
    """What the small preset is meant to reach on combinations that it was never trained on."""
    get = figures.get
    chances = {"what": 1 / 16, "where": 1 / 4, "colour": 1 / 8, "size": 1 / 2}
    bars = [
        Bar(
            f"answers right: {kind}", get(f"answer_{kind}"), 0.95 if kind != "size" else None, "at least", chances[kind]
        )
        for kind in QUESTIONS
    ]
    drawn = (("ground", 0.97, 1 / 8), ("place", 0.95, 1 / 4), ("object", 0.90, 1 / 16), ("size", None, 1 / 2))
    bars += [
        Bar(f"drawn pictures right: {name}", get(f"drawn_{name}_right"), target, "at least", chance)
        for name, target, chance in drawn
    ]
    ratio = get("drawn_border_over_true")
    return [
        *bars,
        Bar(
            "differences across the borders of patches over those of true pictures",
            ratio,
            1.15,
            "at most",
            None,
            "0.85 to 1.15",
        ),
        Bar("edits that change what was asked", get("edit_changed"), 0.90, "at least", None),
        Bar("edits that keep all the rest", get("edit_kept"), 0.90, "at least", None),
        Bar("descriptions right in every word", get("described"), None, "at least", None),
    ]
