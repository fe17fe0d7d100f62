"""COCO compressed run-length masks in plain Python: column-major runs of 0 and 1, differences in base 32 as ASCII
text.
"""

import numpy as np


def decode(counts: str | bytes, size: tuple[int, int] | list[int], where: str = "mask") -> np.ndarray:
    """uint8 mask (height, width) of 0 and 1. `where` names the mask in the ValueError on text that does not fit
    `size`.
    """
    height, width = size
    runs = _numbers(counts, where)
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(
            f"{where}: the runs sum to {sum(runs)}, a mask of {height} x {width} has {height * width} pixels; the "
            "text is damaged"
        )
    values = np.arange(len(runs), dtype=np.uint8) & 1
    return np.repeat(values, runs).reshape(width, height).T.copy()


def _numbers(counts: str | bytes, where: str) -> list[int]:
    """The run lengths: 5 bits a character, lowest first; from the fourth on each is a difference to two places
    before.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    runs, value, shift = [], 0, 0
    for code in text:
        bits = code - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{where}: character {chr(code)!r} is not part of compressed run-length text")
        value |= (bits & 31) << (5 * shift)
        shift += 1
        if bits & 32:
            continue
        if bits & 16:
            value |= -1 << (5 * shift)
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError(f"{where}: compressed run-length text ends in the middle of a number")
    return runs


def encode(mask: np.ndarray) -> dict:
    """{"size": [height, width], "counts": text} of a mask; the inverse of decode."""
    height, width = mask.shape
    flat = (np.asarray(mask).T.reshape(-1) != 0).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    text = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(bits + (32 if more else 0) + 48))
    return {"size": [height, width], "counts": "".join(text)}
