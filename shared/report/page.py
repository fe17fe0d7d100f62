"""A run's report: report.json, report.md and one self-contained report.html with curves, numbers and samples.

`python -m shared.report.page OUT/dit/report.json ... --output OUT/index.html` joins several reports into one page:
first what every system made, then curves, then all figures, folded. Nothing is fetched; every text is escaped.
"""

import base64
import html
import io
import json
import math
import mimetypes
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from shared.errors import UserError, check_output, command, write_text

MAX_EMBEDDED = 4_000_000  # bytes of one embedded sample
SHOWN_FIRST = 3  # samples of a system's strip where the report names none
LOG_LINES = 400  # last lines of a system's console on the page
REFRESH_SECONDS = 15  # while runs are going
SOUND_MARKS = (b"mp4a", b"Opus", b"A_OPUS", b"A_VORBIS")  # in a video file that has a sound track
PICTURES, MOVING = (".png", ".jpg", ".jpeg", ".gif", ".webp"), (".mp4", ".webm")


@dataclass(frozen=True)
class Bar:
    """One measured figure next to its trivial baseline and the target that the preset is meant to reach."""

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
    """A picture, video, sound or text file to show, with what it is and the row it belongs to.

    first: it stands in the strip at the top of the page: what the system made on data that it never saw, with the
    sentence that made it as its caption. A report that names none shows its first videos, or else its first pictures.
    """

    path: Path | str
    caption: str = ""
    group: str = ""
    first: bool = False


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
    headline: str = "",
) -> Path:
    """Write the three files into output_dir and return report.json.

    summary: name -> figure or sentence. curves: metric names of metrics.jsonl (default: the losses); phases in
    sub-folders of output_dir are found too. Sample paths may be absolute, relative to output_dir, or, where no such
    file is in it, relative to the working folder. text: a paragraph on what is seen. headline: the one figure that
    matters with its baseline, in words, such as "names the right object in 84 of 100, guessing 6"; without one, the
    first bar that has a baseline is said.
    """
    output_dir = Path(output_dir)
    report: dict[str, Any] = {
        "title": title,
        "command": command,
        "text": text,
        "headline": headline,
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
    plain = {name: _plain(part) for name, part in report.items()}
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False))
    write_text(output_dir / "report.md", _markdown(plain))
    write_text(output_dir / "report.html", _page(title, [_Shown(plain, output_dir)]))
    return path


def write_index(
    reports: list[Path],
    output: Path,
    *,
    title: str = "What the five systems made",
    notes: list[str] | None = None,
    states: dict[str, str] | None = None,
    logs: Path | None = None,
    running: bool = False,
) -> None:
    """One page over several report.json files.

    notes: sentences on top, such as a system that failed. states: what each system does now, by name. logs: a folder
    with NAME.log, the console of each system. running: the page reloads itself. UserError: a file that is no report.
    """
    shown = []
    for path in reports:
        try:
            shown.append(_Shown(json.loads(Path(path).read_text(encoding="utf-8")), Path(path).parent))
        except FileNotFoundError:
            raise UserError(f"{path}: no such report; run the system's metrics first") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a report ({reason}); run the system's metrics again") from None
    texts = _consoles(logs)
    page = _page(title, shown, notes=notes or [], states=states or {}, consoles=texts, running=running)
    write_text(Path(output), page)


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
    """The curves that share a phase in one small plot, as inline SVG in the colour of the page's text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink = "#123456"  # stands for the text's colour, which differs by day and by night
    look: dict[Any, Any] = {
        name: ink for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    with matplotlib.rc_context({**look, "svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure, axes = pyplot.subplots(figsize=(5.2, 2.9), layout="constrained")
        for name, values in points.items():
            axes.plot(
                *zip(*values, strict=True),
                label=name.replace("$", r"\$"),
                linewidth=1.6,
                marker="." if len(values) < 30 else None,
            )
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
        if all(value > 0 for values in points.values() for _, value in values):
            axes.set_yscale("log")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    pyplot.close(figure)
    text = buffer.getvalue()
    label = html.escape(f"curves of {', '.join(points)} over optimizer steps", quote=True)
    drawn = text[text.index("<svg") :].replace(ink, "currentColor")
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _words(text: str) -> str:
    """A text as Markdown that shows it and does nothing else, on one line."""
    line = re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w)|^#|^[-+](?= ))", r"\\\1", " ".join(str(text).split()))
    return html.escape(line, quote=False)  # not every reader of Markdown takes a backslash before a tag


def _markdown(report: dict) -> str:
    lines = [f"# {_words(report['title'])}", "", "    " + " ".join(report["command"].split()), ""]
    if headline := _headline(report):
        lines += [_words(headline), ""]
    if report["text"]:
        lines += [_words(report["text"]), ""]
    if report["bars"]:
        lines += ["| figure | value | baseline | target | reached |", "|---|---|---|---|---|"]
        lines += [
            f"| {_words(bar['name'])} | {_words(_number(bar['value']))} | {_words(_number(bar['baseline']))} "
            f"| {_words(_target(bar))} | {_verdict(bar)} |"
            for bar in report["bars"]
        ]
        lines.append("")
    if cost := _cost_text(report):
        lines += [f"Training: {_words(cost)}.", ""]
    lines += [f"- {_words(name)}: {_words(_number(value))}" for name, value in report["summary"].items()]
    links = (f"- [{_words(row['caption'] or row['path'])}]({quote(row['path'])})" for row in report["samples"])
    return "\n".join([*lines, "", *links]) + "\n"


def _headline(report: dict) -> str:
    """The report's own sentence, or the first bar that has a value and a baseline."""
    if report.get("headline"):
        return report["headline"]
    for bar in report["bars"]:
        if bar["value"] is not None and bar["baseline"] is not None:
            return f"{bar['name']}: {_number(bar['value'])}, baseline {_number(bar['baseline'])}"
    return ""


