"""What is learned from a batch: two objectives behind one interface, and the Trainer that hands them to the loop.

Noise prediction on a diffusers schedule, and rectified flow. Both answer the same questions, so that training,
evaluation and sampling are written once: when (`times`), what does the model see (`noisy`, `model_time`), what is its
error (`error`), which clean latent does it mean (`clean`), how does one sample with it.
Shapes: B batch, then C H W of a latent.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from dit.config import FLOW_SAMPLERS, NOISE_SAMPLERS, Config, DiffusionConfig, FlowConfig
from dit.dataset import TextImageDataset, collate, unit
from dit.evaluation.held_out import HeldOut, errors, summary
from dit.model import DiTModel
from dit.modules.autoencoder import Codec
from dit.modules.features import FeatureEncoder
from dit.modules.prx import PRXModel
from dit.modules.text import CaptionEncoder, TextEncoder, condition_of
from dit.modules.vae import CODEC_FILE
from dit.sampling.drawing import Drawing, draw_latents, grid, to_uint8
from dit.sampling.gaussian import GaussianDiffusion, Target
from dit.sampling.samplers import Draw, Model, check_sampler, sample_flow, sample_noise, training_scheduler
from dit.weights.averages import RUNNING, PowerAverages
from dit.weights.guide import (
    GuideState,
    adopt,
    is_guide_folder,
    read_guide_folder,
    write_guide_files,
    write_guide_folder,
)
from shared.config import accumulation_steps, save_config
from shared.data import BatchPlan, MapStream
from shared.engine.checkpoint import load_strict, load_weights
from shared.engine.dist import DistInfo
from shared.errors import UserError, written_aside
from shared.flow import expand_like, linear_path, sample_times, shift_noise_level
from shared.loop import FitResult, fit, plan_steps
from shared.optim import decay_groups
from shared.rng import keyed_rand, keyed_randn

TIMES, NOISE, DROPS, POSTERIOR, PATHS, ROUTES = 1, 2, 3, 4, 5, 6  # random streams
LEAST_GAP = 0.05  # smallest 1 - t that a clean prediction is divided by in training; sampling goes closer to the data


class NoiseObjective:
    """Predict the noise, the velocity (Salimans and Ho 2022) or the data at integer times 0 .. 999 (999 is noise).

    span: times count from 0 to it. levels: the times at which the held-out loss is taken.
    """

    samplers = NOISE_SAMPLERS
    default_sampler = "dpmpp_2m"

    def __init__(self, diffusion: DiffusionConfig, *, learn_sigma: bool = False) -> None:
        betas = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}
        start, end = betas[diffusion.noise_scheduler]
        self.settings, self.learn_sigma = diffusion, learn_sigma
        self.noise_scheduler = training_scheduler(
            num_train_timesteps=diffusion.num_train_timesteps,
            beta_schedule=diffusion.noise_scheduler,
            beta_start=start,
            beta_end=end,
            prediction_type=diffusion.prediction_type,
            clip_sample=False,
            rescale_betas_zero_snr=diffusion.rescale_betas_zero_snr,
            timestep_spacing="trailing",
        )
        self.alphas_cumprod: Tensor = self.noise_scheduler.alphas_cumprod
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
            target: Target = "sample" if self.settings.prediction_type == "sample" else "epsilon"
            error_B = error_B + self.bound.variational_bound(output, clean, noisy, t_B, target=target)
        return error_B

    def min_snr_weight(self, t_B: Tensor) -> Tensor:
        """min(SNR, gamma) over SNR, SNR + 1 or 1 for noise, velocity, data (Hang et al. 2023), from float32 tables."""
        assert self.settings.snr_gamma is not None
        a = self._alphas(t_B)
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
        return (1 - self._alphas(t_B)).sqrt()

    def sample(
        self,
        predict: Model,
        noise: Tensor,
        *,
        method: str = "auto",
        steps: int = 50,
        shift: float | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Latents from noise. predict(x, t_B) is the guided model at this objective's times."""
        if shift not in (None, 1.0):
            raise UserError(
                f"--shift {shift}: the time shift belongs to the flow objective; leave it out for noise prediction"
            )
        method = self.default_sampler if method == "auto" else method
        check_sampler(method, self.samplers, "noise prediction")
        return sample_noise(predict, noise, dict(self.noise_scheduler.config), method=method, steps=steps, draw=draw)

    def _alphas(self, t_B: Tensor) -> Tensor:
        """The table's entries (B,), float32; the table goes to the device once."""
        if self.alphas_cumprod.device != t_B.device:
            self.alphas_cumprod = self.alphas_cumprod.to(t_B.device)
        return self.alphas_cumprod[t_B.long()]

    def _signal_and_spread(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a = expand_like(self._alphas(t_B), like).to(like.dtype)
        return a.sqrt(), (1 - a).sqrt()


class FlowObjective:
    """Rectified flow (Liu et al. 2022): t = 0 is noise, t = 1 is data, x_t = (1 - t) noise + t data, v = data - noise.

    REPA, SD3, Flux and diffusers run the other way: their sigma is 1 - t here, their velocity the negative.
    """

    samplers = FLOW_SAMPLERS
    default_sampler = "heun"
    noise_scheduler = None

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
        return t_B.clamp(1e-5, 1 - 1e-5) if self.settings.prediction == "clean" else t_B  # 1 - t is divided by

    def model_time(self, t_B: Tensor) -> Tensor:
        """What the model is given: t times time_scale (1 as SiT, 1000 as SD3)."""
        return t_B * self.settings.time_scale

    def noisy(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """A point on the straight line from the noise to the clean latent."""
        return linear_path(start=noise, end=clean, t_B=t_B)[0]

    def error(self, output: Tensor, noisy: Tensor, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Per-sample loss (B,), float32, mean over C H W: the squared error of the velocity, whatever is predicted."""
        predicted = self._velocity(output.float(), noisy, t_B, least=LEAST_GAP)
        return (predicted - (clean - noise)).square().flatten(1).mean(1)

    def contrast(self, output: Tensor, noisy: Tensor, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """The same error against another sample's velocity, which training leads away from (Stoica et al. 2025).

        Neighbours in the global batch are each other's other, so that no cut into even parts parts a pair.
        """
        if len(clean) % 2:
            raise UserError(f"flow.contrastive compares samples in pairs, this batch has {len(clean)}; use an even one")
        predicted = self._velocity(output.float(), noisy, t_B, least=LEAST_GAP)
        other = (clean - noise).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        return (predicted - other).square().flatten(1).mean(1)

    def clean(self, output: Tensor, noisy: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that the output stands for: x_t + (1 - t) v."""
        if self.settings.prediction == "clean":
            return self._without_sigma(output, noisy).float()
        return noisy + (1 - expand_like(t_B, noisy)) * self._velocity(output.float(), noisy, t_B)

    def constant_prediction(self, mean: Tensor, t_B: Tensor) -> Tensor:
        """The mean itself is the best constant guess of the data, and of the velocity, whose noise has mean 0."""
        return mean.expand(len(t_B), *mean.shape)

    def noise_level(self, t_B: Tensor) -> Tensor:
        """1 - t: 0 is data, 1 is noise."""
        return 1 - t_B

    def sample(
        self,
        predict: Model,
        noise: Tensor,
        *,
        method: str = "auto",
        steps: int = 50,
        shift: float | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Latents from noise. predict(x, t_B) is the guided model at this objective's times."""
        method = self.default_sampler if method == "auto" else method
        check_sampler(method, self.samplers, "the flow objective")
        return sample_flow(
            lambda x, t_B: self._velocity(predict(x, t_B), x, t_B),
            noise,
            method=method,
            steps=steps,
            shift=self.shift if shift is None else shift,
            draw=draw,
        )

    def _velocity(self, output: Tensor, x_t: Tensor, t_B: Tensor, *, least: float = 1e-3) -> Tensor:
        """The velocity that an output stands for; from clean data it is (data - x_t) / (1 - t)."""
        output = self._without_sigma(output, x_t)
        if self.settings.prediction == "velocity":
            return output
        gap = 1 - expand_like(t_B, x_t)
        return output - (x_t - (1 - gap) * output) / gap.clamp_min(least)

    @staticmethod
    def _without_sigma(output: Tensor, like: Tensor) -> Tensor:
        return output[:, : like.shape[1]]  # public SiT weights carry unused channels behind the velocity


Objective = NoiseObjective | FlowObjective


def make_objective(diffusion: DiffusionConfig, flow: FlowConfig, *, learn_sigma: bool, latent_size: int) -> Objective:
    """The objective that `diffusion.objective` names."""
    if diffusion.objective == "ddpm":
        return NoiseObjective(diffusion, learn_sigma=learn_sigma)
    return FlowObjective(flow, latent_size=latent_size)


# --- the hooks of the loop --------------------------------------------------------------------------------------------


class Trainer:
    """The objective as functions for the loop. Frozen: vae_encoder and text_encoder; trained: model.

    Rectified flow or noise prediction on latents, with the caption of a share of the samples replaced by the null
    condition. The guide's own objects are taken as they are: a CLIPTextModel of transformers as the text encoder, a
    torch DataLoader over a map-style data set as the loader.
    """

    def __init__(
        self,
        model: DiTModel | PRXModel,
        vae_encoder: Codec,
        text_encoder: nn.Module | None,
        train_dataloader: MapStream | DataLoader | None,
        config: Config,
        *,
        info: DistInfo | None = None,
        held_out: HeldOut | None = None,
        null_condition: tuple[Tensor, Tensor, Tensor] | None = None,
        guide_state: GuideState | None = None,
    ) -> None:
        """null_condition: states, mask and pooled vector of the empty caption, where no text encoder is given.
        guide_state: of a folder in the guide's form that run.resume names, where it is read already.
        """
        self.model, self.config, self.held_out = model, config, held_out
        self.info = info or DistInfo()
        self.device, self.train_dataloader = self.info.device, train_dataloader
        self.stream = stream_of(train_dataloader, config, self.info)
        self.vae_encoder = vae_encoder.to(self.device).eval()
        encoder = around(text_encoder, config)
        self.text_encoder = None if encoder is None else encoder.to(self.device).eval()
        self.objective = make_objective(
            config.diffusion, config.flow, learn_sigma=config.model.learn_sigma, latent_size=config.latent_size
        )
        self.noise_scheduler = self.objective.noise_scheduler
        self.criterion = self.objective.error
        self.resume, self.guide_state = config.run.resume, guide_state
        self.global_step = 0
        self.averages: PowerAverages | None = None
        self.feature_encoder: FeatureEncoder | None = None
        if config.repa.encoder_path is not None and config.data.cache_dir is None:
            self.feature_encoder = FeatureEncoder(config.repa.encoder_path).to(self.device).eval()
        if config.model.text_conditioning != "none" and config.diffusion.null_text == "empty":
            if null_condition is None and self.text_encoder is not None:
                states, mask, pooled = self.text_encoder.encode([""])
                null_condition = (states[0], mask[0], pooled[0])
            if null_condition is not None and guide_state is None:  # else the folder's is in the model
                model.set_null_text(*(part.cpu() for part in null_condition))

    @property
    def current_epoch(self) -> int:
        """Epochs that are complete."""
        return self.global_step // self.stream.plan.steps_per_epoch if self.stream is not None else 0

    def losses(self, model: Callable, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        """One (loss, metrics) a micro-batch. Draws are keyed by (seed, step, sample): ranks and resumes change none."""
        seed, self.global_step = self.config.run.seed, step
        aligns = self.config.repa.encoder_path is not None
        for batch in batches:
            # Frozen encoders first: pictures to latents, captions to states (or both from the cache).
            latents_BCHW = self.latents(batch, step)
            condition = self.condition(batch)

            # A sample's slot is its place in the global batch of this step. Draws keyed by (seed, step, slot) are the
            # same whether one rank holds the whole batch or eight hold a share each, and after a resume.
            draws = {"slots": batch["slot"], "device": latents_BCHW.device}
            t_B = self.objective.times(keyed_rand((), key=(seed, TIMES, step), **draws))
            noise_BCHW = keyed_randn(latents_BCHW.shape[1:], key=(seed, NOISE, step), **draws)
            drop_B = keyed_rand((), key=(seed, DROPS, step), **draws) < self.config.diffusion.cfg_dropout
            noisy_BCHW = self.objective.noisy(latents_BCHW, noise_BCHW, t_B)
            tokens = latents_BCHW.shape[2] * latents_BCHW.shape[3] // self.config.model.patch_size**2

            # Dropped rows get the null condition inside the model, so every rank runs the same modules in every step.
            if condition and self.config.diffusion.cfg_dropout:
                condition["drop"] = drop_B
            if self.config.model.drop_path:
                shape = (self.config.model.num_layers, 3)
                condition["path_draws"] = keyed_rand(shape, key=(seed, PATHS, step), **draws)
            if self.config.model.route_share:
                condition["route_draws"] = keyed_rand((tokens,), key=(seed, ROUTES, step), **draws)
            found = model(
                noisy_BCHW, self.objective.model_time(t_B), **condition, **({"align": True} if aligns else {})
            )
            predicted, projected, kept = found if aligns else (found, None, None)

            # The loop adds the micro-batches' losses up: each is divided here by their number. The error is fp32.
            error_B = self.criterion(predicted, noisy_BCHW, latents_BCHW, noise_BCHW, t_B)
            report: dict[str, Any] = {"loss_by_t": (t_B / self.objective.span, error_B)}
            if self.config.flow.contrastive and isinstance(self.objective, FlowObjective):
                contrast_B = self.objective.contrast(predicted, noisy_BCHW, latents_BCHW, noise_BCHW, t_B)
                error_B = error_B - self.config.flow.contrastive * contrast_B
            loss = error_B.mean()
            if projected is not None:
                term = self.alignment(projected, kept, batch, latents_BCHW)
                loss, report = loss + self.config.repa.weight * term, {**report, "alignment": term.detach()}
            yield loss / len(batches), report

    def alignment(self, projected: Tensor, kept: Tensor | None, batch: dict, latents: Tensor) -> Tensor:
        """Minus the mean cosine of the projected tokens (B, n, E) and the frozen encoder's features of their places."""
        patch = self.config.model.patch_size
        grid_size = (latents.shape[2] // patch, latents.shape[3] // patch)
        if self.feature_encoder is None:
            wanted = batch["features"]  # from a cache
        else:
            wanted = self.feature_encoder(unit(batch["image"].to(self.device)), grid_size)
        if kept is not None:  # TREAD: the tokens that came so far
            wanted = wanted.gather(1, kept[..., None].expand(-1, -1, wanted.shape[2]))
        return -nn.functional.cosine_similarity(projected.float(), wanted, dim=-1).mean()

    def validate(self, model: Callable, step: int) -> dict[str, float]:
        """Held-out loss at fixed levels with fixed noise: comparable between steps, runs and numbers of ranks."""
        assert self.held_out is not None  # train() asks for this only with held-out pictures
        kinds = ("right", "shuffled", "constant") if self.held_out.condition else ("right", "constant")
        found = {kind: errors(model, self.objective, self.held_out, self.info, kind=kind) for kind in kinds}
        return summary(found["right"], found.get("shuffled"), found["constant"])

    def sample(self, model: Callable, step: int, folder: Path) -> None:
        """A grid of pictures for sample_prompts, or for the first held-out captions, each with its own fixed seed."""
        settings, prompts = self.config.sample, self.config.training.sample_prompts
        if prompts:
            condition = condition_of(prompts, None, self.text_encoder, self.device)
        else:
            assert self.held_out is not None  # train() asks for a grid only where there is something to draw
            prompts = self.held_out.prompts[: settings.count]
            condition = {name: value[: len(prompts)] for name, value in self.held_out.prompt_condition.items()}
        drawing = Drawing(
            sampler=settings.sampler,
            steps=settings.steps,
            cfg_scale=settings.cfg_scale if self.config.can_guide else 1.0,
            shift=settings.shift,
        )
        shape = (self.config.model.in_channels, self.config.latent_side, self.config.latent_side)
        seeds = list(range(len(prompts)))
        latents = draw_latents(
            model, self.objective, condition, seeds, shape, drawing=drawing, device=self.device
        )  # all ranks draw, since sharded models wait for each other; one decodes and writes
        if self.info.is_main:
            try:
                with torch.no_grad():
                    images = torch.cat([self.vae_encoder.decode(part).float().cpu() for part in latents.split(4)])
            except UserError as error:  # a run from a cache opens the VAE here for the first time
                print(f"no sample grid at step {step}: {error}", file=sys.stderr)
                return
            with written_aside(folder / f"step_{step:08d}.png") as temporary:
                grid(to_uint8(images), columns=8).save(temporary, "PNG")

    def train(self) -> FitResult:
        """Train to the planned step, resuming what is in the output folder."""
        if self.stream is None:
            raise UserError("the Trainer was made without train_dataloader; give one to train")
        self.config.run.resume = self.resume
        if is_guide_folder(Path(self.resume)):
            found = self.guide_state or read_guide_folder(Path(self.resume), self.model)
            self.config.run.resume = str(adopt(found, self.config, self.model, self.stream, self.info))
            self.guide_state = None  # its moments are the optimizer's now
        draws = self.held_out is not None or bool(self.config.training.sample_prompts)
        if self.config.training.power_ema:
            self.config.training.save_in_background = False  # the averages would move on while they are written
            planned = plan_steps(self.config.training, self.stream)
            output_dir, writes = Path(self.config.run.output_dir), self.info.is_main
            self.averages = PowerAverages(self.model.to(self.device), output_dir, planned=planned, writes=writes)
        exports = self.vae_encoder.learns or self.config.training.guide_files or self.averages is not None
        return fit(
            config=self.config,
            info=self.info,
            model=self.model,
            stream=self.stream,
            losses=self.losses,
            validate=self.validate if self.held_out else None,
            sample=self.sample if draws else None,
            after_step=None if self.averages is None else self.averages.update,
            groups=muon_groups(self.model, self.config) if self.config.training.optimizer == "muon" else None,
            wrap_classes=(type(next(iter(self.model.blocks))),),
            export=self.export if exports else None,
            title="DiT",
            checkpoint_name="checkpoint-step-{step}",
            epoch_checkpoint_name="checkpoint-epoch-{epoch}",
            keep_epochs=self.config.training.keep_epochs,
        )

    def training_step(self, batch: dict) -> Tensor:
        """The loss of one batch as a scalar tensor, outside the loop."""
        count = len(batch["image"] if "image" in batch else batch["moments"])
        batch = {"slot": torch.arange(count), **batch}
        return next(self.losses(self.model, [batch], self.global_step))[0]

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the weights and the settings into a folder, with training.guide_files also as model.pt. (The loop's own
        hold all that resuming needs.)
        """
        folder = Path(path)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        with written_aside(folder / "model.safetensors") as temporary:
            save_file(weights, temporary)
        save_config(self.config, folder / "config.yaml")
        if self.config.training.guide_files:
            epoch = 0 if self.stream is None else self.stream.plan.steps_per_epoch
            write_guide_folder(folder, weights, None, step=self.global_step, steps_per_epoch=epoch, config=self.config)

    def load_checkpoint(self, path: str | Path) -> None:
        """Load the weights of save_checkpoint's folder, or of one in the guide's form; a checkpoint of the loop, or of
        the guide, is resumed from by train().
        """
        folder, self.guide_state = Path(path), None
        own = folder / "model.safetensors"
        if own.exists() and not (folder / "manifest.json").exists():
            load_strict(self.model, load_weights(own), what=str(own))
        elif is_guide_folder(folder):
            self.guide_state = read_guide_folder(folder, self.model)
            self.resume = str(folder)
        else:
            load_strict(self.model, load_weights(folder, prefer_ema=False), what=str(folder))
            self.resume = str(folder)

    def export(self, folder: Path, weights: dict, ema: dict | None) -> None:
        """What goes along with a checkpoint: the fitted codec, and the guide's four files when asked for."""
        if self.vae_encoder.learns:
            codec = {name: value.cpu().contiguous() for name, value in self.vae_encoder.state_dict().items()}
            save_file(codec, folder / CODEC_FILE)
        if self.averages is not None:
            self.averages.save(folder / RUNNING)
        if self.config.training.guide_files and self.stream is not None:
            write_guide_files(folder, self.model, self.config, self.stream.plan.steps_per_epoch)

    def latents(self, batch: dict, step: int) -> Tensor:
        """Scaled latents (B, C, H, W), from the cache or from pictures; the posterior is drawn anew on every visit."""
        with torch.no_grad():
            moments, noise = batch.get("moments"), None
            if moments is None:
                moments = self.vae_encoder.moments(unit(batch["image"].to(self.info.device)))
            if self.vae_encoder.posterior == "sample":
                shape = (moments.shape[1] // 2, *moments.shape[2:])
                key = (self.config.run.seed, POSTERIOR, step)
                noise = keyed_randn(shape, key=key, slots=batch["slot"], device=moments.device)
            return self.vae_encoder.latents(moments, noise).clone()  # inference tensors may not enter autograd

    def condition(self, batch: dict) -> dict[str, Tensor]:
        """The model's keyword arguments for text or labels: from the cache, from token ids, or from the captions."""
        if "text_embeddings" in batch:
            return {name: batch[name] for name in ("text_embeddings", "text_mask", "text_pooled") if name in batch}
        if self.text_encoder is not None and "input_ids" in batch:
            states, mask, pooled = self.text_encoder.encode_ids(batch["input_ids"])
            return {"text_embeddings": states.clone(), "text_mask": mask.clone(), "text_pooled": pooled.clone()}
        return condition_of(batch.get("text", []), batch.get("label"), self.text_encoder, self.info.device)


def muon_groups(model: nn.Module, config: Config) -> list[dict]:
    """The matrices of attention and feed-forward, by how many lie below each other in one; the rest goes to AdamW."""
    training = config.training
    kinds = {"attn.qkv": 3, "cross_attn.kv": 2, "attn.proj": 1, "cross_attn.q": 1, "cross_attn.proj": 1}
    kinds |= {"mlp.fc1": 2 if config.model.mlp == "swiglu" else 1, "mlp.fc2": 1}
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        kind = name.split(".", 2)[2].removesuffix(".weight") if name.startswith("blocks.") else ""
        if parameter.requires_grad and kind in kinds and name.endswith(".weight"):
            found.setdefault(kinds[kind], []).append(name)
    taken = {name for names in found.values() for name in names}
    rest = decay_groups(model, training.weight_decay)
    for group in rest:
        group["names"] = [name for name in group["names"] if name not in taken]
    scale = training.muon_learning_rate / training.learning_rate if training.learning_rate else 0.0
    return rest + [
        {"names": names, "weight_decay": training.weight_decay, "lr_scale": scale, "muon": parts}
        for parts, names in found.items()
    ]


def around(encoder: nn.Module | None, config: Config) -> CaptionEncoder | None:
    """A text encoder of ours, or one of ours around a CLIPTextModel of transformers."""
    if encoder is None or isinstance(encoder, CaptionEncoder):
        return encoder
    return TextEncoder.of_model(encoder, name=config.text.pretrained_model_name, length=config.model.text_len)


def stream_of(loader: MapStream | DataLoader | None, config: Config, info: DistInfo) -> MapStream | None:
    """The loop's stream, or one over the data set of a torch DataLoader with its batch size, order, collate and
    processes: a plain loader could neither be resumed nor shared over ranks.
    """
    if not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise UserError("train_dataloader: its data set must have a length and an index, and the loader a batch_size")
    count = len(cast(Sized, loader.dataset))
    order = BatchPlan(
        count,
        loader.batch_size,
        info.world,
        accumulation_steps(config.training.model_copy(update={"batch_size": loader.batch_size}), info.world),
        config.run.seed,
        drop_last=loader.drop_last or count < loader.batch_size * info.world,
        shuffle=not isinstance(loader.sampler, SequentialSampler),
    )
    own = isinstance(loader.dataset, TextImageDataset)
    return MapStream(
        loader.dataset,
        order,
        info,
        collate=collate if own else loader.collate_fn,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor or 2,
        bad_samples=Path(config.run.output_dir) / "bad_samples.jsonl",
    )
