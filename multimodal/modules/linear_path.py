"""The linear path in closed form: ridge regression of the words of an item's captions on its features.

Legend: n items, F features of an item, V words of the training captions, E embedding.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional

from multimodal.dataset import CaptionedDataset
from multimodal.model import MASK_TOKEN, MultimodalModel, picture_statistics, sound_statistics, standardised
from shared.errors import BadSample

RIDGE = {"image": 0.5, "audio": 0.1}  # added to the diagonal of X^T X / F; chosen by folds, see NOTES.md
RARITY = 0.5  # power of log(items / items with the word), a word's weight in a caption
MOST_ITEMS = 20_000  # of each kind, evenly spaced: many more than F features need


@torch.no_grad()
def fit_linear_path(network: MultimodalModel, datasets: dict) -> dict[str, Tensor]:
    """State of network.linear that suits these items (evaluation views by kind; voices, which have no captions, and
    what cannot be read are left out). Deterministic; costs about one pass over the data.

    Each item has x, its standardised features less their mean, and y, the mean of its captions as weighted counts of
    words of unit length. B = (X^T X / F + r I)^-1 X^T Y / F predicts the words. Of [B_image; B_audio] = U S W^T the E
    largest singular values are kept: features go by U S^(1/2) into the common space, words by W S^(1/2), and what a
    picture and a sound have in common is the words that both foretell.
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
    found = {k: _regression(datasets[k], places[k], captions[k], column, weight_V, RIDGE[k]) for k in kinds}
    parts = {kind: both for kind, both in found.items() if both is not None}
    if not parts:
        return state
    b_FV = torch.cat([part for part, _ in parts.values()])
    # Of the two Gram matrices the smaller: singular vectors of one side, the other side's follow from them.
    wide = b_FV.shape[1] > b_FV.shape[0]
    energy, vectors = torch.linalg.eigh(b_FV @ b_FV.T if wide else b_FV.T @ b_FV)
    kept = energy.argsort(descending=True)[: state["text.weight"].shape[1]]
    kept = kept[energy[kept] > 1e-10 * energy.max()]
    own, root = vectors[:, kept], energy[kept] ** 0.25
    other = (b_FV.T if wide else b_FV) @ own / root
    features_FE, words_VE = (own * root, other) if wide else (other, own * root)
    size = len(kept)
    state["text.weight"][torch.tensor(list(column)), :size] = (weight_V[:, None] * words_VE).float()
    sizes = [len(part) for part, _ in parts.values()]
    for (kind, (_, mean_F)), project_FE in zip(parts.items(), features_FE.split(sizes), strict=True):
        state[f"{kind}.project.weight"][:size] = project_FE.T.float()
        state[f"{kind}.project.bias"][:size] = -(mean_F @ project_FE).float()
    return state


def _words(dataset: CaptionedDataset, index: int) -> list[list[int]]:
    """Words of each caption of an item, by id; of one that cannot be read none."""
    try:
        captions = dataset.records[index].captions
    except BadSample:
        return []
    return [[word for word in dataset.tokenizer.encode(text) if word > MASK_TOKEN] for text in captions]


def _regression(
    dataset: CaptionedDataset,
    places: range,
    captions: list[list[list[int]]],
    column: dict[int, int],
    weight_V: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor] | None:
    """B (F, V) and the mean of the features (F,), in double precision; None where no item can be read."""
    xs, rows = [], []
    for index, own in zip(places, captions, strict=True):
        try:
            item = dataset[index] if own else {}
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
            counts = torch.bincount(torch.tensor([column[word] for word in caption]), minlength=len(y_V)) * weight_V
            y_V += functional.normalize(counts, dim=0) / len(own)
        rows.append((words := y_V.nonzero()[:, 0], y_V[words]))  # some fifty of 16,000: Y itself would take 2.6 GB
    if not rows:
        return None
    x_nF = standardised(torch.cat(xs)).double()
    mean_F = x_nF.mean(0)
    x_nF -= mean_F
    size = len(mean_F)
    yx_VF = torch.zeros(len(weight_V), size, dtype=torch.float64)
    for x_F, (words, values) in zip(x_nF, rows, strict=True):
        yx_VF[words] += torch.outer(values, x_F)
    gram_FF = x_nF.T @ x_nF / size + ridge * torch.eye(size, dtype=torch.float64)
    return torch.linalg.solve(gram_FF, yx_VF.T / size), mean_F
