"""Faults of single images and annotations: the first ends what is going on, unless all are to be listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import VisionattnError

_listed: ContextVar[list[str] | None] = ContextVar("listed", default=None)


@contextmanager
def listing() -> Iterator[list[str]]:
    """List the faults that are met under `one`, and go on without what has them."""
    token = _listed.set(found := [])
    try:
        yield found
    finally:
        _listed.reset(token)


@contextmanager
def one() -> Iterator[None]:
    """Around what is done for a single image or annotation, which its caller leaves out if this is left by a fault."""
    try:
        yield
    except VisionattnError as error:
        if not goes_on():
            raise
        _listed.get().append(str(error))


def goes_on() -> bool:
    """Whether faults are listed."""
    return _listed.get() is not None
