"""Attention inside stripes of a map."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import DepthwiseConv2d, depthwise
from .heads import check_heads
from .local_attention import AxisTiles, local_attention, local_plan, padded_heads
from .pointwise import Pointwise
from .symbolic import Size, any_count, ceil_div, fixed


def stripe_axis(length: int, width: int | None) -> AxisTiles:
    """Tiles of stripe attention along one axis; what is beyond the map does not count.

    Args:
        length: number of queries and keys.
        width: of a stripe; None for one along the axis.
    """
    width = width or length
    keys = np.arange(-(-length // width) * width).reshape(-1, width)
    pairs = np.where(keys < length, 0, -1)[:, None].repeat(width, 1)
    keys = np.minimum(keys, length - 1)
    return AxisTiles(keys, keys, pairs, length, length, 1)


def graph_stripe_axis(length: Size, width: int | None, *, device: torch.device) -> AxisTiles:
    """`stripe_axis` in a graph, with one key of padding, at the end, which never counts."""
    width = width or length
    tiles = ceil_div(length, width)
    keys = torch.arange(tiles * width, device=device).unflatten(0, (tiles, width))
    pairs, query = torch.where(keys < length, 0, -1)[:, None], torch.arange(length, device=device)
    places = query // width, query % width
    return AxisTiles(keys.clamp(max=length - 1), keys.clamp(max=length), pairs, length, length + 1, 1, places)


class StripeAttention2d(nn.Module):
    """Self-attention of half the heads inside vertical stripes of the map, and of half inside horizontal ones.

    "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", arXiv 2107.00652. Each half
    has the channels of its heads; a depthwise 3 x 3 convolution of the values, which ends where the stripe does, is
    added. Stripes beyond the map are cut off, and what is there does not take part.

    Cost: 4 N C^2 + N s (H + W) C + 9 N C multiply-adds for N = H W positions, C channels and stripes of width s;
    4 N C^2 + 2 N^2 C + 9 N C without stripes.

    Args:
        dim: channels C.
        num_heads: attention heads, an even number if there are stripes; must divide `dim`.
        stripe: width s of a stripe; None for attention of all heads to the whole map.
        qkv_bias: bias of the query, key and value projections.

    Raises:
        ValueError: if `num_heads` does not divide `dim` or is odd, or `stripe` is not positive.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W.

    Example:
        >>> import torch
        >>> StripeAttention2d(64, num_heads=2, stripe=7)(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    last_product = "proj"

    def __init__(
        self, dim: int, num_heads: int, stripe: int | None = 7, qkv_bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if stripe is not None and (stripe < 1 or num_heads % 2):
            raise ValueError(
                f"expected stripe >= 1 and an even num_heads, got stripe {stripe} and num_heads {num_heads}"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.stripe = stripe
        self.windows = [(None, None)] if stripe is None else [(None, stripe), (stripe, None)]
        """(height, width) of the stripes of each part of the heads; None for all of the map."""
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.ModuleList(depthwise(dim // len(self.windows), 3, **dd) for _ in self.windows)
        self.proj = Pointwise(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_stripe_attention(self, self.qkv(x)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, stripe={self.stripe}"


@torch.fx.wrap
@any_count
def _stripe_attention(layer: StripeAttention2d, qkv: Tensor) -> Tensor:
    """(B, H, W, 3C) projections to (B, H, W, C). Opaque to symbolic tracing, as its tiling depends on the size."""
    H, W = fixed(*qkv.shape[1:3])
    heads, values, outs = layer.num_heads // len(layer.windows), qkv.chunk(3, -1)[2], []
    for i, (rows, cols) in enumerate(layer.windows):
        plan = local_plan((stripe_axis, graph_stripe_axis), (H, W), ((rows,), (cols,)), qkv.device, heads)
        q, k, v = (
            x.chunk(len(layer.windows), 1)[i] for x in padded_heads(qkv, layer.qkv.bias, layer.num_heads, plan)
        )  # fmt: skip
        out = local_attention(q, k, v, plan).transpose(1, 2).flatten(2).unflatten(1, (H, W))
        v = values.chunk(len(layer.windows), -1)[i].permute(0, 3, 1, 2)
        outs.append(out + in_stripes(layer.lepe[i], v, rows, cols).permute(0, 2, 3, 1))
    return torch.cat(outs, -1)


def in_stripes(conv: DepthwiseConv2d, x: Tensor, height: int | None, width: int | None) -> Tensor:
    """A convolution of each stripe of a map (B, C, H, W) by itself.

    Args:
        conv: keeps the size.
        x: map.
        height: of a stripe; None for that of the map.
        width: likewise.
    """
    if height is None and width is None:
        return conv(x)
    axis, size = (3, width) if height is None else (2, height)
    length = x.shape[axis]
    x = F.pad(x, (0, -length % size) if axis == 3 else (0, 0, 0, -length % size)).unflatten(axis, (-1, size))
    stripes = x.movedim(axis, 1)  # (B, stripes, C, ...)
    count = stripes.shape[1]
    stripes = conv(stripes.flatten(0, 1)).unflatten(0, (-1, count)).movedim(1, axis)
    return stripes.flatten(axis, axis + 1).narrow(axis, 0, length)
