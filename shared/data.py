"""Which sample comes when: order as a pure function of (seed, epoch), the same for any number of ranks and workers."""

import contextlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from shared.engine.dist import DistInfo, background_thread, gather_objects
from shared.errors import BadSample, UserError
from shared.rng import keyed_generator, keyed_seed

MAX_BAD_SHARE = 0.01  # training stops when more of the data cannot be read
LEAST_SHARED = 1 << 20  # bytes of /dev/shm, for loader processes
SMALL = 1 << 16  # bytes of a tensor that loader processes send by value
MOST_REPEATS = 1000  # of a data set in one optimizer step
SUBSTITUTES = 20  # how many other samples are tried instead of a broken one
STEPS_AHEAD = 2  # read while a step is computed; one that comes late is then made up for by the next
_ORDER, _SUBSTITUTE = 101, 102  # random streams


@dataclass(frozen=True, slots=True)
class SampleKey:
    """One place in the global batch of one step.

    The slot keys what is drawn for the sample in this step (noise, times, dropped conditions; shared/rng.py): one rank
    and N ranks give the sample in a slot the same draw, and a resumed step the same again.
    """

    index: int  # sample in the dataset
    epoch: int
    slot: int  # position in the step's global batch, 0 .. global_batch - 1


@dataclass(frozen=True)
class BatchPlan:
    """Cuts the epochs' permutations into steps, micro-steps and ranks.

    The global batch of a step is a contiguous slice of the order, so one rank and N ranks see the same samples in a
    step when batch_size x world x accumulation is the same. drop_last leaves out the tail of each epoch; otherwise a
    batch runs on into the next epoch, and a set smaller than one batch repeats.
    """

    num_samples: int
    batch_size: int
    world: int = 1
    accumulation: int = 1
    seed: int = 0
    drop_last: bool = True
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError("the data set is empty; check its path and split")
        if self.global_batch > max(MOST_REPEATS * self.num_samples, 10_000):
            raise UserError(
                f"one optimizer step would take {self.global_batch} samples, the data set has {self.num_samples}; use "
                "a smaller --batch-size or less accumulation"
            )
        if self.drop_last and self.num_samples < self.global_batch:
            raise UserError(
                f"the data set has {self.num_samples} samples, one optimizer step takes {self.global_batch} "
                f"(batch_size {self.batch_size} x {self.world} ranks x {self.accumulation} micro-steps); "
                "use a smaller --batch-size, fewer ranks or less accumulation"
            )

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.batch_size * self.world * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that cover the data once (rounded up without drop_last)."""
        whole, rest = divmod(self.num_samples, self.global_batch)
        return whole + (rest > 0 and not self.drop_last)

    def keys(self, step: int, micro: int, rank: int) -> list[SampleKey]:
        """The samples of one rank in one micro-step."""
        first_slot = (micro * self.world + rank) * self.batch_size
        return [self._key(step, slot) for slot in range(first_slot, first_slot + self.batch_size)]

    def indices(self, step: int, micro: int, rank: int) -> list[int]:
        """The dataset indices of `keys`."""
        return [key.index for key in self.keys(step, micro, rank)]

    def _key(self, step: int, slot: int) -> SampleKey:
        length = self.steps_per_epoch * self.global_batch if self.drop_last else self.num_samples
        epoch, position = divmod(step * self.global_batch + slot, length)
        return SampleKey(int(self._order(epoch)[position]), epoch, slot)

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        cache = self.__dict__.setdefault("_orders", {})
        if epoch not in cache:
            while len(cache) > 1:  # a batch touches at most a few epochs; the newest two are enough
                cache.pop(min(cache))
            cache[epoch] = self._shuffled(epoch)
        return cache[epoch]

    def _shuffled(self, epoch: int) -> Tensor:
        """The order of an epoch; a system with an order of its own gives it here."""
        return torch.randperm(self.num_samples, generator=keyed_generator(self.seed, _ORDER, epoch))


class Stream(Protocol):
    """What the loop reads from, ahead in a thread; the place of a dataloader. MapStream is one; a system with packing
    writes its own.
    """

    steps_per_epoch: int | None
    samples_per_step: int  # over all ranks
    fingerprint: str | None  # stands for the list of samples; a resumed run must have the same

    def start(self, step: int, state: dict | None) -> None:
        """Go to the batches of optimizer step `step`; `state` is what state() returned there, None at step 0."""

    def next_step(self) -> list[Any]:
        """The micro-batches of this rank for one optimizer step."""
        ...

    def state(self) -> dict:
        """What a resumed run needs beyond the step: JSON-able, the same on all ranks."""
        ...

    def agree(self) -> None:
        """Count over all ranks what could not be read, and raise when it is too much; a collective."""

    def close(self) -> None:
        """End the processes that read."""


@runtime_checkable
class Augmented(Protocol):
    """A dataset whose samples depend on the epoch too."""

    def sample(self, index: int, epoch: int) -> dict:
        """The sample as this epoch shows it, a function of (index, epoch) alone."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A dataset that says which samples it holds."""

    fingerprint: str | None


