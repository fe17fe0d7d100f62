"""What the workshop itself costs: a checkpoint beside torch.save, the order of an epoch, more ranks.

python scripts/bench/workshop.py [--parts peers scaling] [--rounds 5] [--output DIR]
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.bench.bench import Bench, BenchOptions, Row, run_benchmark
from shared.config import RunSection, Section, TrainingSection, load_config
from shared.errors import command

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    load_config(BenchOptions, description=__doc__)

import itertools
import json
import os
import shutil
import socket
import statistics
import tempfile
import time

import torch
from torch import Tensor, nn

from shared.data import BatchPlan
from shared.engine.checkpoint import CheckpointStore
from shared.engine.dist import DistInfo, init_distributed, shutdown
from shared.engine.parallel import make_strategy
from shared.engine.state import RunState, resume, save_run
from shared.engine.strategy import Strategy
from shared.optim import decay_groups


class Config(Section):
    """Settings of a run without a system."""

    run: RunSection = RunSection()
    training: TrainingSection = TrainingSection()


class NoStream:
    """A stream's place in a checkpoint."""

    steps_per_epoch, samples_per_step, fingerprint = None, 1, None


def stack(width: int, depth: int) -> nn.Sequential:
    """Square linear layers."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def trained(model: nn.Module, config: Config, info: DistInfo, name: str | None = None) -> tuple[Strategy, Tensor]:
    """A strategy around the model, with moments from one step, and an input."""
    strategy = make_strategy(RunSection(strategy=name), info, "fp32", config.training)
    strategy.prepare(model, decay_groups(model, 0.0))
    x = torch.randn(16, model[0].in_features)
    one_step(strategy, x)
    return strategy, x


def one_step(strategy: Strategy, x: Tensor) -> None:
    """Forward, backward and update."""
    with strategy.micro_step(is_last=True):
        strategy.backward(strategy.model(x).square().mean())
    strategy.optimizer_step()


def peers(bench: Bench) -> None:
    """Saving and loading weights and moments of 12.6 M parameters, with hashes, fsync and rename, beside torch.save."""
    config, info = Config(), DistInfo()
    config.training.save_in_background = False
    strategy, _ = trained(stack(1024, 12), config, info)
    module, optimizer, numbers = strategy.module, strategy.optimizer, itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        store, plain = CheckpointStore(Path(folder) / "checkpoints", info), Path(folder) / "plain.pt"

        def save() -> None:
            name = f"step_{next(numbers)}"
            save_run(name, config, RunState(), strategy, None, store, None, None)

        def save_plain() -> None:
            torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, plain)

        def load_plain() -> None:
            state = torch.load(plain, weights_only=True)
            module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

        size = 12 * sum(parameter.numel() for parameter in module.parameters()) / 1e6
        options = {"clock": time.perf_counter, "note": f"{size:.0f} MB with both moments"}
        bench.pair("checkpoint save, hashed and synced", save, save_plain, peer="torch.save, neither", **options)
        bench.pair(
            "checkpoint load, hashes checked",
            lambda: resume(config, strategy, None, store, NoStream(), None, lambda text: None),
            load_plain, peer="torch.load", **options,
        )  # fmt: skip
        shutil.rmtree(store.root)


def scaling(bench: Bench) -> None:
    """Samples of a data set, and ranks."""
    plans = {count: lambda count=count: BatchPlan(count, 32).keys(0, 0, 0) for count in (10_000, 100_000, 1_000_000)}
    bench.scaling("samples of an epoch", plans, "ms to draw the order of an epoch, once an epoch: 1 or below")
    by_ranks = {ranks: rank_milliseconds(ranks, bench.rounds) for ranks in (1, 2, 4)}
    meaning = "ms of processor time a rank and step under ddp, the same batch on every rank: near 0, "
    bench.series("ranks", by_ranks, meaning + "what grows is the exchange of gradients over gloo")


def rank_milliseconds(ranks: int, rounds: int) -> float:
    """The median over the ranks of a step's processor time."""
    with socket.socket() as found, tempfile.TemporaryDirectory() as folder:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        torch.multiprocessing.spawn(_rank, (ranks, port, rounds, folder), nprocs=ranks)
        return statistics.median(json.loads(path.read_text()) for path in Path(folder).glob("*.json"))


def _rank(rank: int, world: int, port: int, rounds: int, folder: str) -> None:
    """One rank: time its steps and write the median."""
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    info = init_distributed("cpu")
    strategy, x = trained(stack(512, 8), Config(), info, "ddp" if world > 1 else None)
    x, times = torch.randn(512, x.shape[1]), []
    for _ in range(2 * rounds):
        began = time.process_time()
        one_step(strategy, x)
        times.append(1000 * (time.process_time() - began))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(statistics.median(times[rounds:])))
    shutdown()


PARTS = {"peers": peers, "scaling": scaling}


@command
def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print, and write the table where --output says."""
    return run_benchmark("workshop", PARTS, argv, __doc__)


if __name__ == "__main__":
    main()
