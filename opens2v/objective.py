"""The objective: flow matching of clips with subject pictures, and of clips alone for the small base.

Noise, timesteps and dropped conditions are keyed by (seed, step, slot): one rank and many ranks train alike.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opens2v.config import Config, ModelConfig
from opens2v.data.video import normalise
from opens2v.modules.causal import causal_frame_mask, frame_blocks
from opens2v.modules.conditions import Conditions, Encoders
from opens2v.sampling.scheduler import TIMESTEP_OF_NOISE, FlowMatchScheduler, velocity_of
from shared.flow import sample_times
from shared.rng import keyed_rand, keyed_randn

_NOISE, _TIMES, _DROPS, _CONTEXT_NOISE, _CONTEXT_TIMES = 511, 512, 513, 514, 515  # random streams
_SILENT_STEPS = 100  # steps after which reference layers that are still zero are a fault


class RefImageFlowMatching:
    """losses(model, batches, step) of the generator with subject pictures."""

    def __init__(self, config: Config, encoders: Encoders, *, with_references: bool = True):
        self.config, self.encoders, self.with_references = config, encoders, with_references
        self.scheduler = FlowMatchScheduler(
            config.training.timestep_shift, num_train_timesteps=config.training.num_train_timestep
        )

    def losses(self, model: Any, batches: list[dict], step: int) -> Iterator[tuple[Tensor, dict]]:
        """One pre-weighted loss per micro-batch: mean over samples and frames of weight(t) * square of v - target."""
        training = self.config.training
        # Collected at the same step on all ranks: one that pauses alone makes the others wait for it.
        if training.gc_interval and step % training.gc_interval == 0:
            gc.collect()
        for micro, batch in enumerate(batches):
            # slot is a sample's place in the global batch of this step. Every draw is keyed by (seed, step, slot), so
            # that ranks, micro-batches and restarts do not change what a sample is trained with.
            slots = batch["slot"]
            # Dropped references are masked, not left out: every rank runs the same layers in every step, and with a
            # weight of 0 their gradients are 0 instead of missing, which data parallel training would wait for.
            conditions = self._dropped(self._conditions(batch), step, slots)
            clean = conditions.latents_BCFhw
            assert clean is not None  # a training batch holds frames or their latents
            # Times stay in float32: bf16 would round them by up to 2 of 1000 above 512.
            noise = self._draw(keyed_randn, clean.shape[1:], _NOISE, step, slots)
            timestep = self.draw_timesteps(clean.shape[2], step, slots)
            error_BF, weight = self.errors(model, conditions, clean, noise, timestep, step, slots)
            weighted = error_BF * weight
            extra: dict[str, Any] = {
                "velocity_error": error_BF.mean(),
                "loss_by_t": (timestep.reshape(len(clean), -1).mean(1) / TIMESTEP_OF_NOISE, error_BF.mean(1)),
            }
            # model.module is the bare transformer; reading its gates costs a device synchronisation, so only where the
            # log line is due.
            is_last = micro == len(batches) - 1
            if self.with_references and is_last and (step + 1) % training.logging_steps == 0:
                extra |= reference_strength(model.module, step)
            # The loop adds the micro-batches up and averages over ranks: the sum is the mean over the global batch.
            yield weighted.mean() / len(batches), extra

    def errors(
        self,
        model: Any,
        conditions: Conditions,
        clean: Tensor,
        noise: Tensor,
        timestep: Tensor,
        step: int,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Squared velocity error by sample and frame (B, F), and its weight (B, 1) or (B, F)."""
        settings, sigma = self.config.model, self.scheduler.sigma_of(timestep)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        arguments: dict[str, Any] = conditions.reference() if self.with_references else {}
        arguments |= causal_arguments(settings, clean)
        if settings.noise_augmentation_max_timestep:
            arguments |= self._noisy_context(clean, step, slots)
        arguments["text_length"] = conditions.text_length
        output = model(noisy, timestep, conditions.text_BRD, return_dict=False, **arguments)[0]
        # The error is taken in float32, outside autocast; a small base gives mean and variance instead of the velocity.
        velocity = velocity_of(output.float(), noisy, sigma, settings.prediction, self.encoders.codec.variance)
        error_BF = (velocity - self.scheduler.target(clean, noise)).square().mean((1, 3, 4))
        weight = (
            self.scheduler.weight_of(timestep)
            if self.config.training.loss_weighting == "gaussian"
            else torch.ones_like(sigma)
        )
        return error_BF, weight.reshape(len(clean), -1)

    def draw_timesteps(self, frames: int, step: int, slots: Tensor) -> Tensor:
        """Timesteps of the table, float32: (B,), or (B, F) equal inside each causal block."""
        settings, count = self.config.model, 1
        if settings.causal:
            lengths = frame_blocks(frames, settings.num_frame_per_block, settings.independent_first_frame)
            count = len(lengths)
        uniform_BK = self._draw(keyed_rand, (count,), _TIMES, step, slots)
        times_BK = sample_times(self.config.training.timestep_sampling, uniform_BK)
        entries = self.scheduler.num_train_timesteps
        index_BK = (times_BK * entries).long().clamp(max=entries - 1)
        timestep_BK = self.scheduler.timesteps.to(index_BK.device)[index_BK]
        if not settings.causal:
            return timestep_BK[:, 0]
        return torch.cat([timestep_BK[:, [k]].expand(-1, length) for k, length in enumerate(lengths)], 1)

    def _draw(self, draw: Callable, shape: tuple[int, ...], part: int, step: int, slots: Tensor) -> Tensor:
        """Random numbers of one part of a step, (B, *shape), where the encoders are."""
        return draw(shape, key=(self.config.run.seed, part, step), slots=slots, device=self.encoders.device)

    def _noisy_context(self, clean: Tensor, step: int, slots: Tensor) -> dict[str, Tensor]:
        """Teacher forcing's clean frames made a little noisy, and their timesteps."""
        limit = self.config.model.noise_augmentation_max_timestep
        timestep = self._draw(keyed_rand, (1,), _CONTEXT_TIMES, step, slots).expand(-1, clean.shape[2]) * limit
        noise = self._draw(keyed_randn, clean.shape[1:], _CONTEXT_NOISE, step, slots)
        return {"clean_hidden_states": self.scheduler.add_noise(clean, noise, timestep), "clean_timestep": timestep}

    def _conditions(self, batch: dict) -> Conditions:
        if self.with_references:
            return self.encoders.conditions(batch)
        frames = normalise(batch["frames"].to(self.encoders.device))
        empty = torch.zeros(len(frames), 0, device=frames.device)
        return Conditions(
            self.encoders.codec.encode(frames), self.encoders.encode_text(batch["prompts"]), None, empty, empty
        )

    def _dropped(self, conditions: Conditions, step: int, slots: Tensor) -> Conditions:
        """Leave out text, subject or both, per sample; the three exclude one another."""
        training = self.config.training
        draw_B = self._draw(keyed_rand, (1,), _DROPS, step, slots)[:, 0]
        text_end = training.p_drop_text
        both_end = text_end + training.p_drop_both
        if both_end > 0:
            conditions = conditions.without_text(self.encoders.null_text(), draw_B < both_end)
        if self.with_references:
            conditions = conditions.without_subject((draw_B >= text_end) & (draw_B < both_end + training.p_drop_ref))
        return conditions


