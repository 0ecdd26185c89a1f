"""SIGTERM and SIGINT: a run finishes what it is at, saves, and exits with 128 and the number of the signal."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PAUSE = 2.0
"""Seconds in which a second signal is the same one: launchers hand on what the terminal has sent already."""


class Stopped(BaseException):
    """The run is to stop where it is."""


class Signals:
    """Notes a signal for the run to heed; one more, later, ends the process at once.

    Attributes:
        received: Number of the signal, 0 for none.
    """

    def __init__(self) -> None:
        self.received, self.since, self.at_once = 0, 0.0, False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Handle signals; anything but the main thread cannot, and goes without."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Raise Stopped as soon as there is a signal."""
        self.at_once = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self.at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self.since > PAUSE:
                os._exit(128 + number)
            return
        self.received, self.since = number, time.monotonic()
        if self.at_once:
            raise Stopped


def leave_group(worker: int) -> None:
    """Take a loading process out of the group that terminals and launchers signal: the run needs it to the end."""
    os.setpgid(0, 0)
