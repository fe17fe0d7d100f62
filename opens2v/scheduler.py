"""Flow matching on Wan's shifted table of 1000 noise levels. sigma = 1 is noise; the velocity points from data to
noise.
"""

import torch
from torch import Tensor

from shared.flow import expand_like, linear_path, shift_noise_level


class FlowMatchScheduler:
    """sigmas, timesteps (1000 sigma) and loss weights of training, and the grid of sampling.

    sigma = s u / (1 + (s - 1) u) with u = 1, 0.999, ..., 0.001.
    weight = exp(-2 ((t - 500) / 1000)^2), less its minimum, scaled to mean 1.
    A timestep that is not in the table takes the values of its nearest neighbour.
    """

    def __init__(
        self,
        shift: float = 5.0,
        sigma_min: float = 0.0,
        extra_one_step: bool = True,
        num_train_timesteps: int = 1000,
    ):
        self.shift, self.sigma_min, self.extra_one_step = shift, sigma_min, extra_one_step
        self.num_train_timesteps = num_train_timesteps
        self.sigmas = self.inference_sigmas(num_train_timesteps)
        self.timesteps = self.sigmas * num_train_timesteps
        bell = torch.exp(-2 * ((self.timesteps - num_train_timesteps / 2) / num_train_timesteps) ** 2)
        bell = bell - bell.min()
        self.weights = bell * (num_train_timesteps / bell.sum())

    def inference_sigmas(self, steps: int) -> Tensor:
        """`steps` noise levels from 1 downwards, float32, without the closing 0."""
        if steps < 1:
            raise ValueError(f"steps is {steps}; at least 1 is needed")
        if self.extra_one_step:
            grid = torch.linspace(1.0, self.sigma_min, steps + 1)[:-1]
        else:
            grid = torch.linspace(1.0, self.sigma_min, steps)
        return shift_noise_level(grid, self.shift)

    def inference_timesteps(self, steps: int) -> Tensor:
        """1000 times inference_sigmas."""
        return self.inference_sigmas(steps) * self.num_train_timesteps

    def index_of(self, timestep: Tensor) -> Tensor:
        """The table position nearest to each timestep."""
        table = self.timesteps.to(timestep.device)
        return (table - timestep.float().unsqueeze(-1)).abs().argmin(-1)

    def sigma_of(self, timestep: Tensor) -> Tensor:
        """The noise level of each timestep, float32."""
        return self.sigmas.to(timestep.device)[self.index_of(timestep)]

    def weight_of(self, timestep: Tensor) -> Tensor:
        """The loss weight of each timestep."""
        return self.weights.to(timestep.device)[self.index_of(timestep)]

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t = (1 - sigma) x0 + sigma noise. clean (B, ...); timestep (B,), or (B, F) for clean (B, C, F, h, w)."""
        sigma = self.sigma_of(timestep)
        if timestep.ndim == 1:
            return linear_path(clean, noise, sigma)[0]
        sigma = sigma[:, None, :, None, None]
        return (1 - sigma) * clean + sigma * noise

    @staticmethod
    def target(clean: Tensor, noise: Tensor) -> Tensor:
        """The velocity noise - x0."""
        return noise - clean

    def clean_of(self, noisy: Tensor, velocity: Tensor, timestep: Tensor) -> Tensor:
        """x0 = x_t - sigma v; timestep (B,)."""
        return noisy - expand_like(self.sigma_of(timestep), noisy) * velocity

    def step(self, velocity: Tensor, sample: Tensor, sigma: float, next_sigma: float) -> Tensor:
        """One Euler step, x + v (sigma_next - sigma)."""
        return sample + velocity * (next_sigma - sigma)


def velocity_of(
    output: Tensor, noisy: Tensor, sigma: Tensor, prediction: str, variance_C: Tensor | None = None
) -> Tensor:
    """The velocity of a network's output F: F itself, or for prediction "preconditioned"

        v = ((sigma - a V) x_t - sqrt(V) sqrt(d) F) / d,   a = 1 - sigma,   d = a^2 V + sigma^2.

    Then F = 0 is the best linear denoiser of channels with variance V, and the F that is wanted has variance 1 at every
    noise level (the preconditioning of Karras et al. 2022 on the linear path, by channel). A small network that gives
    the velocity itself leaves noise in weak channels.

    output, noisy: (B, C, F, h, w); sigma: (B,) or (B, F); variance_C: (C,), for "preconditioned".
    """
    if prediction == "velocity":
        return output
    if variance_C is None:
        raise ValueError('prediction "preconditioned" needs the variances of the latent channels')
    sigma = expand_like(sigma, noisy) if sigma.ndim == 1 else sigma[:, None, :, None, None]
    variance, rest = variance_C.to(noisy)[:, None, None, None], 1 - sigma
    total = rest.square() * variance + sigma.square()
    return (sigma - rest * variance) / total * noisy - (variance / total).sqrt() * output.to(noisy.dtype)
