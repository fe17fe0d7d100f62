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
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from multimodal.config import DatasetName  # noqa: E402
from shared.config import Section, load_config, setting  # noqa: E402
from shared.errors import UserError, command, write_text  # noqa: E402

# What the small preset is meant to reach on the sample data, text to item (40 pictures, 16 sounds held out).
SAMPLE_TARGETS = {("coco", "R@10"): 0.45, ("clotho", "R@5"): 0.50}
FOLDS, FOLD = 5, 1000
ITEMS = {"image": "picture", "audio": "sound", "voice": "voice"}


class Options(Section):
    """Flags of this command."""

    checkpoint: str = setting("outputs/multimodal", "a run's folder, a checkpoint folder or a .pt file")
    output: str = setting("metrics.json", "JSON file to write")
    datasets: list[DatasetName] | None = setting(
        None, "data sets to measure; null: those of the run that are there", "dataset"
    )
    data_root: str | None = setting(None, "their folder; null: the run's")
    split: Literal["train", "val", "test"] = setting("val", "part of the data")
    protocol: Literal["full", "first5", "1k", "karpathy"] = setting(
        "full",
        "captions of an item: all, the first five, the mean over five folds of 1000 items, or Karpathy's test split",
    )
    zeroshot: str | None = setting(
        None, "coco80, or a folder with one folder a class, or a folder in the ESC-50 layout"
    )
    audio_crops: int = setting(1, "cuts of a long sound whose embeddings are averaged", ge=1, le=9)
    batch_size: int = setting(64, "items at a time", ge=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    tokenizer: str | None = setting(None, "tokenizer file; null: the run's")
    report: bool = setting(True, "write report.json, .md and .html beside the run")


@command
def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    options = load_config(Options, argv=argv, description=__doc__)
    from multimodal.weights.open import Embedder

    embedder = Embedder.load(
        options.checkpoint, device=options.device, tokenizer=options.tokenizer, batch_size=options.batch_size
    )
    found: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "stage": embedder.payload["stage"],
        "epoch": embedder.payload["epoch"],
        "split": options.split,
        "protocol": options.protocol,
        "retrieval": {},
        "classification": {},
    }
    splits, sources = {}, {}
    if options.zeroshot is not None and options.zeroshot != "coco80":
        from multimodal.evaluation.zeroshot import classify_folder

        if not Path(options.zeroshot).is_dir():
            raise UserError(f"--zeroshot {options.zeroshot}: neither coco80 nor a folder")
        found["zeroshot"] = classify_folder(embedder, Path(options.zeroshot))
    else:
        splits, sources = measure_sets(embedder, options, found)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)

    write_text(output, json.dumps(found, indent=1))
    print_found(found)
    run = Path(options.checkpoint)
    run = run.parent.parent if run.is_file() else run  # OUT/checkpoints/final_model.pt belongs to OUT
    if options.report and splits and (run / "config.yaml").exists():
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


