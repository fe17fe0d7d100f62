"""Measures that several systems report."""

import re

import numpy as np
import torch
from torch import nn

from shared.errors import UserError


def gaussian_of(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (F,) and the covariance (F, F) of N rows, float64. ValueError: fewer than two rows, not finite."""
    rows = np.asarray(features_NF, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"features of shape {rows.shape}; (N, F) with N of at least 2 expected")
    if not np.isfinite(rows).all():
        raise ValueError("features hold numbers that are not finite")
    return rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False))


def frechet_gaussians(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson and Landau 1982), float64.

    The trace of the root is the sum of the roots of a symmetric matrix's eigenvalues; the root of C_a C_b, which is
    not symmetric, has returned complex numbers and NaN. Biased upward for few samples: compare equal numbers only.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(moment, np.float64) for moment in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = np.linalg.eigh((cov_a + cov_a.T) / 2)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


# Do pictures show the colours that their captions name? Measured on pixels, so it needs no other model.
#
# Shapes: N pictures, K colour names.


NAMES = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey", "black")
_SAME = {"gray": "grey", "cyan": "teal", "turquoise": "teal", "violet": "purple", "golden": "yellow", "gold": "yellow"}
_WORD = re.compile("[a-z]+")


def named_colours(caption: str) -> set[str]:
    """The colours that a caption names. White is left out: the pictures' ground is white."""
    words = (_SAME.get(word, word) for word in _WORD.findall(caption.lower()))
    return {word for word in words if word in NAMES}


def colour_caption(captions: tuple[str, ...]) -> str:
    """The first caption that names a colour, else the first."""
    return next((text for text in captions if named_colours(text)), captions[0])


def colour_shares(pictures: np.ndarray) -> np.ndarray:
    """Share (N, K) of each colour among the pixels that are not near white, from pictures (N, H, W, 3) uint8."""
    rgb = pictures.astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    saturation = spread / np.maximum(high, 1e-6)
    hue = _hue(rgb, high, spread)
    coloured = saturation > 0.2
    foreground = coloured | (high < 0.85)
    bins = {
        "red": (hue < 14) | (hue >= 345),
        "orange": (hue >= 14) & (hue < 40),
        "yellow": (hue >= 40) & (hue < 66),
        "green": (hue >= 66) & (hue < 165),
        "teal": (hue >= 165) & (hue < 195),
        "blue": (hue >= 195) & (hue < 250),
        "purple": (hue >= 250) & (hue < 295),
        "pink": (hue >= 295) & (hue < 345),
    }
    masks = {name: coloured & (high >= 0.2) & inside for name, inside in bins.items()}
    light_red = masks["red"] & (saturation < 0.5) & (high > 0.7)
    masks["pink"] = masks["pink"] | light_red
    masks["red"] = masks["red"] & ~light_red
    brown = (masks["red"] | masks["orange"]) & (high < 0.65)
    masks["brown"] = brown
    masks["red"], masks["orange"] = masks["red"] & ~brown, masks["orange"] & ~brown
    masks["grey"] = ~coloured & (high >= 0.25) & (high < 0.85)
    masks["black"] = high < 0.25
    count = np.maximum(foreground.sum((1, 2)), 1)
    return np.stack([(masks[name] & foreground).sum((1, 2)) / count for name in NAMES], axis=1)


def agreement(pictures: np.ndarray, captions: list[str], *, draws: int = 2000) -> dict[str, float]:
    """Mean share of the named colours in their own picture, the same over all other pictures, and the p of a
    permutation test.

    Captions without a colour are left out; "pictures" is how many count.
    """
    named = [named_colours(caption) for caption in captions]
    rows = [row for row, names in enumerate(named) if names]
    if len(rows) < 2:
        return {"pictures": float(len(rows))}
    wanted = np.array([[name in named[row] for name in NAMES] for row in rows], dtype=np.float32)
    scores = colour_shares(pictures[rows]) @ wanted.T  # (picture, caption)
    own = np.diag(scores).mean()
    other = (scores.sum() - np.trace(scores)) / (scores.size - len(rows))
    generator = np.random.default_rng(0)
    permuted = [scores[np.arange(len(rows)), generator.permutation(len(rows))].mean() for _ in range(draws)]
    p = (1 + sum(value >= own for value in permuted)) / (1 + draws)
    return {"own": float(own), "shuffled": float(other), "p": float(p), "pictures": float(len(rows))}


def _hue(rgb: np.ndarray, high: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Hue in degrees."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(spread, 1e-6)
    hue = np.where(
        high == red,
        (green - blue) / safe % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue * 60


# CLIP score of pictures and captions, by a CLIP model that should not be the one that conditioned the drawing.


@torch.no_grad()
def clip_score(
    pictures: np.ndarray, captions: list[str], model_path: str, *, device: torch.device, batch_size: int = 32
) -> dict:
    """Mean of max(100 cos, 0) over pairs (Hessel et al. 2021), and the share of pictures whose own caption fits best
    of at most 100.

    Scores of different CLIP models do not compare; the model's name is part of the answer.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(model_path).eval()
        nn.Module.to(model, device)
        processor = CLIPProcessor.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--clip-path {model_path}: cannot be loaded ({str(error).strip().splitlines()[0][:160]})"
        ) from None
    image_rows, text_rows = [], []
    for first in range(0, len(pictures), batch_size):
        part = slice(first, first + batch_size)
        inputs = processor(
            text=captions[part], images=list(pictures[part]), return_tensors="pt", padding=True, truncation=True
        ).to(device)
        output = model(**inputs)
        image_rows.append(output.image_embeds)
        text_rows.append(output.text_embeds)
    images, texts = (torch.nn.functional.normalize(torch.cat(rows), dim=1) for rows in (image_rows, text_rows))
    among = (images[:100] @ texts[:100].T).argmax(1).cpu()
    return {
        "score": (100 * (images * texts).sum(1)).clamp_min(0).mean().item(),
        "r_at_1": (among == torch.arange(len(among))).double().mean().item(),
        "among": len(among),
        "model": model_path,
    }
