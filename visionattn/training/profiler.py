"""Trace of a window of updates."""

from pathlib import Path

import torch

from ..errors import VisionattnError
from .yaml_text import read_file, resolved


def check_window(window: str, last: int, resumed_at: int, folder: Path | None) -> None:
    """Refuse a window of which the run sees nothing.

    Args:
        window: As for `Profiler`.
        last: Updates of the whole run.
        resumed_at: Update at which it goes on.
        folder: Of a run that is resumed; the window that it began with may be over.

    Raises:
        VisionattnError: If it lies after the run's end, or before where it goes on.
    """
    first, end = map(int, window.split("-"))
    if first >= last:
        raise VisionattnError(f"option profile is of no use: {window} is past the end, the run has {last} updates")
    if folder is None or end > resumed_at:
        return
    began_with = read_file(folder / "config.yaml", f"cannot resume {folder}").get("profile")
    if resolved(began_with) != window:
        raise VisionattnError(f"option profile is of no use: {window} is over, the run goes on at update {resumed_at}")


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
        if self.profile is None and self.first <= update < self.end:  # a resumed run may begin within
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()
        elif self.profile and update >= self.end:
            self.stop()

    def stop(self) -> None:
        """End the window, if it is open, and write what was seen."""
        if self.profile:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.file))
            self.profile = None
