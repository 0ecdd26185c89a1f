"""Depthwise convolution."""

from torch import nn


def depthwise(dim: int, kernel_size: int, dilation: int = 1, bias: bool = True, device=None, dtype=None) -> nn.Conv2d:
    """Depthwise convolution of (B, C, H, W) that keeps the size, and raises ValueError if `kernel_size` is even."""
    if kernel_size % 2 == 0:
        raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
    padding = kernel_size // 2 * dilation
    return nn.Conv2d(
        dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=bias, device=device, dtype=dtype
    )
