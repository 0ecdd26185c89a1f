"""Blocked local attention: tiles of queries against windows of keys.

Window, halo, neighbourhood and grid attention are one computation. The map is cut into tiles of queries; all queries of
a tile see parts of one rectangular window of keys. A `Plan` says which queries form a tile, which keys its window
holds and which (query, key) pairs count. Tiles and windows are copied and attended by fused attention (`fused_tiles`),
or, where these are faster on CPUs, by products with gradients of their own (`tile_products`): a key is copied once per
tile that sees it, not per query. On NVIDIA GPUs a kernel of our own reads both in place (`tile_kernel`).

A plan depends on sizes alone. It is built in NumPy from Python integers and kept. Where a graph leaves the size open,
the plan is arithmetic in the graph, on tiles that are the same at any size.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import is_plain
from .direct import is_direct
from .fused_tiles import fused_attention
from .heads import parted_heads
from .plan import Plan, TileGroup
from .size_constant import size_constant
from .symbolic import Size, is_exporting, is_symbolic
from .tile_products import axis_products, takes_products, tile_products

MAX_PAIRS = 2**20
MAX_HEAD_DIM = 128  # of the kernel for GPUs
MAX_TILE = 1024  # queries of a tile, likewise
OUTSIDE = 2**10  # entries of -inf that follow a table there: adding up the gradient of a single one takes long


class AxisTiles(NamedTuple):
    """Tiles along one axis of a map.

    Args:
        queries: (tiles, T) position of each query. A partial tile repeats a query; the copies are dropped.
        keys: (tiles, w) position of each key of the window.
        pairs: (tiles, T, w) index of each (query, key) pair into this axis of a relative table, -1 if the pair does not
            count. Every query must have one pair that counts. None where all count and there is no table.
        num_queries: length of the axis in queries.
        num_keys: length of the axis in keys; it exceeds `num_queries` where the caller pads the keys.
        num_entries: length of this axis of the relative table.

    The tiles of a graph are tensors. Their `pairs` may be (tiles, 1, w), and they have
        places: (num_queries,) tile of each query, and its place in the tile.
    """

    queries: np.ndarray | Tensor
    keys: np.ndarray | Tensor
    pairs: np.ndarray | Tensor | None
    num_queries: Size
    num_keys: Size
    num_entries: Size
    places: tuple[Tensor, Tensor] | None = None


def local_plan(
    axes: tuple[Callable[..., AxisTiles], Callable[..., AxisTiles]],
    size: tuple[Size, Size],
    windows: tuple[tuple, tuple],
    device: torch.device,
    heads: int | None = None,
) -> Plan:
    """The plan for a map.

    Args:
        axes: two functions that make the tiles of an axis: `axis(length, *window)`, and `axis(length, *window,
            device=device)` in a graph that leaves the size open.
        size: (height, width) of the map, as `fixed` returns it.
        windows: what the tiles of rows and of columns depend on besides the length.
        device: of the tensors.
        heads: of the mask; None for a relative table.
    """
    (rows, cols), (height, width) = windows, size
    if is_symbolic(height, width):
        return _graph_plan(axes[1](height, *rows, device=device), axes[1](width, *cols, device=device), heads)
    return _plan(axes[0], (height, *rows), (width, *cols), device, heads)


@size_constant
def _plan(axis: Callable[..., AxisTiles], rows: tuple, cols: tuple, device: torch.device, heads: int | None) -> Plan:
    """On a map of moderate size every tile has a bias of its own, and all are attended in one call. On a large one,
    tiles with equal tables of pairs (all interior ones, say) form a group that shares its bias, whose memory then does
    not grow with the map."""
    rows, cols = axis(*rows), axis(*cols)
    large = rows.pairs is not None and rows.pairs.size * cols.pairs.size > MAX_PAIRS
    by_kind = heads is None and device.type == "cpu" and not large
    classes = (_classes(tiles.pairs) if large else [slice(None)] for tiles in (rows, cols))

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    groups, position = [], []
    for row, col in product(*classes):
        queries = _product(rows.queries[row], cols.queries[col], cols.num_queries)
        keys = _product(rows.keys[row], cols.keys[col], cols.num_keys)
        pairs = mask = kinds = None
        if rows.pairs is not None:
            y, x = rows.pairs[row], cols.pairs[col]
            if large:
                y, x = y[:1], x[:1]
            elif by_kind:
                (y, row_kinds), (x, col_kinds) = (np.unique(p, axis=0, return_inverse=True) for p in (y, x))
                kinds = tensor((row_kinds.reshape(-1, 1) * len(x) + col_kinds.ravel()).ravel())
            y, x = y[:, None, :, None, :, None], x[None, :, None, :, None, :]
            shape = -1, queries.shape[1], keys.shape[1]
            counts = ((y >= 0) & (x >= 0)).reshape(shape)
            if heads is None:
                pairs = (y * cols.num_entries + x).reshape(shape)
                pairs = tensor(np.where(counts, pairs, rows.num_entries * cols.num_entries))
            elif not counts.all():
                mask = tensor(np.tile(counts, (heads, 1, 1))[None])
        groups.append(TileGroup(tensor(queries), tensor(keys), large and len(queries) > 1, pairs, mask, kinds))
        position.append(queries.ravel())
    position = np.concatenate(position)
    inverse = np.empty(rows.num_queries * cols.num_queries, dtype=np.int64)
    inverse[position] = np.arange(position.size)
    padding = tuple(tiles.num_keys - tiles.num_queries for tiles in (rows, cols))
    plan = Plan(tuple(groups), tensor(inverse), padding)
    return plan if device.type in ("cpu", "meta") else for_kernel(plan, rows, cols)


def for_kernel(plan: Plan, rows: AxisTiles, cols: AxisTiles) -> Plan:
    """The plan with what GPUs want of it: rows of pairs that start at multiples of 16, and the places of each key."""
    groups, entries = [], rows.num_entries * cols.num_entries
    for group in plan.groups:
        pairs, mask, rest = group.pairs, group.mask, (0, -group.keys.shape[1] % 16)
        if pairs is not None:
            pairs = F.pad(pairs, rest, value=entries)
            spread = torch.arange(pairs.numel(), device=pairs.device).view(pairs.shape) % OUTSIDE
            pairs = torch.where(pairs == entries, entries + spread, pairs)
        groups.append(group._replace(pairs=pairs, mask=None if mask is None else F.pad(mask, rest)))
    keys = torch.cat([group.keys.flatten() for group in groups]).cpu().numpy()
    order, counts = np.argsort(keys, kind="stable"), np.bincount(keys, minlength=rows.num_keys * cols.num_keys)
    rank = np.arange(keys.size) - (counts.cumsum() - counts)[keys[order]]
    holders = np.full((len(counts), counts.max()), -1, dtype=np.int32)
    holders[keys[order], rank] = order
    return plan._replace(groups=tuple(groups), holders=torch.from_numpy(holders).to(plan.inverse.device))


def _graph_plan(rows: AxisTiles, cols: AxisTiles, heads: int | None) -> Plan:
    """The plan of tiles that are tensors, as part of a graph: one group, in which every tile has a bias of its own."""
    queries = _product(rows.queries, cols.queries, cols.num_queries)
    keys = _product(rows.keys, cols.keys, cols.num_keys)
    pairs = mask = None
    if rows.pairs is not None:
        y = rows.pairs.reshape([n for length in rows.pairs.shape for n in (length, 1)])
        x = cols.pairs.reshape([n for length in cols.pairs.shape for n in (1, length)])
        counts = (y >= 0) & (x >= 0)
        shape = queries.shape[0], rows.pairs.shape[1] * cols.pairs.shape[1], keys.shape[1]
        if heads is None:
            pairs = torch.where(counts, y * cols.num_entries + x, rows.num_entries * cols.num_entries).reshape(shape)
        else:
            mask = counts.reshape(shape).repeat(heads, 1, 1)[None]
    (row, y), (col, x), length = rows.places, cols.places, queries.shape[1]
    row, col = row * (cols.queries.shape[0] * length) + y * cols.queries.shape[1], col * length + x
    inverse = (row[:, None] + col).flatten()
    return Plan((TileGroup(queries, keys, False, pairs, mask),), inverse, (1, 1))


def _classes(pairs: np.ndarray) -> list[np.ndarray]:
    """Indices of the tiles that have each distinct table of `pairs` (tiles, T, w)."""
    _, inverse = np.unique(pairs, axis=0, return_inverse=True)
    return [np.flatnonzero(inverse.ravel() == i) for i in range(inverse.max() + 1)]


def _product(rows: np.ndarray | Tensor, cols: np.ndarray | Tensor, width: Size) -> np.ndarray | Tensor:
    """(tiles, n) row and (tiles', n') column positions to (tiles * tiles', n * n') flat ones on a map `width` wide."""
    shape = rows.shape[0] * cols.shape[0], rows.shape[1] * cols.shape[1]
    return (rows[:, None, :, None] * width + cols[None, :, None, :]).reshape(shape)


def padded_heads(qkv: Tensor, bias: Tensor | None, heads: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, N, d) of a map, and keys and values (B, heads, M, d) of it, zero-padded as a plan wants.

    Args:
        qkv: (B, H, W, 3C) projections of the map, that is, of what is not padded: the projection of a zero is the bias.
        bias: (3C,) of the projection.
        heads: number of heads.
        plan: says how much padding there is.
    """
    q, k, v = parted_heads(qkv, heads)
    height, width = plan.padding
    if height or width:
        B, H, W, C = qkv.shape
        padding = qkv.new_zeros(C) if bias is None else bias.to(qkv.dtype)
        qkv = torch.cat([qkv, padding.expand(B, H, width, C)], 2)
        qkv = torch.cat([qkv, padding.expand(B, height, W + width, C)], 1)
        _, k, v = parted_heads(qkv, heads)
    return q, k, v


