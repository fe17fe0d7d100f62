"""Averages of the weights by power functions, whose length is chosen after training (Karras et al. 2024, 2312.02696).

An average of exponent g weighs the weights after update k of n by (k^(g+1) - (k-1)^(g+1)) / n^(g+1): it grows with the
run, and its length, the spread of that profile over n, stays the same share of it. Training keeps two of them and
writes both out every so often (OUT/averages). Any other length is then the sum of those snapshots whose profile is
nearest to the wanted one, by least squares.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dit.config import POWER_LENGTHS
from shared.engine.checkpoint import read_manifest, read_weights_file
from shared.errors import UserError, written_aside

FOLDER, RUNNING = "averages", "averages.safetensors"  # in the run's output, and in each of its checkpoints
SNAPSHOTS = 16  # over the planned steps
BINS = 10_000  # in which profiles are compared


def exponent(length: float) -> float:
    """The exponent whose profile spreads over `length` of the run (0 to 0.28; 0.05 and 0.1 give 16.97 and 6.94)."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def profile(updates: int, exponent: float, last: int) -> np.ndarray:
    """What the weights after each update up to `last` count for in an average after `updates`: they add up to 1.
    Where there are more than BINS updates, those of neighbours are added up.
    """
    edges = np.linspace(0, last, min(last, BINS) + 1)
    return np.diff(np.minimum(edges / updates, 1.0) ** (exponent + 1))


def combination(stored: list[tuple[int, float]], length: float, last: int) -> np.ndarray:
    """Factors on stored averages (updates, exponent), in the sense of least squares of their profiles, that make the
    average of another length after update `last`.
    """
    columns = np.stack([profile(updates, power, last) for updates, power in stored], axis=1)
    return np.linalg.lstsq(columns, profile(last, exponent(length), last), rcond=1e-10)[0]


class PowerAverages:
    """The two averages that training keeps, 8 bytes a parameter on every rank. Written by rank 0."""

    def __init__(self, model: nn.Module, output_dir: Path, *, planned: int, writes: bool) -> None:
        self.output_dir, self.planned, self.writes = output_dir, planned, writes
        self.exponents = [exponent(length) for length in POWER_LENGTHS]
        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.values = [{name: value.clone() for name, value in trained.items()} for _ in self.exponents]
        self.updates: int | None = None  # None until the first call, before which the loop resumes

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step `step`, counted from 0; a snapshot where one is due."""
        trained = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
        if self.updates is None:
            self._go_on(trained, step)
        self.updates = step + 1
        for values, power in zip(self.values, self.exponents, strict=True):
            share = 1 - (1 - 1 / self.updates) ** (power + 1)
            torch._foreach_lerp_(list(values.values()), [trained[name] for name in values], share)
        every = max(1, self.planned // SNAPSHOTS)
        if self.writes and (self.updates % every == 0 or self.updates == self.planned):
            self.save(self.output_dir / FOLDER / f"step_{self.updates:08d}.safetensors")

    def save(self, path: Path) -> None:
        """Both averages, and after how many updates."""
        tensors = {
            f"{row}.{name}": v.cpu().contiguous() for row, kept in enumerate(self.values) for name, v in kept.items()
        }
        with written_aside(path) as temporary:
            save_file(
                tensors,
                temporary,
                metadata={"updates": str(self.updates or 0), "exponents": json.dumps(self.exponents)},
            )

    def _go_on(self, trained: dict[str, Tensor], step: int) -> None:
        """Before the first step of this process: the averages of the checkpoint that the loop resumed from; snapshots
        of later steps, of a run that was given up, go.
        """
        if self.writes:
            for updates, _, path in snapshots(self.output_dir):
                if updates > step:
                    path.unlink()
        if step == 0:
            return
        for folder in sorted((self.output_dir / "checkpoints").glob("*")):
            if (folder / RUNNING).is_file() and read_manifest(folder)["step"] == step:
                stored = read_weights_file(folder / RUNNING)
                for row, values in enumerate(self.values):
                    for name, value in values.items():
                        value.copy_(stored[f"{row}.{name}"])
                return
        if self.writes:
            print(f"warning: no power averages of step {step}: they begin there, from its weights", file=sys.stderr)
        for values in self.values:
            for name, value in values.items():
                value.copy_(trained[name])


def snapshots(run: Path) -> list[tuple[int, list[float], Path]]:
    """(updates, exponents, file) of a run's snapshots, oldest first."""
    return [described(path) for path in sorted((run / FOLDER).glob("step_*.safetensors"))]


def described(path: Path) -> tuple[int, list[float], Path]:
    """(updates, exponents, file) of a file of PowerAverages."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes: dict[str, Any] = file.metadata()
    return int(notes["updates"]), json.loads(notes["exponents"]), path


def averaged_to(length: float, folder: Path, run: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint's folder, averaged to a length after training, from its run's snapshots and its own.

    Raises UserError where there are none.
    """
    own = [described(folder / RUNNING)] if (folder / RUNNING).is_file() else []
    kept = snapshots(run)
    last = own[0][0] if own else max((updates for updates, _, _ in kept), default=0)
    files = own + [entry for entry in kept if entry[0] < last or not own]
    if not files:
        raise UserError(
            f"--ema-length {length}: {folder} keeps no power averages; train with --power-ema, or leave it out"
        )
    stored = [(updates, power) for updates, powers, _ in files for power in powers]
    factors = iter(combination(stored, length, last))
    found: dict[str, Tensor] = {}
    for _, powers, path in files:
        tensors = read_weights_file(path)
        for row in range(len(powers)):
            factor = float(next(factors))
            for name in [name for name in tensors if name.startswith(f"{row}.")]:
                key, part = name.partition(".")[2], factor * tensors[name].double()
                found[key] = found[key] + part if key in found else part
    return {name: value.float() for name, value in found.items()}
