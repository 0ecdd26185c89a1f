"""Convolution by kernels that differ from position to position, in windows that are shifted inwards at borders."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .size_constant import size_constant
from .symbolic import Size, is_symbolic

TILE = 14
"""Most queries of a row that are multiplied together where it is long."""


def dynamic_conv2d(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Sums of the values around every position, by weights of its own.

    Along an axis of length L the window of position y starts at clamp(y - K // 2, 0, L - K): at borders it is shifted
    inwards, and always has K positions. (`na2d_av` of NATTEN 0.17.)

    The weights of a row of queries are put among zeros, one for each column that any of them sees, and multiplied with
    the rows of the window: no value is copied for every tap.

    Cost: N G c K^2 multiply-adds for N = H W positions, and about as many again of zeros.

    Args:
        weights: (B, G, H, W, K^2), row-major over the window.
        value: (B, G, H, W, c).
        kernel_size: K, odd and at most H and W.

    Returns:
        (B, G, H, W, c).

    Raises:
        ValueError: if the map is smaller than the kernel.

    Example:
        >>> import torch
        >>> weights = torch.randn(1, 2, 20, 31, 49).softmax(-1)
        >>> dynamic_conv2d(weights, torch.randn(1, 2, 20, 31, 16), kernel_size=7).shape
        torch.Size([1, 2, 20, 31, 16])
    """
    K, (H, W) = kernel_size, value.shape[2:4]
    weights = weights.to(value.dtype).unflatten(-1, (K, K))
    if is_symbolic(H, W):
        return _in_graph(weights, value, K)
    if min(H, W) < K:
        raise ValueError(f"expected a map of at least {K} x {K}, got {H} x {W}")
    columns = _columns(W, K, value.device)
    tiles, width, places = len(columns.first), columns.width, columns.places
    if missing := tiles * len(places[0]) - W:
        weights = F.pad(weights, (0, 0, 0, 0, 0, missing))
    band = weights.unflatten(3, (tiles, -1)).transpose(2, 3)  # (B, G, tiles, H, T, K, K)
    if width > K:
        index = places[:, None, :, None].expand(*band.shape)
        band = band.new_zeros(*band.shape[:-1], width).scatter(-1, index, band)
    band = band.flatten(-2)  # (B, G, tiles, H, T, K w)
    rows = torch.stack([value[:, :, :, first : first + width] for first in columns.first], 2).flatten(4)
    out = torch.cat([_product(band[:, :, :, top:end], rows, K, start) for top, end, start in segments(H, K)], 3)
    return out.transpose(2, 3).flatten(3, 4)[:, :, :, :W]


def segments(length: int, kernel_size: int) -> list[tuple[int, int, int | None]]:
    """(first query, end, start of their windows) along an axis: the queries that share the first window, those between
    with a window each (None), and those that share the last window."""
    K, last = kernel_size, length - kernel_size
    if not last:
        return [(0, length, 0)]
    top, end = K // 2 + 1, length - K // 2 - 1
    return [(0, top, 0), *([(top, end, None)] if top < end else []), (end, length, last)]


def window_starts(length: Size, kernel_size: int, device: torch.device) -> Tensor:
    """(L,) where the window of each position of an axis begins."""
    return (torch.arange(length, device=device) - kernel_size // 2).clamp(min=0).clamp(max=length - kernel_size)


def _product(band: Tensor, rows: Tensor, kernel_size: int, start: int | None) -> Tensor:
    """(B, G, tiles, h, T, c) of the rows of queries in a segment.

    Args:
        band: (B, G, tiles, h, T, K w) weights.
        rows: (B, G, tiles, H, w c) values.
        kernel_size: K.
        start: row where the window of all of them begins; None for windows of their own.
    """
    K, (h, T), width = kernel_size, band.shape[3:5], band.shape[-1]
    if start is None:
        windows = rows[..., 1:-1, :].unfold(3, K, 1).transpose(-1, -2).reshape(*band.shape[:4], width, -1)
        return band @ windows
    window = rows[..., start : start + K, :].reshape(*band.shape[:3], width, -1)
    return (band.flatten(3, 4) @ window).unflatten(3, (h, T))


class Columns(NamedTuple):
    """Tiles of queries along a row.

    Args:
        first: the first column that each tile sees.
        width: columns that a tile sees.
        places: (tiles, T, K) which of these each tap is.
    """

    first: tuple[int, ...]
    width: int
    places: Tensor


@size_constant
def _columns(length: int, kernel_size: int, device: torch.device) -> Columns:
    K, tiles = kernel_size, 1 if length <= 2 * kernel_size else -(-length // TILE)
    T = -(-length // tiles)
    starts = window_starts(length, K, torch.device("cpu"))
    starts = F.pad(starts, (0, tiles * T - length), value=length - K).view(tiles, T)
    width = int((starts[:, -1] - starts[:, 0]).max()) + K
    first = starts[:, 0].clamp(max=length - width)
    places = (starts - first[:, None])[..., None] + torch.arange(K)
    return Columns(tuple(first.tolist()), width, places.to(device))


def _in_graph(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """`dynamic_conv2d` of weights (B, G, H, W, K, K) where the size is left open: a tile is a whole row."""
    K, (H, W) = kernel_size, value.shape[2:4]
    offsets = torch.arange(K, device=value.device)
    rows, places = (window_starts(length, K, value.device)[:, None] + offsets for length in (H, W))
    index = places[:, None].expand(*weights.shape)
    band = weights.new_zeros(*weights.shape[:-1], W).scatter(-1, index, weights)  # (B, G, H, W, K, W)
    windows = value.index_select(2, rows.flatten()).unflatten(2, (H, K)).flatten(3, 4)  # (B, G, H, K W, c)
    return band.flatten(-2) @ windows
