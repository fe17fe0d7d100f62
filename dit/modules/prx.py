"""PRX, the transformer of Photoroom's text-to-image models, as diffusers has it, called as our own model is.

PRX counts noise levels: 1 is noise, and its output is noise minus data. Here time 1 is data and the velocity is data
minus noise, so both are turned round. Text enters every attention as further keys and values.
Shapes: B batch, T text tokens, C H W of a latent.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dit.config import ModelConfig
from dit.model import NullText
from shared.engine.checkpoint import load_strict


class PRXModel(NullText):
    """diffusers' PRXTransformer2DModel under `prx`: `PRXModel(...)(noisy_latents, timesteps, text)` -> velocity."""

    def __init__(self, settings: ModelConfig, *, null_text: str, time_scale: float) -> None:
        """time_scale: what times are multiplied by before they come here (flow.time_scale)."""
        super().__init__()
        from diffusers import PRXTransformer2DModel

        half = settings.hidden_size // settings.num_heads // 2
        self.prx: Any = PRXTransformer2DModel(
            in_channels=settings.in_channels,
            patch_size=settings.patch_size,
            context_in_dim=settings.text_dim,
            hidden_size=settings.hidden_size,
            mlp_ratio=settings.mlp_ratio,
            num_heads=settings.num_heads,
            depth=settings.num_layers,
            axes_dim=[half, half],
            bottleneck_size=settings.bottleneck_size,
            resolution_embeds=settings.resolution_embeds,
        )
        self.text_mask, self.time_scale = settings.text_mask, time_scale
        self.make_null_text(null_text, settings.text_len, settings.text_dim)
        self.null_text_pooled.requires_grad_(False)  # nothing reads it

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks, which are sharded one by one."""
        return self.prx.blocks

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.prx.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        if wanted:
            self.prx.enable_gradient_checkpointing()

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text_embeddings: Tensor,
        *,
        text_mask: Tensor | None = None,
        text_pooled: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """noisy_latents (B, C, H, W), timesteps (B,), text_embeddings (B, T, text_dim), text_mask (B, T) True at real
        tokens; text_pooled is not read. Where drop (B,) is True the null condition takes the place of the text.
        """
        states, mask = self.states_or_null(text_embeddings, text_mask, drop)
        level_B = 1 - timesteps.float() / self.time_scale
        found = self.prx(noisy_latents, level_B, states, attention_mask=mask if self.text_mask else None)
        return -found.sample

    def load(self, state: dict[str, Tensor], path: Path) -> None:
        """The weights of a diffusers folder, all of them."""
        load_strict(self.prx, {name: value.float() for name, value in state.items()}, what=str(path))
