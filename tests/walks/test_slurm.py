"""A run brought onto Slurm: scripts/slurm.sh on four nodes, stopped when its time is over, queued again, resumed.

Slurm itself is played by four small scripts: srun starts a process for each node on this machine.
"""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching import ENVIRONMENT, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PLAYED = {
    "srun": """shift  # --kill-on-bad-exit=1
    for node in $(seq 0 $((SLURM_NNODES - 1))); do
        SLURM_NODEID=$node "$@" & pids+=($!)
    done
    echo "${pids[@]}" > "$PLAY/steps"
    for pid in "${pids[@]}"; do wait "$pid"; done""",
    "scontrol": """case "$1" in show) echo 127.0.0.1 ;; requeue) echo "$2" >> "$PLAY/requeued" ;; esac""",
    "scancel": """read -ra pids < "$PLAY/steps"; kill -TERM "${pids[@]}" """,
}


def submit(play: Path, *arguments: str) -> subprocess.Popen:
    """What sbatch does: the script in a process group of its own, in Slurm's environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[0-3]", "MASTER_PORT": port}
    places = {"SLURM_SUBMIT_DIR": str(ROOT), "PLAY": str(play), "PATH": f"{play}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), *arguments],
        env={**ENVIRONMENT, **slurm, **places},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_run_is_stopped_by_the_queue_and_goes_on_in_the_next_job(tmp_path):
    for name, body in PLAYED.items():
        script = tmp_path / name
        script.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
        script.chmod(0o755)
    run = tmp_path / "run"
    arguments = ["dit", "--config", "small_cub", "--output-dir", str(run), "--total-steps", "300", "--batch-size", "2"]
    arguments += ["--eval-steps", "none", "--sample-steps", "none", "--save-steps", "none", "--logging-steps", "1"]
    arguments += ["--set", "model.num_layers=1", "--set", "model.hidden_size=32", "--set", "model.num_heads=2"]
    first = submit(tmp_path, *arguments)
    try:
        until = time.monotonic() + 200
        while "Step 2," not in ((run / "train.log").read_text() if (run / "train.log").is_file() else ""):
            assert time.monotonic() < until and first.poll() is None, first.communicate(timeout=30)[0][-3000:]
            time.sleep(0.2)
        os.kill(first.pid, signal.SIGUSR1)
        said = first.communicate(timeout=120)[0]
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 0 and (tmp_path / "requeued").read_text() == "77\n", said[-3000:]
    saved = max(int(path.name.rsplit("-", 1)[-1]) for path in (run / "checkpoints").glob("checkpoint-step-*"))
    assert 2 <= saved < 300
    second = submit(tmp_path, *arguments, "--max-steps", str(saved + 3))
    said = second.communicate(timeout=200)[0]
    assert second.returncode == 0, said[-3000:]
    assert re.search(rf"on 4 rank\(s\).*steps {saved} to {saved + 3} of 300", said), said[-3000:]
