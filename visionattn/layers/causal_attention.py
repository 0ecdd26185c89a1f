"""Self-attention of a sequence with rotary positions and a soft causal mask."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .self_attention import SelfAttention
from .size_constant import size_constant
from .symbolic import Size, for_batch


@size_constant
def rotary_table(length: Size, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, d / 2) of the angles p * 10000^(-2t / d) for positions p and channel pairs t.

    Args:
        length: positions N.
        head_dim: channels d of a head.
        device: of the tables.
        dtype: of the tables.
    """
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    angles = torch.arange(length, device=device, dtype=dtype)[:, None] * frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (2t, 2t + 1) of (..., N, d), as pairs, rotated by the angles of a rotary table; in float32 at least."""
    # timm's apply_rot_embed has the same bits, but wants each angle twice and takes 1.4 times as long.
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


@size_constant
def causal_halves(length: Size, device: torch.device) -> Tensor:
    """Mask (N, 2N) of queries against keys that are there twice: up to the query, and after it."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.cat([causal, ~causal], 1)


class CausalSelfAttention(SelfAttention):
    """Self-attention with rotary positions whose weights, after the softmax, are scaled down for later tokens.

    "Adapting LLaMA Decoder to Vision Transformer", arXiv 2404.06773. Query i weighs all keys by a softmax; the weights
    of keys after i are then multiplied by `soft_mask_rate`: 1 is bidirectional attention, 0 causal. Nothing is
    renormalised, so that this differs from attention with later keys left out. Here every key is there twice, as itself
    up to the query and after it with its value scaled, which is one fused attention.

    Cost: 4 N C^2 + 4 N^2 C multiply-adds for N tokens and C channels; 4 N C^2 + 2 N^2 C by definition.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim` into even parts.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or a head has an odd number of channels.

    Shape:
        (B, N, C) to (B, N, C). Optional further inputs are what layers can share: `rotary`, angles (N, d / 2) or their
        cosine and sine, by default those of positions 0 to N - 1; `soft_mask_rate`, by default 0; `mask`, what
        `causal_halves(N)` returns.

    Example:
        >>> import torch
        >>> CausalSelfAttention(64, num_heads=4)(torch.randn(1, 15, 64), soft_mask_rate=0.5).shape
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
        if dim // num_heads % 2:
            raise ValueError(f"expected an even number of channels per head, got {dim} / {num_heads}")

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | tuple[Tensor, Tensor] | None = None,
        soft_mask_rate: float | Tensor = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self.merge(_causal_attention(self, self.heads(x), rotary, soft_mask_rate, mask))


@torch.fx.wrap
def _causal_attention(
    attention: CausalSelfAttention,
    qkv: Tensor,
    rotary: Tensor | tuple[Tensor, Tensor] | None,
    soft_mask_rate: float | Tensor,
    mask: Tensor | None,
) -> Tensor:
    """(3, B, heads, N, d) queries, keys and values to (B, heads, N, d)."""
    length, head_dim = qkv.shape[3:]
    if rotary is None:
        rotary = rotary_table(length, head_dim, qkv.device, torch.promote_types(qkv.dtype, torch.float32))
    cos, sin = (rotary.cos(), rotary.sin()) if isinstance(rotary, Tensor) else rotary
    if mask is None:
        mask = causal_halves(length, qkv.device)
    (q, k), v = rotate(qkv[:2], cos, sin), qkv[2]
    k, v = torch.cat([k, k], 2), torch.cat([v, soft_mask_rate * v], 2)
    return F.scaled_dot_product_attention(q, k, v, for_batch(mask, q), attention.dropout, scale=attention.scale)
