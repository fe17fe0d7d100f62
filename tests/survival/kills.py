"""Runs killed at random moments, resumed by the same command, against the undisturbed run: bit for bit.

  python -m tests.survival.kills [--systems dit bagel] [--kills 10] [--ranks 1 2] [--steps 60] [--seed 0] [--anywhere]
SIGKILL reaches all ranks, at a moment drawn between a checkpoint and the next ones; with --anywhere
at one drawn over the whole life of the run: codecs and caches, every phase and what lies between them. Ranks are forks
of this process, which has imported torch.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

from tests import forking
from tests.launching import final_tensors, losses, same_bits
from tests.survival.systems import System, chosen


def survive(system: System, folder: Path, world: int, kills: int, options: argparse.Namespace) -> dict:
    """Kill and resume one system's run until so many kills have hit it, in a new folder whenever it has come to its
    end; says whether every end is that of the undisturbed run.
    """
    draw = random.Random(f"{options.seed} {system.name} {world}")
    straight, killed = (folder / system.name / f"{name}_{world}" for name in ("straight", "killed"))
    parallel = ["--strategy", "ddp"] if world > 1 else []
    undisturbed, command = (
        [*system.arguments(folder, output, world, options.steps, options.save), *parallel]
        for output in (straight, killed)
    )

    def whole(line: list[str]) -> None:
        done = forking.run(*line, world=world, timeout=900)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-6000:]}"

    began = time.monotonic()
    whole(undisturbed)
    life = time.monotonic() - began
    found = {"system": system.name, "ranks": world, "kills": 0, "phases": 0, "equal": True, "losses_equal": True}
    while found["kills"] < kills:
        if options.anywhere:
            hit = forking.run_and_kill(world, *command, after=draw.uniform(0, life))
        else:
            latest = killed / system.place / "checkpoints" / "latest"
            hit = forking.run_and_kill(world, *command, after=draw.uniform(0, options.window), watch=latest)
        assert hit <= 0, f"the run ended by itself with {hit}"
        found["kills"] += hit < 0
        if found["kills"] == kills:
            whole(command)
        if (killed / system.place / "DONE").exists():
            compare(straight, killed, found)
            shutil.rmtree(killed)
    return found


def compare(straight: Path, killed: Path, found: dict) -> None:
    """Hold every phase of two runs together; `found` tells what differs."""
    places, others = (
        sorted({path.parents[2].relative_to(output) for path in output.rglob("checkpoints/*/manifest.json")})
        for output in (straight, killed)
    )
    found["phases"] = len(places)
    pairs = [(straight / place, killed / place) for place in places]
    found["equal"] &= places == others and all(same_bits(final_tensors(a), final_tensors(b)) for a, b in pairs)
    found["losses_equal"] &= places == others and all(losses(a) == losses(b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", help="names, default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, nargs="+", default=[5], help="for each system; or one for each of --ranks")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--window", type=float, default=1.0, help="a kill falls so many seconds after a checkpoint")
    parser.add_argument("--anywhere", action="store_true", help="kill over the whole life, not between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    forking.preload()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for system in chosen(options.systems):
            for place, world in enumerate(options.ranks):
                began = time.monotonic()
                kills = options.kills[min(place, len(options.kills) - 1)]
                found.append(survive(system, Path(folder), world, kills, options))
                print(json.dumps(found[-1]), f"{time.monotonic() - began:.0f} s", flush=True)
    print(f"{sum(row['kills'] for row in found)} kills, all ends equal: {all(row['equal'] for row in found)}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))
    raise SystemExit(0 if all(row["equal"] for row in found) else 1)


if __name__ == "__main__":
    main()
