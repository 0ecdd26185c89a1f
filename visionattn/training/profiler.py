"""Trace of a window of updates."""

from pathlib import Path

import torch


class Profiler:
    """torch.profiler over a window of updates.

    Args:
        window: First update and the one after the last, "10-20", counted from the start of the run; empty for none.
        folder: Where the trace goes, for chrome://tracing or https://ui.perfetto.dev.
    """

    def __init__(self, window: str, folder: Path) -> None:
        self.first, self.end = map(int, window.split("-")) if window else (-1, -1)
        self.file = folder / f"trace-{window}.json"
        self.profile: torch.profiler.profile | None = None

    def step(self, update: int) -> None:
        """Begin or end the window before an update."""
        if update == self.first:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()
        elif update == self.end:
            self.stop()

    def stop(self) -> None:
        """End the window, if it is open, and write what was seen."""
        if self.profile:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.file))
            self.profile = None
