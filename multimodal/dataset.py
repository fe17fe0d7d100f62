"""Records to tensors: keyed crops and masks, captions to ids, and the collating of batches."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from multimodal.config import DataConfig
from multimodal.data.audio import BANDS, SAMPLE_RATE, compress, fit_frames, log_power, read_audio, spec_augment
from multimodal.data.image import center_crop, normalise, random_resized_crop, read_image
from multimodal.data.records import Record, Records, Source
from multimodal.data.text import SPECIAL_TOKENS, TextTokenizer, pad_ids
from shared.errors import BadSample, written_aside
from shared.media.pictures import to_pixels
from shared.rng import keyed_generator

VOICE_SECONDS = 3.0
_STREAM = 611  # random stream of the augmentation
DECODED_SIDES = 2  # pictures kept in memory have a shorter side of so many model sides


@dataclass(frozen=True)
class Augmentation:
    """How training samples vary; None in its place means evaluation."""

    crop_scale: float = 0.2
    flip: float = 0.5
    spec_augment: bool = True
    caption_drop: float = 0.0


class CaptionedDataset:
    """Pictures or sounds with captions. Item: images (3, S, S) or audio (T, 80) and audio_mask, input_ids, caption,
    labels, id.

    sample(index, epoch) augments by (seed, epoch, index) and leaves pictures as uint8; [index] is the evaluation view,
    pictures normalised. Raises BadSample for a broken file.
    """

    def __init__(
        self,
        records: Records,
        data: DataConfig,
        tokenizer: TextTokenizer,
        *,
        image_size: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        num_classes: int | None = None,
    ):
        self.records, self.data, self.tokenizer, self.image_size, self.seed = records, data, tokenizer, image_size, seed
        self.augmentation, self.num_classes = augmentation, num_classes
        self._memory: dict[str, Any] = {}
        self.fingerprint = list_fingerprint(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.at_position(index, 0.0)

    def at_position(self, index: int, position: float) -> dict:
        """The evaluation view with the sound cut at `position` (0 start, 1 end) of what is left over."""
        record = self._record(index)
        with named(record.dataset):
            return self._item(record, None, position, 0)

    def sample(self, index: int, epoch: int) -> dict:
        """The training view of one epoch."""
        if self.augmentation is None:
            return self[index]
        generator = keyed_generator(self.seed, _STREAM, epoch, index)
        record = self._record(index)
        choice = int(torch.randint(0, max(1, len(record.captions)), (), generator=generator))
        with named(record.dataset):
            return self._item(record, generator, float(torch.rand((), generator=generator)), choice)

    def _record(self, index: int) -> Record:
        with named("shards"):  # the others' records are at hand
            return self.records[index]

    def _item(self, record: Record, generator: torch.Generator | None, position: float, choice: int) -> dict:
        item: dict[str, Any] = {"id": record.id, "dataset": record.dataset}
        if record.captions:
            caption = record.captions[choice]
            item |= {
                "caption": caption,
                "input_ids": self._vary(self.tokenizer.encode(caption), generator),
                "caption_key": stable_hash(caption.lower()),
            }
        item["item_key"] = stable_hash(record.id)
        if record.kind == "image":
            item["images"] = self._image(record.source, generator)
        else:
            seconds = VOICE_SECONDS if record.kind == "voice" else None
            item["audio"], item["audio_mask"] = self._audio(record.source, generator, position, seconds)
            if record.video is not None:
                item["images"] = self._frame(record.video, generator)
        if self.num_classes:
            if record.labels is None:
                raise BadSample(f"{record.id}: no labels, others have some")
            item["labels"] = torch.zeros(self.num_classes)
            if max(record.labels, default=0) >= self.num_classes:
                raise BadSample(f"{record.id}: label {max(record.labels)} with num_classes {self.num_classes}")
            item["labels"][list(record.labels)] = 1
        return item

    def _vary(self, ids: list[int], generator: torch.Generator | None) -> list[int]:
        """Some tokens left out, so that each word learns to stand for itself; one at least stays: a text of no word has
        no direction, and one such pair would outweigh a batch (its gradient is 1e10 times that of the others).
        """
        rate = self.augmentation.caption_drop if self.augmentation and generator else 0.0
        if not rate:
            return ids
        draws = torch.rand(len(ids), generator=generator).tolist()
        words = [draw for number, draw in zip(ids, draws, strict=True) if number >= SPECIAL_TOKENS]
        least = min(rate, max(words, default=rate))
        return [number for number, draw in zip(ids, draws, strict=True) if number < SPECIAL_TOKENS or draw >= least]

    # --- pictures -----------------------------------------------------------------------------------------------------

    def _image(self, source: Path | Source, generator: torch.Generator | None) -> Tensor:
        side = DECODED_SIDES * self.image_size
        picture = self._remember(
            f"image {source}", lambda: read_image(_bytes_or_path(source), max_side=side, name=str(source))
        )
        return self._crop(picture, generator)

    def _crop(self, picture: Any, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return normalise(to_pixels(center_crop(picture, self.image_size)))
        how = self.augmentation
        assert how is not None, "a generator comes with an augmentation"
        return to_pixels(random_resized_crop(picture, self.image_size, generator, scale=how.crop_scale, flip=how.flip))

    def _frame(self, video: Path, generator: torch.Generator | None) -> Tensor:
        return self._crop(self._remember(f"frame {video}", lambda: read_frame(video)), generator)

    # --- sound --------------------------------------------------------------------------------------------------------

    def _audio(
        self, source: Path | Source, generator: torch.Generator | None, position: float, seconds: float | None
    ) -> tuple[Tensor, Tensor | None]:
        frames = self.data.audio_frames if seconds is None else int(seconds * 100) // 16 * 16
        power = self._log_power(source, frames, position)
        clip, mask = fit_frames(power, frames, position=position, fill=self.data.audio_fill)
        mel = compress(clip)
        if generator is not None and self.augmentation is not None and self.augmentation.spec_augment:
            mel = spec_augment(mel, generator)
        return mel, mask

    def _log_power(self, source: Path | Source, frames: int, position: float) -> Tensor:
        """Of the whole clip where it is kept or cached; else only the stretch that is wanted is decoded."""
        if self.data.mel_cache:
            return self._remember(f"mel {source}", lambda: self._cached_power(source))
        if self.data.keep_in_memory:
            return self._remember(f"mel {source}", lambda: log_power(_waveform(source)))
        return log_power(_waveform(source, seconds=frames * 160 / SAMPLE_RATE, position=position))

    def _cached_power(self, source: Path | Source) -> Tensor:
        path = Path(self.data.mel_cache or ".") / f"{_content_key(source)}.npy"
        with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged: it is made, as at first
            stored = np.load(path)
            is_whole = stored.ndim == 2 and stored.shape[1] == BANDS and stored.dtype == np.float16
            if is_whole and np.isfinite(stored).all():
                return torch.from_numpy(stored).float()
        power = log_power(_waveform(source)).half()
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as temporary, open(temporary, "wb") as file:
            np.save(file, power.numpy())
        return power.float()

    def _remember(self, key: str, make: Callable[[], Any]) -> Any:
        if not self.data.keep_in_memory:
            return make()
        if key not in self._memory:
            value = make()
            if hasattr(value, "thumbnail"):
                short = min(value.size) / (DECODED_SIDES * self.image_size)
                value = value.resize((round(value.width / short), round(value.height / short))) if short > 1 else value
            self._memory[key] = value
        return self._memory[key]


@contextmanager
def named(dataset: str) -> Iterator[None]:
    """Put the data set's name before what is said of a broken sample: the report counts by it."""
    try:
        yield
    except BadSample as error:
        raise BadSample(f"{dataset}: {error}") from None


