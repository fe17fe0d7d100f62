"""From sound to motion: guided velocity, windows, streams (FLOAT section 3.3).

Shapes: B batch, T frames of the clip, L frames of a window, P frames before it, d motion width, a audio width, E
emotions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from float.model import Pass
from shared.flow import integrate

# (t_B, x, wa, wr, we, prev_x, prev_wa) -> (B, P + L, d) or (B, L, d)
VelocityModel = Callable[..., Tensor]


@runtime_checkable
class ModelOfPasses(Protocol):
    """A model that computes several choices of conditions at once; FlowMatchingTransformer is one."""

    def velocities(self, t_B: Tensor, *inputs: Tensor, passes: Sequence[Pass], **pose: Tensor) -> Tensor:
        """inputs as a VelocityModel's; -> (passes, B, L, d)."""
        ...


def solver_times(nfe: int, steps: int | None = None) -> Tensor:
    """The solver's times from noise at 0 to data at 1. nfe counts time points as the released sampler does: nfe 10 is 9
    steps of 1/9. `steps` counts steps and overrides nfe.
    """
    intervals = nfe - 1 if steps is None else steps
    if intervals < 1:
        raise ValueError("nfe counts time points and must be at least 2 (steps at least 1)")
    return torch.linspace(0, 1, intervals + 1)


@dataclass(frozen=True)
class SamplingOptions:
    """Solver and guidance; the defaults are the released ones."""

    nfe: int = 10  # time points, one more than steps
    steps: int | None = None  # steps; overrides nfe
    method: str = "euler"
    atol: float = 1e-5
    rtol: float = 1e-5
    a_cfg_scale: float = 2.0  # weight of the sound
    r_cfg_scale: float = 1.0  # weight of the reference motion, acts with reference_guidance only
    e_cfg_scale: float = 1.0  # weight of the emotion; 5 to 10 exaggerates
    reference_guidance: bool = False  # a fourth pass without reference; the released sampler has none
    fix_noise_seed: bool = False  # the same noise in every window, as the released sampler does with this flag
    seed: int = 15
    noise_scale: float = 1.0  # sigma_max of the training path


def guided_velocity(
    model: VelocityModel | ModelOfPasses,
    t_B: Tensor,
    x: Tensor,
    wa: Tensor,
    wr: Tensor,
    we: Tensor,
    prev_x: Tensor,
    prev_wa: Tensor,
    options: SamplingOptions,
    has_emotion: bool = True,
    pose: Tensor | None = None,
) -> Tensor:
    """Velocity of the window (or of the model's shape) under incremental guidance.

    v = v_0 + r (v_u - v_0) + a (v_a - v_u) + e (v_all - v_a), where v_u sees neither sound nor emotion, v_a the sound,
    v_all both, v_0 not even the reference; null is zero. Without reference_guidance r is 1, so that v_0 does not count.
    has_emotion: False where the emotion is zero, so that v_all is v_a. pose: (B, P + L, 7), in every pass, for a model
    that has it as a condition.
    """
    a, r, e = options.a_cfg_scale, options.r_cfg_scale, options.e_cfg_scale
    r = r if options.reference_guidance else 1.0
    weights: dict[Pass, float] = {(False, False, False): 1 - r, (False, True, False): r - a}
    weights |= {(True, True, False): a - e, (True, True, True): e} if has_emotion else {(True, True, False): a}
    wanted = [(one, weight) for one, weight in weights.items() if weight]  # what would count nothing is not computed
    made = _passes(model, [one for one, _ in wanted], t_B, x, wa, wr, we, prev_x, prev_wa, pose=pose)
    # numbers, not a tensor of them: that would be copied to the device, with a wait, in every evaluation of the ODE
    first, *others = (weight * velocity for velocity, (_, weight) in zip(made.unbind(0), wanted, strict=True))
    return sum(others, first)


def _passes(
    model: VelocityModel | ModelOfPasses,
    passes: list[Pass],
    t_B: Tensor,
    x: Tensor,
    *conditions: Tensor,
    pose: Tensor | None,
) -> Tensor:
    """(passes, B, ., d): in one call of a model that shares what passes have in common, else as one larger batch.

    conditions: wa, wr, we, prev_x, prev_wa.
    """
    if isinstance(model, ModelOfPasses):
        return model.velocities(t_B, x, *conditions, passes=passes, **({} if pose is None else {"pose_BN7": pose}))
    chosen = [[condition * given for condition, given in zip(conditions[:3], one, strict=True)] for one in passes]
    was, wrs, wes = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    ts, xs, prev_xs, prev_was = (torch.cat([value] * len(passes)) for value in (t_B, x, *conditions[3:]))
    poses = {} if pose is None else {"pose_BN7": torch.cat([pose] * len(passes))}
    return model(ts, xs, was, wrs, wes, prev_xs, prev_was, **poses).unflatten(0, (len(passes), len(x)))


