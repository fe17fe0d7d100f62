"""The run's reports: reports/report_TIME.json and .md with plots, and the page that all five systems share."""

import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from multimodal.config import ITEMS, Config
from multimodal.data.records import KINDS
from multimodal.data.sources import Data
from multimodal.model import MultimodalModel
from shared.engine.dist import DistInfo
from shared.errors import write_text
from shared.log import read_metrics
from shared.report.page import Bar, write_report

STAGES = {1: "stage1_single", 2: "stage2_align", 3: "stage3_finetune"}
PARTS = ("image", "text", "audio", "fusion")


def write_reports(
    config: Config,
    data: Data,
    info: DistInfo,
    network: MultimodalModel,
    *,
    reason: str,
    seconds: float,
    epochs: dict[int, int],
) -> Path:
    """Write the JSON and the Markdown report of a run as it stands; returns the JSON's path. network: of meta tensors
    will do.
    """
    output_dir = Path(config.run.output_dir)
    folder = output_dir / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    rows = {stage: read_metrics(output_dir / STAGES[stage] / "metrics.jsonl") for stage in epochs}
    report = {
        "run": {
            "command": command_line(),
            "config": config.model_dump(mode="json"),
            "seed": config.run.seed,
            "git_revision": git_revision(),
            "duration_seconds": round(seconds, 1),
            "exit_reason": reason,
            "ranks": info.world,
        },
        "environment": environment(info),
        "model": model_facts(network),
        "data": [{**row, "bad": count_bad(output_dir, row, rows)} for row in data.counts],
        "notes": data.notes,
        "epochs": [entry for stage, found in rows.items() for entry in epoch_rows(stage, found)],
        "retrieval": retrieval_table(rows),
        "classification": {
            name: value for name, value in last_values(rows).items() if name in ("mAP", "micro_F1", "speaker_accuracy")
        },
        "best": best_values(rows),
        "files": [describe(path, output_dir) for path in sorted((output_dir / "checkpoints").glob("*.pt"))],
        "plots": draw_plots(folder, stamp, rows),
    }
    path = folder / f"report_{stamp}.json"
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False, default=str))
    write_text(path.with_suffix(".md"), markdown(report))
    write_page(output_dir, report)
    return path


def write_page(output_dir: Path, report: dict[str, Any]) -> None:
    """OUT/report.html of what validation measured while training; metrics.py writes it again with samples."""
    bars = []
    for pair, values in report["retrieval"].items():
        kind, way = pair.split("_", 1)
        title = f"{ITEMS[kind]} to text" if way == "item_to_text" else f"text to {ITEMS[kind]}"
        bars.append(Bar(f"validation: {title} R@10", values["R@10"], baseline=values["chance_R@10"]))
    run, model = report["run"], report["model"]
    write_report(
        output_dir,
        title="Multimodal: pictures, texts and sounds in one space",
        command=run["command"],
        summary={
            "model": f"{model['size']}, {model['parameters']:,} parameters",
            "ended": run["exit_reason"],
            **{f"classes {name}": value for name, value in report["classification"].items()},
            **{f"{row['dataset']} {row['split']}": f"{row['items']} items" for row in report["data"]},
        },
        bars=bars,
        samples=[],
        text="Measured on the validation split while training; multimodal/metrics.py adds intervals and samples.",
    )


# --- facts ------------------------------------------------------------------------------------------------------------


def command_line() -> str:
    """The command as typed."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def git_revision() -> str | None:
    """The commit of the code, where it is under git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def environment(info: DistInfo) -> dict[str, Any]:
    """Versions and machine."""
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "device": str(info.device),
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": memory,
    }


def model_facts(network: MultimodalModel) -> dict[str, Any]:
    """The size and the parameters of each part."""
    towers = {f"{part}_tower": sum(p.numel() for p in getattr(network, f"{part}_tower").parameters()) for part in PARTS}
    total = network.num_parameters()
    return {
        "size": network.config["size"],
        "parameters": total,
        **towers,
        "word_table": network.words.weight.numel(),
        "other": total - sum(towers.values()) - network.words.weight.numel(),
    }


def count_bad(output_dir: Path, row: dict[str, Any], rows: dict[int, list[dict]]) -> int:
    """Samples of one data set and split that could not be read: of training as listed in bad_samples.jsonl of all
    stages, each once; of validation as counted by the last one.
    """
    if row["split"] == "val":
        counts = [line[name] for own in rows.values() for line in own if (name := f"val/bad_{row['dataset']}") in line]
        return int(counts[-1]) if counts else 0
    lines = [line for path in output_dir.glob("*/bad_samples.jsonl") for line in path.read_text().splitlines()]
    return len({reason for line in lines if (reason := json.loads(line)["reason"]).startswith(f"{row['dataset']}: ")})


