"""A run's report: report.json, report.md and one self-contained report.html with curves, numbers and samples.

`python -m shared.report.page OUT/dit/report.json ... --output OUT/index.html` joins several reports into one page.
"""

import base64
import html
import io
import json
import math
import mimetypes
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shared.errors import UserError, command, write_text

MAX_EMBEDDED = 4_000_000  # bytes of one embedded sample


@dataclass(frozen=True)
class Bar:
    """One measured figure beside its trivial baseline and the target that the preset is meant to reach."""

    name: str
    value: float | None
    target: float | None = None
    direction: Literal["at least", "at most"] = "at least"
    baseline: float | None = None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without a target or a value."""
        if self.value is None or self.target is None:
            return None
        return bool(self.value >= self.target if self.direction == "at least" else self.value <= self.target)


@dataclass(frozen=True)
class Sample:
    """A picture, video, sound or text file to show, with what it is and the row it belongs to."""

    path: Path | str
    caption: str = ""
    group: str = ""


def write_report(
    output_dir: Path | str,
    *,
    title: str,
    command: str,
    summary: dict[str, float | str],
    bars: list[Bar],
    samples: list[Sample],
    curves: list[str] | None = None,
    text: str = "",
) -> Path:
    """Write the three files into output_dir and return report.json.

    summary: name -> figure or sentence. curves: metric names of metrics.jsonl (default: the losses); phases in
    sub-folders of output_dir are found too. Sample paths may be absolute, relative to output_dir, or, where no such
    file is in it, relative to the working folder. text: a paragraph on what is seen.
    """
    output_dir = Path(output_dir)
    report: dict[str, Any] = {
        "title": title,
        "command": command,
        "text": text,
        "summary": summary,
        "bars": [{**asdict(bar), "reached": bar.reached} for bar in bars],
        "samples": [
            {**asdict(sample), "path": os.path.relpath(_located(sample.path, output_dir), output_dir)}
            for sample in samples
        ],
        "curves": _read_curves(output_dir, curves),
        "cost": _read_cost(output_dir),
    }
    path = output_dir / "report.json"
    report = {name: _plain(part) for name, part in report.items()}
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))
    write_text(output_dir / "report.md", _markdown(report))
    write_text(output_dir / "report.html", _page(title, [_section(report, output_dir)]))
    return path


def write_index(
    reports: list[Path], output: Path, *, title: str = "What the five systems learned", notes: list[str] | None = None
) -> None:
    """One page over several report.json files, their bars that have a target in a table on top.

    notes: sentences shown above it, such as a system that failed.
    """
    sections, rows = [], []
    for path in reports:
        try:
            report = json.loads(Path(path).read_text(encoding="utf-8"))
            sections.append(_section(report, Path(path).parent))
            wanted = [bar for bar in report["bars"] if bar["target"] is not None]
            rows += [f"<tr><td>{html.escape(report['title'].split(':')[0])}{_cells(bar)}" for bar in wanted]
        except FileNotFoundError:
            raise UserError(f"{path}: no such report; run the system's metrics first") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a report ({reason}); run the system's metrics again") from None
    remarks = "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes or ())
    heads = "<tr><th>system<th>figure<th>value<th>baseline<th>target<th>reached"
    overview = f"<table>{heads}{''.join(rows)}</table>" if rows else ""
    write_text(Path(output), _page(title, [remarks, overview, *sections]))


# --- parts ------------------------------------------------------------------------------------------------------------


def _located(path: Path | str, output_dir: Path) -> Path:
    """Where a sample lies: in the run's folder, or else from the working folder."""
    inside = output_dir / path
    return inside if inside.exists() or not Path(path).exists() else Path(path)


