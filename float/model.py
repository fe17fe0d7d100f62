"""The flow matching transformer (FLOAT section 3.2): noisy motion and frame-wise conditions -> velocity.

Shapes: B batch, L frames of the window, P frames before it, N = P + L tokens, d motion width, a audio width, E
emotions, h hidden. Module and parameter names follow the released checkpoint.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from float.data.pose import VALUES, from_condition
from shared.engine.products import linear, use_fast_products
from shared.engine.recompute import checkpoint

TIME_FREQUENCIES = 256
Pass = tuple[bool, bool, bool]  # whether sound, reference motion and emotion are given
NORM_EPSILON = 1e-6
SINGULAR = 1e-6  # directions of less variance than this share of the largest say nothing of the pose


def sinusoid_positions(length: int, width: int) -> Tensor:
    """(1, length, width): even channels sin, odd channels cos of position / 10000^(2 (j // 2) / width).

    Angles in float64, rounded to float32 before the sine, as the released table was made.
    """
    channel = torch.arange(width, dtype=torch.float64)
    scale = 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / width)
    angle = (torch.arange(length, dtype=torch.float64)[:, None] / scale).float()
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table[None]


def band_mask(length: int, window: int) -> Tensor:
    """(length, length) bool, True where attention is blocked: frames more than `window` apart."""
    index = torch.arange(length)
    return (index[:, None] - index[None, :]).abs() > window


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1], not scaled by 1000, -> (B, h)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def frequencies(t_B: Tensor) -> Tensor:
        """[cos, sin] of t at 128 geometric frequencies, (B, 256), float32."""
        half = TIME_FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
        angle = t_B.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(self.frequencies(t_B).to(next(self.parameters()).dtype))


class SequenceEmbedder(nn.Module):
    """Motion -> tokens."""

    def __init__(self, dim_w: int, width: int):
        super().__init__()
        self.proj = nn.Linear(dim_w, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """Self-attention over neighbouring frames only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNh: Tensor, mask_MN: Tensor) -> Tensor:
        """-> the last M frames, (B, M, h). mask: 0 where a frame is seen, -inf elsewhere."""
        qkv = rearrange(self.qkv(x_BNh), "b n (three heads k) -> b n three heads k", three=3, heads=self.heads)
        # unbound where they lie, so that their gradients are stacked in the order of memory
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q = q[:, :, -len(mask_MN) :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_MN.to(q.dtype))
        return self.proj(rearrange(out, "b heads n k -> b n (heads k)"))


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then scale and shift per frame."""
    # not torch.addcmul: its gradient multiplies each part once more, by a scalar 1
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) * (1 + scale) + shift


def _adaptive(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def _modulation(linear: nn.Module, activated: Tensor, rows: Tensor | None) -> Tensor:
    """(B, N, parts h). Where several frames have one condition it is projected once: activated (B, R, h) holds the
    different ones, rows (passes, N) says which is whose; then -> (B passes, N, parts h).
    """
    if rows is None:
        return linear(activated)
    return linear(activated)[:, rows].flatten(0, 1)


class FMTBlock(nn.Module):
    """A transformer block with adaLN-Zero modulation per frame (Peebles and Xie 2023, applied frame by frame)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width, int(width * mlp_ratio))
        self.adaLN_modulation = _adaptive(width, 6)

    def forward(self, x: Tensor, activated: Tensor, mask_MN: Tensor, rows: Tensor | None = None) -> Tensor:
        """(B, N, h) -> (B, M, h): frames for which the mask has no row are only seen by the others, and come first.

        activated: the condition behind adaLN_modulation's SiLU, which all blocks share; rows: see _modulation.
        """
        modulation = _modulation(self.adaLN_modulation[1], activated, rows)
        shift_a, scale_a, *parts = modulation.chunk(6, -1)
        kept = slice(x.shape[1] - len(mask_MN), None)
        gate_a, shift_m, scale_m, gate_m = (part[:, kept] for part in parts)
        x = x[:, kept] + gate_a * self.attn(modulated_norm(x, shift_a, scale_a), mask_MN)
        return x + gate_m * self.mlp(modulated_norm(x, shift_m, scale_m))


class Decoder(nn.Module):
    """Tokens -> velocity (B, N, d)."""

    def __init__(self, width: int, dim_w: int):
        super().__init__()
        self.adaLN_modulation = _adaptive(width, 2)
        self.linear = nn.Linear(width, dim_w)

    def forward(self, x: Tensor, activated: Tensor, rows: Tensor | None = None) -> Tensor:
        shift, scale = _modulation(self.adaLN_modulation[1], activated, rows).chunk(2, -1)
        return self.linear(modulated_norm(x, shift, scale))


