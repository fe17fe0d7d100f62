"""Ranks: who am I, who decides, what do all agree on. Everything works with one process and no process group."""

import atexit
import contextlib
import ctypes
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from shared.errors import UserError

LAST_COLLECTIVE = 0.1  # seconds that a thread may take to drop it
STORE_SECONDS = 2.0  # that the ranks' common store may take to say who is late


@dataclass(frozen=True)
class DistInfo:
    """One rank's place in the run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    backend: str | None = None
    restart: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0


def init_distributed(device: str = "auto", timeout_seconds: float = 600) -> DistInfo:
    """Join the process group that torchrun describes in the environment, or stand alone.

    device: auto takes the GPU of this local rank where there is one. Raises UserError for a GPU that is not there.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        use_tf32(True)
    else:
        keep_freed_memory()
        atexit.register(shutdown)  # also after an error
    backend = None
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        if not torch_dist.is_initialized():
            torch_dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    return DistInfo(rank, world, local_rank, chosen, backend, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def use_tf32(allowed: bool) -> None:
    """Whether fp32 products and convolutions on a GPU may use TF32 (10 bits of mantissa, about eight times as fast).

    torch's default is no for products. It is set here for everything that runs on a GPU, frozen encoders and sampling
    included; a training sets it again from training.allow_tf32.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors up to 1 GiB instead of returning it to the system at every operation:
    each fresh page costs a fault, together a fifth of a small CPU step. Nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest


def background_thread(name: str) -> ThreadPoolExecutor:
    """One thread for work beside the training, which calculates on one core however many the training uses.

    Every thread that calculates gets a team of OpenMP threads of its own. As soon as there are more of them than cores,
    libgomp lets all of them sleep between two operations instead of waiting awake, for as long as the second team
    lives: on two cores the steps after the first checkpoint took 1.6 times as long.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix=name)
    training = torch.get_num_threads()
    thread.submit(torch.set_num_threads, 1).result()
    thread.submit(torch.get_num_threads).result()  # a thread's first look takes over what was set last, by any thread
    torch.set_num_threads(training)
    return thread


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: not a device; use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda":
        index = chosen.index if chosen.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {device}: GPU {index} wanted, {torch.cuda.device_count()} found; "
                "use --device cpu or fewer processes"
            )
        chosen = torch.device("cuda", index)
    return chosen


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return torch_dist.is_available() and torch_dist.is_initialized() and torch_dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        gather_objects(None)  # objects travel over gloo on any device


def new_gloo_group() -> Any:
    """A group of all ranks for another thread than the main one; None where there are no others."""
    return torch_dist.new_group(backend="gloo") if is_distributed() else None


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The value of every rank, in rank order, on every rank. Small picklable things only."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value, group)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def max_over_ranks(value: float) -> float:
    """The largest value over the ranks."""
    if not is_distributed():
        return value
    box = torch.tensor(value, dtype=torch.float64)
    torch_dist.all_reduce(box, op=torch_dist.ReduceOp.MAX)
    return box.item()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks of a tensor without gradient; the input is not changed."""
    total = value.detach().clone()
    if is_distributed():
        torch_dist.all_reduce(total)
    return total


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean over ranks of named numbers; every rank gives the same names."""
    if not is_distributed() or not values:
        return dict(values)
    names = sorted(values)
    total = sum_over_ranks(torch.tensor([values[name] for name in names], dtype=torch.float64))
    return dict(zip(names, (total / torch_dist.get_world_size()).tolist(), strict=True))


def same_on_all_ranks(value: Any, what: str) -> None:
    """Raise a UserError on every rank, which names the first one whose value is not rank 0's."""
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"rank {rank} has other {what} than rank 0 ({other} instead of {values[0]}); start every node with the "
                "same command, code and data"
            )


