"""Progress of long work, on stderr: a bar on a terminal, else a line now and then; nothing if it is to be quiet."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")
EVERY = 10.0
"""Seconds between two lines."""
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Say nothing of progress from now on, or do again."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether nothing of progress is to be said."""
    return _quiet


def tell(text: str) -> None:
    """Print a line of what is going on, unless it is to be quiet; results go to stdout instead."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Pass items on, and show how many have been dealt with.

    Args:
        items: what is worked on.
        what: is being done, for the line.
        total: how many there are, if `items` does not know.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    if _quiet:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        # What is printed in between goes above the bar where both are on the terminal, else to where stdout leads.
        console, shared = Console(stderr=True), sys.stdout.isatty()
        with Progress(*Progress.get_default_columns(), console=console, transient=True, redirect_stdout=shared) as bar:
            yield from bar.track(items, total, description=what)
    else:
        yield from _lines(items, what, total)


def _lines(items: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
    told = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            tell(f"{what}: {number}" + ("" if total is None else f" of {total}"))
        yield item
