"""The linear path in closed form: ridge regression of the words of an item's captions on its features.

Legend: n items, F features of an item, V words of the training captions, E embedding.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from multimodal.dataset import CaptionedDataset
from multimodal.model import (
    AUDIO_PARTS,
    IMAGE_PARTS,
    MASK_TOKEN,
    MultimodalModel,
    picture_statistics,
    sound_statistics,
)
from shared.errors import BadSample

# All chosen by folds inside training data, see NOTES.md.
RIDGE = {"image": 2.0, "audio": 0.25}  # added to the diagonal of X^T X
RARITY = 0.35  # power of log(items / items with the word), a word's weight in a caption
SINGULAR = 0.15  # power of the singular values on either side; below 1/2 what few items share counts more
LEAST_SPREAD = 0.1  # of a feature, next to the others of its part: what hardly varies is not blown up
MOST_ITEMS = 20_000  # of each kind, evenly spaced: many more than F features need
PARTS = {"image": IMAGE_PARTS, "audio": AUDIO_PARTS}


@torch.no_grad()
def fit_linear_path(network: MultimodalModel, datasets: dict) -> dict[str, Tensor]:
    """State of network.linear that suits these items (evaluation views by kind; voices, which have no captions, and
    what cannot be read are left out). Deterministic; costs about one pass over the data.

    Each item has x, its features less their mean and by their spread, each part of them of unit size, and y, the mean
    of its captions as weighted counts of words of unit length. B = (X^T X + r I)^-1 X^T Y predicts the words. Of
    [B_image; B_audio] = U S W^T the E largest singular values are kept: features go by U S^p into the common space,
    words by W S^p, and what a picture and a sound have in common is the words that both foretell. Texts count from the
    mean caption outwards, that of pictures and that of sounds each in the directions which its kind uses.
    """
    kinds = [kind for kind in ("image", "audio") if kind in datasets]
    places = {kind: range(0, len(datasets[kind]), -(-len(datasets[kind]) // MOST_ITEMS) or 1) for kind in kinds}
    captions = {kind: [_words(datasets[kind], index) for index in places[kind]] for kind in kinds}
    items_with = Counter(word for own in captions.values() for item in own for word in set().union(*item))
    column = {word: number for number, word in enumerate(sorted(items_with))}
    state = {name: torch.zeros_like(value, device="cpu") for name, value in network.linear.state_dict().items()}
    if not column:
        return state
    count = torch.tensor([float(items_with[word]) for word in column], dtype=torch.float64)
    # Of a word of every item 0 exactly: rounding can make it less, and its root would be no number.
    weight_V = ((sum(map(len, captions.values())) + 1) / (count + 1)).log().clamp_min(0) ** RARITY
    found = {kind: _regression(kind, datasets[kind], places[kind], captions[kind], column, weight_V) for kind in kinds}
    parts = {kind: one for kind, one in found.items() if one is not None}
    if not parts:
        return state
    # Of one size each, so that the kind with fewer items, which a ridge holds back less, does not take all E places.
    b_FV = torch.cat([one.b_FV / one.b_FV.norm().clamp_min(1e-30) for one in parts.values()])
    # Of the two Gram matrices the smaller: singular vectors of one side, the other side's follow from them.
    wide = b_FV.shape[1] > b_FV.shape[0]
    energy, vectors = torch.linalg.eigh(b_FV @ b_FV.T if wide else b_FV.T @ b_FV)
    kept = energy.argsort(descending=True)[: state["text.weight"].shape[1]]
    kept = kept[energy[kept] > 1e-10 * energy.max()]
    own, values = vectors[:, kept], energy[kept].sqrt()
    other = (b_FV.T if wide else b_FV) @ own / values
    left_FE, right_VE = (own, other) if wide else (other, own)
    features_FE, words_VE = left_FE * values**SINGULAR, weight_V[:, None] * right_VE * values**SINGULAR
    size, mean_E = len(kept), torch.zeros(len(kept), dtype=torch.float64)
    sizes = [len(one.b_FV) for one in parts.values()]
    for (kind, one), own_FE, project_FE in zip(
        parts.items(), left_FE.split(sizes), features_FE.split(sizes), strict=True
    ):
        project_FE = project_FE * one.scale_F[:, None]
        state[f"{kind}.project.weight"][:size] = project_FE.T.float()
        state[f"{kind}.project.bias"][:size] = -(one.mean_F @ project_FE).float()
        mean_E += own_FE.T @ own_FE @ (one.mean_V @ words_VE)
    # Taken from each word, so that a text is the mean of what is left, and one without a known word stays zero.
    state["text.weight"][torch.tensor(list(column)), :size] = (words_VE - mean_E).float()
    return state


def _words(dataset: CaptionedDataset, index: int) -> list[list[int]]:
    """Words of each caption of an item, by id; of one that cannot be read none."""
    try:
        captions = dataset.records[index].captions
    except BadSample:
        return []
    return [[word for word in dataset.tokenizer.encode(text) if word > MASK_TOKEN] for text in captions]


@dataclass
class _Regression:
    """Of one kind, in double precision."""

    b_FV: Tensor
    mean_F: Tensor  # what its features are measured from,
    scale_F: Tensor  # and by
    mean_V: Tensor  # its mean caption: how many times each word stands in one, divided by its length


def _regression(
    kind: str,
    dataset: CaptionedDataset,
    places: range,
    captions: list[list[list[int]]],
    column: dict[int, int],
    weight_V: Tensor,
) -> _Regression | None:
    """None where no item can be read."""
    xs, rows = [], []
    mean_V = torch.zeros_like(weight_V)
    for index, own in zip(places, captions, strict=True):
        try:
            item = dataset[index] if any(own) else {}
        except BadSample:  # training names and counts it
            continue
        if "images" in item:
            xs.append(picture_statistics(item["images"][None]))
        elif "audio" in item:
            mask = item["audio_mask"]
            xs.append(sound_statistics(item["audio"][None], None if mask is None else mask[None]))
        else:
            continue
        y_V = torch.zeros_like(weight_V)
        for caption in own:
            words = torch.tensor([column[word] for word in caption], dtype=torch.long)
            counts = torch.bincount(words, minlength=len(y_V))
            y_V += functional.normalize(counts * weight_V, dim=0) / len(own)
            mean_V += counts / max(1, len(caption)) / len(own)
        rows.append((found := y_V.nonzero()[:, 0], y_V[found]))  # some fifty of 16,000: Y itself would take 2.6 GB
    if not rows:
        return None
    x_nF = torch.cat(xs).double()
    mean_F = x_nF.mean(0)
    x_nF -= mean_F
    scale_F = _scale(x_nF, PARTS[kind])
    x_nF *= scale_F
    yx_VF = torch.zeros(len(weight_V), x_nF.shape[1], dtype=torch.float64)
    for x_F, (words, values) in zip(x_nF, rows, strict=True):
        yx_VF[words] += torch.outer(values, x_F)
    gram_FF = x_nF.T @ x_nF + RIDGE[kind] * torch.eye(x_nF.shape[1], dtype=torch.float64)
    return _Regression(torch.linalg.solve(gram_FF, yx_VF.T), mean_F, scale_F, mean_V / len(rows))


def _scale(x_nF: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(F,): by which features of mean 0 get about variance 1 within a part, each part of them the same share of 1."""
    scales = []
    for part_nF in x_nF.split(sizes, 1):
        square_F = part_nF.square().mean(0)
        # A part that does not vary at all stays zero, and so does what it foretells.
        least = (LEAST_SPREAD * square_F.mean().sqrt()).clamp_min(1e-8)
        scales.append(1 / (square_F.sqrt() + least) / (part_nF.shape[1] * len(sizes)) ** 0.5)
    return torch.cat(scales)
