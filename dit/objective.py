"""The two objectives behind one small interface: noise prediction on a diffusers schedule, and rectified flow.

Both answer the same questions, so that training, evaluation and sampling are written once: when (`times`), what does
the model see (`noisy`, `model_time`), what is its error (`error`), which clean latent does it mean (`clean`), how does
one sample with it.
Shapes: B batch, then C H W of a latent.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit.config import FLOW_SAMPLERS, NOISE_SAMPLERS, DiffusionConfig, FlowConfig
from dit.sampling import paths
from dit.sampling.gaussian import GaussianDiffusion
from dit.sampling.samplers import sample_flow, sample_noise
from shared.errors import UserError
from shared.flow import expand_like, sample_times, shift_noise_level

Predict = Callable[[Tensor, Tensor], Tensor]
LEAST_GAP = 0.05  # smallest distance from an end of the path that a clean or noise prediction is divided by


class NoiseObjective:
    """Predict the noise, the velocity (Salimans and Ho 2022) or the data at integer times 0 .. 999 (999 is noise)."""

    samplers = NOISE_SAMPLERS
    default_sampler = "dpmpp_2m"

    def __init__(self, diffusion: DiffusionConfig, *, learn_sigma: bool = False) -> None:
        from diffusers import DDPMScheduler

        betas = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
        start, end = betas[diffusion.noise_scheduler]
        self.settings, self.learn_sigma = diffusion, learn_sigma
        self.noise_scheduler = DDPMScheduler(
            num_train_timesteps=diffusion.num_train_timesteps,
            beta_schedule=diffusion.noise_scheduler,
            beta_start=start,
            beta_end=end,
            prediction_type=diffusion.prediction_type,
            clip_sample=False,
            rescale_betas_zero_snr=diffusion.rescale_betas_zero_snr,
            timestep_spacing="trailing",
        )
        self.alphas_cumprod = self.noise_scheduler.alphas_cumprod
        self.bound = GaussianDiffusion(self.noise_scheduler.betas) if learn_sigma else None
        steps = self.span = diffusion.num_train_timesteps
        self.levels = [round(steps * (0.05 + 0.1 * k)) for k in range(10)]

    def times(self, uniform_B: Tensor) -> Tensor:
        """Integer times (B,) from uniform draws in [0, 1)."""
        return (uniform_B * self.settings.num_train_timesteps).long()

    def model_time(self, t_B: Tensor) -> Tensor:
        """What the model is given: the integer itself, unscaled."""
        return t_B

    def noisy(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """sqrt(a) clean + sqrt(1 - a) noise."""
        signal, spread = self._signal_and_spread(t_B, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What the first channels of the output should be."""
        kind = self.settings.prediction_type
        if kind != "v_prediction":
            return noise if kind == "epsilon" else clean
        signal, spread = self._signal_and_spread(t_B, clean)
        return signal * noise - spread * clean

    def error(self, output: Tensor, noisy: Tensor, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Per-sample loss (B,), float32: squared (or Huber) error, weighted by min-SNR, plus the variance's bound."""
        output, channels = output.float(), clean.shape[1]
        difference = output[:, :channels] - self.target(clean, noise, t_B)
        if self.settings.criterion == "huber":
            error = torch.where(difference.abs() < 1, 0.5 * difference.square(), difference.abs() - 0.5)
        else:
            error = difference.square()
        error_B = error.flatten(1).mean(1)
        if self.settings.snr_gamma is not None:
            error_B = error_B * self.min_snr_weight(t_B)
        if self.bound is not None:
            target = "sample" if self.settings.prediction_type == "sample" else "epsilon"
            error_B = error_B + self.bound.variational_bound(output, clean, noisy, t_B, target=target)
        return error_B

    def min_snr_weight(self, t_B: Tensor) -> Tensor:
        """min(SNR, gamma) over SNR, SNR + 1 or 1 for noise, velocity, data (Hang et al. 2023), from float32 tables."""
        a = self.alphas_cumprod.to(t_B.device)[t_B]
        snr = a / (1 - a)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[
            self.settings.prediction_type
        ]
        return snr.clamp_max(self.settings.snr_gamma) / divisor.clamp_min(1e-20)

    def clean(self, output: Tensor, noisy: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that the output stands for."""
        output = output[:, : noisy.shape[1]].float()
        signal, spread = self._signal_and_spread(t_B, noisy)
        if self.settings.prediction_type == "sample":
            return output
        if self.settings.prediction_type == "v_prediction":
            return signal * noisy - spread * output
        return (noisy - spread * output) / signal.clamp_min(1e-8)

    def constant_prediction(self, mean: Tensor, t_B: Tensor) -> Tensor:
        """The best output that ignores its input, for data of this mean: the baseline of the held-out loss."""
        zeros = torch.zeros_like(mean).expand(len(t_B), *mean.shape)
        output = self.target(mean.expand_as(zeros), zeros, t_B)
        return torch.cat([output, zeros], dim=1) if self.learn_sigma else output

    def noise_level(self, t_B: Tensor) -> Tensor:
        """sqrt(1 - a): 0 is data, 1 is noise."""
        return (1 - self.alphas_cumprod.to(t_B.device)[t_B.long()]).sqrt()

    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        *,
        method: str = "auto",
        steps: int = 50,
        shift: float | None = None,
        draw: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Latents from noise. predict(x, t_B) is the guided model at this objective's times."""
        if shift not in (None, 1.0):
            raise UserError(
                f"--shift {shift}: the time shift belongs to the flow objective; leave it out for noise prediction"
            )
        method = self.default_sampler if method == "auto" else method
        _check_sampler(method, self.samplers, "noise prediction")
        return sample_noise(predict, noise, dict(self.noise_scheduler.config), method=method, steps=steps, draw=draw)

    def _signal_and_spread(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a = expand_like(self.alphas_cumprod.to(t_B.device)[t_B.long()], like).to(like.dtype)
        return a.sqrt(), (1 - a).sqrt()


class FlowObjective:
    """Rectified flow: t = 0 is noise, t = 1 is data, the velocity points to the data."""

    samplers = FLOW_SAMPLERS
    default_sampler = "heun"

    def __init__(self, flow: FlowConfig, *, latent_size: int) -> None:
        """latent_size: C * H * W, for `shift: auto`."""
        self.settings = flow
        # Esser et al. 2024: the same noise hides less of a larger latent; 4 * 32 * 32 is where shift 1 was tuned.
        self.shift = math.sqrt(latent_size / 4096) if flow.shift == "auto" else float(flow.shift)
        self.span = 1.0
        self.levels = [0.05 + 0.1 * k for k in range(10)]

    def times(self, uniform_B: Tensor) -> Tensor:
        """Times (B,) in (0, 1) from uniform draws, by the chosen distribution, then shifted towards the noise."""
        t_B = sample_times(
            self.settings.timestep_sampling, uniform_B, mean=self.settings.logit_mean, std=self.settings.logit_std
        )
        t_B = 1 - shift_noise_level(1 - t_B, self.shift)
        has_ends = self.settings.path == "vp" or self.settings.prediction != "velocity"  # that are divided by
        return t_B.clamp(1e-5, 1 - 1e-5) if has_ends else t_B

    def model_time(self, t_B: Tensor) -> Tensor:
        """What the model is given: t times time_scale (1 as SiT, 1000 as SD3)."""
        return t_B * self.settings.time_scale

    def noisy(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """A point on the path from the noise to the clean latent."""
        return paths.interpolate(self.settings.path, noise, clean, t_B)[0]

    def error(self, output: Tensor, noisy: Tensor, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Per-sample loss (B,), float32, mean over C H W."""
        flow = self.settings
        _, velocity = paths.interpolate(flow.path, noise, clean, t_B)
        error_B = paths.squared_error(
            flow.path,
            flow.prediction,
            self._without_sigma(output, clean),
            noisy,
            velocity,
            noise,
            t_B,
            weighting=flow.loss_weight,
            least=LEAST_GAP,
        )
        if flow.contrastive:  # Stoica et al. 2025: away from the velocity of another sample of the batch
            predicted = self._velocity(output.float(), noisy, t_B)
            error_B = error_B - flow.contrastive * (predicted - velocity.roll(1, 0)).square().flatten(1).mean(1)
        return error_B

    def clean(self, output: Tensor, noisy: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that the output stands for."""
        if self.settings.prediction == "clean":
            return self._without_sigma(output, noisy).float()
        return paths.clean_from_velocity(self.settings.path, self._velocity(output.float(), noisy, t_B), noisy, t_B)

    def constant_prediction(self, mean: Tensor, t_B: Tensor) -> Tensor:
        """The best output that ignores its input, for data of this mean: the baseline of the held-out loss."""
        mean = mean.expand(len(t_B), *mean.shape)
        if self.settings.prediction == "clean":
            return mean
        if self.settings.prediction in ("noise", "score"):
            return torch.zeros_like(mean)
        return paths.coefficients(self.settings.path, expand_like(t_B, mean)).d_alpha * mean

    def noise_level(self, t_B: Tensor) -> Tensor:
        """sigma(t): 0 is data, 1 is noise."""
        return paths.coefficients(self.settings.path, t_B).sigma

    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        *,
        method: str = "auto",
        steps: int = 50,
        shift: float | None = None,
        draw: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Latents from noise. predict(x, t_B) is the guided model at this objective's times."""
        method = self.default_sampler if method == "auto" else method
        _check_sampler(method, self.samplers, "the flow objective")
        divides = self.settings.prediction in ("noise", "score")
        if divides and method != "euler":
            raise UserError(
                f"--sampler {method}: a {self.settings.prediction} prediction is unstable at the ends of the path; use "
                "--sampler euler"
            )
        return sample_flow(
            lambda x, t_B: self._velocity(predict(x, t_B), x, t_B),
            noise,
            method=method,
            steps=steps,
            shift=self.shift if shift is None else shift,
            path=self.settings.path,
            draw=draw,
        )

    def _velocity(self, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        least = LEAST_GAP if self.settings.prediction != "clean" else 1e-3
        return paths.to_velocity(
            self.settings.path, self.settings.prediction, self._without_sigma(output, x_t), x_t, t_B, least=least
        )

    @staticmethod
    def _without_sigma(output: Tensor, like: Tensor) -> Tensor:
        return output[:, : like.shape[1]]  # public SiT weights carry unused channels behind the velocity


def make_objective(diffusion: DiffusionConfig, flow: FlowConfig, *, learn_sigma: bool, latent_size: int) -> Any:
    """The objective that `diffusion.objective` names."""
    if diffusion.objective == "ddpm":
        return NoiseObjective(diffusion, learn_sigma=learn_sigma)
    return FlowObjective(flow, latent_size=latent_size)


def _check_sampler(method: str, allowed: tuple[str, ...], what: str) -> None:
    if method not in allowed:
        raise UserError(f"--sampler {method}: not a sampler of {what}; use one of {', '.join(allowed)}")
