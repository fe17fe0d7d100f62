"""From planned samples to packs: token layout, positions, losses and splits; which samples share a pack; the stream.

A plan is a list of PlanItem. Letters of shapes: N tokens of a picture, P patch side, C channels (or numbers of a latent
token), h w grid of patches.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bagel.config import DataConfig
from bagel.data.tokenizer import SpecialTokens
from bagel.modules.transformer import CAUSAL, FULL, NOISE
from shared.data import BadSamples, start_process
from shared.engine.dist import DistInfo
from shared.errors import BadSample, UserError
from shared.rng import keyed_generator

CLEAN = -math.inf  # raw time of a clean picture
MAX_BAD_IN_A_ROW = 100
_PACK = 303  # random stream

Key = tuple[int, int]  # (epoch, index)
Pack = dict[str, Any]  # the fields of the released code, as PackBuilder.pack writes them


class SampleSet(Protocol):
    """What the stream asks of a dataset; UnifiedGenerationDataset is one."""

    data_path: str

    def __len__(self) -> int: ...

    def weights(self) -> np.ndarray:
        """How often every record comes in an epoch, on average."""

    def order(self, epoch: int) -> Sequence[int]:
        """The indices of an epoch."""

    def room(self, index: int, epoch: int) -> int:
        """Tokens that a sample may take."""

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The items with pixels, and the key."""

    def fingerprint(self) -> str:
        """Stands for the list of records."""


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """(C, h*P, w*P) -> (h*w, P*P*C): value index (row * P + column) * C + channel, for ViT patches and latent tokens
    alike.
    """
    return rearrange(image_CHW, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens_ND: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Inverse of patchify: (h*w, P*P*C) -> (C, h*P, w*P)."""
    return rearrange(tokens_ND, "(h w) (p q c) -> c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)


def position_ids(rows: int, columns: int, side: int, *, interpolate: bool = False) -> Tensor:
    """Cells of a side x side table for an image of rows x columns patches, in reading order.

    Extrapolate: row * side + column. Interpolate: [0, 1) is cut into `side` buckets, and each patch takes the bucket of
    row/rows. Raises a UserError for an image with more patches on a side than the table has.
    """
    if rows > side or columns > side:
        raise UserError(
            f"an image of {rows} x {columns} patches does not fit a position table of {side} per side; "
            f"raise max_latent_size (latents) or the ViT's image_size, or make the image smaller"
        )
    row, column = torch.arange(rows), torch.arange(columns)
    if interpolate:
        bounds = torch.arange(1 / side, 1.0, 1 / side)
        row = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / rows), bounds, right=True)
        column = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / columns), bounds, right=True)
    return (row[:, None] * side + column[None]).flatten()


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
    repeats: bool = False  # the picture before it once more, at another time
    same_noise: bool = False  # ... and with the same noise (validation)

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
            # Guidance subtracts what the model says without a condition, so it must have seen samples without it. A
            # picture that is left out keeps its rotary position: what follows stands where it would stand with it.
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
            # A split is what attends as one: a text, a picture, or all frames of a clip, which share their noise level.
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
        return 1 if item.frame_delta is None else item.frame_delta  # of a clean clip every frame tells its own

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
        # The opening mark predicts the first token, the last one the closing mark: so a text learns where it ends. Of a
        # text that was cut the end is not known, and is not learned.
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
            assert item.special_token_label is not None
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
        # All tokens of a picture share one rotary position; where in the picture they are, the table's cells tell.
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
        # A picture that repeats is encoded once. In training its noise is its own: the same noise would teach less.
        self.images.append(None if item.repeats else item.image)
        if generator is not None:
            cells = (layout.latent_channels, rows * layout.latent_patch, columns * layout.latent_patch)
            self.posterior_noise.append(
                self.posterior_noise[-1] if item.repeats else torch.randn(cells, generator=generator)
            )
            shape = (rows * columns, layout.latent_width)
            if item.same_noise:
                self.noise.append(self.noise[-1])
            else:
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


def make_collate(
    layout: PackFormat, dropout: Dropout, seed: int, static_length: int | None = None
) -> Callable[[list[dict]], dict]:
    """A function that packs samples; every random number of a sample comes from (seed, epoch, index)."""

    def collate(samples: list[dict]) -> dict[str, Any]:
        builder = PackBuilder(layout)
        for sample in samples:
            draws = Draws.keyed(keyed_generator(seed, _PACK, *sample["key"]), sample["items"])
            builder.add(sample["items"], draws, dropout)
        pack = builder.pack(static_length)
        pack["keys"] = [list(sample["key"]) for sample in samples]
        return pack

    return collate


# --- which samples share a pack: ours, which loses none; a number of samples; the released loop, to compare -----------


class Packer:
    """Fills packs of at most `capacity` tokens and loses no sample.

    A pack starts with the sample that waits longest and goes on in order; what does not fit waits. When nothing in
    order fits, the largest waiting sample that fits is taken, until none does. `order(epoch)` gives the indices of an
    epoch; the last pack of an epoch may be short. The state is the position and the waiting samples, the same on every
    rank.
    """

    def __init__(
        self,
        order: Callable[[int], Sequence[int]],
        length: Callable[[int, int], int],
        *,
        capacity: int,
        buffer_size: int,
    ):
        self.order, self.length = order, length
        self.capacity, self.buffer_size = capacity, buffer_size
        self.epoch, self.cursor = 0, 0
        self.waiting: list[Key] = []
        self._sizes: dict[Key, int] = {}
        self._order: tuple[int, Sequence[int]] | None = None

    def next_pack(self) -> list[Key]:
        """The (epoch, index) of the samples of the next pack."""
        self._refill()
        while not self.waiting:
            self.epoch, self.cursor = self.epoch + 1, 0
            self._refill()
        pack: list[Key] = []
        room = self.capacity
        for key in list(self.waiting):
            if pack and self._size(key) > room:
                break
            room -= self._take(key, pack)
        while fitting := [key for key in self.waiting if self._size(key) <= room]:
            room -= self._take(max(fitting, key=self._size), pack)
        return pack

    def _size(self, key: Key) -> int:
        if key not in self._sizes:
            self._sizes[key] = self.length(key[1], key[0])
        return self._sizes[key]

    def _take(self, key: Key, pack: list[Key]) -> int:
        size = self._size(key)
        self.waiting.remove(key)
        del self._sizes[key]
        pack.append(key)
        self._refill()
        return size

    def _refill(self) -> None:
        order = self._indices(self.epoch)
        while len(self.waiting) < self.buffer_size and self.cursor < len(order):
            self.waiting.append((self.epoch, int(order[self.cursor])))
            self.cursor += 1

    def _indices(self, epoch: int) -> Sequence[int]:
        """The order of an epoch, worked out once."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        return self._order[1]

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor, "waiting": [list(key) for key in self.waiting]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.waiting = [(epoch, index) for epoch, index in state["waiting"]]


class SamplePacker(Packer):
    """Packs of a fixed number of samples, whatever their length; a pack runs on into the next epoch."""

    def __init__(self, order: Callable[[int], Sequence[int]], length: Callable[[int, int], int], *, samples: int):
        super().__init__(order, length, capacity=0, buffer_size=samples)

    def next_pack(self) -> list[Key]:
        """The next `samples` samples in order."""
        pack: list[Key] = []
        while len(pack) < self.buffer_size:
            self._refill()
            wanted = self.buffer_size - len(pack)
            pack, self.waiting = pack + self.waiting[:wanted], self.waiting[wanted:]
            if len(pack) < self.buffer_size:
                self.epoch, self.cursor = self.epoch + 1, 0
        return pack


class ReferencePacker(Packer):
    """The released loop, which can lose samples: kept for comparison, `--packing reference`.

    Samples longer than `max_sample` are skipped; below `prefer_buffer_before` tokens the buffer comes first; a sample
    that does not fit goes to the buffer if it came from the stream and there is room, else it closes the pack and is
    lost. written: tokens that a sample really takes, where that differs from the length that decides whether it fits.
    """

    def __init__(
        self,
        order: Callable[[int], Sequence[int]],
        length: Callable[[int, int], int],
        *,
        expected: int,
        capacity: int,
        max_sample: int,
        prefer_buffer_before: int,
        buffer_size: int,
        written: Callable[[int, int], int] | None = None,
    ):
        super().__init__(order, length, capacity=capacity, buffer_size=buffer_size)
        self.written = written or length
        self.expected, self.max_sample, self.prefer_buffer_before = expected, max_sample, prefer_buffer_before

    def next_pack(self) -> list[Key]:
        """The samples of the next pack; the stream of epochs does not end."""
        pack: list[Key] = []
        filled = 0
        while filled < self.expected:
            buffered = filled < self.prefer_buffer_before and bool(self.waiting)
            key = self.waiting.pop(0) if buffered else self._draw()
            size = self._size(key)
            if size > self.max_sample:
                continue
            if filled + size > self.capacity:
                if not buffered and len(self.waiting) < self.buffer_size:
                    self.waiting.append(key)
                    continue
                break
            pack.append(key)
            filled += self.written(key[1], key[0])
        return pack

    def _draw(self) -> Key:
        while self.cursor >= len(self._indices(self.epoch)):
            self.epoch, self.cursor = self.epoch + 1, 0
        self.cursor += 1
        return (self.epoch, int(self._indices(self.epoch)[self.cursor - 1]))


# --- the training stream of packs: every rank fills the same and loads its own; resumes with samples still waiting ----


def make_packer(dataset: SampleSet, data: DataConfig, batch_size: int) -> Packer:
    """The configured way to fill packs, at the start of epoch 0."""
    if data.packing == "samples":
        return SamplePacker(dataset.order, dataset.room, samples=batch_size)
    if data.packing == "tokens":
        return Packer(dataset.order, dataset.room, capacity=data.tokens_per_batch, buffer_size=data.buffer_size)
    return ReferencePacker(
        dataset.order,
        dataset.room,
        expected=data.expected_num_tokens,
        capacity=data.tokens_per_batch,
        max_sample=data.max_sequence_length,
        prefer_buffer_before=data.prefer_buffer_before,
        buffer_size=data.buffer_size,
    )


def packs_per_epoch(dataset: SampleSet, data: DataConfig, batch_size: int) -> int:
    """Packs that cover the first epoch, by filling them."""
    packer, packs = make_packer(dataset, data, batch_size), 0
    while True:
        first_epoch = packer.next_pack()[0][0]
        if first_epoch > 0:
            return max(1, packs)
        packs += 1


class _Packs(Dataset):
    """Loads a pack from its keys; pictures that turn out to be damaged leave the pack and are reported."""

    def __init__(self, dataset: SampleSet, collate: Callable[[list[dict]], dict]):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, keys: list[Key]) -> tuple[dict, list[tuple[int, str]]]:
        samples, bad = [], []
        for epoch, index in keys:
            try:
                samples.append(self.dataset.sample(index, epoch))
            except BadSample as error:
                bad.append((index % len(self.dataset), str(error)))
        return self.collate(samples), bad


