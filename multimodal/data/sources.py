"""From the settings to data sets, batch streams and placements: which pictures, sounds and voices a run trains on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multimodal.config import SAMPLE_DATA, Config
from multimodal.data.image import normalise
from multimodal.data.records import (
    KINDS,
    Found,
    Kind,
    ListRecords,
    Record,
    Records,
    coco_class_names,
    read_audiocaps,
    read_clotho,
    read_coco,
    read_jsonl,
    read_karpathy,
    read_voxceleb,
    remedy,
)
from multimodal.data.sharded import Joined, read_shards
from multimodal.data.synthetic import synthetic_records
from multimodal.data.text import TextTokenizer
from multimodal.dataset import Augmentation, CaptionedDataset, PlainImages, collate, stable_hash
from shared.config import accumulation_steps
from shared.data import BatchPlan, MapStream
from shared.engine.dist import DistInfo
from shared.errors import UserError

HELD_OUT = 20  # one record of so many, where a kind has no validation split


@dataclass
class Data:
    """Records by kind, and sentences on what was found."""

    train: dict[Kind, Records] = field(default_factory=dict)
    val: dict[Kind, Records] = field(default_factory=dict)
    counts: list[dict[str, Any]] = field(default_factory=list)  # one row a data set and split
    notes: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds with training samples, in the fixed order."""
        return [kind for kind in KINDS if kind in self.train]

    def labelled(self, label_set: str) -> bool:
        """Whether every training sample of the kind that the label set speaks of has class labels."""
        records = self.train.get({"voxceleb1": "voice", "none": None}.get(label_set, "image"))
        return records is not None and records.all_labelled()

    @property
    def framed(self) -> bool:
        """Whether voices come with video frames."""
        return "voice" in self.train and self.train["voice"][0].video is not None


def data_folder(config: Config, name: str) -> Path:
    """Where a data set lies."""
    if name in config.data.paths:
        return Path(config.data.paths[name])
    return (Path(config.data.data_root) if config.data.data_root else SAMPLE_DATA) / name


def read_records(name: str, folder: Path, split: str, *, karpathy: bool = False) -> Found:
    """The records of one data set and split (train, val or test); Found(ListRecords()) where the set has no such split.

    Raises UserError naming the folder and the download command when the set is not there.
    """
    if not folder.is_dir():
        raise UserError(f"data set {name}: no folder {folder}; {remedy(name, folder)}")
    readers: dict[str, Callable[[Path, str], Found]] = {
        "coco": read_karpathy if karpathy else read_coco,
        "clotho": read_clotho,
        "audiocaps": read_audiocaps,
        "voxceleb": read_voxceleb,
        "jsonl": read_jsonl,
        "shards": read_shards,
    }
    found = readers[name](folder, split)
    if split == "train" and not found.records:
        missing = f" ({found.missing} are listed, their files are not there)" if found.missing else ""
        raise UserError(f"data set {name}: {folder} holds no training sample{missing}; {remedy(name, folder)}")
    return found


def open_data(config: Config) -> Data:
    """Read the lists of all data sets. A set whose folder is missing is noted; UserError when none is left."""
    data, root = Data(), config.data.data_root
    if (
        root is not None
        and not Path(root).is_dir()
        and not config.data.paths
        and set(config.data.datasets) != {"synthetic"}
    ):
        raise UserError(
            f"--data-root {root}: no such folder; python multimodal/download_datasets.py --datasets "
            f"{' '.join(config.data.datasets)} --data-root {root} fills it, --config small trains on the sample data"
        )
    missing = []
    for name in config.data.datasets:
        folder = data_folder(config, name)
        if name != "synthetic" and name not in config.data.paths and not folder.is_dir():
            missing.append(str(folder))
            continue
        _add(config, data, name, folder)
    data.notes += [f"no folder {folder}: training goes on without it" for folder in missing]
    if not data.train:
        raise UserError(
            f"none of the data sets is there ({', '.join(missing)}); python multimodal/download_datasets.py fetches "
            "them, --config small trains on the sample data"
        )
    _hold_out(data)
    _check_voice(config, data)
    return data


def _add(config: Config, data: Data, name: str, folder: Path) -> None:
    for split, target in (("train", data.train), ("val", data.val)):
        if name == "synthetic":
            found = synthetic_records(split, config.data.synthetic_items, config.run.seed)
        else:
            found = read_records(name, folder, split, karpathy=config.data.karpathy)
        if found.records:
            data.counts.append({"dataset": name, "split": split, "items": len(found.records), "missing": found.missing})
            data.notes.append(f"{name} {split}: {len(found.records)} of {len(found.records) + found.missing} present")
        for kind, records in found.records.by_kind().items():
            target[kind] = Joined([target[kind], records]) if kind in target else records


def _hold_out(data: Data) -> None:
    for kind in data.kinds:
        if not data.val.get(kind):
            records = data.train[kind]
            is_held = np.fromiter((stable_hash(name) % HELD_OUT == 0 for name in records.names()), dtype=bool)
            is_held[-1] |= not is_held.any()
            if is_held.all():
                raise UserError(
                    f"{len(records)} {kind} sample is too little to train on and validate with; give more data"
                )
            rest, held = (records.take(np.flatnonzero(chosen)) for chosen in (~is_held, is_held))
            data.train[kind], data.val[kind] = rest, held
            data.notes.append(
                f"{kind}: no validation split; {len(held)} training samples are held out by the hash of their name"
            )


