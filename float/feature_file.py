"""Reading rows of the features cached of a clip (see float/data/features.py) without mapping the file: a window is
a few short reads, where a mapping costs page faults and a view object for every tensor.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

KINDS = {"F32": torch.float32, "F16": torch.float16, "BOOL": torch.bool}
HEADER_BYTES = 4096  # read at first; longer headers are read again
LONGEST_HEADER = 1 << 20  # a clip has a handful of tensors
# what a broken file raises, or one without a tensor; the last three where the header is JSON, but of other things
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class FeatureFile:
    """An open safetensors file: 8 bytes of length, a header in JSON, then the tensors' bytes.

    Raises one of UNREADABLE when it cannot be read or is not whole. A context manager.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._read_header()
        except BaseException:
            os.close(self._file)
            raise

    def _read_header(self) -> None:
        start = os.pread(self._file, HEADER_BYTES, 0)
        self._data = 8 + int.from_bytes(start[:8], "little")  # where the tensors begin
        if self._data > LONGEST_HEADER:
            raise ValueError("it has no header")
        if self._data > HEADER_BYTES:
            start = os.pread(self._file, self._data, 0)
        self._tensors: dict[str, Any] = json.loads(start[8 : self._data])
        self.metadata: dict[str, str] = self._tensors.pop("__metadata__", {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        os.close(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor."""
        return self._tensors[name]["shape"]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start .. stop of a tensor, in its stored type; all rows from `start` on when stop is None."""
        length, *rest = self.shape(name)
        stop = length if stop is None else min(stop, length)
        rows = torch.empty(stop - start, *rest, dtype=KINDS[self._tensors[name]["dtype"]])
        begin = self._data + self._tensors[name]["data_offsets"][0] + start * math.prod(rest) * rows.itemsize
        if os.preadv(self._file, [rows.numpy()], begin) != rows.nbytes:
            raise ValueError(f"{name} is not whole")
        return rows
