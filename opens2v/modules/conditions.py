"""From a batch of samples to what the generator takes: latents, text rows, reference tokens.

Shapes: B batch, C channels, F latent frames, h w latent grid, R text rows, N subjects, S tokens of a subject.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opens2v.config import Config
from opens2v.modules.encoders import (
    ClipImages,
    HashText,
    PatchCodec,
    PixelImages,
    UMT5Text,
    WanVAE,
    load_clip,
    load_umt5,
    load_wan_vae,
)
from shared.engine.checkpoint import load_strict, load_weights
from shared.errors import UserError
from shared.flow import drop_per_sample


@dataclass
class Conditions:
    """The generator's inputs for a batch; latents are what it learns to give."""

    latents_BCFhw: Tensor | None
    text_BRD: Tensor
    clip_BNSC: Tensor | None
    ref_latents_BNChw: Tensor
    ref_mask_BN: Tensor

    def reference(self) -> dict[str, Tensor | None]:
        """The arguments of the model's forward."""
        return {"ref_clip": self.clip_BNSC, "ref_latents": self.ref_latents_BNChw, "ref_mask": self.ref_mask_BN}

    def without_text(self, null_RD: Tensor, drop_B: Tensor) -> "Conditions":
        """Rows of dropped samples become those of the empty prompt."""
        return replace(self, text_BRD=drop_per_sample(self.text_BRD, null_RD[None], drop_B))

    def without_subject(self, drop_B: Tensor) -> "Conditions":
        """The subjects of dropped samples are masked out; the same layers run."""
        return replace(self, ref_mask_BN=self.ref_mask_BN & ~drop_B[:, None])

    def with_references_of(self, order_B: Tensor) -> "Conditions":
        """Each sample gets the references of sample order_B[i]."""
        clip = None if self.clip_BNSC is None else self.clip_BNSC[order_B]
        return replace(
            self,
            clip_BNSC=clip,
            ref_latents_BNChw=self.ref_latents_BNChw[order_B],
            ref_mask_BN=self.ref_mask_BN[order_B],
        )


class Encoders:
    """The frozen encoders of a configuration. Those whose features are cached are not loaded."""

    def __init__(
        self,
        codec: WanVAE | PatchCodec,
        text: UMT5Text | HashText | None,
        image: ClipImages | PixelImages | None,
        *,
        text_device: torch.device | str | None = None,
    ):
        self.codec, self.text, self.image, self.text_device = codec, text, image, text_device
        self.device = torch.device("cpu")
        self._null: Tensor | None = None

    def to(self, device: torch.device) -> "Encoders":
        """Move them; the text encoder stays on text_device when that is set."""
        self.device = device
        self.codec.to(device)
        if self.text is not None:
            self.text.to(self.text_device or device)
        if self.image is not None:
            self.image.to(device)
        return self

    def encode_text(self, texts: list[str]) -> Tensor:
        """float32 (B, R, D) on the run's device."""
        if self.text is None:
            raise UserError(
                "the text encoder was left out because text is cached, and a text that is not cached is needed"
            )
        return self.text(texts).to(self.device)

    def null_text(self) -> Tensor:
        """Rows (R, D) of the empty prompt, encoded once."""
        if self._null is None:
            self._null = self.encode_text([""])[0]
        return self._null

    def set_null_text(self, rows: Tensor) -> None:
        """Rows of the empty prompt from the cache."""
        self._null = rows.to(self.device)

    @torch.no_grad()
    def conditions(self, batch: dict[str, Any]) -> Conditions:
        """Encode what the batch does not hold as features yet."""
        latents = batch.get("latents")
        if latents is None and "frames" in batch:
            latents = self.codec.encode(batch["frames"].to(self.device))
        text = batch["text_rows"] if "text_rows" in batch else self.encode_text(batch["prompts"])
        clip = batch.get("clip_tokens")
        if clip is None and self.image is not None:
            clip = self.image(batch["ref_clip_pixels"].to(self.device))
        return Conditions(
            None if latents is None else latents.to(self.device),
            text.to(self.device),
            None if clip is None else clip.to(self.device),
            self.encode_references(batch["ref_pixels"]),
            batch["ref_mask"].to(self.device),
        )

    @torch.no_grad()
    def encode_references(self, ref_pixels: Tensor) -> Tensor:
        """(B, N, 3, H, W) in [-1, 1] -> (B, N, C, h, w): every picture as a video of one frame."""
        batch, count = ref_pixels.shape[:2]
        flat = ref_pixels.to(self.device).flatten(0, 1).unsqueeze(2)
        return self.codec.encode(flat)[:, :, 0].unflatten(0, (batch, count))


def load_encoders(config: Config, base_folder: Path | None = None, *, everything: bool = False) -> Encoders:
    """The encoders of a configuration from local folders. base_folder: where the small base lies with its codec.

    everything: load also those whose features are cached (sampling needs the text encoder for new prompts).
    """
    model, data = config.model, config.data
    if model.codec == "wan":
        codec: WanVAE | PatchCodec = load_wan_vae(model.base_model_path)
    else:
        codec = load_patch_codec(base_folder)
    text = image = None
    if everything or not data.use_cached_text:
        text = (
            HashText(model.text_dim, model.text_rows)
            if model.text_encoder == "hash"
            else load_umt5(model.base_model_path)
        )
    if model.clip_path != "off" and (everything or not data.use_cached_clip):
        image = PixelImages() if model.image_encoder == "pixels" else load_clip(model.image_encoder_path)
    return Encoders(codec, text, image, text_device="cpu" if model.text_encoder_cpu_offload else None)


def load_patch_codec(folder: Path | None) -> PatchCodec:
    """The patch codec that was fitted when the small base was trained."""
    path = None if folder is None else folder / "codec.safetensors"
    if path is None or not path.exists():
        raise UserError(
            f"codec patch needs codec.safetensors beside the base weights, {path or 'no folder'} has none; give the "
            "generator.safetensors "
            "of a small run as --generator-ckpt, or leave it out and set base_steps"
        )
    codec = PatchCodec()
    load_strict(codec, load_weights(path), what=str(path))
    return codec


def clip_token_width(config: Config) -> int:
    """Channels of the picture tokens that the configuration's image encoder gives."""
    return PixelImages.dim if config.model.image_encoder == "pixels" else 1280
