"""Learned position tables, resampled for maps of another size."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .cache import ParameterCache
from .symbolic import is_symbolic


def resample_rows(
    table: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    prefix: int = 0,
    suffix: int = 0,
    mode: str = "bicubic",
) -> Tensor:
    """Rows of a table with one for each position of a map, interpolated for a map of another size.

    Args:
        table: (prefix + H * W + suffix, C).
        old: (H, W) that the table is for.
        new: (H, W) wanted.
        prefix: rows in front that belong to no position; kept.
        suffix: rows behind that belong to no position; kept.
        mode: of the interpolation.
    """
    # timm's resample_abs_pos_embed knows no rows behind, and decides by the size, which graphs may leave open.
    front, rows, behind = table.split([prefix, old[0] * old[1], suffix])
    dtype = torch.promote_types(table.dtype, torch.float32)
    rows = F.interpolate(rows.T.unflatten(1, old)[None].to(dtype), new, mode=mode, align_corners=False)
    return torch.cat([front, rows[0].flatten(1).T.to(table.dtype), behind])


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table of biases by relative position, interpolated bicubically for a window of another size.

    Args:
        table: (heads, 2 H - 1, 2 W - 1).
        size: (2 H' - 1, 2 W' - 1) wanted.
    """
    if not is_symbolic(*size) and table.shape[1:] == size:
        return table
    return F.interpolate(table[None], size, mode="bicubic", align_corners=False)[0]


class PositionEmbedding(nn.Module):
    """A learned vector for every patch, resampled for maps of another size.

    Args:
        grid_size: (height, width) of the patch map the table is made for.
        dim: channels.
        prefix: tokens in front of the patches, with vectors of their own.
        suffix: tokens behind the patches, with vectors of their own.
        mode: of the interpolation.

    Shape:
        (B, prefix + H * W + suffix, C) and the grid (H, W) to the same shape.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        dim: int,
        prefix: int = 0,
        suffix: int = 0,
        mode: str = "bicubic",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.grid_size, self.prefix, self.suffix, self.mode = grid_size, prefix, suffix, mode
        length = prefix + grid_size[0] * grid_size[1] + suffix
        self.weight = nn.Parameter(torch.empty(1, length, dim, device=device, dtype=dtype))
        self._cache = ParameterCache()
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x + _positions(self, grid)


@torch.fx.wrap
def _positions(module: PositionEmbedding, grid: tuple[int, int]) -> Tensor:
    grid = tuple(grid)
    if not is_symbolic(*grid) and grid == module.grid_size:
        return module.weight

    def resample() -> Tensor:
        rows = resample_rows(module.weight[0], module.grid_size, grid, module.prefix, module.suffix, module.mode)
        return rows[None]

    return module._cache(grid, [module.weight], resample)
