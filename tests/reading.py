"""Run by test_reading.py: a system's small run up to one of its trainings, whose first step then runs on the meta
device. Nothing can be read from there, so a step that goes through needs no number from a GPU either. Copies that the
host would wait for are counted: from host memory to the device, not from pinned memory in the background.

    reading.py SYSTEM NUMBER_OF_THE_TRAINING FOLDER [options of train.py]
"""

import contextlib
import importlib
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from shared import loop  # noqa: E402
from shared.data import to_device  # noqa: E402
from shared.engine.dist import DistInfo  # noqa: E402

META = torch.device("meta")
SYSTEMS = ("bagel", "dit", "float", "multimodal", "opens2v")


class Reached(Exception):
    """The step was made."""


def move(holder: Any, seen: set[int]) -> None:
    """Modules, tensors and devices that an object of a system holds, to the meta device."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    for name, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else ():
        if isinstance(value, nn.Module):
            value.to(META)
        elif isinstance(value, Tensor):
            setattr(holder, name, value.to(META))
        elif isinstance(value, torch.device):
            object.__setattr__(holder, name, META)
        elif isinstance(value, DistInfo) or type(value).__module__.split(".")[0] in SYSTEMS:
            move(value, seen)


class Copies(TorchDispatchMode):
    """Counts, by the line that asks for them, blocking copies from host memory to the device."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        result = function(*arguments, **named)
        name = function.overloadpacket
        if name in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and isinstance(result, Tensor) and result.is_meta:
            source = arguments[1] if name is torch.ops.aten.copy_ else arguments[0]
            waits = not (arguments[2] if len(arguments) > 2 else named.get("non_blocking", False))
            if source.device.type == "cpu" and source.ndim and waits:
                frames = [
                    f for f in traceback.extract_stack() if "/tests/" not in f.filename and ".venv" not in f.filename
                ]
                self.found[f"{frames[-1].filename}:{frames[-1].lineno}"] += 1
        return result


def first_step(*, model: nn.Module, stream: Any, losses: Any, **_: Any) -> None:
    """In place of fit(): one step on the meta device."""
    stream.start(0, None)
    batches = [to_device(batch, META) for batch in stream.next_step()]
    seen: set[int] = set()
    if hasattr(losses, "__self__"):
        move(losses.__self__, seen)
    for cell in getattr(losses, "__closure__", None) or ():  # a training whose objective is a function
        move(cell.cell_contents, seen)
    model.to(META).train()
    unwrapped = SimpleNamespace(module=model, model=model, autocast=contextlib.nullcontext)
    with Copies() as copies:
        for loss, _ in losses(loop.TrainedModel(unwrapped), batches, 0):
            loss.backward()
    print(f"blocking copies: {copies.found.total()}", *copies.found.items(), sep="\n")
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters() if p.requires_grad)
    raise Reached


def main(system: str, number: str, folder: str, *options: str) -> None:
    """Go through the trainings before it with one step each, then make its first step on the meta device."""
    before, whole = [int(number)], loop.fit

    def fit(**named: Any) -> Any:
        if before[0] == 0:
            return first_step(**named)
        before[0] -= 1
        planned = loop.plan_steps(named["config"].training, named["stream"])
        named["config"].training.total_steps = 1
        result = whole(**{**named, "validate": None, "sample": None})
        result.step = planned
        return result

    loop.fit = fit
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # it does not know the meta device
    try:
        importlib.import_module(f"{system}.train").main(["--config", "small", "--output-dir", folder, *options])
    except Reached:
        print("no number was read")


if __name__ == "__main__":
    main(*sys.argv[1:])
