"""How right drawn scenes are, counted against their ground truth: ground, place, object, size, relation, motion.

Each is one question: of all scenes that differ from the true one in this alone, is the true one the nearest (squared
error) to what was drawn? A picture of noise, or an average, gets 1 / (number of such scenes).
Shapes: N pictures, H W of a picture, T frames.
"""

from collections.abc import Sequence

import numpy as np

from shared.media.scenes import Scene, Scenes

QUESTIONS = ("object", "second", "ground", "place", "size", "relation", "motion")


def rights(scenes: Scenes, truths: Sequence[Scene], drawn: np.ndarray, *, among: int = 16) -> dict[str, np.ndarray]:
    """For every question that the scenes answer: 1.0 where right, 0.0 where wrong, NaN where it does not apply: (N,).

    drawn: uint8 (N, H, W, 3), or clips (N, T, H, W, 3). among: so many objects to choose from, the own one included.
    """
    found = {}
    for question in QUESTIONS:
        asked = np.full(len(truths), np.nan)
        for row, (truth, picture) in enumerate(zip(truths, drawn, strict=True)):
            if _applies(question, truth):
                choices = scenes.alternatives(truth, question, among=among)
                errors = [squared_error(picture, _shown(scenes, choice, picture)) for choice in choices]
                asked[row] = float(int(np.argmin(errors)) == 0)
        if not np.isnan(asked).all():
            found[question] = asked
    return found


def truth_pictures(scenes: Scenes, truths: Sequence[Scene], *, frames: int | None = None) -> np.ndarray:
    """The true pictures uint8 (N, H, W, 3), or clips (N, T, H, W, 3)."""
    return np.stack([scenes.picture(truth) if frames is None else scenes.frames(truth, frames) for truth in truths])


def squared_error(one: np.ndarray, other: np.ndarray) -> float:
    """Mean squared error of uint8 pictures, on the scale where black is -1 and white is 1."""
    return float(np.square((one.astype(np.float32) - other) / 127.5).mean())


def border_ratio(pictures: np.ndarray, patch: int) -> float:
    """Mean difference across the borders of patches over that inside them, (..., H, W, 3), both directions.

    Near that of the true pictures: no seams. Patches that do not fit each other give far more.
    """
    across, inside = [], []
    for axis in (-3, -2):
        steps = np.abs(np.diff(pictures.astype(np.float32), axis=axis))
        steps = np.moveaxis(steps, axis, 0).reshape(pictures.shape[axis] - 1, -1).mean(1)
        is_border = np.arange(1, pictures.shape[axis]) % patch == 0
        across.append(steps[is_border].mean())
        inside.append(steps[~is_border].mean())
    return float(np.mean(across) / max(np.mean(inside), 1e-9))


def summary(scenes: Scenes, truths: Sequence[Scene], drawn: np.ndarray, *, patch: int, among: int = 16) -> dict:
    """Shares that are right ("ground_right", ...), the squared error, and the border ratio of drawn and true pictures.

    patch: pixels between the borders, the side of what the drawing network puts out at once.
    """
    true = truth_pictures(scenes, truths, frames=drawn.shape[1] if drawn.ndim == 5 else None)
    found = rights(scenes, truths, drawn, among=among)
    return {f"{name}_right": float(np.nanmean(values)) for name, values in found.items()} | {
        "squared_error": squared_error(drawn, true),
        "border_ratio": border_ratio(drawn, patch),
        "border_ratio_true": border_ratio(true, patch),
        "pictures": len(truths),
    }


def _applies(question: str, truth: Scene) -> bool:
    if question == "object":
        return True
    if question == "second":
        return bool(truth.relation)
    return bool(getattr(truth, question))


def _shown(scenes: Scenes, scene: Scene, like: np.ndarray) -> np.ndarray:
    return scenes.frames(scene, len(like)) if like.ndim == 4 else scenes.picture(scene)
