"""The objective of phase 2: rectified flow on motion latents (Liu et al. 2022; Lipman et al. 2022).

Path, loss, and the trainer that hands both to the loop. t = 0 is noise, t = 1 is data. Shapes: B batch, L frames of the
window, P frames before it, d motion width.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from float.config import Config, settle
from float.dataset import FLOATDataset, collate_windows, create_dataloader
from float.model import FMTBlock, MotionGenerator
from float.sampling.motion import solver_times
from shared.config import accumulation_steps
from shared.data import to_device
from shared.engine.dist import DistInfo, mean_over_ranks
from shared.flow import Velocity, integrate, sample_times
from shared.loop import FitResult, TrainedModel, fit, lr_at, plan_steps
from shared.optim import adamw, decay_groups
from shared.rng import keyed_rand, keyed_randn

TIMES, NOISE, DROPS, HELD_OUT = 321, 322, 323, 324  # random streams
VALIDATION_BATCH = 32
HUBER_DELTA = 1.0
# called at the end of every epoch with (trainer, epoch, metrics)
Callback = Callable[["FlowMatchingTrainer", int, dict[str, float]], None]


# --- the path ---------------------------------------------------------------------------------------------------------


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
        t = t_B.reshape(-1, *[1] * (data.ndim - 1)).to(data.dtype)
        return (self.sigma_max + (self.sigma_min - self.sigma_max) * t) * noise + t * data

    def target_velocity(self, noise: Tensor, data: Tensor) -> Tensor:
        """dx_t/dt, constant along the path."""
        return data + (self.sigma_min - self.sigma_max) * noise

    def times(self, uniform_B: Tensor) -> Tensor:
        """Training times (B,) from uniform draws in [0, 1)."""
        return uniform_B if self.time_sampling == "uniform" else sample_times(self.time_sampling, uniform_B)

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
        """Solve dx/dt = velocity(x, t) from standard normal noise (B, ...) at t = 0 to data at t = 1.

        nfe counts time points, one more than steps; `steps` overrides it. method: those of shared.flow.integrate.
        """
        start = noise if self.sigma_max == 1.0 else self.sigma_max * noise
        return integrate(velocity, start, solver_times(nfe, steps), method, atol=atol, rtol=rtol)


# --- the loss ---------------------------------------------------------------------------------------------------------


def _pointwise(loss_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss per element of a named kind."""
    named: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
        prev_share: float | None = None,
    ) -> dict[str, Tensor]:
        """-> loss, loss_flow, loss_vel, loss_prev (scalars) and loss_B, the total per sample.

        model_output: (B, P + L, d) or (B, L, d); target: velocity (B, L, d). prev_target: clean previous motion
        (B, P, d); prev_valid_B: rows whose previous motion was given to the model (not dropped, and not before the
        clip's start). loss_prev is a mean over these; prev_share: their share of the whole step's rows, None: of this
        batch.
        """
        frames = target.shape[1]
        current = model_output[:, -frames:]
        flow_B = self._per_sample(current, target)

        # a velocity that is right on average but trembles from frame to frame is what the eye sees first
        vel_B = self._per_sample(current.diff(dim=1), target.diff(dim=1)) if frames > 1 else torch.zeros_like(flow_B)

        prev_B = torch.zeros_like(flow_B)
        if prev_target is not None and self.prev_loss_weight > 0:
            prev_B = self._per_sample(model_output[:, :-frames], prev_target)
            if prev_valid_B is not None:
                # over the valid rows alone, else dropout of 0.5 would halve the weight
                share = prev_valid_B.float().mean() if prev_share is None else torch.tensor(prev_share)
                prev_B = prev_B * prev_valid_B / share.clamp(min=1e-6)
        loss_B = self.lambda_ot * flow_B + self.lambda_vel * vel_B + self.prev_loss_weight * prev_B
        return {
            "loss": loss_B.mean(),
            "loss_flow": flow_B.mean(),
            "loss_vel": vel_B.mean(),
            "loss_prev": prev_B.mean(),
            "loss_B": loss_B,
        }


