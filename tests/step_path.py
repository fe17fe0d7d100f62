"""Run by test_step_path.py: a short run of a system; prints the product's files that its second optimizer step enters.

python tests/step_path.py SYSTEM [flags of SYSTEM/train.py]
"""

import importlib
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from shared import loop  # noqa: E402

SYSTEMS = ("bagel", "dit", "float", "multimodal", "opens2v", "shared")


class Tracer:
    """Notes the files of functions that are called: of the main thread in step 2, of the reading thread throughout."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin again, with the loop's own file."""
        self.files: set[str] = {loop.__file__}
        self.functions: set[tuple[str, str]] = set()

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """A trace function that wants to see calls only; 'return' and lines are not asked for."""
        if event == "call":
            self.files.add(frame.f_code.co_filename)
            self.functions.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    def product(self) -> list[str]:
        """Files of the repository that are the product's, by name."""
        inside = [Path(name) for name in self.files if name.startswith(str(ROOT))]
        names = [path.relative_to(ROOT).as_posix() for path in inside]
        return sorted(name for name in names if name.split("/")[0] in SYSTEMS)


def main(system: str, *arguments: str) -> None:
    """Train a few steps and print the files, one a line, and under them the count of functions and lines."""
    tracer, seed_everything = Tracer(), loop.seed_everything

    def begin_step(*keys: int) -> None:
        seed_everything(*keys)
        step = keys[-1] if len(keys) == 4 else -1  # fit's own call: seed, stream, rank, step
        if step == 0:  # a new run begins: what a part that is trained first has entered does not count
            tracer.forget()
        sys.settrace(tracer.note if step == 1 else None)

    loop.seed_everything = begin_step
    threading.settrace(tracer.note)
    importlib.import_module(f"{system}.train").main(list(arguments))
    sys.settrace(None)
    found = tracer.product()
    print("\n".join(found))
    lines = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in found)
    own = {key for key in tracer.functions if key[0] in {str(ROOT / name) for name in found}}
    print(f"{len(found)} files, {len(own)} functions, {lines} lines")


if __name__ == "__main__":
    main(*sys.argv[1:])
