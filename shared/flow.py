"""Linear probability paths, time distributions, ODE solvers and guidance.

One formula serves both time conventions: the caller says which end is noise. Shapes: B batch, then any.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def expand_like(value_B: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many axes as `like`."""
    return value_B.reshape(-1, *[1] * (like.ndim - 1))


def linear_path(start: Tensor, end: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) start + t end and its velocity end - start (Liu et al. 2022, eq. 1).

    start, end: (B, ...) float32; t_B: (B,) in [0, 1]. Returns (x_t, velocity), both (B, ...).
    """
    t = expand_like(t_B, start).to(start.dtype)
    return torch.lerp(start, end, t.expand_as(start)), end - start


def sample_times(
    distribution: Literal["uniform", "logit_normal"], uniform_B: Tensor, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Times in (0, 1), shape (B,), from uniform draws in [0, 1).

    logit_normal: sigmoid(mean + std n) with n standard normal (Esser et al. 2024, eq. 19); n is the normal quantile of
    the uniform draw.
    """
    if distribution == "uniform":
        return uniform_B
    if distribution != "logit_normal":
        raise ValueError(f"distribution {distribution!r} is not one of uniform, logit_normal")
    inside_B = uniform_B.double().clamp(1e-7, 1 - 1e-7)
    return torch.sigmoid(mean + std * torch.special.ndtri(inside_B)).to(uniform_B.dtype)


def shift_noise_level(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma), sigma = 1 is noise (Esser et al. 2024, eq. 23); s = 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def time_grid(
    steps: int, *, start: float = 0.0, end: float = 1.0, shift: float = 1.0, noise_at: Literal["start", "end"] = "start"
) -> Tensor:
    """steps + 1 monotone times from start to end, float64, shifted towards the noisy end; `steps` counts intervals."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    fraction = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if noise_at == "start":
        fraction = 1 - shift_noise_level(1 - fraction, shift)
    else:
        fraction = shift_noise_level(fraction, shift)
    return start + (end - start) * fraction


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    times: Tensor,
    method: Literal["euler", "heun", "midpoint"] = "euler",
) -> Tensor:
    """Solve dx/dt = velocity(x, t) along a monotone grid (either direction).

    velocity(x, t_B) takes x (B, ...) and t_B (B,) in x's dtype; start: (B, ...) at times[0]. Returns x at times[-1].
    euler is first order; heun averages the slopes of both ends; midpoint uses the slope half way (second order both).
    """
    differences = times[1:] - times[:-1]
    if len(times) < 2 or not (bool((differences > 0).all()) or bool((differences < 0).all())):
        raise ValueError(f"the time grid must have two or more strictly monotone points, got {times.tolist()[:8]}")
    if method not in ("euler", "heun", "midpoint"):
        raise ValueError(f"method {method!r} is not one of euler, heun, midpoint")

    def slope(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))

    x, points = start, times.tolist()
    for now, then in zip(points[:-1], points[1:], strict=True):
        step = then - now
        first = slope(x, now)
        if method == "euler":
            x = x + step * first
        elif method == "heun":
            x = x + step / 2 * (first + slope(x + step * first, then))
        else:
            x = x + step * slope(x + step / 2 * first, now + step / 2)
    return x


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Guidance: unconditional + scale (conditional - unconditional); Ho and Salimans 2022, eq. 6, scale = 1 + w."""
    return unconditional + scale * (conditional - unconditional)


def drop_per_sample(condition: Tensor, null: Tensor, drop_B: Tensor) -> Tensor:
    """Replace the rows of `condition` (B, ...) where drop_B (B,) is True by `null` (broadcast over the batch)."""
    return torch.where(expand_like(drop_B, condition), null.to(condition.dtype), condition)
