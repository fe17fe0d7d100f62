"""The language model of BAGEL: Qwen2 with two sets of weights a layer, one for text and ViT tokens, one for VAE tokens.

Every token belongs to one expert; all tokens of a sample share the attention. The tokens of the two experts are kept
apart (a `Pair`) and meet in the attention alone. Letters of shapes: L tokens, D width, H heads, K head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bagel.config import LanguageConfig
from bagel.modules.attention import Pair
from bagel.modules.layers import RMSNorm, rotary_angles, rotate

Attend = Callable[[int, Pair, Pair, Pair], Pair]


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoTAttention(nn.Module):
    """Projections of both experts around one joint attention; query and key are normed per head before the rotary
    embedding.
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        self.head = head
        for expert in ("", "_moe_gen"):
            setattr(self, f"q_proj{expert}", nn.Linear(width, queries))
            setattr(self, f"k_proj{expert}", nn.Linear(width, keys))
            setattr(self, f"v_proj{expert}", nn.Linear(width, keys))
            setattr(self, f"o_proj{expert}", nn.Linear(queries, width, bias=False))
            setattr(self, f"q_norm{expert}", RMSNorm(head, config.rms_norm_eps))
            setattr(self, f"k_norm{expert}", RMSNorm(head, config.rms_norm_eps))

    def _project(self, x_LD: Tensor, expert: str, angles: Pair, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        module = self._modules
        query, key, value = (module[f"{name}_proj{expert}"](x_LD).unflatten(-1, (-1, self.head)) for name in "qkv")
        query, key = module[f"q_norm{expert}"](query), module[f"k_norm{expert}"](key)
        if frozen:
            query, key, value = query.detach(), key.detach(), value.detach()
        return rotate(query, *angles), rotate(key, *angles), value

    def forward(
        self, und: Tensor, gen: Tensor, angles: tuple[Pair, Pair], attend: Attend, layer: int, freeze_und: bool
    ) -> Pair:
        sides = self._project(und, "", angles[0], freeze_und), self._project(gen, "_moe_gen", angles[1], False)
        query, key, value = zip(*sides, strict=True)
        und, gen = attend(layer, query, key, value)
        und = self.o_proj(und.flatten(1))
        return und.detach() if freeze_und else und, self.o_proj_moe_gen(gen.flatten(1))


class MoTDecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with the weights of the token's own expert."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = MoTAttention(config)
        self.mlp = GatedMLP(width, config.intermediate_size)
        self.mlp_moe_gen = GatedMLP(width, config.intermediate_size)
        self.input_layernorm = RMSNorm(width, eps)
        self.input_layernorm_moe_gen = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm_moe_gen = RMSNorm(width, eps)

    def forward(
        self,
        und: Tensor,
        gen: Tensor,
        angles: tuple[Pair, Pair],
        attend: Attend,
        layer: int,
        freeze_und: bool = False,
    ) -> Pair:
        seen = self.self_attn(
            self.input_layernorm(und), self.input_layernorm_moe_gen(gen), angles, attend, layer, freeze_und
        )
        und, gen = und + seen[0], gen + seen[1]
        thought = self.mlp(self.post_attention_layernorm(und))
        gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und + (thought.detach() if freeze_und else thought), gen


class MoTDecoder(nn.Module):
    """Embeddings, layers and the two final norms."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoTDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_width, self.theta = config.head_dim, config.rope_theta
        self.gradient_checkpointing = False

    def forward(self, und: Tensor, gen: Tensor, positions: Pair, attend: Attend, freeze_und: bool = False) -> Pair:
        """Hidden states of both experts' tokens after the final norms; `positions` are those of each token."""
        angles = tuple(rotary_angles(position_L, self.head_width, self.theta) for position_L in positions)
        if freeze_und:  # the layers detach what each of them adds to these tokens
            und = und.detach()
        for number, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                und, gen = checkpoint(layer, und, gen, angles, attend, number, freeze_und, use_reentrant=False)
            else:
                und, gen = layer(und, gen, angles, attend, number, freeze_und)
        und = self.norm(und)
        return und.detach() if freeze_und else und, self.norm_moe_gen(gen)


class LanguageModel(nn.Module):
    """The decoder and its untied head."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.model = MoTDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def copy_experts(self) -> None:
        """Start the generation expert as a copy of the understanding expert, as one does from a plain Qwen2."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if "_moe_gen" in name:
                    parameter.copy_(parameters[name.replace("_moe_gen", "")])

    def resize_vocabulary(self, size: int) -> None:
        """Append rows for new tokens, drawn like the others; a table that is large enough is never shrunk."""
        old = self.model.embed_tokens.num_embeddings
        if size <= old:
            return
        width = self.model.embed_tokens.embedding_dim
        embedding, head = nn.Embedding(size, width), nn.Linear(width, size, bias=False)
        for new, former in ((embedding, self.model.embed_tokens), (head, self.lm_head)):
            nn.init.normal_(new.weight, std=0.02)
            new.to(former.weight.device, former.weight.dtype)
            with torch.no_grad():
                new.weight[:old] = former.weight
        self.model.embed_tokens, self.lm_head = embedding, head
