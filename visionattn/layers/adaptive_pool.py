"""Adaptive average pooling, also in graphs that leave the size of the map open."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .symbolic import Size, is_symbolic


def bins(key: Tensor | np.ndarray, length: Size, keys: Size) -> tuple:
    """First and last position, exclusive, of each bin of an axis of `length` that is pooled to `keys`."""
    return key * length // keys, ((key + 1) * length + keys - 1) // keys


def adaptive_pool(x: Tensor, size: tuple[Size, Size]) -> Tensor:
    """Means over the bins of (B, C, H, W), to (B, C, *size).

    Where a graph leaves sizes open, which ONNX has no pooling for, by products with the shares of rows and columns.
    """
    if not is_symbolic(*size, *x.shape[2:]):
        return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)
    rows, cols = (_shares(old, new, x) for old, new in zip(x.shape[2:], size, strict=True))
    return rows @ x @ cols.mT


def _shares(length: Size, keys: Size, x: Tensor) -> Tensor:
    """(keys, length) weights of the means over an axis."""
    start, end = bins(torch.arange(keys, device=x.device)[:, None], length, keys)
    position = torch.arange(length, device=x.device)
    weights = ((position >= start) & (position < end)).to(torch.promote_types(x.dtype, torch.float32))
    return (weights / weights.sum(1, keepdim=True)).to(x.dtype)