def measure_sets(embedder: Any, options: Options, found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Retrieval and classification of each data set into `found`; the embedded splits by name, and records by id."""
    from multimodal.data.records import ListRecords

    splits, sources = {}, {}
    for name, records in records_of(embedder, options).items():
        sources |= {record.id: record for record in records}
        kinds = records.by_kind()
        for kind, own in kinds.items():
            title = name if len(kinds) == 1 else f"{name}_{kind}"
            if options.protocol in ("first5", "1k"):
                own = ListRecords(replace(record, captions=record.captions[:5]) for record in own)
            labels = embedder.config.model.num_classes if own.all_labelled() else None
            split = embedder.split(own, kind, audio_crops=options.audio_crops, num_classes=labels)
            splits[title] = split
            if split.captions_CE is not None:
                found["retrieval"][title] = retrieval_of(split, options.protocol)
            if split.class_logits is not None and split.labels is not None:
                from multimodal.evaluation.held_out import classification

                found["classification"][title] = classification(split)
            if options.zeroshot == "coco80" and name == "coco":
                found["zeroshot"] = zeroshot_coco(embedder, options, split)
    if options.zeroshot == "coco80" and "coco" not in splits:
        raise UserError("--zeroshot coco80 is measured on coco; add --datasets coco and the --data-root that holds it")
    if not splits:
        raise UserError(
            f"none of the data sets has a {options.split} split here; give --data-root, --datasets or --split"
        )
    return splits, sources


def records_of(embedder: Any, options: Options) -> dict[str, Any]:
    """Records by data set."""
    from multimodal.data.sharded import readable
    from multimodal.data.sources import data_folder, read_records
    from multimodal.data.synthetic import synthetic_records

    config = embedder.config
    if options.data_root is not None:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"data_root": options.data_root, "paths": {}})}
        )
    records = {}
    for name in options.datasets or config.data.datasets:
        if name == "synthetic":
            records[name] = synthetic_records(options.split, config.data.synthetic_items, config.run.seed).records
            continue
        folder = data_folder(config, name)
        if options.datasets is None and not folder.is_dir():
            continue
        split, karpathy = ("test", True) if options.protocol == "karpathy" else (options.split, config.data.karpathy)
        read = read_records(name, folder, split, karpathy=karpathy and name == "coco")
        present = readable(read.records)
        print(f"{name} {split}: {len(present)} of {len(read.records) + read.missing} present")
        if present:
            records[name] = present
    return records


def retrieval_of(split: Any, protocol: str) -> dict[str, Any]:
    """Both directions with chance levels; protocol 1k averages five folds of a thousand items."""
    from multimodal.evaluation.retrieval import chance_recall, retrieval

    count = len(split.items_IE)
    if protocol == "1k":
        if count < FOLDS * FOLD:
            raise UserError(f"--protocol 1k needs {FOLDS * FOLD} items, {count} are present; use --protocol first5")
        parts = []
        for fold in range(FOLDS):
            items = range(fold * FOLD, (fold + 1) * FOLD)
            captions = [place for place, owner in enumerate(split.owners) if owner in items]
            parts.append(
                retrieval(
                    split.items_IE[items.start : items.stop],
                    split.captions_CE[captions],
                    [split.owners[place] - items.start for place in captions],
                )
            )
        found = {
            direction: {name: sum(part[direction][name] for part in parts) / FOLDS for name in parts[0][direction]}
            for direction in parts[0]
        }
        count = FOLD
    else:
        found = retrieval(split.items_IE, split.captions_CE, split.owners)
    captions = [split.owners.count(place) for place in range(min(len(split.items_IE), 50))]
    for k in (1, 5, 10):
        found["text_to_item"][f"chance_R@{k}"] = chance_recall(count, k)
        found["item_to_text"][f"chance_R@{k}"] = chance_recall(
            len(split.owners), k, round(sum(captions) / max(1, len(captions)))
        )
    return {
        "kind": split.kind,
        "items": len(split.items_IE),
        "captions": len(split.owners),
        "bad": split.bad,
        **found,
    }


def zeroshot_coco(embedder: Any, options: Options, split: Any) -> dict[str, float]:
    """hit@1 and mAP of the 80 class names on pictures with instance labels."""
    from multimodal.data.sources import class_names
    from multimodal.evaluation.zeroshot import class_vectors, multi_label

    config = embedder.config
    if options.data_root is not None:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"data_root": options.data_root, "paths": {}})}
        )
    names = class_names(config)
    if names is None or split.labels is None:
        raise UserError("--zeroshot coco80 needs annotations/instances_val2017.json in the coco folder")
    return multi_label(split.items_IE, class_vectors(embedder, names, "image"), split.labels)


def make_bars(found: dict[str, Any], embedder: Any, options: Options) -> list:
    """Recall beside chance; with targets where the sample data were measured."""
    from shared.report.page import Bar

    sample = options.data_root is None and embedder.config.data.data_root is None and not embedder.config.data.paths
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
    for name in ("classification", "zeroshot"):
        if found.get(name):
            print(f"{name}: {json.dumps(found[name])}")


if __name__ == "__main__":
    main()
