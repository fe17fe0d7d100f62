"""Commands of one process run in forks of this one, in which the large libraries are imported.

An import of torch, transformers and diffusers takes longer than most commands of the tests. The product's own modules
are imported anew in every fork.
"""

import atexit
import importlib
import os
import runpy
import signal
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


def run(*script: str, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess:
    """Run `SCRIPT.py ...` or `-m MODULE ...` to its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = _fork([*map(str, script)], out, err, environment)
        code = _wait(child, timeout)
        if code is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise subprocess.TimeoutExpired(list(script), timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return subprocess.CompletedProcess(list(script), code, *texts)


def run_and_kill(*script: str, after: float, watch: Path | None = None) -> int:
    """As tests.launching.run_and_kill."""

    def mark() -> float | None:
        return watch.stat().st_mtime_ns if watch is not None and watch.exists() else None

    before = mark()
    with open(os.devnull, "r+b") as nothing:
        child = _fork([*map(str, script)], nothing, nothing, {})
    while watch is not None and mark() == before:
        if (code := _wait(child, 0.01)) is not None:
            return code
    if (code := _wait(child, after)) is not None:
        return code
    os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _wait(child: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


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
