"""Which samples share a pack: ours, which loses none; a fixed number of samples; the released loop, to compare."""

from collections.abc import Callable, Sequence
from typing import Any

Key = tuple[int, int]  # (epoch, index)


class Packer:
    """Fills packs of at most `capacity` tokens and loses no sample.

    A pack starts with the sample that waits longest and goes on in order; what does not fit waits. When nothing in
    order fits, the largest waiting sample that fits is taken, until none does. `order(epoch)` gives the indices of an
    epoch; the last pack of an epoch may be short. The state is the position and the waiting samples, the same on every
    rank.
    """

    def __init__(
        self,
        order: Callable[[int], Sequence[int]],
        length: Callable[[int, int], int],
        *,
        capacity: int,
        buffer_size: int,
    ):
        self.order, self.length = order, length
        self.capacity, self.buffer_size = capacity, buffer_size
        self.epoch, self.cursor = 0, 0
        self.waiting: list[Key] = []
        self._sizes: dict[Key, int] = {}
        self._order: tuple[int, Sequence[int]] | None = None

    def next_pack(self) -> list[Key]:
        """The (epoch, index) of the samples of the next pack."""
        self._refill()
        while not self.waiting:
            self.epoch, self.cursor = self.epoch + 1, 0
            self._refill()
        pack: list[Key] = []
        room = self.capacity
        for key in list(self.waiting):
            if pack and self._size(key) > room:
                break
            room -= self._take(key, pack)
        while fitting := [key for key in self.waiting if self._size(key) <= room]:
            room -= self._take(max(fitting, key=self._size), pack)
        return pack

    def _size(self, key: Key) -> int:
        if key not in self._sizes:
            self._sizes[key] = self.length(key[1], key[0])
        return self._sizes[key]

    def _take(self, key: Key, pack: list[Key]) -> int:
        size = self._size(key)
        self.waiting.remove(key)
        del self._sizes[key]
        pack.append(key)
        self._refill()
        return size

    def _refill(self) -> None:
        order = self._indices(self.epoch)
        while len(self.waiting) < self.buffer_size and self.cursor < len(order):
            self.waiting.append((self.epoch, int(order[self.cursor])))
            self.cursor += 1

    def _indices(self, epoch: int) -> Sequence[int]:
        """The order of an epoch, worked out once."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        return self._order[1]

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor, "waiting": [list(key) for key in self.waiting]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.waiting = [(epoch, index) for epoch, index in state["waiting"]]


class SamplePacker(Packer):
    """Packs of a fixed number of samples, whatever their length; a pack runs on into the next epoch."""

    def __init__(self, order: Callable[[int], Sequence[int]], length: Callable[[int, int], int], *, samples: int):
        super().__init__(order, length, capacity=0, buffer_size=samples)

    def next_pack(self) -> list[Key]:
        """The next `samples` samples in order."""
        pack: list[Key] = []
        while len(pack) < self.buffer_size:
            self._refill()
            wanted = self.buffer_size - len(pack)
            pack, self.waiting = pack + self.waiting[:wanted], self.waiting[wanted:]
            if len(pack) < self.buffer_size:
                self.epoch, self.cursor = self.epoch + 1, 0
        return pack


class ReferencePacker(Packer):
    """The released loop, which can lose samples: kept for comparison, `--packing reference`.

    Samples longer than `max_sample` are skipped; below `prefer_buffer_before` tokens the buffer comes first; a sample
    that does not fit goes to the buffer if it came from the stream and there is room, else it closes the pack and is
    lost. written: tokens that a sample really takes, where that differs from the length that decides whether it fits.
    """

    def __init__(
        self,
        order: Callable[[int], Sequence[int]],
        length: Callable[[int, int], int],
        *,
        expected: int,
        capacity: int,
        max_sample: int,
        prefer_buffer_before: int,
        buffer_size: int,
        written: Callable[[int, int], int] | None = None,
    ):
        super().__init__(order, length, capacity=capacity, buffer_size=buffer_size)
        self.written = written or length
        self.expected, self.max_sample, self.prefer_buffer_before = expected, max_sample, prefer_buffer_before

    def next_pack(self) -> list[Key]:
        """The samples of the next pack; the stream of epochs does not end."""
        pack: list[Key] = []
        filled = 0
        while filled < self.expected:
            buffered = filled < self.prefer_buffer_before and bool(self.waiting)
            key = self.waiting.pop(0) if buffered else self._draw()
            size = self._size(key)
            if size > self.max_sample:
                continue
            if filled + size > self.capacity:
                if not buffered and len(self.waiting) < self.buffer_size:
                    self.waiting.append(key)
                    continue
                break
            pack.append(key)
            filled += self.written(key[1], key[0])
        return pack

    def _draw(self) -> Key:
        while self.cursor >= len(self._indices(self.epoch)):
            self.epoch, self.cursor = self.epoch + 1, 0
        self.cursor += 1
        return (self.epoch, int(self._indices(self.epoch)[self.cursor - 1]))
