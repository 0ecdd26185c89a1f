"""Blocked local attention by fused attention of copied tiles."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Plan
from .symbolic import for_batch


def axis_places(rows: Tensor, cols: Tensor) -> Tensor:
    """Features (w_rows * w_cols, w_rows + w_cols) of a window's keys that select their row and column."""
    row, col = (torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) for x in (rows, cols))
    return torch.cat([row.repeat_interleave(len(col), 0), col.repeat(len(row), 1)], 1)


def _with_axis_logits(q: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The axis logits as further features of the queries, which a key selects by its place in the window.

    Nothing of the size of all logits is stored. Fused attention wants queries, keys and values of one width, a multiple
    of 8: zeros fill them up.

    Returns:
        queries (B, heads, N, width), the features (w_rows * w_cols, width - d) that every window's keys get, and values
        (B, heads, M, width).
    """
    features = q.shape[-1] + rows.shape[-1] + cols.shape[-1]
    width = 8 * -(-max(features, v.shape[-1]) // 8)
    q = F.pad(torch.cat([q, rows, cols], -1), (0, width - features))
    return q, F.pad(axis_places(rows, cols), (0, width - features)), F.pad(v, (0, width - v.shape[-1]))


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    biases: Sequence[Tensor | None],
    scale: float,
    dropout: float = 0.0,
    axis_logits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`local_attention` by fused attention of copied tiles."""
    B, heads, _, _ = q.shape
    dim, places = v.shape[-1], None
    if axis_logits is not None:
        q, places, v = _with_axis_logits(q * scale, v, *axis_logits)
        scale = 1.0
    outs = []
    for group, group_bias in zip(plan.groups, biases, strict=True):
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
            group_bias = group.of_tiles(group_bias)
            group_bias = for_batch(group_bias[..., : group.keys.shape[1]], tiles[0])
        out = F.scaled_dot_product_attention(*tiles, attn_mask=group_bias, dropout_p=dropout, scale=scale)
        tiles, length = group.queries.shape
        out = out.unflatten(0, (B, tiles)).transpose(1, 2) if join else out
        if places is not None:  # a graph that reshapes a part would ask how many images there are
            out = out[..., :dim].clone(memory_format=torch.contiguous_format)
        outs.append(out.reshape(B, heads, tiles * length, dim))
    return torch.cat(outs, 2).index_select(2, plan.inverse)
