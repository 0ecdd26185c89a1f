"""Softmax attention whose weights may be exactly 0 and 1."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .symbolic import is_symbolic

PAIRS = 2**22
"""Attention weights, of all samples and heads, that are computed at once where no gradient is asked for."""


def clipped_softmax(logits: Tensor, gamma: float, zeta: float, dim: int = -1) -> Tensor:
    """clip((zeta - gamma) softmax(logits) + gamma, 0, 1), which is not normalised again.

    "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929. A head that
    is to do nothing reaches weights of 0 with logits that are not large. No gradient passes where one is clipped.

    Args:
        logits: of any shape.
        gamma: what the softmax is stretched to below, 0 at most.
        zeta: what it is stretched to above, 1 at least.
        dim: of the keys.

    Example:
        >>> import torch
        >>> clipped_softmax(torch.tensor([3.0, 0.0, 0.0, 0.0]), gamma=-0.1, zeta=1.0)
        tensor([0.8571, 0.0000, 0.0000, 0.0000])
    """
    return ((zeta - gamma) * logits.softmax(dim) + gamma).clamp(0, 1)


@torch.fx.wrap
def clipped_attention(
    q: Tensor, k: Tensor, v: Tensor, clip: tuple[float, float], scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention by `clipped_softmax`. It clips what is normalised, which fused attention cannot: in inference the rows
    of some queries after those of others, so that no matrix over all pairs is made.

    Args:
        q: queries (B, heads, N, d).
        k: keys (B, heads, M, d).
        v: values (B, heads, M, d_v).
        clip: gamma and zeta.
        scale: factor of the logits.
        dropout: rate of the weights that are dropped.

    Returns:
        (B, heads, N, d_v).
    """
    B, heads, N, M = *q.shape[:3], k.shape[2]
    whole = torch.is_grad_enabled() or is_symbolic(B, N, M)
    parts = [q] if whole else q.split(max(1, PAIRS // (B * heads * M)), 2)
    attended = [F.dropout(clipped_softmax(part @ k.mT * scale, *clip), dropout) @ v for part in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended, 2)