# --- the trainer ------------------------------------------------------------------------------------------------------


class FlowMatchingTrainer:
    """Losses, validation and samples of phase 2 as functions for the loop.

    criterion: any module with RectifiedFlowLoss's call; None: the settings' one. In the hooks `model` is what is called
    (wrapped by the strategy and in the run's precision) and self.model the bare module behind it, for its constants.
    """

    def __init__(
        self,
        config: Config,
        model: MotionGenerator,
        train_set: FLOATDataset | None = None,
        val_set: FLOATDataset | None = None,
        *,
        info: DistInfo | None = None,
        criterion: nn.Module | None = None,
        callbacks: Sequence[Callback] = (),
        sampler: Callable[[Any, int, Path], None] | None = None,
    ):
        training = config.training
        self.config, self.model, self.train_set, self.val_set = config, model, train_set, val_set
        self.info, self.callbacks, self.sampler = info or DistInfo(), list(callbacks), sampler
        self.flow = RectifiedFlow(
            sigma_min=training.sigma_min, sigma_max=training.sigma_max, time_sampling=training.time_sampling
        )
        self.criterion = criterion or RectifiedFlowLoss(
            training.loss_type,
            lambda_ot=training.lambda_ot,
            lambda_vel=training.lambda_vel,
            prev_loss_weight=training.prev_loss_weight,
        )
        # a criterion of the user's own may ask for the previous frames' velocity whatever the settings say
        self.window_only = training.window_only and (
            isinstance(self.criterion, RectifiedFlowLoss) and self.criterion.prev_loss_weight == 0
        )
        chances = config.model
        self.drop_chances = torch.tensor(  # of wa, wr, we, prev_x, prev_wa, each drawn on its own per sample
            [chances.audio_dropout_prob, chances.ref_dropout_prob, chances.emotion_dropout_prob]
            + [chances.prev_frame_dropout_prob] * 2
        )
        self.shape = config.data.sequence_length, model.fmt.dim_w  # of one sample in the flow's space, (L, d)
        self.last_metrics: dict[str, Tensor] = {}
        self.last_validation: dict[str, float] = {}
        self.handle: TrainedModel | None = None  # the loop's own, which knows the last gradient's norm
        self.planned_steps = 1
        self.steps_per_epoch: int | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    # --- hooks of the loop --------------------------------------------------------------------------------------------

    def losses(self, model: Callable, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        """One (loss, metrics) a micro-batch."""
        seed = self.config.run.seed
        self.handle = model if isinstance(model, TrainedModel) else None
        drops = [self._drops(batch, step) for batch in batches]
        prev_share = self._share_of_valid_previous(batches, drops)
        for batch, drop_B5 in zip(batches, drops, strict=True):
            # `slot` is a sample's place in the global batch of the step. Draws keyed by (seed, step, slot) are the same
            # on one rank and on eight, in one micro-step and in four, before and after a restart.
            slots, device = batch["slot"], batch["motion_latent_cur"].device
            t_B = self.flow.times(keyed_rand((), key=(seed, TIMES, step), slots=slots, device=device))
            noise = keyed_randn(self.shape, key=(seed, NOISE, step), slots=slots, device=device)

            terms = self._terms(model, batch, t_B, noise, drop_B5, prev_share)
            loss_B = terms.pop("loss_B").detach()
            self.last_metrics = {name: value.detach() for name, value in terms.items()}
            metrics = {name: value for name, value in self.last_metrics.items() if name != "loss"}
            # the loop adds up what is yielded: the mean over micro-batches is made here
            yield terms["loss"] / len(batches), {**metrics, "loss_by_t": (t_B, loss_B)}

    def _drops(self, batch: dict, step: int) -> Tensor:
        """(B, 5): which conditions of which sample are left out in this step."""
        device = batch["motion_latent_cur"].device
        key = (self.config.run.seed, DROPS, step)
        return keyed_rand((5,), key=key, slots=batch["slot"], device=device) < self.drop_chances.to(device)

    def _share_of_valid_previous(self, batches: list[dict], drops: list[Tensor]) -> float | None:
        """Of all rows of the step, over micro-batches and ranks, so that their number does not change the loss; None
        where no loss asks.
        """
        if self.config.training.prev_loss_weight == 0:
            return None
        valid = [_has_previous(batch, drop_B5).float().mean() for batch, drop_B5 in zip(batches, drops, strict=True)]
        return mean_over_ranks({"valid": float(torch.stack(valid).mean())})["valid"]

    def _terms(
        self,
        model: Callable,
        batch: dict,
        t_B: Tensor,
        noise: Tensor,
        drop_B5: Tensor | None,
        prev_share: float | None = None,
    ) -> dict[str, Tensor]:
        whiten, has_previous_B, reference_Bd = self.model.whiten, batch["has_previous"], batch["reference_motion"]
        data = whiten(batch["motion_latent_cur"], reference_Bd)
        # a window at the start of its clip has no previous motion: zeros after whitening, as the sampler's first window
        previous = whiten(batch["motion_latent_prev"], reference_Bd) * has_previous_B[:, None, None]

        output = model(
            t_B,
            self.flow.interpolate(noise, data, t_B),
            batch["audio_cur"].float(),  # cached in half precision, perhaps
            whiten(reference_Bd),
            batch["emotion_features"],
            previous,
            batch["audio_prev"].float(),
            drop_B5=drop_B5,
            has_previous_B=has_previous_B,
            window_only=self.window_only,
        )

        velocity = self.flow.target_velocity(noise, data)
        if self.window_only:
            return self.criterion(output, velocity)
        # what the previous frames are asked for is their motion before augmentation, where the model was shown them
        clean = whiten(batch.get("motion_latent_prev_clean", batch["motion_latent_prev"]), reference_Bd)
        previous_terms: dict[str, Any] = {"prev_target": clean, "prev_valid_B": _has_previous(batch, drop_B5)}
        if prev_share is not None:
            previous_terms["prev_share"] = prev_share
        return self.criterion(output, velocity, **previous_terms)

    def validate(self, model: Callable, step: int) -> dict[str, float]:
        """Loss on all held-out windows without condition dropout, with the same noise and times in every validation."""
        val_set = self.val_set
        assert val_set is not None, "fit calls this hook only where there is a validation set"
        info = self.info
        totals: dict[str, float] = {}
        starts = list(range(0, len(val_set), VALIDATION_BATCH))
        # Ranks share the batches out. All make the same number of passes, for a sharded model gathers its weights in
        # every pass: one that has no batch left takes the first once more, at weight 0.
        for turn in range(0, len(starts), info.world):
            mine = turn + info.rank
            start = starts[mine if mine < len(starts) else 0]
            indices = range(start, min(start + VALIDATION_BATCH, len(val_set)))
            batch = collate_windows([val_set.sample(index, 0) for index in indices])
            batch = to_device({**batch, "slot": torch.tensor(list(indices))}, info.device)
            # the loop takes the mean over ranks of what is returned
            weight = info.world * len(indices) / len(val_set) if mine < len(starts) else 0.0
            for name, value in self._held_out_terms(model, batch).items():
                totals[name] = totals.get(name, 0.0) + float(value) * weight
        self.last_validation = {f"val/{name}": value for name, value in mean_over_ranks(totals).items()}
        return totals

    def _held_out_terms(self, model: Callable, batch: dict) -> dict[str, Tensor]:
        seed, slots, device = self.config.run.seed, batch["slot"], batch["motion_latent_cur"].device
        t_B = keyed_rand((), key=(seed, HELD_OUT, 0), slots=slots, device=device)
        noise = keyed_randn(self.shape, key=(seed, HELD_OUT, 1), slots=slots, device=device)
        terms = self._terms(model, batch, t_B, noise, None)
        return {name: value for name, value in terms.items() if name != "loss_B"}

    def after_step(self, module: nn.Module, step: int) -> None:
        """Run the callbacks when an epoch ends, with the step's losses, grad_norm and lr, and the last validation."""
        if self.callbacks and self.steps_per_epoch and (step + 1) % self.steps_per_epoch == 0:
            metrics = {f"train/{name}": float(value) for name, value in self.last_metrics.items()}
            if self.handle is not None and self.handle.last_step is not None:
                metrics["train/grad_norm"] = self.handle.last_step.grad_norm
            metrics["train/lr"] = lr_at(step, self.config.training, self.planned_steps)
            metrics |= self.last_validation
            for callback in self.callbacks:
                callback(self, (step + 1) // self.steps_per_epoch, metrics)

    def train(self, output_dir: Path | None = None) -> FitResult:
        """Train to the planned step, resuming what is in the output folder."""
        config, training = self.config, self.config.training
        assert self.train_set is not None, "train() needs a train_set"
        output_dir = Path(output_dir or config.run.output_dir)
        stream = create_dataloader(
            self.train_set,
            batch_size=training.batch_size,
            info=self.info,
            accumulation=accumulation_steps(training, self.info.world),
            seed=config.run.seed,
            num_workers=training.num_workers,
            prefetch_factor=training.prefetch_factor,
            drop_last=config.data.drop_last,
            bad_samples=output_dir / "bad_samples.jsonl",
        )
        self.steps_per_epoch = stream.steps_per_epoch
        settle(config, steps_per_epoch=stream.plan.steps_per_epoch, device_type=self.info.device.type)
        self.planned_steps = plan_steps(training, stream)
        return fit(
            config=config,
            info=self.info,
            model=self.model,
            stream=stream,
            losses=self.losses,
            validate=self.validate if self.val_set is not None else None,
            sample=self.sampler,
            after_step=self.after_step,
            wrap_classes=(FMTBlock,),
            output_dir=output_dir,
            title="FLOAT phase 2, motion flow",
        )

    # --- one step at a time, outside the loop -------------------------------------------------------------------------

    def train_step(self, batch: dict, step: int = 0) -> dict[str, float]:
        """One optimizer step on one batch: {loss, loss_flow, loss_vel, loss_prev, grad_norm}. For notebooks; `train`
        is the loop.
        """
        training = self.config.training
        if self.optimizer is None:
            self.optimizer = adamw(
                decay_groups(self.model, training.weight_decay), dict(self.model.named_parameters()), training
            )
        self.model.train()
        loss, _ = next(self.losses(self.model, [_with_slots(batch)], step))
        loss.backward()
        limit = training.max_grad_norm if training.max_grad_norm is not None else float("inf")
        grad_norm = nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: float(value) for name, value in {**self.last_metrics, "grad_norm": grad_norm}.items()}

    @torch.no_grad()
    def validate_step(self, batch: dict) -> dict[str, float]:
        """{val_loss, val_loss_flow, ...} of one batch, without dropout, with fixed noise and times."""
        self.model.eval()
        terms = self._held_out_terms(self.model, _with_slots(batch))
        return {f"val_{name}": float(value) for name, value in terms.items()}


class EarlyStopping:
    """For a loop of one's own around train_step: whether `patience` validations in a row were no better than the best
    one by more than min_delta. FlowMatchingTrainer.train obeys early_stopping_patience by itself.
    """

    def __init__(self, patience: int = 10, min_delta: float = 1e-4):
        self.patience, self.min_delta, self.best, self.counter = patience, min_delta, float("inf"), 0

    def __call__(self, val_loss: float) -> bool:
        """Take in a validation loss; True when it is time to stop."""
        better = self.best - val_loss > self.min_delta
        self.best, self.counter = (val_loss, 0) if better else (self.best, self.counter + 1)
        return self.counter >= self.patience


def _has_previous(batch: dict, drop_B5: Tensor | None) -> Tensor:
    """(B,) bool: whose previous motion the model is shown."""
    return batch["has_previous"] if drop_B5 is None else batch["has_previous"] & ~drop_B5[:, 3]


def _with_slots(batch: dict) -> dict:
    return {"slot": torch.arange(len(batch["motion_latent_cur"])), **batch}
