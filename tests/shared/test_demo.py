"""The demo's jobs without a browser; and, where a browser and runs are there, every tab in it once."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.demo import jobs
from scripts.demo.jobs import JobError, Jobs, sentence_of, share_of, text_of
from tests.launching import ROOT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEMO_PYTHON = ROOT / ".venv-demo" / "bin" / "python"
RUNS = Path(os.environ.get("DEMO_RUNS", ROOT / "outputs"))


@pytest.fixture(autouse=True)
def _this_python(monkeypatch):
    monkeypatch.setattr(jobs, "PYTHON", Path(sys.executable))


def test_a_job_tells_how_far_it_is_and_what_it_printed():
    board = Jobs()
    code = (
        "import sys, time\nfor k in (10, 60):\n sys.stderr.write(f'\\r {k}%|##  |')\n time.sleep(0.8)\nprint('\\nlast')"
    )
    steps = list(board.run("anna", ["-c", code]))
    assert {step.share for step in steps} >= {0.1, 0.6} and steps[-1].seconds > 1
    assert board.printed("anna") == [" 60%|##  |", "last"] and board.printed("nobody") == []


def test_a_failed_job_ends_with_its_own_sentence():
    with pytest.raises(JobError, match="^no such face$"):
        list(Jobs().run("anna", ["-c", "import sys; sys.stderr.write('error: no such face\\n'); sys.exit(2)"]))
    with pytest.raises(JobError, match="ended with code 1: ValueError: x"):
        list(Jobs().run("anna", ["-c", "raise ValueError('x')"]))


def test_a_job_is_stopped_with_its_children_by_its_visitor_only(tmp_path):
    board, mark = Jobs(), tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    running = board.run("anna", ["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"])
    next(running)
    while not mark.exists():
        next(running)
    board.stop("somebody else")
    next(running)
    board.stop("anna")
    with pytest.raises(JobError, match="^stopped$"):
        list(running)
    time.sleep(0.2)
    before = mark.stat().st_mtime_ns
    time.sleep(0.4)
    assert mark.stat().st_mtime_ns == before


def test_a_job_ends_when_its_visitor_leaves(tmp_path):
    running = Jobs().run("anna", ["-c", f"import time; time.sleep(2); open({str(tmp_path / 'made')!r}, 'w')"])
    next(running)
    running.close()
    time.sleep(2.5)
    assert not (tmp_path / "made").exists()


def test_a_job_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(jobs, "LONGEST_JOB", 1)
    with pytest.raises(JobError, match="took longer than"):
        list(Jobs().run("anna", ["-c", "import time; time.sleep(30)"]))


def test_texts_bars_and_sentences():
    assert text_of(" a \n b ", "x") == "a b"
    for text, message in ((None, "x is empty"), ("  ", "x is empty"), ("a" * 501, "501 characters; at most 500")):
        with pytest.raises(JobError, match=message):
            text_of(text, "x")
    assert share_of(" 40%|###  | 4/10") == 0.4 and share_of("40 %") is None and share_of("") is None
    assert "printed nothing" in sentence_of([], 3)


def test_results_lie_in_one_folder_that_goes_with_the_demo():
    board = Jobs()
    first, second = board.new_folder(), board.new_folder()
    assert first != second and first.parent == second.parent == board.folder
    (first / "a").write_text("x")
    folder = board.folder
    board._folder.cleanup()
    assert not folder.exists()


def test_without_gradio_the_script_says_how_to_get_it(tmp_path):
    for name in ("scripts", ".venv"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "scripts" / "demo.sh", tmp_path / "scripts")
    (tmp_path / ".venv" / "bin").mkdir()
    script = ["bash", str(tmp_path / "scripts" / "demo.sh")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and "scripts/setup_environment.sh" in done.stderr
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and "bash scripts/demo.sh --install" in done.stderr and "gradio==" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_tab_is_used_in_a_real_browser(tmp_path):
    """Needs .venv-demo with playwright, chromium, and the runs of run_all.sh in outputs/ or in the folder DEMO_RUNS."""
    if BROWSER is None or not DEMO_PYTHON.exists():
        pytest.skip("no chromium, or no .venv-demo (bash scripts/demo.sh --install)")
    if subprocess.run([DEMO_PYTHON, "-c", "import playwright"], capture_output=True).returncode:
        pytest.skip("playwright is not in .venv-demo: .venv-demo/bin/python -m pip install playwright")
    if not all((RUNS / name / "checkpoints").is_dir() for name in ("float", "opens2v", "bagel", "dit", "multimodal")):
        pytest.skip(f"{RUNS} holds no run of each system: bash run_all.sh, or DEMO_RUNS=FOLDER")
    script = [DEMO_PYTHON, ROOT / "tests" / "demo_browser.py", RUNS, tmp_path]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list(tmp_path.glob("*.png"))) == 5
