"""From the settings to data sets and batch streams: which pictures, sounds and voices a run trains on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multimodal.config import ALL, SAMPLE_DATA, Config
from multimodal.data.image import normalise
from multimodal.data.records import KINDS, Found, Joined, Kind, MissingData, Reader, Records
from multimodal.data.sets import (
    AUDIOCAPS_STEPS,
    coco_class_names,
    read_audiocaps,
    read_audioset,
    read_clotho,
    read_coco,
    read_esc50,
    read_flickr30k,
    read_fsd50k,
    read_jsonl,
    read_karpathy,
    read_voxceleb,
    remedy,
)
from multimodal.data.sharded import read_shards
from multimodal.data.synthetic import synthetic_records
from multimodal.data.text import TextTokenizer
from multimodal.dataset import Augmentation, CaptionedDataset, PlainImages, collate, stable_hash
from shared.config import accumulation_steps
from shared.data import BatchPlan, MapStream
from shared.engine.dist import DistInfo
from shared.errors import UserError

HELD_OUT = 20  # one record of so many, where a kind has no validation split
READERS: dict[str, Reader] = {
    "coco": read_coco,
    "clotho": read_clotho,
    "audiocaps": read_audiocaps,
    "voxceleb": read_voxceleb,
    "flickr30k": read_flickr30k,
    "audioset": read_audioset,
    "esc50": read_esc50,
    "fsd50k": read_fsd50k,
    "jsonl": read_jsonl,
    "shards": read_shards,
}


@dataclass
class Data:
    """Records by kind, and sentences on what was found."""

    train: dict[Kind, Records] = field(default_factory=dict)
    val: dict[Kind, Records] = field(default_factory=dict)
    counts: list[dict[str, Any]] = field(default_factory=list)  # one row a data set and split
    notes: list[str] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)  # rows of lists that cannot be used

    @property
    def kinds(self) -> list[Kind]:
        """The kinds with training samples, in the fixed order."""
        return [kind for kind in KINDS if kind in self.train]

    def labelled(self, label_set: str) -> bool:
        """Whether every training sample of the kind that the label set speaks of has class labels."""
        kind: Kind = "voice" if label_set == "voxceleb1" else "image"
        return label_set != "none" and kind in self.train and self.train[kind].all_labelled()

    @property
    def framed(self) -> bool:
        """Whether voices come with video frames."""
        return "voice" in self.train and self.train["voice"][0].video is not None

    @property
    def contrasted(self) -> bool:
        """Whether there is anything to compare: voices alone, without frames, are not."""
        return self.framed or self.train.keys() != {"voice"}


def data_folder(config: Config, name: str) -> Path:
    """Where a data set lies."""
    if name in config.data.paths:
        return Path(config.data.paths[name])
    return (Path(config.data.data_root) if config.data.data_root else SAMPLE_DATA) / name


def read_records(name: str, folder: Path, split: str, *, karpathy: bool = False) -> Found:
    """The records of one data set and split (train, val or test); no records where the set has no such split.

    Raises MissingData, naming the folder and the way to get it, when the set or all its training files are not there.
    """
    if not folder.is_dir():
        raise MissingData(f"data set {name}: no folder {folder}; {remedy(name, folder)}")
    found = (read_karpathy if karpathy and name == "coco" else READERS[name])(folder, split)
    if split == "train" and not found.records:
        listed = f" ({found.missing} are listed, their files are not there)" if found.missing else ""
        rows = f"; {found.bad[0]}" if found.bad else ""
        way = AUDIOCAPS_STEPS if name == "audiocaps" and found.missing else remedy(name, folder)
        raise MissingData(f"data set {name}: {folder} holds no training sample{listed}{rows}; {way}")
    return found


def split_of(config: Config, name: str, split: str, *, karpathy: bool | None = None) -> Found:
    """The records of a data set and split where the settings say that it lies. karpathy: None as the settings say."""
    if name == "synthetic":
        return synthetic_records(split, config.data.synthetic_items, config.run.seed)
    wanted = config.data.karpathy if karpathy is None else karpathy
    return read_records(name, data_folder(config, name), split, karpathy=wanted)


def open_data(config: Config) -> Data:
    """Read the lists of all data sets. One that is not there, or has no files, is noted; UserError when none is left.

    A set whose place was given by name must be there.
    """
    data, root, names = Data(), config.data.data_root, config.data.datasets
    if root is not None and not Path(root).is_dir() and {*names} - {"synthetic", *config.data.paths}:
        fetched = " ".join(name for name in names if name in ALL)  # own data cannot be fetched
        get = f"python multimodal/download_datasets.py --datasets {fetched} --data-root {root} fills it, "
        raise UserError(
            f"--data-root {root}: no such folder; {get if fetched else ''}--config small trains on the sample data"
        )
    if unused := sorted(set(config.data.paths) - set(names)):
        data.notes.append(
            f"warning: data.paths names {', '.join(unused)}, which data.datasets ({', '.join(names)}) does not; it is "
            "not read"
        )
    absent = []
    for name in names:
        try:
            _add(config, data, name)
        except MissingData as error:
            if name in config.data.paths:
                raise
            absent.append(str(error))
            data.notes.append(f"{error}. Training goes on without it")
    if not data.train:
        raise UserError(f"none of the data sets is there: {' | '.join(absent)}")
    _check_voice(config, data)
    for kind in data.kinds:
        _hold_out(data, kind)
    if not data.train:
        raise UserError(f"{data.notes[-1]}, and there is nothing else; give more data")
    _check_labels(config, data)
    return data


def _add(config: Config, data: Data, name: str) -> None:
    parts = {}
    for split in ("train", "val"):
        found = split_of(config, name, split)
        parts[split] = found.records
        data.bad += [{"dataset": name, "split": split, "reason": reason} for reason in found.bad]
        if found.records:
            total = len(found.records) + found.missing
            row = {"dataset": name, "split": split, "items": len(found.records), "missing": found.missing}
            data.counts.append({**row, "bad_rows": len(found.bad)})
            rows = f"; {len(found.bad)} rows cannot be used, the first: {found.bad[0]}" if found.bad else ""
            if found.repeated:
                rows += (
                    f"; warning: {found.repeated} rows are of a file that an earlier row has: put all captions of a "
                    "file into one row, or it counts as several"
                )
            data.notes.append(f"{name} {split}: {len(found.records)} of {total} present{rows}")
    if parts["val"] and name != "synthetic" and (both := overlap(parts["train"], parts["val"])):
        data.notes.append(f"warning: {both} samples of {name} are in its training and its validation split")
    for split, target in (("train", data.train), ("val", data.val)):
        for kind, records in parts[split].by_kind().items():
            target[kind] = Joined([target[kind], records]) if kind in target else records


def overlap(first: Records, second: Records) -> int:
    """How many samples of the second are in the first too, by what they are, not by the split in their name."""
    hashes = [np.fromiter(map(stable_hash, part.identities()), np.int64) for part in (first, second)]
    return int(np.isin(hashes[1], hashes[0]).sum())


def _hold_out(data: Data, kind: Kind) -> None:
    """Where a kind has no validation split, a twentieth of its samples, by the hash of their name."""
    if data.val.get(kind):
        return
    records = data.train[kind]
    is_held = np.fromiter((stable_hash(name) % HELD_OUT == 0 for name in records.names()), dtype=bool)
    is_held[-1] |= not is_held.any()
    if is_held.all():
        del data.train[kind]
        data.notes.append(f"{len(records)} {kind} sample is too little to train on and validate with: it is left out")
        return
    data.train[kind], data.val[kind] = (records.take(np.flatnonzero(chosen)) for chosen in (~is_held, is_held))
    data.notes.append(
        f"{kind}: no validation split; {int(is_held.sum())} training samples are held out by the hash of their name"
    )


def _check_voice(config: Config, data: Data) -> None:
    """Contrast needs a video frame for each utterance; speaker identification does not."""
    if "voice" not in data.train:
        return
    framed: dict[str, Records] = {}
    for split, part in (("train", data.train), ("val", data.val)):
        if "voice" in part:
            has_frame = np.array([record.video is not None for record in part["voice"]])
            if has_frame.any():
                framed[split] = part["voice"].take(np.flatnonzero(has_frame))
    if "train" in framed:
        data.train["voice"] = framed["train"]
        data.val.pop("voice", None)
        if "val" in framed:
            data.val["voice"] = framed["val"]
    elif config.training.label_set != "voxceleb1":
        sentence = (
            "voxceleb: no videos (mp4/) next to the sounds, so nothing to contrast the voices with; add the "
            "mp4 files, or train speaker identification with --label-set voxceleb1 --num-classes 1251 --stages 3"
        )
        if len(data.train) == 1:
            raise UserError(sentence)
        data.notes.append(f"{sentence}. Training goes on without it")
        data.train.pop("voice")
        data.val.pop("voice", None)


def _check_labels(config: Config, data: Data) -> None:
    """Class numbers that the classifier does not have. Shards tell theirs when they are read."""
    kind: Kind = "voice" if config.training.label_set == "voxceleb1" else "image"
    if config.training.label_set == "none" or kind not in data.train:
        return
    parts = [data.train[kind], *([data.val[kind]] if kind in data.val else [])]
    most = 1 + max(part.largest_label() for part in parts)
    if most > config.model.num_classes:
        what = f"{most} speakers" if kind == "voice" else f"class number {most - 1}"
        labels = " --label-set images" if config.training.label_set == "coco80" else ""
        raise UserError(
            f"the {kind} samples have {what}, the model has {config.model.num_classes} classes; "
            f"use --num-classes {most}{labels}, or --label-set none"
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
    sets = {"coco80": "image", "images": "image", "voxceleb1": "voice"}
    labelled = sets.get(config.training.label_set) if stage == 3 else None
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


def fingerprint_of(datasets: dict[Kind, CaptionedDataset]) -> str:
    """Stands for the lists of samples of all kinds; None in the place of what keeps no list, as in MapStream."""
    return "+".join(f"{kind}:{getattr(dataset, 'fingerprint', None)}" for kind, dataset in datasets.items())


class PairedStream:
    """One batch of every kind in each micro-step. The first kind sets the length of an epoch; the others go round.

    Every rank reads every kind in every step, so all ranks run the same modules.
    """

    def __init__(self, datasets: dict[Kind, CaptionedDataset], config: Config, info: DistInfo, bad_samples: Path):
        training, world = config.training, info.world
        accumulation = accumulation_steps(training, world)
        self.streams: dict[Kind, MapStream] = {}
        for kind, dataset in datasets.items():
            whole = len(dataset) >= training.batch_size * world * accumulation
            plan = BatchPlan(len(dataset), training.batch_size, world, accumulation, config.run.seed, drop_last=whole)
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
        self.epoch_steps = first.plan.steps_per_epoch
        self.steps_per_epoch: int | None = self.epoch_steps
        self.samples_per_step = first.samples_per_step
        self.fingerprint: str | None = fingerprint_of(datasets)

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
    found: dict[str, dict[str, Tensor]] = {
        kind: {name: part[name] for name in names if name in part} for kind, part in batch.items()
    }
    for part in found.values():
        if "images" in part:
            part["images"] = normalise(part["images"])
    return found


def class_names(config: Config) -> list[str] | None:
    """Names of the 80 COCO classes where their file is there."""
    folder = data_folder(config, "coco")
    return coco_class_names(folder) if (folder / "annotations" / "instances_val2017.json").exists() else None