def _check_voice(config: Config, data: Data) -> None:
    """Contrast needs a video frame for each utterance; speaker identification does not."""
    if "voice" not in data.train:
        return
    for split in (data.train, data.val):
        if with_frame := ListRecords(record for record in split.get("voice", []) if record.video is not None):
            split["voice"] = with_frame
    framed = all(record.video is not None for split in (data.train, data.val) for record in split["voice"])
    if not framed:
        for split in (data.train, data.val):
            split["voice"] = ListRecords(Record(**{**vars(record), "video": None}) for record in split["voice"])
        if config.training.label_set != "voxceleb1":
            raise UserError(
                "voxceleb: no videos (mp4/) beside the sounds, so nothing to contrast the voices with; add the "
                "mp4 files, or train speaker identification with --label-set voxceleb1 --num-classes 1251"
            )
    if config.training.label_set == "voxceleb1":
        most = max(record.labels[0] for record in data.train["voice"]) + 1
        if most > config.model.num_classes:
            raise UserError(
                f"voxceleb: {most} speakers, the model has {config.model.num_classes} classes; use --num-classes {most}"
            )


def make_datasets(
    config: Config, records: dict[Kind, Records], tokenizer: TextTokenizer, *, stage: int, training: bool
) -> dict[Kind, CaptionedDataset]:
    """One data set a kind, with the augmentation of the stage while training."""
    augmentation = None
    if training:
        augmentation = Augmentation(
            crop_scale=0.2 if stage == 1 else config.data.align_crop_scale,
            flip=0.5 if stage == 1 else config.data.align_flip,
            spec_augment=config.data.spec_augment and stage < 3,
            caption_drop=config.data.caption_drop if stage > 1 else 0.0,
        )
    plain = stage == 1 and config.training.text_pretraining == "embeddings"
    kinds = [kind for kind in KINDS if kind in records and not (stage == 1 and kind == "voice")]
    labelled = (
        {"coco80": "image", "images": "image", "voxceleb1": "voice"}.get(config.training.label_set)
        if stage == 3
        else None
    )
    return {
        kind: (PlainImages if plain else CaptionedDataset)(
            records[kind],
            config.data,
            tokenizer,
            image_size=config.model.image_size,
            seed=config.run.seed,
            augmentation=augmentation,
            num_classes=config.model.num_classes if kind == labelled and records[kind].all_labelled() else None,
        )
        for kind in kinds
    }


class PairedStream:
    """One batch of every kind in each micro-step. The first kind sets the length of an epoch; the others go round.

    Every rank reads every kind in every step, so all ranks run the same modules.
    """

    def __init__(self, datasets: dict[Kind, CaptionedDataset], config: Config, info: DistInfo, bad_samples: Path):
        training, world = config.training, info.world
        accumulation = accumulation_steps(training, world)
        self.streams: dict[Kind, MapStream] = {}
        for kind, dataset in datasets.items():
            whole_batch = len(dataset) >= training.batch_size * world * accumulation
            plan = BatchPlan(
                len(dataset), training.batch_size, world, accumulation, config.run.seed, drop_last=whole_batch
            )
            self.streams[kind] = MapStream(
                dataset,
                plan,
                info,
                collate=collate,
                num_workers=training.num_workers,
                prefetch_factor=training.prefetch_factor,
                bad_samples=bad_samples,
            )
        first = next(iter(self.streams.values()))
        self.steps_per_epoch, self.samples_per_step = first.steps_per_epoch, first.samples_per_step
        self.fingerprint = "+".join(f"{kind}:{stream.fingerprint}" for kind, stream in self.streams.items())

    def start(self, step: int, state: dict | None = None) -> None:
        """Go to the batches of `step`."""
        for stream in self.streams.values():
            stream.start(step, state)

    def next_step(self) -> list[dict[Kind, dict]]:
        """The micro-batches of the next optimizer step, each with one batch a kind."""
        steps = {kind: stream.next_step() for kind, stream in self.streams.items()}
        count = len(next(iter(steps.values())))
        return [{kind: batches[micro] for kind, batches in steps.items()} for micro in range(count)]

    def state(self) -> dict:
        """Nothing: the position is the step."""
        return {}

    def agree(self) -> None:
        """Count the broken samples of all ranks together, each kind of its own set; a collective."""
        for stream in self.streams.values():
            stream.agree()

    def close(self) -> None:
        """End the loaders' processes."""
        for stream in self.streams.values():
            stream.close()


def model_inputs(batch: dict[Kind, dict]) -> dict[str, dict[str, Tensor]]:
    """The tensors that a stage's module reads, pictures normalised."""
    names = ("images", "audio", "audio_mask", "input_ids", "attention_mask", "labels", "keys")
    found = {kind: {name: part[name] for name in names if name in part} for kind, part in batch.items()}
    for part in found.values():
        if "images" in part:
            part["images"] = normalise(part["images"])
    return found


def class_names(config: Config) -> list[str] | None:
    """Names of the 80 COCO classes where their file is there."""
    folder = data_folder(config, "coco")
    return coco_class_names(folder) if (folder / "annotations" / "instances_val2017.json").exists() else None
