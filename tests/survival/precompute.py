"""Caches whose writing is killed at random moments and gone on with by the same command, against undisturbed ones.

  python -m tests.survival.precompute [--systems dit float opens2v] [--kills 5] [--ranks 1 2] [--times 1] [--seed 0]
SIGKILL reaches all workers at a moment drawn after the first change in the cache's folder. Every tensor and every other
file must be the same bit for bit. --times: so many caches, each by processes that are forked with all imported.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.launching import run, run_and_kill
from tests.survival.systems import OPENS2V, PICTURES, dit


def dit_cache(files: Path, cache: Path) -> list[str]:
    """The sample pictures in shards of eight."""
    return ["dit/precompute.py", *dit(files, 1)[:2], "--out", str(cache), "--shard-size", "8"]


def float_cache(files: Path, cache: Path) -> list[str]:
    """The sample clips, encoded by an auto-encoder of one step."""
    pictures = ["--config", "small", *PICTURES, "--device", "cpu"]
    if not (files / "autoencoder").exists():
        run(1, "float/train_autoencoder.py", *pictures, "--max-steps", "1", "--output-dir", str(files / "autoencoder"))
    features = ["--autoencoder-path", str(files / "autoencoder"), "--features-dir", str(cache)]
    return ["float/precompute.py", *pictures, *features]


def opens2v_cache(files: Path, cache: Path) -> list[str]:
    """Texts, pictures and latents of the sample clips, for a base of one step."""
    out = files / "base"
    if not out.exists():
        run(1, "opens2v/train.py", *OPENS2V, "--max-steps", "1", "--output-dir", str(out), "--no-visualize")
    base = ["--generator-ckpt", str(out / "base" / "generator.safetensors")]
    return ["opens2v/precompute.py", *OPENS2V, *base, "--cache-dir", str(cache), "--cache-variants", "3"]


CACHES: dict[str, Callable[[Path, Path], list[str]]] = {
    "dit": dit_cache,
    "float": float_cache,
    "opens2v": opens2v_cache,
}


def contents(folder: Path) -> dict[str, Any]:
    """What every file below a folder holds, by its path in it: tensors and notes of safetensors, bytes of others."""
    return {
        str(path.relative_to(folder)): tensors_and_notes(path) if path.suffix == ".safetensors" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors_and_notes(path: Path) -> tuple[dict, dict]:
    """The values and the metadata, whose order in the file is not fixed."""
    with safe_open(path, "pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        bits = {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in values.items()}
        return {name: (value.dtype, value.shape, bits[name]) for name, value in values.items()}, file.metadata()


def survive(name: str, files: Path, world: int, options: argparse.Namespace) -> tuple[int, bool]:
    """(kills that hit, whether the cache is the undisturbed one) of one system."""
    draw = random.Random(f"{options.seed} {name} {world}")
    straight, killed = files / f"{name}_straight_{world}", files / f"{name}_killed_{world}"
    run(1, *CACHES[name](files, straight))
    command, hits = CACHES[name](files, killed), 0
    for _ in range(options.kills):
        hits += run_and_kill(world, *command, after=draw.uniform(0, options.window), watch=killed) != 0
    run(world, *command)
    return hits, contents(straight) == contents(killed)


def survive_often(name: str, files: Path, options: argparse.Namespace) -> tuple[int, bool]:
    """The same for `times` caches on one rank, one kill each."""
    draw = random.Random(f"{options.seed} {name} often")
    straight, killed = files / f"{name}_straight", files / f"{name}_killed"
    script, *words = CACHES[name](files, killed)
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    run(1, *CACHES[name](files, straight))
    wanted, hits, same = contents(straight), 0, 0
    for done in range(1, options.times + 1):
        hits += not forked(main, words, killed, draw.uniform(0, options.window))
        same += forked(main, words) and contents(killed) == wanted
        shutil.rmtree(killed)
        if done % 10 == 0:
            print(f"{name}: {hits} kills, {same} of {done} caches the same", flush=True)
    return hits, same == options.times


def forked(main: Callable, words: list[str], watch: Path | None = None, after: float = 0.0) -> bool:
    """Run a command in a fork; whether it came to its end. watch: SIGKILL it so long after this folder is there."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            main(words)
        except BaseException:  # noqa: BLE001  (the code below says it)
            os._exit(1)
        os._exit(0)
    if watch is not None:
        while not watch.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(CACHES), default=list(CACHES))
    parser.add_argument("--kills", type=int, default=5, help="for each system and number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--times", type=int, default=1, help="caches, each killed once, on one rank")
    parser.add_argument("--window", type=float, default=0.3, help="a kill falls so many seconds after a change")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.systems:
            for world in options.ranks if options.times == 1 else [1]:
                if options.times > 1:
                    hits, same = survive_often(name, Path(folder), options)
                else:
                    hits, same = survive(name, Path(folder), world, options)
                ends.append(same)
                print(
                    f"{name}, {world} rank(s): {hits} kills, the cache is {'the same' if same else 'another'}",
                    flush=True,
                )
    raise SystemExit(0 if all(ends) else 1)


if __name__ == "__main__":
    main()
