"""What a layer weighs by, with names for its axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ON_MAP = ("batch", "head", "query_row", "query_col", "key_row", "key_col")
IN_WINDOWS = ("batch", "head", "query_row", "query_col", "key")
OF_TOKENS = ("batch", "head", "query", "key")
GATE = ("batch", "channel", "row", "col")
HEAD_GATE = ("batch", "head", "row", "col")
NOWHERE = -(2**15)
"""Row and column of a key that is masked."""


@dataclass(frozen=True)
class Map:
    """What a layer weighs by.

    Args:
        kind: "attention", of which rows sum to 1, with the exceptions that docs/explain.md lists; "content" and
            "position", the two that ConViT's is mixed of; "collect", from agents to keys, and "spread", from queries to
            agents, of which theirs is the product; "mask", where attention may go; "gate" and "modulator", which
            multiply; "kernel", which convolves.
        values: the weights.
        axes: a name for each dimension of `values`. Attention is over `ON_MAP`; or over `IN_WINDOWS`, where `keys` says
            which they are; or over `OF_TOKENS`, of which one may be the class token.
        part: which of several maps of a layer it is: "high" and "low" of HiLo, "linear" and "blocks" of
            log-normal attention, the number of a gate.
        layer: name of the layer in its model.
        keys: (query_row, query_col, key, 2), row and column of each key. Those outside `key_grid` are padding, which
            takes part with a weight of its own; those that are masked are at `NOWHERE`.
        key_grid: height and width of the map of keys, where it has `keys`.
        grid: of tokens: height and width of the map of patches.
        class_token: of tokens: place of the class token, 0 or -1; None if there is none.
        patches: of tokens: (batch, n), which patches are there, where some were pruned; None for all.
        logits: of softmax attention: what the softmax is of, (batch, head, ..., key), for `monitoring`; those of masked
            keys are -inf.
    """

    kind: str
    values: Tensor
    axes: tuple[str, ...]
    part: str = ""
    layer: str = ""
    keys: Tensor | None = None
    key_grid: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    class_token: int | None = None
    patches: Tensor | None = None
    logits: Tensor | None = None

    @property
    def title(self) -> str:
        """Name of the layer, and of the map if it has several."""
        kind = "" if self.kind == "attention" else self.kind
        return " ".join(filter(None, [self.layer, kind, self.part]))

    def size(self, axis: str) -> int:
        """Length of an axis."""
        return self.values.shape[self.axes.index(axis)]

    @property
    def queries(self) -> tuple[int, int]:
        """Height and width of the map of queries."""
        return self.grid if "query" in self.axes else (self.size("query_row"), self.size("query_col"))

    @property
    def key_size(self) -> tuple[int, int]:
        """Height and width of the map of keys."""
        return self.key_grid or self.grid or tuple(self.values.shape[-2:])

    def spread(self, r: Tensor, token: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The weights of all keys, summed over queries that count by r: all that pictures and rollout ask for.

        Args:
            r: (batch, query_row, query_col), how much each query counts.
            token: (batch,), how much the class token does.

        Returns:
            weights (batch, head, key_row, key_col), without those of padding, and those (batch, head) of the class
            token, if there is one.
        """
        if self.axes == ON_MAP:
            return torch.einsum("bhyxtu,byx->bhtu", self.values, r), None
        weighed = self.values * r[:, None, :, :, None] if self.axes == IN_WINDOWS else None
        if weighed is not None:
            H, W = self.key_grid
            row, col = self.keys.unbind(-1)
            inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
            place = torch.where(inside, row * W + col, H * W).flatten()
            total = weighed.new_zeros(*weighed.shape[:2], H * W + 1).index_add_(2, place, weighed.flatten(2))
            return total[..., :-1].unflatten(2, (H, W)), None
        flat = r.flatten(1) if self.patches is None else r.flatten(1).gather(1, self.patches)
        if self.class_token is not None:
            own = torch.zeros_like(flat[:, 0]) if token is None else token
            flat = torch.cat([own[:, None], flat] if self.class_token == 0 else [flat, own[:, None]], 1)
        total, own = torch.einsum("bhqk,bq->bhk", self.values, flat), None
        if self.class_token is not None:
            own, total = total[..., self.class_token], total[..., 1:] if self.class_token == 0 else total[..., :-1]
        if self.patches is not None:
            whole = total.new_zeros(*total.shape[:2], r[0].numel())
            total = whole.scatter(2, self.patches[:, None].expand_as(total), total)
        return total.unflatten(2, self.grid), own


Explained = tuple[list[Map], Tensor]
"""Maps of a layer, and its output made of them."""


def on_map(weights: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """(B, heads, N, M) to (B, heads, H, W, H', W'), by heights and widths of queries and keys."""
    return weights.unflatten(3, keys).unflatten(2, queries)


def merged(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, heads, N, d) to (B, H, W, C)."""
    return x.transpose(1, 2).flatten(2).unflatten(1, tuple(size))
