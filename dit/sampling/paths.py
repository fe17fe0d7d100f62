"""Probability paths between noise and data, and the conversions between what a network may predict on them.

Convention of this system (as SiT, Ma et al. 2024, arXiv 2401.08740): t = 0 is noise, t = 1 is data,
x_t = alpha(t) data + sigma(t) noise, velocity = dx_t / dt. REPA, SD3, Flux and diffusers run the other way: their sigma
is 1 - t here, their velocity the negative.
Shapes: B batch; every coefficient is shaped to broadcast over a latent.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.flow import expand_like, linear_path

PathName = Literal["linear", "gvp", "vp"]
Prediction = Literal["velocity", "noise", "score", "clean"]
Weighting = Literal["none", "velocity", "likelihood"]
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


class Coefficients(NamedTuple):
    """alpha (of the data), sigma (of the noise) and their derivatives in t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def coefficients(path: PathName, t: Tensor) -> Coefficients:
    """linear: alpha = t, sigma = 1 - t. gvp: sine and cosine. vp: the variance preserving diffusion, run backwards."""
    if path == "linear":
        return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
    if path == "gvp":
        angle = t * math.pi / 2
        return Coefficients(angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin())
    spread = VP_BETA_MAX - VP_BETA_MIN
    log_alpha = -0.25 * (1 - t) ** 2 * spread - 0.5 * (1 - t) * VP_BETA_MIN
    d_log_alpha = 0.5 * (1 - t) * spread + 0.5 * VP_BETA_MIN
    alpha, sigma = log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))
    return Coefficients(alpha, sigma, alpha * d_log_alpha, -(alpha**2) * d_log_alpha / sigma)


def interpolate(path: PathName, noise: Tensor, data: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, velocity) for noise and data (B, ...) at t (B,)."""
    if path == "linear":
        return linear_path(start=noise, end=data, t_B=t_B)
    c = coefficients(path, expand_like(t_B, data))
    return c.alpha * data + c.sigma * noise, c.d_alpha * data + c.d_sigma * noise


def _volatility(c: Coefficients) -> Tensor:
    """sigma (sigma alpha'/alpha - sigma'): the score's factor in the velocity, half the SDE's squared diffusion."""
    return c.sigma * (c.sigma * c.d_alpha / c.alpha - c.d_sigma)


def to_velocity(
    path: PathName, prediction: Prediction, output: Tensor, x_t: Tensor, t_B: Tensor, *, least: float = 0.0
) -> Tensor:
    """The velocity that a network's output stands for.

    `least` is the smallest sigma (for "clean") or alpha (for "noise" and "score") that is divided by, where the path
    has ends.
    """
    if prediction == "velocity":
        return output
    c = coefficients(path, expand_like(t_B, x_t))
    if prediction == "clean":  # x_t - alpha x1 = sigma x0, velocity = alpha' x1 + sigma' x0
        return c.d_alpha * output + c.d_sigma * (x_t - c.alpha * output) / c.sigma.clamp_min(least)
    c = c._replace(alpha=c.alpha.clamp_min(least))
    score = output if prediction == "score" else -output / c.sigma.clamp_min(1e-8)
    return c.d_alpha / c.alpha * x_t + _volatility(c) * score


def score_from_velocity(path: PathName, velocity: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """Gradient of the log density at x_t; written without a division by alpha, which is 0 at t = 0."""
    c = coefficients(path, expand_like(t_B, x_t))
    ratio = c.alpha / c.d_alpha
    return (ratio * velocity - x_t) / (c.sigma * (c.sigma - ratio * c.d_sigma))


def noise_from_velocity(path: PathName, velocity: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The noise end of the path through x_t with this velocity."""
    c = coefficients(path, expand_like(t_B, x_t))
    ratio = c.alpha / c.d_alpha
    return (ratio * velocity - x_t) / (ratio * c.d_sigma - c.sigma)


def clean_from_velocity(path: PathName, velocity: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The data end of the path through x_t with this velocity."""
    c = coefficients(path, expand_like(t_B, x_t))
    return (c.sigma * velocity - c.d_sigma * x_t) / (c.sigma * c.d_alpha - c.d_sigma * c.alpha)


def squared_error(
    path: PathName,
    prediction: Prediction,
    output: Tensor,
    x_t: Tensor,
    velocity: Tensor,
    noise: Tensor,
    t_B: Tensor,
    *,
    weighting: Weighting = "none",
    least: float = 0.05,
) -> Tensor:
    """Per-sample loss (B,), float32, mean over all but the batch.

    velocity and clean are measured as velocities; noise and score as SiT does, weighted by nothing, by velocity
    ((volatility / sigma)^2) or by likelihood (volatility / sigma^2).
    """
    output = output.float()
    if prediction in ("velocity", "clean"):
        return (to_velocity(path, prediction, output, x_t, t_B, least=least) - velocity).square().flatten(1).mean(1)
    c = coefficients(path, expand_like(t_B, x_t))
    volatility = _volatility(c)
    weight = {
        "none": torch.ones_like(c.sigma),
        "velocity": (volatility / c.sigma) ** 2,
        "likelihood": volatility / c.sigma**2,
    }[weighting]
    error = output - noise if prediction == "noise" else output * c.sigma + noise
    return (weight * error.square()).flatten(1).mean(1)


def euler_maruyama(
    velocity: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    path: PathName = "linear",
    steps: int = 250,
    last_step: float = 0.04,
    draw: Callable[[int], Tensor],
) -> Tensor:
    """Solve the reverse SDE with diffusion w(t) = sigma(t): `steps` - 1 noisy steps up to 1 - last_step, then one of
    the mean.

    velocity(x, t_B); draw(k) gives the noise of step k, shaped like start. The "SBDM" diffusion divides by t and is
    not offered.
    """
    times = torch.linspace(0, 1 - last_step, steps, dtype=torch.float64).tolist()

    def drift(x: Tensor, t: float) -> tuple[Tensor, float]:
        t_B = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        slope = velocity(x, t_B)
        w = float(coefficients(path, torch.tensor(t, dtype=torch.float64)).sigma)
        return slope + w * score_from_velocity(path, slope, x, t_B), w

    x = start
    for k, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        slope, w = drift(x, now)
        x = x + (then - now) * slope + math.sqrt(2 * w * (then - now)) * draw(k)
    return x + last_step * drift(x, times[-1])[0]
