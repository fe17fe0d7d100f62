"""From noise to latents: the flow's ODE and SDE solvers, the noise objective's samplers, guidance.

Every sampler takes model(x, t_B) -> prediction, already guided, and noise drawn by the caller, one generator an image,
so a picture does not depend on the batch or the rank that it is made in.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dit.sampling.gaussian import GaussianDiffusion, Target, kept_timesteps
from shared.errors import UserError
from shared.flow import guided, integrate, time_grid

Model = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int], Tensor]  # the noise of step k, shaped like a batch of latents


def check_sampler(method: str, allowed: tuple[str, ...], what: str) -> None:
    """UserError for a sampler that an objective does not have."""
    if method not in allowed:
        raise UserError(f"--sampler {method}: not a sampler of {what}; use one of {', '.join(allowed)}")


def sample_flow(
    velocity: Model,
    noise: Tensor,
    *,
    method: str = "euler",
    steps: int = 50,
    shift: float = 1.0,
    draw: Draw | None = None,
) -> Tensor:
    """Data at t = 1 from noise at t = 0. `steps` counts intervals; SiT's num_steps counts points (250 is 249 here)."""
    if method == "sde":
        if draw is None:
            raise ValueError("the SDE needs the noise of every step: give draw")
        return euler_maruyama(velocity, noise, steps=steps, draw=draw)
    return integrate(velocity, noise, time_grid(steps, shift=shift, noise_at="start"), method=method)


def euler_maruyama(velocity: Model, start: Tensor, *, steps: int = 250, last_step: float = 0.04, draw: Draw) -> Tensor:
    """Solve SiT's reverse SDE with diffusion w(t) = 1 - t: `steps` - 1 noisy steps up to 1 - last_step, then one of the
    mean (Ma et al. 2024, arXiv 2401.08740). The "SBDM" diffusion divides by t and is not offered.
    """
    times = torch.linspace(0, 1 - last_step, steps, dtype=torch.float64).tolist()

    def drift(x: Tensor, t: float) -> Tensor:
        slope = velocity(x, _times(x, t))
        return slope + (t * slope - x)  # w times the score, which is (t v - x) / (1 - t)

    x = start
    for k, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        slope = drift(x, now)
        x = x + (then - now) * slope + math.sqrt(2 * (1 - now) * (then - now)) * draw(k)
    return x + last_step * drift(x, times[-1])


def sample_noise(
    model: Model,
    noise: Tensor,
    scheduler_config: dict,
    *,
    method: str = "ddim",
    steps: int = 50,
    draw: Draw | None = None,
) -> Tensor:
    """Data from noise for the noise objective. scheduler_config is the training scheduler's `.config`.

    ddim and dpmpp_2m use diffusers; ddpm is the ancestral sampler on evenly spaced steps, with a learned variance where
    the model gives one.
    """
    levels = scheduler_config["num_train_timesteps"]
    if steps > levels:
        raise UserError(f"--steps {steps}: the model was trained on {levels} levels of noise; use at most so many")
    if method == "ddpm":
        return _ancestral(model, noise, scheduler_config, steps, draw)
    scheduler = make_sampler(scheduler_config, method)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), _times(x, float(t)))
        x = scheduler.step(output[:, : x.shape[1]], t, x).prev_sample
    return x


def training_scheduler(**settings: Any) -> Any:
    """diffusers' DDPMScheduler, whose class attributes its type does not declare."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**settings)


def make_sampler(scheduler_config: dict, method: str) -> Any:
    """diffusers' scheduler for `method` with the betas and the prediction type of the training scheduler."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if scheduler_config["rescale_betas_zero_snr"] and method != "ddim":
        raise UserError(
            f"--sampler {method}: rescale_betas_zero_snr needs --sampler ddim (its last level has no signal)"
        )
    shared = {
        key: scheduler_config[key]
        for key in (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "prediction_type",
            "rescale_betas_zero_snr",
        )
    }
    shared["timestep_spacing"] = "trailing" if shared["rescale_betas_zero_snr"] else "leading"
    if method == "ddim":
        return DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return DPMSolverMultistepScheduler(
        **{**shared, "timestep_spacing": "linspace"},
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=method == "dpmpp_2m_karras",
    )


def _ancestral(model: Model, noise: Tensor, scheduler_config: dict, steps: int, draw: Draw | None) -> Tensor:
    if scheduler_config["prediction_type"] == "v_prediction":
        raise UserError("--sampler ddpm predicts noise or data; a v_prediction model needs --sampler ddim or dpmpp_2m")
    betas = training_scheduler(**{key: value for key, value in scheduler_config.items() if key[0] != "_"}).betas
    if draw is None:
        raise ValueError("ancestral steps need the noise of every step: give draw")
    diffusion = GaussianDiffusion(betas, kept_timesteps(len(betas), steps))
    return diffusion.sample(model, noise, draw, cast(Target, scheduler_config["prediction_type"]))


def guide(
    predict: Callable[..., Tensor],
    x: Tensor,
    t_B: Tensor,
    condition: dict,
    null: dict,
    scale: float,
    *,
    channels: int | None = None,
    rescale: float = 0.0,
) -> Tensor:
    """Classifier-free guidance with one forward of twice the batch.

    condition and null are the keyword arguments of predict(x, t, **arguments), rows aligned with x. channels: guide
    only the first so many (3 is the public DiT's habit); the others, a learned variance among them, come from the
    conditional half. rescale: share by which the guided standard deviation is brought back to the conditional one's
    (Lin et al. 2023).
    """
    if scale == 1.0:
        return predict(x, t_B, **condition)
    both = {key: torch.cat([value, null[key]]) for key, value in condition.items() if value is not None}
    with_text, without = predict(torch.cat([x, x]), torch.cat([t_B, t_B]), **both).chunk(2)
    count = min(x.shape[1], channels or x.shape[1])
    mixed = guided(with_text[:, :count], without[:, :count], scale)
    if rescale:
        axes = tuple(range(1, x.ndim))
        ratio = with_text[:, :count].std(axes, keepdim=True) / mixed.std(axes, keepdim=True).clamp_min(1e-8)
        mixed = rescale * mixed * ratio + (1 - rescale) * mixed
    return torch.cat([mixed, with_text[:, count:]], dim=1)


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)
