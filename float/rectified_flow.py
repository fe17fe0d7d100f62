"""Rectified flow on motion latents (Liu et al. 2022; Lipman et al. 2022): path, losses, sampling.

t = 0 is noise, t = 1 is data. Shapes: B batch, L frames of the window, P frames before it, d motion width.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.flow import expand_like, integrate, sample_times

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, t_B) -> velocity of the same shape as x
FIXED_GRID = ("euler", "midpoint", "heun", "rk4")
HUBER_DELTA = 1.0


class RectifiedFlow:
    """The probability path between noise and data, and the solver that walks along it.

    x_t = (sigma_max + (sigma_min - sigma_max) t) x_0 + t x_1,  v = x_1 + (sigma_min - sigma_max) x_0;
    with sigma_min 0 and sigma_max 1 this is x_t = (1 - t) x_0 + t x_1, v = x_1 - x_0.
    """

    def __init__(
        self,
        *,
        sigma_min: float = 0.0,
        sigma_max: float = 1.0,
        time_sampling: Literal["uniform", "logit_normal"] = "uniform",
    ):
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(f"sigma_min {sigma_min} must be at least 0 and below sigma_max {sigma_max}")
        self.sigma_min, self.sigma_max, self.time_sampling = sigma_min, sigma_max, time_sampling

    def interpolate(self, noise: Tensor, data: Tensor, t_B: Tensor) -> Tensor:
        """x_t between noise x_0 and data x_1, both (B, ...); t (B,) in [0, 1]."""
        t = expand_like(t_B, data).to(data.dtype)
        return (self.sigma_max + (self.sigma_min - self.sigma_max) * t) * noise + t * data

    def target_velocity(self, noise: Tensor, data: Tensor) -> Tensor:
        """dx_t/dt, constant along the path."""
        return data + (self.sigma_min - self.sigma_max) * noise

    def times(self, uniform_B: Tensor) -> Tensor:
        """Training times (B,) from uniform draws in [0, 1)."""
        return sample_times(self.time_sampling, uniform_B)

    def sample_time(self, batch: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Training times (batch,) from torch's random numbers."""
        return self.times(torch.rand(batch, generator=generator))

    def sample_ode(
        self,
        velocity: Velocity,
        noise: Tensor,
        *,
        nfe: int = 10,
        steps: int | None = None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
    ) -> Tensor:
        """Solve dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1.

        nfe counts time points as the released sampler does: nfe 10 is 9 steps of 1/9. `steps` counts steps and
        overrides nfe. method: euler, midpoint, heun, rk4 on that grid; any other name goes to torchdiffeq with atol and
        rtol.
        """
        intervals = nfe - 1 if steps is None else steps
        if intervals < 1:
            raise ValueError("nfe counts time points and must be at least 2 (steps at least 1)")
        times = torch.linspace(0, 1, intervals + 1)
        if self.sigma_max != 1.0:
            noise = self.sigma_max * noise
        if method == "rk4":
            return _rk4(velocity, noise, times.tolist())
        if method in FIXED_GRID:
            return integrate(velocity, noise, times, method)
        return _solve_adaptive(velocity, noise, times, method, atol, rtol)


def _rk4(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    """The classic tableau, fourth order, four evaluations a step."""

    def slope(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))

    for now, then in zip(times[:-1], times[1:], strict=True):
        step, middle = then - now, (now + then) / 2
        first = slope(x, now)
        second = slope(x + step / 2 * first, middle)
        third = slope(x + step / 2 * second, middle)
        x = x + step / 6 * (first + 2 * second + 2 * third + slope(x + step * third, then))
    return x


def _solve_adaptive(velocity: Velocity, x: Tensor, times: Tensor, method: str, atol: float, rtol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UserError(
            f"ODE method {method!r} needs torchdiffeq; run: pip install torchdiffeq, "
            f"or use one of {', '.join(FIXED_GRID)}"
        ) from None

    def slope(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.to(x.dtype).expand(len(x)))

    return odeint(slope, x, times.to(x.device), method=method, atol=atol, rtol=rtol)[-1]


def _pointwise(loss_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss per element of a named kind."""
    named = {
        "mse": lambda output, target: (output - target).square(),
        "l1": lambda output, target: (output - target).abs(),
        "huber": lambda output, target: F.huber_loss(output, target, reduction="none", delta=HUBER_DELTA),
    }
    if loss_type not in named:
        raise ValueError(f"loss_type {loss_type!r} is not one of {', '.join(named)} and no module")
    return named[loss_type]


class RectifiedFlowLoss(nn.Module):
    """lambda_ot |v^ - v| + lambda_vel |Dv^ - Dv| + prev_loss_weight |previous^ - previous|, each a mean per sample.

    D is the difference of neighbouring frames (FLOAT equation 9). loss_type: mse, l1, huber, or a module with
    forward(model_output, target) -> tensor; a tensor whose first axis is the batch is averaged per sample, a scalar is
    used as it is.
    """

    def __init__(
        self,
        loss_type: str | nn.Module = "mse",
        *,
        lambda_ot: float = 1.0,
        lambda_vel: float = 1.0,
        prev_loss_weight: float = 0.0,
    ):
        super().__init__()
        self.distance = loss_type if isinstance(loss_type, nn.Module) else _pointwise(loss_type)
        self.lambda_ot, self.lambda_vel, self.prev_loss_weight = lambda_ot, lambda_vel, prev_loss_weight

    def _per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        distance = self.distance(output.float(), target.float())
        if distance.ndim == 0:
            return distance.expand(len(output))
        return distance.flatten(1).mean(1) if distance.ndim > 1 else distance

    def forward(
        self,
        model_output: Tensor,
        target: Tensor,
        *,
        prev_target: Tensor | None = None,
        prev_valid_B: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """-> loss, loss_flow, loss_vel, loss_prev (scalars) and loss_B, the total per sample.

        model_output: (B, P + L, d) or (B, L, d); target: velocity (B, L, d). prev_target: clean previous motion (B, P,
        d); prev_valid_B: rows whose previous motion was given to the model (not dropped, and not before the clip's
        start).
        """
        frames = target.shape[1]
        current = model_output[:, -frames:]
        flow_B = self._per_sample(current, target)
        if frames > 1:
            vel_B = self._per_sample(current.diff(dim=1), target.diff(dim=1))
        else:
            vel_B = torch.zeros_like(flow_B)
        prev_B = torch.zeros_like(flow_B)
        if prev_target is not None and self.prev_loss_weight > 0:
            prev_B = self._per_sample(model_output[:, :-frames], prev_target)
            if prev_valid_B is not None:
                prev_B = prev_B * prev_valid_B
        loss_B = self.lambda_ot * flow_B + self.lambda_vel * vel_B + self.prev_loss_weight * prev_B
        return {
            "loss": loss_B.mean(),
            "loss_flow": flow_B.mean(),
            "loss_vel": vel_B.mean(),
            "loss_prev": prev_B.mean(),
            "loss_B": loss_B,
        }
