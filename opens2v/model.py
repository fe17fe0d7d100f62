"""RefWanTransformer3DModel: diffusers' Wan transformer with subject pictures, causal frames and teacher forcing.

Shapes: B batch, C channels, F latent frames, L tokens, S tokens of a frame, D width, N subjects, h w latent grid.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from opens2v.modules.adapter import (
    DualPathCrossAttention,
    ReferenceTokens,
    RefSelfAttention,
    clip_projection,
    sincos_1d,
    sincos_2d,
    subject_mask,
    without_padding,
)
from opens2v.modules.causal import KeyValueCache, attention_runs, rotary_table, self_attention, with_turns
from shared.data import sent
from shared.engine.norm import RMSNorm, is_plain_fp32
from shared.engine.products import use_fast_products
from shared.errors import load_whole, opening

WAN_1_3B = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=8960,
    num_layers=30,
    rope_max_seq_len=1024,
)


_PADDING_WORTH_IT = 64  # rows; fewer are not worth a mask
_STAYS_IN_CACHE = 2**21  # values


class RefWanBlock(WanTransformerBlock):
    """One transformer block; frames, references and cache are arguments, so that recomputation sees the same."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        *,
        cross_attn_norm: bool,
        eps: float,
        layer: int,
        clip_path: str,
        fused_path: bool,
        ref_in_self_attention: bool,
    ):
        super().__init__(dim, ffn_dim, num_heads, cross_attn_norm=cross_attn_norm, eps=eps)
        if ref_in_self_attention:
            self.attn1 = RefSelfAttention(dim, num_heads, eps=eps)
        self.attn2 = DualPathCrossAttention(dim, num_heads, eps=eps, clip_path=clip_path, fused_path=fused_path)
        for attention in (self.attn1, self.attn2):  # the same values and names, in less time on a CPU
            attention.norm_q, attention.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)
        self.layer = layer

    def forward(  # type: ignore[override]  # only RefWanTransformer3DModel.forward calls it
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, ...],
        references: ReferenceTokens | None = None,
        runs: list | None = None,
        cache: KeyValueCache | None = None,
        tokens_per_frame: int = 1,
        text_bias: Tensor | None = None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """temb: (B, 6, D), or (B, T, 6, D) by frame or token. features: takes in what enters the self-attention."""
        parts = (self.scale_shift_table.float() + temb.float()).unbind(-2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_token(part, hidden_states.shape[1]) for part in parts)

        normed = modulated(self.norm1, hidden_states, shift1, scale1)
        if features is not None:
            features.append(normed)
        attended = self_attention(
            self.attn1, normed, rotary_emb, runs=runs, cache=cache, layer=self.layer,
            tokens_per_frame=tokens_per_frame, references=references,
        )  # fmt: skip
        hidden_states = (attended * gate1).add_(hidden_states.float()).type_as(hidden_states)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, references, self.layer, text_bias)

        normed = modulated(self.norm3, hidden_states, shift2, scale2)
        fed = self.ffn.net[2](tanh_gelu(self.ffn.get_submodule("net.0.proj")(normed)))
        return (fed.float() * gate2).add_(hidden_states.float()).type_as(hidden_states)


