"""Attention inside stripes of a map."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .depthwise import DepthwiseConv2d, depthwise
from .direct import in_own_precision, is_direct, replayed, replays
from .heads import check_heads
from .local_attention import AxisTiles, local_attention, local_plan, padded_heads
from .pointwise import Pointwise
from .symbolic import Size, any_count, ceil_div, fixed

Windows = Sequence[tuple[int | None, int | None]]
"""(height, width) of the stripes of each part of the heads; None for all of the map."""


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
        self.windows: Windows = [(None, None)] if stripe is None else [(None, stripe), (stripe, None)]
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
    if is_direct(qkv) and qkv.numel() and all(H % (h or H) == W % (w or W) == 0 for h, w in layer.windows):
        return _in_whole_stripes(layer, qkv)
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


def _in_whole_stripes(layer: StripeAttention2d, qkv: Tensor) -> Tensor:
    """`_stripe_attention` of a map that stripes divide: of copies of these, not of indexed positions."""
    parts, outs = CutStripes.apply(qkv, layer.num_heads, layer.windows), []
    for i, conv in enumerate(layer.lepe):
        q, k, v, values = parts[4 * i : 4 * i + 4]
        outs += [F.scaled_dot_product_attention(q, k, v), conv(values)]
    return JoinStripes.apply(qkv.shape[:3], layer.windows, *outs)


def _stripes(x: Tensor, height: int | None, width: int | None) -> Tensor:
    """A map (B, H, W, ...) by its stripes, (B, H / height, W / width, height, width, ...), in place."""
    B, H, W, *rest = x.shape
    h, w = height or H, width or W
    return x.view(B, H // h, h, W // w, w, *rest).transpose(2, 3)


def _cut(qkv: Tensor, heads: int, windows: Windows) -> list[Tensor]:
    qkv, outs = qkv.unflatten(3, (3, len(windows), heads // len(windows), -1)), []
    for i, window in enumerate(windows):
        stripes = _stripes(qkv[:, :, :, :, i], *window).flatten(0, 2)  # (B', height, width, 3, heads', d)
        outs += stripes.flatten(1, 2).permute(2, 0, 3, 1, 4)
        outs.append(stripes[:, :, :, 2].flatten(3).contiguous().permute(0, 3, 1, 2))
    return outs


class CutStripes(Function):
    """Of projections (B, H, W, 3C), for each part of the heads, queries, keys and values (B', heads', N', d) of all
    stripes as a batch, and the maps of the values (B', C', height, width)."""

    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int, windows: Windows) -> tuple[Tensor, ...]:
        ctx.shape, ctx.heads, ctx.windows = qkv.shape, heads, windows
        return tuple(_cut(qkv, heads, windows))

    @staticmethod
    @in_own_precision
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        heads, windows = ctx.heads, ctx.windows
        if replays(grads[0]):
            like = {"dtype": grads[0].dtype, "device": grads[0].device}
            anywhere = torch.zeros(ctx.shape, **like, requires_grad=True)  # it is linear
            return *replayed(lambda qkv: _cut(qkv, heads, windows), [anywhere], [True], grads), None, None
        dqkv = grads[0].new_empty(ctx.shape)
        for i, window in enumerate(windows):
            into = dqkv.unflatten(3, (3, len(windows), heads // len(windows), -1))[:, :, :, :, i]
            dq, dk, dv = _stripes(into, *window).unbind(5)
            grad_q, grad_k, grad_v, grad_values = grads[4 * i : 4 * i + 4]
            dq.copy_(grad_q.transpose(1, 2).reshape(dq.shape))
            dk.copy_(grad_k.transpose(1, 2).reshape(dk.shape))
            grad_values = grad_values.permute(0, 2, 3, 1).reshape(dv.shape)
            torch.add(grad_v.transpose(1, 2).reshape(dv.shape), grad_values, out=dv)
        return dqkv, None, None


class JoinStripes(Function):
    """The map (B, H, W, C) of what each part of the heads has for its stripes: attended values (B', heads', N', d), and
    what is added to them (B', C', height, width)."""

    @staticmethod
    def forward(ctx, size: tuple[int, int, int], windows: Windows, *outs: Tensor) -> Tensor:
        ctx.windows, ctx.shapes = windows, [out.shape for out in outs]
        whole = outs[0].new_empty(*size, len(windows), outs[1].shape[1])
        for i, window in enumerate(windows):
            attended, local, into = outs[2 * i], outs[2 * i + 1], _stripes(whole[:, :, :, i], *window)
            local = local.permute(0, 2, 3, 1).reshape(into.shape)
            torch.add(attended.transpose(1, 2).reshape(into.shape), local, out=into)
        return whole.flatten(3)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, grad = [], grad.reshape(*grad.shape[:3], len(ctx.windows), -1)
        for i, window in enumerate(ctx.windows):
            _, heads, _, d = ctx.shapes[2 * i]
            part = _stripes(grad[:, :, :, i], *window)
            part = part.reshape(-1, *part.shape[3:])  # (B', height, width, C')
            grads += [part.reshape(len(part), -1, heads, d).transpose(1, 2), part.permute(0, 3, 1, 2)]
        return None, None, *grads
