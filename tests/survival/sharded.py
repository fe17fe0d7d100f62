"""What a rank holds, reads and writes when a large model starts, saves and resumes: on CPU ranks, with gloo.

  torchrun --standalone --nproc_per_node=4 tests/survival/sharded.py [--gigabytes 1] [--whole] [--peer]
A chain of linear layers under fsdp in fp32, with moments and an average: four times its weights reach the disk. It is
built on meta and filled from a file; --whole builds it on every rank, and rank 0 writes one file, as before shards.
--peer also writes the weights by torch.distributed.checkpoint. Memory is the process's own (RssAnon) above that before.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from shared.config import RunSection, TrainingSection
from shared.engine import checkpoint
from shared.engine.checkpoint import CheckpointStore, StoredTensors, write_safetensors
from shared.engine.dist import barrier, gather_objects, init_distributed, shutdown
from shared.engine.parallel import make_strategy
from shared.engine.state import restore, tensors_to_save, trainer_state
from shared.engine.strategy import EMA, MOMENTS
from shared.optim import decay_groups

WIDTH = 4096  # a layer of 67 MB


def held() -> int:
    """Bytes of this process's own memory, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


class Peak:
    """While in the context: seconds, and the most memory above that at its beginning."""

    def __enter__(self) -> "Peak":
        self.before, self.peak, self.ended = held(), 0, False
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        self.began = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self.ended:
            self.peak = max(self.peak, held() - self.before)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.ended = True
        self.thread.join()
        self.peak = max(self.peak, held() - self.before)


def count_reading(read: list[int]) -> None:
    """Add up the bytes of every tensor that comes out of a checkpoint."""
    plain: Callable = checkpoint.Stored.__getitem__

    def counted(self: Any, rows: Any) -> torch.Tensor:
        value = plain(self, rows)
        read[0] += value.nbytes
        return value

    checkpoint.Stored.__getitem__ = counted  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the weights")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sharded-measured"))
    parser.add_argument(
        "--whole", action="store_true", help="build everywhere, write by rank 0, read all on every rank"
    )
    parser.add_argument("--peer", action="store_true", help="also torch.distributed.checkpoint's own writer")
    options = parser.parse_args()
    info = init_distributed("cpu")
    layers, read = max(2, round(options.gigabytes * 1e9 / 4 / WIDTH**2)), [0]
    base = options.folder / "base.safetensors"
    specs = [(f"{layer}.weight", (WIDTH, WIDTH), torch.float32) for layer in range(layers)]
    if info.is_main:
        shutil.rmtree(options.folder, ignore_errors=True)
        options.folder.mkdir(parents=True)
        write_safetensors(base, specs, (torch.full((WIDTH, WIDTH), 0.01 * number) for number, _ in enumerate(specs)))
    barrier()
    torch.set_num_threads(1)
    training = TrainingSection(ema_decay=0.99)
    strategy = make_strategy(RunSection(strategy="fsdp"), info, "fp32", training)
    found: dict[str, Any] = {}
    with Peak() as peak:
        with torch.device("cpu" if options.whole else "meta"):
            model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        values = StoredTensors(base)
        if options.whole:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(values[name][...])
        strategy.prepare(model, decay_groups(model, 0.0), (nn.Linear,), None if options.whole else values.__getitem__)
    found["start peak"], found["start s"] = peak.peak, peak.seconds
    strategy.load_steps_taken(dict.fromkeys(strategy.parameters, 1))
    for name in strategy.parameters:
        for kind in MOMENTS:
            strategy.load_full(kind, name, values[name])
    ema = EMA(strategy, 0.99)
    store = CheckpointStore(options.folder / "checkpoints", info, keep_last=2)

    def save(step: int, background: bool) -> None:
        tensors = tensors_to_save(strategy, ema, sharded=not options.whole)
        trainer = trainer_state(strategy, ema)
        store.save(
            f"step_{step}", step=step, trainer=trainer, tensors=tensors, meta={}, background=background,
            sharded=not options.whole,
        )  # fmt: skip

    barrier()
    with Peak() as peak:
        save(1, background=False)
    found["save s"], found["save peak"] = peak.seconds, peak.peak
    barrier()
    with Peak() as peak:
        save(2, background=True)
        found["blocked s"] = time.perf_counter() - peak.began
        store.wait()
    found["behind s"], found["behind peak"] = peak.seconds, peak.peak
    folder = options.folder / "checkpoints" / "step_2"
    mine = list((folder / "shards").glob(f"{info.rank + 1:05d}-*")) or (
        list(folder.glob("*.saf*")) if info.is_main else []
    )
    found["written"] = sum(path.stat().st_size for path in mine)
    store._verified.clear()
    store._copied.clear()
    barrier()
    began = time.perf_counter()
    store.hash_together()
    store.newest_valid()
    found["hash s"] = time.perf_counter() - began
    count_reading(read)
    if options.whole:  # every rank reads every tensor whole, as before
        plain = strategy._held
        strategy._held = lambda value: plain(value[...] if isinstance(value, checkpoint.Stored) else value)
    with Peak() as peak:
        restore(folder, json.loads((folder / "trainer.json").read_text()), strategy, ema, print)
    found["load s"], found["load peak"], found["read"] = peak.seconds, peak.peak, read[0]
    if options.peer:
        with Peak() as peak:
            writer = dcp.HuggingFaceStorageWriter(str(options.folder / "peer"), save_distributed=True)
            dcp.save(dict(strategy.module.state_dict()), storage_writer=writer)
        found["peer s (weights alone)"], found["peer peak"] = peak.seconds, peak.peak
    for rank, row in enumerate(gather_objects(found) if os.environ.get("RANK", "0") == "0" else gather_objects(found)):
        if info.is_main:
            print(f"rank {rank}: " + ", ".join(
                f"{name} {value:.2f}" if name.endswith((" s", ")")) else f"{name} {value / 1e6:.0f} MB"
                for name, value in row.items()
            ), flush=True)  # fmt: skip
    if info.is_main:
        print(
            f"{layers} layers of {4 * WIDTH**2 / 1e6:.0f} MB, weights {4 * layers * WIDTH**2 / 1e6:.0f} MB", flush=True
        )
        shutil.rmtree(options.folder, ignore_errors=True)
    barrier()
    dist.barrier()
    shutdown()


if __name__ == "__main__":
    main()
