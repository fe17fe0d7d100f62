"""When to stop: a signal or the time limit. The loop agrees on the flag over ranks and saves before it leaves."""

import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Context that makes SIGTERM, SIGINT, SIGUSR1 or the time limit a reason to stop; a second SIGINT raises."""

    def __init__(self, time_limit_minutes: float | None = None):
        self.deadline = None if time_limit_minutes is None else time.monotonic() + 60 * time_limit_minutes
        self.signal_name: str | None = None
        self._before: dict = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self.signal_name is not None:
            return self.signal_name
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "the time limit"
        return None
