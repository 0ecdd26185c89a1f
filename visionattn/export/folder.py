"""Where files are written before they are kept: hidden folders beside their place, of which nothing stays."""

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import NoReturn

PREFIX = ".export"


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder in the same folder as `path`, removed at the end, be it by an error or SIGTERM. Where a process
    was killed so that it could not, the next one does.

    Args:
        path: of what is written.

    Raises:
        SystemExit: after SIGTERM, with 128 and its number, unless somebody else has a handler for it.
    """
    mine = f"{PREFIX}-{socket.gethostname()}-"
    for left in path.parent.glob(f"{PREFIX}-*"):
        if left.name.startswith(mine) and not _runs(left.name.removeprefix(mine).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    with _terminable():
        folder = Path(mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=path.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: str) -> bool:
    """Whether there is a process of that number on this machine, or what is given is none."""
    with suppress(ValueError, PermissionError):  # the number is that of another user's
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which ends a process as it stands, raises SystemExit inside."""
    plain = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not plain or threading.current_thread() is not threading.main_thread():  # others may set no handlers
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # nothing more until all is removed
    raise SystemExit(128 + number)
