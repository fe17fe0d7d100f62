"""The parts of a block: modulation, normalisation, attention, feed-forward.

Shapes: B batch, N image tokens, T text tokens, L all tokens of a block, D width, K head width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from dit.modules.embeddings import rotate

EPS = 1e-6
Rotation = tuple[Tensor, Tensor] | None


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same for every token of a sample."""
    return torch.addcmul(shift_BD[:, None], x_BLD, 1 + scale_BD[:, None])


class Norm(nn.Module):
    """Normalisation over the width without trained parameters: layernorm, rmsnorm, or none."""

    def __init__(self, hidden_size: int, kind: str = "layernorm") -> None:
        super().__init__()
        self.hidden_size, self.kind = hidden_size, kind

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.kind == "layernorm":
            return layer_norm(x_BLD, (self.hidden_size,), eps=EPS)
        if self.kind == "rmsnorm":
            return nn.functional.rms_norm(x_BLD, (self.hidden_size,), eps=EPS)
        return x_BLD


class Attention(nn.Module):
    """Self-attention; rows of qkv are ordered q, k, v and inside each by head."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        head_width = hidden_size // num_heads
        self.q_norm = nn.RMSNorm(head_width, eps=EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width, eps=EPS) if qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, rotation: Rotation = None, mask_BL: Tensor | None = None) -> Tensor:
        qkv = rearrange(self.qkv(x_BLD), "b l (three heads k) -> b l three heads k", three=3, heads=self.num_heads)
        # unbound where they lie, so that their gradients are stacked in the order of memory
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        mask = None if mask_BL is None else mask_BL[:, None, None]
        return self.proj(
            rearrange(scaled_dot_product_attention(q, k, v, attn_mask=mask), "b heads l k -> b l (heads k)")
        )


class CrossAttention(nn.Module):
    """Image tokens look at text tokens; padding is masked."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, text_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        q = rearrange(self.q(x_BND), "b n (heads k) -> b heads n k", heads=self.num_heads)
        kv = rearrange(self.kv(text_BTD), "b t (two heads k) -> b t two heads k", two=2, heads=self.num_heads)
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        mask = None if mask_BT is None else mask_BT[:, None, None]
        return self.proj(
            rearrange(scaled_dot_product_attention(q, k, v, attn_mask=mask), "b heads n k -> b n (heads k)")
        )


class MLP(nn.Module):
    """GELU (tanh) or SwiGLU, whose 8D/3 hidden units, rounded up to 256, make about the same number of parameters."""

    def __init__(self, hidden_size: int, *, kind: str = "gelu", ratio: float = 4.0) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = -(-8 * hidden_size // 3 // 256) * 256 if self.gated else int(hidden_size * ratio)
        self.fc1 = nn.Linear(hidden_size, 2 * hidden if self.gated else hidden)
        self.fc2 = nn.Linear(hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(nn.functional.silu(gate) * value)
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))
