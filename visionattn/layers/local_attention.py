"""Blocked local attention: tiles of queries against windows of keys, through fused dense attention.

Window, halo, neighbourhood and grid attention are one computation. The map is cut into tiles of queries; all queries of
a tile see parts of one rectangular window of keys. A `LocalPlan` says which queries form a tile, which keys its window
holds and which (query, key) pairs count; `local_attention` gathers tiles and windows, calls
`scaled_dot_product_attention` and puts the result back. A key is copied once per tile that sees it, not per query.

A plan depends on sizes alone. It is built in NumPy from Python integers, cached, and a constant to compilers. Where a
graph leaves the size open, the plan is arithmetic in the graph (`graph_plan`), on tiles that are the same at any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import is_plain
from .symbolic import Size, for_batch


@dataclass(frozen=True)
class AxisTiles:
    """Tiles along one axis of a map.

    Args:
        queries: (tiles, T) position of each query. A partial tile repeats a query; the copies are dropped.
        keys: (tiles, w) position of each key of the window.
        pairs: (tiles, T, w) index of each (query, key) pair into this axis of a relative table, -1 if the pair does not
            count. Every query must have one pair that counts.
        num_queries: length of the axis in queries.
        num_keys: length of the axis in keys; it exceeds `num_queries` where the caller pads the keys.
        num_entries: length of this axis of the relative table.

    The tiles of a `graph_plan` are tensors. Their `pairs` may be (tiles, 1, w), or None where all count, and they have
        places: (num_queries,) tile of each query, and its place in the tile.
    """

    queries: np.ndarray | Tensor
    keys: np.ndarray | Tensor
    pairs: np.ndarray | Tensor | None
    num_queries: Size
    num_keys: Size
    num_entries: Size
    places: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TileGroup:
    """Tiles that are attended in one call.

    Args:
        queries: (tiles, T) flat position of each query.
        keys: (tiles, w) flat position of each key.
        pairs: (tiles, T, w) index of each pair into the flattened relative table, or (1, T, w) if all tiles share it;
            pairs that do not count point one past its end.
        mask: of the same shape, whether a pair counts.
        masked: whether there are pairs that do not.
        shared: whether there are several tiles and they share their pairs.
    """

    queries: Tensor
    keys: Tensor
    pairs: Tensor | None
    mask: Tensor | None
    masked: bool
    shared: bool


@dataclass(frozen=True)
class PlanTensors:
    """A plan on a device: the groups of tiles, and (N,) where to find each query among all those of the groups."""

    groups: tuple[TileGroup, ...]
    inverse: Tensor


class LocalPlan:
    """Gather tables of blocked attention on a map; a tile's window is the product of its row and column windows.

    On a map of moderate size every tile has a bias of its own, and all are attended in one call. On a large one, tiles
    with equal tables of pairs (all interior ones, say) form a group that shares its bias, whose memory then does not
    grow with the map.

    Args:
        rows: tiles along the height.
        cols: tiles along the width.
    """

    max_pairs = 2**20

    def __init__(self, rows: AxisTiles, cols: AxisTiles) -> None:
        self._tensors: dict[torch.device, PlanTensors] = {}
        self._groups: list[tuple[np.ndarray, ...]] = []
        large = rows.pairs.size * cols.pairs.size > self.max_pairs
        row_classes, col_classes = (_classes(axis.pairs) if large else [slice(None)] for axis in (rows, cols))
        for row, col in product(row_classes, col_classes):
            queries = _product(rows.queries[row], cols.queries[col], cols.num_queries)
            keys = _product(rows.keys[row], cols.keys[col], cols.num_keys)
            row_pairs, col_pairs = rows.pairs[row], cols.pairs[col]
            if large:
                row_pairs, col_pairs = row_pairs[:1], col_pairs[:1]
            y, x = row_pairs[:, None, :, None, :, None], col_pairs[None, :, None, :, None, :]
            mask = (y >= 0) & (x >= 0)
            pairs = np.where(mask, y * cols.num_entries + x, rows.num_entries * cols.num_entries)
            shape = (-1, queries.shape[1], keys.shape[1])
            self._groups.append((queries, keys, pairs.reshape(shape), mask.reshape(shape)))
        position = np.concatenate([queries.ravel() for queries, *_ in self._groups])
        self._inverse = np.empty(rows.num_queries * cols.num_queries, dtype=np.int64)
        self._inverse[position] = np.arange(position.size)

    def on(self, device: torch.device) -> PlanTensors:
        """The plan's tensors on `device`."""
        if device in self._tensors:
            return self._tensors[device]

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        with torch.inference_mode(False):  # or training could not use them
            groups = tuple(
                TileGroup(
                    *(tensor(array) for array in (q, k, pairs, mask)),
                    masked=not mask.all(),
                    shared=len(pairs) < len(q),
                )
                for q, k, pairs, mask in self._groups
            )
            tensors = PlanTensors(groups, tensor(self._inverse))
        if is_plain(tensors.inverse):
            self._tensors[device] = tensors
        return tensors


