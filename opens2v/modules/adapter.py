"""The reference-image adapter: projections of a subject picture, and the cross-attention that looks at it.

Shapes: B batch, N subjects, S reference tokens, L video tokens, D width, C feature channels, H heads, h w latent grid.
Three separate softmaxes (text, CLIP features, VAE latents) share one query, so that the frozen text path stays
untouched.
"""

import math
from dataclasses import dataclass, field

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class ReferenceTokens:
    """What the transformer's blocks see of the subject pictures.

    mask_*: bool (B, S), True where the token's subject exists; a row without any subject is all True and has weight 0.
    None where all would be True: the fast kernels of a GPU take no mask.
    weight_B11: 0 or 1, times the wished reference scale. memory: keys and values by block, kept while sampling.
    """

    clip_BSD: Tensor | None
    vae_BSD: Tensor | None
    mask_clip_BS: Tensor | None
    mask_vae_BS: Tensor | None
    weight_B11: Tensor
    memory: dict[int, list] | None = field(default=None)
    latents_BNChw: Tensor | None = None  # of the pictures, where they also enter self-attention
    mask_self_BS: Tensor | None = None
    features: list[Tensor] | None = None  # by block, (B, S, D): what the base makes of the pictures
    rotary: tuple[Tensor, ...] | None = None  # of their tokens


def sincos_1d(count: int, dim: int, first: int = 0, base: float = 10000.0) -> Tensor:
    """Fixed positions (count, D), float64: [sin, cos] of first, first + 1, ..., frequencies base^(-i / (D / 2))."""
    omega = base ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(first, first + count, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos_2d(height: int, width: int, dim: int, base: float = 10000.0) -> Tensor:
    """Fixed positions (h w, D), float32: [sin, cos] of the row, then of the column, frequencies base^(-i / (D / 4))."""
    if dim % 4:
        raise ValueError(f"2-D sine positions need a width divisible by 4, got {dim}")
    row = sincos_1d(height, dim // 2, base=base)[:, None].expand(-1, width, -1)
    column = sincos_1d(width, dim // 2, base=base)[None].expand(height, -1, -1)
    return torch.cat([row, column], -1).flatten(0, 1).float()


def clip_projection(kind: str, clip_dim: int, dim: int) -> nn.Module:
    """linear: one layer. mlp: the shape of Wan's image-to-video projection."""
    if kind == "linear":
        return nn.Linear(clip_dim, dim)
    if kind == "mlp":
        return nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )
    raise ValueError(f"clip_proj_type {kind!r} is not one of linear, mlp")


def subject_mask(ref_mask_BN: Tensor, tokens_per_subject: int) -> Tensor:
    """bool (B, N) -> (B, N tokens); rows without any subject become all True: a softmax needs a key."""
    usable_BN = ref_mask_BN | ~ref_mask_BN.any(1, keepdim=True)
    return usable_BN.repeat_interleave(tokens_per_subject, 1)


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMS norm in float32 whatever the dtypes of input and weight."""
    return functional.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps).to(x.dtype)


def without_padding(text_BRD: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Text rows of which all from `length` on are equal, with two of those, and what to add to the logits (1, S).

    n equal keys count as one with log n on its logit. It is split over two, the first of a value that bfloat16 holds,
    since half a percent of 400 rows would be seen.
    """
    count = text_BRD.shape[1] - length
    first = torch.tensor(math.log(0.98 * count)).bfloat16().item()
    bias = torch.zeros(1, length + 2, device=text_BRD.device)
    bias[0, length], bias[0, length + 1] = first, math.log(count - math.exp(first))
    return text_BRD[:, : length + 2], bias


def attend(q_BLD: Tensor, k_BSD: Tensor, v_BSD: Tensor, heads: int, mask_BS: Tensor | None = None) -> Tensor:
    """Multi-head softmax attention (B, L, D) -> (B, L, D). mask: bool, which keys there are; or added to the logits."""
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q_BLD, k_BSD.type_as(q_BLD), v_BSD.type_as(q_BLD))
    )
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


Path = tuple[Tensor, Tensor, Tensor | None]  # keys, values, mask of the keys