class FlowMatchingTransformer(nn.Module):
    """Velocity of the motion in a window, given sound, reference motion, emotion and the frames before."""

    alignment_mask: Tensor

    def __init__(
        self,
        *,
        dim_w: int = 512,
        dim_a: int = 512,
        dim_e: int = 7,
        dim_h: int = 1024,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        attention_window: int = 2,
        num_frames: int = 50,
        num_prev_frames: int = 10,
        gradient_checkpointing: bool = False,
        pose_width: int = 0,
    ):
        super().__init__()
        if dim_h % num_heads:
            raise ValueError(f"dim_h {dim_h} is not divisible by num_heads {num_heads}")
        self.dim_w, self.dim_a, self.num_frames, self.num_prev_frames = dim_w, dim_a, num_frames, num_prev_frames
        self.attention_window, self.gradient_checkpointing = attention_window, gradient_checkpointing
        tokens = num_frames + num_prev_frames
        self.x_embedder = SequenceEmbedder(dim_w, dim_h)
        self.pos_embed = nn.Parameter(sinusoid_positions(tokens, dim_h), requires_grad=False)
        self.t_embedder = TimestepEmbedder(dim_h)
        self.c_embedder = nn.Linear(dim_w + dim_a + dim_e, dim_h)
        # beside the motion, not in the modulation: a frame's motion is in great part linear in its pose. Without bias a
        # row of zeros says nothing
        self.p_embedder = nn.Linear(pose_width, dim_h, bias=False) if pose_width else None
        self.blocks = nn.ModuleList(FMTBlock(dim_h, num_heads, mlp_ratio) for _ in range(depth))
        self.decoder = Decoder(dim_h, dim_w)
        self.register_buffer("alignment_mask", band_mask(tokens, attention_window))
        self._initialise()
        use_fast_products(self)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # zero gates: every block starts as the identity and the whole network as the constant 0
        nn.init.zeros_(self.decoder.linear.weight)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.mlp.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if name.endswith("adaLN_modulation.1.weight"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        t_B: Tensor,
        x_BLd: Tensor,
        wa_BLa: Tensor,
        wr_Bd: Tensor,
        we_B1E: Tensor,
        prev_x_BPd: Tensor | None = None,
        prev_wa_BPa: Tensor | None = None,
        *,
        pose_BN7: Tensor | None = None,
        window_only: bool = False,
    ) -> Tensor:
        """-> velocity (B, N, d), whose last L frames are the window's; with window_only these alone, (B, L, d).

        t: (B,) in [0, 1], 0 is noise; x: noisy motion; wa: projected audio features; wr: motion latent of the reference
        picture; we: emotion probabilities; pose: of the head in all N frames (float/data/pose.py). prev_*: the P frames
        before the window; None means zeros, unless x and wa
        hold all N frames already.
        """
        first = self._first_frames(window_only)
        x = self._with_previous(x_BLd, prev_x_BPd, first[0])
        wa = self._with_previous(wa_BLa, prev_wa_BPa, first[0])
        # one condition a frame; every block and the decoder begin with the same SiLU of it, so it is taken once
        start, reference, sound, emotion = self._condition(t_B, wr_Bd, wa, we_B1E)
        activated = F.silu(sound + (start + reference + emotion))
        x = self._tokens(x, pose_BN7, first[0])
        for block, mask_MN, dropped in self._masked_blocks(first, x):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, activated, mask_MN)
            else:
                x = block(x, activated, mask_MN)
            activated = activated[:, dropped:].contiguous()
        return self.decoder(x, activated)

    def _condition(self, t_B: Tensor, wr_Bd: Tensor, wa_BNa: Tensor, we_B1E: Tensor) -> tuple[Tensor, ...]:
        """The condition is a sum, of which only the sound differs by frame: time (B, 1, h), reference (B, 1, h),
        sound (B, N, h) and emotion (B, 1, h), each projected once.
        """
        weight_r, weight_a, weight_e = self.c_embedder.weight.split([self.dim_w, self.dim_a, we_B1E.shape[-1]], 1)
        start = (self.c_embedder.bias + self.t_embedder(t_B))[:, None]
        return start, linear(wr_Bd, weight_r)[:, None], linear(wa_BNa, weight_a), linear(we_B1E, weight_e)

    def _tokens(self, x_BNd: Tensor, pose_BN7: Tensor | None, first: int) -> Tensor:
        """The motion of the frames from `first` on, their place, and their pose."""
        tokens: Tensor = self.x_embedder(x_BNd) + self.pos_embed[:, first:]
        if pose_BN7 is None:
            return tokens
        if self.p_embedder is None:
            raise ValueError("a pose is given to a transformer without a pose condition")
        return tokens + self.p_embedder(pose_BN7[:, first:])

    def _masked_blocks(self, first: list[int], like: Tensor) -> Iterator[tuple[nn.Module, Tensor, int]]:
        """Each block with its mask (M, N) of the frames that it takes and keeps, and how many it leaves out."""
        # added to the attention scores; as a bool mask it would be turned into this in every block
        mask_NN = torch.zeros_like(self.alignment_mask, dtype=like.dtype)
        mask_NN.masked_fill_(self.alignment_mask, float("-inf"))
        for block, (now, later) in zip(self.blocks, pairwise(first), strict=True):
            yield block, mask_NN[later:, now:].contiguous(), later - now

    def _first_frames(self, window_only: bool) -> list[int]:
        """The first frame that each block takes, and the decoder.

        Only the window's velocity is wanted as a rule. A frame sees `attention_window` frames back in each block, so
        with k blocks to go those further back than k times as many no longer reach it: they are left out on the way,
        in the block where they are seen last.
        """
        if not window_only:
            return [0] * (len(self.blocks) + 1)
        blocks_left = range(len(self.blocks), -1, -1)
        return [max(0, self.num_prev_frames - self.attention_window * left) for left in blocks_left]

    def velocities(
        self,
        t_B: Tensor,
        x_BLd: Tensor,
        wa_BLa: Tensor,
        wr_Bd: Tensor,
        we_B1E: Tensor,
        prev_x_BPd: Tensor,
        prev_wa_BPa: Tensor,
        *,
        passes: Sequence[Pass],
        pose_BN7: Tensor | None = None,
        window_only: bool = False,
    ) -> Tensor:
        """Velocity under several choices of conditions at once: (passes, B, N, d), (passes, B, L, d) with window_only.

        For guidance. passes: (with sound, with reference, with emotion); what is left out is zero, in the window's
        frames; the pose is given in every pass. The same as forward for each, but what passes have in common is
        computed once: the embedded motion, the parts of the condition, and the modulation of all frames that have one
        condition, such as a whole window without sound.
        """
        first = self._first_frames(window_only)
        before, length = self.num_prev_frames - first[0], self.num_frames
        batch, count, tokens = len(x_BLd), len(passes), before + length
        wa = torch.cat([prev_wa_BPa[:, first[0] :], wa_BLa], 1)

        start, reference, sound, emotion = self._condition(t_B, wr_Bd, wa, we_B1E)

        # parts: the different conditions; rows: which of them each frame of each pass has
        parts: list[Tensor] = []
        places: dict[tuple[bool, ...], Tensor] = {}  # of frames that an earlier pass has under the same conditions
        rows = []

        def place(key: tuple[bool, ...], conditions: Tensor, frames: int) -> Tensor:
            if key not in places:
                offset = sum(part.shape[1] for part in parts)
                parts.append(conditions)
                places[key] = offset + torch.arange(conditions.shape[1], device=wa.device)
            return places[key].expand(frames)

        for with_sound, with_reference, with_emotion in passes:
            common = start + reference * with_reference + emotion * with_emotion
            previous = place((with_reference, with_emotion), common + sound[:, :before], before) if before else None
            current = common + sound[:, before:] if with_sound else common
            window = place((with_sound, with_reference, with_emotion), current, length)
            rows.append(window if previous is None else torch.cat([previous, window]))
        rows_N = torch.stack(rows)  # (passes, tokens)
        activated = F.silu(torch.cat(parts, 1))

        x = self._tokens(torch.cat([prev_x_BPd[:, first[0] :], x_BLd], 1), pose_BN7, first[0])
        x = x[:, None].expand(-1, count, -1, -1).reshape(batch * count, tokens, -1)
        for block, mask_MN, dropped in self._masked_blocks(first, x):
            x = block(x, activated, mask_MN, rows_N)
            rows_N = rows_N[:, dropped:]
        return rearrange(self.decoder(x, activated, rows_N), "(b passes) n d -> passes b n d", passes=count)

    def _with_previous(self, current: Tensor, previous: Tensor | None, first: int) -> Tensor:
        """The frames from `first` on."""
        expected = self.num_frames + self.num_prev_frames
        if previous is None:
            if current.shape[1] == expected:
                return current[:, first:]
            previous = current.new_zeros(len(current), self.num_prev_frames, current.shape[-1])
        if (given := previous.shape[1] + current.shape[1]) != expected:
            raise ValueError(f"{given} frames, {expected} expected")
        return torch.cat([previous[:, first:], current], 1)


