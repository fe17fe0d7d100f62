"""Measurements for the benchmarks: alternated pairs, medians, fitted slopes, loaders under fake compute, start-up.

    bash scripts/bench.sh [--system dit float] [--parts peers] [--rounds 5] [--output DIR] [--gpu] [--record]

Every scripts/bench/SYSTEM.py offers its measurements as functions of a Bench (PARTS); this command runs each in a
process of its own, one after another, and joins what they found into one bench.json and one bench.md. Times on a
CPU are processor seconds of one thread, which other programs lengthen less than they do the wall clock; jobs that are
compared take turns, and the ratio is the median of the ratios turn by turn.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.bench.table import PARTS, find_systems, number, write_tables
from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command

ROOT = Path(__file__).resolve().parents[2]
PLANNED_GPU = "4090"  # where a preset names no card
MEMORY_RATES = {"4090": 1.0e12, "a100": 2.0e12, "h100": 3.3e12}  # bytes a second
ADAMW_BYTES = 28  # read and written for each trained parameter
LONGEST_FAKE_STEP = 1.0  # seconds; a shorter step asks more of a loader
STARVING_SECONDS = 3.0  # of one window in which a loader is watched
START_LIMIT = 120.0  # seconds after which a start-up counts as failed
Job = Callable[[], Any]


class BenchOptions(Section):
    """What to measure."""

    system: list[str] = setting([], "systems, or workshop for shared/; none: all")
    parts: list[str] = setting([], "parts of the table, such as peers or loader; none: all")
    rounds: int = setting(5, "timed rounds of every measurement", ge=1)
    output: str | None = setting(None, "folder for bench.json and bench.md; null: a new one that is named at the end")
    gpu: bool = setting(False, "utilisation of a GPU in place of the table for the CPU")
    record: bool = setting(False, "also write the table to scripts/BENCHMARKS.md")
    peer: str | None = setting(None, "float: a checkout of commit 8a67d66, stands in for the official code; null: none")


@dataclass
class Row:
    """One line of the table. ratio: ours over the peer's, or what the unit says; bar: with direction."""

    part: str
    name: str
    ratio: float | None = None
    bar: float | None = None
    direction: str = "at most"
    ours: float | None = None
    unit: str = "ms"
    theirs: float | None = None
    peer: str = ""
    note: str = ""
    series: dict[str, float] = field(default_factory=dict)  # of a scaling table: size -> ours

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without one."""
        if self.bar is None or self.ratio is None:
            return None
        return self.ratio <= self.bar if self.direction == "at most" else self.ratio >= self.bar


def alternate(jobs: list[Job], rounds: int, clock: Callable[[], float] = time.process_time) -> list[list[float]]:
    """Seconds of each job in each of `rounds` turns, after one turn that is not counted; the order turns each time."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for turn in range(rounds + 1):
        places = range(len(jobs)) if turn % 2 else reversed(range(len(jobs)))
        for place in places:
            began = clock()
            jobs[place]()
            if turn:
                seconds[place].append(clock() - began)
    return seconds


