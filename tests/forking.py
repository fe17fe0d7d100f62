"""Commands of one process run in forks of this one, in which the large libraries are imported.

An import of torch, transformers and diffusers takes longer than most commands of the tests. The product's own modules
are imported anew in every fork.
"""

import atexit
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import IO

from tests.launching import ENVIRONMENT, ROOT

PRODUCT = ("float", "opens2v", "bagel", "dit", "multimodal", "shared")
LIBRARIES = """torch numpy safetensors.torch yaml pydantic PIL.Image av soundfile tqdm einops torch.distributed.fsdp
torch.utils.data torch.utils.tensorboard torch.distributed.checkpoint torch._dynamo peft matplotlib.pyplot
transformers.models.clip.modeling_clip transformers.models.wav2vec2.modeling_wav2vec2
transformers.models.umt5.modeling_umt5 transformers.models.auto.tokenization_auto diffusers.models.autoencoders
diffusers.models.transformers.transformer_wan diffusers.schedulers""".split()


def preload() -> None:
    """Import what the commands import; once, before the first fork."""
    for name in LIBRARIES:
        importlib.import_module(name)
    # a fork of a process whose OpenMP has threads waits for them for ever
    sys.modules["torch"].set_num_threads(1)


def run(*script: str, world: int = 1, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess:
    """Run `SCRIPT.py ...` or `-m MODULE ...` to its end, on so many ranks; the exit code is one that is not 0."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        children = _fork_ranks(script, world, out, err, environment)
        code = _wait_all(children, timeout)
        if code is None:
            _kill(children)
            raise subprocess.TimeoutExpired(list(script), timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return subprocess.CompletedProcess(list(script), code, *texts)


def run_and_kill(world: int, *script: str, after: float, watch: Path | None = None) -> int:
    """As tests.launching.run_and_kill, without torchrun."""

    def mark() -> float | None:
        return watch.stat().st_mtime_ns if watch is not None and watch.exists() else None

    before = mark()
    with open(os.devnull, "r+b") as nothing:
        children = _fork_ranks(script, world, nothing, nothing, {})
    while watch is not None and mark() == before:
        if (code := _wait_all(children, 0.01)) is not None:
            return code
    if (code := _wait_all(children, after)) is not None:
        return code
    _kill(children)
    return -signal.SIGKILL


def _fork_ranks(
    script: tuple[str, ...], world: int, out: IO, err: IO, environment: dict[str, str]
) -> dict[int, int | None]:
    """The children, each rank one; what they end with stands beside them once they have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(world)
    ]
    return {
        _fork([*map(str, script)], out, err, {**environment, **(place if world > 1 else {})}): None for place in places
    }


def _wait_all(children: dict[int, int | None], seconds: float) -> int | None:
    """Their exit code once all have ended; None before."""
    deadline = time.monotonic() + seconds
    while True:
        for child in [child for child, code in children.items() if code is None]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children[child] = os.waitstatus_to_exitcode(status)
        if all(code is not None for code in children.values()):
            return next((code for code in children.values() if code), 0)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def _kill(children: dict[int, int | None]) -> None:
    running = [child for child, code in children.items() if code is None]
    for child in running:
        os.killpg(child, signal.SIGKILL)
    for child in running:
        os.waitpid(child, 0)


def _fork(script: list[str], out: IO, err: IO, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        with_own_group = time.monotonic() + 5
        while os.getpgid(child) != child and time.monotonic() < with_own_group:
            time.sleep(0.001)
        return child
    code = 1
    try:
        for name in [name for name in sys.modules if name.split(".")[0] in PRODUCT]:
            del sys.modules[name]
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  (temporary folders of the parent stay)
        os.setsid()
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.chdir(ROOT)
        os.environ.update({**ENVIRONMENT, **environment})
        code = _run_here(script)
    finally:
        os._exit(code)


def _run_here(script: list[str]) -> int:
    try:
        if script[0] == "-m":
            sys.argv = script[1:]
            runpy.run_module(script[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = script
            sys.path[0] = str((ROOT / script[0]).parent)
            runpy.run_path(str(ROOT / script[0]), run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:  # noqa: BLE001  (as the interpreter reports it)
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
