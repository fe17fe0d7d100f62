"""The flow matching transformer (FLOAT section 3.2): noisy motion and frame-wise conditions -> velocity.

Shapes: B batch, L frames of the window, P frames before it, N = P + L tokens, d motion width, a audio width, E
emotions, h hidden. Module and parameter names follow the released checkpoint.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIME_FREQUENCIES = 256
NORM_EPSILON = 1e-6


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

    def forward(self, x_BNh: Tensor, mask_NN: Tensor) -> Tensor:
        """mask: 0 where a frame is seen, -inf elsewhere."""
        qkv = rearrange(self.qkv(x_BNh), "b n (three heads k) -> b n three heads k", three=3, heads=self.heads)
        # unbound where they lie, so that their gradients are stacked in the order of memory
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NN.to(q.dtype))
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


class FMTBlock(nn.Module):
    """A transformer block with adaLN-Zero modulation per frame (Peebles and Xie 2023, applied frame by frame)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width, int(width * mlp_ratio))
        self.adaLN_modulation = _adaptive(width, 6)

    def forward(self, x: Tensor, activated: Tensor, mask_NN: Tensor) -> Tensor:
        """activated: the condition behind adaLN_modulation's SiLU, which all blocks share."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation[1](activated).chunk(6, -1)
        x = x + gate_a * self.attn(modulated_norm(x, shift_a, scale_a), mask_NN)
        return x + gate_m * self.mlp(modulated_norm(x, shift_m, scale_m))


class Decoder(nn.Module):
    """Tokens -> velocity (B, N, d)."""

    def __init__(self, width: int, dim_w: int):
        super().__init__()
        self.adaLN_modulation = _adaptive(width, 2)
        self.linear = nn.Linear(width, dim_w)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](activated).chunk(2, -1)
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
        self.blocks = nn.ModuleList(FMTBlock(dim_h, num_heads, mlp_ratio) for _ in range(depth))
        self.decoder = Decoder(dim_h, dim_w)
        self.register_buffer("alignment_mask", band_mask(tokens, attention_window))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
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
        window_only: bool = False,
    ) -> Tensor:
        """-> velocity (B, N, d), whose last L frames are the window's; with window_only these alone, (B, L, d).

        t: (B,) in [0, 1], 0 is noise; x: noisy motion; wa: projected audio features; wr: motion latent of the reference
        picture; we: emotion probabilities. prev_*: the P frames before the window; None means zeros, unless x and wa
        hold all N frames already.
        """
        x, wa = self._with_previous(x_BLd, prev_x_BPd), self._with_previous(wa_BLa, prev_wa_BPa)
        tokens = x.shape[1]
        if tokens != self.pos_embed.shape[1] or wa.shape[1] != tokens:
            raise ValueError(f"{tokens} motion and {wa.shape[1]} audio frames, {self.pos_embed.shape[1]} expected")

        # Only the window's velocity is wanted as a rule. A frame sees `attention_window` frames back in each block, so
        # with k blocks to go those further back than k times as many no longer reach it: they are left out on the way.
        # first: the first frame that each block takes, and the decoder.
        blocks_left, window = range(len(self.blocks), -1, -1), self.attention_window
        first = [max(0, self.num_prev_frames - window * left) if window_only else 0 for left in blocks_left]
        x, wa, tokens = x[:, first[0] :], wa[:, first[0] :], tokens - first[0]

        # one condition a frame; every block and the decoder begin with the same SiLU of it, so it is taken once
        condition = torch.cat([wr_Bd[:, None].expand(-1, tokens, -1), wa, we_B1E.expand(-1, tokens, -1)], -1)
        activated = F.silu(self.c_embedder(condition) + self.t_embedder(t_B)[:, None])
        x = self.x_embedder(x) + self.pos_embed[:, first[0] :]

        # added to the attention scores; as a bool mask it would be turned into this in every block
        mask_NN = x.new_zeros(tokens, tokens).masked_fill_(self.alignment_mask[first[0] :, first[0] :], float("-inf"))
        for block, (now, later) in zip(self.blocks, pairwise(first), strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, activated, mask_NN, use_reentrant=False)
            else:
                x = block(x, activated, mask_NN)
            if later > now:
                dropped = later - now
                x, activated, mask_NN = x[:, dropped:], activated[:, dropped:], mask_NN[dropped:, dropped:].contiguous()
        return self.decoder(x, activated)

    def _with_previous(self, current: Tensor, previous: Tensor | None) -> Tensor:
        if previous is None:
            if current.shape[1] == self.num_frames + self.num_prev_frames:
                return current
            previous = current.new_zeros(len(current), self.num_prev_frames, current.shape[-1])
        return torch.cat([previous, current], 1)


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
    `set_motion_statistics`.
    """

    motion_mean: Tensor
    motion_whiten: Tensor
    motion_unwhiten: Tensor

    def __init__(self, fmt: FlowMatchingTransformer, raw_audio_dim: int, motion_width: int | None = None):
        super().__init__()
        width = motion_width or fmt.dim_w
        self.fmt = fmt
        self.audio_encoder = AudioProjection(raw_audio_dim, fmt.dim_a)
        self.register_buffer("motion_mean", torch.zeros(width))
        self.register_buffer("motion_whiten", torch.eye(width, fmt.dim_w))
        self.register_buffer("motion_unwhiten", torch.eye(fmt.dim_w, width))

    def set_motion_statistics(self, motion_TD: Tensor, *, floor: float = 0.05) -> None:
        """Whiten with the mean and the first d principal axes of many frames.

        Axes whose deviation is below `floor` of the largest are not blown up to unit size: they are noise.
        """
        motion = motion_TD.double()
        mean = motion.mean(0)
        variance, axes = torch.linalg.eigh(torch.cov((motion - mean).T))  # ascending
        axes = axes[:, -self.fmt.dim_w :]
        deviation = variance[-self.fmt.dim_w :].clamp(min=0).sqrt()
        deviation = deviation.clamp(min=max(floor * deviation.max().item(), 1e-8))
        self.motion_mean.copy_(mean)
        self.motion_whiten.copy_(axes / deviation)
        self.motion_unwhiten.copy_((axes * deviation).T)

    def whiten(self, motion: Tensor) -> Tensor:
        """Motion latents (..., d) -> the space of the flow."""
        return (motion - self.motion_mean) @ self.motion_whiten

    def unwhiten(self, whitened: Tensor) -> Tensor:
        """The space of the flow -> motion latents (..., d)."""
        return whitened @ self.motion_unwhiten + self.motion_mean

    def forward(
        self,
        t_B: Tensor,
        x_BLd: Tensor,
        audio_BLF: Tensor,
        wr_Bd: Tensor,
        we_B1E: Tensor,
        prev_x_BPd: Tensor,
        prev_audio_BPF: Tensor,
        *,
        drop_B5: Tensor | None = None,
        has_previous_B: Tensor | None = None,
        null_audio_B: Tensor | None = None,
        window_only: bool = False,
    ) -> Tensor:
        """Velocity (B, N, d), or (B, L, d) with window_only. audio_*: raw features; motion: whitened already.

        drop: True replaces, per sample, wa, wr, we, prev_x, prev_wa by zeros (condition dropout). has_previous: False
        where the window starts the clip, so that projected previous sound is zero as in sampling. null_audio: rows
        that guidance asks without sound.
        """
        # the projection learns too, so it runs here and not in the cache
        wa, prev_wa = self.audio_encoder(audio_BLF), self.audio_encoder(prev_audio_BPF)
        wr, we, prev_x = wr_Bd, we_B1E, prev_x_BPd

        # "no sound" is zero behind the projection, whose bias would make silence of zeros before it
        if has_previous_B is not None:
            prev_wa = _zero_rows(prev_wa, ~has_previous_B)
        if null_audio_B is not None:
            wa = _zero_rows(wa, null_audio_B)

        # condition dropout: guidance asks the same network with and without each condition
        if drop_B5 is not None:
            conditions = (wa, wr, we, prev_x, prev_wa)
            wa, wr, we, prev_x, prev_wa = (
                _zero_rows(condition, drop) for condition, drop in zip(conditions, drop_B5.unbind(1), strict=True)
            )
        return self.fmt(t_B, x_BLd, wa, wr, we, prev_x, prev_wa, window_only=window_only)


def _zero_rows(condition: Tensor, drop_B: Tensor) -> Tensor:
    """A copy with the chosen rows zero; the caller's tensor stays as it is."""
    return condition.masked_fill(drop_B.reshape(-1, *[1] * (condition.ndim - 1)), 0.0)