def modulated(norm: nn.LayerNorm, x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift in float32, as x's type; shift, scale (B, 1, D) or (B, L, D).

    One sample's modulation is handed to the norm as weights of its own: one pass over the tokens in place of three.
    """
    if scale.shape[:2] == (1, 1):
        scaled = functional.layer_norm(x_BLD.float(), norm.normalized_shape, 1 + scale[0, 0], shift[0, 0], norm.eps)
        return scaled.type_as(x_BLD)
    return (norm(x_BLD.float()) * (1 + scale)).add_(shift).type_as(x_BLD)


class SigmoidGELU(torch.autograd.Function):
    """x / 2 (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3), as x sigmoid(2u): on a CPU in 0.6 of torch's time, there
    and back, while its cache holds them.
    """

    SLOPE, CUBE = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715  # 2u = SLOPE x + CUBE x^3

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        share = torch.addcmul(x.new_tensor(SigmoidGELU.SLOPE), x, x, value=SigmoidGELU.CUBE).mul_(x).sigmoid_()
        given = x * share
        context.save_for_backward(x, share, given)
        return given

    @staticmethod
    def backward(context, grad: Tensor) -> Tensor:
        x, share, given = context.saved_tensors
        slope = torch.addcmul(x.new_tensor(SigmoidGELU.SLOPE), x, x, value=3 * SigmoidGELU.CUBE)
        return torch.addcmul(given, given, share, value=-1).mul_(slope).add_(share).mul_(grad)


def tanh_gelu(x_BLD: Tensor) -> Tensor:
    """Wan's activation; by hand where that takes less time."""
    if x_BLD.numel() <= _STAYS_IN_CACHE and is_plain_fp32(x_BLD, x_BLD):
        return SigmoidGELU.apply(x_BLD)
    return functional.gelu(x_BLD, approximate="tanh")


def per_token(value: Tensor, tokens: int) -> Tensor:
    """(B, D) -> (B, 1, D); (B, T, D) -> (B, L, D), each entry repeated for the tokens of its frame."""
    if value.ndim == 2:
        return value[:, None]
    return value.repeat_interleave(tokens // value.shape[1], 1)


class RefWanTransformer3DModel(WanTransformer3DModel):
    """The base's constructor and key names, plus the reference modules clip_proj, vae_proj and blocks.*.attn2.*."""

    _no_split_modules = ["RefWanBlock"]
    _repeated_blocks = ["RefWanBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        ref_clip_dim: int = 1280,
        clip_path: str = "shared",
        clip_proj_type: str = "linear",
        vae_pos_embed: str = "sincos2d",
        fused_path: bool = False,
        absolute_positions: bool = False,
        ref_in_self_attention: bool = False,
        position_base: float = 10000.0,
    ) -> None:
        super().__init__(
            patch_size=patch_size, num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim,
            in_channels=in_channels, out_channels=out_channels, text_dim=text_dim, freq_dim=freq_dim, ffn_dim=ffn_dim,
            num_layers=0, cross_attn_norm=cross_attn_norm, qk_norm=qk_norm, eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )  # fmt: skip
        self.register_to_config(num_layers=num_layers)  # the base was built without blocks: ours follow
        self.patch_size, self.vae_pos_embed, self.absolute_positions = patch_size, vae_pos_embed, absolute_positions
        if vae_pos_embed not in ("sincos2d", "none"):
            raise ValueError(f"vae_pos_embed {vae_pos_embed!r} is not one of sincos2d, none")
        dim = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            RefWanBlock(
                dim,
                ffn_dim,
                num_attention_heads,
                cross_attn_norm=cross_attn_norm,
                eps=eps,
                layer=layer,
                clip_path=clip_path,
                fused_path=fused_path,
                ref_in_self_attention=ref_in_self_attention,
            )  # fmt: skip
            for layer in range(num_layers)
        )
        self.clip_proj = (
            None if clip_path == "off" and not fused_path else clip_projection(clip_proj_type, ref_clip_dim, dim)
        )
        self.vae_proj = nn.Linear(in_channels, dim)
        self.ref_in_self_attention, self.position_base = ref_in_self_attention, position_base
        self.reset_reference_parameters()
        use_fast_products(self)

    def reset_reference_parameters(self) -> None:
        """Put the reference modules back to the values that leave the base's output unchanged."""
        for block in self.blocks:
            for attention in (block.attn1, block.attn2):
                if isinstance(attention, DualPathCrossAttention | RefSelfAttention):
                    attention.reset_reference_parameters()

    def open_reference_paths(self) -> None:
        """Let the pictures in from the first step: for a base that is trained together with the reference modules."""
        for block in self.blocks:
            for attention in (block.attn1, block.attn2):
                if isinstance(attention, DualPathCrossAttention):
                    attention.v_vae.load_state_dict(attention.to_v.state_dict())
                elif isinstance(attention, RefSelfAttention):
                    attention.v_ref.load_state_dict(attention.to_v.state_dict())

    @classmethod
    def from_base(
        cls, base: str | Path | dict[str, Any] | WanTransformer3DModel, **reference: Any
    ) -> "RefWanTransformer3DModel":
        """Build around a base: a config dict (random weights), a diffusers folder, or a WanTransformer3DModel."""
        source = None if isinstance(base, dict) else base
        if isinstance(source, str | Path):
            with opening(f"the base {source}", "download its files again"):
                source = load_whole(WanTransformer3DModel, source)
        settings = base if isinstance(base, dict) else dict(getattr(source, "config"))  # noqa: B009 (untyped there)
        known = inspect.signature(cls.__init__).parameters
        model = cls(**{key: value for key, value in settings.items() if key in known}, **reference)
        if source is not None:
            model.load_base_state(source.state_dict())
        return model

    def load_base_state(self, state: dict[str, Tensor]) -> None:
        """Load the base's weights (diffusers names), all of them and nothing else; the reference modules start anew."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if not is_reference_name(name)]
        if missing or unexpected:
            raise ValueError(
                f"base weights do not fit: {len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected "
                f"{list(unexpected)[:3]}"
            )
        self.reset_reference_parameters()

    def project_references(
        self,
        ref_clip: Tensor | None,
        ref_latents: Tensor | None,
        ref_mask: Tensor | None = None,
        *,
        scale: float = 1.0,
        remember: bool = False,
    ) -> ReferenceTokens:
        """Tokens of the subject pictures, shared by all blocks.

        ref_clip (B, N, 257, C_clip), ref_latents (B, N, 16, h, w) normalised, ref_mask (B, N) bool (None: all there).
        scale multiplies what the references add; remember keeps the blocks' keys and values for further calls.
        """
        given = ref_clip if ref_clip is not None else ref_latents
        assert given is not None, "references need CLIP tokens, VAE latents or both"
        present_BN = (
            torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if ref_mask is None else ref_mask.bool()
        )
        may_differ = ref_mask is not None and given.shape[1] > 1  # one subject is there, or its weight is 0
        clip = mask_clip = vae = mask_vae = None
        if ref_clip is not None and self.clip_proj is not None:
            clip = self.clip_proj(ref_clip).flatten(1, 2)
            mask_clip = subject_mask(present_BN, ref_clip.shape[2]) if may_differ else None
        if ref_latents is not None:
            height, width = ref_latents.shape[-2:]
            vae = self.vae_proj(ref_latents.flatten(3).transpose(2, 3))
            if self.vae_pos_embed == "sincos2d":
                places = sincos_2d(height, width, vae.shape[-1], self.position_base)
                vae = vae + sent(places, vae.device).to(vae)
            vae = vae.flatten(1, 2)
            mask_vae = subject_mask(present_BN, height * width) if may_differ else None
        weight = present_BN.any(1)[:, None, None].float() * scale
        tokens = ReferenceTokens(clip, vae, mask_clip, mask_vae, weight, {} if remember else None)
        if self.ref_in_self_attention and ref_latents is not None:
            _, patch_h, patch_w = self.patch_size
            tokens.latents_BNChw = ref_latents
            count = ref_latents.shape[-2] // patch_h * (ref_latents.shape[-1] // patch_w)
            tokens.mask_self_BS = subject_mask(present_BN, count) if may_differ else None
        return tokens

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        ref_clip: Tensor | None = None,
        ref_latents: Tensor | None = None,
        ref_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        clean_hidden_states: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        references: ReferenceTokens | None = None,
        cache: KeyValueCache | None = None,
        text_length: int | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity (B, C, F, h, w), or what the base was trained to give.

        timestep: 1000 sigma, (B,), (B, F) or (B, L). encoder_hidden_states: (B, 512, text_dim), padding rows zero.
        frame_mask: bool (F, F); with clean_hidden_states (teacher forcing) (2F, 2F) over [clean | noisy],
        clean_timestep (B, F) or None for 0. references: from project_references, in place of the three ref arguments.
        cache: generation by blocks. text_length: the text's rows from there on are zero in all samples; they are then
        worked out once and counted, which gives the same.
        """
        batch, _, frames, height, width = hidden_states.shape
        _, patch_h, patch_w = self.patch_size
        grid = (height // patch_h, width // patch_w)
        tokens_per_frame = grid[0] * grid[1]

        # Teacher forcing: the clean frames stand before the noisy ones in one sequence, at the same rotary positions,
        # each half with times of its own. Only frame_mask keeps a noisy block from looking at its own clean copy.
        rotary = with_turns(self._rotary(hidden_states, frames, grid, cache, clean_hidden_states is not None))
        if clean_hidden_states is not None:
            if clean_timestep is None:
                clean_timestep = torch.zeros(batch, frames, device=timestep.device)
            timestep = torch.cat([clean_timestep.float(), _by_frame(timestep, frames).float()], 1)
            hidden_states = torch.cat([clean_hidden_states, hidden_states], 2)

        # contiguous(): the transposed view would make every product of the blocks copy it once more.
        x_BLD = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        if self.absolute_positions:
            first = 0 if cache is None else cache.frames
            positions = absolute_positions(frames, grid, x_BLD.shape[-1], first, self.position_base)
            x_BLD = x_BLD + sent(positions, x_BLD.device).to(x_BLD).repeat(x_BLD.shape[1] // len(positions), 1)
        text_bias, text_rows = None, encoder_hidden_states.shape[1]
        if text_length is not None and text_rows - text_length > _PADDING_WORTH_IT:
            encoder_hidden_states, text_bias = without_padding(encoder_hidden_states, text_length)
        temb, modulation, text_BSD = self._conditions(timestep, encoder_hidden_states)

        # The pictures are projected once; each block has its own keys and values of them. The causal mask becomes runs
        # of frames, each one dense attention call, since a mask of L x L would cost the memory that SDPA saves.
        if references is None and (ref_clip is not None or ref_latents is not None):
            references = self.project_references(ref_clip, ref_latents, ref_mask)
        runs = None if frame_mask is None else attention_runs(frame_mask, tokens_per_frame)

        if references is not None and references.latents_BNChw is not None and references.features is None:
            references.features, references.rotary = self._reference_features(
                references.latents_BNChw, text_BSD, text_bias
            )

        # Everything that a block depends on is an argument, so that recomputing it in the backward pass sees the same:
        # state kept on a module would have moved on by then, and the gradient would be wrong without an error.
        run_block = self._block_runner()
        for block in self.blocks:
            x_BLD = run_block(
                block, x_BLD, text_BSD, modulation, rotary, references, runs, cache, tokens_per_frame, text_bias
            )
        if cache is not None and cache.store:  # the pass over a finished block: later blocks count on from here
            cache.frames += frames
        if clean_hidden_states is not None:  # the clean half was there to be looked at; only the noisy one is predicted
            x_BLD = x_BLD[:, x_BLD.shape[1] // 2 :]
            temb = temb[:, frames:]
        output = self._unpatchify(self._head(x_BLD, temb), frames, grid)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @torch.no_grad()
    def _reference_features(
        self, latents_BNChw: Tensor, text_BSD: Tensor, text_bias: Tensor | None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """What enters every block's self-attention when the base sees the pictures as clean one-frame videos, with
        fixed positions added: (B, S, D) by block; and the rotary table of the tokens. Every call of the model makes
        them, so that sharded weights are gathered by all ranks at the same places.
        """
        batch, subjects, _, height, width = latents_BNChw.shape
        _, patch_h, patch_w = self.patch_size
        grid = (height // patch_h, width // patch_w)
        pictures = latents_BNChw.flatten(0, 1).unsqueeze(2)
        x_BLD = self.patch_embedding(pictures.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.absolute_positions:
            places = absolute_positions(1, grid, x_BLD.shape[-1], base=self.position_base)
            x_BLD = x_BLD + sent(places, x_BLD.device).to(x_BLD)
        modulation = self._modulation(torch.zeros(len(x_BLD), device=x_BLD.device))[1]
        rotary, text_BSD = with_turns(self.rope(pictures)), text_BSD.repeat_interleave(subjects, 0)
        features: list[Tensor] = []
        for block in self.blocks:
            x_BLD = block(x_BLD, text_BSD, modulation, rotary, text_bias=text_bias, features=features)
        where = sent(sincos_2d(*grid, x_BLD.shape[-1], self.position_base), x_BLD.device)
        found = [(one + where.to(one)).unflatten(0, (batch, subjects)).flatten(1, 2) for one in features]
        cos, sin, _ = rotary
        return found, with_turns((cos.repeat(1, subjects, 1, 1), sin.repeat(1, subjects, 1, 1)))

    def _rotary(
        self, hidden_states: Tensor, frames: int, grid: tuple[int, int], cache: KeyValueCache | None, twice: bool
    ) -> tuple[Tensor, Tensor]:
        """Rotary table of the frames; clean and noisy half have the same positions, cached blocks go on counting."""
        if not twice and cache is None:
            return self.rope(hidden_states)
        cos, sin = rotary_table(self.rope, frames, *grid, first_frame=0 if cache is None else cache.frames)
        return (torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)) if twice else (cos, sin)

    def _conditions(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Time embedding (B, [T,] D), its six modulations (B, [T,] 6, D), and projected text."""
        embedder = self.condition_embedder.text_embedder
        return *self._modulation(timestep), embedder(text.to(embedder.linear_1.weight.dtype))

    def _modulation(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding and its six modulations. Times never pass through bf16."""
        embedder = self.condition_embedder
        with torch.autocast(timestep.device.type, enabled=False):
            sinusoid = embedder.timesteps_proj(timestep.float().flatten())
            temb = embedder.time_embedder(sinusoid.to(embedder.time_embedder.linear_1.weight.dtype))
            modulation = embedder.time_proj(embedder.act_fn(temb.to(embedder.time_proj.weight.dtype)))
        return temb.unflatten(0, timestep.shape), modulation.unflatten(0, timestep.shape).unflatten(-1, (6, -1))

    def _block_runner(self) -> Callable[..., Tensor]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func
        return lambda block, *arguments: block(*arguments)

    def _head(self, x_BLD: Tensor, temb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table.float() + temb.float().unsqueeze(-2)).unbind(-2)
        shift, scale = per_token(shift, x_BLD.shape[1]), per_token(scale, x_BLD.shape[1])
        return self.proj_out(modulated(self.norm_out, x_BLD, shift, scale))

    def _unpatchify(self, x_BLP: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        patch_f, patch_h, patch_w = self.patch_size
        x = x_BLP.reshape(len(x_BLP), frames, *grid, patch_f, patch_h, patch_w, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def absolute_positions(
    frames: int, grid: tuple[int, int], dim: int, first_frame: int = 0, base: float = 10000.0
) -> Tensor:
    """Fixed positions (L, D) of the tokens: the sum of those of frame and place."""
    return (sincos_1d(frames, dim, first_frame, base).float()[:, None] + sincos_2d(*grid, dim, base)).flatten(0, 1)


def _by_frame(timestep: Tensor, frames: int) -> Tensor:
    return timestep[:, None].expand(-1, frames) if timestep.ndim == 1 else timestep


NEW_IN_SELF_ATTENTION = ("k_ref", "v_ref", "norm_k_ref")
NEW_IN_ATTENTION = (
    "k_vae",
    "v_vae",
    "norm_k_vae",
    "gate_clip",
    "k_fused",
    "v_fused",
    "norm_k_fused",
    "add_k_proj",
    "add_v_proj",
    "norm_added_k",
)


def is_reference_name(name: str) -> bool:
    """Whether a parameter (diffusers naming) belongs to the reference modules and not to the base."""
    parts = name.split(".")
    return (
        parts[0] in ("clip_proj", "vae_proj")
        or ("attn2" in parts and any(part in NEW_IN_ATTENTION for part in parts))
        or ("attn1" in parts and any(part in NEW_IN_SELF_ATTENTION for part in parts))
    )
