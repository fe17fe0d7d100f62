"""Pre-norm transformer blocks that all four towers share.

Legend: B batch, N tokens, D width, H heads, K head width (64).
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from shared.engine.products import linear
from shared.engine.recompute import checkpoint

HEAD_WIDTH = 64
CHUNKED_FROM = 1024  # tokens from which `auto` avoids attention that would build the whole matrix


def chunked_attention(
    query_BHNK: Tensor, key_BHNK: Tensor, value_BHNK: Tensor, mask: Tensor | None, chunk: int
) -> Tensor:
    """Exact attention over `chunk` queries at a time, softmax in fp32; holds B x H x chunk x N scores, never N x N.

    mask: bool, broadcastable to (B, H, N, N) over a query axis of 1, True where a key is seen. The scores of a chunk
    are computed again in the backward pass.
    """
    assert mask is None or mask.shape[-2] == 1, "only key masks are supported"

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.matmul(scores.softmax(-1).to(value.dtype), value)

    parts = [checkpoint(attend, query, key_BHNK, value_BHNK) for query in query_BHNK.split(chunk, 2)]
    return torch.cat(parts, 2)


def has_fused_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether scaled_dot_product_attention runs these tensors without building the attention matrix."""
    if query.device.type != "cuda":
        return mask is None
    parameters = torch.backends.cuda.SDPAParams(query, key, value, mask, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(parameters) or torch.backends.cuda.can_use_efficient_attention(
        parameters
    )


class QueryKeyValue(nn.Linear):
    """One linear for queries, keys and values; on request the whole attention of the first token alone."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, 3 * width)
        self.heads = heads

    def forward(  # type: ignore[override]
        self, x_BND: Tensor, mask_BN: Tensor | None = None, first_only: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Queries, keys and values, each (B, N, D); with first_only what the first token gathers, (B, 1, D)."""
        if not first_only:
            return linear(x_BND, self.weight, self.bias).chunk(3, -1)
        # One query a head: q (W_k x) = (q W_k) x, and the sum of p (W_v x) is W_v (the sum of p x). So neither keys nor
        # values of the other tokens are made. The keys' bias adds the same to all scores. fp32, as fused kernels sum.
        with torch.autocast(x_BND.device.type, enabled=False):
            x, heads = x_BND.float(), self.heads
            query, key, value = rearrange(self.weight.float(), "(s H K) D -> s H K D", s=3, H=heads)
            bias_q, _, bias_v = rearrange(self.bias.float(), "(s H K) -> s H K", s=3, H=heads)
            query_BHK = torch.einsum("BD,HKD->BHK", x[:, 0], query) + bias_q
            scores_BHN = torch.einsum("BHK,HKD->BHD", query_BHK * query.shape[1] ** -0.5, key) @ x.transpose(1, 2)
            if mask_BN is not None:
                scores_BHN = scores_BHN.masked_fill(~mask_BN.unsqueeze(1), float("-inf"))
            mixed_BHK = torch.einsum("BHD,HKD->BHK", scores_BHN.softmax(-1) @ x, value) + bias_v
        return rearrange(mixed_BHK, "B H K -> B 1 (H K)").to(x_BND.dtype)


class AddedLinear(nn.Linear):
    """residual + linear(x): the product is summed onto the residual, which spares a pass over memory."""

    def forward(self, x_BND: Tensor, residual_BND: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, N, D), without a residual the linear alone."""
        product_BND = linear(x_BND, self.weight, self.bias)
        return product_BND if residual_BND is None else residual_BND + product_BND


class Attention(nn.Module):
    """Multi-head self-attention with one fused QKV linear.

    kind: sdpa, chunked, or auto (chunked for long sequences without a fused kernel).
    """

    def __init__(self, width: int, heads: int, *, kind: str = "auto", chunk: int = 128):
        super().__init__()
        self.heads, self.kind, self.chunk = heads, kind, chunk
        self.qkv = QueryKeyValue(width, heads)
        self.output = AddedLinear(width, width)

    def forward(
        self,
        x_BND: Tensor,
        mask_BN: Tensor | None = None,
        first_only: bool = False,
        residual_BND: Tensor | None = None,
    ) -> Tensor:
        """mask_BN: bool, True where a token may be attended to; every row has at least one. first_only: (B, 1, D)."""
        if first_only:
            return self.output(self.qkv(x_BND, mask_BN, first_only=True), residual_BND)
        tokens = x_BND.shape[1]
        query, key, value = (rearrange(part, "B N (H K) -> B H N K", H=self.heads) for part in self.qkv(x_BND))
        mask = None if mask_BN is None else rearrange(mask_BN, "B N -> B 1 1 N")
        chunked = self.kind == "chunked" or (
            self.kind == "auto" and tokens > CHUNKED_FROM and not has_fused_kernel(query, key, value, mask)
        )
        if chunked:
            mixed = chunked_attention(query, key, value, mask, self.chunk)
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(rearrange(mixed, "B H N K -> B N (H K)"), residual_BND)


class Block(nn.Module):
    """x = x + Attention(LN(x)); x = x + MLP(LN(x)), exact GELU, MLP ratio 4: 12 D^2 + 13 D parameters."""

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0, kind: str = "auto", chunk: int = 128):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, kind=kind, chunk=chunk)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = AddedLinear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None, first_only: bool = False) -> Tensor:
        """first_only: the first token's output (B, 1, D), for a last block of which nothing else is read."""
        first = x_BND[:, :1] if first_only else x_BND
        if self.training and self.dropout.p:
            x_BND = first + self.dropout(self.attention(self.norm1(x_BND), mask_BN, first_only))
            return x_BND + self.dropout(self.contract(functional.gelu(self.expand(self.norm2(x_BND)))))
        x_BND = self.attention(self.norm1(x_BND), mask_BN, first_only, first)
        return self.contract(functional.gelu(self.expand(self.norm2(x_BND))), x_BND)


class Tower(nn.Module):
    """Blocks and a last LayerNorm. grad_checkpointing recomputes each block in the backward pass while training."""

    def __init__(self, width: int, depth: int, *, dropout: float = 0.0, kind: str = "auto", chunk: int = 128):
        super().__init__()
        assert width % HEAD_WIDTH == 0, f"width {width} is not a multiple of {HEAD_WIDTH}"
        self.width, self.depth, self.grad_checkpointing = width, depth, False
        heads = width // HEAD_WIDTH
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout, kind=kind, chunk=chunk) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None, first_only: bool = False) -> Tensor:
        """(B, N, D), or with first_only the first token alone (B, 1, D), which spares most of the last block."""
        for number, block in enumerate(self.blocks, 1):
            first = first_only and number == self.depth
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, mask_BN, first)
            else:
                x_BND = block(x_BND, mask_BN, first)
        return self.norm(x_BND)

    def initialise(self, std: float = 0.02) -> None:
        """Linears truncated normal; the outputs of attention and MLP std / sqrt(2 depth)."""
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.attention.qkv, block.attention.output, block.expand, block.contract):
                is_output = layer is block.attention.output or layer is block.contract
                small_normal_(layer, std / (2 * self.depth) ** 0.5 if is_output else std)


@torch.no_grad()
def small_normal_(layer: nn.Linear | nn.Conv2d, std: float = 0.02) -> None:
    """Weight: normal with this standard deviation, cut at two of them (by the inverse of its distribution). Bias:
    zero.
    """
    edge = math.erf(2 / math.sqrt(2))
    layer.weight.uniform_(-edge, edge).erfinv_().mul_(std * math.sqrt(2))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
