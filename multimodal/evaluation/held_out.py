"""Embeddings of whole splits, shared over the ranks, and the measures on them.

Legend: I items, C captions, E embedding width.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multimodal.data.records import Kind
from multimodal.data.sources import model_inputs
from multimodal.dataset import CaptionedDataset, collate
from multimodal.evaluation.retrieval import chances, mean_average_precision, micro_f1, retrieval
from multimodal.modules.contrastive import contrastive_loss
from shared.data import start_process, to_device
from shared.engine.dist import DistInfo, gather_objects
from shared.errors import BadSample, UserError

Encode = Callable[[dict[str, dict[str, Tensor]]], dict[str, Tensor]]  # AlignModel's forward without draws
LOSS_CHUNK = 256  # pairs, in file order: a contrastive loss means nothing without its batch size
NAMES = {"image": "image_embeds", "audio": "audio_embeds", "voice": "voice_embeds"}


@dataclass
class Split:
    """Embeddings of one kind in one split, on every rank, in file order; broken items are left out."""

    kind: Kind
    ids: list[str]
    items_IE: Tensor
    captions_CE: Tensor | None  # frames (I, E) for voices
    owners: list[int]  # item of each caption
    first_captions: list[int]  # each item's first caption
    caption_texts: list[str]
    class_logits: Tensor | None = None
    labels: Tensor | None = None
    bad: int = 0
    bad_by_set: Counter[str] = field(default_factory=Counter)

    @property
    def texts_CE(self) -> Tensor:
        """The captions' embeddings, of a split that has some."""
        assert self.captions_CE is not None, "the split has no captions"
        return self.captions_CE


class _Batches(Dataset):
    """Batches of evaluation views: (batch, the indices that can be read, sentences on the others)."""

    def __init__(self, dataset: CaptionedDataset, batches: list[list[int]], position: float):
        self.dataset, self.batches, self.position = dataset, batches, position

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[dict[str, Any] | None, list[int], list[str]]:
        items, good, bad = [], [], []
        for index in self.batches[number]:
            try:
                items.append(self.dataset.at_position(index, self.position))
                good.append(index)
            except BadSample as error:
                bad.append(str(error))
        return collate(items) if items else None, good, bad


def read_batches(
    dataset: CaptionedDataset, batches: list[list[int]], workers: int = 0, position: float = 0.0
) -> Iterator[tuple[dict[str, Any] | None, list[int], list[str]]]:
    """The batches in their order, read ahead by loader processes while the model computes."""
    options: dict[str, Any] = {"worker_init_fn": start_process, "prefetch_factor": 2} if workers else {}
    loader = DataLoader(_Batches(dataset, batches, position), None, num_workers=workers, **options)
    return iter(loader)


def embed_split(
    encode: Encode,
    dataset: CaptionedDataset,
    kind: Kind,
    info: DistInfo,
    *,
    batch_size: int,
    positions: tuple[float, ...] = (0.0,),
    workers: int = 0,
) -> Split:
    """Embed all items and all captions. positions: where long sounds are cut; their embeddings are averaged.

    UserError when nothing can be read, or when the embeddings are not finite: nothing can be measured on those.
    """
    rows, bad = _embed_items(encode, dataset, kind, info, batch_size, positions, workers)
    order = sorted(rows)
    if not order:
        raise UserError(f"{len(dataset)} {kind} samples, none of which can be read; look at the data folder")
    texts = [(place, text) for place, index in enumerate(order) for text in dataset.records[index].captions]
    captions = None
    if texts:
        captions = _embed_texts(encode, dataset, kind, [text for _, text in texts], info, 2 * batch_size)
    elif "frame" in rows[order[0]]:
        captions, texts = torch.stack([rows[i]["frame"] for i in order]), [(place, "") for place in range(len(order))]
    first = {place: caption for caption, (place, _) in reversed(list(enumerate(texts)))}
    items_IE = torch.stack([rows[index]["embedding"] for index in order])
    for what, found in ((f"{kind} samples", items_IE), ("captions", captions)):
        if found is not None and not found.isfinite().all():
            raise UserError(
                f"the embeddings of the {what} hold numbers that are not finite: the training has diverged; "
                "lower --learning-rate and start again from an earlier checkpoint"
            )
    return Split(
        kind,
        [dataset.records[index].id for index in order],
        items_IE,
        captions,
        owners=[place for place, _ in texts],
        first_captions=[first[place] for place in sorted(first)],
        caption_texts=[text for _, text in texts],
        class_logits=_column(rows, order, "class_logits"),
        labels=_column(rows, order, "labels"),
        bad=sum(bad.values()),
        bad_by_set=bad,
    )


