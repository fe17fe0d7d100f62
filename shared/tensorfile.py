"""safetensors files written tensor by tensor, with their hash, and read tensor by tensor."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from shared.errors import CheckpointError

_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, specs: list[tuple[str, tuple, torch.dtype]], values: Iterator[Tensor]) -> dict:
    """Write tensors one at a time (only one in memory), hashing on the way. Returns {"bytes", "sha256"}."""
    header, offset = {}, 0
    for name, shape, dtype in specs:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in _blocks(struct.pack("<Q", len(text)) + text, specs, values):
            file.write(block)
            digest.update(block)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def _blocks(start: bytes, specs: list, values: Iterator[Tensor]) -> Iterator[Any]:
    yield start
    for (name, shape, dtype), value in zip(specs, values, strict=True):
        assert tuple(value.shape) == tuple(shape), f"{name}: {tuple(value.shape)} is not {tuple(shape)}"
        flat = value.detach().to("cpu", dtype).contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


class TensorFile:
    """Tensors of a safetensors file by name, read when asked for."""

    def __init__(self, path: Path):
        try:
            self.file = safetensors.safe_open(str(path), "pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
        self.names = set(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)
