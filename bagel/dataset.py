"""UnifiedGenerationDataset: records of every format as planned samples, with every fault listed by file and line.

Sizes and lengths come from the records and the pictures' headers; pixels are read only when a sample is asked for.
"""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bagel.config import Config, DataConfig, ModelConfig, SceneConfig
from bagel.data.records import (
    FORMATS,
    Choice,
    Keyed,
    RecordFault,
    Scripted,
    Shortest,
    Step,
    check_texts,
    format_of,
    image_items,
    scripts_of,
    steps_of,
)
from bagel.data.scenes import NAME as SCENES_PATH
from bagel.data.scenes import SceneFile
from bagel.data.sources import (
    STORED_FROM,
    DataError,
    ImageFault,
    ImageTransform,
    Index,
    IndexBuilder,
    RawRecord,
    Record,
    RecordFile,
    Records,
    check_sides,
    image_size,
    index_path,
    open_records,
    picture_names,
    to_tensor,
)
from bagel.data.tokenizer import Tokenizer
from bagel.packing import PackFormat, PlanItem
from shared.errors import BadSample, UserError, write_text
from shared.rng import keyed_generator

_CHOICE, _FLIP, _PACK, _WEIGHT = 301, 302, 303, 304  # random streams
SHOWN_ERRORS = 20
MOST_MADE = 1024  # samples that wait to be asked for
BLOCK = 4096  # records that are checked together at the start


class DataFormatError(UserError):
    """Raised at the first malformed record when strict."""


