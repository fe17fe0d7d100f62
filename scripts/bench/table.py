"""The benchmarks' results as bench.json and bench.md: ratios first, absolute times beside the machine's name."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from shared.errors import write_text

PARTS = {
    "peers": "Against peers: the same work, alternated in one process (ratio: ours / theirs)",
    "precision": "bf16 autocast against fp32 on this processor",
    "use": "Sampling, data, checkpoints",
    "start": "Start-up and memory of `--config small`",
    "loader": "Share of time that a step waits for data, with compute that sleeps",
    "scaling": "Scaling: cost against size, fitted as size ** slope",
    "gpu": "GPU: model FLOPs over the measured matrix peak",
}


def find_systems(root: Path) -> list[str]:
    """The subjects of the files scripts/bench/SUBJECT.py: the five systems, and `workshop` for shared/."""
    own = {"__init__", "bench", "check", "gpu", "kernels", "table"}
    return sorted(path.stem for path in (root / "scripts" / "bench").glob("*.py") if path.stem not in own)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from shared.engine.products import onednn_is_faster

    name = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": 1,  # which every benchmark sets
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "products": "oneDNN" if onednn_is_faster() else "MKL",
        "bf16": bf16,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def write_tables(folder: Path, systems: dict[str, list[dict]], minutes: float | None = None) -> None:
    """bench.json and bench.md; rows are those of scripts/bench/bench.py as dicts with `met`."""
    about = machine()
    tree = {"machine": about, "minutes": minutes, "systems": systems}
    write_text(folder / "bench.json", json.dumps(tree, indent=1) + "\n")
    write_text(folder / "bench.md", markdown(about, systems, minutes))


def markdown(about: dict[str, Any], systems: dict[str, list[dict]], minutes: float | None = None) -> str:
    """The tables, part by part."""
    bf16 = "with" if about["bf16"] else "without"
    lines = [
        "# Benchmarks",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['threads']} thread used, {about['instructions']}, "
        f"{bf16} bf16 arithmetic; fp32 linear layers by {about['products']}, peers' by MKL"
        + (f"; {about['gpu']}" if about["gpu"] else "")
        + f"; torch {about['torch']}; commit {about['commit']}; {about['date']}"
        + ("" if minutes is None else f"; {minutes:.1f} minutes"),
    ]
    for part, title in PARTS.items():
        rows = [(system, row) for system, found in systems.items() for row in found if row["part"] == part]
        if rows:
            lines += ["", f"## {title}", "", *(_scaling(rows) if part == "scaling" else _plain(rows))]
    return "\n".join(lines) + "\n"


def _plain(rows: list[tuple[str, dict]]) -> list[str]:
    """ratio, bar, what was measured, times."""
    lines = ["| ratio | bar | system | measured | ours | peer | note |", "|---|---|---|---|---|---|---|"]
    for system, row in rows:
        bar = "" if row["bar"] is None else f"{row['direction']} {row['bar']:g}: {'met' if row['met'] else 'MISSED'}"
        theirs = "" if row["theirs"] is None else f"{number(row['theirs'])} {row['unit']}, {row['peer']}"
        ratio = "" if row["ratio"] is None else f"**{row['ratio']:.3f}**"
        ours = "" if row["ours"] is None else f"{number(row['ours'])} {row['unit']}"
        lines.append(f"| {ratio} | {bar} | {system} | {row['name']} | {ours} | {theirs} | {row['note']} |")
    return lines


def _scaling(rows: list[tuple[str, dict]]) -> list[str]:
    lines = ["| slope | system | cost against | size: cost | meaning |", "|---|---|---|---|---|"]
    for system, row in rows:
        series = ", ".join(f"{size}: {number(value)}" for size, value in row["series"].items())
        lines.append(f"| **{row['ratio']:.2f}** | {system} | {row['name']} | {series} {row['unit']} | {row['note']} |")
    return lines


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
