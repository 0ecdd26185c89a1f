"""Dilation of modules that were made for coarser maps, so that their parameters serve on finer ones.

On a map with `factor` times as many rows and columns, every `factor`-th position of the result is what it was. A module
whose positions are not mixed by convolutions alone has methods `spread(factor)` and `unstride(dilation)` of its own.
"""

from torch import nn


def spread(module: nn.Module, factor: int) -> None:
    """Move the taps of all kernels `factor` times as far apart, in place.

    Args:
        module: keeps the size of its maps.
        factor: of the resolution.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.dilation = tuple(factor * d for d in part.dilation)
            part.padding = tuple(factor * p for p in part.padding)
        elif hasattr(part, "spread"):
            part.spread(factor)


def unstride(module: nn.Module, dilation: int) -> None:
    """Let a module that halves its map keep the size, in place.

    Args:
        module: of stride 2.
        dilation: factor of the resolution of its input.
    """
    for part in module.modules():
        if hasattr(part, "unstride"):
            part.unstride(dilation)
        elif isinstance(part, nn.Conv2d):
            part.stride, part.dilation = (1, 1), (dilation, dilation)
            part.padding = tuple(dilation * p for p in part.padding)
