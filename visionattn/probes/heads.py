"""Classifiers of frozen features."""

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VisionattnError
from ..layers.fuse import scale_and_shift, scale_input


class LinearProbe(nn.Module):
    """Batch norm without weights, so that features of any scale do, and a linear classifier.

    Cost: classes x C multiply-adds.

    Args:
        dim: channels C.
        num_classes: classes.

    Shape:
        (B, C) to (B, num_classes).
    """

    def __init__(self, dim: int, num_classes: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False, device=device, dtype=dtype)
        self.head = nn.Linear(dim, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def fuse(self) -> Self:
        """Merge the batch norm into the classifier, in place, for inference.

        Returns:
            the probe.
        """
        if not isinstance(self.norm, nn.Identity):
            scale_input(self.head, *scale_and_shift(self.norm))
            self.norm = nn.Identity()
        return self


class AttentiveProbe(LinearProbe):
    """Efficient probing: learned queries pool the tokens of a frozen backbone, each for channels of its own.

    "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178. With Q queries z
    that are compared with the tokens x themselves, and rows q of a map W to C / d_out channels for each of them:

        a_q = softmax_n(C^-1/2 z_q . x_n)    y_q = W_q sum_n a_qn x_n    logits = linear(batch norm(y_1 ... y_Q))

    Cost: 2 Q N C + C^2 / d_out multiply-adds for N tokens, as tokens are mixed before they are mapped, and the
    classifier's. The definition, which maps every token, takes N C^2 / d_out.

    Args:
        dim: channels C.
        num_classes: classes.
        num_queries: queries Q.
        d_out: what channels are divided by.
        value_bias: bias of W.

    Raises:
        VisionattnError: if `num_queries` and `d_out` are not from 1 up, or their product does not divide `dim`.

    Shape:
        tokens (B, N, C) or maps (B, C, H, W) to (B, num_classes).

    Example:
        >>> import torch
        >>> logits, attention = AttentiveProbe(96, 10)(torch.randn(2, 96, 7, 9), return_attention=True)
        >>> logits.shape, attention.shape
        (torch.Size([2, 10]), torch.Size([2, 32, 63]))
    """

    layouts: ClassVar[dict[str, list]] = {
        "official": [(r"^0\.cls_token", "queries"), (r"^0\.v\.", "v."), (r"^1\.", "norm."), (r"^2\.", "head.")]
    }

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_queries: int = 32,
        d_out: int = 1,
        value_bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if min(num_queries, d_out) < 1:
            raise VisionattnError(f"expected num_queries and d_out from 1 up, got {num_queries} and {d_out}")
        if dim % (num_queries * d_out):
            fits = max(n for n in range(1, min(num_queries, dim) + 1) if dim % (n * d_out) == 0 or n == 1)
            raise VisionattnError(
                f"{num_queries} queries x d_out {d_out} do not divide {dim} channels: {fits} queries would"
            )
        super().__init__(dim // d_out, num_classes, device, dtype)
        self.queries = nn.Parameter(torch.empty(1, num_queries, dim, device=device, dtype=dtype))
        self.v = nn.Linear(dim, dim // d_out, bias=value_bias, device=device, dtype=dtype)
        nn.init.normal_(self.queries, std=0.02)

    def attention(self, x: Tensor) -> Tensor:
        """Weights (B, Q, N) of tokens (B, N, C)."""
        return (self.queries @ x.mT * x.shape[2] ** -0.5).softmax(-1)

    def pool(self, x: Tensor, attention: Tensor | None = None) -> Tensor:
        """What the queries gather of tokens (B, N, C), (B, C / d_out).

        Args:
            x: tokens.
            attention: their weights, where they are there already.
        """
        if attention is None:
            queries = self.queries.expand(x.shape[0], -1, -1)
            mixed = F.scaled_dot_product_attention(queries[:, None], x[:, None], x[:, None])[:, 0]
        else:
            mixed = attention @ x
        rows = self.v.weight.unflatten(0, (self.queries.shape[1], -1))  # (Q, C / d_out / Q, C)
        y = (mixed.transpose(0, 1) @ rows.mT).transpose(0, 1).flatten(1)
        return y if self.v.bias is None else y + self.v.bias

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with `return_attention` these and the weights (B, Q, N) of the tokens."""
        x = x.flatten(2).mT if x.ndim == 4 else x
        attention = self.attention(x) if return_attention else None
        logits = super().forward(self.pool(x, attention))
        return (logits, attention) if return_attention else logits