def describe(path: Path, output_dir: Path) -> dict[str, Any]:
    """Place, size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path.relative_to(output_dir)), "bytes": path.stat().st_size, "sha256": digest}


def epoch_rows(stage: int, rows: list[dict]) -> list[dict]:
    """One entry an epoch: the mean of its training values and the last of its validation values."""
    found: dict[int, dict[str, list]] = {}
    epoch = 1
    for row in rows:
        epoch = max(1, -(-int(1000 * row["train/epoch"]) // 1000)) if "train/epoch" in row else epoch
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "train/epoch"):
                found.setdefault(epoch, {}).setdefault(name, []).append(value)
    return [
        {
            "stage": stage,
            "epoch_of_stage": epoch,
            **{
                name: values[-1] if name.startswith("val/") else sum(values) / len(values)
                for name, values in columns.items()
            },
        }
        for epoch, columns in found.items()
    ]


def last_values(rows: dict[int, list[dict]]) -> dict[str, float]:
    """The newest validation values of the last stage that has some, without the `val/`."""
    for stage in sorted(rows, reverse=True):
        found: dict[str, float] = {}
        for row in rows[stage]:
            found |= {name[4:]: value for name, value in row.items() if name.startswith("val/") and value is not None}
        if any("R@1" in name for name in found):
            return found
    return {}


def retrieval_table(rows: dict[int, list[dict]]) -> dict[str, dict[str, float]]:
    """Per pair and direction: R@K, the mean reciprocal rank and the chance level of that direction."""
    values, table = last_values(rows), {}
    for kind in KINDS:
        for direction in ("item_to_text", "text_to_item"):
            start = f"{kind}_{direction}_"
            own = {name[len(start) :]: value for name, value in values.items() if name.startswith(start)}
            if own:
                table[f"{kind}_{direction}"] = own
    return table


def best_values(rows: dict[int, list[dict]]) -> dict[str, dict[str, float]]:
    """The lowest validation loss and the best retrieval of each stage, and their steps."""
    found: dict[str, dict[str, float]] = {}
    for stage, own in rows.items():
        for name, sign in (("val/loss", 1), ("val/retrieval", -1)):
            measured = [(sign * row[name], row["step"]) for row in own if row.get(name) is not None]
            if measured:
                value, step = min(measured)
                key = name.replace("/", "_")
                found.setdefault(f"stage {stage}", {}).update({key: sign * value, f"{key}_step": step})
    return found


# --- output -----------------------------------------------------------------------------------------------------------


def draw_plots(folder: Path, stamp: str, rows: dict[int, list[dict]]) -> list[str]:
    """Curves of the losses, recall, learning rate and memory, as PNG next to the report; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = max(rows, default=0)
    names = sorted({name for row in rows.get(last, []) for name in row if name.endswith(("item_R@10", "text_R@10"))})
    wanted: dict[str, tuple[int, list[str]]] = {}
    for stage in rows:
        wanted[f"loss_stage{stage}"] = (stage, ["train/loss", "val/loss"])
    wanted["recall"] = (last, names)
    wanted["learning_rate"], wanted["memory"] = (last, ["train/lr"]), (last, ["perf/memory_gb"])
    files = []
    for title, (stage, columns) in wanted.items():
        curves = {
            name: [(row["step"], row[name]) for row in rows[stage] if row.get(name) is not None] for name in columns
        }
        curves = {name: points for name, points in curves.items() if points}
        if not curves:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_xlabel("optimizer step")
        axes.set_title(title.replace("_", " "))
        axes.legend(frameon=False, fontsize=8)
        path = folder / f"report_{stamp}_{title}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        files.append(path.name)
    return files


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    run, lines = report["run"], ["# Training report", ""]
    lines += [
        f"    {run['command']}",
        "",
        f"Ended: {run['exit_reason']}. {run['duration_seconds']} s on {run['ranks']} rank(s), "
        f"{report['environment']['device']}, torch {report['environment']['torch']}, commit {run['git_revision']}.",
        "",
    ]
    lines += ["## Model", "", *table([report["model"]]), "## Data", "", *table(report["data"])]
    lines += [f"- {note}" for note in report["notes"]] + [""]
    lines += ["## Retrieval", "", *table([{"pair": name, **values} for name, values in report["retrieval"].items()])]
    lines += ["## Classification", "", *table([report["classification"]] if report["classification"] else [])]
    lines += ["## Best", "", *table([{"stage": name, **values} for name, values in report["best"].items()])]
    columns = (
        "stage",
        "epoch_of_stage",
        "train/loss",
        "val/loss",
        "train/lr",
        "train/grad_norm",
        "perf/samples_per_second",
        "perf/memory_gb",
    )
    lines += ["## Epochs", "", *table([{name: row.get(name) for name in columns} for row in report["epochs"]])]
    lines += ["## Files", "", *table(report["files"])]
    lines += [f"![{name}]({name})" for name in report["plots"]]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of equal columns as a Markdown table."""
    if not rows:
        return ["none", ""]
    names = list(rows[0])
    shown = [
        [f"{row.get(name):.4g}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in names]
        for row in rows
    ]
    return [
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(row) + " |" for row in shown),
        "",
    ]
