"""Commands that the demo starts: one at a time for each visitor, with what they print, a stop button and a time limit.

A job is one of the documented commands, run by the environment of the trainings. So a checkpoint of any kind that the
command line takes works here too, an error is the sentence that the command line would print, and stopping is exact.
"""

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "bin" / "python"
LONGEST_TEXT = 500  # characters
LONGEST_JOB = 1800  # seconds


class JobError(Exception):
    """A job that failed, was stopped or was not allowed to start; the message is a sentence for the visitor."""


@dataclass
class Step:
    """How far a job is: seconds since its start, the share that its bar shows (None: it has none), its last line."""

    seconds: float
    share: float | None
    line: str


@dataclass
class Job:
    """A running command and what it printed last."""

    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)
    stopped: bool = False


class Jobs:
    """All jobs of the demo, by visitor; their files lie in one folder that is removed when the demo ends."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="demo-")
        self._running: dict[str, Job] = {}
        self._printed: dict[str, list[str]] = {}
        self._count = 0
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where results are written; the only folder that the browser may read from."""
        return Path(self._folder.name)

    def new_folder(self) -> Path:
        """An empty folder for one job."""
        with self._lock:
            self._count += 1
            path = self.folder / f"{self._count:06d}"
        path.mkdir()
        return path

    def run(self, visitor: str, command: list[str | Path]) -> Iterator[Step]:
        """Run `python COMMAND` to its end, a Step about every half second. JobError with a sentence when it fails."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [str(PYTHON), *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        job, began = Job(process), time.monotonic()
        with self._lock:
            self._running[visitor] = job
        reader = threading.Thread(target=_read, args=(job,), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                seconds = time.monotonic() - began
                if seconds > LONGEST_JOB:
                    raise JobError(f"this took longer than {LONGEST_JOB // 60} minutes and was stopped; ask for less")
                line = job.lines[-1] if job.lines else ""
                yield Step(seconds, share_of(line), line)
                time.sleep(0.5)
            reader.join(timeout=5)
        finally:  # also when the visitor left: the generator is closed then
            _kill(process)
            with self._lock:
                self._printed[visitor] = job.lines
                if self._running.get(visitor) is job:
                    del self._running[visitor]
        if job.stopped:
            raise JobError("stopped")
        if process.returncode:
            raise JobError(sentence_of(job.lines, process.returncode))

    def printed(self, visitor: str) -> list[str]:
        """The last lines of the visitor's last job."""
        return self._printed.get(visitor, [])

    def stop(self, visitor: str) -> None:
        """End the visitor's job, if one runs."""
        with self._lock:
            job = self._running.get(visitor)
        if job is not None:
            job.stopped = True
            _kill(job.process)


def share_of(line: str) -> float | None:
    """The share that a bar such as ` 40%|####` shows."""
    found = re.search(r"(\d{1,3})%\|", line)
    return min(int(found[1]), 100) / 100 if found else None


def sentence_of(lines: list[str], code: int) -> str:
    """What the visitor is told: the command's own sentence, or its last line."""
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"the command ended with code {code}: {last[:300]}"


def text_of(text: str | None, what: str) -> str:
    """A visitor's text without ends. JobError where it is empty or too long."""
    found = " ".join((text or "").split())
    if not found:
        raise JobError(f"{what} is empty; write a sentence")
    if len(found) > LONGEST_TEXT:
        raise JobError(f"{what} has {len(found)} characters; at most {LONGEST_TEXT} are read")
    return found


def _read(job: Job) -> None:
    """Keep the last lines; a bar that is drawn over with carriage returns is one line."""
    assert job.process.stdout is not None
    whole: list[str] = []
    rest = ""
    while chunk := os.read(job.process.stdout.fileno(), 65536):
        *ended, rest = (rest + chunk.decode("utf-8", "replace")).split("\n")
        whole = [*whole, *map(_last_drawn, ended)][-200:]
        job.lines = [*whole, _last_drawn(rest)] if rest else whole


def _last_drawn(line: str) -> str:
    return line.rstrip("\r").rsplit("\r", 1)[-1]


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
