"""The moves of inference: read text and pictures into contexts, continue a text, draw a picture by guided flow.

All work on lists of contexts, which are computed in one packed call.
Letters of shapes: N latent tokens of one picture, C numbers of a latent token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bagel.data.tokenizer import SpecialTokens
from bagel.model import Bagel, sampling_times
from bagel.modules.vision import Autoencoder
from bagel.packing import patchify, position_ids
from bagel.sampling.context import Context, TextCache
from shared.errors import UserError


class Wrapper(Protocol):
    """What holds the model in training: data parallelism, or the loop's handle with its precision."""

    @property
    def module(self) -> nn.Module: ...

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]: ...


def bare(model: Bagel | Wrapper) -> Bagel:
    """The model inside its wrapper, for its settings and its device; calls go through the wrapper."""
    inner = model if isinstance(model, Bagel) else model.module
    assert isinstance(inner, Bagel)
    return inner


@dataclass
class Block:
    """New tokens of one context: text ids, or a picture between its two marks; all tokens of a picture share one
    position.
    """

    text_ids: list[int]
    vit_tokens: Tensor | None = None
    latents: Tensor | None = None
    cells: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # rows of the position table
    t: float = 0.0

    @property
    def length(self) -> int:
        return len(self.text_ids) + len(self.cells)

    @property
    def is_image(self) -> bool:
        return len(self.cells) > 0


def extend(
    model: Bagel | Wrapper,
    contexts: Sequence[Context],
    blocks: Sequence[Block],
    *,
    store: bool,
    want: Literal["logits", "velocity", "none"] = "none",
) -> Tensor | None:
    """Run one block for each context in one call; pictures attend to themselves in both directions, text backwards.

    Blocks of one call are all text or all pictures, of one time. With `store` the contexts grow.
    """
    answer = model(query_of(model, contexts, blocks, store=store, want=want))
    if store:
        for context, block in zip(contexts, blocks, strict=True):
            context.advance(block.length, 1 if block.is_image else block.length)
    return answer.get(want)


def query_of(
    model: Bagel | Wrapper, contexts: Sequence[Context], blocks: Sequence[Block], *, store: bool, want: str
) -> dict[str, Any]:
    """The tokens of blocks, each behind its context, in the form that the model takes."""
    config, device = bare(model).config, next(bare(model).parameters()).device
    places: dict[str, list[int]] = {"text": [], "vit": [], "vae": [], "position": []}
    start = 0
    for context, block in zip(contexts, blocks, strict=True):
        stop = start + block.length
        if block.is_image:
            places["text"] += [start, stop - 1]
            places["vae" if block.vit_tokens is None else "vit"] += range(start + 1, stop - 1)
            places["position"] += [context.rope] * block.length
        else:
            places["text"] += range(start, stop)
            places["position"] += range(context.rope, context.rope + block.length)
        start = stop
    index = {name: torch.tensor(values, dtype=torch.long, device=device) for name, values in places.items()}
    seen = [(block.vit_tokens, block.cells) for block in blocks if block.vit_tokens is not None]
    drawn = [(block.latents, block.cells) for block in blocks if block.latents is not None]
    vit_width = config.vision.num_channels * config.vision.patch_size**2
    return {
        "contexts": contexts,
        "query_lens": [block.length for block in blocks],
        "causal": not blocks[0].is_image,
        "store": store,
        "want": want,
        "packed_position_ids": index["position"],
        "packed_text_ids": torch.tensor([token for block in blocks for token in block.text_ids], device=device),
        "packed_text_indexes": index["text"],
        "packed_vit_token_indexes": index["vit"],
        "packed_vae_token_indexes": index["vae"],
        "packed_vit_tokens": _joined([tokens for tokens, _ in seen], (0, vit_width), device),
        "packed_vit_position_ids": _joined([cells for _, cells in seen], (0,), device).long(),
        "vit_token_seqlens": [len(cells) for _, cells in seen],
        "latents": _joined([latents for latents, _ in drawn], (0, config.latent_width), device),
        "packed_latent_position_ids": _joined([cells for _, cells in drawn], (0,), device).long(),
        # All pictures of a call are at one time, whose embedding is worked out once for all of their tokens.
        "t": torch.tensor([block.t for block in blocks if block.latents is not None][:1], device=device),
    }


