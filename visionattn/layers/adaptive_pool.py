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
    dtype = torch.promote_types(x.dtype, torch.float32)
    sizes = zip(x.shape[2:], size, strict=True)
    rows, cols = (pool_shares(old, new, x.device, dtype).to(x.dtype) for old, new in sizes)
    return rows @ x @ cols.mT


def pool_shares(length: Size, keys: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(keys, length) weights of the means over an axis."""
    start, end = bins(torch.arange(keys, device=device)[:, None], length, keys)
    position = torch.arange(length, device=device)
    weights = ((position >= start) & (position < end)).to(dtype)
    return weights / weights.sum(1, keepdim=True)
