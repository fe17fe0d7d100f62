"""The training stream of packs: every rank fills the same and loads its own; resumes with samples still waiting."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from bagel.config import DataConfig
from bagel.dataset import UnifiedGenerationDataset
from bagel.packing import Key, Packer, ReferencePacker, SamplePacker
from shared.data import BadSamples, start_process
from shared.engine.dist import DistInfo
from shared.errors import BadSample, UserError

MAX_BAD_IN_A_ROW = 100


def make_packer(dataset: UnifiedGenerationDataset, data: DataConfig, batch_size: int) -> Packer:
    """The configured way to fill packs, at the start of epoch 0."""
    if data.packing == "samples":
        return SamplePacker(dataset.order, dataset.length, samples=batch_size)
    if data.packing == "tokens":
        return Packer(dataset.order, dataset.length, capacity=data.tokens_per_batch, buffer_size=data.buffer_size)
    return ReferencePacker(
        dataset.order,
        dataset.length,
        expected=data.expected_num_tokens,
        capacity=data.tokens_per_batch,
        max_sample=data.max_sequence_length,
        prefer_buffer_before=data.prefer_buffer_before,
        buffer_size=data.buffer_size,
    )


def packs_per_epoch(dataset: UnifiedGenerationDataset, data: DataConfig, batch_size: int) -> int:
    """Packs that cover the first epoch, by filling them."""
    packer, packs = make_packer(dataset, data, batch_size), 0
    while True:
        first_epoch = packer.next_pack()[0][0]
        if first_epoch > 0:
            return max(1, packs)
        packs += 1


class _Packs(Dataset):
    """Loads a pack from its keys; pictures that turn out to be damaged leave the pack and are reported."""

    def __init__(self, dataset: UnifiedGenerationDataset, collate: Callable[[list[dict]], dict]):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, keys: list[Key]) -> tuple[dict, list[tuple[int, str]]]:
        samples, bad = [], []
        for epoch, index in keys:
            try:
                samples.append(self.dataset.sample(index, epoch))
            except BadSample as error:
                bad.append((index % len(self.dataset), str(error)))
        return self.collate(samples), bad


class PackStream:
    """Micro-batches of this rank. Pack number ((step * accumulation + micro) * world + rank) * packs_each + k of the
    run is the k-th pack of that micro-batch, so one rank and N ranks train on the same packs in the same step.
    """

    def __init__(
        self,
        dataset: UnifiedGenerationDataset,
        data: DataConfig,
        info: DistInfo,
        *,
        batch_size: int,
        accumulation: int,
        collate: Callable[[list[dict]], dict],
        num_workers: int = 0,
        prefetch_factor: int = 2,
        bad_samples: Path | None = None,
    ):
        expected = float(dataset.weights().sum())
        if expected < 1:
            raise UserError(
                f"{dataset.data_path}: the records' weights (times data.question_weight) sum up to {expected:.3g}: an "
                "epoch would hold no sample; raise them"
            )
        self.dataset, self.data, self.info = dataset, data, info
        self.batch_size, self.accumulation = batch_size, accumulation
        self.packs_each = 1 if data.packing == "samples" else batch_size
        self.packs, self.num_workers, self.prefetch_factor = _Packs(dataset, collate), num_workers, prefetch_factor
        self.bad, self.bad_in_a_row = BadSamples(bad_samples, len(dataset)), 0
        self.fingerprint = dataset.fingerprint()
        packs_a_step = self.packs_each * accumulation * info.world
        by_samples = data.packing == "samples"
        # packs are counted in place of samples, unless a pack is a number of samples
        self.samples_per_step = packs_a_step * (batch_size if by_samples else 1)
        if by_samples:
            self.steps_per_epoch = -(-len(dataset.order(0)) // self.samples_per_step)
        else:
            self.steps_per_epoch = -(-packs_per_epoch(dataset, data, batch_size) // packs_a_step)
        self._ahead: deque[dict] = deque()
        self._position: dict | None = None
        self._loaded: Iterator | None = None

    def start(self, step: int, state: dict | None = None) -> None:
        """Go to the packs of `step`: from the saved state, or by filling packs from the start of the run."""
        packer = make_packer(self.dataset, self.data, self.batch_size)
        if state:
            packer.load_state(state)
        else:
            for _ in range(step * self.accumulation * self.info.world * self.packs_each):
                packer.next_pack()
        self._ahead.clear()
        self._position = packer.state()
        workers = dict(prefetch_factor=self.prefetch_factor, worker_init_fn=start_process) if self.num_workers else {}
        self._loaded = iter(
            DataLoader(
                self.packs,
                sampler=_Keys(self, packer),
                batch_size=None,
                num_workers=self.num_workers,
                pin_memory=self.info.device.type == "cuda",
                generator=torch.Generator(),
                **workers,
            )
        )

    def keys_of_steps(self, packer: Packer) -> Iterator[list[Key]]:
        """The keys of this rank's micro-batches, one after another; notes the packer's state after every step."""
        while True:
            for micro in range(self.accumulation):
                packs = [packer.next_pack() for _ in range(self.packs_each * self.info.world)]
                own = packs[self.info.rank * self.packs_each : (self.info.rank + 1) * self.packs_each]
                keys = [key for pack in own for key in pack]
                if micro == self.accumulation - 1:
                    self._ahead.append(packer.state())
                yield keys

    def next_step(self) -> list[dict]:
        """The micro-batches of the next optimizer step."""
        batches = []
        for _ in range(self.accumulation):
            batch, bad = next(self._loaded)
            self._note(bad, batch)
            batches.append(batch)
        self._position = self._ahead.popleft()
        return batches

    def state(self) -> dict:
        """Epoch, cursor and the samples that wait, after the last step handed out."""
        return self._position

    def close(self) -> None:
        """End the loader's processes."""
        self._loaded = None

    def agree(self) -> None:
        """Count the damaged samples of all ranks together; a collective."""
        self.bad.agree()

    def _note(self, bad: list[tuple[int, str]], batch: dict) -> None:
        self.bad.note(bad)
        self.bad_in_a_row = 0 if batch["keys"] else self.bad_in_a_row + len(bad)
        if self.bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise UserError(
                f"{self.bad_in_a_row} samples in a row cannot be read; the last: {bad[-1][1]}; check the picture folder"
            )


class _Keys:
    """The endless sampler of a PackStream."""

    def __init__(self, stream: PackStream, packer: Packer):
        self.stream, self.packer = stream, packer

    def __iter__(self) -> Iterator[list[Key]]:
        return self.stream.keys_of_steps(self.packer)