def _joined(tensors: list[Tensor], empty: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.cat(tensors).to(device) if tensors else torch.zeros(empty, device=device)


def text_block(ids: list[int], tokens: SpecialTokens) -> Block:
    """A text segment with its two marks."""
    return Block([tokens.bos, *ids, tokens.eos])


def vit_block(model: Bagel | Wrapper, image: Tensor, tokens: SpecialTokens) -> Block:
    """A picture (3, H, W) in [-1, 1] as the vision tower sees it."""
    config = bare(model).config
    patch = config.vision.patch_size
    cells = position_ids(
        image.shape[1] // patch,
        image.shape[2] // patch,
        config.vision.patches_per_side,
        interpolate=config.interpolate_pos,
    )
    return Block([tokens.start_of_image, tokens.end_of_image], vit_tokens=patchify(image, patch), cells=cells)


def latent_block(
    model: Bagel | Wrapper, latents_NC: Tensor, rows: int, columns: int, t: float, tokens: SpecialTokens
) -> Block:
    """A picture as latent tokens at time t; t = 0 is clean."""
    config = bare(model).config
    cells = position_ids(rows, columns, config.max_latent_size, interpolate=config.interpolate_pos)
    return Block([tokens.start_of_image, tokens.end_of_image], latents=latents_NC, cells=cells, t=t)


def clean_latents(autoencoder: Autoencoder, image: Tensor, latent_patch: int, *, noise: Tensor | None = None) -> Tensor:
    """A picture (3, H, W) as latent tokens (N, C); `noise` samples the posterior, without it the mean is taken."""
    device = next((value.device for value in autoencoder.parameters()), image.device)
    latent = autoencoder.encode(image[None].to(device), noise)
    return patchify(latent[0], latent_patch).to(image.device)


# --- text -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def continue_text(
    model: Bagel | Wrapper,
    contexts: Sequence[Context],
    tokens: SpecialTokens,
    *,
    max_length: int = 500,
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    end: int | None = -1,
    logits_out: list[Tensor] | None = None,
) -> list[list[int]]:
    """Continue every context by at most max_length tokens; each stops at its own end.

    The lists start with the start mark and hold no end mark. The contexts given are not changed. end: the id that stops
    a text; -1: the end mark, None: nothing. logits_out receives the logits of every step, (active contexts, V).
    """
    if not temperature >= 0:
        raise UserError(f"temperature {temperature} is no number from 0 on; give 0 for the likeliest token, or more")
    end = tokens.eos if end == -1 else end
    device = next(bare(model).parameters()).device
    texts: list[list[int]] = [[] for _ in contexts]
    if not contexts:
        return texts
    cache = TextCache(contexts, max_length, device)
    newest = torch.full((len(contexts),), tokens.bos, device=device)
    active = list(range(len(contexts)))  # the text of each row
    for _ in range(max_length):
        for number, token in zip(active, newest.tolist(), strict=True):
            texts[number].append(token)
        logits = model({"newest": newest, "cache": cache})["logits"]
        if logits_out is not None:
            logits_out.append(logits)
        newest = _drawn(logits, temperature, generator) if do_sample and temperature > 0 else logits.argmax(dim=-1)
        going_on = [row for row, token in enumerate(newest.tolist()) if token != end]
        if not going_on:
            break
        if len(going_on) < len(active):
            cache.keep(going_on)
            newest, active = newest[going_on], [active[row] for row in going_on]
    return texts