class DualPathCrossAttention(WanAttention):
    """A Wan block's cross-attention with subject paths beside the text path.

    q     = RMS(Wq x; norm_q)
    text  = A(q, RMS(Wk t; norm_k), Wv t)                                  frozen
    clip  = A(q, RMS(Wk p; norm_k), Wv p)             clip_path "shared": frozen, times the trained gate_clip
    clip  = A(q, RMS(Wk' p; norm_added_k), Wv' p)     clip_path "separate": own add_k_proj, add_v_proj
    vae   = A(q, RMS(k_vae z; norm_k_vae), v_vae z)
    fused = A(q, RMS(k_fused u; norm_k_fused), v_fused u), u = [p ; z]     only with fused_path
    out   = Wo(text + gate_clip clip + vae + fused)
    """

    # WanAttention declares these as optional; with clip_path "separate" they are layers.
    add_k_proj: nn.Linear  # type: ignore[assignment]
    add_v_proj: nn.Linear  # type: ignore[assignment]

    def __init__(self, dim: int, heads: int, *, eps: float = 1e-6, clip_path: str = "shared", fused_path: bool = False):
        super().__init__(dim=dim, heads=heads, dim_head=dim // heads, eps=eps, cross_attention_dim_head=dim // heads)
        if clip_path not in ("shared", "separate", "off"):
            raise ValueError(f"clip_path {clip_path!r} is not one of shared, separate, off")
        self.clip_path, self.fused_path = clip_path, fused_path
        self.k_vae, self.v_vae, self.norm_k_vae = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.RMSNorm(dim, eps=eps)
        if clip_path == "shared":
            self.gate_clip = nn.Parameter(torch.zeros(1))
        elif clip_path == "separate":
            self.add_k_proj, self.add_v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)
        if fused_path:
            self.k_fused, self.v_fused, self.norm_k_fused = (
                nn.Linear(dim, dim),
                nn.Linear(dim, dim),
                nn.RMSNorm(dim, eps=eps),
            )

    @torch.no_grad()
    def reset_reference_parameters(self) -> None:
        """The initial values under which the output equals the base's; called when norm_k holds the base weights.

        Value layers are zero, so their path adds exactly 0 while they receive a full gradient; keys are Xavier with the
        base's key norm, which keeps q.k at the scale that the base's queries expect. Never zero both factors of a
        product.
        """
        for key, value, norm in self.new_paths():
            nn.init.xavier_uniform_(key.weight)
            for zero in (key.bias, value.weight, value.bias):
                nn.init.zeros_(zero)
            norm.weight.copy_(self.norm_k.weight)
        if self.clip_path == "shared":
            nn.init.zeros_(self.gate_clip)

    def new_paths(self) -> list[tuple[nn.Linear, nn.Linear, nn.RMSNorm]]:
        """(key, value, key norm) of every path that has layers of its own."""
        paths = [(self.k_vae, self.v_vae, self.norm_k_vae)]
        if self.clip_path == "separate":
            paths.append((self.add_k_proj, self.add_v_proj, self.norm_added_k))
        if self.fused_path:
            paths.append((self.k_fused, self.v_fused, self.norm_k_fused))
        return paths

    def forward(  # type: ignore[override]  # the block calls it, no processor of diffusers
        self,
        x_BLD: Tensor,
        text_BSD: Tensor,
        references: ReferenceTokens | None = None,
        layer: int = 0,
        text_bias: Tensor | None = None,
    ) -> Tensor:
        """x: normed video tokens; text: projected text; text_bias: see without_padding. Without references this is the
        base's arithmetic.
        """
        q = self.norm_q(self.to_q(x_BLD))
        out = attend(q, self.norm_k(self.to_k(text_BSD)), self.to_v(text_BSD), self.heads, text_bias).type_as(q)
        paths = [] if references is None else self._keys_values(references, layer)
        for place, (key, value, mask) in enumerate(paths):
            path = attend(q, key, value, self.heads, mask)
            out = out.add_(path) if place else out + path  # the first sum is ours, what was added keeps its memory
        return self.to_out[0](out)

    def _keys_values(self, references: ReferenceTokens, layer: int) -> list[Path]:
        """Every subject path; remembered when the references carry a memory. What multiplies a path is in its values,
        which are fewer than the video's tokens.
        """
        if references.memory is not None and layer in references.memory:
            return references.memory[layer]
        clip, vae = references.clip_BSD, references.vae_BSD
        found: list[Path] = []
        if clip is not None and self.clip_path == "shared":
            key = self.norm_k(self.to_k(clip))
            value = self.to_v(clip)
            found.append((key, value * self.gate_clip.to(value.dtype), references.mask_clip_BS))
        elif clip is not None and self.clip_path == "separate":
            key = rms_norm(self.norm_added_k, self.add_k_proj(clip))
            found.append((key, self.add_v_proj(clip), references.mask_clip_BS))
        if vae is not None:
            found.append((rms_norm(self.norm_k_vae, self.k_vae(vae)), self.v_vae(vae), references.mask_vae_BS))
        if self.fused_path and clip is not None and vae is not None:
            both, masks = torch.cat([clip, vae], 1), (references.mask_clip_BS, references.mask_vae_BS)
            mask = None if masks[0] is None or masks[1] is None else torch.cat([masks[0], masks[1]], 1)
            found.append((rms_norm(self.norm_k_fused, self.k_fused(both)), self.v_fused(both), mask))
        found = [(key, value * references.weight_B11.to(value.dtype), mask) for key, value, mask in found]
        if references.memory is not None:
            references.memory[layer] = found
        return found


class RefSelfAttention(WanAttention):
    """A Wan block's self-attention that also looks at what the frozen base itself makes of the subject pictures.

    The pictures run through the base as videos of one clean frame (timestep 0, no gradient). Of the features u that
    enter this block's self-attention there, with fixed positions:
        out = Wo(A(q, k, v) + A(q, R(RMS(k_ref u; norm_k_ref)), v_ref u)),    R the rotary embedding of the picture
    Rotary positions of picture and frame make "one cell further right" one turn for all places.
    k_ref starts as the base's own key layer, v_ref at zero: the output is the base's at step 0. Features of the base
    carry detail that two projections of a VAE latent cannot (Stand-In, AnimateAnyone's reference network).
    """

    def __init__(self, dim: int, heads: int, *, eps: float = 1e-6):
        super().__init__(dim=dim, heads=heads, dim_head=dim // heads, eps=eps)
        self.k_ref, self.v_ref, self.norm_k_ref = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.RMSNorm(dim, eps=eps)

    @torch.no_grad()
    def reset_reference_parameters(self) -> None:
        """See DualPathCrossAttention.reset_reference_parameters."""
        self.k_ref.load_state_dict(self.to_k.state_dict())
        self.norm_k_ref.weight.copy_(self.norm_k.weight)
        nn.init.zeros_(self.v_ref.weight)
        nn.init.zeros_(self.v_ref.bias)
