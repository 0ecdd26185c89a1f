"""Attention inside windows."""

from functools import lru_cache
from operator import index

import numpy as np
import torch
from torch import Tensor, nn

from .local_attention import AxisTiles, LocalPlan, PlanTensors, graph_plan, local_attention, pad_projection, pair_mask
from .pointwise import Pointwise
from .symbolic import Size, ceil_div, is_symbolic


def window_axis(length: int, window_size: int) -> AxisTiles:
    """Tiles of window attention along one axis, whose keys are padded to a multiple of the window.

    Args:
        length: number of queries.
        window_size: keys of a window.
    """
    tiles = -(-length // window_size)
    keys = np.arange(tiles * window_size).reshape(tiles, window_size)
    pairs = np.zeros((tiles, window_size, window_size), dtype=np.int64)
    return AxisTiles(np.minimum(keys, length - 1), keys, pairs, length, keys.size, 1)


def graph_window_axis(length: Size, window_size: int, device: torch.device) -> AxisTiles:
    """`window_axis` in a graph, with one key of padding, at the end, that stands for all."""
    tiles = ceil_div(length, window_size)
    position = torch.arange(tiles * window_size, device=device).unflatten(0, (tiles, window_size))
    queries, keys = position.clamp(max=length - 1), position.clamp(max=length)
    query = torch.arange(length, device=device)
    return AxisTiles(queries, keys, None, length, length + 1, 1, (query // window_size, query % window_size))


@lru_cache(maxsize=128)
def _plan(height: int, width: int, window_size: int) -> LocalPlan:
    return LocalPlan(window_axis(height, window_size), window_axis(width, window_size))


@torch.compiler.assume_constant_result
def _plan_on(height: int, width: int, window_size: int, device: torch.device) -> PlanTensors:
    return _plan(height, width, window_size).on(device)


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
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if window_size < 1:
            raise ValueError(f"expected window_size >= 1, got {window_size}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = Pointwise(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_attend(self, self.qkv(x)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


@torch.fx.wrap
def _attend(attention: WindowAttention2d, qkv: Tensor) -> Tensor:
    """(B, H, W, 3C) projections to (B, H, W, C). Opaque to symbolic tracing, as its tiling depends on the size."""
    return window_attention(qkv, attention.qkv.bias, attention.num_heads, attention.window_size)


def window_attention(
    qkv: Tensor, bias: Tensor | None, heads: int, size: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention inside windows; the padding to full windows takes part as keys.

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
    B, H, W, C = qkv.shape
    if is_symbolic(H, W):
        plan = graph_plan(*(graph_window_axis(length, size, qkv.device) for length in (H, W)))
        padded = pad_projection(qkv, bias, 1, 1)
    else:
        H, W = index(H), index(W)
        plan = _plan_on(H, W, size, qkv.device)
        padded = pad_projection(qkv, bias, -H % size, -W % size)
    q = qkv.reshape(B, H * W, 3, heads, C // (3 * heads)).permute(2, 0, 3, 1, 4)[0]
    _, k, v = padded.flatten(1, 2).unflatten(2, (3, heads, C // (3 * heads))).permute(2, 0, 3, 1, 4)
    out = local_attention(q, k, v, plan, pair_mask(plan, heads), scale, dropout)
    return out.transpose(1, 2).reshape(B, H, W, C // 3)
