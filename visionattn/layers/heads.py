"""Heads of attention."""

from torch import Tensor


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless `num_heads` divides `dim`."""
    if dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")


def split_heads(x: Tensor, num_heads: int, parts: int = 3) -> Tensor:
    """Projections (B, ..., parts * C), ordered (part, head, channel), to (parts, B, heads, N, d)."""
    return x.flatten(1, -2).unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4)