def pad_frames(frames: Tensor, length: int) -> Tensor:
    """(B, n, c) -> (B, length, c) by repeating the last frame."""
    missing = length - frames.shape[1]
    return frames if missing <= 0 else torch.cat([frames, frames[:, -1:].expand(-1, missing, -1)], 1)


@torch.no_grad()
def sample_windows(
    model: VelocityModel | ModelOfPasses,
    wa_windows: Iterator[Tensor],
    wr_Bd: Tensor,
    we_B1E: Tensor | Iterator[Tensor],
    *,
    num_frames: int,
    num_prev_frames: int,
    options: SamplingOptions,
    noise: Iterator[Tensor] | None = None,
    pose_windows: Iterator[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Motion (B, L, d) of one window after another; memory does not grow with the number of windows.

    wa_windows yields projected features (B, n, a) with n = L, less only in the last window, which is padded by its last
    frame. we: constant, or one (B, 1, E) per window. noise: start states (B, L, d); drawn from options.seed when None.
    pose_windows: (B, L, 7) of every window, for a model that has the head's pose as a condition.
    Each window sees the last P frames of the sample before it and of that window's features; the first sees zeros.
    """
    noise = noise if noise is not None else _noise(wr_Bd, num_frames, options)
    previous: tuple[Tensor, Tensor] | None = None
    pose: Tensor | None = None  # of the window and the frames before it
    for wa in wa_windows:
        wa = pad_frames(wa, num_frames)
        if previous is None:
            no_motion = wa.new_zeros(len(wa), num_prev_frames, wr_Bd.shape[-1])
            previous = no_motion, wa.new_zeros(len(wa), num_prev_frames, wa.shape[-1])
        prev_x, prev_wa = previous
        we = we_B1E if isinstance(we_B1E, Tensor) else next(we_B1E)
        if pose_windows is not None:
            now = next(pose_windows)
            before = now.new_zeros(len(now), num_prev_frames, now.shape[-1]) if pose is None else pose
            pose = torch.cat([before[:, before.shape[1] - num_prev_frames :], now], 1)
        ask = partial(
            guided_velocity, model, wa=wa, wr=wr_Bd, we=we, prev_x=prev_x, prev_wa=prev_wa, options=options,
            has_emotion=bool(we.any()), pose=pose,
        )  # fmt: skip

        def velocity(x: Tensor, t_B: Tensor, ask: Callable[..., Tensor] = ask) -> Tensor:
            return ask(t_B, x)[:, -num_frames:]

        start = options.noise_scale * next(noise).to(wa.device)
        times = solver_times(options.nfe, options.steps)
        sample = integrate(velocity, start, times, options.method, atol=options.atol, rtol=options.rtol)
        yield sample
        previous = (_last_frames(prev_x, sample, num_prev_frames), _last_frames(prev_wa, wa, num_prev_frames))


def _last_frames(before: Tensor, window: Tensor, count: int) -> Tensor:
    """The last `count` frames of both together; a window may be shorter than the context."""
    return torch.cat([before, window], 1)[:, before.shape[1] + window.shape[1] - count :]


def _noise(wr_Bd: Tensor, num_frames: int, options: SamplingOptions) -> Iterator[Tensor]:
    """Start states drawn on the CPU in float32, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        if options.fix_noise_seed:
            generator.manual_seed(options.seed)
        yield torch.randn(len(wr_Bd), num_frames, wr_Bd.shape[-1], generator=generator)


def sample_motion(
    model: VelocityModel | ModelOfPasses,
    wa_BTa: Tensor,
    wr_Bd: Tensor,
    we_B1E: Tensor,
    *,
    num_frames: int,
    num_prev_frames: int,
    options: SamplingOptions,
    noise: Iterator[Tensor] | None = None,
) -> Tensor:
    """Motion (B, T, d) for a whole clip of projected audio features (B, T, a)."""
    frames = wa_BTa.shape[1]
    if frames < 1:
        raise ValueError("no audio frames")
    samples = sample_windows(
        model, iter(wa_BTa.split(num_frames, 1)), wr_Bd, we_B1E, num_frames=num_frames,
        num_prev_frames=num_prev_frames, options=options, noise=noise,
    )  # fmt: skip
    return torch.cat(list(samples), 1)[:, :frames]
