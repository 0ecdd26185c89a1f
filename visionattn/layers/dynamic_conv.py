"""Convolution by kernels that differ from position to position, in windows that are shifted inwards at borders."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .direct import in_own_precision, is_direct, replayed, replays
from .size_constant import size_constant
from .symbolic import Size, fixed, is_symbolic

CHUNK = 2**21
"""Bytes of the weights among zeros that are computed with at once, so that they stay in the cache."""

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
    K, shape, (H, W) = kernel_size, value.shape[:2], value.shape[2:4]
    weights = weights.to(value.dtype)
    if is_symbolic(H, W):
        return _in_graph(weights.unflatten(-1, (K, K)), value, K)
    if min(H, W) < K:
        raise ValueError(f"expected a map of at least {K} x {K}, got {H} x {W}")
    if not is_direct(weights, value):
        compute = _forward
    else:
        compute = _DynamicConv.apply if torch.is_grad_enabled() else _by_groups
    return compute(weights.flatten(0, 1), value.flatten(0, 1), K).unflatten(0, shape)


def _forward(weights: Tensor, value: Tensor, K: int) -> Tensor:
    """`dynamic_conv2d` of (G, H, W, ...)."""
    H, W = fixed(*value.shape[1:3])
    columns = _columns(W, K, value.device)
    band, rows = _band(weights, columns, K), _rows(value, columns)
    out = []
    for top, end, start in segments(H, K):
        out.append(band[top:end] @ _windows(rows, K, end - top, start))
    out = torch.cat(out) if len(out) > 1 else out[0]
    return _across(out)[:, :, :W]


def _band(weights: Tensor, columns: "Columns", K: int) -> Tensor:
    """The weights (G, H, W, K^2) among zeros, for each column that a tile sees: (H, tiles, G, T, K w)."""
    places = columns.places
    taps = _along(weights, columns).unflatten(-1, (K, K))
    if columns.width > K:
        band = taps.new_zeros(*taps.shape[:-1], columns.width)
        taps = band.scatter_(-1, places[:, None, :, None].expand(taps.shape), taps)
    return taps.flatten(-2)


def _along(x: Tensor, columns: "Columns") -> Tensor:
    """(G, H, W, ...) to (H, tiles, G, T, ...): rows first, so that some of them are a batch of products as they lie."""
    tiles, T = columns.places.shape[:2]
    if missing := tiles * T - x.shape[2]:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (tiles, T)).movedim(0, 2)


def _across(x: Tensor) -> Tensor:
    """(H, tiles, G, T, ...) back to (G, H, tiles T, ...)."""
    return x.movedim(2, 0).flatten(2, 3)


def _rows(value: Tensor, columns: "Columns") -> Tensor:
    """What each tile sees of the values (G, H, W, c): (H, tiles, G, w, c)."""
    return torch.stack([value[:, :, first : first + columns.width].transpose(0, 1) for first in columns.first], 1)


def _windows(rows: Tensor, K: int, count: int, start: int | None) -> Tensor:
    """The K rows that each query sees, (queries, tiles, G, K w, c): all from `start`, or from 1, 2, 3, ..."""
    if start is not None:
        return rows[start : start + K].permute(1, 2, 0, 3, 4).flatten(2, 3).expand(count, -1, -1, -1, -1)
    return rows[1 : count + K].unfold(0, K, 1).movedim(-1, 3).flatten(3, 4)


def _step(weights: Tensor, K: int) -> int:
    """How many of the groups (B G, H, W, K^2) are computed at once."""
    return max(1, CHUNK // (2 * K * K * math.prod(weights.shape[1:3]) * weights.element_size()))


def _by_groups(weights: Tensor, value: Tensor, K: int) -> Tensor:
    """`_forward` of (B G, H, W, ...) on some groups after the other."""
    step, out = _step(weights, K), torch.empty_like(value)
    for part, v, o in zip(weights.split(step), value.split(step), out.split(step), strict=True):
        o.copy_(_forward(part, v, K))
    return out


class _DynamicConv(Function):
    """`_by_groups`, and gradients that add up in place what windows share."""

    @staticmethod
    def forward(ctx, weights: Tensor, value: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(weights, value)
        ctx.K = K
        return _by_groups(weights, value, K)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights, value), K, wanted = ctx.saved_tensors, ctx.K, ctx.needs_input_grad[:2]
        if replays(grad):
            return *replayed(partial(_forward, K=K), [weights, value], wanted, grad), None
        step, dweights, dvalue = _step(weights, K), torch.empty_like(weights), torch.zeros_like(value)
        tensors = weights, value, grad, dweights, dvalue
        for parts in zip(*(each.split(step) for each in tensors), strict=True):
            _backward(*parts, K)
        return dweights, dvalue, None


def _backward(weights: Tensor, value: Tensor, grad: Tensor, dweights: Tensor, dvalue: Tensor, K: int) -> None:
    """Writes the gradient of the weights, and adds that of the values."""
    H, W = value.shape[1:3]
    columns = _columns(W, K, value.device)
    band, rows, w = _band(weights, columns, K), _rows(value, columns), columns.width
    grad = _along(grad, columns).contiguous()
    dband, drows = torch.empty_like(band), torch.zeros_like(rows)
    for top, end, start in segments(H, K):
        part, g = band[top:end], grad[top:end]
        torch.matmul(g, _windows(rows, K, end - top, start).mT, out=dband[top:end])
        dwindows = (part.mT @ g).unflatten(3, (K, w))
        if start is None:
            for i in range(K):
                drows[1 + i : 1 + i + end - top] += dwindows[:, :, :, i]
        else:
            drows[start : start + K] += dwindows.sum(0).movedim(2, 0)
    dband = dband.unflatten(-1, (K, w))
    if w > K:
        dband = dband.gather(-1, columns.places[:, None, :, None].expand(*dband.shape[:-1], K))
    dweights.copy_(_across(dband.flatten(-2))[:, :, :W])
    for i, first in enumerate(columns.first):
        dvalue[:, :, first : first + w] += drows[:, i].transpose(0, 1)


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
    queries = np.arange(tiles * T).reshape(tiles, T)
    starts = np.clip(queries - K // 2, 0, length - K)
    width = int((starts[:, -1] - starts[:, 0]).max()) + K
    first = np.minimum(starts[:, 0], length - width)
    places = (starts - first[:, None])[..., None] + np.arange(K)
    return Columns(tuple(first.tolist()), width, torch.from_numpy(places).to(device))


def _in_graph(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """`dynamic_conv2d` of weights (B, G, H, W, K, K) where the size is left open: a tile is a whole row."""
    K, (H, W) = kernel_size, value.shape[2:4]
    offsets = torch.arange(K, device=value.device)
    rows, places = (window_starts(length, K, value.device)[:, None] + offsets for length in (H, W))
    index = places[:, None].expand(*weights.shape)
    band = weights.new_zeros(*weights.shape[:-1], W).scatter(-1, index, weights)  # (B, G, H, W, K, W)
    windows = value.index_select(2, rows.flatten()).unflatten(2, (H, K)).flatten(3, 4)  # (B, G, H, K W, c)
    return band.flatten(-2) @ windows
