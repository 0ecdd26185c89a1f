"""Plain multi-head self-attention."""

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_rates
from .clipping import clipped_attention, clipped_softmax
from .fuse import scale_input
from .head_gate import Gate, HeadGate
from .heads import check_heads, unpacked
from .pointwise import Pointwise


class SelfAttention(nn.Module):
    """Multi-head self-attention of all tokens.

    "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", arXiv 2010.11929. Heads that are to do
    nothing for a token may be helped to, by weights that reach 0 (`clipped_softmax`) or by a gate (`HeadGate`), which
    keeps activations small enough for int8: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do
    Nothing", arXiv 2306.12929.

    Cost: 4 N C^2 + 2 N^2 C multiply-adds for N tokens and C channels, and those of the gate.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        qk_norm: normalise queries and keys over the channels of a head, all heads by the same weights.
        clip: gamma and zeta of `clipped_softmax`, in place of the softmax.
        clip_alpha: gamma as -clip_alpha / clip_length, with a zeta of 1; 2 to 4 is usual.
        clip_length: tokens of an image in training, which gamma belongs to at any other length too.
        gate: what a gate of every head follows, see `HeadGate`; None for no gate.
        gate_opening: how far it is open at the start, between 0 and 1.
        gate_rescale: for a gate that a trained layer gets: the layer begins as it was.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or an option of clipping or of the gate is none.

    Shape:
        (B, N, C) to (B, N, C); the grid of the patches is accepted and ignored.

    Example:
        >>> import torch
        >>> SelfAttention(64, num_heads=4)(torch.randn(1, 15, 64)).shape
        torch.Size([1, 15, 64])
        >>> SelfAttention(64, clip_alpha=3.0, clip_length=196, gate="token")(torch.randn(1, 15, 64)).shape
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
        qk_norm: bool = False,
        clip: tuple[float, float] | None = None,
        clip_alpha: float | None = None,
        clip_length: int | None = None,
        gate: Gate | None = None,
        gate_opening: float = 0.5,
        gate_rescale: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_rates(attn_drop=attn_drop)
        if gate is None and (gate_rescale or gate_opening != 0.5):
            raise ValueError(
                f"gate_opening and gate_rescale are of a gate: expected one of {', '.join(get_args(Gate))}"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.clip = _clip(clip, clip_alpha, clip_length)
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-5, **dd) if qk_norm else None
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-5, **dd) if qk_norm else None
        self.attn_drop = attn_drop
        self.gate = None if gate is None else HeadGate(dim, num_heads, gate, gate_opening, gate_rescale, **dd)
        self.proj = Pointwise(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        q, k, v = self.heads(x)
        if self.clip is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, scale=self.scale)
        else:
            y = clipped_attention(q, k, v, self.clip, self.scale, self.dropout)
        return self.merge(y if self.gate is None else y * self.gate(x).to(y.dtype))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, d)."""
        # Not parted_heads, which takes maps too: these would come back as tokens.
        q, k, v = unpacked(self.qkv(x).unflatten(2, (3, self.num_heads, -1)))
        if self.q_norm is None:
            return q, k, v
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v  # autocast has norms in float32

    def weigh(self, logits: Tensor) -> Tensor:
        """Logits (..., keys) to weights."""
        return logits.softmax(-1) if self.clip is None else clipped_softmax(logits, *self.clip)

    def merge(self, x: Tensor) -> Tensor:
        """Attended values (B, heads, N, d) to (B, N, C)."""
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    @property
    def dropout(self) -> float:
        """Dropout rate of the attention weights in the present mode."""
        return self.attn_drop if self.training else 0.0

    def fuse(self) -> None:
        """Merge a gate that follows nothing into the output projection, for inference."""
        if self.gate is None or self.gate.weight is not None or "weight" not in self.proj._parameters:
            return
        gate = self.gate(None).detach().flatten().repeat_interleave(self.proj.in_features // self.num_heads)
        scale_input(self.proj, gate, torch.zeros_like(gate))
        self.gate = None

    def extra_repr(self) -> str:
        clip = "" if self.clip is None else f", clip={self.clip}"
        return f"num_heads={self.num_heads}{clip}"


SoftmaxAttention = SelfAttention


def _clip(clip: tuple[float, float] | None, alpha: float | None, length: int | None) -> tuple[float, float] | None:
    """gamma and zeta of either way to give them."""
    if clip is not None and alpha is not None:
        raise ValueError(f"expected clip or clip_alpha, got both: {clip} and {alpha}")
    if (alpha is None) != (not length):
        raise ValueError(f"expected clip_alpha and clip_length, or none of them, got {alpha} and {length}")
    if alpha is not None:
        clip = -alpha / length, 1.0
    if clip is not None and not (isinstance(clip, Sequence) and len(clip) == 2 and clip[0] <= 0 and clip[1] >= 1):
        raise ValueError(f"expected clip (gamma, zeta) with gamma <= 0 and zeta >= 1, got {clip}")
    return None if clip is None else tuple(clip)