class _KeyedDataset(Dataset):
    """Fetches by SampleKey; puts another sample in the place of one that cannot be read, chosen by key."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: SampleKey) -> tuple[dict | Exception, int, list]:
        try:
            return self._fetch(key)
        except (UserError, OSError) as error:  # handed over as it is: a loader process would wrap it in its traceback
            return error, key.slot, []

    def _fetch(self, key: SampleKey) -> tuple[dict, int, list]:
        bad: list[tuple[int, str]] = []
        index = key.index
        for attempt in range(SUBSTITUTES):
            try:
                keyed = isinstance(self.dataset, Augmented)
                item = self.dataset.sample(index, key.epoch) if keyed else self.dataset[index]
                return item, key.slot, bad
            except BadSample as error:
                bad.append((index, str(error)))
                index = keyed_seed(self.seed, _SUBSTITUTE, key.epoch, key.index, attempt) % len(self.dataset)
        last = _NO_NAME.sub("the file", bad[-1][1])
        raise UserError(f"{SUBSTITUTES} samples in a row cannot be read; the last: {last}; check the data folder")


class _Collate:
    """The system's collate, plus the slots and the list of broken samples."""

    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, fetched: list[tuple[dict | Exception, int, list]]) -> tuple[dict | Exception, list]:
        failed = next((item for item, _, _ in fetched if isinstance(item, Exception)), None)
        if failed is not None:
            return failed, []
        batch = self.collate([item for item, _, _ in fetched if isinstance(item, dict)])
        batch["slot"] = torch.tensor([slot for _, slot, _ in fetched])
        return batch, [entry for _, _, bad in fetched for entry in bad]


class _KeyBatches:
    """The endless list of this rank's micro-batches from one step on (a batch sampler)."""

    def __init__(self, plan: BatchPlan, rank: int, first_step: int):
        self.plan, self.rank, self.first_step = plan, rank, first_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self.first_step
        while True:
            for micro in range(self.plan.accumulation):
                yield self.plan.keys(step, micro, self.rank)
            step += 1


_NO_NAME = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")  # what Pillow calls bytes from a shard


class BadSamples:
    """The samples that could not be read: listed in a file, one JSON object a line, and counted over all ranks.

    Raises a UserError when they exceed MAX_BAD_SHARE of `total` samples; one is always allowed.
    """

    def __init__(self, path: Path | None, total: int):
        self.path, self.total = path, total
        self.reasons: dict[int, str] = {}

    def note(self, found: list[tuple[int, str]]) -> None:
        """Take in (index, reason) of samples that were passed over."""
        new = {index: _NO_NAME.sub("the file", reason) for index, reason in found if index not in self.reasons}
        self.reasons.update(new)
        if new and self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"index": index, "reason": reason}, ensure_ascii=False) + "\n"
                    for index, reason in new.items()
                )
        self._refuse_too_many()

    def agree(self) -> None:
        """Count those of all ranks together, since each rank meets its own; a collective."""
        for found in gather_objects(dict(self.reasons)):  # a copy: the thread that reads ahead may add to them
            self.reasons.update(found)
        self._refuse_too_many()

    def _refuse_too_many(self) -> None:
        if len(self.reasons) > max(1, MAX_BAD_SHARE * self.total):
            raise UserError(
                f"{len(self.reasons)} of {self.total} samples cannot be read, more than {MAX_BAD_SHARE:.0%}; "
                f"the last: {list(self.reasons.values())[-1]}; all are listed in {self.path}; fix or remove them"
            )


