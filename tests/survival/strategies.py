"""Table: every system under every strategy on two ranks against one rank, and runs that move in the middle.

  python -m tests.survival.strategies [--systems dit bagel] [--steps 10] [--moves] [--output table.json]
A number is the largest difference of the training loss over the steps from the run on one rank. AdamW divides by the
root of a squared gradient that starts at zero; --adam-epsilon keeps it from magnifying rounding.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.launching import losses, run
from tests.survival.systems import System, chosen

STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
MOVES = [  # strategy and ranks of the first half, then of the second
    (("fsdp", 2), ("none", 1)),
    (("zero3", 2), ("ddp", 3)),
    (("none", 1), ("zero2", 2)),
    (("zero1", 3), ("fsdp", 2)),
]


def train(system: System, folder: Path, name: str, strategy: str, world: int, options: argparse.Namespace, **half):
    """One run, or its first half with max_steps; its losses by step."""
    output = folder / system.name / name
    stop = ["--max-steps", str(half["max_steps"])] if half else []
    more = ["--strategy", strategy, "--adam-epsilon", str(options.adam_epsilon), *stop]
    half_way = options.steps // 2
    run(world, *system.arguments(folder, output, world, options.steps, half_way), *more, timeout=600)
    return losses(output / system.place)


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference; both must have the same steps."""
    assert one.keys() == other.keys(), f"steps {sorted(one)} against {sorted(other)}"
    return max(abs(one[step] - other[step]) for step in one)


def rows_of(system: System, folder: Path, options: argparse.Namespace):
    """Yield (what was run, its difference from one rank)."""
    one = train(system, folder, "one", "none", 1, options)
    for strategy in STRATEGIES:
        yield f"{strategy}@2", difference(one, train(system, folder, strategy, strategy, 2, options))
    for (first, world), (second, then) in MOVES if options.moves else []:
        name = f"{first}@{world} to {second}@{then}"
        train(system, folder, name, first, world, options, max_steps=options.steps // 2)
        yield name, difference(one, train(system, folder, name, second, then, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", help="names, default: all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--moves", action="store_true", help="also runs that change strategy and ranks in the middle")
    parser.add_argument("--adam-epsilon", type=float, default=1e-8)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for system in chosen(options.systems):
            found[system.name] = {}
            for name, value in rows_of(system, Path(folder), options):
                found[system.name][name] = value
                print(f"| {system.name} | {name} | {value:.1e} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
