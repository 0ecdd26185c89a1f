"""Blocked local attention: tiles of queries against windows of keys, through fused dense attention.

Window, halo, neighbourhood and grid attention are one computation. The map is cut into tiles of queries; all queries of
a tile see parts of one rectangular window of keys. A `LocalPlan` says which queries form a tile, which keys its window
holds and which (query, key) pairs count; `local_attention` gathers tiles and windows, calls
`scaled_dot_product_attention` and puts the result back. A key is copied once per tile that sees it, not per query.

A plan depends on sizes alone. It is built in NumPy from Python integers, cached, and a constant to compilers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

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
class TileGroup:
    """Tiles that are attended in one call.

    Args:
        queries: (tiles * T,) flat position of each query.
        keys: (tiles * w,) flat position of each key.
        pairs: (tiles, T, w) index of each pair into the flattened relative table, or (1, T, w) if all tiles share it;
            pairs that do not count point one past its end.
        mask: of the same shape, whether a pair counts.
        masked: whether there are pairs that do not.
        tiles: number of tiles.
        shared: whether there are several tiles and they share their pairs.
    """

    queries: Tensor
    keys: Tensor
    pairs: Tensor
    mask: Tensor
    masked: bool
    tiles: int
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
        if rows.pairs.size * cols.pairs.size <= self.max_pairs:
            row_classes, col_classes = [slice(None)], [slice(None)]
        else:
            row_classes, col_classes = _classes(rows.pairs), _classes(cols.pairs)
        for row, col in product(row_classes, col_classes):
            queries = _product(rows.queries[row], cols.queries[col], cols.num_queries)
            keys = _product(rows.keys[row], cols.keys[col], cols.num_keys)
            if len(row_classes) == len(col_classes) == 1:
                row_pairs, col_pairs = rows.pairs[row], cols.pairs[col]
            else:
                row_pairs, col_pairs = rows.pairs[row][:1], cols.pairs[col][:1]
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

        groups = tuple(
            TileGroup(
                *(tensor(array) for array in (q.ravel(), k.ravel(), pairs, mask)),
                masked=not mask.all(),
                tiles=len(q),
                shared=len(pairs) < len(q),
            )
            for q, k, pairs, mask in self._groups
        )
        tensors = PlanTensors(groups, tensor(self._inverse))
        if type(tensors.inverse) is Tensor:  # an exporter's fake tensors must not outlive it
            self._tensors[device] = tensors
        return tensors


def _classes(pairs: np.ndarray) -> list[np.ndarray]:
    """Indices of the tiles that have each distinct table of `pairs` (tiles, T, w)."""
    _, inverse = np.unique(pairs, axis=0, return_inverse=True)
    return [np.flatnonzero(inverse.ravel() == i) for i in range(inverse.max() + 1)]


def _product(rows: np.ndarray, cols: np.ndarray, width: int) -> np.ndarray:
    """(tiles, n) row and (tiles', n') column positions to (tiles * tiles', n * n') flat ones on a map `width` wide."""
    return (rows[:, None, :, None] * width + cols[None, :, None, :]).reshape(len(rows) * len(cols), -1)


def relative_bias(table: Tensor, plan: PlanTensors) -> list[Tensor]:
    """Additive attention bias of each group of tiles, -inf where a pair does not count.

    Args:
        table: (heads, entries) flattened relative position bias.
        plan: tiles to expand it for.

    Returns:
        For each group a (1, heads * tiles, T, w) tensor, or (1, heads, T, w) if its tiles share it.
    """
    table = F.pad(table, (0, 1), value=-torch.inf)
    return [table.index_select(1, group.pairs.flatten()).view(1, -1, *group.pairs.shape[1:]) for group in plan.groups]


def pair_mask(plan: PlanTensors, heads: int) -> list[Tensor | None]:
    """Boolean mask of each group of tiles, shaped as `relative_bias`, or None where every pair counts."""
    return [
        group.mask.expand(heads, *group.mask.shape).reshape(1, -1, *group.mask.shape[1:]) if group.masked else None
        for group in plan.groups
    ]


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
        q: queries (B, heads, N, d) in row-major order of the map.
        k: keys (B, heads, M, d).
        v: values (B, heads, M, d).
        plan: tiles and windows; N and M are those of its axes.
        bias: for each group of tiles an additive bias or boolean mask as `relative_bias` shapes it, or None.
        scale: factor of the logits, d**-0.5 if None.
        dropout: rate of dropout on the attention weights.

    Returns:
        (B, heads, N, d).
    """
    B, heads, _, d = q.shape
    outs = []
    for group, group_bias in zip(plan.groups, bias, strict=True):
        # Tiles join the heads, where each has its own bias, or the batch, where they share one.
        join = group.shared and group_bias is not None
        tiles = [
            x.index_select(2, index).view(B, heads, group.tiles, -1, d)
            for x, index in ((q, group.queries), (k, group.keys), (v, group.keys))
        ]
        tiles = [x.transpose(1, 2).flatten(0, 1) if join else x.flatten(1, 2) for x in tiles]
        out = F.scaled_dot_product_attention(*tiles, attn_mask=group_bias, dropout_p=dropout, scale=scale)
        out = out.unflatten(0, (B, group.tiles)).transpose(1, 2) if join else out
        outs.append(out.reshape(B, heads, -1, d))
    return torch.cat(outs, 2).index_select(2, plan.inverse)