def _drawn(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token a row, where a uniform number falls among the summed probabilities; the logits stay on their device."""
    # 0 and below, so that no temperature, however low, overflows
    logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    sums_BV = torch.softmax(logits_BV / temperature, dim=-1).double().cumsum(-1)
    uniform = torch.rand(len(logits_BV), 1, generator=generator, dtype=torch.float64).to(logits_BV.device)
    return torch.searchsorted(sums_BV, uniform * sums_BV[:, -1:]).squeeze(1).clamp_max(logits_BV.shape[1] - 1)


# --- pictures ---------------------------------------------------------------------------------------------------------


Renorm = Literal["global", "channel", "text_channel"]


@dataclass(frozen=True)
class Guidance:
    """How a picture is drawn. Both scales count only for times in (interval[0], interval[1]]; a scale of at most 1 is
    off.
    """

    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, ...] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: Renorm = "global"
    num_timesteps: int = 50
    timestep_shift: float = 3.0

    def __post_init__(self) -> None:
        if self.cfg_renorm_type not in ("global", "channel", "text_channel"):
            raise UserError(f"cfg_renorm_type {self.cfg_renorm_type!r}: expected global, channel or text_channel")
        for name in ("cfg_text_scale", "cfg_img_scale", "cfg_renorm_min", "timestep_shift"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)}: expected a finite number")
        if self.timestep_shift <= 0:
            raise UserError(f"timestep_shift {self.timestep_shift}: expected a number above 0")
        if not isinstance(self.num_timesteps, int):
            raise UserError(f"num_timesteps {self.num_timesteps!r}: expected a whole number")
        if len(self.cfg_interval) != 2 or not self.cfg_interval[0] <= self.cfg_interval[1]:
            raise UserError(f"cfg_interval {self.cfg_interval}: give two rising numbers such as (0.4, 1.0)")

    def active(self, t: float) -> bool:
        return self.cfg_text_scale > 1 and self.cfg_interval[0] < t <= self.cfg_interval[1]


@dataclass
class Drawing:
    """One picture to draw: what it depends on, and the two contexts of guidance."""

    main: Context
    without_text: Context
    without_images: Context
    noise: Tensor  # (N, C)
    rows: int  # latent tokens
    columns: int


@torch.no_grad()
def draw(
    model: Bagel | Wrapper,
    drawings: Sequence[Drawing],
    guidance: Guidance,
    tokens: SpecialTokens,
    velocities_out: list[list[Tensor]] | None = None,
) -> list[Tensor]:
    """Latent tokens (N, C) of every drawing, by num_timesteps - 1 Euler steps from noise at t = 1 to data at t = 0.

    All branches of all drawings go through the model in one call a step. A branch that equals the main one is not
    computed again: without a condition picture the image branch is the main branch.
    """
    times = sampling_times(guidance.num_timesteps, guidance.timestep_shift).tolist()
    latents = [drawing.noise for drawing in drawings]
    query: dict[str, Any] = {}
    computed: list[list[str]] | None = None
    for now, then in zip(times[:-1], times[1:], strict=True):
        branches = [_branches(drawing, guidance, now) for drawing in drawings]
        if computed != (computed := [list(branch) for branch in branches]):
            # Built once for all steps with the same branches: only latents and time change.
            contexts = [context for branch in branches for context in branch.values()]
            blocks = [
                latent_block(model, latent, drawing.rows, drawing.columns, now, tokens)
                for latent, drawing, branch in zip(latents, drawings, branches, strict=True)
                for _ in branch
            ]
            query = {**query_of(model, contexts, blocks, store=False, want="velocity"), "repeats": True}
        device = query["latents"].device
        query["latents"] = torch.cat(
            [latent for latent, branch in zip(latents, branches, strict=True) for _ in branch]
        ).to(device)
        query["t"].fill_(now)
        velocity = model(query)["velocity"].to(latents[0].device)
        parts = iter(velocity.split([length - 2 for length in query["query_lens"]]))
        guided = []
        for branch in branches:
            found = {name: next(parts) for name in branch}
            guided.append(guide(found["main"], found.get("text"), found.get("image", found["main"]), guidance))
        latents = [latent - (now - then) * step for latent, step in zip(latents, guided, strict=True)]
        if velocities_out is not None:
            velocities_out.append(guided)
    return latents


def _branches(drawing: Drawing, guidance: Guidance, t: float) -> dict[str, Context]:
    branches = {"main": drawing.main}
    if guidance.active(t):
        branches["text"] = drawing.without_text
        if guidance.cfg_img_scale > 1 and not drawing.without_images.same_as(drawing.main):
            branches["image"] = drawing.without_images
    return branches


def guide(velocity: Tensor, without_text: Tensor | None, without_images: Tensor, guidance: Guidance) -> Tensor:
    """Both guidances and the renormalisation of one picture, (N, C); without_text None: guidance is off at this time.

    The factor of the renormalisation is |velocity| / |guided|, between cfg_renorm_min and 1; its norm is over a token
    (channel, text_channel) or over the whole picture (global).
    """
    if without_text is None:
        return velocity
    guided = without_text + guidance.cfg_text_scale * (velocity - without_text)
    if guidance.cfg_renorm_type == "text_channel":
        guided = _renormed(guided, velocity, guidance.cfg_renorm_min, per_token=True)
    if guidance.cfg_img_scale > 1:
        guided = without_images + guidance.cfg_img_scale * (guided - without_images)
    if guidance.cfg_renorm_type != "text_channel":
        guided = _renormed(guided, velocity, guidance.cfg_renorm_min, per_token=guidance.cfg_renorm_type == "channel")
    return guided


def _renormed(guided: Tensor, velocity: Tensor, smallest: float, *, per_token: bool) -> Tensor:
    over = dict(dim=-1, keepdim=True) if per_token else {}
    return guided * (velocity.norm(**over) / (guided.norm(**over) + 1e-8)).clamp(smallest, 1.0)