def graph_plan(rows: AxisTiles, cols: AxisTiles) -> PlanTensors:
    """The plan of tiles that are tensors, as part of a graph: one group, in which every tile has a bias of its own.

    Args:
        rows: tiles along the height.
        cols: tiles along the width.
    """
    queries = _product(rows.queries, cols.queries, cols.num_queries)
    keys = _product(rows.keys, cols.keys, cols.num_keys)
    pairs = mask = None
    if rows.pairs is not None:
        y = rows.pairs.reshape([n for length in rows.pairs.shape for n in (length, 1)])
        x = cols.pairs.reshape([n for length in cols.pairs.shape for n in (1, length)])
        mask = (y >= 0) & (x >= 0)
        pairs = torch.where(mask, y * cols.num_entries + x, rows.num_entries * cols.num_entries)
        shape = queries.shape[0], rows.pairs.shape[1] * cols.pairs.shape[1], keys.shape[1]
        pairs, mask = pairs.reshape(shape), mask.reshape(shape)
    (row, y), (col, x), length = rows.places, cols.places, queries.shape[1]
    row, col = row * (cols.queries.shape[0] * length) + y * cols.queries.shape[1], col * length + x
    inverse = (row[:, None] + col).flatten()
    return PlanTensors((TileGroup(queries, keys, pairs, mask, mask is not None, False),), inverse)


def _classes(pairs: np.ndarray) -> list[np.ndarray]:
    """Indices of the tiles that have each distinct table of `pairs` (tiles, T, w)."""
    _, inverse = np.unique(pairs, axis=0, return_inverse=True)
    return [np.flatnonzero(inverse.ravel() == i) for i in range(inverse.max() + 1)]


def _product(rows: np.ndarray | Tensor, cols: np.ndarray | Tensor, width: Size) -> np.ndarray | Tensor:
    """(tiles, n) row and (tiles', n') column positions to (tiles * tiles', n * n') flat ones on a map `width` wide."""
    shape = rows.shape[0] * cols.shape[0], rows.shape[1] * cols.shape[1]
    return (rows[:, None, :, None] * width + cols[None, :, None, :]).reshape(shape)


def pad_projection(x: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """Projection of a map that was zero-padded, from that of the map: the projection of a zero is the bias.

    Args:
        x: (B, H, W, C) projections.
        bias: (C,) of the projection.
        height: rows to add at the bottom.
        width: columns to add at the right.
    """
    if not height and not width:
        return x
    B, H, W, C = x.shape
    padding = x.new_zeros(C) if bias is None else bias.to(x.dtype)
    x = torch.cat([x, padding.expand(B, H, width, C)], 2)
    return torch.cat([x, padding.expand(B, height, W + width, C)], 1)


def relative_bias(table: Tensor, plan: PlanTensors) -> list[Tensor]:
    """Additive attention bias of each group of tiles, -inf where a pair does not count.

    Args:
        table: (heads, entries) flattened relative position bias.
        plan: tiles to expand it for.

    Returns:
        For each group a (1, heads * tiles, T, w) tensor, or (1, heads, T, w) if its tiles share it.
    """
    table = F.pad(table, (0, 1), value=-torch.inf)
    return [
        table.index_select(1, group.pairs.flatten()).unflatten(1, group.pairs.shape).flatten(0, 1)[None]
        for group in plan.groups
    ]


def pair_mask(plan: PlanTensors, heads: int) -> list[Tensor | None]:
    """Boolean mask of each group of tiles, shaped as `relative_bias`, or None where every pair counts."""
    return [group.mask.repeat(heads, 1, 1)[None] if group.masked else None for group in plan.groups]


def _with_axis_logits(q: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The axis logits as further features of the queries, which a key selects by its place in the window.

    Nothing of the size of all logits is stored. Fused attention wants queries, keys and values of one width, a multiple
    of 8: zeros fill them up.

    Returns:
        Queries (B, heads, N, width), the features (w_rows * w_cols, width - d) that every window's keys get, and values
        (B, heads, M, width).
    """
    features = q.shape[-1] + rows.shape[-1] + cols.shape[-1]
    width = 8 * -(-max(features, v.shape[-1]) // 8)
    row, col = (torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) for x in (rows, cols))
    places = torch.cat([row.repeat_interleave(len(col), 0), col.repeat(len(row), 1)], 1)
    q = F.pad(torch.cat([q, rows, cols], -1), (0, width - features))
    return q, F.pad(places, (0, width - features)), F.pad(v, (0, width - v.shape[-1]))


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PlanTensors,
    bias: Sequence[Tensor | None],
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
        bias: for each group of tiles an additive bias or boolean mask as `relative_bias` shapes it, or None.
        scale: factor of the logits, d**-0.5 if None.
        dropout: rate of dropout on the attention weights.
        axis_logits: (B, heads, N, w_rows) and (B, heads, N, w_cols), what each query adds to its logits for the keys
            in each row and in each column of its window.

    Returns:
        (B, heads, N, d_v).
    """
    B, heads, _, d = q.shape
    dim, places = v.shape[-1], None
    if axis_logits is not None:
        q, places, v = _with_axis_logits(q * (d**-0.5 if scale is None else scale), v, *axis_logits)
        scale = 1.0
    outs = []
    for group, group_bias in zip(plan.groups, bias, strict=True):
        # Tiles join the heads, where each has its own bias, or the batch, where they share one.
        join = group.shared and group_bias is not None
        tiles = [
            x.index_select(2, index.flatten()).unflatten(2, index.shape)
            for x, index in ((q, group.queries), (k, group.keys), (v, group.keys))
        ]
        if places is not None:
            tiles[1] = torch.cat([tiles[1], places.expand(*tiles[1].shape[:-1], -1)], -1)
        tiles = [x.transpose(1, 2).flatten(0, 1) if join else x.flatten(1, 2) for x in tiles]
        if group_bias is not None:
            group_bias = for_batch(group_bias, tiles[0])
        out = F.scaled_dot_product_attention(*tiles, attn_mask=group_bias, dropout_p=dropout, scale=scale)
        tiles, length = group.queries.shape
        out = out.unflatten(0, (B, tiles)).transpose(1, 2) if join else out
        outs.append(out[..., :dim].reshape(B, heads, tiles * length, dim))
    return torch.cat(outs, 2).index_select(2, plan.inverse)
