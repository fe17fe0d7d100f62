"""Flow matching on Wan's shifted table of noise levels. sigma = 1 is noise; the velocity points to noise."""

import torch
from torch import Tensor

from shared.flow import expand_like, linear_path, shift_noise_level

TIMESTEP_OF_NOISE = 1000.0  # Wan's networks are given 1000 sigma, however many entries the table has


class FlowMatchScheduler:
    """sigmas, timesteps (1000 sigma) and loss weights of training, and the grid of sampling.

    num_train_timesteps: entries of the table that training draws from. sigma_min, extra_one_step: as Wan's own class
    has them, the last level (before the shift) and whether it is left out.

    sigma = s u / (1 + (s - 1) u) with u = 1, 0.999, ..., 0.001 for 1000 entries.
    weight = exp(-2 ((t - 500) / 1000)^2), less its minimum, scaled to mean 1.
    A timestep that is not in the table takes the values of its nearest neighbour.
    """

    def __init__(
        self, shift: float = 5.0, sigma_min: float = 0.0, extra_one_step: bool = True, num_train_timesteps: int = 1000
    ):
        self.shift, self.sigma_min, self.extra_one_step = shift, sigma_min, extra_one_step
        self.num_train_timesteps = num_train_timesteps
        self.sigmas = self.inference_sigmas(num_train_timesteps)
        self.timesteps = self.sigmas * TIMESTEP_OF_NOISE
        bell = torch.exp(-2 * ((self.timesteps - TIMESTEP_OF_NOISE / 2) / TIMESTEP_OF_NOISE) ** 2)
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
        return self.inference_sigmas(steps) * TIMESTEP_OF_NOISE

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

    def step(self, velocity: Tensor, sample: Tensor, sigma: float, next_sigma: float) -> Tensor:
        """One Euler step, x + v (sigma_next - sigma)."""
        return sample + velocity * (next_sigma - sigma)


def velocity_of(
    output: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    prediction: str,
    variance_2C: Tensor | None = None,
    first_frame: int = 0,
) -> Tensor:
    """The velocity that a network's output stands for: the output itself, or for prediction "gaussian"

        v = ((sigma - a W) x_t - sigma m) / d,   a = 1 - sigma,   d = a^2 W + sigma^2.

    It leads to x0 = m + a W (x_t - a m) / d, the mean of the clean value given the noisy one when the network holds it
    for normal with mean m = sqrt(V) F and variance W = V exp(10 tanh(G / 10)). Output 0 is the best linear denoiser of
    channels with variance V. Where a picture is flat the network makes W small and the noise is gone; a small network
    that gives the velocity, or what a fixed denoiser misses, must carry the noise through itself and leaves a speckle.

    output: velocity (B, C, F, h, w), or F and G (B, 2 C, F, h, w); noisy: (B, C, F, h, w); sigma: (B,) or (B, F).
    variance_2C: V of the first latent frame and of later ones; first_frame: number of the first one of noisy.
    """
    if prediction == "velocity":
        return output
    if variance_2C is None:
        raise ValueError('prediction "gaussian" needs the variances of the latent channels')
    kind = (torch.arange(noisy.shape[2]) + first_frame).clamp(max=1)
    base = variance_2C.to(noisy)[kind].T[:, :, None, None]
    sigma = expand_like(sigma, noisy) if sigma.ndim == 1 else sigma[:, None, :, None, None]
    mean, spread = output.to(noisy.dtype).chunk(2, 1)
    mean, variance, rest = base.sqrt() * mean, base * torch.exp(10 * torch.tanh(spread / 10)), 1 - sigma
    return ((sigma - rest * variance) * noisy - sigma * mean) / (rest.square() * variance + sigma.square())
