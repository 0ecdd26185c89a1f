"""Learned position tables, resampled for maps of another size."""

import math

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
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


def grid_of(patches: int, patch_size: int, img_size: int | tuple[int, int] | None = None) -> tuple[int, int] | None:
    """(height, width) of the map of that many patches in a model, square if its image size is not known, or None if it
    cannot be told.

    Args:
        patches: how many there are.
        patch_size: side of a patch in pixels.
        img_size: of the model, in pixels.
    """
    sizes = [img_size] if img_size else []
    for size in (*sizes, math.isqrt(max(patches, 0)) * patch_size):
        sides = to_2tuple(size)
        for grid in (tuple(-(-side // patch_size) for side in sides), tuple(side // patch_size for side in sides)):
            if math.prod(grid) == patches:
                return grid
    return None


def fit_positions(
    table: Tensor, own: PositionEmbedding, patch_size: int, img_size: int | tuple[int, int] | None = None
) -> Tensor:
    """A table (1, N, C) of another model, resampled for the grid of `own`; as it is if it has that, or none.

    Args:
        table: of a model.
        own: what it is to be loaded into.
        patch_size: side of a patch in pixels.
        img_size: of that model, in pixels, if it is known.
    """
    if table.ndim != 3:
        return table
    grid = grid_of(table.shape[1] - own.prefix - own.suffix, patch_size, img_size)
    if grid in (None, own.grid_size):
        return table
    return resample_rows(table[0], grid, own.grid_size, own.prefix, own.suffix)[None]
