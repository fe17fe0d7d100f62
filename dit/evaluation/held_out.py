"""Held-out figures that need no download: loss at fixed levels, the constant predictor's, shuffled and null captions.

Noise is keyed by (level, picture), so two checkpoints, or two ranks' shares, are measured on the same numbers.
Shapes: N held-out pictures, L levels, C H W of a latent.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit.data.cache import CachedDataset
from dit.dataset import spread, unit
from dit.modules.autoencoder import Codec
from dit.modules.text import CaptionEncoder, condition_of
from shared.engine.dist import DistInfo, sum_over_ranks
from shared.errors import BadSample, UserError
from shared.metrics import colour_caption, paired_p
from shared.rng import keyed_randn

_HELD_OUT_NOISE = 31  # random stream
EVALUATION_SEED = 0  # the same for every run, so that runs compare


class HeldOut(NamedTuple):
    """Pictures that no training step saw, as latents, with their conditions."""

    latents: Tensor
    condition: dict[str, Tensor]  # of the first captions, or labels
    captions: list[str]
    images: Tensor  # (N, 3, S, S) in [-1, 1]; empty where a cache stands for the pictures
    prompts: list[str]  # what to draw: the first caption that names a colour, else the first
    prompt_condition: dict[str, Tensor]
    mean_latent: Tensor  # of training pictures: what the constant predictor knows


@torch.no_grad()
def prepare(
    dataset: Any, training_set: Any, codec: Codec, encoder: CaptionEncoder | None, *, count: int, device: torch.device
) -> HeldOut:
    """Encode up to `count` held-out pictures, and the mean of as many training pictures."""
    samples = readable(dataset, count)
    images = unit(torch.stack([sample["image"] for sample in samples]))
    latents = torch.cat([_mean_latent(codec, part.to(device)) for part in images.split(16)])
    labels = torch.tensor([sample["label"] for sample in samples]) if "label" in samples[0] else None
    captions = [sample["text"] for sample in samples]
    seen = unit(torch.stack([sample["image"] for sample in readable(training_set, count)]))
    mean = torch.cat([_mean_latent(codec, part.to(device)) for part in seen.split(16)]).mean(0)
    prompts = [colour_caption(dataset.items[sample["index"]].captions or ("",)) for sample in samples]
    first, drawn = (condition_of(texts, labels, encoder, device) for texts in (captions, prompts))
    return HeldOut(latents, first, captions, images, prompts, drawn, mean)


@torch.no_grad()
def prepare_cached(
    dataset: CachedDataset, training_set: CachedDataset, codec: Codec, *, count: int, device: torch.device
) -> HeldOut:
    """The same from a cache: no picture is opened and nothing is encoded."""
    indices = sorted(spread(dataset, count)[:count])
    captions = [dataset.captions_of(index) for index in indices]
    prompts = [colour_caption(texts) for texts in captions]
    first = [dataset.sample(index, 0, flip=False) for index in indices]
    drawn = [
        dataset.sample(index, 0, flip=False, caption=texts.index(prompt))
        for index, texts, prompt in zip(indices, captions, prompts, strict=True)
    ]
    seen = [training_set.sample(index, 0, flip=False) for index in spread(training_set, count)[:count]]
    latents, mean = (
        codec.latents(torch.stack([sample["moments"] for sample in samples]).to(device)).float()
        for samples in (first, seen)
    )
    return HeldOut(
        latents,
        stacked_condition(first, device),
        [texts[0] for texts in captions],
        torch.zeros(0),
        prompts,
        stacked_condition(drawn, device),
        mean.mean(0),
    )


def stacked_condition(samples: list[dict], device: torch.device) -> dict[str, Tensor]:
    """The model's keyword arguments for samples of a cache."""
    names = {"text_embeddings": "text_embeddings", "text_mask": "text_mask", "text_pooled": "text_pooled"}
    found = {name: torch.stack([sample[name] for sample in samples]).to(device) for name in names if name in samples[0]}
    if not found and "label" in samples[0]:
        found["labels"] = torch.tensor([sample["label"] for sample in samples], device=device)
    return found


