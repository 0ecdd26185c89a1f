"""What ends a run early: signals, and too many updates in a row whose numbers are not finite."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import VisionattnError
from ..weights.files import write_file
from .config import GuardConfig

PAUSE = 2.0
"""Seconds in which a second signal is the same one: launchers hand on what the terminal has sent already."""


class Diverged(Exception):
    """The run is to go on from its last good checkpoint."""


class Guard:
    """Counts skipped updates.

    Args:
        config: what happens when there are too many.
        accelerator: the run's accelerator.

    Attributes:
        in_a_row: updates skipped since the last good one.
        skipped: updates skipped in the run.
        rollbacks: times that the run was rolled back.
    """

    def __init__(self, config: GuardConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.in_a_row = self.skipped = self.rollbacks = 0

    def good(self) -> None:
        """Count an update that was made."""
        self.in_a_row = 0

    def bad(self, folder: Path | None, epoch: int, update: int, loss: float, samples: torch.Tensor) -> None:
        """Count and tell an update that was skipped.

        Args:
            folder: run folder, where skipped.csv lists the images; None for none.
            epoch: epoch of the update.
            update: number of the update in it.
            loss: its loss.
            samples: indices of its images in this process.

        Raises:
            Diverged: if there are too many in a row and the run is to be rolled back.
            VisionattnError: if it is to stop.
        """
        self.in_a_row += 1
        self.skipped += 1
        images = sorted(gather_object(samples.tolist()))
        place = f"update {update + 1} of epoch {epoch + 1}"
        what = f"loss {loss}" if not math.isfinite(loss) else "a gradient that is not finite"
        if self.accelerator.is_main_process:
            if folder:
                file = folder / "skipped.csv"  # in which the run may have gone further than it was last saved
                lines = file.read_text().splitlines()[1 : self.skipped] if file.exists() else []
                line = f"{epoch},{update},{loss},{' '.join(map(str, images))}"
                write_file(file, "\n".join(["epoch,update,loss,images", *lines, line, ""]))
            few = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
            listed = " (all in skipped.csv)" if folder else ""
            print(f"skipped {place}: {what}; images {few}{listed}", flush=True)
        if self.in_a_row < self.config.max_bad_steps:
            return
        told = f"the run diverged: {self.in_a_row} updates in a row were skipped up to {place}, with {what}"
        if self.config.on_divergence == "stop" or self.rollbacks == self.config.max_rollbacks:
            raise VisionattnError(f"{told}: try a lower --optim.lr")
        self.rollbacks += 1
        if self.accelerator.is_main_process:
            print(f"{told}: going on from the last good checkpoint with a lower learning rate", flush=True)
        raise Diverged

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what `state_dict` returned."""
        vars(self).update(state)


class Stopped(BaseException):
    """The run is to stop where it is."""


class Signals:
    """Notes a signal for the run to heed; one more, later, ends the process at once.

    Attributes:
        received: number of the signal, 0 for none.
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
