"""Attention with two or three of its four projections, and one over tokens in place of what is left out."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .checks import check_counts
from .heads import check_heads, split_heads
from .init import init_weights
from .pointwise import Pointwise
from .position import resample_rows

KINDS = "optimised", "efficient", "super"


class ReducedAttention(nn.Module):
    """Softmax attention whose values, and keys, are slices of the input itself.

    "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism", arXiv 2403.01643. Of linear
    maps that follow each other one is enough: that of the values is left to the output's ("optimised"), that of the
    keys to the queries' too ("efficient"). With x^h the channels of head h:

        optimised    q = (x W_q)^h    k = (x W_k)^h    v = x^h
        efficient    q = (x W_q)^h    k = x^h          v = x^h
        super        q = (x W_q)^h    k = x^h          v = (W_A x)^h

    where W_A, N x N, mixes tokens, for all heads alike: it has a weight for every pair of N places, so that "super"
    takes sequences of that length only, a class token included. Nothing is lost with one head; with several these are
    other models than softmax attention.

    Cost: for N tokens and C channels 3 N C^2 + 2 N^2 C multiply-adds if "optimised", 2 N C^2 + 2 N^2 C if "efficient",
    2 N C^2 + 3 N^2 C if "super".

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        kind: "optimised", "efficient" or "super".
        num_tokens: tokens N; for "super", and for no other kind.
        bias: of the projections.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, there is no such kind, or `num_tokens` is missing or of no
            use; when called, if "super" gets another number of tokens.

    Shape:
        (B, N, C) to (B, N, C); a grid is accepted and ignored.

    Example:
        >>> import torch
        >>> ReducedAttention(64, num_heads=4, kind="super", num_tokens=15)(torch.randn(1, 15, 64)).shape
        torch.Size([1, 15, 64])
    """

    last_product = "proj"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kind: str = "optimised",
        num_tokens: int | None = None,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if kind not in KINDS:
            raise ValueError(f"expected kind one of {', '.join(KINDS)}, got {kind!r}")
        if (num_tokens is not None) != (kind == "super"):
            raise ValueError(f"expected num_tokens with kind 'super' alone, got {num_tokens} with {kind!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.kind = num_heads, kind
        self.q = Pointwise(dim, dim, bias=bias, **dd)
        self.k = Pointwise(dim, dim, bias=bias, **dd) if kind == "optimised" else None
        self.align = TokenMixing(num_tokens, **dd) if kind == "super" else None
        self.proj = Pointwise(dim, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(partial(init_weights, draw=nn.init.xavier_uniform_))
        if self.align is not None:
            self.align.reset_parameters()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, d)."""
        q = self.q(x)
        k = x if self.k is None else self.k(x)
        v = x if self.align is None else self.align(x)
        return tuple(split_heads(each.to(q.dtype), self.num_heads, 1)[0] for each in (q, k, v))

    def merge(self, x: Tensor) -> Tensor:
        """Attended values (B, heads, N, d) to (B, N, C)."""
        return self.proj(x.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kind={self.kind!r}"


class TokenMixing(nn.Module):
    """W x: a linear map of the tokens of a sequence, at first the identity but for a little noise.

    Args:
        num_tokens: tokens N.

    Shape:
        (B, N, C) to (B, N, C).
    """

    def __init__(self, num_tokens: int, device=None, dtype=None) -> None:
        super().__init__()
        check_counts(num_tokens=num_tokens)
        self.weight = nn.Parameter(torch.empty(num_tokens, num_tokens, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, std=0.02)
        self.weight.diagonal().add_(1)

    def forward(self, x: Tensor) -> Tensor:
        return _mixed(self.weight, x)

    def extra_repr(self) -> str:
        return f"num_tokens={len(self.weight)}"


@torch.fx.wrap
def _mixed(weight: Tensor, x: Tensor) -> Tensor:
    if x.shape[1] != len(weight):
        raise ValueError(
            f"expected the {len(weight)} tokens that super attention was made for (num_tokens), got {x.shape[1]}: "
            f"resize its weights, or use the kind 'efficient', which takes any number"
        )
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)  # half the time of weight @ x, which copies x


def resize_token_mixing(
    weight: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0, suffix: int = 0
) -> Tensor:
    """The weight of a `TokenMixing` for a map of another size, resized bilinearly along both axes.

    It does what it did to a map of the old size that is resized to this, and back: rows sum to what they did, which
    interpolating both axes alike would not give.

    Args:
        weight: (N, N) with N = prefix + H * W + suffix.
        old: (H, W) that the weight is for.
        new: (H, W) wanted.
        prefix: tokens in front of the patches, a class token for one.
        suffix: tokens behind them.
    """
    tokens = torch.eye(prefix + new[0] * new[1] + suffix, dtype=weight.dtype, device=weight.device)
    to_old = resample_rows(tokens, new, old, prefix, suffix, "bilinear")
    return resample_rows(weight @ to_old, old, new, prefix, suffix, "bilinear")