def same_settings_on_all_ranks(facts: dict[str, Any]) -> None:
    """Raise a UserError on every rank that names each fact in which a rank differs from rank 0."""
    first = from_main(facts)
    names = [name for name in {**first, **facts} if first.get(name) != facts.get(name)]
    found = [f"{name} is {facts.get(name)!r} instead of {first.get(name)!r}" for name in names]
    for rank, differing in enumerate(gather_objects(found)):
        if differing:
            raise UserError(
                f"rank {rank} has other settings than rank 0: {'; '.join(differing[:12])}; start every node with the "
                "same command, code and libraries"
            )


def raise_together(error: Exception | None, group: Any = None) -> None:
    """Raise on every rank when any rank met an error, so that none waits for the others."""
    texts = gather_objects(None if error is None else f"{type(error).__name__}: {error}", group)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if not failed:
        return
    if error is not None:
        raise error
    raise UserError(f"stopped because another rank failed: {'; '.join(failed)}")


def heartbeat(step: int, phase: int = 0) -> None:
    """Leave a sign of life in the ranks' common store: which step, and which part of it."""
    if is_distributed():
        store = torch_dist.distributed_c10d._get_default_store()
        store.set(f"beat/{torch_dist.get_rank()}", f"{step} {phase} {time.time()}")


@contextlib.contextmanager
def naming_late_ranks() -> Iterator[None]:
    """Add to an error of a collective, such as a timeout, which rank gave its last sign of life where."""
    try:
        yield
    except RuntimeError as error:
        late = _in_time(_late_ranks) if is_distributed() else ""
        if late is None:
            late = "the ranks' common store does not answer: the first node, or the network to it, is gone"
        if not late:
            raise
        raise RuntimeError(f"{error}\n{late}") from error


def _in_time(ask: Callable[[], str]) -> str | None:
    """The answer, or None when it takes longer than STORE_SECONDS: what words an error must not wait for ever."""
    answers: list[str] = []

    def answer() -> None:
        with contextlib.suppress(RuntimeError):  # a store that is gone
            answers.append(ask())

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(STORE_SECONDS)
    return answers[0] if answers else None


def _late_ranks() -> str:
    store, world = torch_dist.distributed_c10d._get_default_store(), torch_dist.get_world_size()
    beats = {}
    for rank in range(world):
        if store.check([f"beat/{rank}"]):
            step, phase, moment = store.get(f"beat/{rank}").decode().split()
            beats[rank] = (int(step), int(phase), float(moment))
    furthest = max((beat[:2] for beat in beats.values()), default=(0, 0))
    late = [
        f"rank {rank} is late: its last sign of life was at step {step}, {time.time() - moment:.0f} s ago"
        for rank, (step, phase, moment) in beats.items()
        if (step, phase) < furthest
    ]
    return "; ".join(late)


def shutdown() -> None:
    """Leave the process group, and let its threads drop their last collective: one that still asks for Python's lock
    when the interpreter ends aborts the process, and FSDP's and ZeRO's groups keep theirs till then.
    """
    if torch_dist.is_available() and torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        time.sleep(LAST_COLLECTIVE)


# When to stop: a signal or the time limit. The loop agrees on the flag over ranks and saves before it leaves.


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopFlag:
    """Context that makes SIGTERM, SIGINT, SIGHUP, SIGUSR1 or the time limit a reason to stop; a second SIGINT raises.

    There is one flag a process: a signal that comes in the last save of one phase stops the next one before its first
    step. The time limit counts from start_clock(), for all phases together.
    """

    pending: ClassVar[str | None] = None  # the signal on which no run has acted yet
    clock: ClassVar[float | None] = None

    def __init__(self, time_limit_minutes: float | None = None):
        began = time.monotonic() if StopFlag.clock is None else StopFlag.clock
        self.deadline = None if time_limit_minutes is None else began + 60 * time_limit_minutes
        self._before: dict = {}

    @classmethod
    def start_clock(cls) -> None:
        """The time limit counts from now on."""
        cls.clock = time.monotonic()

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            # nohup has SIGHUP ignored, and means it
            numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if StopFlag.pending is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        StopFlag.pending = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if StopFlag.pending is not None:
            return StopFlag.pending
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "the time limit"
        return None