class UnifiedGenerationDataset:
    """dataset[i] and sample(i, epoch) give {"items": plan with pixels, "key": (epoch, i)}; length(i, epoch) its tokens.

    What varies between epochs (paraphrases, turns, mirroring) is a function of (seed, epoch, index). Raises a UserError
    when no valid record is left, and a DataFormatError at the first malformed one when `strict`.
    """

    def __init__(
        self,
        data_path: str,
        *,
        tokenizer: Tokenizer,
        layout: PackFormat,
        vae_transform: ImageTransform,
        vit_transform: ImageTransform,
        edit_vit_transform: ImageTransform | None = None,
        image_root: str | None = None,
        max_sequence_length: int = 16384,
        truncate_text: bool = False,
        strict: bool = False,
        escape_special_tokens: bool = False,
        question_weight: float = 1.0,
        flip_probability: float = 0.0,
        seed: int = 0,
        scenes: SceneConfig | None = None,
        copies: int = 1,
    ):
        self.data_path, self.tokenizer, self.layout, self.seed = data_path, tokenizer, layout, seed
        self.vae_transform, self.vit_transform = vae_transform, vit_transform
        self.edit_vit_transform = edit_vit_transform or vit_transform
        self.max_length, self.truncate, self.escape = max_sequence_length, truncate_text, escape_special_tokens
        self.strict, self.question_weight, self.flip_probability = strict, question_weight, flip_probability
        self.copies = copies
        self.errors: list[DataError] = []
        self._made: dict[tuple[int, int], tuple[Record, list[PlanItem]]] = {}  # by (index, epoch)
        is_composed = data_path.startswith(SCENES_PATH) and not Path(data_path).exists()
        sources: list[RecordFile] = (
            [SceneFile(data_path, scenes or SceneConfig(), seed)]
            if is_composed
            else open_records(data_path, image_root)
        )
        index = self._index(sources)
        self.records, self.errors = Records(sources, index), index.errors
        self._targets, self._digest = index.targets, index.digest
        if not self.records:
            why = self.summary_of_errors() if self.errors else "there is nothing in it"
            raise UserError(f"{data_path}: no valid record; {why}")

    # --- start-up ---

    def _index(self, sources: list[RecordFile]) -> Index:
        """What was stored about the files, or what reading all of them tells."""
        identity = self.tokenizer.identity
        transforms = [vars(each) for each in (self.vae_transform, self.vit_transform, self.edit_vit_transform)]
        limits = [self.max_length, self.truncate, self.escape, self.seed, self.copies]
        path = index_path(sources, [identity, str(self.layout), transforms, limits])
        index = Index.load(path)
        if index is None:
            index, inside = self._read_all(sources)
            if inside and len(index.rows) >= STORED_FROM:
                index.save(path)
        elif self.strict and index.errors:
            raise _malformed(index.errors[0])
        return index

    def _read_all(self, sources: list[RecordFile]) -> tuple[Index, bool]:
        """Every record, checked, and whether all pictures lie inside the record files."""
        builder, inside = IndexBuilder(), True
        raws = ((number, raw) for number, source in enumerate(sources) for raw in source.records())
        while block := list(islice(raws, BLOCK)):
            read = [(number, raw.place, found) for number, raw in block if (found := self._read(sources[number], raw))]
            inside &= self._read_sizes([record for _, _, (record, _) in read])
            for number, place, (record, is_drawn) in read:
                self._keep(builder, number, place, record, is_drawn)
            builder.end_block()
        return builder.index(self.errors), inside

    def _read(self, source: RecordFile, raw: RawRecord) -> tuple[Record, bool] | None:
        """The record without a look at its pictures, and whether something in it is drawn for every epoch; None for a
        fault, which is listed.
        """
        try:
            if raw.fault:
                raise RecordFault("E_JSON", f"not valid JSON ({raw.fault})")
            kind = format_of(raw.value)
            choices = [Scripted(script, len) for script in scripts_of(raw.value, kind)]
            found = [steps_of(raw.value, kind, choice) for choice in choices]
            for steps in found:
                check_texts(steps, self.escape)
            check_texts([Step(text=text) for choice in choices for text in choice.options], self.escape)
            return Record(source, raw.line, raw.value, kind, _asks(found[0])), any(choice.chose for choice in choices)
        except RecordFault as fault:
            self._fault(source, raw.line, raw.value, fault.code, str(fault))
            return None

    def _read_sizes(self, records: Sequence[Record]) -> bool:
        """Headers of the records' pictures, each once, by several threads; whether all lie inside the record files."""
        wanted = list(
            dict.fromkeys((record.source, name) for record in records for name in picture_names(record.value))
        )

        def read(key: tuple[RecordFile, str]) -> tuple[int, int] | None:
            try:
                return image_size(key[0].picture(key[1]))
            except ImageFault:
                return None  # told when the record's plan asks for it

        with ThreadPoolExecutor(8) as pool:
            found = dict(zip(wanted, pool.map(read, wanted), strict=True))
        for record in records:
            for name in picture_names(record.value):
                if size := found[record.source, name]:
                    record.sizes[name] = size
        return all(source.holds(name) for source, name in wanted)

    def _keep(self, builder: IndexBuilder, number: int, place: int, record: Record, is_drawn: bool) -> None:
        try:
            items = self._plan(record, builder.count, 0)
            length = self.layout.length(items)
            if is_drawn:  # packs are filled by the longest of the choices, so that no epoch has to read the records
                length = max(length, self._longest(record))
        except (RecordFault, ImageFault) as fault:
            self._fault(record.source, record.line, record.value, fault.code, str(fault))
            return
        builder.add(number, place, record, length)
        for item in items:
            if item.loss and not item.repeats:
                kind = "text" if item.type == "text" else "image"
                builder.targets[f"{kind} tokens"] += item.tokens(self.layout.latent_stride, self.layout.vit_patch)
                builder.targets[f"{kind}s"] += 1

    def _longest(self, record: Record) -> int:
        """Tokens of the longest sample that an epoch may make of the record, within the limit."""
        scripts = [Scripted(script, self._count_tokens) for script in scripts_of(record.value, record.kind)]
        return min(self.max_length, max(self.layout.length(self._items(record, script)) for script in scripts))

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _fault(self, source: RecordFile, line: int, value: Any, code: str, message: str) -> None:
        name = value.get("id") if isinstance(value, dict) else None
        error = DataError(
            str(source.path), line, None if name is None else _printable(str(name)), code, _printable(message)
        )
        if self.strict:
            raise _malformed(error)
        self.errors.append(error)

    # --- samples ---

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, 0)

    def weights(self) -> np.ndarray:
        """How often every record comes in an epoch, on average."""
        rows = self.records.rows
        return np.where(rows["asks"], rows["weight"] * self.question_weight, rows["weight"])

    def order(self, epoch: int) -> list[int]:
        """The indices of one epoch, shuffled by (seed, epoch). A record of weight w comes w times on average, as index
        + k * len for its k-th repetition, so that repetitions have noise of their own.
        """
        count, indices = len(self), []
        draw = keyed_generator(self.seed, _WEIGHT, epoch)
        for index, weight in enumerate(self.weights().tolist()):
            times = int(weight) + (weight % 1 > 0 and torch.rand((), generator=draw).item() < weight % 1)
            indices += [index + copy * count for copy in range(times)]
        shuffle = torch.randperm(len(indices), generator=keyed_generator(self.seed, _CHOICE, epoch))
        return [indices[position] for position in shuffle.tolist()]

    def plan(self, index: int, epoch: int) -> list[PlanItem]:
        """The items of a sample without pixels."""
        return self._plan_of_epoch(self.records.at(index % len(self), epoch), index, epoch)

    def room(self, index: int, epoch: int) -> int:
        """Tokens that a sample may take: where texts or turns are drawn, those of the longest choice. Known from the
        start, so that filling packs reads no record.
        """
        row = self.records.rows[index % len(self)]
        if not self.records.sources[row["source"]].changes:
            return int(row["length"])
        # The record is made anew in every epoch; what told its length is kept until the sample is asked for.
        if len(self._made) >= MOST_MADE:
            self._made.clear()
        record = self.records.at(index % len(self), epoch)
        self._made[index, epoch] = record, self._plan_of_epoch(record, index, epoch)
        return self.layout.length(self._made[index, epoch][1])

    def length(self, index: int, epoch: int) -> int:
        """Tokens of a sample when nothing is left out."""
        return self.layout.length(self.plan(index, epoch))

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """The items with pixels; raises a BadSample when a picture turns out to be damaged."""
        flip = False
        if self.flip_probability:
            draw = torch.rand((), generator=keyed_generator(self.seed, _FLIP, epoch, index))
            flip = draw.item() < self.flip_probability
        loaded: dict[str, Any] = {}
        record, items = self._made.pop((index, epoch), (None, []))
        record = record or self.records.at(index % len(self), epoch)
        try:
            items = items or self._plan_of_epoch(record, index, epoch)
            for item in items:
                if item.repeats:
                    continue  # the latents of the picture before it serve again
                if item.source and item.source not in loaded:
                    image = record.source.load(item.source)
                    loaded[item.source] = ImageOps.mirror(image) if flip else image
                if item.source:
                    item.image = self._pixels(loaded[item.source], item)
        except ImageFault as fault:
            raise BadSample(f"{record.source.path}:{record.line}: {fault.code}: {fault}") from None
        return {"items": items, "key": (epoch, index)}

    def _pixels(self, image: Any, item: PlanItem) -> Tensor:
        """The picture at the planned size."""
        size = item.size[::-1]
        return to_tensor(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))

    def _plan_of_epoch(self, record: Record, index: int, epoch: int) -> list[PlanItem]:
        try:
            return self._plan(record, index, epoch)
        except RecordFault:  # a paraphrase of this epoch is too long: the one that was checked at the start is not
            return self._plan(record, index, 0)

    def _plan(self, record: Record, index: int, epoch: int) -> list[PlanItem]:
        try:
            choice = Keyed(keyed_generator(self.seed, _CHOICE, epoch, index))
            return self._within_budget(self._items(record, choice))
        except RecordFault as fault:  # what was drawn may be too long where something else is not
            if fault.code != "E_TOO_LONG":
                raise
            choice = Shortest(keyed_generator(self.seed, _CHOICE, epoch, index))
            return self._within_budget(self._items(record, choice))

    def _items(self, record: Record, choice: Choice) -> list[PlanItem]:
        """The record as items, each at its size, whatever they add up to."""
        steps = steps_of(record.value, record.kind, choice)
        looked_at = max(1, sum(step.vision for step in steps))
        items: list[PlanItem] = []
        for step in steps:
            if step.image is not None:
                items += self._picture_items(record, step, step.image, looked_at)
            else:
                ids = self.tokenizer.encode(step.text or "")
                items.append(PlanItem("text", ids=ids, loss=int(step.target), enable_cfg=int(step.enable_cfg)))
        return items

    def _picture_items(self, record: Record, step: Step, name: str, looked_at: int) -> list[PlanItem]:
        size = record.sizes.get(name) or image_size(record.source.picture(name))
        # Three sizes, as in the released recipe: drawn, seen beside its latents (an edit), seen alone (a question).
        look = self.edit_vit_transform if step.latents else self.vit_transform
        vae, vit = self.vae_transform.sides(*size), look.sides(*size, looked_at)
        needs_vae = step.target or step.latents
        for used, sides, stride, most in (
            (needs_vae, vae, self.layout.latent_stride, self.layout.max_latent_size),
            (step.vision, vit, self.layout.vit_patch, self.layout.vit_side),
        ):
            if used:
                check_sides(name, size, sides, stride, most)
        return image_items(
            name,
            vae[::-1],
            vit[::-1],
            target=self.copies * step.target,
            latents=step.latents,
            vision=step.vision,
            enable_cfg=step.enable_cfg,
        )

    def _within_budget(self, items: list[PlanItem]) -> list[PlanItem]:
        length = self.layout.length(items)
        if length <= self.max_length:
            return items
        last, excess = items[-1], length - self.max_length
        if self.truncate and last.type == "text" and last.loss and len(last.ids) > excess:
            last.ids, last.cut = last.ids[: len(last.ids) - excess], True
            return items
        raise RecordFault(
            "E_TOO_LONG",
            f"{length} tokens, {self.max_length} allowed; raise --max-sequence-length, use smaller pictures"
            f"{'' if self.truncate else ', or cut the last answer with --truncate-text'}",
        )

    # --- reports ---

    def summary_of_errors(self) -> str:
        """Counts by code and the first faults."""
        if not self.errors:
            return "no malformed record"
        counts = ", ".join(
            f"{code} {count}" for code, count in sorted(Counter(error.code for error in self.errors).items())
        )
        return "\n  ".join([f"{len(self.errors)} malformed ({counts}):", *map(str, self.errors[:SHOWN_ERRORS])])

    def write_errors(self, path: Path) -> None:
        """All faults, one JSON object a line."""
        lines = [json.dumps(asdict(error), ensure_ascii=False) + "\n" for error in self.errors]
        write_text(path, "".join(lines))

    def describe(self) -> dict[str, Any]:
        """Counts by format and kind of target, tokens to learn, and percentiles of the length."""
        lengths = np.sort(self.records.rows["length"]).tolist()
        percentiles = {
            f"p{share}": lengths[min(len(lengths) - 1, len(lengths) * share // 100)] for share in (5, 50, 95, 100)
        }
        return {
            "records": len(self),
            "malformed": len(self.errors),
            "formats": {FORMATS[kind]: count for kind, count in Counter(self.records.rows["kind"].tolist()).items()},
            "targets": self._targets,
            "length": percentiles,
        }

    def fingerprint(self) -> str:
        """A digest of the valid records in their order, by which a resumed run knows its data again."""
        return self._digest


def _asks(steps: Sequence[Step]) -> bool:
    """Whether the first thing to learn is a text, with a picture given before it."""
    first = next((number for number, step in enumerate(steps) if step.target), 0)
    return steps[first].image is None and any(step.image is not None for step in steps[:first])


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _malformed(error: DataError) -> DataFormatError:
    return DataFormatError(f"{error}; mend the record, or leave out --strict-data to skip such records")


def layout_of(config: ModelConfig, tokenizer: Tokenizer) -> PackFormat:
    """Strides, table sizes and marks."""
    return PackFormat(
        tokenizer.special,
        config.latent_stride,
        config.max_latent_size,
        config.vision.patch_size,
        config.vision.patches_per_side,
        config.interpolate_pos,
        config.latent_patch_size,
        config.autoencoder.z_channels,
    )


def transforms_of(data: DataConfig, config: ModelConfig) -> tuple[ImageTransform, ImageTransform, ImageTransform]:
    """(for latents, for the vision tower, for the tower in an edit); strides are the sides of one token."""
    patch = config.vision.patch_size
    wanted = (
        (data.vae_image, config.latent_stride),
        (data.vit_image, patch),
        (data.edit_vit_image or data.vit_image, patch),
    )
    vae, vit, edit = (
        ImageTransform(sizes.max_size, sizes.min_size, stride, sizes.max_pixels) for sizes, stride in wanted
    )
    return vae, vit, edit


def open_dataset(
    config: Config, model_config: ModelConfig, tokenizer: Tokenizer, path: str, *, copies: int = 1
) -> UnifiedGenerationDataset:
    """The records of `path` under the settings of the run; a picture to draw stands in a sample `copies` times."""
    data = config.data
    vae_transform, vit_transform, edit_vit_transform = transforms_of(data, model_config)
    return UnifiedGenerationDataset(
        path,
        tokenizer=tokenizer,
        layout=layout_of(model_config, tokenizer),
        vae_transform=vae_transform,
        vit_transform=vit_transform,
        edit_vit_transform=edit_vit_transform,
        image_root=data.image_root,
        max_sequence_length=data.max_sequence_length,
        truncate_text=data.truncate_text,
        strict=data.strict_data,
        escape_special_tokens=data.escape_special_tokens,
        question_weight=data.question_weight,
        flip_probability=data.flip_probability,
        seed=config.run.seed,
        scenes=data.scenes,
        copies=copies,
    )
