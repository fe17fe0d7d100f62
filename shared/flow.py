"""Linear probability paths, time distributions, ODE solvers and guidance.

One formula serves both time conventions: the caller says which end is noise. Shapes: B batch, then any.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from shared.errors import UserError


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


# --- ODE solvers: dx/dt = velocity(x, t), from times[0] to times[-1] in either direction ---

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t_B (B,) in x's dtype) -> dx/dt, shaped like x
FIXED_GRID = ("euler", "heun", "midpoint", "rk4")  # one step an interval of the grid; dopri5 chooses its own steps


def integrate(
    velocity: Velocity, start: Tensor, times: Tensor, method: str = "euler", *, atol: float = 1e-6, rtol: float = 1e-3
) -> Tensor:
    """x at times[-1], solved from start (B, ...) at times[0] along a strictly monotone grid.

    euler has order 1 and one evaluation an interval; heun (slopes of both ends) and midpoint (slope half way) order 2
    and two; rk4 order 4 and four. dopri5 looks at the two ends of the grid only and chooses its steps so that the error
    of each, root mean square over the batch, stays below atol + rtol |x|. Any other name is a solver of torchdiffeq.
    ValueError for a grid that is not monotone; UserError for an unknown solver, and where dopri5 needs too many steps.
    """
    differences = times[1:] - times[:-1]
    if len(times) < 2 or not (bool((differences > 0).all()) or bool((differences < 0).all())):
        raise ValueError(f"the time grid must have two or more strictly monotone points, got {times.tolist()[:8]}")
    if method == "dopri5":
        return _dopri5(velocity, start, times[0].item(), times[-1].item(), atol=atol, rtol=rtol)
    if method in FIXED_GRID:
        x, points = start, times.tolist()
        for now, then in zip(points[:-1], points[1:], strict=True):
            x = x + (then - now) * _mean_slope(velocity, x, now, then, method)
        return x
    check_solver(method)
    from torchdiffeq import odeint

    def slope(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.to(x.dtype).expand(len(x)))

    return odeint(slope, start, times.to(start.device), method=method, atol=atol, rtol=rtol)[-1]


def check_solver(method: str) -> None:
    """UserError unless `integrate` knows the method; to be called before anything expensive."""
    if method in (*FIXED_GRID, "dopri5"):
        return
    own = f"{', '.join(FIXED_GRID)} or dopri5"
    try:
        from torchdiffeq._impl.odeint import SOLVERS
    except ImportError:
        raise UserError(
            f"ODE method {method!r} is not one of {own}; torchdiffeq has more: pip install torchdiffeq"
        ) from None
    if method not in SOLVERS:
        raise UserError(f"ODE method {method!r} is unknown; use {own}, or torchdiffeq's {', '.join(SOLVERS)}")


def _mean_slope(velocity: Velocity, x: Tensor, now: float, then: float, method: str) -> Tensor:
    """The slope that carries x from `now` to `then` in one step."""
    step = then - now
    first = velocity(x, _times(x, now))
    if method == "euler":
        return first
    if method == "heun":
        return (first + velocity(x + step * first, _times(x, then))) / 2
    if method == "midpoint":
        return velocity(x + step / 2 * first, _times(x, now + step / 2))
    # Kutta's 3/8 rule, not the classic weights: it is what "rk4" means in torchdiffeq, and so in SiT and in FLOAT.
    second = velocity(x + step / 3 * first, _times(x, now + step / 3))
    third = velocity(x + step * (second - first / 3), _times(x, now + 2 * step / 3))
    fourth = velocity(x + step * (first - second + third), _times(x, then))
    return (first + 3 * (second + third) + fourth) / 8


# Dormand and Prince 1980: nodes, stages, and the difference between the weights of fifth and of fourth order.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _dopri5(velocity: Velocity, x: Tensor, t: float, end: float, *, atol: float, rtol: float) -> Tensor:
    span, limit = end - t, 1000
    step, first = 0.05 * span, velocity(x, _times(x, t))
    for _ in range(limit):
        last = abs(step) >= abs(end - t)
        step = end - t if last else step
        slopes, at = [first], x
        for node, weights in zip(_NODES, _STAGES, strict=True):
            at = x + step * _weighted(weights, slopes)
            slopes.append(velocity(at, _times(x, t + node * step)))
        # The last stage stands at the solution of fifth order, so its slope is the next step's first.
        allowed = atol + rtol * torch.maximum(x.abs(), at.abs())
        ratio = (step * _weighted(_ERROR, slopes) / allowed).square().mean().sqrt().item()
        if ratio <= 1:
            x, t, first = at, t + step, slopes[-1]
            if last:
                return x
        step *= min(10.0, max(0.2, 0.9 * max(ratio, 1e-10) ** -0.2))
    raise UserError(
        f"dopri5 needed more than {limit} steps (at t = {t:.3f}, tolerances {atol:g} and {rtol:g}); "
        "use larger tolerances, or heun with 50 steps"
    )


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        total = total + weight * slope if weight else total
    return total


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


# --- guidance and condition dropout ---


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Guidance: unconditional + scale (conditional - unconditional); Ho and Salimans 2022, eq. 6, scale = 1 + w."""
    return unconditional + scale * (conditional - unconditional)


def drop_per_sample(condition: Tensor, null: Tensor, drop_B: Tensor) -> Tensor:
    """Replace the rows of `condition` (B, ...) where drop_B (B,) is True by `null` (broadcast over the batch)."""
    return torch.where(expand_like(drop_B, condition), null.to(condition.dtype), condition)
