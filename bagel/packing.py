"""From planned samples to packs: token layout, positions, losses and splits.

A plan is a list of PlanItem. Letters of shapes: N latent tokens, C numbers of a latent token, Z latent channels, h w
latent cells.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bagel.modules.attention import CAUSAL, FULL, NOISE
from bagel.modules.layers import patchify, position_ids
from bagel.sampling.generation import SpecialTokens

CLEAN = -math.inf  # raw time of a clean picture


@dataclass
class PlanItem:
    """One piece of a sample. Text has `ids`; a picture has its size in pixels and, once loaded, its pixels."""

    type: Literal["text", "vit_image", "vae_image"]
    ids: list[int] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)  # (height, width) after resizing
    image: Tensor | None = None  # float32 (3, H, W) in [-1, 1]
    source: str = ""  # where the picture comes from
    enable_cfg: int = 0  # may be left out as a condition
    loss: int = 0
    special_token_loss: int = 0  # predict special_token_label at the closing mark
    special_token_label: int | None = None
    cut: bool = False  # the text was cut short, so its closing mark is not learned
    split_start: bool = True  # first frame of its block
    split_end: bool = True  # last frame of its block
    frame_delta: int | None = None  # positions from this frame to the next

    def tokens(self, latent_stride: int, vit_patch: int) -> int:
        """Tokens without the two marks."""
        if self.type == "text":
            return len(self.ids)
        side = latent_stride if self.type == "vae_image" else vit_patch
        return (self.size[0] // side) * (self.size[1] // side)


@dataclass(frozen=True)
class PackFormat:
    """Sizes and marks that turn items into tokens."""

    tokens: SpecialTokens
    latent_stride: int  # pixels of a latent token's side
    max_latent_size: int
    vit_patch: int
    vit_side: int  # patches of the position table's side
    interpolate_pos: bool
    latent_patch: int
    latent_channels: int

    @property
    def latent_width(self) -> int:
        return self.latent_patch**2 * self.latent_channels

    def length(self, items: Sequence[PlanItem]) -> int:
        """Tokens that a sample takes when nothing is left out."""
        return sum(item.tokens(self.latent_stride, self.vit_patch) + 2 for item in items)


@dataclass
class Draws:
    """The random numbers of one sample: what is left out, raw times of pictures to generate, and where noise comes
    from.
    """

    uniforms: Sequence[float]
    raw_times: Iterator[float]
    generator: torch.Generator | None = None

    @classmethod
    def keyed(cls, generator: torch.Generator, items: Sequence[PlanItem]) -> "Draws":
        """All draws of a sample from its own generator, in one fixed order."""
        uniforms = torch.rand(len(items), generator=generator).tolist()
        raw = torch.randn(len(items), generator=generator).tolist()
        return cls(uniforms, iter(raw), generator)


@dataclass(frozen=True)
class Dropout:
    """Chances that a condition is left out."""

    text: float = 0.0
    vit: float = 0.0
    vae: float = 0.0

    def drops(self, item: PlanItem, uniform: float) -> bool:
        chance = {"text": self.text, "vit_image": self.vit, "vae_image": self.vae}[item.type]
        return bool(item.enable_cfg) and uniform < chance


class PackBuilder:
    """Writes samples one after another and hands out the tensors of the pack."""

    def __init__(self, layout: PackFormat):
        self.layout = layout
        self.lists: dict[str, list] = {
            name: []
            for name in (
                "packed_text_ids",
                "packed_text_indexes",
                "packed_position_ids",
                "packed_label_ids",
                "ce_loss_indexes",
                "ce_loss_weights",
                "packed_vit_token_indexes",
                "packed_vae_token_indexes",
                "packed_timesteps",
                "mse_loss_indexes",
                "sample_lens",
                "split_lens",
                "attn_modes",
                "vit_token_seqlens",
                "patchified_vae_latent_shapes",
            )
        }
        self.vit_tokens: list[Tensor] = []
        self.vit_cells: list[Tensor] = []
        self.latent_cells: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.images: list[Tensor | None] = []
        self.posterior_noise: list[Tensor] = []
        self.length = 0

    def add(self, items: Sequence[PlanItem], draws: Draws, dropout: Dropout) -> None:
        """Append one sample."""
        first, rope, open_split, raw = self.length, 0, 0, CLEAN
        for item, uniform in zip(items, draws.uniforms, strict=True):
            if dropout.drops(item, uniform):
                rope += item.type != "text"
                continue
            begin = self.length
            if item.type == "text":
                self._text(item, rope)
            elif item.type == "vit_image":
                self._vit(item, rope)
            else:
                if item.loss and item.split_start:
                    raw = next(draws.raw_times)
                self._vae(item, rope, raw if item.loss else CLEAN, draws.generator)
            rope += self._advance(item)
            written = self.length - begin
            if item.split_start:
                open_split = 0
                self.lists["attn_modes"].append(_mode(item))
            open_split += written
            if item.split_end:
                self.lists["split_lens"].append(open_split)
        self.lists["sample_lens"].append(self.length - first)

    @staticmethod
    def _advance(item: PlanItem) -> int:
        """Rotary positions that the item takes; a picture to generate takes none, for later tokens do not see it."""
        if item.type == "text":
            return len(item.ids) + 2
        if item.type == "vae_image" and item.loss:
            return item.frame_delta or 0
        return 1

    def _mark(self, token: int, position: int) -> None:
        self.lists["packed_text_ids"].append(token)
        self.lists["packed_text_indexes"].append(self.length)
        self.lists["packed_position_ids"].append(position)
        self.length += 1

    def _predict(self, label: int, weight: float) -> None:
        """The token just written predicts `label`."""
        self.lists["ce_loss_indexes"].append(self.length - 1)
        self.lists["packed_label_ids"].append(label)
        self.lists["ce_loss_weights"].append(weight)

    def _text(self, item: PlanItem, rope: int) -> None:
        marks = self.layout.tokens
        labels = [*item.ids, marks.eos]
        for offset, token in enumerate([marks.bos, *item.ids]):
            self._mark(token, rope + offset)
            if item.loss and not (item.cut and offset == len(item.ids)):
                self._predict(labels[offset], (len(labels) - item.cut) ** -0.5)
        self._mark(marks.eos, rope + len(labels))
        self._closing(item)

    def _closing(self, item: PlanItem) -> None:
        if item.special_token_loss:
            self._predict(item.special_token_label, 1.0)

    def _vit(self, item: PlanItem, rope: int) -> None:
        rows, columns = (side // self.layout.vit_patch for side in item.size)
        self._mark(self.layout.tokens.start_of_image, rope)
        self._image_tokens("packed_vit_token_indexes", rows * columns, rope)
        self.vit_cells.append(
            position_ids(rows, columns, self.layout.vit_side, interpolate=self.layout.interpolate_pos)
        )
        self.lists["vit_token_seqlens"].append(rows * columns)
        if item.image is not None:
            self.vit_tokens.append(patchify(item.image, self.layout.vit_patch))
        self._mark(self.layout.tokens.end_of_image, rope)
        self._closing(item)

    def _image_tokens(self, name: str, count: int, rope: int) -> None:
        self.lists[name].extend(range(self.length, self.length + count))
        self.lists["packed_position_ids"].extend([rope] * count)
        self.length += count

    def _vae(self, item: PlanItem, rope: int, raw: float, generator: torch.Generator | None) -> None:
        layout = self.layout
        rows, columns = (side // layout.latent_stride for side in item.size)
        self._mark(layout.tokens.start_of_image, rope)
        if item.loss:
            self.lists["mse_loss_indexes"].extend(range(self.length, self.length + rows * columns))
        self._image_tokens("packed_vae_token_indexes", rows * columns, rope)
        self.latent_cells.append(
            position_ids(rows, columns, layout.max_latent_size, interpolate=layout.interpolate_pos)
        )
        self.lists["patchified_vae_latent_shapes"].append([rows, columns])
        self.lists["packed_timesteps"].extend([raw] * (rows * columns))
        self.images.append(item.image)
        if generator is not None:
            cells = (layout.latent_channels, rows * layout.latent_patch, columns * layout.latent_patch)
            self.posterior_noise.append(torch.randn(cells, generator=generator))
            shape = (rows * columns, layout.latent_width)
            self.noise.append(torch.randn(shape, generator=generator) if item.loss else torch.zeros(shape))
        self._mark(layout.tokens.end_of_image, rope)
        self._closing(item)

    def pack(self, static_length: int | None = None) -> dict[str, Any]:
        """The pack as the model takes it, apart from `packed_latents`, which the autoencoder makes of `vae_images`.

        A pack in which nothing is left holds one empty text, so that every rank has something to run.
        """
        if self.length == 0:
            self.add([PlanItem("text")], Draws([1.0], iter(())), Dropout())
        plain = {"sample_lens", "split_lens", "attn_modes", "vit_token_seqlens", "patchified_vae_latent_shapes"}
        fractional = {"ce_loss_weights", "packed_timesteps"}
        pack: dict[str, Any] = {
            name: values
            if name in plain
            else torch.tensor(values, dtype=torch.float32 if name in fractional else torch.int64)
            for name, values in self.lists.items()
        }
        pack["ce_loss_weight_sum"] = pack["ce_loss_weights"].sum().item()
        layout, none = self.layout, torch.zeros(0, dtype=torch.int64)
        pack["packed_vit_tokens"] = torch.cat([torch.zeros(0, 3 * layout.vit_patch**2), *self.vit_tokens])
        pack["packed_vit_position_ids"] = torch.cat([none, *self.vit_cells])
        pack["packed_latent_position_ids"] = torch.cat([none, *self.latent_cells])
        pack["packed_noise"] = torch.cat([torch.zeros(0, layout.latent_width), *self.noise])
        pack["vae_images"], pack["posterior_noise"] = self.images, self.posterior_noise
        pack["sequence_length"] = self.length
        if static_length is not None:
            pack["static_length"] = static_length
        return pack


def _mode(item: PlanItem) -> str:
    """How the split of this item attends. As in the released code, a clip whose first frame has a frame_delta counts as
    clean.
    """
    if item.type == "text":
        return CAUSAL
    return NOISE if item.loss and item.frame_delta is None else FULL
