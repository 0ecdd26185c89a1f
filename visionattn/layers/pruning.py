"""The residual block of transformers that prune tokens."""

import math
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import Block


class PruningBlock(Block):
    """The pre-norm residual block where patches may be pruned: these are left out, and are zero between blocks.

    Args: those of `Block`, with a mixer like `SparseAttention`, and
        arriving: part of the patches that earlier blocks have left.
        leaving: part of the patches that this block leaves; those with the least attention from the class token go.

    Shape:
        (B, N, C), the class token first, and the grid (H, W) of the N - 1 patches to (B, N, C).
    """

    by_rank = True
    """Values are told by their rank, which may turn on last digits: see `export.running.usual_disagreement`."""

    def __init__(self, *args, arriving: float = 1.0, leaving: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.arriving, self.leaving = arriving, leaving

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.leaving == 1:
            return super().forward(x, grid)
        whole, kept = x, None
        if self.arriving < 1:
            kept = _alive(x, self.arriving)
            x = _gather(x, kept)
        y = self.mixer(self.norm1(x), grid, kept, True)
        x = x + self.drop_path1(self.ls1(y[0]))
        if self.leaving < self.arriving:
            chosen = _strongest(y[1], self.leaving, grid)
            x, kept = _gather(x, chosen), chosen if kept is None else kept.gather(1, chosen)
        return _scatter(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), kept, whole)


@torch.fx.wrap
def _alive(x: Tensor, rate: float) -> Tensor:
    """Indices (B, n) of the patches that are not pruned, ascending."""
    alive = x[:, 1:].detach().ne(0).any(-1).to(torch.uint8)
    return alive.argsort(dim=1, descending=True, stable=True)[:, : math.ceil(rate * index(alive.shape[1]))]


@torch.fx.wrap
def _strongest(weights: Tensor, rate: float, grid: tuple[int, int]) -> Tensor:
    """Indices (B, n) of the patches with the largest weights, ascending; n is a part of those of the whole grid."""
    return weights.topk(math.ceil(rate * index(grid[0]) * index(grid[1])), sorted=False).indices.sort().values


@torch.fx.wrap
def _gather(x: Tensor, kept: Tensor) -> Tensor:
    """The class token and the kept patches."""
    return x.gather(1, F.pad(kept + 1, (1, 0))[:, :, None].expand(-1, -1, x.shape[2]))


@torch.fx.wrap
def _scatter(x: Tensor, kept: Tensor, whole: Tensor) -> Tensor:
    """The class token and the kept patches in their places, zeros in the others."""
    rows = F.pad(kept + 1, (1, 0))[:, :, None].expand(-1, -1, x.shape[2])
    return torch.zeros_like(whole, dtype=x.dtype).scatter(1, rows, x)
