"""Attention to fine detail in windows and to a pooled map, by separate heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts, check_rates
from .heads import check_heads, parted_heads, split_heads
from .pointwise import Pointwise
from .window_attention import window_attention


class HiLoAttention(nn.Module):
    """Self-attention of some heads inside small windows (Hi-Fi) and of the others to the average-pooled map (Lo-Fi).

    "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213. A map that is no multiple of the window is padded
    with zeros at the bottom and right, and the padding takes part, as in the published models: it has the biases of the
    projection as key and value of its window and enters the averages as zeros.

    Cost: 3 N C C_h + 2 N w^2 C_h + N C_h^2 multiply-adds of Hi-Fi and N C C_l + 2 N' C C_l + 2 N N' C_l + N C_l^2 of
    Lo-Fi for N = H W positions of a map that w x w windows divide, N' = N / w^2, C channels, and C_h of them in Hi-Fi
    and C_l in Lo-Fi heads.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        window_size: side w of a window and of the pooling; with 1 all heads are Lo-Fi heads, on the map itself.
        alpha: share of Lo-Fi heads; int(num_heads * alpha) of them.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, `window_size` is not positive or `alpha` is no share.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W; Hi-Fi heads have the first channels of the output.

    Example:
        >>> import torch
        >>> HiLoAttention(64, num_heads=4, window_size=2, alpha=0.5)(torch.randn(1, 15, 22, 64)).shape
        torch.Size([1, 15, 22, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: int = 2,
        alpha: float = 0.5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_counts(window_size=window_size)
        check_rates(alpha=alpha, attn_drop=attn_drop)
        dd = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.window_size = window_size
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        self.scale = head_dim**-0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        if low := self.low_heads * head_dim:
            self.l_q = Pointwise(dim, low, bias=qkv_bias, **dd)
            self.l_kv = Pointwise(dim, 2 * low, bias=qkv_bias, **dd)
            self.l_proj = Pointwise(low, low, **dd)
        if high := self.high_heads * head_dim:
            self.h_qkv = Pointwise(dim, 3 * high, bias=qkv_bias, **dd)
            self.h_proj = Pointwise(high, high, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        if self.high_heads:
            out.append(self.h_proj(_high_frequencies(self, self.h_qkv(x))))
        if self.low_heads:
            out.append(self.l_proj(_low_frequencies(self, self.l_q(x), self.l_kv(_pooled(x, self.window_size)))))
        return self.proj_drop(torch.cat(out, -1))

    def extra_repr(self) -> str:
        return f"high_heads={self.high_heads}, low_heads={self.low_heads}, window_size={self.window_size}"


@torch.fx.wrap
def _pooled(x: Tensor, size: int) -> Tensor:
    """Averages over size x size windows of (B, H, W, C), zero-padded at the bottom and right."""
    if size == 1:
        return x
    x = F.pad(x.permute(0, 3, 1, 2), (0, -x.shape[2] % size, 0, -x.shape[1] % size))
    return F.avg_pool2d(x, size).permute(0, 2, 3, 1)


@torch.fx.wrap
def _high_frequencies(layer: HiLoAttention, qkv: Tensor) -> Tensor:
    """(B, H, W, 3 C_h) projections to (B, H, W, C_h)."""
    dropout = layer.attn_drop if layer.training else 0.0
    return window_attention(qkv, layer.h_qkv.bias, layer.high_heads, layer.window_size, layer.scale, dropout)


@torch.fx.wrap
def _low_frequencies(layer: HiLoAttention, q: Tensor, kv: Tensor) -> Tensor:
    """(B, H, W, C_l) queries and (B, H', W', 2 C_l) keys and values to (B, H, W, C_l)."""
    (queries,), (k, v) = split_heads(q, layer.low_heads, 1), parted_heads(kv, layer.low_heads, 2)
    dropout = layer.attn_drop if layer.training else 0.0
    out = F.scaled_dot_product_attention(queries, k, v, dropout_p=dropout, scale=layer.scale)
    return out.transpose(1, 2).reshape(q.shape)
