"""Measure a trained model: retrieval both ways with intervals, classification, zero-shot.

python multimodal/metrics.py --checkpoint outputs/multimodal --output outputs/multimodal/metrics.json
python multimodal/metrics.py --checkpoint OUT --data-root ./data --datasets coco --protocol 1k --output coco.json
python multimodal/metrics.py --checkpoint OUT --zeroshot ESC-50 --output esc50.json
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pydantic import field_validator, model_validator  # noqa: E402

from multimodal.config import ITEMS, Config, DatasetName, check_paths, not_blank  # noqa: E402
from shared.config import Section, load_config, setting  # noqa: E402
from shared.errors import UserError, check_output, command, write_text  # noqa: E402

if TYPE_CHECKING:
    from multimodal.data.records import Record, Records
    from multimodal.evaluation.held_out import Split
    from multimodal.weights.open import Embedder

# What the small preset is meant to reach on the sample data, text to item (40 pictures, 16 sounds held out).
SAMPLE_TARGETS = {("coco", "R@10"): 0.45, ("clotho", "R@5"): 0.50}
FOLDS, FOLD = 5, 1000


class DataOptions(Section):
    """Where the data lie."""

    data_root: str | None = setting(None, "folder that holds them; null: the run's")
    paths: dict[str, str] = setting({}, "folder of a data set that lies elsewhere, by name: {jsonl: FOLDER}")

    _places = field_validator("data_root")(not_blank)

    @model_validator(mode="after")
    def _known(self) -> "DataOptions":
        check_paths(self.paths)
        return self

    def over(self, config: Config) -> Config:
        """The run's settings with these places."""
        changes: dict[str, Any] = {}
        if self.data_root is not None:
            if not Path(self.data_root).is_dir():
                raise UserError(f"--data-root {self.data_root}: no such folder; give the one that holds the data sets")
            changes = {"data_root": self.data_root, "paths": {}}
        if self.paths:
            changes["paths"] = {**config.data.paths, **self.paths}
        return config.model_copy(update={"data": config.data.model_copy(update=changes)})


class Options(Section):
    """Flags of this command."""

    checkpoint: str = setting("outputs/multimodal", "a run's folder, a checkpoint folder or a .pt file")
    output: str = setting("metrics.json", "JSON file to write")
    datasets: list[DatasetName] | None = setting(
        None, "data sets to measure; null: those of the run that are there", "dataset"
    )
    data: DataOptions = DataOptions()
    split: Literal["train", "val", "test"] = setting("val", "part of the data")
    protocol: Literal["full", "first5", "1k", "karpathy"] = setting(
        "full",
        "captions of an item: all, the first five, the mean over five folds of 1000 items, or Karpathy's test split",
    )
    zeroshot: str | None = setting(
        None, "coco80, or a folder with one folder a class, or a folder in the ESC-50 layout"
    )
    workers: int = setting(0, "loader processes", "num_workers", ge=0)
    audio_crops: int = setting(1, "cuts of a long sound whose embeddings are averaged", ge=1, le=9)
    batch_size: int = setting(64, "items at a time", ge=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    tokenizer: str | None = setting(None, "tokenizer file; null: the run's")
    report: bool = setting(True, "write report.json, .md and .html into the run's folder; of the train split never")


@command
def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    options = load_config(Options, argv=argv, description=__doc__)
    output = check_output(options.output)
    check_options(options)
    from multimodal.weights.open import Embedder

    embedder = Embedder.load(
        options.checkpoint, device=options.device, tokenizer=options.tokenizer, batch_size=options.batch_size
    )
    found: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "stage": embedder.payload["stage"],
        "epoch": embedder.payload["epoch"],
        "split": "test" if options.protocol == "karpathy" else options.split,
        "protocol": options.protocol,
        "retrieval": {},
        "classification": {},
    }
    splits: dict[str, Split] = {}
    sources: dict[str, Record] = {}
    if options.zeroshot is not None and options.zeroshot != "coco80":
        from multimodal.evaluation.zeroshot import classify_folder

        found["zeroshot"] = classify_folder(embedder, Path(options.zeroshot))
    else:
        splits, sources = measure_sets(embedder, options, found)
    write_text(output, json.dumps(found, indent=1, ensure_ascii=False))
    print_found(found)
    run = Path(options.checkpoint)
    run = run.parent.parent if run.is_file() else run  # OUT/checkpoints/final_model.pt belongs to OUT
    if options.report and splits and options.split != "train" and (run / "config.yaml").exists():
        from multimodal.evaluation.showing import write_run_report

        words = sys.argv[1:] if argv is None else argv
        path = write_run_report(
            run,
            embedder,
            splits,
            sources,
            found,
            make_bars(found, embedder, options),
            shlex.join(["python", "multimodal/metrics.py", *words]),
        )
        print(f"report: {path.with_suffix('.html')}")