def _first(samples: list[dict]) -> list[dict]:
    """What stands in the strip: the samples that the report names, its first videos, or its first pictures."""
    if named := [sample for sample in samples if sample.get("first")]:
        return named
    for endings in (MOVING, PICTURES):
        if found := [sample for sample in samples if str(sample["path"]).lower().endswith(endings)]:
            return found[:SHOWN_FIRST] if endings is MOVING else found[:1]
    return samples[:1]


class _Shown:
    """One report as parts of the page. KeyError or TypeError: it is none."""

    def __init__(self, report: dict, folder: Path) -> None:
        self.title = str(report["title"])
        first = _first(report["samples"])
        self.strip = self._strip(report, [_show(sample, folder, playing=True) for sample in first])
        self.curves = self._curves(report)
        self.rest = self._rest(report, [row for row in report["samples"] if row not in first], folder)
        self.figures = self._figures(report)

    def _strip(self, report: dict, figures: list[str]) -> str:
        return (
            f"<section class=strip aria-label='{html.escape(self.title)}'><div><h2>{html.escape(self.title)}</h2>"
            f"<p class=headline>{html.escape(_headline(report))}</p><p>{html.escape(report['text'])}</p></div>"
            f"<div class=made>{''.join(figures)}</div></section>"
        )

    def _curves(self, report: dict) -> str:
        phases: dict[str, dict[str, list]] = {}
        for name, points in report["curves"].items():
            phases.setdefault(name.rpartition(": ")[0], {})[name] = points
        cost = _cost_text(report)
        cost = f"<p>Training: {html.escape(cost)}.</p>" if cost else ""
        drawn = "".join(_figure(points) for points in phases.values())
        return f"<h3>{html.escape(self.title)}</h3>{cost}<div class=curves>{drawn}</div>" if drawn or cost else ""

    def _rest(self, report: dict, samples: list[dict], folder: Path) -> str:
        groups: dict[str, list[dict]] = {}
        for sample in samples:
            groups.setdefault(sample["group"], []).append(sample)
        gallery = "".join(
            f"<h4>{html.escape(group)}</h4><div class=gallery>{''.join(_show(item, folder) for item in items)}</div>"
            for group, items in groups.items()
        )
        summary = f"<summary>{html.escape(self.title)}: more of what it made ({len(samples)})</summary>"
        return f"<details>{summary}{gallery}</details>" if gallery else ""

    def _figures(self, report: dict) -> str:
        rows = "".join(f"<tr>{_cells(bar)}" for bar in report["bars"])
        heads = (
            "<tr><th scope=col>figure<th scope=col>value<th scope=col>baseline<th scope=col>target<th scope=col>reached"
        )
        table = f"<table>{heads}{rows}</table>" if rows else ""
        facts = "".join(
            f"<dt>{html.escape(name)}<dd>{html.escape(_number(value))}" for name, value in report["summary"].items()
        )
        summary = f"<summary>{html.escape(self.title)}: all figures, and the command</summary>"
        return f"<details>{summary}<pre>{html.escape(report['command'])}</pre>{table}<dl>{facts}</dl></details>"


