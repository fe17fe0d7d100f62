"""Walking along a velocity field from noise to data: fixed grids here, adaptive methods by torchdiffeq."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from shared.errors import UserError
from shared.flow import integrate

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, t_B) -> velocity of the same shape as x
INTEGRATED: dict[str, Literal["euler", "midpoint", "heun"]] = {"euler": "euler", "midpoint": "midpoint", "heun": "heun"}
FIXED_GRID = (*INTEGRATED, "rk4")


def solve_ode(
    velocity: Velocity,
    noise: Tensor,
    *,
    nfe: int = 10,
    steps: int | None = None,
    method: str = "euler",
    atol: float = 1e-5,
    rtol: float = 1e-5,
) -> Tensor:
    """dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1; noise (B, ...).

    nfe counts time points as the released sampler does: nfe 10 is 9 steps of 1/9. `steps` counts steps and overrides
    nfe. method: euler, midpoint, heun, rk4 on that grid; any other name goes to torchdiffeq with atol and rtol.
    """
    intervals = nfe - 1 if steps is None else steps
    if intervals < 1:
        raise ValueError("nfe counts time points and must be at least 2 (steps at least 1)")
    times = torch.linspace(0, 1, intervals + 1)
    if method == "rk4":
        return _rk4(velocity, noise, times.tolist())
    if method in INTEGRATED:
        return integrate(velocity, noise, times, INTEGRATED[method])
    return _solve_adaptive(velocity, noise, times, method, atol, rtol)


def _rk4(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    """Kutta's 3/8 rule, of fourth order: what torchdiffeq, and with it the released tool, calls rk4."""

    def slope(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))

    for now, then in zip(times[:-1], times[1:], strict=True):
        step = then - now
        first = slope(x, now)
        second = slope(x + step / 3 * first, now + step / 3)
        third = slope(x + step * (second - first / 3), now + step * 2 / 3)
        fourth = slope(x + step * (first - second + third), then)
        x = x + step / 8 * (first + 3 * (second + third) + fourth)
    return x


def _solve_adaptive(velocity: Velocity, x: Tensor, times: Tensor, method: str, atol: float, rtol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
        from torchdiffeq._impl.odeint import SOLVERS
    except ImportError:
        raise UserError(
            f"ODE method {method!r} needs torchdiffeq; run: pip install torchdiffeq, "
            f"or use one of {', '.join(FIXED_GRID)}"
        ) from None
    if method not in SOLVERS:
        others = ", ".join(name for name in SOLVERS if name not in FIXED_GRID)
        raise UserError(f"ODE method {method!r} is not known; use {', '.join(FIXED_GRID)}, or of torchdiffeq {others}")

    def slope(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.to(x.dtype).expand(len(x)))

    return odeint(slope, x, times.to(x.device), method=method, atol=atol, rtol=rtol)[-1]
