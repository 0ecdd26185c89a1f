"""Keeping what depends on parameters and sizes but not on the input, so that it is not made in every forward pass.

A model may be called by several threads, first in inference mode and later to be trained, by a tracer or under
`torch.func`'s transforms. What is kept is therefore made as outside all of these (`made`), and never a tracer's or a
transform's tensor, which must not outlive it. What depends on no parameter is kept by `size_constant`.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class ParameterCache:
    """Keeps the last result of a function of parameters, position biases for example, while gradients are off.

    It is made anew when a parameter or the key changes, and is neither saved, copied nor moved with its module. Several
    threads may call it.

    Whether a parameter has changed is told by its values, as nothing else tells of every change: version counters do
    not count writes to `p.data`, tensors made in inference mode have none, and memory that is freed comes back at the
    same address. On the CPU that costs little beside what it saves. Other devices would have to be waited for in every
    layer, which on a GPU costs large batches more than to make the result again, as compiled models do too: nothing is
    kept there.

    Attributes:
        max_bytes: size of the largest result that is kept.
    """

    max_bytes = 2**26

    def __init__(self) -> None:
        self._kept: tuple[Hashable, list[Tensor], Any] = None, [], None

    def __call__(self, key: Hashable, parameters: list[Tensor], build: Callable[[], T]) -> T:
        """`build()`, or what it returned last time if nothing has changed since.

        Args:
            key: what the result depends on besides the parameters: sizes and precisions.
            parameters: tensors the result depends on.
            build: computes the result: tensors and None in tuples and lists.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return build()
        if not all(is_plain(p) and p.device.type == "cpu" for p in parameters):
            return build()
        key = (key, *((p.dtype, p.shape) for p in parameters))
        kept_key, seen, value = self._kept  # at once, as another thread may put another result in its place
        if key != kept_key or not all(map(torch.equal, parameters, seen)):
            (seen, value), size = made(torch.no_grad()(lambda: ([p.clone() for p in parameters], build())))
            if size is not None and size <= self.max_bytes:
                self._kept = key, seen, value
        return value

    def __deepcopy__(self, memo: dict) -> "ParameterCache":
        return ParameterCache()

    def __reduce__(self) -> tuple:
        return ParameterCache, ()


def made(build: Callable[[], T]) -> tuple[T, int | None]:
    """What `build` returns and its bytes, or None instead of these if it must not be kept.

    Args:
        build: makes tensors in tuples and lists.
    """
    with torch.inference_mode(False):  # or training could not use it
        value = build()
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return value, sum(tensor.nbytes for tensor in tensors) if all(map(is_plain, tensors)) else None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds values of its own, and is none of a tracer's or of one of `torch.func`'s transforms."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
