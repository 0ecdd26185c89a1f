"""A cache for what depends on parameters and sizes but not on the input."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ParameterCache:
    """Keeps the last result of a function of parameters, position biases for example, while gradients are off.

    It is rebuilt when a parameter or the key changes, and is neither saved, copied nor moved with its module.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._seen: list[Tensor] = []
        self._value = None

    def __call__(self, key: Hashable, parameters: list[Tensor], build: Callable[[], T]) -> T:
        """`build()`, or what it returned last time if nothing has changed since.

        Args:
            key: what the result depends on besides the parameters (sizes, usually).
            parameters: tensors the result depends on.
            build: computes the result.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return build()
        if not all(type(p) in (Tensor, torch.nn.Parameter) for p in parameters):  # a tracer's fake tensors
            return build()
        key = (key, *((p.device, p.dtype, p.shape) for p in parameters), *map(_version, parameters))
        if key != self._key or not all(map(_same, parameters, self._seen)):
            self._value = build()
            self._key, self._seen = key, [p.detach().clone() for p in parameters if p.device.type == "cpu"]
        return self._value

    def __deepcopy__(self, memo: dict) -> "ParameterCache":
        return ParameterCache()

    def __reduce__(self) -> tuple:
        return ParameterCache, ()


def _version(p: Tensor) -> Hashable:
    """What changes when `p` is written to. On the CPU the values themselves are compared, which also sees writes to
    `p.data`; elsewhere that would wait for the device."""
    return None if p.device.type == "cpu" or p.is_inference() else (p.data_ptr(), p._version)


def _same(p: Tensor, seen: Tensor) -> bool:
    return p.device.type != "cpu" or torch.equal(p, seen)