def check_options(options: Options) -> None:
    """Refuse what cannot be met, and say what is not used, before the model is opened."""
    folder = options.zeroshot if options.zeroshot != "coco80" else None
    if folder is not None and (not folder.strip() or not Path(folder).is_dir()):
        raise UserError(f"--zeroshot {folder or '(empty)'}: neither coco80 nor a folder")
    plain = Options()
    names = ("datasets", "data", "split", "protocol", "audio_crops")
    given = [name for name in names if getattr(options, name) != getattr(plain, name)]
    if folder is not None and given:
        flags = ", ".join("--data-root or --paths" if name == "data" else f"--{name}" for name in given)
        print(
            f"warning: --zeroshot {folder} measures that folder alone, whole: {flags.replace('_', '-')} is not used",
            file=sys.stderr,
        )
    if options.zeroshot == "coco80" and options.datasets is not None and "coco" not in options.datasets:
        raise UserError(f"{NEEDS_COCO}; add coco to --datasets {' '.join(options.datasets)}")
    if options.protocol == "karpathy" and options.split == "train":
        raise UserError("--protocol karpathy measures his test split; leave --split train out")


NEEDS_COCO = "--zeroshot coco80 is measured on coco"


def check_records(embedder: "Embedder", options: Options, found: dict[str, "Records"]) -> None:
    """The same for what the data must hold, before anything is embedded."""
    if options.zeroshot == "coco80":
        if "coco" not in found:
            raise UserError(f"{NEEDS_COCO}; add --datasets coco and the --data-root that holds it")
        class_names_of(embedder, options)
    for name, records in found.items() if options.protocol == "1k" else ():
        for own in records.by_kind().values():
            check_folds(name, len(own))


def check_folds(name: str, count: int) -> None:
    """Five folds of a thousand need as many items."""
    if count < FOLDS * FOLD:
        raise UserError(
            f"--protocol 1k needs {FOLDS * FOLD} items, {count} of {name} are present; use --protocol first5, or name "
            "the larger sets with --datasets"
        )


def measure_sets(
    embedder: "Embedder", options: Options, found: dict[str, Any]
) -> tuple[dict[str, "Split"], dict[str, "Record"]]:
    """Retrieval and classification of each data set into `found`; the embedded splits by name, and records by id."""
    from multimodal.data.records import ListRecords
    from multimodal.evaluation.held_out import classification
    from multimodal.evaluation.transfer import transfer

    splits: dict[str, Split] = {}
    sources: dict[str, Record] = {}
    present = records_of(embedder, options)
    check_records(embedder, options, present)
    for name, records in present.items():
        sources |= {record.id: record for record in records}
        seen = seen_in_training(embedder, name, records)
        kinds = records.by_kind()
        for kind, own in kinds.items():
            title = name if len(kinds) == 1 else f"{name}_{kind}"
            if options.protocol in ("first5", "1k"):
                own = ListRecords(replace(record, captions=record.captions[:5]) for record in own)
            labels = embedder.config.model.num_classes if own.all_labelled() else None
            split = embedder.split(
                own, kind, audio_crops=options.audio_crops, num_classes=labels, workers=options.workers
            )
            splits[title] = split
            if split.captions_CE is not None:
                found["retrieval"][title] = {**retrieval_of(split, options.protocol, title), "seen_in_training": seen}
            if split.class_logits is not None and split.labels is not None:
                found["classification"][title] = classification(split)
            if options.zeroshot == "coco80" and name == "coco":
                found["zeroshot"] = zeroshot_coco(embedder, options, split)
    if not splits:
        raise UserError(
            f"none of the data sets has a {found['split']} split here; give --data-root, "
            "--set data.paths='{NAME: FOLDER}', --datasets or --split"
        )
    if across := transfer(splits):
        found["picture_to_sound"] = across
    return splits, sources


def records_of(embedder: "Embedder", options: Options) -> dict[str, "Records"]:
    """Records by data set."""
    from multimodal.data.records import Records
    from multimodal.data.sharded import readable
    from multimodal.data.sources import data_folder, split_of

    config = options.data.over(embedder.config)
    found: dict[str, Records] = {}
    names = options.datasets or config.data.datasets
    if unused := sorted(set(options.data.paths) - set(names)):
        raise UserError(
            f"--paths names {unused[0]}, which is not measured; add it to the data sets ({', '.join(names)}), or leave "
            "it out"
        )
    for name in names:
        if options.datasets is None and name != "synthetic" and not data_folder(config, name).is_dir():
            continue
        split, karpathy = ("test", True) if options.protocol == "karpathy" else (options.split, config.data.karpathy)
        if name == "coco" and split == "test" and not karpathy:
            raise UserError(
                "coco: its test pictures have no captions; measure --split val (val2017), or Karpathy's test split "
                "with --protocol karpathy"
            )
        read = split_of(config, name, split, karpathy=karpathy)
        present = readable(read.records)
        whose = " (Karpathy)" if karpathy and name == "coco" else ""
        print(f"{name} {split}{whose}: {len(present)} of {len(read.records) + read.missing} present")
        if present:
            found[name] = present
    return found