def _plain(value: Any) -> Any:
    """The same in what JSON knows: numbers of numpy and torch as float, those that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "__float__"):
        return float(value) if math.isfinite(float(value)) else None
    return str(value)


def _read_curves(output_dir: Path, names: list[str] | None) -> dict[str, list[tuple[int, float]]]:
    from shared.log import read_metrics

    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted([*output_dir.glob("metrics.jsonl"), *output_dir.glob("*/metrics.jsonl")]):
        prefix = "" if path.parent == output_dir else f"{path.parent.name}: "
        for row in read_metrics(path):
            for name, value in row.items():
                wanted = name in names if names is not None else name in ("train/loss", "val/loss")
                if wanted and isinstance(value, int | float):
                    curves.setdefault(prefix + name, []).append((row["step"], value))
    return curves


def _read_cost(output_dir: Path) -> list[dict]:
    """Steps, minutes in them and largest memory of every phase, from the lines of its training."""
    from shared.log import read_metrics

    found = []
    for path in sorted([*output_dir.glob("metrics.jsonl"), *output_dir.glob("*/metrics.jsonl")]):
        rows = [row for row in read_metrics(path) if isinstance(row.get("perf/seconds_per_step"), int | float)]
        if not rows:
            continue
        before = [0, *(row["step"] for row in rows)]
        seconds = sum(
            max(0, row["step"] - last) * row["perf/seconds_per_step"] for last, row in zip(before, rows, strict=False)
        )
        phase = "" if path.parent == output_dir else path.parent.name
        memory = max((row.get("perf/memory_gb") or 0.0 for row in rows), default=0.0)
        found.append({"phase": phase, "steps": rows[-1]["step"], "minutes": seconds / 60, "memory_gb": memory})
    return found


def _cost_text(report: dict) -> str:
    """`base: 480 steps in 3.1 minutes, 0.7 GB; ...`, an empty text for a report without a run."""
    return "; ".join(
        f"{part['phase'] + ': ' if part['phase'] else ''}{part['steps']} steps in {part['minutes']:.1f} minutes, "
        f"{part['memory_gb']:.2g} GB"
        for part in report.get("cost", [])
    )


def _figure(points: dict[str, list]) -> str:
    """The curves that share a phase in one small plot, as inline SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 2.9), layout="constrained")
    for name, values in points.items():
        axes.plot(*zip(*values, strict=True), label=name, linewidth=1.4, marker="." if len(values) < 30 else None)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    if all(value > 0 for values in points.values() for _, value in values):
        axes.set_yscale("log")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _markdown(report: dict) -> str:
    lines = [f"# {report['title']}", "", "    " + report["command"], ""]
    if report["text"]:
        lines += [report["text"], ""]
    if report["bars"]:
        lines += ["| figure | value | baseline | target | reached |", "|---|---|---|---|---|"]
        lines += [
            f"| {bar['name']} | {_number(bar['value'])} | {_number(bar['baseline'])} | {_target(bar)} "
            f"| {_verdict(bar)} |"
            for bar in report["bars"]
        ]
        lines.append("")
    if cost := _cost_text(report):
        lines += [f"Training: {cost}.", ""]
    lines += [f"- {name}: {_number(value)}" for name, value in report["summary"].items()]
    lines += ["", *(f"- [{sample['caption'] or sample['path']}]({sample['path']})" for sample in report["samples"])]
    return "\n".join(lines) + "\n"


def _section(report: dict, folder: Path) -> str:
    phases: dict[str, dict[str, list]] = {}
    for name, points in report["curves"].items():
        phases.setdefault(name.rpartition(": ")[0], {})[name] = points
    rows = "".join(f"<tr>{_cells(bar)}" for bar in report["bars"])
    table = f"<table><tr><th>figure<th>value<th>baseline<th>target<th>reached{rows}</table>" if rows else ""
    facts = "".join(
        f"<dt>{html.escape(name)}<dd>{html.escape(_number(value))}" for name, value in report["summary"].items()
    )
    groups: dict[str, list[dict]] = {}
    for sample in report["samples"]:
        groups.setdefault(sample["group"], []).append(sample)
    gallery = "".join(
        f"<h3>{html.escape(group)}</h3><div class=gallery>{''.join(_show(item, folder) for item in items)}</div>"
        for group, items in groups.items()
    )
    cost = _cost_text(report)
    cost = f"<p>Training: {html.escape(cost)}.</p>" if cost else ""
    return (
        f"<section><h2>{html.escape(report['title'])}</h2><pre>{html.escape(report['command'])}</pre>"
        f"<p>{html.escape(report['text'])}</p>{table}{cost}"
        f"<details><summary>all figures</summary><dl>{facts}</dl></details>"
        f"<div class=curves>{''.join(_figure(points) for points in phases.values())}</div>{gallery}</section>"
    )


