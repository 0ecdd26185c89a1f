"""Blocked local attention with halos."""

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import make_divisible, trunc_normal_
from torch import Tensor, nn

from .cache import ParameterCache
from .checks import check_counts, check_positive
from .local_attention import AxisTiles, local_attention, local_plan
from .pointwise import Pointwise
from .symbolic import Size, any_count, ceil_div, fixed, is_symbolic


def halo_axis(length: int, block_size: int, halo_size: int, stride: int = 1, mask: str = "pad") -> AxisTiles:
    """Tiles of halo attention along one axis.

    Query block I sees the keys from I * block_size - halo_size on, block_size + 2 * halo_size of them. With mask "pad"
    the caller pads the keys by `halo_size` at both ends, and these count.

    Args:
        length: number of keys of the map.
        block_size: keys of a block.
        halo_size: keys on each side of a block.
        stride: of the queries; divides `block_size`.
        mask: which keys outside the map do not count: "pad" for those beyond the padding, "all" for all.
    """
    queries, window = block_size // stride, block_size + 2 * halo_size
    num_queries, padding = -(-length // stride), halo_size if mask == "pad" else 0
    block = np.arange(-(-length // block_size))[:, None]
    query = np.minimum(block * queries + np.arange(queries), num_queries - 1)
    key = block * block_size + np.arange(window) - halo_size + padding
    num_keys = length + 2 * padding
    offset = np.arange(window) - (query % queries)[:, :, None] + window - 1
    pairs = np.where(((key >= 0) & (key < num_keys))[:, None], offset, -1)
    return AxisTiles(query, key.clip(0, num_keys - 1), pairs, num_queries, num_keys, 2 * window - 1)


def graph_halo_axis(
    length: Size, block_size: int, halo_size: int, stride: int = 1, mask: str = "pad", *, device: torch.device
) -> AxisTiles:
    """`halo_axis` in a graph, with one key of padding, at the end, that stands for all; pairs only tell what counts."""
    queries, window = block_size // stride, block_size + 2 * halo_size
    tiles, num_queries, padding = ceil_div(length, block_size), ceil_div(length, stride), halo_size * (mask == "pad")
    query = torch.arange(tiles * queries, device=device).unflatten(0, (tiles, queries)).clamp(max=num_queries - 1)
    block = torch.arange(tiles, device=device)[:, None]
    key = block * block_size + torch.arange(window, device=device) - halo_size
    counts = (key >= -padding) & (key < length + padding)
    keys = torch.where((key >= 0) & (key < length), key, length)
    place = torch.arange(num_queries, device=device)
    places = place // queries, place % queries
    return AxisTiles(query, keys, torch.where(counts, 0, -1)[:, None], num_queries, length + 1, 1, places)


class HaloAttention2d(nn.Module):
    """Self-attention of blocks of positions to the block and a halo around it, with strided queries on demand.

    "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731. The logits are
    scale <q, k> + <q, R_h[row offset]> + <q, R_w[column offset]>, with tables R that all heads share. Keys outside the
    map are zero and take part, as in the published models; sizes that the block does not divide are padded further, and
    that padding is masked.

    Cost: N C (D_qk / s^2 + D_qk + D_v) + N / s^2 w^2 (D_qk + D_v) + 2 N / s^2 w D_qk multiply-adds for N = H W
    positions of a map that blocks divide, C channels in, D_qk channels of all queries, D_v channels out, a window of
    w = block_size + 2 halo_size and queries of stride s. Queries and keys are multiplied at a width per head of
    D_qk / heads + 2 w. In fused attention, that is in graphs, in half precision and on other devices than CPUs, weights
    and values are too; the width is then rounded up to a multiple of 8.

    Args:
        dim: channels C.
        dim_out: channels of the values and the output, `dim` if None.
        stride: 1 or 2; of the queries, or of an average pooling after the attention if `block_size` is odd.
        num_heads: attention heads; must divide `dim_out`.
        dim_head: query and key channels of a head; dim_out * qk_ratio / num_heads, rounded, if None.
        block_size: side of a block of queries, in positions of the map.
        halo_size: width of the halo.
        qk_ratio: query and key channels per output channel, where `dim_head` is None.
        qkv_bias: bias of the query, key and value projections.
        avg_down: stride by average pooling for even blocks too.
        scale_pos_embed: scale the position logits as well.
        mask: "pad" to let the zero keys of the halo around the map take part, "all" to mask every key outside it; the
            published weights need the former.

    Raises:
        ValueError: if `num_heads` does not divide `dim_out`, a size is out of range or `mask` is neither of the two.

    Shape:
        (B, dim, H, W) to (B, dim_out, ceil(H / stride), ceil(W / stride)), any H and W.

    Example:
        >>> import torch
        >>> attention = HaloAttention2d(64, stride=2, num_heads=4)
        >>> attention(torch.randn(1, 64, 30, 41)).shape
        torch.Size([1, 64, 15, 21])
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        mask: str = "pad",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim_out = dim_out or dim
        check_counts(dim=dim, dim_out=dim_out, num_heads=num_heads)
        check_positive(qk_ratio=qk_ratio)
        if dim_out % num_heads:
            raise ValueError(f"dim_out {dim_out} is not divisible by num_heads {num_heads}")
        dim_head = dim_head or make_divisible(dim_out * qk_ratio) // num_heads
        if stride not in (1, 2) or dim_head < 1:
            raise ValueError(f"expected stride 1 or 2 and dim_head >= 1, got stride {stride} and dim_head {dim_head}")
        if mask not in ("pad", "all"):
            raise ValueError(f"expected mask 'pad' or 'all', got {mask!r}")
        self.dim_out, self.num_heads, self.dim_head = dim_out, num_heads, dim_head
        self.stride, self.avg_down, self.mask = stride, avg_down, mask
        self._set_window(block_size, halo_size)
        self.scale = dim_head**-0.5
        self.scale_pos_embed = scale_pos_embed
        self.q = Pointwise(dim, num_heads * dim_head, bias=qkv_bias, **dd)
        # Head by head, the keys of a head before its values.
        self.kv = Pointwise(dim, num_heads * dim_head + dim_out, bias=qkv_bias, **dd)
        # Of 2 w - 1 rows the last w + T - 1 are read, for blocks of T x T queries.
        table = 2 * (block_size + 2 * halo_size) - 1, dim_head
        self.height_rel = nn.Parameter(torch.empty(table, **dd))
        self.width_rel = nn.Parameter(torch.empty(table, **dd))
        self._cache = ParameterCache()
        self.reset_parameters()

    def _set_window(self, block_size: int, halo_size: int) -> None:
        if block_size < self.stride or halo_size < 0:
            raise ValueError(
                f"expected block_size >= stride and halo_size >= 0, got block_size {block_size}, halo_size {halo_size}"
            )
        self.block_size, self.halo_size = block_size, halo_size
        pooled = self.stride == 2 and (self.avg_down or block_size % 2 == 1)
        self.query_stride = 1 if pooled else self.stride
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()

    @torch.no_grad()
    def resize(self, block_size: int, halo_size: int) -> None:
        """Change the window and resample the position tables linearly, the ends of what is read onto the ends.

        They are new parameters: make the optimizer afterwards.

        Args:
            block_size: new side of a block.
            halo_size: new width of the halo.
        """
        queries = self.block_size // self.query_stride
        self._set_window(block_size, halo_size)
        new_window, new_queries = block_size + 2 * halo_size, block_size // self.query_stride
        for name in ("height_rel", "width_rel"):
            table = getattr(self, name)
            read = table[(len(table) + 1) // 2 - queries :].T[None]
            read = F.interpolate(read, new_window + new_queries - 1, mode="linear", align_corners=True)[0].T
            new = F.pad(read, (0, 0, new_window - new_queries, 0)).contiguous()
            setattr(self, name, nn.Parameter(new, table.requires_grad))

    def reset_parameters(self) -> None:
        for linear in (self.q, self.kv):
            trunc_normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=self.dim_head**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        s = self.query_stride
        x = x.permute(0, 2, 3, 1)
        return self.pool(_halo_attention(self, self.q(x[:, ::s, ::s]), self.kv(x)).permute(0, 3, 1, 2))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, dim_head={self.dim_head}, block_size={self.block_size}, "
            f"halo_size={self.halo_size}, query_stride={self.query_stride}, mask={self.mask!r}"
        )


def _relative(table: Tensor, queries: int, block: int) -> Tensor:
    """Rows (queries, w, d) of a table (2 w - 1, d) for each query of an axis and each place in its window.

    Offsets count queries, not positions of the map, and start at the window's first key, as the published weights want.
    """
    window = (len(table) + 1) // 2
    place, query = (torch.arange(n, device=table.device) for n in (window, queries))
    offset = place - (query % block)[:, None] + window - 1
    return table.index_select(0, offset.flatten()).unflatten(0, offset.shape)


@torch.fx.wrap
@any_count
def _halo_attention(layer: HaloAttention2d, q: Tensor, kv: Tensor) -> Tensor:
    """(B, H / s, W / s, D_qk) queries and (B, H, W, D_qk + D_v) keys and values to (B, H / s, W / s, D_v). Opaque to
    symbolic tracing, as its tiling depends on the size."""
    (rows, cols), (H, W) = q.shape[1:3], fixed(*kv.shape[1:3])
    heads, d, block, halo = layer.num_heads, layer.dim_head, layer.block_size, layer.halo_size
    window = block, halo, layer.query_stride, layer.mask
    plan = local_plan((halo_axis, graph_halo_axis), (H, W), (window, window), q.device, heads)
    if is_symbolic(H, W):
        kv = F.pad(kv, (0, 0, 0, 1, 0, 1))
    elif layer.mask == "pad":
        kv = F.pad(kv, (0, 0, *(halo,) * 4))
    tables = [layer.height_rel, layer.width_rel]

    def relative() -> list[Tensor]:
        sizes = zip(tables, (rows, cols), strict=True)
        return [_relative(table, n, block // layer.query_stride).to(q.dtype) for table, n in sizes]

    height, width = layer._cache((H, W, block, q.dtype), tables, relative)
    k, v = kv.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2).split([d, layer.dim_out // heads], -1)
    q = q.unflatten(3, (heads, d)).permute(0, 3, 1, 2, 4)  # (B, heads, H / s, W / s, d)
    position = q * layer.scale if layer.scale_pos_embed else q
    height = torch.einsum("bnyxd,yud->bnyxu", position, height).flatten(2, 3)
    width = torch.einsum("bnyxd,xud->bnyxu", position, width).flatten(2, 3)
    out = local_attention(q.flatten(2, 3), k, v, plan, scale=layer.scale, axis_logits=(height, width))
    return out.transpose(1, 2).flatten(2).unflatten(1, (rows, cols))
