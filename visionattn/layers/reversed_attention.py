"""Attention run backwards: tokens choose who receives what they have to say."""

from functools import partial, reduce

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import check_counts, check_positive
from .init import init_weights
from .self_attention import SelfAttention
from .symbolic import is_exporting, is_symbolic

SENDERS = 128
"""Tokens whose weights are computed at once."""
MAX_KEPT = 1024
"""Tokens up to which training keeps their weights for the backward pass, and does not compute them again."""


class ReversedAttention(SelfAttention):
    """Self-attention by the transposed matrix: every token, a child, spreads its message over parents of its choice.

    "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282; no code is
    published, and parts of this are a reconstruction. With the ordinary attention F_ji of child j to parent i, in each
    of h heads:

        P_j = softmax_h(x_j W_p / temperature)           which head a child speaks by
        M_j = M'_j sigma(w_2 GELU(W_1 x_j) + bias)       how much it still says, and M'_j it did in the layer before
        y_i = sum_j F_ji P_j M_j v_j
        D_ij = sum_h F_ji P_j M_j                        who depends on whom

    A row of F sums to one over those who receive: a parent may get everybody's message, or none. As a child's row is
    complete by itself, children are taken block by block, and memory grows with N alone. Fused attention of parents to
    children would need the log-sum-exp of every row of F and of every column, which torch's does not return: by two
    more passes over all pairs it takes several times as long on CPUs.

    Cost: 4.5 N C^2 + 2 N^2 C + N C (h + 0.5) multiply-adds for N tokens, C channels and `controller_ratio` 0.5.

    Args:
        dim: channels C.
        num_heads: attention heads h; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        temperature: of the choice of a head.
        controller_ratio: hidden channels of what decides on M, as a part of C.
        controller_bias: constant inside of sigma. If it is not 0, w_2 starts at 0: without, M halves in every layer at
            first, and with 4 it starts at 0.98.
        attn_drop: dropout rate of F.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or `temperature` or `controller_ratio` is not above 0.

    Shape:
        (B, N, C), optionally with the message M' (B, N) of the layer before, by default 1, to a pair of (B, N, C) and
        the message M (B, N), in float32 at least; with `return_dependency` D (B, N, N) comes third, its rows those who
        receive. A grid is accepted and ignored.

    Example:
        >>> import torch
        >>> attention, x = ReversedAttention(64, num_heads=4), torch.randn(1, 15, 64)
        >>> y, message = attention(x)
        >>> y, message, dependency = attention(x, message, return_dependency=True)
        >>> y.shape, message.shape, dependency.shape
        (torch.Size([1, 15, 64]), torch.Size([1, 15]), torch.Size([1, 15, 15]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        qkv_bias: bool = True,
        temperature: float = 0.1,
        controller_ratio: float = 0.5,
        controller_bias: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        check_positive(temperature=temperature, controller_ratio=controller_ratio)
        self.temperature, self.controller_bias = temperature, controller_bias
        self.head_selector = nn.Linear(dim, num_heads, bias=False, **dd)
        hidden = int(dim * controller_ratio)
        check_counts(**{"dim * controller_ratio": hidden})
        self.message_controller = Mlp(dim, hidden, 1, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(init_weights)
        if self.controller_bias:
            nn.init.zeros_(self.message_controller.fc2.weight)

    def forward(
        self,
        x: Tensor,
        message: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        return_dependency: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.heads(x)
        gate, message = gates(self, x, message)
        said = (gate * v).to(v.dtype)
        if not return_dependency:
            return self.merge(_received(self, q, k, said)), message
        weights = self.weights(q, k)
        return self.merge(weights.mT @ said), message, (gate * weights).sum(1).mT

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """F (B, heads, children, parents) of queries and keys (B, heads, N, d)."""
        return F.dropout((q * self.scale @ k.mT).softmax(-1), self.dropout)


@torch.fx.wrap
def gates(layer: ReversedAttention, x: Tensor, message: Tensor | None) -> tuple[Tensor, Tensor]:
    """P M (B, heads, N, 1) and M (B, N) of tokens (B, N, C), in float32 at least: M is a product over all layers."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    chosen = (layer.head_selector(x).to(dtype) / layer.temperature).softmax(-1)
    kept = (layer.message_controller(x).to(dtype) + layer.controller_bias).sigmoid().squeeze(-1)
    message = kept if message is None else message * kept
    return (chosen * message[..., None]).mT[..., None], message


@torch.fx.wrap
def _received(layer: ReversedAttention, q: Tensor, k: Tensor, said: Tensor) -> Tensor:
    """Sums over children of what each says (B, heads, N, d), by block: half the time of all at once, on CPUs."""

    def of_block(q: Tensor, said: Tensor) -> Tensor:
        return layer.weights(q, k).mT @ said

    N = q.shape[2]
    if is_symbolic(N):
        return of_block(q, said)
    if N > MAX_KEPT and torch.is_grad_enabled() and not is_exporting():
        of_block = partial(checkpoint, of_block, use_reentrant=False)
    return reduce(torch.add, map(of_block, q.split(SENDERS, 2), said.split(SENDERS, 2)))
