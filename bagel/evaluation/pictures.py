"""FID, CLIP score, the consistency of texts and pictures, and the colour agreement of drawn pictures.

Pictures are uint8 RGB (PIL). Models come from local paths only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.config import MetricsOptions
from bagel.evaluation.text import BertScorer, Unavailable, rouge
from shared import metrics
from shared.engine.preflight import check_folder
from shared.errors import UserError
from shared.media.inception import inception

Features = Callable[[Sequence[Image.Image]], Tensor]  # pictures -> (N, D)


def fid(
    generated: Sequence[Image.Image], real: Sequence[Image.Image], features: Features | None
) -> dict[str, float | int | str]:
    """FID with the features of inception_features(), or any others."""
    if features is None:
        raise Unavailable("FID needs local weights: --fid-weights FILE, the public Inception weights or TorchScript")
    if min(len(generated), len(real)) < 2:
        raise Unavailable(f"FID needs two or more pictures on each side, found {len(generated)} and {len(real)}")
    result: dict[str, float | int | str] = {
        "fid": metrics.frechet_distance(features(generated), features(real)),
        "fid_pictures": len(generated),
    }
    if min(len(generated), len(real)) < 2048:
        result["fid_warning"] = "fewer than 2048 pictures: the figure is biased upwards and noisy"
    return result


def inception_features(path: str) -> Features:
    """Features of the public FID weights, or of a TorchScript file. UserError when it is neither."""
    network = inception(path)

    def features(pictures: Sequence[Image.Image]) -> Tensor:
        rows = [np.asarray(picture.convert("RGB")) for picture in pictures]
        return torch.from_numpy(metrics.picture_features(network, rows, device=torch.device("cpu")))

    return features


class Cosines(Protocol):
    """What tells how well texts and pictures fit."""

    def cosines(self, texts: Sequence[str], pictures: Sequence[Image.Image]) -> list[float]:
        """One cosine for each pair."""
        ...


class Judges(NamedTuple):
    """The models that metrics are taken with; None: it was not given, and its metric is left out."""

    features: Features | None = None  # of FID
    clip: Cosines | None = None
    bert: BertScorer | None = None


def open_judges(options: MetricsOptions) -> Judges:
    """What is named for a metric, each opened once. UserError: it is of no use."""
    for name in ("bertscore_model", "clip_model"):
        check_folder(name, getattr(options, name))
    if options.nltk_data is not None and not Path(options.nltk_data).is_dir():
        raise UserError(f"--nltk-data {options.nltk_data}: no such folder; give the one that holds corpora/wordnet")
    weights, clip, bert = options.fid_weights, options.clip_model, options.bertscore_model
    return Judges(
        None if weights is None else inception_features(weights),
        None if clip is None else metrics.ClipScorer(clip),
        None if bert is None else BertScorer(bert, options.bertscore_layer),
    )


def clip_score(texts: Sequence[str], pictures: Sequence[Image.Image], scorer: Cosines | None) -> dict[str, float]:
    """100 * max(cosine, 0), mean over pairs (Hessel et al. 2021 without its 2.5)."""
    if scorer is None:
        raise Unavailable("CLIP score needs a local model: --clip-model FOLDER")
    cosines = scorer.cosines(texts, pictures)
    return {"clip_score": 100 * sum(max(value, 0.0) for value in cosines) / len(cosines)}


def consistency(
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    references: Sequence[str],
    scorer: Cosines | None,
    described: Sequence[str] | None = None,
) -> dict[str, float | int | None]:
    """How well what was generated together fits together, each part 0..1, and the mean of the parts that could be
    computed:

    prompt and picture (CLIP), generated text and picture (CLIP), generated and reference text (ROUGE-L), and the
    model's own description of its picture against the prompt (ROUGE-L).
    """
    parts: dict[str, float | None] = {
        "prompt_picture": None,
        "text_picture": None,
        "text_reference": None,
        "described_prompt": None,
    }
    if scorer is not None:
        parts["prompt_picture"] = clip_score(prompts, pictures, scorer)["clip_score"] / 100
        parts["text_picture"] = clip_score(texts, pictures, scorer)["clip_score"] / 100
    if references:
        parts["text_reference"] = rouge(texts, references)["rougeL"]
    if described is not None:
        parts["described_prompt"] = rouge(described, prompts)["rougeL"]
    present = [value for value in parts.values() if value is not None]
    return {
        **{f"consistency_{name}": value for name, value in parts.items()},
        "consistency": sum(present) / len(present) if present else None,
        "consistency_samples": len(prompts),
    }


# --- colour -----------------------------------------------------------------------------------------------------------


def _pixels(picture: Image.Image, side: int) -> Tensor:
    resized = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def foreground_colour(picture: Image.Image) -> Tensor:
    """Mean colour (3,) in 0..1 of what stands on the white ground, pixels weighted by their distance from white; white
    if nothing.
    """
    pixels = _pixels(picture, 32).double().flatten(1) / 255
    weight = (1 - pixels).norm(dim=0)
    weight = torch.where(weight > 0.15, weight, 0.0)
    return (pixels * weight).sum(1) / weight.sum() if weight.sum() > 0 else torch.ones(3, dtype=torch.float64)


def colour_agreement(drawn: Sequence[Image.Image], real: Sequence[Image.Image]) -> dict[str, float]:
    """Share of (own, other) pairs in which a drawn picture's colour is nearer to that of the true picture of its prompt
    than to the true picture of another prompt (chance 0.5), and the chance of a share as high when the pictures are
    shuffled.
    """
    if len(drawn) < 2:
        raise Unavailable(f"colour agreement needs two or more pictures, found {len(drawn)}")
    mine, true = (torch.stack([foreground_colour(picture) for picture in pictures]) for pictures in (drawn, real))
    distance = torch.cdist(mine, true)

    def share(order: Tensor) -> float:
        matched = distance[:, order]
        wins = (matched.diagonal()[:, None] < matched).double() + 0.5 * (matched.diagonal()[:, None] == matched)
        return float((wins.sum() - wins.diagonal().sum()) / (len(drawn) * (len(drawn) - 1)))

    generator, own = torch.Generator().manual_seed(0), share(torch.arange(len(drawn)))
    shuffled = [share(torch.randperm(len(drawn), generator=generator)) for _ in range(999)]
    return {
        "colour_agreement": own,
        "colour_agreement_shuffled": sum(shuffled) / len(shuffled),
        "colour_agreement_p": (1 + sum(value >= own for value in shuffled)) / 1000,
    }


def colours_named(text: str) -> set[str]:
    """The colours that an English or Chinese text names, by whole words, white included."""
    return metrics.named_colours(text, white=True)


def named_colour_agreement(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of texts that name a colour of their reference, and the same against every other reference."""
    pairs = [(colours_named(text), colours_named(reference)) for text, reference in zip(texts, references, strict=True)]
    pairs = [pair for pair in pairs if pair[1]]
    if len(pairs) < 2:
        raise Unavailable("fewer than two references name a colour")
    own = sum(bool(text & reference) for text, reference in pairs) / len(pairs)
    other = [bool(text & pairs[j][1]) for i, (text, _) in enumerate(pairs) for j in range(len(pairs)) if j != i]
    return {"colour_named": own, "colour_named_shuffled": sum(other) / len(other)}
