"""Neighbourhood attention, dilated and strided, without a custom kernel."""

import math
from functools import cache
from itertools import product

import numpy as np
import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from .cache import ParameterCache
from .checks import check_rates
from .direct import is_direct
from .heads import check_heads
from .local_attention import AxisTiles, local_attention, local_plan, padded_heads, relative_bias
from .pointwise import Pointwise
from .position import resize_table
from .symbolic import Size, any_count, ceil_div, fixed

COPY = 32
"""Queries whose products with a key take as long as it takes to copy the key, on CPUs."""


def neighborhood_axis(
    length: int,
    kernel_size: int,
    dilation: int = 1,
    stride: int = 1,
    tile: int | None = None,
    whole: int | None = None,
) -> AxisTiles:
    """Tiles of neighbourhood attention along one axis.

    Tokens with equal position modulo `dilation` form a group. Inside a group of n, query p attends to the `kernel_size`
    keys from clamp(lead(p) - kernel_size // 2, 0, n - kernel_size), where lead(p) is the centre of its stride group.
    Pairs are numbered key - query + kernel_size - 1 in steps of the dilation.

    Args:
        length: number of queries.
        kernel_size: keys per query.
        dilation: distance between neighbouring keys.
        stride: consecutive queries that share a window.
        tile: queries of a tile, of which there are as many as it takes to get a multiple of the stride; at least 4 and
            the kernel if None.
        whole: longest group that is one tile, as masking a small map costs less than cutting it up; twice the kernel
            if None. Groups of queries that share windows are cut up.
    """
    K, T = kernel_size, stride * -(-(tile or max(kernel_size, 4)) // stride)
    num_keys = max(length, K * dilation)
    groups = [
        (g, len(range(g, length, dilation)), len(range(g, num_keys, dilation))) for g in range(min(dilation, length))
    ]
    longest = max(n for _, _, n in groups)
    if stride == 1 and longest <= (whole or 2 * K):
        T = max(m for _, m, _ in groups)
    queries, keys, pairs = [], [], []
    lead = np.arange(longest) // stride * stride + stride // 2
    starts = [np.clip(np.minimum(lead[:n], n - 1) - K // 2, 0, n - K) for _, _, n in groups]
    width = K + max(
        start[min(first + T, m) - 1] - start[first]
        for (_, m, _), start in zip(groups, starts, strict=True)
        for first in range(0, m, T)
    )
    for (g, m, n), start in zip(groups, starts, strict=True):
        for first in range(0, m, T):
            query = np.minimum(np.arange(first, first + T), m - 1)
            key = max(min(start[first], n - width), 0) + np.arange(width)
            begin = start[query][:, None]
            pairs.append(np.where((begin <= key) & (key < begin + K), key - query[:, None] + K - 1, -1))
            queries.append(query * dilation + g)
            keys.append(np.minimum(key, n - 1) * dilation + g)
    return AxisTiles(np.stack(queries), np.stack(keys), np.stack(pairs), length, num_keys, 2 * K - 1)


def graph_neighborhood_axis(
    length: Size, kernel_size: int, dilation: int = 1, stride: int = 1, *, device: torch.device
) -> AxisTiles:
    """`neighborhood_axis` in a graph, with one key of padding, at the end, that stands for all."""
    K, T = kernel_size, stride * -(-max(kernel_size, 4) // stride)
    span = T - stride if T % stride == 0 else stride * -(-(T - 1) // stride)
    tiles, width = ceil_div(length, dilation * T), K + span
    # (groups, tiles, T), keys (groups, tiles, w); positions inside a group of n keys, the padded ones included.
    group = torch.arange(dilation, device=device)[:, None, None]
    n = ((length - group + (dilation - 1)) // dilation).clamp(min=K)
    query = torch.arange(tiles * T, device=device).unflatten(0, (tiles, T)).minimum(n - 1)
    lead = query if stride == 1 else (query // stride * stride + stride // 2).minimum(n - 1)
    start = (lead - K // 2).clamp(min=0).minimum(n - K)
    key = start[..., :1].minimum((n - width).clamp(min=0)) + torch.arange(width, device=device)
    begin, place = start[..., None], key[:, :, None]
    pairs = torch.where((begin <= place) & (place < begin + K), place - query[..., None] + K - 1, -1)
    queries, keys = (query * dilation + group).clamp(max=length - 1), (key * dilation + group).clamp(max=length)
    position = torch.arange(length, device=device)
    group, query = position % dilation, position // dilation
    places = group * tiles + query // T, query % T
    tables = (x.flatten(0, 1) for x in (queries, keys, pairs))
    return AxisTiles(*tables, length, length + 1, 2 * K - 1, places)


def graph_global_axis(length: Size, *window, device: torch.device) -> AxisTiles:
    """One tile, in a graph: every query sees every key but that of padding."""
    position = torch.arange(length, device=device)
    pairs, places = position - position[:, None] + (length - 1), (torch.zeros_like(position), position)
    return AxisTiles(position[None], position[None], pairs[None], length, length + 1, 2 * length - 1, places)


class NeighborhoodAttention2d(nn.Module):
    """Self-attention of every position to the kernel_size x kernel_size positions around it.

    "Neighborhood Attention Transformer", arXiv 2204.07143; dilated: arXiv 2209.15001; strided (generalised): arXiv
    2504.16922. At the border the window is shifted inwards, so every query has exactly kernel_size**2 keys. A map
    smaller than kernel_size * dilation is padded with zeros at the bottom and right before the projection, and the
    padding takes part, as in the published models.

    Cost: 4 N C^2 + 2 N C K^2 multiply-adds for N = H W positions, C channels and a K x K window.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        kernel_size: window, in keys; int or (height, width).
        dilation: distance between keys; int or (height, width), None means 1.
        stride: queries that share a window, at most `kernel_size`; int or (height, width).
        rel_pos_bias: learn a bias per head and relative position.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` does not divide `dim` or a kernel, dilation or stride is out of range.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W.

    Example:
        >>> import torch
        >>> attention = NeighborhoodAttention2d(64, num_heads=2, kernel_size=7, dilation=4)
        >>> attention(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    axes = neighborhood_axis, graph_neighborhood_axis

    last_product = "proj"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] | None = 1,
        stride: int | tuple[int, int] = 1,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_rates(attn_drop=attn_drop)
        dd = {"device": device, "dtype": dtype}
        self.kernel_size, self.dilation, self.stride = (
            to_2tuple(each) for each in (kernel_size, 1 if dilation is None else dilation, stride)
        )
        for k, d, s in zip(self.kernel_size, self.dilation, self.stride, strict=True):
            if k < 2 or d < 1 or not 1 <= s <= k:
                raise ValueError(
                    f"expected kernel_size >= 2, dilation >= 1 and 1 <= stride <= kernel_size, "
                    f"got kernel_size {k}, dilation {d}, stride {s}"
                )
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, **dd)
        table = [2 * k - 1 for k in self.kernel_size]
        self.rpb = nn.Parameter(torch.empty(num_heads, *table, **dd)) if rel_pos_bias else None
        self.attn_drop = attn_drop
        self.proj = Pointwise(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._bias_cache = ParameterCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def spread(self, factor: int) -> None:
        """Dilate for maps of `factor` times the resolution."""
        self.dilation = tuple(factor * d for d in self.dilation)

    def window(self, height: Size, width: Size) -> tuple[tuple[Size, int, int], tuple[Size, int, int]]:
        """(kernel size, dilation, stride) of each axis on a map of that size."""
        return tuple(zip(self.kernel_size, self.dilation, self.stride, strict=True))

    def table(self, height: Size, width: Size) -> Tensor | None:
        """Relative position bias (heads, 2 K_h - 1, 2 K_w - 1) on a map of that size."""
        return self.rpb

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(_neighborhood_attention(self, self.qkv(x))))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"stride={self.stride}, rel_pos_bias={self.rpb is not None}"
        )


@cache
def _cpu_tiles(size: tuple[int, int], window: tuple[tuple, tuple]) -> tuple[tuple, tuple]:
    """The window with the tiles that cost least on CPUs; small maps are cut up too."""
    groups = [-(-length // dilation) for length, (_, dilation, _) in zip(size, window, strict=True)]

    def cost(tile: tuple[int, int]) -> int:
        tiles = math.prod(-(-n // T) for n, T in zip(groups, tile, strict=True))
        keys = math.prod(min(K + T - 1, n) for n, T, (K, *_) in zip(groups, tile, window, strict=True))
        return tiles * keys * (math.prod(tile) + COPY)

    tile = min(product(*(range(max(-(-K // 2), 4), max(K, 4) + 1) for K, *_ in window)), key=cost)
    return tuple((*axis, T, axis[0]) for axis, T in zip(window, tile, strict=True))


@torch.fx.wrap
@any_count
def _neighborhood_attention(layer: NeighborhoodAttention2d, qkv: Tensor) -> Tensor:
    """(B, H, W, 3C) projections to (B, H, W, C). Opaque to symbolic tracing, as its tiling depends on the size."""
    (H, W), heads, table, direct = fixed(*qkv.shape[1:3]), layer.num_heads, layer.rpb, is_direct(qkv)
    if direct and not qkv.numel():
        return qkv.chunk(3, -1)[2]
    window = layer.window(H, W)
    if direct and layer.axes[0] is neighborhood_axis and table is not None:
        window = _cpu_tiles((H, W), window)
    plan = local_plan(layer.axes, (H, W), window, qkv.device, heads if table is None else None)
    q, k, v = padded_heads(qkv, layer.qkv.bias, heads, plan)
    by_kind = direct and torch.is_grad_enabled()

    def bias() -> list[Tensor]:
        # Rounded last, as the gradient of an entry is a sum over the map.
        return [each.to(qkv.dtype) for each in relative_bias(layer.table(H, W).flatten(1), plan, by_kind)]

    biases = None if table is None else layer._bias_cache((H, W, window, qkv.dtype), [table], bias)
    out = local_attention(q, k, v, plan, biases, layer.scale, layer.attn_drop if layer.training else 0.0)
    return out.transpose(1, 2).flatten(2).unflatten(1, (H, W))


class TokenNeighborhoodAttention(NeighborhoodAttention2d):
    """Neighbourhood attention on a sequence of patches: (B, H * W, C) and the grid (H, W) to (B, H * W, C)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(x.unflatten(1, grid)).flatten(1, 2)


class TokenRelPosAttention(TokenNeighborhoodAttention):
    """Global attention with a relative position bias: neighbourhood attention with a window as large as the map.

    The bias table is made for a `kernel_size` map; it is resampled bicubically for others.
    """

    axes = neighborhood_axis, graph_global_axis

    def window(self, height: Size, width: Size) -> tuple[tuple[Size, int, int], tuple[Size, int, int]]:
        return (height, 1, 1), (width, 1, 1)

    def table(self, height: Size, width: Size) -> Tensor:
        return resize_table(self.rpb, (2 * height - 1, 2 * width - 1))