def slope(sizes: list[float], values: list[float]) -> float:
    """The exponent of the power law that fits best: least squares between the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-12)) for value in values]
    return statistics.linear_regression(x, y).slope


class Bench:
    """Collects the rows of one system."""

    def __init__(self, system: str, options: BenchOptions):
        self.system, self.options, self.rounds = system, options, options.rounds
        self.part = ""
        self.rows: list[Row] = []

    def add(self, row: Row) -> Row:
        """Keep and print a row."""
        self.rows.append(row)
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}, "
        ours = ", ".join(f"{size}: {number(value)}" for size, value in row.series.items())
        ours = f"{number(row.ours)} {row.unit}" if row.ours is not None else ours
        print(f"{self.system} {row.part}: {row.name}: {ratio}{ours}{f' ({row.note})' * bool(row.note)}", flush=True)
        return row

    def pair(
        self,
        name: str,
        ours: Job,
        theirs: Job,
        *,
        peer: str,
        bar: float | None = None,
        direction: str = "at most",
        work: tuple[float, float] = (1.0, 1.0),
        scale: float = 1.0,
        clock: Callable[[], float] = time.process_time,
        unit: str = "ms",
        note: str = "",
    ) -> Row:
        """Ours against the peer's, each per unit of its `work`; the peer's time is multiplied by `scale`."""
        times = alternate([ours, theirs], self.rounds, clock)
        own, other = ([1000 * value / done for value in row] for row, done in zip(times, work, strict=True))
        other = [scale * value for value in other]
        ratios = [b / a if direction == "at least" else a / b for a, b in zip(own, other, strict=True)]
        found = Row(self.part, name, statistics.median(ratios), bar, direction, statistics.median(own), unit)
        found.theirs, found.peer, found.note = statistics.median(other), peer, note
        if found.met is False:
            found.note += f"; {spent(ours)}"
        return self.add(found)

    def training_pair(self, name: str, ours: Job, theirs: Job, *, peer: str, bar: float = 0.95, note: str = "") -> None:
        """fp32 against fp32, then our default precision on this processor against the peer's default, which is fp32."""
        import torch

        from shared.engine.strategy import choose_precision

        fp32 = self.pair(name, ours, theirs, peer=peer, bar=bar, note=note)
        chosen, label = choose_precision(None, torch.device("cpu")), f"{name}, default precision"
        if chosen == "bf16":
            self.pair(label, in_bf16(ours), theirs, peer=peer, bar=0.70, note="ours in bf16, the peer in fp32")
            return
        reason = f"no bf16 arithmetic here, so fp32 is the default; {spent(ours)}"
        self.add(Row(self.part, label, fp32.ratio, 0.70, "at most", fp32.ours, fp32.unit, fp32.theirs, peer, reason))

    def precision(self, name: str, step: Job) -> None:
        """bf16 autocast against fp32, the same step."""
        import torch

        from shared.engine.strategy import choose_precision

        note = f"default here: {choose_precision(None, torch.device('cpu'))}"
        self.pair(name, in_bf16(step), step, peer="the same in fp32", note=note)

    def time(self, name: str, job: Job, *, per: float = 1.0, unit: str = "ms", note: str = "") -> Row:
        """Milliseconds of processor time for each of `per` things that the job makes."""
        middle = statistics.median(alternate([job], self.rounds)[0])
        return self.add(Row(self.part, name, ours=1000 * middle / per, unit=unit, note=note))

    def scaling(self, name: str, jobs: dict[int, Job], meaning: str, *, unit: str = "ms") -> None:
        """Cost against size, with the slope of the fitted power law; `meaning` is what to expect of it."""
        times = alternate(list(jobs.values()), self.rounds)
        values = {size: 1000 * statistics.median(row) for size, row in zip(jobs, times, strict=True)}
        self.series(name, values, meaning, unit=unit)

    def series(self, name: str, values: dict[int, float], meaning: str, *, unit: str = "ms") -> None:
        """A scaling row from values that were measured elsewhere."""
        exponent = slope(list(values), list(values.values()))
        series = {f"{size:,}": value for size, value in values.items()}
        self.add(Row(self.part, name, exponent, unit=unit, note=meaning, series=series))

    def starving(self, name: str, stream: Any, step: tuple[float, str], *, note: str = "") -> None:
        """The share of time that a loop waits for `stream` when its compute sleeps, the median of several windows (on a
        shared machine others take the processor for seconds); step: seconds of one, and the card that would take them
        (see planned_step).
        """
        import torch

        from shared.data import ReadAhead

        step_seconds, card = step
        worker_count = set_workers(stream, 0)
        stream.start(0, None)
        began = time.process_time()
        stream.next_step()
        processor = time.process_time() - began
        set_workers(stream, worker_count)
        stream.start(0, None)
        source = ReadAhead(stream, torch.device("cpu"))
        for _ in range(1 + worker_count):  # starting the loader's processes is no step's wait
            source.next_step()
        sleep = min(step_seconds, LONGEST_FAKE_STEP)
        time.sleep(sleep)
        windows = [_watch(source, sleep) for _ in range(self.rounds)]
        source.close()
        shares, waits = zip(*windows, strict=True)
        text = f"step of {1000 * step_seconds:.0f} ms planned on {card}, {worker_count} loader processes; "
        text += f"the data of a step take {1000 * processor:.0f} ms of one core; worst of {self.rounds} windows "
        text += f"{100 * max(shares):.1f}%{f'; {note}' if note else ''}"
        found = Row(self.part, name, statistics.median(shares), 0.02, unit="ms a step", note=text)
        found.ours = 1000 * statistics.median(waits)
        self.add(found)

    def startup(self, *arguments: str, script: str = "train.py") -> None:
        """Wall seconds from the command to the first logged step, and the memory at its peak then."""
        command_line = [sys.executable, str(ROOT / self.system / script), "--max-steps", "1", *arguments]
        seconds, memory = [], []
        for _ in range(self.rounds):
            with tempfile.TemporaryDirectory() as folder:
                spent, row = _first_step([*command_line, "--output-dir", folder], Path(folder))
            seconds.append(spent)
            memory.append(row.get("perf/memory_gb", 0.0))
        shown = " ".join((f"{self.system}/{script}", *arguments))
        self.add(Row(self.part, f"start-up to first step, {shown}", ours=statistics.median(seconds), unit="s"))
        self.add(Row(self.part, f"peak memory at the first step, {shown}", ours=statistics.median(memory), unit="GB"))


def _watch(source: Any, sleep: float) -> tuple[float, float]:
    """The share of one window's time spent waiting for steps, and the seconds of it a step."""
    steps, waited = max(3, min(100, round(STARVING_SECONDS / sleep))), 0.0
    began = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batches = source.next_step()
        waited += time.perf_counter() - asked
        del batches  # giving shared memory back is no waiting; beside a GPU the reading thread does it
        time.sleep(sleep)
    return waited / (time.perf_counter() - began), waited / steps


