"""Runs killed at random moments, resumed by the same command, against the undisturbed run: bit for bit.

  python -m tests.survival.kills [--systems dit bagel] [--kills 10] [--ranks 1 2] [--steps 60] [--seed 0] [--anywhere]
SIGKILL reaches the launcher and all workers, at a moment drawn between a checkpoint and the next ones; with --anywhere
at one drawn over the whole life of the run: imports, codecs and caches, every phase and what lies between them.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from tests.launching import final_tensors, losses, run, run_and_kill, same_bits
from tests.survival.systems import System, chosen


def survive(system: System, folder: Path, world: int, options: argparse.Namespace) -> dict:
    """Kill and resume one system's run; says how many kills hit it and whether the end is the same."""
    draw = random.Random(f"{options.seed} {system.name} {world}")
    outputs = [folder / system.name / f"{name}_{world}" for name in ("straight", "killed")]
    commands = [system.arguments(folder, output, world, options.steps, options.save) for output in outputs]
    commands = [[*command, *(["--strategy", "ddp"] if world > 1 else [])] for command in commands]
    began = time.monotonic()
    run(world, *commands[0], timeout=900)
    life, killed = time.monotonic() - began, 0
    latest = outputs[1] / system.place / "checkpoints" / "latest"
    for _ in range(20 * options.kills):
        if killed == options.kills:
            break
        if options.anywhere:
            killed += run_and_kill(world, *commands[1], after=draw.uniform(0, life)) != 0
        else:
            killed += run_and_kill(world, *commands[1], after=draw.uniform(0, options.window), watch=latest) != 0
        if (outputs[1] / system.place / "DONE").exists():
            break
    run(world, *commands[1], timeout=900)
    phases = [sorted(path.parent for path in output.rglob("checkpoints") if path.is_dir()) for output in outputs]
    places = [[path.relative_to(output) for path in found] for output, found in zip(outputs, phases, strict=True)]
    pairs = list(zip(*phases, strict=False)) if places[0] == places[1] else []
    return {
        "system": system.name,
        "ranks": world,
        "kills": killed,
        "phases": len(pairs),
        "equal": bool(pairs) and all(same_bits(final_tensors(one), final_tensors(other)) for one, other in pairs),
        "losses_equal": bool(pairs) and all(losses(one) == losses(other) for one, other in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", help="names, default: all")
    parser.add_argument("--kills", type=int, default=5, help="for each system and number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--window", type=float, default=1.0, help="a kill falls so many seconds after a checkpoint")
    parser.add_argument("--anywhere", action="store_true", help="kill over the whole life, not between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for system in chosen(options.systems):
            for world in options.ranks:
                began = time.monotonic()
                found.append(survive(system, Path(folder), world, options))
                print(json.dumps(found[-1]), f"{time.monotonic() - began:.0f} s", flush=True)
    print(f"{sum(row['kills'] for row in found)} kills, all ends equal: {all(row['equal'] for row in found)}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))
    raise SystemExit(0 if all(row["equal"] for row in found) else 1)


if __name__ == "__main__":
    main()
