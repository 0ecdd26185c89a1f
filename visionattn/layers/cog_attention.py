"""Self-attention whose weights keep the sign of their logits."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .direct import in_own_precision, is_direct, replayed, replays
from .init import init_weights
from .self_attention import SelfAttention

PAIRS = 2**18
"""Weights that are computed at once on a CPU: they stay in the cache."""


class CogAttention(SelfAttention):
    """Self-attention that adds some values and takes others away: its weights are of both signs.

    "More Expressive Attention with Negative Weights", arXiv 2411.07176. With logits s = q k^T / sqrt(d)

        y = (sign(s) * softmax(|s|)) v

    so that the absolute weights of a row sum to 1, and what is orthogonal to a query has no weight but a share in that
    sum. Weights jump where s changes its sign: the paper keeps plain attention in the first and in the last layer, and
    warms up. What is masked has no share either. On a CPU, without dropout and masks, some weights at a time are
    computed, and in the backward pass once more: N x N of them are never held.

    Cost: 4 N C^2 + 2 N^2 C multiply-adds for N tokens and C channels.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` does not divide `dim`.

    Shape:
        (B, N, C) to (B, N, C); the grid of the patches is accepted and ignored. `mask`, which is optional, says by
        booleans (N, N), or what expands to (B, heads, N, N), which keys a query may attend to.

    Example:
        >>> import torch
        >>> CogAttention(64, num_heads=4)(torch.randn(1, 15, 64)).shape
        torch.Size([1, 15, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(init_weights)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(_attend(self, q, k, v, mask))


def signed_softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """sign(s) * softmax(|s|), where a mask of booleans is true."""
    size = logits.abs()
    return (size if mask is None else size.masked_fill(~mask, -torch.inf)).softmax(-1) * logits.sign()


@torch.fx.wrap
def _attend(layer: CogAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, N, d) queries, keys and values to the same."""
    q = q * layer.scale
    if mask is not None or layer.dropout or not is_direct(q, k, v):
        return F.dropout(signed_softmax(q @ k.mT, mask), layer.dropout) @ v
    return _InPieces.apply(q, k, v) if torch.is_grad_enabled() else _in_pieces(q, k, v)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return signed_softmax(q @ k.mT) @ v


def _pieces(q: Tensor) -> Iterator[tuple[tuple, tuple]]:
    """Of (B, heads, N, d): some queries of a head, or some heads with all, and the keys that they have."""
    B, heads, N, _ = q.shape
    some_heads, some_queries = (max(1, PAIRS // max(1, n)) for n in (N**2, N))
    for b in range(B):
        for h in range(0, heads, some_heads):
            of_heads = b, slice(h, h + some_heads)
            for n in range(0, N, some_queries):
                yield (*of_heads, slice(n, n + some_queries)), of_heads


def _in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`_plain` outside autograd, with weights that stay in the cache."""
    out = torch.empty_like(q)
    for queries, keys in _pieces(q):
        logits = q[queries] @ k[keys].mT
        weights = logits.abs().softmax(-1).mul_(logits.sign_())
        out[queries] = weights @ v[keys]
    return out


class _InPieces(Function):
    """`_in_pieces` that keeps no weights for the backward pass, but computes them again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _in_pieces(q, k, v)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        if replays(grad):
            return replayed(_plain, [q, k, v], ctx.needs_input_grad, grad)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys in _pieces(q):
            logits, g = q[queries] @ k[keys].mT, grad[queries]
            sign = logits.sign()
            weights = logits.abs_().softmax(-1).mul_(sign)
            dv[keys] += weights.mT @ g
            mean = (g * out[queries]).sum(-1, keepdim=True)  # of the softmax's gradients, by its weights
            dlogits = (g @ v[keys].mT).mul_(sign).sub_(mean).mul_(weights)
            dq[queries] = dlogits @ k[keys]
            dk[keys] += dlogits.mT @ q[queries]
        return dq, dk, dv
