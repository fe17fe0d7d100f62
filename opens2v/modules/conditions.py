"""From a batch of samples to what the generator takes: latents, text rows, reference tokens.

Shapes: B batch, C channels, F latent frames, h w latent grid, R text rows, N subjects, S tokens of a subject.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opens2v.config import Config, ModelConfig
from opens2v.data.cache import StoredFeatures
from opens2v.data.video import normalise
from opens2v.modules.codec import ConvCodec
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
from shared.data import sent
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
    text_length: int | None = None  # text rows from there on are zero in all samples; None: not known

    def reference(self) -> dict[str, Tensor | None]:
        """The arguments of the model's forward."""
        return {"ref_clip": self.clip_BNSC, "ref_latents": self.ref_latents_BNChw, "ref_mask": self.ref_mask_BN}

    def without_text(self, null_RD: Tensor, drop_B: Tensor) -> "Conditions":
        """Rows of dropped samples become those of the empty prompt, which is shorter than any other."""
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


def text_length(text_BRD: Tensor, step: int = 32) -> int | None:
    """Rows of a batch that are not padding, in steps so that few lengths occur. None for a text on a GPU: asking for
    it there would make the host wait for the device.
    """
    if text_BRD.device.type != "cpu":
        return None
    used = text_BRD.any(-1).any(0).nonzero()
    return min(text_BRD.shape[1], -(-(int(used[-1]) + 1 if len(used) else 0) // step) * step)


Codec = WanVAE | PatchCodec | ConvCodec


class Encoders:
    """The frozen encoders of a configuration. Those whose features are cached are not loaded."""

    def __init__(
        self,
        codec: Codec,
        text: UMT5Text | HashText | None,
        image: ClipImages | PixelImages | None,
        *,
        text_device: torch.device | str | None = None,
    ):
        self.codec, self.text, self.image, self.text_device = codec, text, image, text_device
        self.device = torch.device("cpu")
        self.stored: StoredFeatures | None = None  # where an encoder was left out because its features are cached
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
        if self.text is not None:
            return sent(self.text(texts), self.device)
        assert self.stored is not None  # the text encoder is left out only where text is cached
        return sent(torch.stack([self.stored.text(text) for text in texts]), self.device)

    def encode_pictures(self, pixels: Tensor) -> Tensor | None:
        """CLIP-normalised (B, N, 3, S, S) -> tokens (B, N, T, C); None where there is no CLIP path."""
        if self.image is not None:
            return self.image(pixels.to(self.device))
        if self.stored is None or self.stored.clip_cache is None:
            return None
        found = [[self.stored.picture(picture) for picture in row] for row in pixels]
        return torch.stack([torch.stack(row) for row in found]).to(self.device)

    def null_text(self) -> Tensor:
        """Rows (R, D) of the empty prompt, encoded once."""
        if self._null is None:
            self._null = self.encode_text([""])[0]
        return self._null

    @torch.no_grad()
    def conditions(self, batch: dict[str, Any]) -> Conditions:
        """Encode what the batch does not hold as features yet."""
        latents = batch.get("latents")
        if latents is None and "frames" in batch:
            latents = self.codec.encode(normalise(batch["frames"].to(self.device)))
        text = batch["text_rows"] if "text_rows" in batch else self.encode_text(batch["prompts"])
        clip = batch.get("clip_tokens")
        if clip is None:
            clip = self.encode_pictures(batch["ref_clip_pixels"])
        return Conditions(
            None if latents is None else latents.to(self.device),
            text.to(self.device),
            None if clip is None else clip.to(self.device),
            self.encode_references(batch["ref_pixels"]),
            batch["ref_mask"].to(self.device),
            text_length(text),
        )

    @torch.no_grad()
    def encode_references(self, ref_pixels: Tensor) -> Tensor:
        """(B, N, 3, H, W) in [-1, 1] -> (B, N, C, h, w): every picture as a video of one frame."""
        batch, count = ref_pixels.shape[:2]
        flat = ref_pixels.to(self.device).flatten(0, 1).unsqueeze(2)
        return self.codec.encode(flat)[:, :, 0].unflatten(0, (batch, count))


def load_encoders(config: Config, base_folder: Path | None = None, *, kinds: Sequence[str] | None = None) -> Encoders:
    """The encoders of a configuration from local folders; those whose features are cached are left out.

    base_folder: where the small base lies with its codec. kinds: of "text" and "clip" those to load whatever is cached.
    """
    model, data = config.model, config.data
    codec: Codec = load_wan_vae(model.base_model_path) if model.codec == "wan" else load_codec(model.codec, base_folder)
    wants_text = not data.use_cached_text if kinds is None else "text" in kinds
    wants_image = model.clip_path != "off" and (not data.use_cached_clip if kinds is None else "clip" in kinds)
    text = image = None
    if wants_text:
        is_umt5 = model.text_encoder == "umt5"
        text = load_umt5(model.base_model_path, model.text_rows) if is_umt5 else hash_text(model)
    if wants_image:
        image = PixelImages() if model.image_encoder == "pixels" else load_clip(model.image_encoder_path)
    encoders = Encoders(codec, text, image, text_device="cpu" if model.text_encoder_cpu_offload else None)
    if data.use_cached_text or data.use_cached_clip:
        encoders.stored = StoredFeatures(config)
    return encoders


def hash_text(model: ModelConfig) -> HashText:
    """The text encoder without weights."""
    return HashText(model.text_dim, model.text_rows, ordered=model.text_encoder == "hash_ordered")


def load_codec(kind: str, folder: Path | None) -> PatchCodec | ConvCodec:
    """The codec ("patch" or "conv") that was made when the small base was trained."""
    path = None if folder is None else folder / "codec.safetensors"
    if path is None or not path.exists():
        raise UserError(
            f"codec {kind} needs codec.safetensors beside the base weights, {path or 'no folder'} has none; give the "
            "generator.safetensors of a small run as --generator-ckpt, or leave it out and set base_steps"
        )
    codec = PatchCodec() if kind == "patch" else ConvCodec()
    load_strict(codec, load_weights(path), what=f"codec {kind}, {path}")
    return codec.eval().requires_grad_(False)


def clip_token_width(config: Config) -> int:
    """Channels of the picture tokens that the configuration's image encoder gives."""
    return PixelImages.dim if config.model.image_encoder == "pixels" else 1280
