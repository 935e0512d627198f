"""Ctrl-C and SIGTERM: stop between two steps instead of in the middle of one."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 2.0
"""Seconds in which another signal is the same one: a terminal, `timeout` and torchrun send it to all processes of a group,
and a launcher passes on to its processes what they have had already.
"""

Stop = Callable[[], bool]
"""Whether the run is to end: what may take longer than the time that a machine gives for that asks again and again."""


def never() -> bool:
    """For what is not to be broken off."""
    return False


class Interrupts:
    """While entered, the first signal only sets `requested`; a second one, later, acts as it would have without us."""

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def asked(self) -> bool:
        """As a `Stop`, for what is to be broken off."""
        return self.requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first >= ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