class PlainImages(CaptionedDataset):
    """Pictures or sounds for stage 1, without the text."""

    def _item(self, record: Record, generator: torch.Generator | None, position: float, choice: int) -> dict:
        item = super()._item(record, generator, position, choice)
        return {key: item[key] for key in ("images", "audio", "audio_mask", "id", "item_key") if key in item}


def collate(items: list[dict]) -> dict[str, Any]:
    """A batch of items with the same fields: tensors stacked, ids padded to a multiple of 8, texts in lists.

    audio_mask is left out when every frame counts, which keeps attention on its fast path.
    """
    first = items[0]
    batch: dict[str, Any] = {"id": [item["id"] for item in items]}
    for name in ("images", "audio", "labels"):
        if name in first:
            batch[name] = default_collate([item[name] for item in items])
    if "input_ids" in first:
        batch["input_ids"], batch["attention_mask"] = pad_ids([item["input_ids"] for item in items])
        batch["caption"] = [item["caption"] for item in items]
    if any(item.get("audio_mask") is not None for item in items):
        frames = len(first["audio"])
        batch["audio_mask"] = torch.stack(
            [
                torch.ones(frames, dtype=torch.bool) if item["audio_mask"] is None else item["audio_mask"]
                for item in items
            ]
        )
    keys = [[item.get("caption_key", item["item_key"]), item["item_key"]] for item in items]
    batch["keys"] = torch.tensor(keys, dtype=torch.int64)
    return batch


def list_fingerprint(records: Records) -> str:
    """Stands for the names of all records and their order."""
    digest, names = hashlib.sha256(), records.names()
    digest.update(next(names, "").encode())
    for name in names:
        digest.update(b"\n" + name.encode())
    return digest.hexdigest()[:16]


def stable_hash(text: str) -> int:
    """A 63-bit number that stands for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def read_frame(path: Path) -> Any:
    """The first frame of a video as an RGB picture."""
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            return next(container.decode(video=0)).to_image().convert("RGB")
    except Exception as error:  # PyAV raises many kinds for broken files
        raise BadSample(f"{path}: no frame can be read ({error})") from None


def _content_key(source: Path | Source) -> str:
    """Stands for what a source holds now: a file that is replaced gets another name in the cache."""
    mark = str(source)
    if isinstance(source, Path):
        facts = source.stat()
        mark += f" {facts.st_size} {facts.st_mtime_ns}"
    else:
        mark += f" {hashlib.sha256(source.read()).hexdigest()}"
    return hashlib.sha256(mark.encode()).hexdigest()[:24]


def _waveform(source: Path | Source, *, seconds: float | None = None, position: float = 0.0) -> Tensor:
    return torch.from_numpy(read_audio(_bytes_or_path(source), seconds=seconds, position=position, name=str(source)))


def _bytes_or_path(source: Path | Source) -> Path | bytes:
    return source if isinstance(source, Path) else source.read()
