"""Timing: clocks, turns, memory, the machine that it was on, and tables."""

import argparse
import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .errors import VisionattnError
from .version import __version__

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its starts and stops otherwise
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Seconds = Callable[[Callable[[], object], int], float]
"""Takes what is to be timed and how many calls of it; seconds of one."""


def positive(text: str) -> int:
    """An argument that counts something.

    Raises:
        ArgumentTypeError: if it is no number from 1 up.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text!r}")
    return int(text)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options of where and by which clock, which every benchmark of models or layers has."""
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=positive, default=7, help="measurements of each, taken in turns")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds, for busy machines")


def start(args: argparse.Namespace) -> tuple[torch.device, Seconds]:
    """The device and the clock that options ask for, and so many threads.

    Raises:
        VisionattnError: if there is no such device, or it has no such clock, or not so many cores.
    """
    if args.threads > max(most := os.cpu_count() or 1, torch.get_num_threads()):
        raise VisionattnError(f"expected --threads of at most {most}, the cores of this machine, got {args.threads}")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    try:
        device = torch.empty(1, device=args.device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # all of which torch raises
        raise VisionattnError(f"cannot use device {args.device}: {str(error).splitlines()[0]}") from error
    if device.type == "meta" or device.type != "cpu" and args.clock == "cpu":
        raise VisionattnError(f"nothing to be timed by a {args.clock} clock happens on {device}")

    def seconds(call: Callable[[], object], times: int = 1) -> float:
        now = time.process_time if args.clock == "cpu" else time.perf_counter
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            first.record()
            for _ in range(times):
                call()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3 / times
        begin = now()
        for _ in range(times):
            call()
        return (now() - begin) / times

    return device, seconds


def in_turns(
    calls: Sequence[Callable[[], object]], rounds: int, seconds: Seconds, shortest: float = 0.05
) -> list[list[float]]:
    """Seconds of each call in each round, in which all have their turn one after the other.

    Args:
        calls: what is timed; each is called once before, to warm up.
        rounds: how many.
        seconds: the clock.
        shortest: seconds that a turn takes, of several calls if one takes less.
    """
    for call in calls:
        call()
    first = [seconds(call, 1) for call in calls]
    times = [max(1, round(shortest / max(each, 1e-6))) for each in first]
    found = [first] if max(times) == 1 else []
    while len(found) < rounds:
        found.append([seconds(call, n) for call, n in zip(calls, times, strict=True)])
    return [list(each) for each in zip(*found, strict=True)]


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call has allocated at once, beside what was there before.

    On a CPU these are torch's own allocations, as its profiler sees them; what the libraries below it take for
    themselves is not among them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def machine(device: torch.device) -> dict[str, str]:
    """Of the run: date, machine, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        known = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = known[0] if known else platform.processor() or platform.machine()
    versions = {name: version(name) for name in ("torch", "timm")} | {"visionattn": __version__}
    return {"date": time.strftime("%Y-%m-%d"), "machine": name, "threads": str(torch.get_num_threads()), **versions}
