"""Frozen encoders: video to latents and back, text to rows, subject pictures to feature tokens.

Public ones: Wan's VAE, UMT5-XXL, CLIP ViT-H/14. Small ones that need no download: patches, hashed words, raw pixels.
Shapes: B batch, F frames, N subjects, S text rows.
"""

import hashlib
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from opens2v.data.subjects import CLIP_MEAN, CLIP_STD
from shared.errors import UserError, load_whole, opening
from shared.rng import keyed_generator

if TYPE_CHECKING:  # the libraries load when an encoder is built
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from transformers import CLIPVisionModel

TEXT_ROWS = 512  # Wan always attends to 512 rows, padding included
_WORD_STREAM = 502


class VideoCodec(Protocol):
    """Pixels to normalised latents and back."""

    temporal: int  # pixel frames per latent frame after the first
    spatial: int  # pixels per latent pixel along each side
    variance: Tensor | None  # (2, C): of the channels in the first latent frame, and in later ones; None: not known

    def encode(self, frames: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, 16, (F - 1) / temporal + 1, H / spatial, W / spatial)."""

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of encode, in [-1, 1]."""


def check_frames(frames: int, what: str = "num_training_frames") -> None:
    """UserError unless the count is 4k + 1: the VAE would drop the rest silently."""
    if frames < 1 or (frames - 1) % 4:
        below, above = max(1, (frames - 1) // 4 * 4 + 1), max(1, (frames - 1) // 4 * 4 + 5)
        raise UserError(
            f"{what} is {frames} pixel frames; Wan's VAE codes 4k + 1 frames and would drop the last "
            f"{(frames - 1) % 4} silently; use {below} or {above}"
        )


class WanVAE:
    """diffusers' AutoencoderKLWan with normalised latents: z = (mean of the posterior - mean) / std per channel."""

    temporal, spatial = 4, 8
    variance: Tensor | None = None

    def __init__(self, vae: "AutoencoderKLWan"):
        self.vae = vae
        vae.eval().requires_grad_(False)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config["latents_mean"]).reshape(shape)
        self.std = torch.tensor(vae.config["latents_std"]).reshape(shape)

    def to(self, device: torch.device | str) -> "WanVAE":
        """Move to a device."""
        nn.Module.to(self.vae, device)
        return self

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """See VideoCodec.encode. One clip at a time: a batch would need the workspace of all its clips at once."""
        check_frames(frames.shape[2], "the video")
        parameter = next(self.vae.parameters())
        clips = frames.to(parameter.device, parameter.dtype).split(1)
        latents = torch.cat([self.vae.encode(clip).latent_dist.mode() for clip in clips]).float()
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See VideoCodec.decode."""
        parameter = next(self.vae.parameters())
        raw = latents.float() * self.std.to(latents.device) + self.mean.to(latents.device)
        clips = raw.to(parameter.device, parameter.dtype).split(1)
        return torch.cat([self.vae.decode(clip).sample for clip in clips]).float().clamp(-1, 1)


class PatchCodec(nn.Module):
    """A codec without pretrained weights, with the frames of Wan's VAE: one alone, then four to a latent frame.

    The first frame becomes the 16 leading principal components of its 4 x 4 pixel patches; four later ones become the
    16 leading components of how their patches differ from the first frame's. What stands still is zero in every later
    latent frame, so that a drawn background cannot flicker.
    """

    temporal, spatial, channels = 4, 4, 16
    mean: Tensor
    basis: Tensor
    change_basis: Tensor
    scale: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        size = 3 * self.spatial**2
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(size, self.channels))
        self.register_buffer("change_basis", torch.zeros(self.temporal * size, self.channels))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("variance", torch.ones(2, self.channels))

    @torch.no_grad()
    def fit(self, clips: Tensor) -> "PatchCodec":
        """Take the components from clips (M, 3, 4k + 1, H, W) in [-1, 1].

        All channels share one scale, for a mean square of 1 in the first frame: strong components stay strong, so that
        noise hides faint detail first, as it does in pictures.
        """
        first, changes = self._patches(clips.float())
        self.mean.copy_(first.mean((0, 1, 2, 3)))
        self.basis.copy_(principal_components(first - self.mean, self.channels))
        self.change_basis.copy_(principal_components(changes, self.channels))
        squares = [(x @ basis).square().mean((0, 1, 2, 3)) for x, basis in self._parts(first, changes)]
        self.scale.copy_(squares[0].mean().sqrt())
        self.variance.copy_((torch.stack(squares) / squares[0].mean()).clamp(min=1e-4))
        return self

    def _patches(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 4k + 1, H, W) -> patches (B, 1, h, w, 48) of the first frame, changes (B, k, h, w, 192) of others."""
        batch, _, count, _, _ = frames.shape
        check_frames(count, "the video")
        flat = functional.pixel_unshuffle(frames.transpose(1, 2).flatten(0, 1), self.spatial)
        patches = flat.unflatten(0, (batch, count)).movedim(2, -1)
        changes = (patches[:, 1:] - patches[:, :1]).unflatten(1, (count // self.temporal, self.temporal))
        return patches[:, :1], changes.movedim(2, -2).flatten(-2)

    def _parts(self, first: Tensor, changes: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (first - self.mean, self.basis), (changes, self.change_basis)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """See VideoCodec.encode."""
        parts = self._parts(*self._patches(frames.float()))
        return torch.cat([x @ basis / self.scale for x, basis in parts], 1).movedim(-1, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See VideoCodec.decode."""
        first, later = (latents.float().movedim(1, -1) * self.scale).tensor_split([1], 1)
        first = first @ self.basis.T + self.mean
        changes = (later @ self.change_basis.T).unflatten(-1, (self.temporal, -1)).movedim(-2, 2).flatten(1, 2)
        patches = torch.cat([first, first + changes], 1).movedim(-1, 2)
        pictures = functional.pixel_shuffle(patches.flatten(0, 1), self.spatial).unflatten(0, patches.shape[:2])
        return pictures.transpose(1, 2).clamp(-1, 1)


def principal_components(x: Tensor, count: int) -> Tensor:
    """The `count` directions (D, count) of largest mean square of vectors (..., D); signs are fixed."""
    rows = x.flatten(0, -2).double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / max(1, len(rows)))
    vectors = vectors[:, values.argsort(descending=True)[:count]]
    return (vectors * torch.sign(vectors.sum(0) + 1e-12)).float()


# --- text -------------------------------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """ftfy, HTML unescaped twice, white space collapsed: what Wan's text encoder was trained on."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5Text:
    """UMT5-XXL: 512 rows of 4096; rows behind the text are zero, since Wan does not mask them."""

    def __init__(self, encoder: nn.Module, tokenizer, rows: int = TEXT_ROWS):
        self.encoder, self.tokenizer, self.rows = encoder.eval().requires_grad_(False), tokenizer, rows

    def to(self, device: torch.device | str) -> "UMT5Text":
        """Move to a device."""
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """float32 (B, 512, 4096). The encoder reads no further than the longest text: it masks what is behind."""
        device = next(self.encoder.parameters()).device
        batch = self.tokenizer(
            [clean_text(text) for text in texts],
            padding="longest",
            max_length=self.rows,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = batch.attention_mask.to(device)
        rows = self.encoder(batch.input_ids.to(device), attention_mask=mask).last_hidden_state.float()
        return functional.pad(rows * mask[..., None], (0, 0, 0, self.rows - rows.shape[1]))


class HashText:
    """A text encoder without weights: one fixed random row per word, by the word's hash; the rest of the rows is
    zero. ordered: a row also holds the word before, turned round and at half its strength; without it "from left to
    right" and "from right to left" are the same set of rows.
    """

    def __init__(self, dim: int, rows: int, *, ordered: bool = False):
        self.dim, self.rows, self.ordered = dim, rows, ordered
        self.words: dict[str, Tensor] = {}

    def to(self, device: torch.device | str) -> "HashText":
        """Move to a device."""
        return self

    def __call__(self, texts: list[str]) -> Tensor:
        """float32 (B, rows, dim)."""
        out = torch.zeros(len(texts), self.rows, self.dim)
        for row, text in enumerate(texts):
            if words := [self._word(word) for word in re.findall(r"\w+", text.lower())[: self.rows]]:
                rows_SD = torch.stack(words)
                out[row, : len(words)] = rows_SD
                if self.ordered:
                    out[row, 1 : len(words)] += 0.5 * rows_SD[:-1].flip(1)
        return out

    def _word(self, word: str) -> Tensor:
        if word not in self.words:
            key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "little")
            self.words[word] = torch.randn(self.dim, generator=keyed_generator(_WORD_STREAM, key))
        return self.words[word]


# --- subject pictures -------------------------------------------------------------------------------------------------


class ClipImages:
    """CLIP ViT-H/14 as Wan's image-to-video model uses it: the second last layer, 257 tokens of 1280, no final norm."""

    def __init__(self, model: "CLIPVisionModel"):
        self.model = model
        model.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> "ClipImages":
        """Move to a device."""
        nn.Module.to(self.model, device)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """CLIP-normalised (B, N, 3, 224, 224) -> float32 (B, N, 257, 1280)."""
        parameter = next(self.model.parameters())
        flat = pixels.flatten(0, 1).to(parameter.device, parameter.dtype)
        hidden = self.model(pixel_values=flat, output_hidden_states=True).hidden_states[-2]
        return hidden.float().unflatten(0, pixels.shape[:2])


class PixelImages:
    """Picture features without weights: the picture in 4 x 4 cells, each as 4 x 4 mean colours, and one mean of all."""

    cells, side = 4, 4
    dim = 3 * side * side

    def to(self, device: torch.device | str) -> "PixelImages":
        """Move to a device."""
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        """CLIP-normalised (B, N, 3, 224, 224) -> float32 (B, N, 17, 48) in about [-1, 1]."""
        flat = pixels.flatten(0, 1).float()
        mean, std = (torch.tensor(value, device=flat.device)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
        small = functional.adaptive_avg_pool2d((flat * std + mean) * 2 - 1, self.cells * self.side)
        cells = functional.unfold(small, self.side, stride=self.side).transpose(1, 2)
        return torch.cat([cells.mean(1, keepdim=True), cells], 1).unflatten(0, pixels.shape[:2])


# --- loading ----------------------------------------------------------------------------------------------------------


def _folder(base: str | None, name: str, what: str) -> Path:
    if base is None:
        raise UserError(
            f"base_model_path is not set; give the folder of Wan2.1-T2V-1.3B-Diffusers, which holds {name}/ ({what})"
        )
    path = Path(base) / name
    if not path.is_dir():
        raise UserError(
            f"base_model_path {base}: holds no folder {name} ({what}); download it again or give another folder"
        )
    return path


def load_wan_vae(base_model_path: str | None, dtype: torch.dtype = torch.float32) -> WanVAE:
    """Wan's VAE from base_model_path/vae."""
    path = _folder(base_model_path, "vae", "the video VAE")
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with opening(f"the video VAE {path}", "download its files again"):
        return WanVAE(load_whole(AutoencoderKLWan, path, torch_dtype=dtype))


def load_umt5(base_model_path: str | None, rows: int = TEXT_ROWS, dtype: torch.dtype = torch.bfloat16) -> UMT5Text:
    """UMT5-XXL from base_model_path/text_encoder and its tokenizer; it gives so many rows a text."""
    encoder, tokenizer = (_folder(base_model_path, name, "the text encoder") for name in ("text_encoder", "tokenizer"))
    from transformers import AutoTokenizer, UMT5EncoderModel

    with opening(f"the text encoder {encoder} with {tokenizer}", "download its files again"):
        model = load_whole(UMT5EncoderModel, encoder, dtype=dtype)
        return UMT5Text(model, AutoTokenizer.from_pretrained(str(tokenizer)), rows)


def load_clip(image_encoder_path: str | None, dtype: torch.dtype = torch.bfloat16) -> ClipImages:
    """CLIP ViT-H/14 from a folder such as Wan2.1-I2V-14B-480P-Diffusers/image_encoder (the 1.3B folder has none)."""
    if image_encoder_path is None or not Path(image_encoder_path).is_dir():
        raise UserError(
            f"image_encoder_path {image_encoder_path}: not a folder; give image_encoder of "
            "Wan2.1-I2V-14B-480P-Diffusers (the text-to-video folder holds none), or --clip-path off"
        )
    from transformers import CLIPVisionModel

    with opening(f"image_encoder_path {image_encoder_path}", "download its files again"):
        return ClipImages(load_whole(CLIPVisionModel, image_encoder_path, dtype=dtype))
