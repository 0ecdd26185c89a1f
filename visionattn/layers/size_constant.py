"""What depends on sizes and a device, but on no input and no parameter: tile plans, buckets, tables, masks.

All of it is kept in one place, for every model of the process. What was used last stays when it grows too large.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, TypeVar

import torch

from .cache import made
from .symbolic import Size, is_symbolic

T = TypeVar("T")
MAX_BYTES = 2**27  # of all together; at images of 1333 x 800 a model uses up to 26 MiB in a pass
_kept: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()
_lock = Lock()


def size_constant(make: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function returns, which is a constant to compilers, or part of the graph where a size is open.

    Args:
        make: function of hashable positional arguments alone, sizes among them; returns tensors in tuples and lists.
    """

    @torch.compiler.assume_constant_result
    def constant(*args) -> tuple[T]:  # not a tensor itself: Dynamo takes those of one function's name for the same one
        key = make, *args
        with _lock:
            if key in _kept:
                _kept.move_to_end(key)
                return (_kept[key][0],)
        value, size = made(lambda: make(*args))
        if size is not None and size <= MAX_BYTES:
            with _lock:
                _kept[key] = value, size
                while sum(size for _, size in _kept.values()) > MAX_BYTES:
                    _kept.popitem(last=False)
        return (value,)

    @wraps(make)
    def call(*args) -> T:
        is_open = is_symbolic(*(size for size in args if isinstance(size, Size)))
        return make(*args) if is_open else constant(*args)[0]

    return call
