"""Helpers of the tests: start a script on several ranks, read what a run wrote."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "PYTHONPATH": "",
}


def command(world: int, *script: str) -> list[str]:
    """The command line that runs a script on `world` ranks of this machine."""
    if world == 1:
        return [sys.executable, *map(str, script)]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
        *map(str, script),
    ]


def run(
    world: int, *script: str, check: bool = True, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess:
    """Run it to its end; on failure the test shows both outputs."""
    done = subprocess.run(
        command(world, *script),
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        raise AssertionError(
            f"exit code {done.returncode}\n--- stdout\n{done.stdout[-3000:]}\n--- stderr\n{done.stderr[-6000:]}"
        )
    return done


def run_and_kill(world: int, *script: str, after: float, watch: Path | None = None) -> int:
    """Start it, SIGKILL the whole group after so many seconds, and return the exit code (0: it ended before).

    watch: count the seconds from the first change of this file, such as a run's checkpoints/latest, not the start.
    """

    def mark() -> float | None:
        return watch.stat().st_mtime_ns if watch is not None and watch.exists() else None

    before = mark()
    process = subprocess.Popen(
        command(world, *script),
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while watch is not None and process.poll() is None and mark() == before:
        time.sleep(0.01)
    try:
        return process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(timeout=60)
    finally:
        time.sleep(0.2)


def losses(output_dir: Path) -> dict[int, float]:
    """train/loss by step."""
    rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def final_tensors(output_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, averaged weights and optimizer state of the newest checkpoint, by file and name."""
    folder = newest(output_dir)
    return {
        f"{path.name}:{name}": value.clone()
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def newest(output_dir: Path) -> Path:
    """The checkpoint with the highest step."""
    manifests = Path(output_dir).glob("checkpoints/*/manifest.json")
    return max(manifests, key=lambda path: json.loads(path.read_text())["step"]).parent


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal in every bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
