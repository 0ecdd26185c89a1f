"""Attention inside windows."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts
from .heads import check_heads, parted_heads
from .local_attention import AxisTiles, local_attention, local_plan, padded_heads
from .pointwise import Pointwise
from .symbolic import Size, any_count, ceil_div, fixed, is_symbolic


def window_axis(length: int, window_size: int) -> AxisTiles:
    """Tiles of window attention along one axis, whose keys are padded to a multiple of the window.

    Args:
        length: number of queries.
        window_size: keys of a window.
    """
    tiles = -(-length // window_size)
    keys = np.arange(tiles * window_size).reshape(tiles, window_size)
    return AxisTiles(np.minimum(keys, length - 1), keys, None, length, keys.size, 1)


def graph_window_axis(length: Size, window_size: int, device: torch.device) -> AxisTiles:
    """`window_axis` in a graph, with one key of padding, at the end, that stands for all."""
    tiles = ceil_div(length, window_size)
    position = torch.arange(tiles * window_size, device=device).unflatten(0, (tiles, window_size))
    queries, keys = position.clamp(max=length - 1), position.clamp(max=length)
    query = torch.arange(length, device=device)
    return AxisTiles(queries, keys, None, length, length + 1, 1, (query // window_size, query % window_size))


class WindowAttention2d(nn.Module):
    """Self-attention inside non-overlapping windows.

    "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645. A map that is no multiple of the window is padded
    with zeros at the bottom and right before the projection, and the padding takes part as keys, as in the published
    models: it has the biases of the projection as key and value.

    Cost: 4 N C^2 + 2 N' C w^2 multiply-adds for N = H W positions, N' of them with the padding, C channels and w x w
    windows.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        window_size: side w of a window.
        qkv_bias: bias of the query, key and value projections.

    Raises:
        ValueError: if `num_heads` does not divide `dim` or `window_size` is not positive.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W.

    Example:
        >>> import torch
        >>> WindowAttention2d(64, num_heads=2, window_size=7)(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int = 7, qkv_bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_counts(window_size=window_size)
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = Pointwise(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        x = _partition(x, self.window_size)
        x = self.proj(window_attention(self.qkv(x), self.qkv.bias, self.num_heads, self.window_size))
        return _merge(x, self.window_size, H, W)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


@torch.fx.wrap
@any_count
def _partition(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) to its windows (windows, size, size, C), if it consists of such: what is cut before the projection
    need not be copied three times after it."""
    H, W = fixed(*x.shape[1:3])
    if is_symbolic(H, W) or H % size or W % size:
        return x
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(0, 2)


@torch.fx.wrap
@any_count
def _merge(x: Tensor, size: int, H: Size, W: Size) -> Tensor:
    """The map of what `_partition` returned."""
    if x.shape[1] == H and x.shape[2] == W:
        return x
    return x.unflatten(0, (-1, H // size, W // size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


@torch.fx.wrap
@any_count
def window_attention(
    qkv: Tensor, bias: Tensor | None, heads: int, size: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention inside windows; the padding to full windows takes part as keys. Opaque to symbolic tracing, as its
    tiling depends on the size.

    Args:
        qkv: (B, H, W, 3C) projections, ordered (query | key | value, head, channel).
        bias: (3C,) of the projection.
        heads: number of heads.
        size: side of a window.
        scale: factor of the logits, (C / heads)**-0.5 if None.
        dropout: rate of dropout on the attention weights.

    Returns:
        (B, H, W, C).
    """
    H, W = fixed(*qkv.shape[1:3])
    if not is_symbolic(H, W) and H == W == size:  # one window each
        q, k, v = parted_heads(qkv, heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        return x.transpose(1, 2).flatten(2).unflatten(1, (H, W))
    plan = local_plan((window_axis, graph_window_axis), (H, W), ((size,), (size,)), qkv.device)
    out = local_attention(*padded_heads(qkv, bias, heads, plan), plan, None, scale, dropout)
    return out.transpose(1, 2).flatten(2).unflatten(1, (H, W))
