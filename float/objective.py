"""The objective of phase 2 as functions for the loop: rectified flow on motion latents."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from float.config import Config, settle
from float.dataset import FLOATDataset, collate_windows, create_dataloader
from float.model import FMTBlock, MotionGenerator
from float.rectified_flow import RectifiedFlow, RectifiedFlowLoss
from shared.config import accumulation_steps
from shared.data import to_device
from shared.engine.dist import DistInfo
from shared.loop import FitResult, fit
from shared.optim import adamw, decay_groups
from shared.rng import keyed_rand, keyed_randn

TIMES, NOISE, DROPS, HELD_OUT = 321, 322, 323, 324  # random streams
VALIDATION_BATCH = 32
# called at the end of every epoch with (trainer, epoch, metrics of the last step)
Callback = Callable[["FlowMatchingTrainer", int, dict[str, float]], None]


class FlowMatchingTrainer:
    """Losses, validation and samples of phase 2. `criterion` may be any module with RectifiedFlowLoss's call."""

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
        self.last_metrics: dict[str, float | Tensor] = {}
        self.steps_per_epoch: int | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    # --- the objective ------------------------------------------------------------------------------------------------

    def losses(self, model: Any, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        """One (loss, metrics) a micro-batch; draws are keyed by (seed, step, sample), so ranks and resumes do not
        change them.
        """
        seed, probabilities = self.config.run.seed, self._drop_probabilities()
        for batch in batches:
            draws = _draws(batch)
            t_B = self.flow.times(keyed_rand((), key=(seed, TIMES, step), **draws))
            noise = keyed_randn(self._shape(model), key=(seed, NOISE, step), **draws)
            drop_B5 = keyed_rand((5,), key=(seed, DROPS, step), **draws) < probabilities.to(draws["device"])
            terms = self._terms(model, batch, t_B, noise, drop_B5)
            loss_B = terms.pop("loss_B").detach()
            self.last_metrics = {name: value.detach() for name, value in terms.items()}
            metrics = {name: value for name, value in self.last_metrics.items() if name != "loss"}
            yield terms["loss"] / len(batches), {**metrics, "loss_by_t": (t_B, loss_B)}

    def _drop_probabilities(self) -> Tensor:
        """Of wa, wr, we, prev_x, prev_wa, each drawn on its own per sample."""
        model = self.config.model
        previous = model.prev_frame_dropout_prob
        return torch.tensor(
            [model.audio_dropout_prob, model.ref_dropout_prob, model.emotion_dropout_prob, previous, previous]
        )

    def _shape(self, model: Any) -> tuple[int, int]:
        """(L, d) of the flow's space."""
        return self.config.data.sequence_length, getattr(model, "module", model).fmt.dim_w

    def _terms(self, model: Any, batch: dict, t_B: Tensor, noise: Tensor, drop_B5: Tensor | None) -> dict[str, Tensor]:
        whiten = getattr(model, "module", model).whiten
        has_previous_B = batch["has_previous"]
        data = whiten(batch["motion_latent_cur"])
        previous = whiten(batch["motion_latent_prev"]) * has_previous_B[:, None, None]  # zeros, as in sampling
        velocity = self.flow.target_velocity(noise, data)
        output = model(
            t_B,
            self.flow.interpolate(noise, data, t_B),
            batch["audio_cur"].float(),
            whiten(batch["reference_motion"]),
            batch["emotion_features"],
            previous,
            batch["audio_prev"].float(),
            drop_B5=drop_B5,
            has_previous_B=has_previous_B,
            window_only=self.config.training.window_only and getattr(self.criterion, "prev_loss_weight", None) == 0,
        )
        valid_B = has_previous_B if drop_B5 is None else has_previous_B & ~drop_B5[:, 3]
        return self.criterion(output, velocity, prev_target=previous, prev_valid_B=valid_B)

    # --- hooks of the loop --------------------------------------------------------------------------------------------

    def validate(self, model: Any, step: int) -> dict[str, float]:
        """Loss on all held-out windows without condition dropout, with the same noise and times in every validation."""
        totals: dict[str, float] = {}
        for batch in self._held_out_batches():
            terms = self._held_out_terms(model, batch)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(batch["slot"]) / len(self.val_set)
        return totals

    def _held_out_batches(self) -> Iterator[dict]:
        for start in range(0, len(self.val_set), VALIDATION_BATCH):
            indices = range(start, min(start + VALIDATION_BATCH, len(self.val_set)))
            batch = collate_windows([self.val_set.sample(index, 0) for index in indices])
            yield to_device({**batch, "slot": torch.tensor(list(indices))}, self.info.device)

    def _held_out_terms(self, model: Any, batch: dict) -> dict[str, Tensor]:
        seed, draws = self.config.run.seed, _draws(batch)
        t_B = keyed_rand((), key=(seed, HELD_OUT, 0), **draws)
        noise = keyed_randn(self._shape(model), key=(seed, HELD_OUT, 1), **draws)
        terms = self._terms(model, batch, t_B, noise, None)
        return {name: value for name, value in terms.items() if name != "loss_B"}

    def after_step(self, module: nn.Module, step: int) -> None:
        """Run the callbacks when an epoch ends."""
        if self.callbacks and self.steps_per_epoch and (step + 1) % self.steps_per_epoch == 0:
            metrics = {f"train/{name}": float(value) for name, value in self.last_metrics.items()}
            for callback in self.callbacks:
                callback(self, (step + 1) // self.steps_per_epoch, metrics)

    def train(self, output_dir: Path | None = None) -> FitResult:
        """Train to the planned step, resuming what is in the output folder."""
        config, training = self.config, self.config.training
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
        settle(config, steps_per_epoch=stream.steps_per_epoch, device_type=self.info.device.type)
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


def _draws(batch: dict) -> dict[str, Any]:
    """Where keyed draws come from and go to: the samples' slots, the batch's device."""
    return {"slots": batch["slot"], "device": batch["motion_latent_cur"].device}


def _with_slots(batch: dict) -> dict:
    return {"slot": torch.arange(len(batch["motion_latent_cur"])), **batch}