def _column(rows: dict[int, dict], order: list[int], name: str) -> Tensor | None:
    """One field of all rows, or None where they do not have it."""
    return torch.stack([rows[index][name] for index in order]) if name in rows[order[0]] else None


def _own_batches(count: int, batch_size: int, info: DistInfo) -> tuple[list[list[int]], int]:
    """This rank's batches, and how many of them are its own: a wrapped model must run equally often on every rank, so
    that the last may be a repetition that is thrown away.
    """
    batches = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    turns = math.ceil(len(batches) / info.world)
    numbers = [turn * info.world + info.rank for turn in range(turns)]
    return [batches[min(number, len(batches) - 1)] for number in numbers], sum(n < len(batches) for n in numbers)


def _embed_items(
    encode: Encode,
    dataset: CaptionedDataset,
    kind: Kind,
    info: DistInfo,
    batch_size: int,
    positions: tuple[float, ...],
    workers: int,
) -> tuple[dict[int, dict[str, Tensor]], Counter[str]]:
    """Rows by index, and how many samples of each data set cannot be read; the same on all ranks."""
    batches, own = _own_batches(len(dataset), batch_size, info)
    rows: dict[int, dict[str, Tensor]] = {}
    bad: list[str] = []
    readers = [read_batches(dataset, batches, workers, position) for position in positions]
    for number, views in enumerate(zip(*readers, strict=True)):
        total, good, outputs, inputs = None, views[0][1], {}, {}
        for batch, _, _ in views:
            if batch is None:  # none can be read; the model runs all the same, since it does on the other ranks
                inputs = _placeholder(dataset, kind)
            else:
                part = model_inputs({kind: batch})[kind]
                inputs = {name: part[name] for name in ("images", "audio", "audio_mask", "labels") if name in part}
            inputs = to_device(inputs, info.device)
            outputs = encode({kind: inputs})
            value = outputs[NAMES[kind]].float()
            total = value if total is None else total + value
        if number >= own:
            continue
        bad += views[0][2]
        if total is None or not good:
            continue
        embeddings = torch.nn.functional.normalize(total, dim=-1).cpu()
        extra = {
            "frame": outputs.get("frame_embeds"),
            "class_logits": outputs.get("class_logits"),
            "labels": inputs.get("labels"),
        }
        for row, index in enumerate(good):
            more = {name: source[row].float().cpu() for name, source in extra.items() if source is not None}
            rows[index] = {"embedding": embeddings[row], **more}
    gathered = gather_objects((rows, bad))
    merged = {index: row for part, _ in gathered for index, row in part.items()}
    return merged, Counter(text.partition(":")[0] for _, own_bad in gathered for text in own_bad)


def _placeholder(dataset: CaptionedDataset, kind: Kind) -> dict[str, Tensor]:
    if kind == "image":
        return {"images": torch.zeros(1, 3, dataset.image_size, dataset.image_size)}
    return {"audio": torch.zeros(1, dataset.data.audio_frames, 80)}


def _embed_texts(
    encode: Encode, dataset: CaptionedDataset, kind: Kind, texts: list[str], info: DistInfo, batch_size: int
) -> Tensor:
    """(C, E)."""
    batches, own = _own_batches(len(texts), batch_size, info)
    part = "image" if kind == "image" else "audio"
    found: list[tuple[int, Tensor]] = []
    for number, indices in enumerate(batches):
        input_ids, mask = to_device(dataset.tokenizer.batch([texts[i] for i in indices]), info.device)
        value = encode({part: {"input_ids": input_ids, "attention_mask": mask}})[f"{part}text_embeds"].float().cpu()
        if number < own:
            found += zip(indices, value, strict=True)
    rows = dict(pair for own_part in gather_objects(found) for pair in own_part)
    return torch.stack([rows[index] for index in range(len(texts))])


