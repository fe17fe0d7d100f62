"""Measures of whether a subject picture is used and whether the videos are more than noise. All run offline.

Shapes: B clips, C channels, F frames, h w latent grid, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from opens2v.config import ModelConfig
from opens2v.data.augment import FOREGROUND_LEVELS
from opens2v.modules.conditions import Conditions
from opens2v.objective import causal_arguments
from opens2v.sampling.scheduler import TIMESTEP_OF_NOISE, FlowMatchScheduler, velocity_of
from shared.rng import keyed_generator

SIGMAS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
_NOISE = 541  # random stream
_COLOUR_BINS = 6  # per channel, of a subject's colour histogram


@dataclass
class PairedErrors:
    """Squared velocity errors, mean over noise levels: (B, B) by clip and whose reference it got, (B,) without one.

    subject: inside the subject's region only. whole: over the whole frame.
    """

    subject_BB: Tensor
    subject_none_B: Tensor
    whole_BB: Tensor
    whole_none_B: Tensor

    def summary(self, clips: list[int], subject_of: list[str]) -> dict[str, float]:
        """The figures for some clips; references of the same subject do not count as others."""
        own = torch.tensor(clips)
        other = torch.tensor([[a != b for b in subject_of] for a in subject_of])[own]
        result = {}
        for name, matrix, none in (
            ("subject", self.subject_BB, self.subject_none_B),
            ("whole", self.whole_BB, self.whole_none_B),
        ):
            true = matrix.diagonal()[own]
            wrong = torch.where(other, matrix[own], 0).sum(1) / other.sum(1).clamp(min=1)
            result[f"{name}_true"] = true.mean().item()
            result[f"{name}_below_none_percent"] = 100 * (1 - true.mean() / none[own].mean()).item()
            result[f"{name}_below_other_percent"] = 100 * (1 - true.mean() / wrong.mean()).item()
            result[f"{name}_gap"] = (wrong.mean() - true.mean()).item()
            wins = (true[:, None] < matrix[own])[other]
            result[f"{name}_win_percent"] = 100 * wins.float().mean().item()
        return result


def subject_region(frames: Tensor, background: Tensor, latent_size: tuple[int, int, int]) -> Tensor:
    """bool (B, F, h, w): latent cells that hold subject pixels.

    frames (B, 3, F, H, W), background (B, 3, H, W), in [-1, 1].

    A pixel is the subject's when it differs from the background by more than 12 grey levels; the region is grown by
    one.
    """
    differs = ((frames - background.unsqueeze(2)).abs().amax(1) * 127.5 > FOREGROUND_LEVELS).float()
    grown = functional.max_pool2d(differs, 3, stride=1, padding=1)
    return functional.adaptive_max_pool3d(grown.unsqueeze(1), latent_size)[:, 0] > 0


@torch.no_grad()
def paired_errors(
    model: Callable,
    conditions: Conditions,
    region_BFhw: Tensor | None,
    scheduler: FlowMatchScheduler,
    settings: ModelConfig,
    variance_2C: Tensor | None = None,
    *,
    sigmas: tuple[float, ...] = SIGMAS,
    seed: int = 0,
    chunk: int = 1,
    references: str = "all",
) -> PairedErrors:
    """The errors of every clip under every reference, its own, and none, with the same noise.

    variance_2C: see velocity_of. chunk: forward passes at a time; a training step of so many samples needs more memory.
    A causal model is called as in training: with its mask, and with teacher forcing beside the clean clip.
    references: "all", or "next": besides the own only that of the next clip (the rest of the matrix is NaN).
    """
    clean = conditions.latents_BCFhw
    assert clean is not None  # the clips were encoded
    count = len(clean)
    region = (
        torch.ones(clean[:, 0].shape, dtype=torch.bool, device=clean.device) if region_BFhw is None else region_BFhw
    )
    region = region.float()
    whose = [(i, j) for i in range(count) for j in range(count) if references == "all" or j in (i, (i + 1) % count)]
    jobs = [(i, j, s) for s in range(len(sigmas)) for i, j in [*whose, *((i, -1) for i in range(count))]]
    sums = torch.zeros(2, count, count + 1)
    for first in range(0, len(jobs), chunk):
        part = jobs[first : first + chunk]
        clip, other = (torch.tensor([job[k] for job in part]) for k in (0, 1))
        sigma = torch.tensor([sigmas[job[2]] for job in part], device=clean.device)
        drawn = [torch.randn(clean.shape[1:], generator=keyed_generator(seed, _NOISE, job[0], job[2])) for job in part]
        noise = torch.stack(drawn).to(clean)
        own = clean[clip]
        s = sigma[:, None, None, None, None]
        noisy = (1 - s) * own + s * noise
        given = conditions.with_references_of(other.clamp(min=0).to(clean.device)).without_subject(
            (other < 0).to(clean.device)
        )
        output = model(
            noisy, sigma * TIMESTEP_OF_NOISE, conditions.text_BRD[clip], return_dict=False,
            text_length=conditions.text_length, **given.reference(), **causal_arguments(settings, own),
        )[0]  # fmt: skip
        velocity = velocity_of(output.float(), noisy, sigma, settings.prediction, variance_2C)
        error = (velocity - (noise - own)).square().mean(1)
        inside = region[clip]
        by_region = (error * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)
        for value, target in ((by_region, sums[0]), (error.mean((1, 2, 3)), sums[1])):
            target.index_put_((clip, other % (count + 1)), value.cpu(), accumulate=True)
    means = sums / len(sigmas)
    if references != "all":
        seen = torch.zeros(count, count + 1, dtype=torch.bool)
        for i, j in whose:
            seen[i, j] = True
        seen[:, count] = True
        means[:, ~seen] = torch.nan
    return PairedErrors(means[0, :, :count], means[0, :, count], means[1, :, :count], means[1, :, count])


# --- generated frames -------------------------------------------------------------------------------------------------


def spatial_autocorrelation(frames: np.ndarray) -> float:
    """Correlation of neighbouring pixels of uint8 (F, H, W, 3); natural video above 0.8, noise about 0."""
    x = frames.astype(np.float64)
    x = x - x.mean((1, 2), keepdims=True)
    power = (x * x).mean() + 1e-9
    return float(((x[:, 1:] * x[:, :-1]).mean() + (x[:, :, 1:] * x[:, :, :-1]).mean()) / (2 * power))


def motion(frames: np.ndarray) -> dict[str, float]:
    """Mean absolute difference of neighbouring frames, grey levels, and its variance over time (lower is smoother)."""
    steps = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean((1, 2, 3))
    return {
        "motion": float(steps.mean()) if len(steps) else 0.0,
        "motion_variance": float(steps.var()) if len(steps) else 0.0,
    }


def foreground_area(frames: np.ndarray, background: np.ndarray) -> float:
    """Mean share of pixels that differ from the background."""
    return float((np.abs(frames.astype(np.int16) - background.astype(np.int16)).max(-1) > FOREGROUND_LEVELS).mean())


def colour_histogram(pixels: np.ndarray) -> np.ndarray:
    """Share of pixels (M, 3) uint8 in each of 6 x 6 x 6 colour cells; each is spread over its neighbouring cells."""
    place = pixels.astype(np.float64) / 255 * (_COLOUR_BINS - 1)
    low = np.clip(np.floor(place).astype(int), 0, _COLOUR_BINS - 2)
    part = place - low
    table = np.zeros((_COLOUR_BINS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        share = np.prod(np.where(np.array(corner) == 1, part, 1 - part), axis=1)
        np.add.at(table, tuple((low + np.array(corner)).T), share)
    return (table / max(1, len(pixels))).ravel()


def colour_likeness(frames: np.ndarray, background: np.ndarray, subject: np.ndarray) -> float:
    """Overlap (0 to 1) of the colours of a video's foreground with those of a subject's pixels (M, 3)."""
    different = np.abs(frames.astype(np.int16) - background.astype(np.int16)).max(-1) > FOREGROUND_LEVELS
    pixels = frames[different]
    if len(pixels) == 0 or len(subject) == 0:
        return 0.0
    return float(np.sqrt(colour_histogram(pixels) * colour_histogram(subject)).sum())


def subject_pixels(picture: np.ndarray) -> np.ndarray:
    """The pixels (M, 3) of a reference picture (H, W, 3) uint8 that are not its white ground."""
    return picture[(picture < 245).any(-1)]