def relative_bias(table: Tensor, plan: Plan, by_kind: bool = False) -> list[Tensor]:
    """Additive attention bias of each group of tiles, -inf where a pair does not count.

    Args:
        table: (heads, entries) flattened relative position bias.
        plan: tiles to expand it for.
        by_kind: leave it to `local_attention` to expand a bias for tiles that are of a few kinds.

    Returns:
        for each group a (1, heads * tiles, T, w) tensor, or (1, heads, T, w) if its tiles share it, or (1, heads,
            kinds, T, w).
    """
    table, biases = F.pad(table, (0, 1 if plan.holders is None else OUTSIDE), value=-torch.inf), []
    for group in plan.groups:
        bias = table.index_select(1, group.pairs.flatten()).unflatten(1, group.pairs.shape)[None]
        if group.kinds is None:
            bias = bias.flatten(1, 2)
        biases.append(bias if by_kind else group.of_tiles(bias))
    return biases


@torch.compiler.assume_constant_result
@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether Triton is there, and a GPU whose matrix units it uses for bfloat16."""
    return (
        torch.version.cuda is not None
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def takes_kernel(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> bool:
    """Whether `tile_kernel` computes this attention. It has no dropout, no derivative of its gradient, nothing for the
    transforms of `torch.func`, and no place in exported graphs."""
    if q.device.type != "cuda" or plan.holders is None or dropout:
        return False
    if is_exporting() or torch.jit.is_tracing():
        return False
    if not (torch.compiler.is_compiling() or all(map(is_plain, (q, k, v)))):
        return False
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM
        and all(group.queries.shape[1] <= MAX_TILE for group in plan.groups)
        and _has_kernel(q.device)
        and (torch.compiler.is_compiling() or not torch.is_grad_enabled() or _fills(q, plan))
    )


def _fills(q: Tensor, plan: Plan) -> bool:
    """Whether attention keeps a GPU busy for longer than it takes to launch the kernels of both passes one by one."""
    pairs = sum(group.queries.numel() * group.keys.shape[1] for group in plan.groups)
    with_bias = any(group.pairs is not None for group in plan.groups)
    return q.shape[0] * q.shape[1] * pairs >= (2**26 if with_bias else 2**24)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    bias: Sequence[Tensor] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    axis_logits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention from each tile of queries to its window of keys.

    Args:
        q: queries (B, heads, N, d) in row-major order of the map.
        k: keys (B, heads, M, d).
        v: values (B, heads, M, d_v).
        plan: tiles and windows; N and M are those of its axes.
        bias: for each group of tiles what `relative_bias` returns, or None for the masks of the plan.
        scale: factor of the logits, d**-0.5 if None.
        dropout: rate of dropout on the attention weights.
        axis_logits: (B, heads, N, w_rows) and (B, heads, N, w_cols), what each query adds to its logits for the keys
            in each row and in each column of its window.

    Returns:
        (B, heads, N, d_v).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_direct(q, k, v) and not q.numel():  # for which fused attention of torch 2.11 ends the process
        return q @ k.mT @ v
    biases = bias or [group.mask for group in plan.groups]
    if takes_kernel(q, k, v, plan, dropout):
        from .tile_kernel import tile_attention  # which imports Triton

        biases = [group.of_tiles(each) for group, each in zip(plan.groups, biases, strict=True)]
        return tile_attention(q, k, v, plan, biases, scale, axis_logits)
    if takes_products(q, k, v, plan, biases, dropout, axis_logits):
        if axis_logits is None:
            return tile_products(q, k, v, plan, biases, scale)
        return axis_products(q, k, v, plan, biases, scale, axis_logits)
    return fused_attention(q, k, v, plan, biases, scale, dropout, axis_logits)
