"""Speed and memory of a run."""

import sys
import time
from contextlib import suppress
from pathlib import Path

import torch


class Stopwatch:
    """Images per second, over the full batches after the first, whose time goes to warming up."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.batch_size = self.images = 0
        self.speed = 0.0

    def lap(self, images: int) -> None:
        """Note that a batch of so many images is done."""
        now = time.perf_counter()
        if not self.batch_size:
            self.batch_size, self.speed = images, images / (now - self.start)  # unless another one comes
            self.start = now
        elif images == self.batch_size:
            self.images += images
            self.speed = self.images / (now - self.start)


def reset_peak_memory(device: torch.device) -> None:
    """Start to look for the peak afresh."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux only; elsewhere the peak is that of the process since its start
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory held at once in MiB: tensors on a GPU, else all that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