def seen_in_training(embedder: "Embedder", name: str, records: "Records") -> int | None:
    """How many of these the run was trained on, None where its training data are not here; said where it is not 0.

    Most of Karpathy's test pictures, for one, lie in train2017, on which a run by the usual split is trained.
    """
    from multimodal.data.sources import overlap, split_of

    config = embedder.config
    if name not in config.data.datasets:
        return 0
    try:
        trained = split_of(config, name, "train").records
    except UserError:
        print(f"{name}: the training data are not here, so whether these were among them was not checked")
        return None
    if count := overlap(trained, records):
        print(
            f"warning: {name}: {count} of these {len(records)} samples were in the training data of this run: "
            "its figures are not those of data never seen",
            file=sys.stderr,
        )
    return count


def retrieval_of(split: "Split", protocol: str, name: str = "the data set") -> dict[str, Any]:
    """Both directions with chance levels; protocol 1k averages five folds of a thousand items."""
    from multimodal.evaluation.retrieval import chances, retrieval

    count, owners = len(split.items_IE), split.owners
    if protocol == "1k":
        check_folds(name, count)  # some may not have been readable
        parts = []
        for fold in range(FOLDS):
            items = range(fold * FOLD, (fold + 1) * FOLD)
            captions = [place for place, owner in enumerate(split.owners) if owner in items]
            parts.append(
                retrieval(
                    split.items_IE[items.start : items.stop],
                    split.texts_CE[captions],
                    [split.owners[place] - items.start for place in captions],
                )
            )
        found = {
            direction: {name: sum(part[direction][name] for part in parts) / FOLDS for name in parts[0][direction]}
            for direction in parts[0]
        }
        count, owners = FOLD, [owner for owner in split.owners if owner < FOLD]
    else:
        found = retrieval(split.items_IE, split.texts_CE, split.owners)
    for direction, values in chances(count, owners).items():
        found[direction] |= {f"chance_{name}": value for name, value in values.items()}
    return {
        "kind": split.kind,
        "items": len(split.items_IE),
        "captions": len(split.owners),
        "bad": split.bad,
        **found,
    }


NEEDS_INSTANCES = "--zeroshot coco80 needs annotations/instances_val2017.json in the coco folder"


def class_names_of(embedder: "Embedder", options: Options) -> list[str]:
    """COCO's class names; UserError where their file is not there."""
    from multimodal.data.sources import class_names

    names = class_names(options.data.over(embedder.config))
    if names is None:
        raise UserError(NEEDS_INSTANCES)
    return names


def zeroshot_coco(embedder: "Embedder", options: Options, split: "Split") -> dict[str, float]:
    """hit@1 and mAP of the 80 class names on pictures with instance labels."""
    from multimodal.evaluation.zeroshot import class_vectors, multi_label

    names = class_names_of(embedder, options)
    if split.labels is None:
        raise UserError(NEEDS_INSTANCES)
    return multi_label(split.items_IE, class_vectors(embedder, names, "image"), split.labels)


def make_bars(found: dict[str, Any], embedder: "Embedder", options: Options) -> list:
    """Recall next to chance; with targets where the sample data were measured."""
    from shared.report.page import Bar

    places = options.data.over(embedder.config).data
    sample = places.data_root is None and not places.paths
    bars = []
    for name, values in found["retrieval"].items():
        item = ITEMS[values["kind"]]
        for direction, title in (("text_to_item", f"text to {item}"), ("item_to_text", f"{item} to text")):
            own = values[direction]
            for k in ("R@1", "R@5", "R@10"):
                target = SAMPLE_TARGETS.get((name, k)) if sample and direction == "text_to_item" else None
                note = f"{values['items']} {item}s, 95 % interval {own[f'{k}_low']:.3f} to {own[f'{k}_high']:.3f}"
                bars.append(Bar(f"{name}: {title} {k}", own[k], target, baseline=own[f"chance_{k}"], note=note))
    return bars


def print_found(found: dict[str, Any]) -> None:
    """A short table."""
    for name, values in found["retrieval"].items():
        item = ITEMS[values["kind"]]
        broken = f"; {values['bad']} could not be read" if values["bad"] else ""
        print(f"{name}: {values['items']} {item}s, {values['captions']} captions; 95 % intervals over {item}s{broken}")
        for direction, title in (("text_to_item", f"text to {item}"), ("item_to_text", f"{item} to text")):
            own = values[direction]
            recalls = "  ".join(
                f"{k} {own[k]:.3f} ({own[f'{k}_low']:.3f}-{own[f'{k}_high']:.3f}, chance {own[f'chance_{k}']:.3f})"
                for k in ("R@1", "R@5", "R@10")
            )
            print(f"  {title:<16}{recalls}  median rank {own['median_rank']:.0f}  mAP@10 {own['mAP@10']:.3f}")
    for name in ("classification", "zeroshot", "picture_to_sound"):
        if found.get(name):
            print(f"{name}: {json.dumps(found[name])}")


if __name__ == "__main__":
    main()