class PackStream:
    """Micro-batches of this rank. Pack number ((step * accumulation + micro) * world + rank) * packs_each + k of the
    run is the k-th pack of that micro-batch, so one rank and N ranks train on the same packs in the same step.
    """

    def __init__(
        self,
        dataset: SampleSet,
        data: DataConfig,
        info: DistInfo,
        *,
        batch_size: int,
        accumulation: int,
        collate: Callable[[list[dict]], dict],
        num_workers: int = 0,
        prefetch_factor: int = 2,
        bad_samples: Path | None = None,
    ):
        expected = float(dataset.weights().sum())
        if expected < 1:
            raise UserError(
                f"{dataset.data_path}: the records' weights (times data.question_weight) sum up to {expected:.3g}: an "
                "epoch would hold no sample; raise them"
            )
        self.dataset, self.data, self.info = dataset, data, info
        self.batch_size, self.accumulation = batch_size, accumulation
        self.packs_each = 1 if data.packing == "samples" else batch_size
        self.packs, self.num_workers, self.prefetch_factor = _Packs(dataset, collate), num_workers, prefetch_factor
        self.bad, self.bad_in_a_row = BadSamples(bad_samples, len(dataset)), 0
        self.fingerprint: str | None = dataset.fingerprint()
        packs_a_step = self.packs_each * accumulation * info.world
        # A pack counts as one sample, unless it is a number of samples: a checkpoint's place in the data is told by it.
        by_samples = data.packing == "samples"
        self.samples_per_step = packs_a_step * (batch_size if by_samples else 1)
        self.steps_per_epoch: int | None
        if by_samples:
            self.steps_per_epoch = -(-len(dataset.order(0)) // self.samples_per_step)
        else:
            self.steps_per_epoch = -(-packs_per_epoch(dataset, data, batch_size) // packs_a_step)
        self._ahead: deque[dict] = deque()
        self._position: dict | None = None
        self._loaded: Iterator | None = None

    def start(self, step: int, state: dict | None = None) -> None:
        """Go to the packs of `step`: from the saved state, or by filling packs from the start of the run."""
        packer = make_packer(self.dataset, self.data, self.batch_size)
        if state:
            packer.load_state(state)
        else:
            for _ in range(step * self.accumulation * self.info.world * self.packs_each):
                packer.next_pack()
        self._ahead.clear()
        self._position = packer.state()
        loader = DataLoader(
            self.packs,
            sampler=_Keys(self, packer),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            worker_init_fn=start_process if self.num_workers else None,
            pin_memory=self.info.device.type == "cuda",
            generator=torch.Generator(),
        )
        self._loaded = iter(loader)

    def keys_of_steps(self, packer: Packer) -> Iterator[list[Key]]:
        """The keys of this rank's micro-batches, one after another; notes the packer's state after every step."""
        while True:
            for micro in range(self.accumulation):
                packs = [packer.next_pack() for _ in range(self.packs_each * self.info.world)]
                own = packs[self.info.rank * self.packs_each : (self.info.rank + 1) * self.packs_each]
                keys = [key for pack in own for key in pack]
                if micro == self.accumulation - 1:
                    self._ahead.append(packer.state())
                yield keys

    def next_step(self) -> list[dict]:
        """The micro-batches of the next optimizer step."""
        assert self._loaded is not None, "start() comes first"
        batches = []
        for _ in range(self.accumulation):
            batch, bad = next(self._loaded)
            self._note(bad, batch)
            batches.append(batch)
        self._position = self._ahead.popleft()
        return batches

    def state(self) -> dict:
        """Epoch, cursor and the samples that wait, after the last step handed out."""
        assert self._position is not None, "start() comes first"
        return self._position

    def close(self) -> None:
        """End the loader's processes."""
        self._loaded = None

    def agree(self) -> None:
        """Count the damaged samples of all ranks together; a collective."""
        self.bad.agree()

    def _note(self, bad: list[tuple[int, str]], batch: dict) -> None:
        self.bad.note(bad)
        self.bad_in_a_row = 0 if batch["keys"] else self.bad_in_a_row + len(bad)
        if self.bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise UserError(
                f"{self.bad_in_a_row} samples in a row cannot be read; the last: {bad[-1][1]}; check the picture folder"
            )


class _Keys:
    """The endless sampler of a PackStream."""

    def __init__(self, stream: PackStream, packer: Packer):
        self.stream, self.packer = stream, packer

    def __iter__(self) -> Iterator[list[Key]]:
        return self.stream.keys_of_steps(self.packer)
