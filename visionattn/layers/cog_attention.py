"""Self-attention whose weights keep the sign of their logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .direct import is_direct
from .init import init_weights
from .self_attention import SelfAttention

PAIRS = 2**18
"""Weights that are computed at once in evaluation on a CPU: they stay in the cache."""


class CogAttention(SelfAttention):
    """Self-attention that adds some values and takes others away: its weights are of both signs.

    "More Expressive Attention with Negative Weights", arXiv 2411.07176. With logits s = q k^T / sqrt(d)

        y = (sign(s) * softmax(|s|)) v

    so that the absolute weights of a row sum to 1, and what is orthogonal to a query has no weight but a share in that
    sum. Weights jump where s changes its sign: the paper keeps plain attention in the first and in the last layer, and
    warms up. What is masked has no share either.

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
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, device, dtype)
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
    if mask is not None or layer.dropout or torch.is_grad_enabled() or not is_direct(q):
        return F.dropout(signed_softmax(q @ k.mT, mask), layer.dropout) @ v
    B, heads, N, _ = q.shape
    out = torch.empty_like(q)
    some_heads, some_queries = max(1, PAIRS // N**2), max(1, PAIRS // N)
    for b in range(B):
        for h in range(0, heads, some_heads):
            for n in range(0, N, some_queries):
                piece = b, slice(h, h + some_heads)
                logits = q[piece][:, n : n + some_queries] @ k[piece].mT
                weights = logits.abs().softmax(-1).mul_(logits.sign_())
                out[piece][:, n : n + some_queries] = weights @ v[piece]
    return out
