"""The launcher of this system and its benchmark."""

import subprocess
import sys

import pytest

from scripts.bench import dit as benchmark
from tests.launching import ENVIRONMENT, ROOT


def test_launcher_prints_the_command_for_eight_gpus():
    done = subprocess.run(
        ["bash", "scripts/train_dit.sh", "--gpus", "8", "--print-command", "--config", "default", "--strategy", "fsdp"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node=8" in done.stdout.replace(" 8", "=8") and "dit/train.py" in done.stdout


@pytest.mark.parametrize("script", ["train.py", "generate.py", "metrics.py", "precompute.py"])
def test_help_imports_no_torch(script):
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path('dit/{script}', run_name='__main__')\n"
        "except SystemExit as left: assert not left.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.slow
def test_benchmark_prints_a_ratio(capsys):
    (row,) = benchmark.main(["--rounds", "1", "--parts", "precision"])
    assert 0.1 < row.ratio < 20 and "DiT-S/2 step" in capsys.readouterr().out
