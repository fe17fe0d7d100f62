"""How far a reader has to go to follow one optimizer step: the files that it enters, from a sample to the log."""

from pathlib import Path

import pytest

from tests.launching import ROOT, run

SHORT = ["--config", "small", "--num-workers", "0", "--max-steps", "8", "--set", "training.save_in_background=false"]
MOST = {"dit": (15, []), "float": (11, ["--synthetic"]), "bagel": (20, ["--set", "model.autoencoder.steps=2"])}


@pytest.mark.slow
@pytest.mark.parametrize("system", MOST)
def test_one_step_enters_few_files(tmp_path, system):
    most, flags = MOST[system]
    script = ROOT / "tests" / "step_path.py"
    printed = run(1, script, system, *SHORT, "--output-dir", str(tmp_path / "run"), *flags).stdout.splitlines()
    files = [line for line in printed if line.endswith(".py") and Path(ROOT / line).is_file()]
    assert printed[-1].startswith(f"{len(files)} files") and "shared/loop.py" in files
    assert len(files) <= most, files
