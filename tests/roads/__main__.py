"""Every shipped preset walked from end to end, small: plan, train, kill, resume, sample, generate, export, open.

  python -m tests.roads [--only dit "float small"] [--output DIR]
The plan is that of the preset as it is shipped; the rest runs with small widths, depths, pictures and steps and tiny
encoders of the right class, every other switch as it is. A killed run must end with the bits of an undisturbed one.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests import forking
from tests.launching import final_tensors, run, same_bits
from tests.roads import opening
from tests.roads.roads import ROADS, Road


def walk(road: Road, files: Path, output: Path) -> list[tuple[str, str]]:
    """(part of the road, empty or what went wrong) in order; parts behind a failure of the training are left out."""
    found: list[tuple[str, str]] = []

    def part(name: str, action) -> bool:
        try:
            fault = action() or ""
        except (AssertionError, Exception) as error:  # noqa: B014  (one line for whatever fails)
            fault = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        found.append((name, fault if isinstance(fault, str) else ""))
        return not found[-1][1]

    def command(ranks: int, line: list[str]) -> str:
        if ranks == 1:
            return done(forking.run(*line, timeout=600))
        return done(run(ranks, *line, check=False, timeout=600))

    def kill() -> str:
        line, latest = road.train(files, killed), killed / road.place / "checkpoints" / "latest"
        hit = forking.run_and_kill(road.ranks, *line, after=0.0, watch=latest)
        return "" if hit else "it had ended before the kill"

    def train(folder: Path) -> str:
        return command(road.ranks, road.train(files, folder))

    shutil.rmtree(output, ignore_errors=True)
    straight, killed = output / "straight", output / "killed"
    part("plan", lambda: command(1, road.plan()))
    if not part("train", lambda: train(straight)):
        return found
    part("validate", lambda: opening.validated(straight / road.place))
    for pattern in road.made:
        part(pattern.split("/")[0], lambda pattern=pattern: "" if list(straight.glob(pattern)) else f"no {pattern}")
    part("kill", kill)
    if part("resume", lambda: train(killed)):
        part("equal", lambda: equal(straight / road.place, killed / road.place))
    for name, words in road.after.items():
        part(name, lambda words=words: command(*words(straight)))
    for opener in road.opened:
        part("open", lambda opener=opener: opener(straight))
    return found


def done(result) -> str:
    """What a command that failed said last."""
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if "error: " in line] or lines
    return f"exit {result.returncode}: {lines[-1][:300] if lines else ''}"


def equal(straight: Path, killed: Path) -> str:
    """Whether both runs ended with the same bits."""
    return "" if same_bits(final_tensors(straight), final_tensors(killed)) else "other weights than the undisturbed run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], help="whole words that the names begin with, as dit or 'dit xl'"
    )
    parser.add_argument("--output", type=Path, help="keep the runs here")
    options = parser.parse_args()
    roads = [
        road
        for road in ROADS
        if not options.only or any(f"{road.name} ".startswith(f"{word} ") for word in options.only)
    ]
    forking.preload()
    failed, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = options.output or Path(folder)
        files = place / "files"
        files.mkdir(parents=True, exist_ok=True)
        for road in roads:
            start = time.monotonic()
            found = walk(road, files, place / road.name.replace(" ", "_"))
            faults = [f"{name}: {fault}" for name, fault in found if fault]
            failed += bool(faults)
            passed = ", ".join(name for name, fault in found if not fault)
            print(
                f"{'FAILED' if faults else 'passed'} | {road.name} | {passed} | {time.monotonic() - start:.0f} s",
                flush=True,
            )
            print("".join(f"         {fault}\n" for fault in faults), end="", flush=True)
    print(f"{len(roads)} presets, {failed} failed, {time.monotonic() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