def _show(sample: dict, folder: Path, *, playing: bool = False) -> str:
    """One sample as a figure. playing: a video plays by itself, silent, with its sound one click away."""
    path, caption = folder / sample["path"], html.escape(sample["caption"])
    named = html.escape(sample["caption"] or path.name, quote=True)
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
        name = f"<span class=hidden> {named}</span>"
        buttons = f"<button type=button class=pause aria-pressed=false>pause{name}</button>"
        if any(mark in data for mark in SOUND_MARKS):
            buttons += f"<button type=button class=sound aria-pressed=false>sound{name}</button>"
        video = f"<video loop playsinline aria-label='{named}' src='{source}'"
        shown = {
            "image": f"<img alt='{named}' src='{source}'>",
            "video": f"{video} autoplay muted></video><div class=play>{buttons}</div>"
            if playing
            else f"{video} controls preload=none></video>",
            "audio": f"<audio controls aria-label='{named}' src='{source}'></audio>",
        }.get(kind.split("/")[0], html.escape(path.name))
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _consoles(logs: Path | None) -> dict[str, str]:
    """The last lines of every system's console, bars that were drawn over left out."""
    found = {}
    for path in sorted(logs.glob("*.log")) if logs and logs.is_dir() else ():
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
        found[path.stem] = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines[-LOG_LINES:])
    return found


def _progress(console: str) -> str:
    """The last line of training on a console, such as `step 40 of 2400, 0:27:43 left`; an empty text without one."""
    found = re.findall(r"^Step (\d+), Loss: \S+ \| of (\d+) .*?([\d:]+ left)?$", console, re.MULTILINE)
    return f"step {found[-1][0]} of {found[-1][1]}{', ' + found[-1][2] if found[-1][2] else ''}" if found else ""


def _page(
    title: str,
    shown: list[_Shown],
    *,
    notes: list[str] | tuple = (),
    states: dict[str, str] | None = None,
    consoles: dict[str, str] | None = None,
    running: bool = False,
) -> str:
    rows = []
    for name, state in (states or {}).items():
        progress = _progress((consoles or {}).get(name, "")) if state.startswith(("train", "resume")) else ""
        rows.append(f"<tr><th scope=row>{html.escape(name)}<td>{html.escape(state)}<td>{html.escape(progress)}")
    status = f"<table class=state aria-live=polite><caption>now</caption>{''.join(rows)}</table>" if rows else ""
    remarks = "".join(f"<p class=note role=note>{html.escape(note)}</p>" for note in notes)
    curves = "".join(part.curves for part in shown)
    folded = "".join(part.rest + part.figures for part in shown)
    folded += "".join(
        f"<details><summary>{html.escape(name)}: console</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in (consoles or {}).items()
    )
    body = (
        f"{remarks}{status}{''.join(part.strip for part in shown)}"
        + (f"<section><h2>Curves</h2>{curves}</section>" if curves else "")
        + (f"<section><h2>More, and all figures</h2>{folded}</section>" if folded else "")
    )
    body += f"<script>{_SCRIPT}</script>"
    return html_page(title, body, head=f"<meta http-equiv=refresh content={REFRESH_SECONDS}>" if running else "")


def html_page(title: str, body: str, *, head: str = "") -> str:
    """A whole page in the style of the reports, with nothing outside it; `body` and `head` are HTML."""
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>{head}"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{body}</main></body></html>\n"
    )


_STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf8;--ink:#1c1b19;--quiet:#6a665f;--line:#8883;--card:#fff;
--yes:#197a3d;--no:#a8480f}
@media(prefers-color-scheme:dark){:root{--ground:#15171a;--ink:#e9e6e1;--quiet:#a39f97;--card:#1e2125;
--yes:#6fce8d;--no:#f0a070}}
*{box-sizing:border-box}body{font:17px/1.5 system-ui,sans-serif;margin:0;background:var(--ground);color:var(--ink)}
main{max-width:78rem;margin:auto;padding:1.2rem}
h1{font-size:1.9rem;margin:.4rem 0 1rem}h2{margin:0 0 .4rem;font-size:1.35rem}h3{margin:1.6rem 0 .4rem}
section{margin:0 0 1.4rem}section+section:not(.strip){margin-top:2.6rem}
.strip{display:grid;grid-template-columns:minmax(15rem,1fr) minmax(0,2.6fr);gap:1.4rem;background:var(--card);
border:1px solid var(--line);border-radius:.8rem;padding:1.2rem}
.strip p{margin:.3rem 0;color:var(--quiet)}.strip .headline{font-size:1.15rem;color:var(--ink);text-wrap:balance}
.made{display:flex;flex-wrap:wrap;gap:1rem;align-items:start}
.made figure{flex:1 1 15rem;max-width:100%;position:relative}
.made img,.made video{max-height:26rem;object-fit:contain;object-position:left;background:none}
figure{margin:0}audio{width:100%}img,video{width:100%;display:block;border-radius:.5rem}
figcaption{font-size:.88rem;color:var(--quiet);overflow-wrap:anywhere;margin-top:.3rem}
.play{display:flex;gap:.4rem;margin-top:.4rem}.play button{font:inherit;font-size:.85rem;padding:.15rem .8rem;
border-radius:2rem;border:1px solid var(--line);background:none;color:inherit;cursor:pointer}
.play [aria-pressed=true]{background:#197a3d;color:#fff}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
pre{background:#8881;padding:.6rem .8rem;border-radius:.4rem;font-size:.82rem;max-height:30rem;overflow:auto;
white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;display:block;overflow-x:auto}caption{text-align:left;color:var(--quiet)}
td,th{padding:.3rem .7rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td small{display:block;color:var(--quiet)}.yes{color:var(--yes)}.no{color:var(--no)}
.note{background:#b3541e22;padding:.5rem .8rem;border-radius:.4rem}.state{margin-bottom:1.2rem}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.2rem 1rem}dt,dd{overflow-wrap:anywhere}
dd{margin:0}.curves{display:flex;flex-wrap:wrap;gap:1rem}.curves svg{max-width:100%;height:auto}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(16rem,100%),1fr));gap:1rem}
figure p{overflow-wrap:anywhere}summary{cursor:pointer;padding:.5rem 0}details{border-bottom:1px solid var(--line)}
:focus-visible{outline:3px solid #3b82f6;outline-offset:2px}
@media(max-width:48rem){main{padding:.6rem}.strip{grid-template-columns:minmax(0,1fr);padding:.8rem;gap:.8rem}
td,th{padding:.25rem .3rem;font-size:.8rem}dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}
.made figure{flex-basis:100%}}
"""

# Videos play only while they are seen, and not at all where the reader asked for less motion. Sound is one click away.
_SCRIPT = """
const still=matchMedia('(prefers-reduced-motion: reduce)').matches;
const each=(what,run)=>document.querySelectorAll(what).forEach(run);
const of=button=>button.closest('figure').querySelector('video');
const halt=(button,on)=>{button.setAttribute('aria-pressed',on);of(button).dataset.halted=on?'yes':'';
if(on)of(button).pause();else of(button).play().catch(()=>{});};
const seen=new IntersectionObserver(list=>list.forEach(({target,isIntersecting})=>{
if(isIntersecting&&!target.dataset.halted)target.play().catch(()=>{});else target.pause();}));
each('.pause',button=>{if(still)halt(button,true);button.onclick=()=>halt(button,button.getAttribute('aria-pressed')!='true');});
each('video[autoplay]',video=>{if(still)video.removeAttribute('autoplay');seen.observe(video);});
each('.sound',button=>button.onclick=()=>{const video=of(button),on=video.muted;
each('video',other=>{other.muted=true;});each('.sound',other=>other.setAttribute('aria-pressed',false));
video.muted=!on;button.setAttribute('aria-pressed',on);
if(on){video.currentTime=0;halt(button.closest('figure').querySelector('.pause'),false);}});
"""


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _target(bar: dict) -> str:
    return "-" if bar["target"] is None else f"{bar['direction']} {_number(bar['target'])}"


def _verdict(bar: dict) -> str:
    return {True: "yes", False: "no"}.get(bar["reached"], "-")


def _cells(bar: dict) -> str:
    """A bar's cells of a table row."""
    return (
        f"<td>{html.escape(bar['name'])}{_remark(bar)}<td>{html.escape(_number(bar['value']))}"
        f"<td>{html.escape(_number(bar['baseline']))}<td>{html.escape(_target(bar))}"
        f"<td class={'yes' if bar['reached'] else 'no'}>{_verdict(bar)}"
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
    parser.add_argument("--title", default="What the five systems made")
    parser.add_argument("--note", action="append", default=[], help="a sentence on top of the page; repeatable")
    parser.add_argument("--state", action="append", default=[], metavar="NAME=TEXT", help="what a system does now")
    parser.add_argument("--logs", type=Path, help="folder of NAME.log, the consoles of the systems")
    parser.add_argument("--running", action="store_true", help="the page reloads itself")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    check_output(options.output)
    for state in options.state:
        if "=" not in state:
            raise UserError(f"--state {state}: give NAME=TEXT, such as dit=train")
    write_index(
        options.reports,
        options.output,
        title=options.title,
        notes=options.note,
        states=dict(state.split("=", 1) for state in options.state),
        logs=options.logs,
        running=options.running,
    )
    print(options.output)


if __name__ == "__main__":
    main()
