"""Heads of attention."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from .checks import check_counts
from .direct import in_own_precision, is_direct, replays


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless `num_heads` divides `dim`."""
    check_counts(dim=dim, num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")


def split_heads(x: Tensor, num_heads: int, parts: int = 3) -> Tensor:
    """Projections (B, ..., parts * C), ordered (part, head, channel), to (parts, B, heads, N, d)."""
    return x.flatten(1, -2).unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4)


def parted_heads(x: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """`split_heads` in its parts, by `unpacked`."""
    return unpacked(x.flatten(1, -2).unflatten(2, (parts, num_heads, -1)))


def unpacked(x: Tensor) -> tuple[Tensor, ...]:
    """(B, N, parts, heads, d) to as many (B, heads, N, d), whose gradients take one pass less to unite."""
    if is_direct(x) and torch.is_grad_enabled() and x.requires_grad:
        return SplitHeads.apply(x)
    return x.permute(2, 0, 3, 1, 4).unbind()


class SplitHeads(Function):
    """`unpacked`, whose gradients are put side by side in one pass, unless they lie so."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, ...]:
        return x.permute(2, 0, 3, 1, 4).unbind()

    @staticmethod
    @in_own_precision
    def backward(ctx, *grads: Tensor) -> Tensor:
        grads, whole = [grad.transpose(1, 2) for grad in grads], grads[0]._base
        if replays(grads[0]) or whole is None or not _are_parts(grads, whole):
            return torch.stack(grads, 2)
        return whole.view_as(whole)


def _are_parts(parts: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether a contiguous (B, N, parts, heads, d) holds parts (B, N, heads, d)."""
    B, N, *rest = parts[0].shape
    return (
        whole.shape == (B, N, len(parts), *rest)
        and whole.is_contiguous()
        and all(
            (x.data_ptr(), x.shape, x.stride(), x.is_neg()) == (y.data_ptr(), y.shape, y.stride(), y.is_neg())
            for x, y in zip(parts, whole.unbind(2), strict=True)
        )
    )


def empty_side_by_side(*parts: Tensor) -> Iterable[Tensor]:
    """(B, N, heads, d) for each of the parts (B, heads, N, d); as `SplitHeads` wants it where they are of one size."""
    shapes = [part.transpose(1, 2).shape for part in parts]
    if len(set(shapes)) > 1:
        return [parts[0].new_empty(shape) for shape in shapes]
    B, N, heads, d = shapes[0]
    return parts[0].new_empty(B, N, len(parts), heads, d).unbind(2)
