"""Embeddings of whole splits, shared over the ranks, and the measures on them.

Legend: I items, C captions, E embedding width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.data.records import Kind
from multimodal.data.sources import model_inputs
from multimodal.data.text import TextTokenizer
from multimodal.dataset import CaptionedDataset, collate
from multimodal.evaluation.retrieval import chance_recall, mean_average_precision, micro_f1, retrieval
from multimodal.modules.contrastive import contrastive_loss
from shared.data import to_device
from shared.engine.dist import DistInfo, gather_objects
from shared.errors import BadSample, UserError

Encode = Callable[[dict[str, dict[str, Tensor]]], dict[str, Tensor]]  # AlignModel's forward without draws
LOSS_CHUNK = 256  # pairs, in file order: a contrastive loss means nothing without its batch size


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


def embed_split(
    encode: Encode,
    dataset: CaptionedDataset,
    kind: Kind,
    info: DistInfo,
    *,
    batch_size: int,
    positions: tuple[float, ...] = (0.0,),
) -> Split:
    """Embed all items and all captions. positions: where long sounds are cut; their embeddings are averaged."""
    rows = _over_ranks(
        range(len(dataset)),
        batch_size,
        info,
        lambda indices: _encode_items(encode, dataset, kind, indices, positions, info),
    )
    good = {row["index"]: row for row in rows if "embedding" in row}
    order = sorted(good)
    texts = [(place, text) for place, index in enumerate(order) for text in dataset.records[index].captions]
    captions = None
    if texts:
        encoded = _over_ranks(
            range(len(texts)),
            2 * batch_size,
            info,
            lambda indices: _encode_texts(
                encode, dataset.tokenizer, kind, [texts[i][1] for i in indices], indices, info
            ),
        )
        captions = torch.stack([row["embedding"] for row in sorted(encoded, key=lambda row: row["index"])])
    elif order and "frame" in good[order[0]]:
        captions, texts = torch.stack([good[i]["frame"] for i in order]), [(place, "") for place in range(len(order))]
    if not order:
        raise UserError(f"{len(rows)} validation samples ({kind}), none of which can be read; look at the data folder")
    first = {place: caption for caption, (place, _) in reversed(list(enumerate(texts)))}
    return Split(
        kind,
        [dataset.records[index].id for index in order],
        _column(good, order, "embedding"),
        captions,
        owners=[place for place, _ in texts],
        first_captions=[first[place] for place in sorted(first)],
        caption_texts=[text for _, text in texts],
        class_logits=_column(good, order, "class_logits"),
        labels=_column(good, order, "labels"),
        bad=len(rows) - len(good),
    )


def _column(rows: dict[int, dict], order: list[int], name: str) -> Tensor | None:
    """One field of all rows, or None where they do not have it."""
    return torch.stack([rows[index][name] for index in order]) if name in rows[order[0]] else None


def _over_ranks(indices: range, batch_size: int, info: DistInfo, work: Callable[[list[int]], list[dict]]) -> list[dict]:
    """Every rank does the same number of batches (a wrapped model must run equally often everywhere); rows without
    repeats.
    """
    batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    own: list[dict] = []
    for turn in range(math.ceil(len(batches) / info.world)):
        number = turn * info.world + info.rank
        found = work(batches[min(number, len(batches) - 1)])
        own += found if number < len(batches) else []
    return [row for part in gather_objects(own) for row in part]


def _encode_items(
    encode: Encode,
    dataset: CaptionedDataset,
    kind: Kind,
    indices: list[int],
    positions: tuple[float, ...],
    info: DistInfo,
) -> list[dict]:
    rows, total = [], None
    for position in positions:
        items, good = [], []
        for index in indices:
            try:
                items.append(dataset.at_position(index, position))
                good.append(index)
            except BadSample:
                continue
        if not items:  # the model must run all the same
            return [{"index": index} for index in indices] if _run_placeholder(encode, dataset, kind, info) else []
        part = model_inputs({kind: to_device(collate(items), info.device)})[kind]
        inputs = {name: part[name] for name in ("images", "audio", "audio_mask", "labels") if name in part}
        outputs = encode({kind: inputs})
        name = {"image": "image_embeds", "audio": "audio_embeds", "voice": "voice_embeds"}[kind]
        total = outputs[name].float() if total is None else total + outputs[name].float()
    embeddings = torch.nn.functional.normalize(total, dim=-1).cpu()
    for row, index in enumerate(good):
        entry = {"index": index, "embedding": embeddings[row]}
        for key, source in (
            ("frame", outputs.get("frame_embeds")),
            ("class_logits", outputs.get("class_logits")),
            ("labels", inputs.get("labels")),
        ):
            if source is not None:
                entry[key] = source[row].float().cpu()
        rows.append(entry)
    return rows + [{"index": index} for index in indices if index not in good]


def _run_placeholder(encode: Encode, dataset: CaptionedDataset, kind: Kind, info: DistInfo) -> bool:
    """A batch without one readable item: run zeros in its place, since other ranks run the model now."""
    size = dataset.image_size
    inputs = (
        {"images": torch.zeros(1, 3, size, size)}
        if kind == "image"
        else {"audio": torch.zeros(1, dataset.data.audio_frames, 80)}
    )
    encode({kind: to_device(inputs, info.device)})
    return True


def _encode_texts(
    encode: Encode, tokenizer: TextTokenizer, kind: Kind, texts: list[str], indices: list[int], info: DistInfo
) -> list[dict]:
    input_ids, attention_mask = to_device(tokenizer.batch(texts), info.device)
    part = "image" if kind == "image" else "audio"
    embeddings = (
        encode({part: {"input_ids": input_ids, "attention_mask": attention_mask}})[f"{part}text_embeds"].float().cpu()
    )
    return [{"index": index, "embedding": embedding} for index, embedding in zip(indices, embeddings, strict=True)]


def measure(split: Split, *, loss_kind: str, scale: float, bias: float, brief: bool = False) -> dict[str, float]:
    """Retrieval both ways, the chance level, the contrastive loss in chunks of 256 pairs, and classification where
    there are labels.

    brief: of the retrieval only R@1 and R@10.
    """
    found: dict[str, float] = {}
    if split.captions_CE is not None:
        for direction, values in retrieval(split.items_IE, split.captions_CE, split.owners).items():
            found |= {
                f"{split.kind}_{direction}_{name}": value
                for name, value in values.items()
                if not brief or name in ("R@1", "R@10")
            }
        found[f"{split.kind}_chance_R@10"] = chance_recall(len(split.items_IE), 10)
        pairs = split.captions_CE[split.first_captions]
        losses, sizes = [], []
        for start in range(0, len(pairs), LOSS_CHUNK):
            own = split.items_IE[start : start + LOSS_CHUNK]
            losses.append(
                contrastive_loss(
                    loss_kind,
                    own,
                    pairs[start : start + LOSS_CHUNK],
                    torch.tensor(scale),
                    torch.tensor(bias),
                    all_ranks=False,
                ).item()
                * len(own)
            )
            sizes.append(len(own))
        found[f"{split.kind}_loss"] = sum(losses) / sum(sizes)
    if split.class_logits is not None and split.labels is not None:
        found |= classification(split)
    return found


def classification(split: Split) -> dict[str, float]:
    """Mean average precision and micro-F1 for pictures, accuracy for speakers, and the loss."""
    logits, labels = split.class_logits, split.labels
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
