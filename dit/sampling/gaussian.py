"""The noise-prediction diffusion of the public DiT: tables, learned variance and its bound, ancestral steps.

The ordinary training path uses diffusers' schedulers (objective.py); this file is what they lack: the variational
bound of models with a learned variance, and sampling on a subset of the steps as the public weights were evaluated. Ho
et al. 2020 (arXiv 2006.11239); Nichol and Dhariwal 2021 (arXiv 2102.09672), equations 9 to 16. x is data at t = -1.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.flow import expand_like

Target = Literal["epsilon", "sample"]  # what the first channels of an output are


def kept_timesteps(total: int, count: int) -> list[int]:
    """`count` steps of `total` that a sampler visits, ascending, evenly, both ends included."""
    gap = 1.0 if count == 1 else (total - 1) / (count - 1)
    return sorted({round(index * gap) for index in range(count)})


class Moments(NamedTuple):
    """Mean, variance and log variance of the step to t - 1, and the clean latent that the model predicts."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    clean: Tensor


class GaussianDiffusion:
    """Tables in float64 for the steps kept; `timesteps` maps a table index to the time that the model is given."""

    def __init__(self, betas: Tensor, timesteps: list[int] | None = None) -> None:
        full = torch.cumprod(1 - betas.double(), 0)
        self.timesteps = torch.arange(len(betas)) if timesteps is None else torch.tensor(timesteps)
        self.alphas_cumprod = full[self.timesteps]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.alphas_cumprod_previous = previous
        self.betas = 1 - self.alphas_cumprod / previous
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        clipped = self.posterior_variance.clone()
        clipped[0] = clipped[min(1, len(clipped) - 1)]  # the first entry is 0, its logarithm is not finite
        self.posterior_log_variance_clipped = clipped.log()
        self.posterior_mean_coef1 = self.betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - previous) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    def at(self, table: Tensor, t_B: Tensor, like: Tensor) -> Tensor:
        """Entries of a table as float32, shaped to broadcast over `like`."""
        return expand_like(table.to(t_B.device)[t_B].float(), like)

    def posterior_mean(self, clean: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, clean)."""
        return self.at(self.posterior_mean_coef1, t_B, x_t) * clean + self.at(self.posterior_mean_coef2, t_B, x_t) * x_t

    def moments(self, output: Tensor, x_t: Tensor, t_B: Tensor, *, target: Target = "epsilon") -> Moments:
        """p(x_{t-1} | x_t). With twice the channels of x_t, the second half interpolates the log variance (eq. 15);
        otherwise the variance is beta, with the posterior's at the first step."""
        channels = x_t.shape[1]
        if output.shape[1] == 2 * channels:
            output, fraction = output.split(channels, dim=1)
            fraction = (fraction + 1) / 2
            low, high = self.at(self.posterior_log_variance_clipped, t_B, x_t), self.at(self.betas.log(), t_B, x_t)
            log_variance = fraction * high + (1 - fraction) * low
            variance = log_variance.exp()
        else:
            table = self.betas.clone()
            table[0] = self.posterior_variance[min(1, len(table) - 1)]
            variance = self.at(table, t_B, x_t).expand_as(x_t)
            log_variance = self.at(table.log(), t_B, x_t).expand_as(x_t)
        clean = output if target == "sample" else self.clean_from_noise(output, x_t, t_B)
        return Moments(self.posterior_mean(clean, x_t, t_B), variance, log_variance, clean)

    def clean_from_noise(self, noise: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """x_t without the predicted noise, scaled to data."""
        a = self.alphas_cumprod
        return self.at(a.rsqrt(), t_B, x_t) * x_t - self.at((1 / a - 1).sqrt(), t_B, x_t) * noise

    def variational_bound(
        self,
        output: Tensor,
        clean: Tensor,
        x_t: Tensor,
        t_B: Tensor,
        *,
        target: Target = "epsilon",
    ) -> Tensor:
        """Per-sample bound in bits a dimension (B,), gradients through the variance only: KL to the posterior, and the
        likelihood of 8-bit data at t = 0. No factor total / 1000."""
        channels = x_t.shape[1]
        frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)
        model = self.moments(frozen, x_t, t_B, target=target)
        true_mean = self.posterior_mean(clean, x_t, t_B)
        true_log_variance = self.at(self.posterior_log_variance_clipped, t_B, x_t)
        kl = 0.5 * (
            model.log_variance
            - true_log_variance
            - 1
            + (true_log_variance - model.log_variance).exp()
            + (true_mean - model.mean).square() * (-model.log_variance).exp()
        )
        likelihood = -discretized_log_likelihood(clean, model.mean, 0.5 * model.log_variance)
        bits = torch.where(expand_like(t_B == 0, x_t), likelihood, kl) / math.log(2.0)
        return bits.flatten(1).mean(1)

    def sample(
        self, model: Callable[[Tensor, Tensor], Tensor], start: Tensor, draw: Callable[[int], Tensor], target: Target
    ) -> Tensor:
        """From noise to data over the kept steps, with noise draw(k) in each but the last.

        model(x, t_B) is given the original times. The latent is never clipped: latents do not lie in [-1, 1].
        """
        x = start
        for k, index in enumerate(reversed(range(len(self.betas)))):
            t_B = torch.full((len(x),), index, dtype=torch.long, device=x.device)
            step = self.moments(model(x, self.timesteps.to(x.device)[t_B]), x, t_B, target=target)
            x = step.mean if index == 0 else step.mean + (0.5 * step.log_variance).exp() * draw(k)
        return x


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of 8-bit values spread over [-1, 1] under a normal distribution (CDF in tanh form)."""

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    inverse = (-log_scale).exp()
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    middle = (above - below).clamp_min(1e-12).log()
    lowest, highest = above.clamp_min(1e-12).log(), (1 - below).clamp_min(1e-12).log()
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, middle))
