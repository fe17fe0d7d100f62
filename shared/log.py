"""Console line, train.log, metrics.jsonl, and on request TensorBoard and Weights & Biases. Only rank 0 writes."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.config import RunSection
from shared.engine.dist import DistInfo, mean_over_ranks, sum_over_ranks
from shared.errors import UserError, write_text

if TYPE_CHECKING:
    from tqdm import tqdm

TIME_BINS = 10  # bins of a loss over t in [0, 1]


class RunLog:
    """The run's writer. Numbers of a window are added up on the device and read once per log line."""

    def __init__(
        self, output_dir: Path, run: RunSection, info: DistInfo, *, resume_step: int = 0, settings: dict | None = None
    ):
        self.output_dir, self.info = output_dir, info
        self.file = self.metrics = self.board = self.wandb = None
        if info.is_main:
            output_dir.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(output_dir / "metrics.jsonl", resume_step)
            self.file = open(output_dir / "train.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            self.metrics = open(output_dir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            self.board = _tensorboard(output_dir, resume_step) if run.tensorboard else None
            self.wandb = _wandb(output_dir, run, settings or {}) if run.wandb else None
        self.bar: tqdm | None = None
        self.has_console = True
        self._start_window()

    def start_bar(self, step: int, last_step: int) -> None:
        """A progress bar below the lines, where a person watches a terminal."""
        if self.info.is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=last_step, initial=step, unit="step", dynamic_ncols=True, leave=False)

    def step_done(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """One line to the console and train.log."""
        if self.file is not None:
            try:
                if self.bar is not None:
                    self.bar.write(text)
                elif self.has_console:
                    print(text, flush=True)
            except OSError:  # closed, as by `| head`, or full: training and train.log go on
                self.has_console = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    # --- the window between two log lines -----------------------------------------------------------------------------

    def _start_window(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.bins: dict[str, Tensor] = {}
        self.started, self.waited = time.perf_counter(), 0.0

    def add(self, values: dict) -> None:
        """Numbers or scalar tensors to average over the window; a pair (t_B, error_B) is averaged in 10 bins of t."""
        for name, value in values.items():
            if isinstance(value, tuple):
                self._add_bins(name, *value)
                continue
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def _add_bins(self, name: str, t_B: Tensor, error_B: Tensor) -> None:
        index_B = (t_B.detach().float() * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        table = self.bins.setdefault(name, torch.zeros(2, TIME_BINS, device=t_B.device))
        table[0].index_add_(0, index_B, error_B.detach().float().flatten())
        table[1].index_add_(0, index_B, torch.ones_like(index_B, dtype=torch.float32))

    def speed(self, micro_steps: int, samples_per_step: int) -> dict[str, float]:
        """This rank's speed and memory in the window so far; micro_steps of one optimizer step."""
        elapsed, steps = time.perf_counter() - self.started, self.counts["train/micro_loss"] // micro_steps
        found = {
            "perf/samples_per_second": steps * samples_per_step / elapsed,
            "perf/seconds_per_step": elapsed / steps,
            "perf/data_wait_share": self.waited / elapsed,
            "perf/memory_gb": memory_gb(self.info.device),
        }
        if self.info.device.type == "cuda":
            found["gpu/memory_allocated_gb"] = torch.cuda.memory_allocated(self.info.device) / 1e9
            found["gpu/memory_reserved_gb"] = torch.cuda.memory_reserved(self.info.device) / 1e9
        return found

    def close_window(self) -> dict[str, float]:
        """The window's means over steps and ranks; starts the next window. A collective."""
        means = mean_over_ranks({name: float(value) / self.counts[name] for name, value in self.sums.items()})
        for name, table in self.bins.items():
            total, count = sum_over_ranks(table).tolist()
            means.update({f"{name}_{i}": total[i] / count[i] for i in range(TIME_BINS) if count[i]})
        self._start_window()
        return means

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, `step` first; a number that is not finite is written as null."""
        if self.metrics is None:
            return
        clean = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        self.metrics.write(json.dumps({"step": step, **clean}) + "\n")
        if self.board is not None:
            for name, value in clean.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({"step": step, **clean})

    def reopen(self) -> None:
        """Begin the two log files again where somebody removed them."""
        if self.file is not None and self.metrics is not None:
            self.file.close()
            self.metrics.close()
            self.file = open(self.output_dir / "train.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            self.metrics = open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            self.say("the output folder was removed while the run wrote to it; its log begins again here")

    def close(self) -> None:
        """Close every file."""
        for item in (self.bar, self.file, self.metrics, self.board):
            if item is not None:
                item.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in GB: the GPU's, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _drop_lines_after(path: Path, step: int) -> None:
    """A resumed run writes the lines after its checkpoint again."""
    if path.exists():
        rows = [row for row in read_metrics(path) if row.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _tensorboard(output_dir: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs the package tensorboard: pip install tensorboard; or use --no-tensorboard"
        ) from None
    return SummaryWriter(str(output_dir), purge_step=resume_step + 1 if resume_step else None)


def _wandb(output_dir: Path, run: RunSection, settings: dict):
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb; or use --no-wandb") from None
    mark = output_dir / "wandb_run_id"
    run_id = mark.read_text().strip() if mark.exists() else wandb.util.generate_id()
    mark.write_text(run_id)
    folder = Path(os.environ.get("WANDB_DIR") or output_dir)  # wandb lets what it is told here win over its variable
    folder.mkdir(parents=True, exist_ok=True)  # one that is not there it takes for one that cannot be written to
    return wandb.init(
        project=run.wandb_project, name=run.run_name, id=run_id, resume="allow", dir=str(folder), config=settings
    )


# TensorBoard files that follow a metrics.jsonl.


class Board:
    """Copies the new lines of a metrics file into event files. Off: does nothing, and needs no tensorboard."""

    def __init__(self, folder: Path, metrics: Path, enabled: bool):
        self.metrics, self.position, self.writer = metrics, 0, None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                from shared.errors import UserError

                raise UserError(
                    "TensorBoard files need the package tensorboard: pip install tensorboard; or use --no-tensorboard"
                ) from None
            last = _last_step(metrics)
            self.writer = SummaryWriter(str(folder), purge_step=last + 1 if last else None)
            self.position = metrics.stat().st_size if metrics.exists() else 0

    def update(self) -> None:
        """Take in the lines that were added."""
        if self.writer is None or not self.metrics.exists():
            return
        if self.metrics.stat().st_size < self.position:  # a resumed run cut the file back to its checkpoint
            self.position = 0
        with open(self.metrics, "rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.position += len(line)
                row = json.loads(line)
                for name, value in row.items():
                    if name != "step" and isinstance(value, int | float):
                        self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Take in the rest and close."""
        self.update()
        if self.writer is not None:
            self.writer.close()


def _last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]
    return max(steps, default=0)
