"""Heads of attention."""

import torch
from torch import Tensor
from torch.autograd import Function

from .checks import check_counts
from .direct import in_own_precision


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless `num_heads` divides `dim`."""
    check_counts(dim=dim, num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")


def split_heads(x: Tensor, num_heads: int, parts: int = 3) -> Tensor:
    """Projections (B, ..., parts * C), ordered (part, head, channel), to (parts, B, heads, N, d)."""
    return x.flatten(1, -2).unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4)


class SplitHeads(Function):
    """`split_heads` in three parts, whose gradients are put side by side in one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        return split_heads(x, num_heads).unbind()

    @staticmethod
    @in_own_precision
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack([grad.transpose(1, 2) for grad in grads], 2).view(ctx.shape), None
