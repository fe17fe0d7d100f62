"""From sound to motion: guided velocity, windows, streams (FLOAT section 3.3).

Shapes: B batch, T frames of the clip, L frames of a window, P frames before it, d motion width, a audio width, E
emotions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from float.sampling.ode import solve_ode

# (t_B, x, wa, wr, we, prev_x, prev_wa) -> (B, P + L, d) or (B, L, d); FlowMatchingTransformer is one
VelocityModel = Callable[..., Tensor]


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
    model: VelocityModel,
    t_B: Tensor,
    x: Tensor,
    wa: Tensor,
    wr: Tensor,
    we: Tensor,
    prev_x: Tensor,
    prev_wa: Tensor,
    options: SamplingOptions,
    null_audio: float = 0.0,
) -> Tensor:
    """Velocity of the model's shape under incremental guidance.

    v = v_u + a (v_a - v_u) + e (v_all - v_a), where v_u sees neither sound nor emotion, v_a the sound, v_all both;
    null is zero (`null_audio` fills the sound's null, for models that project the sound themselves).
    With reference_guidance v_u is replaced by v_0 + r (v_u - v_0), v_0 without the reference too. All passes go in one
    batch.
    """
    a, r, e = options.a_cfg_scale, options.r_cfg_scale, options.e_cfg_scale
    if a == r == e == 1:
        return model(t_B, x, wa, wr, we, prev_x, prev_wa)
    no_wa, no_we = torch.full_like(wa, null_audio), torch.zeros_like(we)
    passes = [(no_wa, wr, no_we), (wa, wr, we), (wa, wr, no_we)]
    if options.reference_guidance:
        passes.append((no_wa, torch.zeros_like(wr), no_we))
    count = len(passes)
    was, wrs, wes = (torch.cat(parts) for parts in zip(*passes, strict=True))
    repeated = [torch.cat([value] * count) for value in (t_B, x, prev_x, prev_wa)]
    out = model(repeated[0], repeated[1], was, wrs, wes, repeated[2], repeated[3]).chunk(count)
    v_u, v_all, v_a = out[:3]
    base = v_u if count == 3 else out[3] + r * (v_u - out[3])
    return base + a * (v_a - v_u) + e * (v_all - v_a)


def pad_frames(frames: Tensor, length: int) -> Tensor:
    """(B, n, c) -> (B, length, c) by repeating the last frame."""
    missing = length - frames.shape[1]
    return frames if missing <= 0 else torch.cat([frames, frames[:, -1:].expand(-1, missing, -1)], 1)


@torch.no_grad()
def sample_windows(
    model: VelocityModel,
    wa_windows: Iterator[Tensor],
    wr_Bd: Tensor,
    we_B1E: Tensor | Iterator[Tensor],
    *,
    num_frames: int,
    num_prev_frames: int,
    options: SamplingOptions,
    noise: Iterator[Tensor] | None = None,
    null_audio: float = 0.0,
) -> Iterator[Tensor]:
    """Motion (B, L, d) of one window after another; memory does not grow with the number of windows.

    wa_windows yields projected features (B, n, a) with n = L, less only in the last window, which is padded by its last
    frame. we: constant, or one (B, 1, E) per window. noise: start states (B, L, d); drawn from options.seed when None.
    Each window sees the last P frames of the sample before it and of that window's features; the first sees zeros.
    """
    noise = noise if noise is not None else _noise(wr_Bd, num_frames, options)
    previous: tuple[Tensor, Tensor] | None = None
    for wa in wa_windows:
        wa = pad_frames(wa, num_frames)
        if previous is None:
            no_motion = wa.new_zeros(len(wa), num_prev_frames, wr_Bd.shape[-1])
            previous = no_motion, wa.new_full((len(wa), num_prev_frames, wa.shape[-1]), null_audio)
        prev_x, prev_wa = previous
        we = we_B1E if isinstance(we_B1E, Tensor) else next(we_B1E)

        def velocity(x: Tensor, t_B: Tensor, wa=wa, we=we, prev_x=prev_x, prev_wa=prev_wa) -> Tensor:
            out = guided_velocity(model, t_B, x, wa, wr_Bd, we, prev_x, prev_wa, options, null_audio)
            return out[:, -num_frames:]

        sample = solve_ode(
            velocity,
            options.noise_scale * next(noise).to(wa.device),
            nfe=options.nfe,
            steps=options.steps,
            method=options.method,
            atol=options.atol,
            rtol=options.rtol,
        )
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
    model: VelocityModel,
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
    windows = iter(wa_BTa.split(num_frames, 1))
    samples = sample_windows(
        model,
        windows,
        wr_Bd,
        we_B1E,
        num_frames=num_frames,
        num_prev_frames=num_prev_frames,
        options=options,
        noise=noise,
    )
    return torch.cat(list(samples), 1)[:, :frames]