class AudioProjection(nn.Module):
    """Holds the trained end of the audio encoder under its released name, audio_encoder.audio_projection."""

    def __init__(self, inputs: int, dim_a: int):
        super().__init__()
        self.audio_projection = nn.Sequential(nn.Linear(inputs, dim_a), nn.LayerNorm(dim_a), nn.SiLU())

    def forward(self, raw: Tensor) -> Tensor:
        return self.audio_projection(raw)


class MotionGenerator(nn.Module):
    """What phase 2 trains: audio projection and transformer, with the whitening of the motion space as constants.

    motion_width D: width of the auto-encoder's motion latents. As a rule the flow runs on them directly (D = d,
    whitening is the identity). With D > d it runs on d principal coordinates z = (r - mean) W, r = z W' + mean, set by
    `set_motion_statistics`. relative: it runs on the motion minus the reference's own.
    """

    motion_mean: Tensor
    motion_whiten: Tensor
    motion_unwhiten: Tensor
    motion_pose_read: Tensor
    motion_pose_write: Tensor

    def __init__(
        self,
        fmt: FlowMatchingTransformer,
        raw_audio_dim: int,
        motion_width: int | None = None,
        *,
        relative: bool = False,
    ):
        super().__init__()
        width = motion_width or fmt.dim_w
        self.fmt, self.relative = fmt, relative
        self.audio_encoder = AudioProjection(raw_audio_dim, fmt.dim_a)
        use_fast_products(self)
        self.register_buffer("motion_mean", torch.zeros(width))
        self.register_buffer("motion_whiten", torch.eye(width, fmt.dim_w))
        self.register_buffer("motion_unwhiten", torch.eye(fmt.dim_w, width))
        if fmt.p_embedder is not None:
            self.register_buffer("motion_pose_read", torch.zeros(fmt.dim_w, VALUES))
            self.register_buffer("motion_pose_write", torch.zeros(VALUES, fmt.dim_w))

    def set_motion_statistics(self, motion_TD: Tensor, *, spread_TD: Tensor | None = None, floor: float = 0.05) -> None:
        """Whiten with the mean and the first d principal axes of many frames; spread: other frames for the axes.

        Axes whose deviation is below `floor` of the largest are not blown up to unit size: they are noise.
        """
        mean, spread = motion_TD.double().mean(0), (motion_TD if spread_TD is None else spread_TD).double()
        variance, axes = torch.linalg.eigh(torch.cov((spread - spread.mean(0)).T))  # ascending
        axes = axes[:, -self.fmt.dim_w :]
        deviation = variance[-self.fmt.dim_w :].clamp(min=0).sqrt()
        deviation = deviation.clamp(min=max(floor * deviation.max().item(), 1e-8))
        self.motion_mean.copy_(mean)
        self.motion_whiten.copy_(axes / deviation)
        self.motion_unwhiten.copy_((axes * deviation).T)

    def set_pose_statistics(self, clips: Iterable[tuple[Tensor, Tensor]]) -> None:
        """How motion and head pose go together, linearly and within clips: (motion (T, D), pose (T, 6)) of each."""
        width = self.fmt.dim_w
        both = torch.zeros(width + VALUES, width + VALUES, dtype=torch.float64)
        for motion_TD, pose_T6 in clips:
            rows = torch.cat([motion_TD @ self.motion_whiten.cpu(), pose_T6], 1).double()
            both += torch.cov(rows.T, correction=0) * len(rows)
        motion, cross, pose = both[:width, :width], both[:width, width:], both[width:, width:]
        read = torch.linalg.pinv(motion, rtol=SINGULAR, hermitian=True) @ cross
        write = torch.linalg.pinv(pose, rtol=SINGULAR, hermitian=True) @ cross.T
        # what is written is what is read afterwards
        write = torch.linalg.pinv(write @ read, rtol=SINGULAR) @ write
        self.motion_pose_read.copy_(read)
        self.motion_pose_write.copy_(write)

    def pose_constant(self, motion_BLd: Tensor, pose_BL7: Tensor) -> Tensor:
        """(B, 1, 6): what motion in the flow's space reads beyond the pose that was asked for, in the mean. How motion
        and pose go together is known within clips; between clips this constant is who is seen and how, not a pose.
        """
        return (motion_BLd @ self.motion_pose_read - from_condition(pose_BL7)).mean(1, keepdim=True)

    def with_pose(self, motion_BLd: Tensor, pose_BL7: Tensor, constant_B16: Tensor) -> Tensor:
        """Motion in the flow's space, moved until the pose that is read off it, less the constant, is the given one.
        The transformer is told the pose; sound that it knows by heart still turns the head.
        """
        there = motion_BLd @ self.motion_pose_read - constant_B16
        return motion_BLd + pose_BL7[..., VALUES:] * (from_condition(pose_BL7) - there) @ self.motion_pose_write

    def whiten(self, motion: Tensor, reference_Bd: Tensor | None = None) -> Tensor:
        """Motion latents (..., d) in the flow's space; where it is relative, (B, T, d) less the reference (B, d)."""
        if self.relative and reference_Bd is not None:
            return (motion - reference_Bd[:, None]) @ self.motion_whiten
        return (motion - self.motion_mean) @ self.motion_whiten

    def unwhiten(self, whitened: Tensor, reference_Bd: Tensor | None = None) -> Tensor:
        """The space of the flow -> motion latents (..., d); the inverse of whiten."""
        if self.relative and reference_Bd is not None:
            return whitened @ self.motion_unwhiten + reference_Bd[:, None]
        return whitened @ self.motion_unwhiten + self.motion_mean

    def forward(
        self,
        t_B: Tensor | None,
        x_BLd: Tensor | None,
        audio_BLF: Tensor,
        wr_Bd: Tensor | None = None,
        we_B1E: Tensor | None = None,
        prev_x_BPd: Tensor | None = None,
        prev_audio_BPF: Tensor | None = None,
        *,
        drop_B5: Tensor | None = None,
        has_previous_B: Tensor | None = None,
        pose_BN7: Tensor | None = None,
        window_only: bool = False,
        passes: Sequence[Pass] | None = None,
    ) -> Tensor:
        """Velocity (B, N, d), or (B, L, d) with window_only. audio_*: raw features; motion: whitened already.

        drop: True replaces, per sample, wa, wr, we, prev_x, prev_wa by zeros (condition dropout). has_previous: False
        where the window starts the clip, so that projected previous sound is zero as in sampling.

        Sampling asks in two steps, through this one entry, for a wrapped model has no other: audio_BLF alone is
        projected, (B, L, a); with `passes` audio_* are such projections, and all passes' velocities come out,
        (passes, B, L, d).
        """
        if t_B is None or x_BLd is None:
            return self.audio_encoder(audio_BLF)
        assert wr_Bd is not None and we_B1E is not None and prev_x_BPd is not None and prev_audio_BPF is not None
        if passes is not None:
            inputs = t_B, x_BLd, audio_BLF, wr_Bd, we_B1E, prev_x_BPd, prev_audio_BPF
            return self.fmt.velocities(*inputs, passes=passes, pose_BN7=pose_BN7, window_only=True)

        # the projection learns too, so it runs here and not in the cache
        wa, prev_wa = self.audio_encoder(audio_BLF), self.audio_encoder(prev_audio_BPF)
        wr, we, prev_x = wr_Bd, we_B1E, prev_x_BPd

        # "no sound" is zero behind the projection, whose bias would make silence of zeros before it
        if has_previous_B is not None:
            prev_wa = _zero_rows(prev_wa, ~has_previous_B)

        # condition dropout: guidance asks the same network with and without each condition
        if drop_B5 is not None:
            conditions = (wa, wr, we, prev_x, prev_wa)
            wa, wr, we, prev_x, prev_wa = (
                _zero_rows(condition, drop) for condition, drop in zip(conditions, drop_B5.unbind(1), strict=True)
            )
        return self.fmt(t_B, x_BLd, wa, wr, we, prev_x, prev_wa, pose_BN7=pose_BN7, window_only=window_only)


def _zero_rows(condition: Tensor, drop_B: Tensor) -> Tensor:
    """A copy with the chosen rows zero; the caller's tensor stays as it is."""
    return condition.masked_fill(drop_B.reshape(-1, *[1] * (condition.ndim - 1)), 0.0)
