"""From noise to latents: Euler or UniPC, three forms of guidance, whole clips or block by block with a cache."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opens2v.config import Config, ModelConfig
from opens2v.data.annotations import Annotations
from opens2v.data.scenes import SCENE_RATE
from opens2v.modules.causal import KeyValueCache, frame_blocks
from opens2v.modules.conditions import Conditions, text_length
from opens2v.sampling.scheduler import TIMESTEP_OF_NOISE, FlowMatchScheduler, velocity_of
from shared.errors import UserError
from shared.rng import keyed_generator

GUIDANCE_MODES = ("text", "both", "dual")
_START = 531  # random stream


@dataclass
class SamplerSettings:
    """How a video is drawn. guidance_scale 1 with mode text needs one pass."""

    steps: int = 50
    sampler: str = "unipc"  # unipc or euler
    shift: float = 5.0
    guidance: str = "both"  # text, both or dual
    guidance_scale: float = 5.0  # text; in mode both, text and subject together
    img_guidance_scale: float = 3.0  # subject, mode dual
    ref_scale: float = 1.0  # factor on what the references add
    seed: int = 42

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE_MODES:
            raise ValueError(f"guidance {self.guidance!r} is not one of {', '.join(GUIDANCE_MODES)}")
        if self.sampler not in ("unipc", "euler"):
            raise ValueError(f"sampler {self.sampler!r} is not one of unipc, euler")


SMALL_STEPS, SMALL_GUIDANCE = 20, 1.5


def sampler_settings(config: Config, *, steps: int | None = None, **given: Any) -> SamplerSettings:
    """How videos of a run are drawn where nothing else is said, in training and by generate.py alike; None in `given`
    counts as not said. Small presets: 20 steps, guidance 1.5; else 50 steps, guidance 5.
    """
    is_small = config.model.codec != "wan"
    chosen: dict[str, Any] = {
        "steps": steps or (SMALL_STEPS if is_small else 50),
        "shift": config.training.timestep_shift,
        "guidance_scale": SMALL_GUIDANCE if is_small else 5.0,
        "seed": config.run.seed,
    }
    return SamplerSettings(**(chosen | {name: value for name, value in given.items() if value is not None}))


def video_rate(config: Config) -> float:
    """Frames per second at which a drawn clip moves as the training clips do: target_fps, or the rate of the first
    clip over the stride; 16, Wan's own, where the data cannot be asked.
    """
    data = config.data
    if data.target_fps is not None:
        return data.target_fps
    if data.scenes is not None and not data.json_paths:
        return SCENE_RATE
    try:
        rate = Annotations(data.json_paths[0], index_dir=data.index_dir).entry(0)["metadata"]["fps"]
        found = round(float(rate) / data.sample_stride, 2)
    except (UserError, OSError, KeyError, TypeError, ValueError, IndexError, OverflowError):
        return 16.0
    return found if 0.1 <= found <= 1000 else 16.0  # what a file can state


@dataclass
class _Pass:
    """One evaluation of the model per step: its text, its references, its caches."""

    text: Tensor
    arguments: dict[str, Any]  # references of the model's forward
    caches: dict[str, KeyValueCache] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arguments = {**self.arguments, "text_length": text_length(self.text)}


class VideoSampler:
    """Draws latents from a generator.

    model: called as the transformer. module: the transformer itself, so that the references are worked out once per
    video; None while its weights are sharded, when only calls of the whole model may touch them. variance_2C: of the
    codec.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        module: Any | None,
        settings: ModelConfig,
        sampler: SamplerSettings,
        variance_2C: Tensor | None = None,
    ):
        if module is None and sampler.ref_scale != 1:
            raise ValueError(f"ref_scale {sampler.ref_scale} needs the transformer itself")
        self.model, self.module, self.settings, self.sampler = model, module, settings, sampler
        self.scheduler, self.variance_2C = FlowMatchScheduler(sampler.shift), variance_2C

    @torch.no_grad()
    def sample(
        self,
        conditions: Conditions,
        negative_RD: Tensor,
        shape: tuple[int, int, int, int],
        places: list[int] | None = None,
    ) -> Tensor:
        """Latents (B, C, F, h, w) float32.

        negative: rows (R, D) of the negative prompt. Video i starts from noise keyed by (seed, places[i]), by default
        i.
        """
        text = conditions.text_BRD
        places = list(range(len(text))) if places is None else places
        rows = [torch.randn(shape, generator=keyed_generator(self.sampler.seed, _START, i)) for i in places]
        noise = torch.stack(rows).to(text.device)
        passes = self._passes(conditions, negative_RD)
        if self.settings.causal:
            return self._by_blocks(passes, noise)
        return self._denoise(noise, lambda x, sigma: self._guided(passes, x, sigma, None))

    def _passes(self, conditions: Conditions, negative_RD: Tensor) -> list[_Pass]:
        """The passes of a step in _combined's order. Keys and values of references are worked out once."""
        text, mode = conditions.text_BRD, self.sampler.guidance
        negative = negative_RD[None].expand_as(text)

        def seen(text: Tensor) -> _Pass:
            """With the subject. What self-attention remembers of a picture depends on the text, so each has its own."""
            if self.module is None:
                return _Pass(text, conditions.reference())
            scale = self.sampler.ref_scale
            tokens = self.module.project_references(**conditions.reference(), scale=scale, remember=True)
            return _Pass(text, {"references": tokens})

        if mode == "text" and self.sampler.guidance_scale == 1:
            return [seen(text)]
        if mode == "text":
            return [seen(negative), seen(text)]
        if mode == "both":
            return [_Pass(negative, {}), seen(text)]
        return [_Pass(negative, {}), seen(negative), seen(text)]

    def _combined(self, velocities: list[Tensor]) -> Tensor:
        """text, both: v0 + g (v1 - v0). dual: v0 + g_img (v1 - v0) + g (v2 - v1) (Phantom)."""
        if len(velocities) == 1:
            return velocities[0]
        if len(velocities) == 2:
            return velocities[0] + self.sampler.guidance_scale * (velocities[1] - velocities[0])
        bare, subject, both = velocities
        return (
            bare + self.sampler.img_guidance_scale * (subject - bare) + self.sampler.guidance_scale * (both - subject)
        )

    def _guided(self, passes: list[_Pass], x: Tensor, sigma: float, cache_name: str | None) -> Tensor:
        sigma_B = torch.full((len(x),), sigma, device=x.device)
        timestep = sigma_B * TIMESTEP_OF_NOISE
        velocities = []
        for one in passes:
            cache = None if cache_name is None else one.caches[cache_name]
            first = 0 if cache is None else cache.frames
            output = self.model(x, timestep, one.text, cache=cache, return_dict=False, **one.arguments)[0].float()
            velocities.append(velocity_of(output, x, sigma_B, self.settings.prediction, self.variance_2C, first))
        return self._combined(velocities)

    def _denoise(self, x: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Follow the velocity from noise to data."""
        if self.sampler.sampler == "unipc":
            return self._denoise_unipc(x, velocity)
        sigmas = [*self.scheduler.inference_sigmas(self.sampler.steps).tolist(), 0.0]
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = self.scheduler.step(velocity(x, sigma), x, sigma, following)
        return x

    def _denoise_unipc(self, x: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        solver = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.sampler.shift
        )
        solver.set_timesteps(self.sampler.steps, device=x.device)
        for place, timestep in enumerate(solver.timesteps):
            x = solver.step(velocity(x, float(solver.sigmas[place])), timestep, x, return_dict=False)[0]
        return x

    def _by_blocks(self, passes: list[_Pass], noise: Tensor) -> Tensor:
        """Causal models: finish a block, then run it once at timestep 0 to store its clean keys and values."""
        settings = self.settings
        for one in passes:
            one.caches["video"] = KeyValueCache(window=settings.local_attn_size)
        done, first = [], 0
        for length in frame_blocks(noise.shape[2], settings.num_frame_per_block, settings.independent_first_frame):
            block = noise[:, :, first : first + length]
            block = self._denoise(block, lambda x, sigma: self._guided(passes, x, sigma, "video"))
            done.append(block)
            first += length
            for one in passes:
                one.caches["video"].store = True
            self._guided(passes, block, 0.0, "video")
            for one in passes:
                one.caches["video"].store = False
        return torch.cat(done, 2)