def _show(sample: dict, folder: Path) -> str:
    path, caption = folder / sample["path"], html.escape(sample["caption"])
    if not path.exists():
        shown = f"<p class=no>{html.escape(sample['path'])} is missing</p>"
        return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    data = path.read_bytes()
    if kind.startswith("text/") or kind == "application/json":
        shown = f"<pre>{html.escape(data.decode('utf-8', 'replace')[:4000])}</pre>"
    elif len(data) > MAX_EMBEDDED:
        shown = f"<p class=no>{html.escape(path.name)}: {len(data) / 1e6:.1f} MB, too large to embed</p>"
    else:
        source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        shown = {
            "image": f"<img alt='' src='{source}'>",
            "video": f"<video controls loop playsinline src='{source}'></video>",
            "audio": f"<audio controls src='{source}'></audio>",
        }.get(kind.split("/")[0], html.escape(path.name))
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def html_page(title: str, sections: list[str]) -> str:
    """A whole page of these sections in the style of the reports, with nothing outside it."""
    return _page(title, sections)


def _page(title: str, sections: list[str]) -> str:
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<main><h1>{html.escape(title)}</h1>{''.join(sections)}</main></html>\n"
    )


_STYLE = """
:root{color-scheme:light dark}body{font:16px/1.55 system-ui,sans-serif;margin:0}
main{max-width:72rem;margin:auto;padding:1rem}
h1{font-size:1.7rem}h2{margin-top:2.5rem;border-top:1px solid #8884;padding-top:1.5rem}
pre{background:#8881;padding:.6rem .8rem;overflow-x:auto;border-radius:.4rem;font-size:.85rem;
white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.3rem .7rem;text-align:left;border-bottom:1px solid #8883}
td small{display:block;opacity:.7}.yes{color:#197a3d}.no{color:#b3541e}
.note{background:#b3541e22;padding:.5rem .8rem;border-radius:.4rem}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.2rem 1rem}
dd{margin:0}.curves{display:flex;flex-wrap:wrap;gap:1rem}
.curves svg{background:#fff;max-width:100%;height:auto;border-radius:.4rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(16rem,100%),1fr));gap:1rem}
figure{margin:0}audio{width:100%}
figure img,figure video{width:100%;image-rendering:auto;border-radius:.4rem;background:#000}
.gallery figure:only-child{grid-column:1/-1;max-width:48rem}
figcaption{font-size:.85rem;opacity:.85;overflow-wrap:anywhere}
figure p{overflow-wrap:anywhere}summary{cursor:pointer;margin:.6rem 0}
@media(max-width:40rem){td,th{padding:.25rem .35rem;font-size:.82rem}}
@media(max-width:30rem){main{padding:1rem .3rem}td,th{padding:.2rem .15rem;font-size:.7rem}}
"""


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _target(bar: dict) -> str:
    return "-" if bar["target"] is None else f"{bar['direction']} {_number(bar['target'])}"


def _verdict(bar: dict) -> str:
    return {True: "yes", False: "no", None: "-"}[bar["reached"]]


def _cells(bar: dict) -> str:
    """A bar's cells of a table row."""
    return (
        f"<td>{html.escape(bar['name'])}{_remark(bar)}<td>{_number(bar['value'])}<td>{_number(bar['baseline'])}"
        f"<td>{_target(bar)}<td class={'yes' if bar['reached'] else 'no'}>{_verdict(bar)}"
    )


def _remark(bar: dict) -> str:
    return f"<small>{html.escape(bar['note'])}</small>" if bar["note"] else ""


@command
def main(argv: list[str] | None = None) -> None:
    """Join reports into one page."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("reports", nargs="*", type=Path, help="report.json files, in the order of the page")
    parser.add_argument("--output", type=Path, default=Path("outputs/index.html"))
    parser.add_argument("--title", default="What the five systems learned")
    parser.add_argument("--note", action="append", default=[], help="a sentence on top of the page; repeatable")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    write_index(options.reports, options.output, title=options.title, notes=options.note)
    print(options.output)


if __name__ == "__main__":
    main()