def planned_step(workload: Any, config: Any) -> tuple[float, str]:
    """Seconds of an optimizer step on the preset's card, and the card: its products at the planner's utilisation, and
    AdamW's memory.
    """
    config = config.model_copy(deep=True)
    config.run.gpu = config.run.gpu or PLANNED_GPU
    plan = workload.plan(config)
    optimizer_bytes = ADAMW_BYTES * plan.measured.trainable / plan.world
    return plan.seconds_per_step + optimizer_bytes / MEMORY_RATES[config.run.gpu], config.run.gpu


def set_workers(stream: Any, count: int) -> int:
    """Set the loader processes of a stream, or of the streams in it; returns what was set before."""
    parts = list(stream.streams.values()) if hasattr(stream, "streams") else [stream]
    before = parts[0].num_workers
    for part in parts:
        part.num_workers = count
    return before


def spent(job: Job) -> str:
    """What our time goes to, for a line that misses its bar."""
    import torch

    from scripts.bench.kernels import breakdown

    return f"ours: {breakdown(job, torch.device('cpu'))}"


def in_bf16(job: Job) -> Job:
    """The job under bf16 autocast on the CPU."""

    def run() -> None:
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16):
            job()

    return run


def training_step(model: Any, loss: Callable[[], Any], *, optimizer: Any = None) -> Job:
    """Forward, backward, and the optimizer's step where one is given; gradients are dropped first."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()
        if optimizer is not None:
            optimizer.step()

    return step


def _first_step(command_line: list[str], folder: Path) -> tuple[float, dict]:
    """Seconds until a metrics.jsonl below `folder` has a line, and that line; the process is ended then."""
    began = time.perf_counter()
    child = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while time.perf_counter() - began < START_LIMIT:
            for path in folder.rglob("metrics.jsonl"):
                if "\n" in (text := path.read_text()):
                    return time.perf_counter() - began, json.loads(text.partition("\n")[0])
            if child.poll() is not None:
                raise UserError(f"{' '.join(command_line)} ended before its first step: {child.stderr.read()[-300:]!r}")
            time.sleep(0.02)
        raise UserError(f"{' '.join(command_line)} made no step in {START_LIMIT:.0f} s")
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_benchmark(
    system: str, parts: dict[str, Callable[[Bench], None]], argv: list[str] | None, description: str | None
) -> list[Row]:
    """The main() of scripts/bench/SYSTEM.py: measure the chosen parts; --output writes them as JSON for the table."""
    options = load_config(BenchOptions, argv=argv, description=description)
    if unknown := [name for name in options.parts if name not in PARTS]:
        raise UserError(f"--parts {unknown[0]}: unknown; {system} has {', '.join(parts)}")
    import torch

    from shared.engine.dist import keep_freed_memory

    if options.gpu and not torch.cuda.is_available():
        raise UserError(NO_GPU)
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does; the peers gain as much
    bench = Bench(system, options)
    wanted = ["gpu"] if options.gpu else options.parts or [name for name in parts if name != "gpu"]
    for name in wanted:
        if name in parts:
            bench.part = name
            torch.manual_seed(0)
            parts[name](bench)
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(folder, {system: [{**asdict(row), "met": row.met} for row in bench.rows]})
    return bench.rows


NO_GPU = "--gpu needs a CUDA device and none was found; leave it out to measure on the CPU"


@command
def main(argv: list[str] | None = None) -> None:
    """Run every system's benchmark and join their tables."""
    options = load_config(BenchOptions, argv=argv, description=__doc__)
    found = find_systems(ROOT)
    if wrong := [name for name in options.system if name not in found]:
        raise UserError(f"--system {wrong[0]}: no scripts/bench/{wrong[0]}.py; there are {', '.join(found)}")
    if wrong := [name for name in options.parts if name not in PARTS]:
        raise UserError(f"--parts {wrong[0]}: unknown; there are {', '.join(PARTS)}")
    if options.gpu:
        import torch

        if not torch.cuda.is_available():
            raise UserError(NO_GPU)
    if options.output:
        check_output(options.output, folder=True)
    folder = Path(options.output or tempfile.mkdtemp(prefix="bench_"))
    folder.mkdir(parents=True, exist_ok=True)
    began, tables, failed = time.perf_counter(), {}, []
    for system in options.system or found:
        words = ["--rounds", str(options.rounds), *(["--gpu"] if options.gpu else [])]
        words += ["--parts", *options.parts] if options.parts else []
        part = folder / "systems" / system
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, str(ROOT / "scripts" / "bench" / f"{system}.py"), *words, "--output", str(part)]
        if subprocess.run(line, env=environment).returncode:
            failed.append(system)
        elif (part / "bench.json").exists():
            tables |= json.loads((part / "bench.json").read_text())["systems"]
    write_tables(folder, tables, minutes=(time.perf_counter() - began) / 60)
    if options.record:
        (ROOT / "scripts" / "BENCHMARKS.md").write_text((folder / "bench.md").read_text())
    print(f"wrote {folder / 'bench.md'} and {folder / 'bench.json'}")
    if failed:
        raise UserError(f"{', '.join(failed)}: the benchmark failed, see above; the table holds the others")


if __name__ == "__main__":
    main()
