"""Blocked local attention: tiles of queries against windows of keys, through fused dense attention.

Window, halo, neighbourhood and grid attention are one computation. The map is cut into tiles of queries; all queries of
a tile see parts of one rectangular window of keys. A `LocalPlan` says which queries form a tile, which keys its window
holds and which (query, key) pairs count; `local_attention` gathers tiles and windows, calls
`scaled_dot_product_attention` and puts the result back. A key is copied once per tile that sees it, never once per query.

A plan depends on sizes alone. It is built in NumPy from Python integers, cached, and a constant to compilers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
    """

    queries: np.ndarray
    keys: np.ndarray
    pairs: np.ndarray
    num_queries: int
    num_keys: int
    num_entries: int


@dataclass(frozen=True)
class TileClass:
    """Tiles that share one table of pairs, all interior ones for example, and so one bias.

    Args:
        count: number of tiles.
        pairs: (T, w) index of each pair into the flattened relative table; masked pairs point one past its end.
        mask: (T, w) whether a pair counts.
        masked: whether there are pairs that do not.
    """

    count: int
    pairs: Tensor
    mask: Tensor
    masked: bool


@dataclass(frozen=True)
class PlanTensors:
    """A plan on a device: flat positions of `queries` (tiles, T) and `keys` (tiles, w), where to find each query among the
    tiles (`inverse`), and the classes, in the order of the tiles."""

    queries: Tensor
    keys: Tensor
    inverse: Tensor
    classes: tuple[TileClass, ...]


class LocalPlan:
    """Gather tables of blocked attention on a 2-D map; the window of a tile is the product of its row and column windows.

    Args:
        rows: tiles along the height.
        cols: tiles along the width.
    """

    def __init__(self, rows: AxisTiles, cols: AxisTiles) -> None:
        self._tensors: dict[torch.device, PlanTensors] = {}
        self._queries, self._keys, self._classes = [], [], []
        entries = rows.num_entries * cols.num_entries
        for row_tiles, row_pairs in _classes(rows.pairs):
            for col_tiles, col_pairs in _classes(cols.pairs):
                queries = _product(rows.queries[row_tiles], cols.queries[col_tiles], cols.num_queries)
                keys = _product(rows.keys[row_tiles], cols.keys[col_tiles], cols.num_keys)
                y, x = row_pairs[:, None, :, None], col_pairs[None, :, None, :]
                mask = ((y >= 0) & (x >= 0)).reshape(queries.shape[1], keys.shape[1])
                pairs = np.where(mask, (y * cols.num_entries + x).reshape(mask.shape), entries)
                self._queries.append(queries)
                self._keys.append(keys)
                self._classes.append((len(queries), pairs, mask))
        self._queries, self._keys = np.concatenate(self._queries), np.concatenate(self._keys)
        self._inverse = np.empty(rows.num_queries * cols.num_queries, dtype=np.int64)
        self._inverse[self._queries.ravel()] = np.arange(self._queries.size)

    def on(self, device: torch.device) -> PlanTensors:
        """The plan's tensors on `device`."""
        if device in self._tensors:
            return self._tensors[device]
        tensors = PlanTensors(
            *(torch.from_numpy(a).to(device) for a in (self._queries, self._keys, self._inverse)),
            classes=tuple(
                TileClass(count, *(torch.from_numpy(a).to(device) for a in (pairs, mask)), masked=not mask.all())
                for count, pairs, mask in self._classes
            ),
        )
        if type(tensors.queries) is Tensor:  # an exporter's fake tensors must not outlive it
            self._tensors[device] = tensors
        return tensors


def _classes(pairs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tile indices, their common table) for each distinct table in `pairs` (tiles, T, w)."""
    tables, inverse = np.unique(pairs, axis=0, return_inverse=True)
    return [(np.flatnonzero(inverse.ravel() == i), table) for i, table in enumerate(tables)]


def _product(rows: np.ndarray, cols: np.ndarray, width: int) -> np.ndarray:
    """(tiles, n) row and (tiles', n') column positions to (tiles * tiles', n * n') flat ones on a map `width` wide."""
    return (rows[:, None, :, None] * width + cols[None, :, None, :]).reshape(len(rows) * len(cols), -1)


def relative_bias(table: Tensor, plan: PlanTensors) -> list[Tensor]:
    """Additive attention bias of each tile class, -inf where a pair does not count.

    Args:
        table: (heads, entries) flattened relative position bias.
        plan: tiles to expand it for.

    Returns:
        For each class a (1, heads, T, w) tensor.
    """
    table = F.pad(table, (0, 1), value=-torch.inf)
    return [table.index_select(1, c.pairs.flatten()).view(1, -1, *c.pairs.shape) for c in plan.classes]


def pair_mask(plan: PlanTensors) -> list[Tensor | None]:
    """Boolean mask (1, 1, T, w) of each tile class, None where every pair counts."""
    return [c.mask[None, None] if c.masked else None for c in plan.classes]


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PlanTensors,
    bias: Sequence[Tensor | None],
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention from each tile of queries to its window of keys.

    Args:
        q: queries (B, N, heads, d) in row-major order of the map.
        k: keys (B, M, heads, d).
        v: values (B, M, heads, d).
        plan: tiles and windows; N and M are those of its axes.
        bias: for each tile class an additive bias or boolean mask broadcastable to (1, heads, T, w), or None.
        scale: factor of the logits, d**-0.5 if None.
        dropout: rate of dropout on the attention weights.

    Returns:
        (B, N, heads * d).
    """
    B, N, heads, d = q.shape
    tiles, T = plan.queries.shape
    # Tiles lead, so that a class is one contiguous batch of (tiles * B, heads, T, d) that shares a bias.
    q, k, v = (
        _gather(x, index).view(tiles * B, -1, heads, d).transpose(1, 2)
        for x, index in ((q, plan.queries), (k, plan.keys), (v, plan.keys))
    )
    sizes = [c.count * B for c in plan.classes]
    out = torch.cat(
        [
            F.scaled_dot_product_attention(*qkv, attn_mask=b, dropout_p=dropout, scale=scale).transpose(1, 2)
            for *qkv, b in zip(q.split(sizes), k.split(sizes), v.split(sizes), bias, strict=True)
        ]
    )
    out = out.reshape(tiles, B, T, heads * d).transpose(0, 1).reshape(B, tiles * T, heads * d)
    return out.index_select(1, plan.inverse)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (tiles, n) of every map of x (B, N, heads, d), tiles first: (tiles * B * n, heads, d)."""
    B, N = x.shape[:2]
    offset = torch.arange(B, device=x.device)[None, :, None] * N
    return x.flatten(0, 1).index_select(0, (index[:, None] + offset).flatten())