def measure(
    split: Split, *, loss_kind: str, scale: float, bias: float, brief: bool = False, info: DistInfo | None = None
) -> dict[str, float]:
    """Retrieval both ways, the chance levels, the contrastive loss in chunks of 256 pairs, and classification where
    there are labels.

    brief: of the retrieval only R@1, R@10 and MRR. info: ranks that share the work.
    """
    found: dict[str, float] = {}
    if split.captions_CE is not None:
        by_chance = chances(len(split.items_IE), split.owners)
        for direction, values in retrieval(
            split.items_IE, split.captions_CE, split.owners, info=info, intervals=not brief
        ).items():
            found |= {
                f"{split.kind}_{direction}_{name}": value
                for name, value in values.items()
                if not brief or name in ("R@1", "R@10", "MRR")
            }
            found[f"{split.kind}_{direction}_chance_R@10"] = by_chance[direction]["R@10"]
        pairs = split.captions_CE[split.first_captions]
        losses, sizes = [], []
        for start in range(0, len(pairs), LOSS_CHUNK):
            own, texts = split.items_IE[start : start + LOSS_CHUNK], pairs[start : start + LOSS_CHUNK]
            value = contrastive_loss(loss_kind, own, texts, torch.tensor(scale), torch.tensor(bias), all_ranks=False)
            losses.append(value.item() * len(own))
            sizes.append(len(own))
        found[f"{split.kind}_loss"] = sum(losses) / sum(sizes)
        found[f"{split.kind}_guessing"] = guessing_loss(loss_kind, sizes)
    if split.class_logits is not None and split.labels is not None:
        found |= classification(split)
    return found


def guessing_loss(loss_kind: str, sizes: list[int]) -> float:
    """The loss of embeddings that say nothing: ln N a pair for a batch of N; of the sigmoid the best constant's."""
    if loss_kind == "infonce":
        return sum(size * math.log(size) for size in sizes) / sum(sizes)
    rows = sum(size * (math.log(size) + (size - 1) * math.log(size / (size - 1))) for size in sizes if size > 1)
    return rows / sum(sizes)


def classification(split: Split) -> dict[str, float]:
    """Mean average precision and micro-F1 for pictures, accuracy for speakers, and the loss."""
    logits, labels = split.class_logits, split.labels
    assert logits is not None and labels is not None, "the split has no classes"
    if split.kind == "voice":
        return {
            "speaker_accuracy": float((logits.argmax(1) == labels.argmax(1)).float().mean()),
            "class_loss": float(torch.nn.functional.cross_entropy(logits, labels.argmax(1))),
        }
    return {
        "mAP": mean_average_precision(logits.numpy(), labels.numpy()),
        "micro_F1": micro_f1(logits.numpy(), labels.numpy()),
        "class_loss": float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)),
    }


def validation_batch(dataset: CaptionedDataset, number: int, size: int) -> dict[str, Any]:
    """Up to `size` samples from a fixed place on, round the set; those that cannot be read are passed over."""
    items: dict[int, dict] = {}
    for place in range(len(dataset)):
        index = (number * size + place) % len(dataset)
        with contextlib.suppress(BadSample):
            items[index] = dataset[index]
        if len(items) == size:
            break
    if not items:
        raise UserError(f"none of {len(dataset)} validation samples can be read; look at the data folder")
    batch = collate(list(items.values()))
    batch["slot"] = torch.tensor(list(items))
    return batch


class ValidationBatches(Dataset):
    """validation_batch of every kind, by number."""

    def __init__(self, datasets: dict[Kind, CaptionedDataset], numbers: list[int], size: int):
        self.datasets, self.numbers, self.size = datasets, numbers, size

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[Kind, dict[str, Any]] | UserError:
        try:
            return {kind: validation_batch(own, self.numbers[place], self.size) for kind, own in self.datasets.items()}
        except UserError as error:  # handed over as it is: a loader process would wrap it in its traceback
            return error

    def read(self, workers: int) -> Iterator[dict[Kind, dict[str, Any]]]:
        """All of them, by loader processes."""
        options: dict[str, Any] = {"worker_init_fn": start_process, "prefetch_factor": 2} if workers else {}
        for batch in DataLoader(self, None, num_workers=workers, **options):
            if isinstance(batch, UserError):
                raise batch
            yield batch
