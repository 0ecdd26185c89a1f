"""Sizes that a compiler or an exporter leaves open.

A graph is right at every size only if nothing is decided by what the size happened to be while it was traced: no branch
in Python, no constant table. `is_symbolic` tells where tables must be arithmetic in the graph. As ONNX rounds integer
division towards zero, such arithmetic divides what is not negative.
"""

from collections.abc import Callable
from functools import wraps
from operator import index
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx.experimental import _config as config
from torch.fx.experimental.symbolic_shapes import has_static_value

Size = int | torch.SymInt
F = TypeVar("F", bound=Callable)


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which Dynamo took to be true in `torch.compile` too, in torch 2.11 at least."""
    return torch.compiler._is_exporting_flag


def any_count(function: F) -> F:
    """Decorator of what counts something that depends on the size, as tiles of a map: graphs of torch.export do not
    tell one from several by it, which they do else where they look how tensors lie in memory."""

    @wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling() or not is_exporting():
            return function(*args, **kwargs)
        with config.patch(backed_size_oblivious=True):
            return function(*args, **kwargs)

    return call


def is_symbolic(*sizes: Size) -> bool:
    """Whether a size is left open by the graph that is being made. Never the case outside of compilers."""
    return torch.compiler.is_compiling() and not all(map(has_static_value, sizes))


def fixed(*sizes: Size) -> tuple[Size, ...]:
    """The sizes as integers, but as they are where one is left open."""
    return sizes if is_symbolic(*sizes) else tuple(map(index, sizes))


def ceil_div(size: Size, divisor: int) -> Size:
    """The quotient, rounded up."""
    return (size + divisor - 1) // divisor


def larger(a: Size, b: Size) -> Size:
    """The larger one, without a branch where one is left open."""
    return torch.sym_max(a, b) if is_symbolic(a, b) else max(fixed(a, b))


def smaller(a: Size, b: Size) -> Size:
    """The smaller one, likewise."""
    return torch.sym_min(a, b) if is_symbolic(a, b) else min(fixed(a, b))


def for_batch(mask: Tensor, q: Tensor) -> Tensor:
    """A mask or bias (..., N, M) of attention for the batch of the queries (B, heads, N, d).

    Where the graph leaves the batch open, each sample is given its view: broadcasting asks whether there is but one.
    """
    return mask.expand(*q.shape[:2], *mask.shape[-2:]) if is_symbolic(q.shape[0]) else mask