def frame_mask(settings: ModelConfig, frames: int) -> Tensor:
    """The causal mask of a configuration, bool (F, F), or (2F, 2F) with teacher forcing."""
    return causal_frame_mask(
        frames, settings.num_frame_per_block, independent_first_frame=settings.independent_first_frame,
        local_window=settings.local_attn_size, teacher_forcing=settings.teacher_forcing,
    )  # fmt: skip


def causal_arguments(settings: ModelConfig, clean: Tensor) -> dict[str, Tensor]:
    """What a causal model's forward takes more: its mask, and with teacher forcing the clean frames at timestep 0."""
    if not settings.causal:
        return {}
    found = {"frame_mask": frame_mask(settings, clean.shape[2])}
    if settings.teacher_forcing:
        found["clean_hidden_states"] = clean
    return found


def reference_strength(module: nn.Module, step: int) -> dict[str, float]:
    """Mean |gate_clip| and the norm of the v_vae weights; both zero after 100 steps means that nothing arrives."""
    gates, squares, seen = [], 0.0, False
    for name, parameter in module.named_parameters():
        if not name.endswith(("gate_clip", "v_vae.weight")) or hasattr(
            parameter, "ds_tensor"
        ):  # zero3 holds only shards
            continue
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        seen = True
        if name.endswith("gate_clip"):
            gates.append(value.abs().mean().item())
        else:
            squares += value.float().square().sum().item()
    if not seen:
        return {}
    found = {"v_vae_norm": squares**0.5}
    if gates:
        found["gate_clip"] = sum(gates) / len(gates)
    if step >= _SILENT_STEPS and not any(found.values()):
        print(
            f"warning: step {step + 1}: gate_clip and v_vae are still exactly 0; the reference modules do not learn",
            flush=True,
        )
    return found
