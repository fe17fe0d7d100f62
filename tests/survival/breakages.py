"""Code broken on purpose, one place at a time in a copy, and whether the tests named beside it notice.

python -m tests.survival.breakages [--only NAME ...]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.launching import ENVIRONMENT, ROOT


class Breakage(NamedTuple):
    """In `file`, `old` (which occurs once) becomes `new`; `tests` should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


BREAKAGES = [
    Breakage(
        "the velocity points from data to noise",
        "shared/flow.py",
        "t.expand_as(start)), end - start",
        "t.expand_as(start)), start - end",
        "tests/shared/test_flow.py",
    ),
    Breakage(
        "all samples of a step get the same noise",
        "shared/rng.py",
        "torch.randn(shape, generator=keyed_generator(*key, slot))",
        "torch.randn(shape, generator=keyed_generator(*key))",
        "tests/shared/test_rng.py",
    ),
    Breakage(
        "every epoch has the same order",
        "shared/data.py",
        "keyed_generator(self.seed, _ORDER, epoch)",
        "keyed_generator(self.seed, _ORDER, 0)",
        "tests/shared/test_data.py",
    ),
    Breakage(
        "the average takes its weights the wrong way round",
        "shared/ema.py",
        "weights, 1 - decay)",
        "weights, decay)",
        "tests/shared/test_ema.py",
    ),
    Breakage(
        "a checkpoint's hashes are not compared",
        "shared/checkpoint.py",
        'if _describe(path / name)["sha256"] != expected["sha256"]:',
        "if False:",
        "tests/shared/test_resume.py -k damage",
    ),
    Breakage(
        "warm-up begins at zero",
        "shared/optim.py",
        "return peak * (step + 1) / warmup",
        "return peak * step / warmup",
        "tests/shared/test_optim.py",
    ),
    Breakage(
        "DiT scales by the factor instead of one plus it",
        "dit/layers.py",
        "x_BLD, 1 + scale_BD[:, None])",
        "x_BLD, scale_BD[:, None])",
        "tests/dit/test_golden_model.py",
    ),
    Breakage(
        "FLOAT's band of attention is one frame wider",
        "float/model.py",
        "band_mask(tokens, attention_window)",
        "band_mask(tokens, attention_window + 1)",
        "tests/float/test_golden.py",
    ),
    Breakage(
        "BAGEL's noise is seen by later tokens",
        "bagel/attention.py",
        "return (earlier | (together & block[:, None])) & (together | ~noise[None])",
        "return earlier | (together & block[:, None])",
        "tests/bagel/test_pieces.py tests/bagel/test_model.py",
    ),
    Breakage(
        "OpenS2V's gate is open from the start",
        "opens2v/adapter.py",
        "nn.init.zeros_(self.gate_clip)",
        "nn.init.ones_(self.gate_clip)",
        "tests/opens2v/test_adapter.py tests/opens2v/test_golden.py",
    ),
    Breakage(
        "multimodal counts equal captions as negatives",
        "multimodal/contrastive.py",
        "same = (keys[:, None] == all_keys[None]).any(-1)",
        "same = torch.zeros(len(keys), len(all_keys), dtype=torch.bool, device=keys.device)",
        "tests/multimodal/test_contrastive.py",
    ),
]


def noticed(breakage: Breakage, copy: Path) -> tuple[bool, str]:
    """Whether the tests fail on the broken copy, and the first that does."""
    path = copy / breakage.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(breakage.old) != 1:
        raise SystemExit(f"error: {breakage.file}: {breakage.old!r} occurs {whole.count(breakage.old)} times")
    path.write_text(whole.replace(breakage.old, breakage.new), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *breakage.tests.split()]
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
        for breakage in BREAKAGES:
            if options.only and not any(word in breakage.name for word in options.only):
                continue
            caught, by = noticed(breakage, copy)
            missed += not caught
            print(f"{'noticed' if caught else 'MISSED '} | {breakage.name} | {by}", flush=True)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
