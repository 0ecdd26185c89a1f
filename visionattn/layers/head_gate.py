"""Gates with which heads of attention can close."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .heads import check_heads

Gate = Literal["constant", "token", "token_mlp", "token_all", "head"]
"""What a gate of a head follows."""
SMALL = 1e-3
"""Standard deviation of the weights of gates that are added to a trained model."""


class HeadGate(nn.Module):
    """sigma(a), a factor on what every head of attention returns, before the heads are joined and projected.

    "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929. For head h,
    with x_h its part of the d channels of the attention's own input x of C channels:

        constant     a = b_h, whatever the input
        token        a = w_h . x_h + b_h
        token_mlp    a = w_h . relu(W_h x_h + c_h) + b_h, with max(1, d / 4) hidden channels
        token_all    a = w_h . x + b_h, from all C channels
        head         a as of token, averaged over the tokens

    Cost: N C multiply-adds for N tokens (token, head), N C (d + 1) / 4 (token_mlp), num_heads N C (token_all).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        kind: what the gate follows.
        opening: sigma(b_h) at the start, between 0 and 1.
        rescale: divide by `opening`, and start with weights near 0: a trained model begins as it was.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or the kind or opening is none.

    Shape:
        (B, N, C) to what multiplies (B, num_heads, N, d): (B, num_heads, N, 1), but (B, num_heads, 1, 1) of the kind
        "head" and (1, num_heads, 1, 1) of "constant", which takes None too.

    Example:
        >>> import torch
        >>> HeadGate(64, num_heads=4, kind="token_mlp")(torch.randn(2, 15, 64)).shape
        torch.Size([2, 4, 15, 1])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kind: Gate = "token",
        opening: float = 0.5,
        rescale: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if kind not in get_args(Gate):
            raise ValueError(f"expected gate one of {', '.join(get_args(Gate))}, got {kind!r}")
        if not 0 < opening < 1:
            raise ValueError(f"expected gate_opening between 0 and 1, got {opening}")
        dd, d = {"device": device, "dtype": dtype}, dim // num_heads
        self.num_heads, self.kind, self.opening, self.rescale = num_heads, kind, opening, rescale
        hidden = max(1, d // 4) if kind == "token_mlp" else None
        self.hidden_weight = None if hidden is None else nn.Parameter(torch.empty(num_heads, hidden, d, **dd))
        self.hidden_bias = None if hidden is None else nn.Parameter(torch.empty(num_heads, hidden, **dd))
        inputs = {"constant": 0, "token_mlp": hidden, "token_all": dim}.get(kind, d)
        self.weight = nn.Parameter(torch.empty(num_heads, inputs, **dd)) if inputs else None
        self.bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as those of linear maps, and the bias of the opening."""
        for weight, *others in ((self.weight,), (self.hidden_weight, self.hidden_bias)):
            if weight is None:
                continue
            bound = weight.shape[-1] ** -0.5
            for parameter in (weight, *others):
                if self.rescale:
                    nn.init.normal_(parameter, std=SMALL)
                else:
                    nn.init.uniform_(parameter, -bound, bound)
        nn.init.constant_(self.bias, -math.log(1 / self.opening - 1))

    def forward(self, x: Tensor | None) -> Tensor:
        a = self.bias[None, None] if self.weight is None else self._logits(x)
        gate = a.sigmoid().mT[..., None]
        return gate / self.opening if self.rescale else gate

    def _logits(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, heads), or (B, 1, heads)."""
        if self.kind == "token_all":
            return nn.functional.linear(x, self.weight, self.bias)
        x = x.unflatten(2, (self.num_heads, -1))
        if self.hidden_weight is not None:
            x = (torch.einsum("bnhd,hmd->bnhm", x, self.hidden_weight) + self.hidden_bias).relu()
        a = (x * self.weight).sum(3) + self.bias
        return a.mean(1, keepdim=True) if self.kind == "head" else a

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kind={self.kind!r}, opening={self.opening}, rescale={self.rescale}"
