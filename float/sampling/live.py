"""Sound that is still coming in: a pipe, standard input, or a file that a recorder is writing.

Features of a window are made as soon as its sound and a little more are there, from what was heard lately: neither the
clip's end nor its level as a whole is known.
"""

import os
import stat
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from float.data.media import Sound, sound_pieces
from float.modules.audio import SAMPLE_RATE, AudioEncoder, LogMelEncoder, frames_of
from shared.errors import BadSample

STDIN = "-"
LOOK_AHEAD, MEMORY_SECONDS = 0.2, 8.0  # seconds of sound after a window, and before it, that its features are made of
STILL_SECONDS = 2.0  # a file that does not grow for so long is complete
POLL_SECONDS = 0.05


def is_live(path: str) -> bool:
    """Whether more sound may come: standard input, a pipe, or a file that grows while it is looked at."""
    if path == STDIN:
        return True
    found = os.stat(path)
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        return True
    # recorders write by the half second or second
    waiting = STILL_SECONDS - max(0.0, time.time() - found.st_mtime)
    while waiting > 0:
        time.sleep(POLL_SECONDS)
        waiting -= POLL_SECONDS
        if os.stat(path).st_size > found.st_size:
            return True
    return False


class Incoming:
    """A file object over what comes in: read() waits for more, and returns nothing when none comes any more."""

    name = "incoming sound"

    def __init__(self, path: str):
        # unbuffered: what is there is handed on, be it less than asked for
        self.file = open(0 if path == STDIN else path, "rb", buffering=0, closefd=path != STDIN)
        self.grows = path != STDIN and stat.S_ISREG(os.stat(path).st_mode)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        waited = 0.0
        while True:
            data = self.file.read(size)
            if data or not self.grows or waited > STILL_SECONDS:
                return data or b""
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS


class LiveSound:
    """Windows of features of incoming sound, and the sound itself for the video.

    windows(): raw features (1, n, F), n = length but for the last window. heard: the sound (n,) that the current window
    was made of. delays: seconds from the arrival of a window's last sound to the call for the next window, when its
    frames are written.
    """

    def __init__(self, path: str, encoder: AudioEncoder | LogMelEncoder, *, fps: float, length: int):
        self.encoder, self.fps, self.length = encoder, fps, length
        self.path = path if path != STDIN else "standard input"
        self.source = sound_pieces(self.path, SAMPLE_RATE, "mono", Incoming(path))
        self.queue: deque[np.ndarray] = deque()
        self.received = 0  # samples
        self.total: int | None = None  # frames, known at the end
        self.heard = torch.zeros(0)
        self.delays: list[float] = []

    @property
    def sound(self) -> Sound:
        """What came in so far, for the writer, which asks for no more than the windows handed out."""
        return Sound(SAMPLE_RATE, "mono", self._queued())

    def _queued(self) -> Iterator[np.ndarray]:
        while self.queue:
            yield self.queue.popleft()

    def windows(self) -> Iterator[Tensor]:
        """See the class."""
        samples = SAMPLE_RATE / self.fps
        buffer, begin, start = np.zeros(0, np.float32), 0, 0  # begin: the buffer's first frame; start: the window's
        ended = False
        while True:
            wanted = round((start + self.length) * samples) + round(LOOK_AHEAD * SAMPLE_RATE)
            while not ended and self.received < wanted:
                piece = next(self.source, None)
                if piece is None:
                    if not self.received:
                        raise BadSample(f"{self.path}: the sound track is empty; nothing came in")
                    ended = True
                    self.total = frames_of(self.received, self.fps)
                    break
                self.queue.append(piece)
                self.received += piece.shape[1]
                buffer = np.concatenate([buffer, piece[0]])
            arrived = time.monotonic()
            stop = start + self.length if self.total is None else min(start + self.length, self.total)
            if stop <= start:
                return
            first = max(begin, start - round(MEMORY_SECONDS * self.fps))
            buffer, begin = buffer[round((first - begin) * samples) :], first
            self.heard = torch.from_numpy(buffer[: round((stop - first) * samples + LOOK_AHEAD * SAMPLE_RATE)])
            yield self.encoder.encode_clip(self.heard, self.fps)[None, start - first : stop - first]
            self.delays.append(time.monotonic() - arrived)
            start += self.length

    def delay(self) -> str:
        """How long after its sound a frame comes, in words."""
        length, delays = self.length / self.fps, self.delays or [0.0]
        mean = sum(delays) / len(delays)
        return (
            f"delay: a frame comes at most {length + LOOK_AHEAD + max(delays):.2f} s after its sound: window "
            f"{length:.2f} s, look-ahead {LOOK_AHEAD:.2f} s, computing {max(delays):.2f} s at most and {mean:.2f} s on "
            "average; " + ("it keeps up" if mean <= length else "it falls behind: use fewer --steps")
        )
