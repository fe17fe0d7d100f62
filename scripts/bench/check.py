"""Ten minutes on one GPU: is a step of each system right there, and how much of the card does it use?

    bash scripts/gpu_check.sh [--device cuda] [--output DIR] [--minutes 10] [--system dit float] [--toy]

First the same step on the CPU and on the device, in fp32 and in bf16: losses and gradients must agree. Then, system by
system at full size: the share of the matrix peak measured on the same card, peak memory next to what the dry run
plans, the three largest kinds of kernel, with and without compilation. What is done is kept in DIR/gpu_check.json, so
that the same command goes on where a time limit cut it. --toy takes the small presets, for a CPU.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import importlib
import json
import time
from collections.abc import Callable
from typing import Any

from scripts.bench.bench import Bench, BenchOptions
from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command, write_text

SYSTEMS = ("dit", "opens2v", "bagel", "float", "multimodal")  # the dearest question first
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 5e-2}  # of the loss and of the gradient, against fp32 on the CPU
TOY_SIDE = 512  # of the matrix product that stands for the peak of a CPU


class CheckOptions(Section):
    """What to check."""

    device: str = setting("cuda", "cuda, cuda:N, or cpu with --toy")
    output: str = setting("outputs/gpu_check", "folder for gpu_check.json and gpu_check.md")
    minutes: float = setting(10.0, "start no further part after this many minutes", gt=0)
    system: list[str] = setting([], "systems; none: all")
    toy: bool = setting(False, "the small presets and a small matrix product: runs on a CPU in a minute")
    rounds: int = setting(5, "timed rounds of every step", ge=1)


def seeded_on_the_cpu(seed: int, device: Any) -> Any:
    """A context in which torch.randn and the like draw on the CPU, from `seed`, and hand over a copy on `device`.

    So two devices see the same inputs.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    generator = torch.Generator().manual_seed(seed)

    class Drawn(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            named = dict(named or {})
            if function in (torch.randn, torch.rand, torch.randint, torch.randperm):
                named.pop("device", None)
                return function(*arguments, **named, generator=generator, device="cpu").to(device)
            return function(*arguments, **named)

    return Drawn()


def one_step(workload: Any, config: Any, device: Any, precision: str) -> tuple[float, dict[str, Any]]:
    """Loss and fp32 gradients by name of one micro-step, from the same weights and inputs on every device."""
    import torch

    torch.manual_seed(0)
    model = workload.build(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # zero weights would hide what lies behind them
            torch.nn.init.trunc_normal_(parameter.data, std=0.02)
    model.to(device).train()
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.device(device), seeded_on_the_cpu(1, device), half:
        loss = workload.step(config)(model)
    loss.backward()
    gradients = {
        name: parameter.grad.float().cpu() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return float(loss.detach()), gradients


def compare(workload: Any, config: Any, device: Any) -> list[dict[str, Any]]:
    """For fp32 (without TF32) and bf16: relative error of the loss and of the gradient against fp32 on the CPU."""
    import torch

    from shared.engine.dist import use_tf32

    use_tf32(False)
    expected, wanted = one_step(workload, config, torch.device("cpu"), "fp32")
    rows = []
    for precision, limit in LARGEST_ERROR.items():
        loss, found = one_step(workload, config, device, precision)
        if found.keys() != wanted.keys():
            raise UserError(f"other weights have a gradient on {device} in {precision} than on the CPU")
        difference = sum((found[name] - wanted[name]).square().sum().item() for name in wanted) ** 0.5
        norm = sum(value.square().sum().item() for value in wanted.values()) ** 0.5
        errors = {"loss": abs(loss - expected) / abs(expected), "gradient": difference / norm}
        rows.append({"precision": precision, **errors, "limit": limit, "met": max(errors.values()) <= limit})
    use_tf32(True)
    return rows


def measure(system: str, options: CheckOptions, device: Any, peak: float) -> list[dict[str, Any]]:
    """Share of the peak, milliseconds, memory and kernels of the system's step, with and without compilation."""
    module = importlib.import_module(f"scripts.bench.{system}")
    bench = Bench(system, BenchOptions(rounds=options.rounds))
    bench.part = "gpu"
    if options.toy:
        from scripts.bench.gpu import utilisation

        config = module.settings("small")
        utilisation(
            bench, f"{system} small", module.workload(config), config, device=device, peak=peak, compiled=(False,)
        )
    else:
        module.gpu(bench)
    return [
        {"name": row.name, "share": row.ratio, "bar": row.bar, "met": row.met, "ms": row.ours, "note": row.note}
        for row in bench.rows
    ]


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# GPU check: {found['device']}", "", "| step against fp32 on the CPU | loss | gradient | limit | |"]
    lines.append("|---|---|---|---|---|")
    parts = found["parts"]
    for key, rows in parts.items():
        if key.startswith("right "):
            for row in rows:
                verdict = "met" if row["met"] else "MISSED"
                cells = [f"{key[6:]} {row['precision']}", f"{row['loss']:.1e}", f"{row['gradient']:.1e}"]
                lines.append(f"| {' | '.join(cells)} | {row['limit']:g} | {verdict} |")
    lines += ["", "| step | ms | share of the matrix peak | bar | |", "|---|---|---|---|---|"]
    for key, rows in parts.items():
        if key.startswith("speed "):
            for row in rows:
                verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
                bar = "" if row["bar"] is None else f"{row['bar']:g}"
                lines.append(
                    f"| {row['name']} | {row['ms']:.4g} | {row['share']:.3f} | {bar} | {verdict} {row['note']} |"
                )
    return "\n".join(lines) + "\n"


@command
def main(argv: list[str] | None = None) -> None:
    """Run what is not in the output folder yet, part by part, and write the table after each."""
    options = load_config(CheckOptions, argv=argv, description=__doc__)
    if wrong := [name for name in options.system if name not in SYSTEMS]:
        raise UserError(f"--system {wrong[0]}: unknown; there are {', '.join(SYSTEMS)}")
    if options.device == "cpu" and not options.toy:
        raise UserError("--device cpu works with --toy only: the full sizes need a GPU")
    check_output(options.output, folder=True)
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"--device {options.device}: no CUDA device was found; use --device cpu --toy to try the script"
        )
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, toy size"
    place = Path(options.output) / "gpu_check.json"
    found: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {"device": name, "parts": {}}
    if found["device"] != name:
        raise UserError(f"{place} holds the results of {found['device']}, this is {name}; give another --output")
    began = time.perf_counter()
    wanted = options.system or list(SYSTEMS)
    parts: dict[str, Callable[[], list]] = {}
    for system in wanted:
        parts[f"right {system}"] = lambda system=system: _right(system, device)
    for system in wanted:
        parts[f"speed {system}"] = lambda system=system: measure(system, options, device, _peak(found, options, device))
    for key, part in parts.items():
        if key in found["parts"]:
            continue
        if time.perf_counter() - began > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; the same command goes on with: {key}")
            break
        print(f"{key} ...", flush=True)
        found["parts"][key] = part()
        write_text(place, json.dumps(found, indent=1) + "\n")
        write_text(place.with_suffix(".md"), table(found))
    print(table(found))
    print(f"wrote {place} and {place.with_suffix('.md')}")
    wrong = [
        key for key, rows in found["parts"].items() if key.startswith("right ") and not all(r["met"] for r in rows)
    ]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: the step differs from the CPU's by more than its limit, see the table")


def _right(system: str, device: Any) -> list[dict[str, Any]]:
    module = importlib.import_module(f"scripts.bench.{system}")
    config = module.settings("small")
    return compare(module.workload(config), config, device)


def _peak(found: dict[str, Any], options: CheckOptions, device: Any) -> float:
    """FLOP/s of the largest matrix product, measured once."""
    from scripts.bench.gpu import matrix_peak

    if "peak" not in found:
        found["peak"] = matrix_peak(device, TOY_SIDE if options.toy else 8192)
    return found["peak"]


if __name__ == "__main__":
    main()
