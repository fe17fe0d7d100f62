"""Code broken on purpose, one place at a time in a copy, and whether the tests named beside it notice.

python -m tests.survival.breakages [--only NAME ...]
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.launching import ENVIRONMENT, ROOT


class Breakage(NamedTuple):
    """In `file`, `old` (which occurs once) becomes `new`; `tests` should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


LIST = Path(__file__).with_suffix(".yaml")


def breakages() -> list[Breakage]:
    """All that are listed."""
    return [Breakage(**row) for row in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def noticed(breakage: Breakage, copy: Path) -> tuple[bool, str]:
    """Whether the tests fail on the broken copy, and the first that does."""
    path = copy / breakage.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(breakage.old) != 1:
        raise SystemExit(f"error: {breakage.file}: {breakage.old!r} occurs {whole.count(breakage.old)} times")
    path.write_text(whole.replace(breakage.old, breakage.new), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(breakage.tests)]
        done = subprocess.run(command, cwd=copy, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    finally:
        path.write_text(whole, encoding="utf-8")
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, failed[0] if failed else done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names that hold one of these words")
    options = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        left_out = shutil.ignore_patterns(".venv", ".git", "outputs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=left_out)
        for breakage in breakages():
            if options.only and not any(word in breakage.name for word in options.only):
                continue
            caught, by = noticed(breakage, copy)
            missed += not caught
            print(f"{'noticed' if caught else 'MISSED '} | {breakage.name} | {by}", flush=True)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
