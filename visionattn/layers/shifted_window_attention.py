"""Attention inside windows that every second block shifts, with a bias by relative position."""

import numpy as np
import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from .cache import ParameterCache
from .direct import is_direct
from .local_attention import AxisTiles, local_attention, local_plan, padded_heads, relative_bias
from .symbolic import Size, any_count, ceil_div, fixed, is_symbolic
from .window_attention import WindowAttention2d


def shifted_window_axis(length: int, window_size: int, shift: int) -> AxisTiles:
    """Tiles of shifted window attention along one axis, whose keys are padded to a multiple of the window.

    The axis is rolled by `shift`, so that the last window has its end and its start, which do not see each other. Pairs
    are numbered query - key + window_size - 1.

    Args:
        length: number of queries.
        window_size: keys of a window.
        shift: less than a window.
    """
    w, tiles = window_size, -(-length // window_size)
    first, place, end = np.arange(tiles)[:, None] * w, np.arange(w), tiles * w
    wrapped = first + place >= end - shift
    keys = first + place + shift - wrapped * end
    # Places of padding have the query of one that is on the map: the first one, or the first one that was wrapped.
    asks = np.where(keys < length, place, (first + shift >= length) * (w - shift))
    asked_wrapped = first + asks >= end - shift
    pairs = np.where(asked_wrapped[:, :, None] == wrapped[:, None], asks[:, :, None] - place + w - 1, -1)
    return AxisTiles(first + asks + shift - asked_wrapped * end, keys, pairs, length, end, 2 * w - 1)


def graph_shifted_window_axis(
    length: Size, window_size: int, shift: int | Tensor, *, device: torch.device
) -> AxisTiles:
    """`shifted_window_axis` in a graph, with one key of padding, at the end, that stands for all."""
    w, tiles = window_size, ceil_div(length, window_size)
    first, place, end = torch.arange(tiles, device=device)[:, None] * w, torch.arange(w, device=device), tiles * w

    def rolled(position: Tensor, wrapped: Tensor) -> Tensor:
        return torch.where(wrapped, position - end, position)  # ONNX has no product with what is known when it runs

    wrapped = first + place >= end - shift
    keys = rolled(first + place + shift, wrapped)
    asks = torch.where(keys < length, place, (first + shift >= length) * (w - shift))
    asked_wrapped = first + asks >= end - shift
    pairs = torch.where(asked_wrapped[:, :, None] == wrapped[:, None], asks[:, :, None] - place + (w - 1), -1)
    query = torch.arange(length, device=device)
    query = torch.where(query < shift, query - shift + end, query - shift)
    queries, places = rolled(first + asks + shift, asked_wrapped), (query // w, query % w)
    return AxisTiles(queries, keys.clamp(max=length), pairs, length, length + 1, 2 * w - 1, places)


class ShiftedWindowAttention2d(WindowAttention2d):
    """Self-attention inside windows with a bias by relative position, in every second block of shifted windows.

    "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030. As the published
    models, a map of the size that the layer is made for that is not larger than a window is one window, whatever the
    shift; on maps of other sizes windows and shifts are always as they are made. Padding to full windows takes part as
    keys.

    Cost: 4 N C^2 + 2 N' C w^2 multiply-adds for N = H W positions, N' of them with the padding, C channels and w x w
    windows.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        map_size: (height, width) of the map that it is made for.
        window_size: side w of a window; that of the map if it is smaller.
        shifted: shift the windows by half their side.
        qkv_bias: bias of the query, key and value projections.

    Raises:
        ValueError: if `num_heads` does not divide `dim` or `window_size` is not positive.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W.

    Example:
        >>> import torch
        >>> ShiftedWindowAttention2d(64, num_heads=2, shifted=True)(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: int | tuple[int, int] = (14, 14),
        window_size: int = 7,
        shifted: bool = False,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        self.map_size = to_2tuple(map_size)
        window_size = min(window_size, *self.map_size)
        super().__init__(dim, num_heads, window_size, qkv_bias, device, dtype)
        self.shift = window_size // 2 if shifted else 0
        side = 2 * window_size - 1
        self.rpb = nn.Parameter(torch.empty(num_heads, side, side, device=device, dtype=dtype))
        self._cache = ParameterCache()
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_shifted(self, self.qkv(x)))

    def window(self, height: Size, width: Size, device: torch.device) -> tuple[int, int | Tensor]:
        """(side, shift) of the windows on a map of that size; the shift is a tensor where a graph leaves that open."""
        if not self.shift or self.window_size < min(self.map_size):
            return self.window_size, self.shift
        if not is_symbolic(height, width):
            return self.window_size, 0 if (height, width) == self.map_size else self.shift
        rows, cols = (torch.full((1,), length, dtype=torch.float32, device=device) for length in (height, width))
        other = (rows != self.map_size[0]) | (cols != self.map_size[1])
        return self.window_size, other * self.shift

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}"


@torch.fx.wrap
@any_count
def _shifted(layer: ShiftedWindowAttention2d, qkv: Tensor) -> Tensor:
    """(B, H, W, 3C) projections to (B, H, W, C). Opaque to symbolic tracing, as its tiling depends on the size."""
    H, W = fixed(*qkv.shape[1:3])
    window = layer.window(H, W, qkv.device)
    plan = local_plan((shifted_window_axis, graph_shifted_window_axis), (H, W), (window, window), qkv.device)
    key = H, W, window[1] == 0 if isinstance(window[1], int) else None, qkv.dtype
    by_kind = is_direct(qkv) and torch.is_grad_enabled()

    def bias() -> list[Tensor]:
        return [each.to(qkv.dtype) for each in relative_bias(layer.rpb.flatten(1), plan, by_kind)]

    biases = layer._cache(key, [layer.rpb], bias)
    q, k, v = padded_heads(qkv, layer.qkv.bias, layer.num_heads, plan)
    out = local_attention(q, k, v, plan, biases)
    return out.transpose(1, 2).flatten(2).unflatten(1, (H, W))
