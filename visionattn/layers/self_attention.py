"""Plain multi-head self-attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from .heads import check_heads
from .pointwise import Pointwise


class SelfAttention(nn.Module):
    """Multi-head self-attention of all tokens.

    "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", arXiv 2010.11929.

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
        (B, N, C) to (B, N, C); the grid of the patches is accepted and ignored.

    Example:
        >>> import torch
        >>> SelfAttention(64, num_heads=4)(torch.randn(1, 15, 64)).shape
        torch.Size([1, 15, 64])
    """

    last_product = "proj"

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
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = attn_drop
        self.proj = Pointwise(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        q, k, v = self.heads(x)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, scale=self.scale)
        return self.merge(x)

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values (3, B, heads, N, d)."""
        # As split_heads, which takes maps too: these would come back as tokens.
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def merge(self, x: Tensor) -> Tensor:
        """Attended values (B, heads, N, d) to (B, N, C)."""
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    @property
    def dropout(self) -> float:
        """Dropout rate of the attention weights in the present mode."""
        return self.attn_drop if self.training else 0.0
