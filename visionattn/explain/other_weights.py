"""Attention of all tokens to all by weights that are no softmax of queries and keys alone."""

from torch import Tensor

from ..layers import CogAttention
from ..layers.cog_attention import signed_softmax
from .map import OF_TOKENS, Explained, Map


def cog_attention(
    layer: CogAttention, x: Tensor, grid: tuple[int, int] | None = None, mask: Tensor | None = None
) -> Explained:
    """Rows sum to 1 without their signs."""
    q, k, v = layer.heads(x)
    weights = signed_softmax(q @ k.mT * layer.scale, mask)
    return [Map("attention", weights, OF_TOKENS)], layer.merge(weights @ v)
