"""How blocked local attention is cut into tiles."""

from typing import NamedTuple

from torch import Tensor


class TileGroup(NamedTuple):
    """Tiles that are attended in one call.

    Args:
        queries: (tiles, T) flat position of each query.
        keys: (tiles, w) flat position of each key.
        shared: whether there are several tiles and they share their pairs.
        pairs: (tiles, T, w) index of each pair into the flattened relative table, or (1, T, w) if all tiles share it;
            pairs that do not count point past its end. None in plans for no table.
        mask: in these, whether a pair counts, for every head: (1, heads * tiles, T, w), or (1, heads, T, w) if all
            tiles share it. None where every pair counts.
        kinds: (tiles,) which of the pairs, then (kinds, T, w), are those of each tile; None where `pairs` says it.

    On GPUs pairs and masks may be wider than w; what is beyond does not count.
    """

    queries: Tensor
    keys: Tensor
    shared: bool
    pairs: Tensor | None = None
    mask: Tensor | None = None
    kinds: Tensor | None = None

    def of_tiles(self, bias: Tensor | None) -> Tensor | None:
        """A bias as `relative_bias` returns it, where it is by kinds expanded to (1, heads * tiles, T, w)."""
        return bias if bias is None or bias.ndim < 5 else bias.index_select(2, self.kinds).flatten(1, 2)


class Plan(NamedTuple):
    """Gather tables of blocked attention on a map; a tile's window is the product of its row and column windows.

    Args:
        groups: of tiles.
        inverse: (N,) where to find each query among all those of the groups.
        padding: keys that each axis has beyond its queries.
        holders: (M, most) where to find each key among all those of the groups, -1 past the last place. For the kernel
            alone, hence None on the CPU.
    """

    groups: tuple[TileGroup, ...]
    inverse: Tensor
    padding: tuple[int, int]
    holders: Tensor | None = None
