"""Two agents as two nodes: on loopback, and in two network namespaces joined by a cable, which is cut and mended."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launching import ENVIRONMENT, ROOT, final_tensors, run, same_bits

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
TOY = Path(__file__).parent / "toy.py"


def cases(folder: Path, name: str, **training) -> Path:
    path = folder / f"{name}.json"
    settings = {"batch_size": 2, "total_steps": 20, "save_steps": 5, "logging_steps": 5, "eval_steps": None, **training}
    path.write_text(
        json.dumps([{"output_dir": str(folder / name), "dropout": 0.2, "strategy": "ddp", "training": settings}])
    )
    return path


def agent(
    rank: int, address: str, port: int, path: Path, *prefix: str, restarts: int = 0, **environment: str
) -> subprocess.Popen:
    line = [
        *prefix,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        f"--node_rank={rank}",
        "--nproc_per_node=1",
        f"--master_addr={address}",
        f"--master_port={port}",
        f"--max-restarts={restarts}",
        str(TOY),
        str(path),
    ]
    return subprocess.Popen(
        line, cwd=ROOT, env={**ENVIRONMENT, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def finish(agents: list[subprocess.Popen]) -> None:
    for process in agents:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]


def test_two_agents_on_loopback_equal_one_node(tmp_path):
    run(2, TOY, cases(tmp_path, "one_node"))
    port, path = free_port(), cases(tmp_path, "two_nodes")
    finish([agent(rank, "127.0.0.1", port, path) for rank in (0, 1)])
    assert same_bits(final_tensors(tmp_path / "one_node"), final_tensors(tmp_path / "two_nodes"))


def can_make_namespaces() -> str | None:
    """None, or why two network namespaces cannot be made here."""
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not installed"
    done = subprocess.run(["ip", "netns", "add", "probe_rights"], capture_output=True, text=True)
    if done.returncode:
        return f"no right to make a network namespace: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "probe_rights"], check=True)
    return None


@pytest.fixture
def two_hosts():
    reason = can_make_namespaces()
    if reason:
        pytest.skip(reason)
    with joined("") as hosts:
        yield hosts


@contextlib.contextmanager
def joined(label: str):
    """(names, ends): two namespaces, and the ends of the cable between them."""
    names = [f"host{side}{label}_{os.getpid()}" for side in "ab"]
    ends = [f"v{side}{label}{os.getpid() % 100000}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ("10.77.0.1", "10.77.0.2"), strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, ends
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_namespaces_survive_a_cut_cable(tmp_path, two_hosts):
    names, ends = two_hosts
    run(2, TOY, cases(tmp_path, "one_node", total_steps=150, save_steps=10))
    path = cases(tmp_path, "two_hosts", total_steps=150, save_steps=10)

    def start() -> list[subprocess.Popen]:
        return [
            agent(rank, "10.77.0.1", 29500, path, "ip", "netns", "exec", names[rank], GLOO_SOCKET_IFNAME=ends[rank])
            for rank in (0, 1)
        ]

    agents, log = start(), tmp_path / "two_hosts" / "train.log"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and "Step 20," in log.read_text()):
        time.sleep(0.05)
    subprocess.run(["ip", "-n", names[1], "link", "set", ends[1], "down"], check=True)
    time.sleep(3)
    # as an operator would: what hangs without its peer is ended, agents and workers, and the same command started again
    for process in agents:
        process.kill()
    subprocess.run(["pkill", "-9", "-f", str(path)], check=False)
    for process in agents:
        process.communicate(timeout=60)
    subprocess.run(["ip", "-n", names[1], "link", "set", ends[1], "up"], check=True)
    finish(start())
    assert "resumed from" in log.read_text()
    assert same_bits(final_tensors(tmp_path / "one_node"), final_tensors(tmp_path / "two_hosts"))


def test_both_ends_of_a_cut_cable_end_within_the_timeout(tmp_path, two_hosts):
    """The node without the store as well: what words its error asks the store, and must not wait for it. Two trials
    side by side, since each waits out 30 seconds; five of five were seen.
    """
    with joined("z") as second, ThreadPoolExecutor(2) as pool:
        list(pool.map(cut, (tmp_path / "first", tmp_path / "second"), (two_hosts, second), (20, 21)))


def cut(folder: Path, hosts: tuple[list[str], list[str]], step: int) -> None:
    """Cut the cable at a step; AssertionError or TimeoutExpired where an end does not notice."""
    folder.mkdir()
    names, ends = hosts
    path = cases(folder, "cut", total_steps=100_000, save_steps=100_000)
    agents = [
        agent(
            rank, "10.77.0.1", 29500, path, "ip", "netns", "exec", names[rank],
            GLOO_SOCKET_IFNAME=ends[rank], TOY_TIMEOUT="30",
        )
        for rank in (0, 1)
    ]  # fmt: skip
    log = folder / "cut" / "train.log"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and f"Step {step}" in log.read_text()):
        time.sleep(0.05)
    subprocess.run(["ip", "-n", names[1], "link", "set", ends[1], "down"], check=True)
    began, texts = time.monotonic(), []
    try:
        for process in agents:
            texts.append(process.communicate(timeout=90 - (time.monotonic() - began))[1])
    finally:
        for process in agents:
            process.kill()
    assert all(process.returncode for process in agents)
    assert "common store does not answer" in texts[1] or "is late" in texts[1] or "Connection" in texts[1], texts[1][
        -2000:
    ]
