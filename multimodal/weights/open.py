"""A trained model ready to embed pictures, texts and sounds; what generate.py, metrics.py and embed.py share."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.config import Config
from multimodal.data.audio import AUDIO_SUFFIXES
from multimodal.data.image import IMAGE_SUFFIXES
from multimodal.data.records import Kind, ListRecords, Record, Records, clean
from multimodal.data.sources import model_inputs
from multimodal.data.text import TextTokenizer
from multimodal.dataset import CaptionedDataset
from multimodal.evaluation.held_out import Split, embed_split, read_batches
from multimodal.objective import AlignModel, FinetuneModel
from multimodal.weights.files import checkpoint_file, load_model
from shared.config import validate
from shared.data import to_device
from shared.engine.dist import DistInfo, init_distributed
from shared.errors import UserError
from shared.media.folders import is_junk

_FILES = "files"  # the data set that single files are read as


@dataclass
class Embedder:
    """A model in eval mode on its device, with the settings that it was trained with."""

    model: AlignModel
    tokenizer: TextTokenizer
    config: Config
    payload: dict[str, Any]
    info: DistInfo
    batch_size: int = 64

    @classmethod
    def load(
        cls, checkpoint: str, *, device: str = "auto", tokenizer: str | None = None, batch_size: int = 64
    ) -> "Embedder":
        """From OUT, a checkpoint folder or a .pt file."""
        file = checkpoint_file(checkpoint)
        network, own_tokenizer, payload = load_model(file, tokenizer)
        info = init_distributed(device)
        config = validate(Config, payload["config"], f"the settings in {checkpoint}")
        stage = FinetuneModel(network) if payload["stage"] == 3 else AlignModel(network)
        found = cls(stage.to(info.device).eval(), own_tokenizer, config, payload, info, batch_size)
        print(f"checkpoint: {file} ({found.what})", file=sys.stderr, flush=True)
        return found

    @property
    def what(self) -> str:
        """Which checkpoint it is, in words."""
        score, name = self.payload.get("best_value"), self.payload.get("best_metric", "val/loss")
        best = f", best {name} so far {score:.4f}" if score is not None else ""
        return f"stage {self.payload['stage']}, epoch {self.payload['epoch']}{best}"

    @torch.inference_mode()
    def encode(self, batch: dict) -> dict[str, Tensor]:
        """The stage module's outputs."""
        return self.model(batch)

    def dataset(self, records: Records, *, num_classes: int | None = None) -> CaptionedDataset:
        """The evaluation view of records."""
        data = self.config.data.model_copy(update={"keep_in_memory": False, "mel_cache": None})
        return CaptionedDataset(
            records, data, self.tokenizer, image_size=self.config.model.image_size, num_classes=num_classes
        )

    def split(
        self,
        records: Records,
        kind: Kind,
        *,
        audio_crops: int = 1,
        num_classes: int | None = None,
        workers: int = 0,
    ) -> Split:
        """All items and captions of one kind; audio_crops 3: start, middle and end of long sounds, averaged."""
        positions = (0.0,) if audio_crops == 1 else tuple(i / (audio_crops - 1) for i in range(audio_crops))
        return embed_split(
            self.encode,
            self.dataset(records, num_classes=num_classes),
            kind,
            self.info,
            batch_size=self.batch_size,
            positions=positions,
            workers=workers,
        )

    def texts(self, texts: list[str]) -> Tensor:
        """(n, E) unit vectors, fp32, on the CPU; UserError for a text without a word."""
        found, words = [], [clean(text) for text in texts]
        if not all(words):
            raise UserError(f"the text {texts[words.index('')]!r} holds no word; give one that does")
        for own in batches(words, 2 * self.batch_size):
            input_ids, mask = to_device(self.tokenizer.batch(own), self.info.device)
            outputs = self.encode({"image": {"input_ids": input_ids, "attention_mask": mask}})
            found.append(finite(outputs["imagetext_embeds"].cpu()))
        return torch.cat(found)

    def images(self, paths: list[Path]) -> tuple[Tensor, list[Path]]:
        """(n, E) unit vectors of the pictures that can be read, and their paths; UserError where none can be."""
        return self._readable(paths, "image")

    def sounds(self, paths: list[Path]) -> tuple[Tensor, list[Path]]:
        """(n, E) unit vectors of the sounds that can be read, and their paths; UserError where none can be."""
        return self._readable(paths, "audio")

    def _readable(self, paths: list[Path], kind: Kind) -> tuple[Tensor, list[Path]]:
        vectors, good, bad = self.files(paths, kind)
        for sentence in bad:
            print(f"left out: {sentence}", file=sys.stderr, flush=True)
        if not good:
            what = "a picture" if kind == "image" else "a sound"
            raise UserError(f"none of {len(paths)} files can be read as {what}; the first: {bad[0]}")
        return vectors, good

    def files(self, paths: list[Path], kind: Kind, workers: int = 0) -> tuple[Tensor, list[Path], list[str]]:
        """(n, E) unit vectors of the files that can be read, their paths, and sentences on the others."""
        dataset = self.dataset(ListRecords(Record(str(path), path, (), _FILES, kind) for path in paths))
        vectors, good, bad = [], [], []
        for batch, own, faults in read_batches(dataset, list(batches(range(len(paths)), self.batch_size)), workers):
            bad += [fault.removeprefix(f"{_FILES}: ") for fault in faults]
            good += [paths[number] for number in own]
            if batch is not None:
                inputs = to_device(model_inputs({kind: batch}), self.info.device)
                vectors.append(finite(self.encode(inputs)[f"{kind}_embeds"].cpu()))
        width = self.config.model.embed_dim
        return torch.cat(vectors) if vectors else torch.zeros(0, width), good, bad


def finite(vectors: Tensor) -> Tensor:
    """Itself; UserError when the model makes numbers that cannot be compared."""
    if not vectors.isfinite().all():
        raise UserError("the model's embeddings are not finite: its training has diverged; use an earlier checkpoint")
    return vectors


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    items = list(items)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def files_below(folder: str, kind: Kind) -> list[Path]:
    """Pictures or sounds below a folder, or the file itself; UserError when there is none."""
    root, suffixes = Path(folder), IMAGE_SUFFIXES if kind == "image" else AUDIO_SUFFIXES
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{folder}: no such file or folder")
    found = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file() and not is_junk(path, root)
    )
    if not found:
        raise UserError(f"{folder}: holds no file that ends in {', '.join(suffixes)}")
    return found