class MapStream:
    """The stream over a map dataset. The position is the step alone, so there is no state to save.

    dataset: __len__ and __getitem__(index), or sample(index, epoch) for augmentation keyed by both; raises BadSample.
    bad_samples: file that lists what was skipped, one JSON object a line.
    """

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        info: DistInfo,
        *,
        collate: Callable[[list[dict]], dict],
        num_workers: int = 0,
        prefetch_factor: int = 2,
        bad_samples: Path | None = None,
    ):
        self.dataset, self.plan, self.info = dataset, plan, info
        self.collate, self.num_workers, self.prefetch_factor = _Collate(collate), num_workers, prefetch_factor
        self.bad = BadSamples(bad_samples, len(dataset))
        self.steps_per_epoch: int | None = plan.steps_per_epoch
        self.samples_per_step = plan.global_batch
        self.fingerprint = dataset.fingerprint if isinstance(dataset, Listed) else None
        self._batches: Iterator | None = None

    def start(self, step: int, state: dict | None = None) -> None:
        """Read on from the batches of `step`."""
        self.close()
        check_shared_memory(self.num_workers)
        loader = DataLoader(
            _KeyedDataset(self.dataset, self.plan.seed),
            batch_sampler=_KeyBatches(self.plan, self.info.rank, step),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.info.device.type == "cuda",
            generator=torch.Generator(),
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            worker_init_fn=start_process if self.num_workers else None,
        )
        self._batches = iter(loader)

    def next_step(self) -> list[dict]:
        """The micro-batches of the next optimizer step."""
        assert self._batches is not None, "start() comes first"
        batches = []
        for _ in range(self.plan.accumulation):
            batch, bad = next(self._batches)
            if isinstance(batch, Exception):
                raise batch
            self.bad.note(bad)
            batches.append(batch)
        return batches

    def state(self) -> dict:
        """Nothing: the step tells the position."""
        return {}

    def close(self) -> None:
        """End the loader's processes."""
        self._batches = None

    def agree(self) -> None:
        """Count the broken samples of all ranks together; a collective."""
        self.bad.agree()


class ReadAhead:
    """A started stream's steps on the device: while one is computed, a thread reads the next two and copies them there.

    On CUDA the copy has a stream of its own, so it runs next to the products; from pinned memory nothing waits for it.
    """

    def __init__(self, stream: Stream, device: torch.device):
        self.stream, self.device = stream, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._position = stream.state()
        self._thread = background_thread("read-ahead")
        self._steps: deque[Future] = deque()

    def _read(self) -> tuple[list[Any], dict, torch.cuda.Event | None]:
        batches = self.stream.next_step()
        with contextlib.nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            batches = [to_device(batch, self.device) for batch in batches]
        return batches, self.stream.state(), None if self._copies is None else self._copies.record_event()

    def next_step(self) -> list[Any]:
        """The micro-batches of the next optimizer step; raises what reading them raised."""
        while len(self._steps) <= STEPS_AHEAD:  # the one asked for, and those after it
            self._steps.append(self._thread.submit(self._read))
        batches, self._position, copied = self._steps[0].result()
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
            for tensor in _tensors(batches):
                if tensor.is_cuda:  # its memory is not given to others before this step has used it
                    tensor.record_stream(torch.cuda.current_stream(self.device))
        self._steps.popleft()
        return batches

    def state(self) -> dict:
        """The stream's state after the step handed out last: those read ahead are not counted."""
        return self._position

    def close(self) -> None:
        """Let the thread end, and the stream after it."""
        self._thread.shutdown(cancel_futures=True)
        self.stream.close()


def check_shared_memory(num_workers: int, place: Path = Path("/dev/shm")) -> None:
    """Refuse loader processes where the memory that they hand samples over in is as good as full."""
    free = shutil.disk_usage(place).free if num_workers and place.is_dir() else LEAST_SHARED
    if free < LEAST_SHARED:
        raise UserError(
            f"--num-workers {num_workers}: {place} has {free / 1e3:.0f} kB free, which loader processes need; enlarge "
            "it (docker run --shm-size 8g), or use --num-workers 0"
        )


def start_process(worker: int) -> None:
    """What every process of a DataLoader runs first (worker_init_fn)."""
    torch.set_num_threads(1)
    ForkingPickler.register(Tensor, _reduce)


def _reduce(tensor: Tensor) -> tuple:
    """Small tensors travel inside the message; in shared memory each costs the reader a handshake of a millisecond."""
    if 0 < tensor.nbytes <= SMALL and tensor.dtype != torch.bfloat16:
        return torch.from_numpy, (tensor.numpy(),)
    return reduce_tensor(tensor)


def to_device(value: Any, device: torch.device) -> Any:
    """Copy every tensor in nested dicts, lists and tuples to the device, without waiting for pinned ones; all but
    "slot", which keys the draws of a step: the host reads it.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: item if key == "slot" else to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(to_device(item, device) for item in value)
    return value


def sent(value: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device. The host does not wait for the queue of a GPU, as it would without pinned memory."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