def held_out_noise(latents: Tensor, level: int, pictures: Tensor) -> Tensor:
    """The noise (B, C, H, W) of a level that belongs to these pictures, by number, on the latents' device."""
    key = (EVALUATION_SEED, _HELD_OUT_NOISE, level)
    return keyed_randn(latents.shape[1:], key=key, slots=pictures, device=latents.device)


@torch.no_grad()
def errors(
    model: Any, objective: Any, held: HeldOut, info: DistInfo, *, kind: str = "right", batch_size: int = 64
) -> Tensor:
    """Loss (L, N) of every picture at every level; pictures are shared over the ranks, every rank gets all.

    kind: right captions, shuffled ones (each picture gets another's), the null condition, or the constant predictor.
    """
    count, device = len(held.latents), held.latents.device
    order = torch.arange(count)
    condition = _shuffled(held.condition) if kind == "shuffled" else held.condition
    size = min(batch_size, -(-count // info.world))
    found = torch.zeros(len(objective.levels), count, device=device)
    for first in range(0, count, size * info.world):
        # All ranks run equally many forwards (sharded models wait for each other); a rank beyond the end repeats and
        # adds nothing.
        start = first + info.rank * size
        mine = order[start : start + size] if start < count else order[:1]
        weight = 1.0 if start < count else 0.0
        rows = {name: value[mine] for name, value in condition.items()}
        if kind == "null":
            rows["drop"] = torch.ones(len(mine), dtype=torch.bool, device=device)
        clean = held.latents[mine]
        for row, level in enumerate(objective.levels):
            t_B = torch.full((len(mine),), level, device=device)
            noise = held_out_noise(clean, row, mine)
            noisy = objective.noisy(clean, noise, t_B)
            output = (
                objective.constant_prediction(held.mean_latent, t_B)
                if kind == "constant"
                else model(noisy, objective.model_time(t_B), **rows)
            )
            found[row, mine.to(device)] += weight * objective.error(output, noisy, clean, noise, t_B)
    return sum_over_ranks(found)


def summary(right_LN: Tensor, shuffled_LN: Tensor | None, constant_LN: Tensor) -> dict[str, float]:
    """loss, ratio to the constant predictor, what shuffled captions cost (%) and the one-sided p of a paired t-test."""
    figures = {
        "loss": right_LN.mean().item(),
        "constant_loss": constant_LN.mean().item(),
        "ratio": (right_LN.mean() / constant_LN.mean()).item(),
    }
    if shuffled_LN is not None:
        difference_N = (shuffled_LN - right_LN).mean(0)
        figures["shuffled_cost_percent"] = 100 * (shuffled_LN.mean() / right_LN.mean() - 1).item()
        figures["shuffled_p"] = paired_p(difference_N)
    return figures


def _shuffled(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every picture gets the caption of the one half the set away: of another class, where sets are sorted by class."""
    return {name: value.roll(len(value) // 2 + len(value) % 2, 0) for name, value in condition.items()}


def _mean_latent(codec: Codec, images: Tensor) -> Tensor:
    return codec.latents(codec.moments(images)).float()


def readable(dataset: Any, count: int, *, epoch: int = 0) -> list[dict]:
    """Up to `count` samples that can be read, spread over the set by hash, in its order, not mirrored. Broken ones are
    listed when training meets them; a UserError when all are.
    """
    samples: list[dict] = []
    reason = ""
    for index in spread(dataset, count):
        if len(samples) == count:
            break
        try:
            samples.append(dataset.sample(index, epoch, flip=False))
        except BadSample as error:
            reason = str(error)
    if reason and not samples:
        raise UserError(f"none of {len(dataset)} pictures can be read, the last: {reason}; check the data folder")
    return sorted(samples, key=lambda sample: sample["index"])
