"""Heads of attention that every token weighs, and of which it keeps some: mixture-of-head attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import without_autocast
from .self_attention import SelfAttention


class HeadRouter(nn.Module):
    """A gate for every token and head: the first `shared` heads are always on, of the others a token keeps `top_k`.

    "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. With h heads, S of them shared, K of the
    E = h - S others kept, and softmaxes p over these, q over the shared ones and w over the two kinds:

        gates = [ 2 w_0 S q , 2 w_1 K p' ],    p' = p of the K kept heads, divided by their sum, and 0 for the others

    so that heads of equal logits have gates of 1. There is no q for one shared head, no w without shared or without
    kept heads, and of equal logits the first one is kept. The arithmetic is in float32 at least.

    Cost: (h + 2) N C multiply-adds for N tokens of C channels.

    Args:
        dim: channels C.
        num_heads: heads h.
        shared: heads that are always on; all of them, two or more, if none of the others is kept.
        top_k: heads that a token keeps of the others.

    Raises:
        ValueError: if there are not so many heads.

    Shape:
        (..., C) to (..., h), the shared heads first.

    Example:
        >>> import torch
        >>> gates = HeadRouter(32, num_heads=8, shared=2, top_k=3)(torch.randn(1, 15, 32))
        >>> gates.shape, gates.count_nonzero(-1).unique()
        (torch.Size([1, 15, 8]), tensor([5]))
    """

    by_rank = True
    """Values are told by their rank, which may turn on last digits: see `export.running.usual_disagreement`."""

    def __init__(self, dim: int, num_heads: int, shared: int, top_k: int, device=None, dtype=None) -> None:
        super().__init__()
        routed = num_heads - shared
        if not 0 <= top_k <= routed <= num_heads or (top_k == 0 and (routed or shared < 2)):
            raise ValueError(
                f"expected shared + top_k <= num_heads, and all of several heads shared where top_k is 0, "
                f"got shared {shared} and top_k {top_k} of {num_heads} heads"
            )
        self.shared, self.top_k = shared, top_k
        dd = {"bias": False, "device": device, "dtype": dtype}
        self.wg = nn.Linear(dim, routed, **dd) if top_k else None
        self.wg_0 = nn.Linear(dim, 2, **dd) if top_k and shared else None
        self.wg_1 = nn.Linear(dim, shared, **dd) if shared > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return _gates(self, x)

    def aux_loss(self, x: Tensor) -> Tensor:
        """The load-balance loss of tokens (..., C): E sum(P F) of the mean p and the share of tokens that keep it, of
        every head. It is K where all are kept equally often. For `top_k` of at least 1."""
        share, kept = _routed(self, x)
        return share.shape[-1] * (share.flatten(0, -2).mean(0) * kept.flatten(0, -2).to(share.dtype).mean(0)).sum()

    def extra_repr(self) -> str:
        return f"shared={self.shared}, top_k={self.top_k}"


@torch.fx.wrap
def _gates(router: HeadRouter, x: Tensor) -> Tensor:
    S, K, gates = router.shared, router.top_k, []
    if S:
        q = S * _softmax(router.wg_1, x) if S > 1 else _precise(x).new_ones(*x.shape[:-1], 1)
        gates.append(q)
    if K:
        p, kept = _routed(router, x)
        p = p.where(kept, 0)
        gates.append(K * p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps))
    if S and K:
        w = 2 * _softmax(router.wg_0, x)
        gates = [w[..., :1] * gates[0], w[..., 1:] * gates[1]]
    return torch.cat(gates, -1)


@torch.fx.wrap
def _routed(router: HeadRouter, x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the routed heads, and whether each is kept, both (..., E)."""
    logits = _logits(router.wg, x)
    mine, others = logits[..., :, None], logits[..., None, :]
    place = torch.arange(logits.shape[-1], device=x.device)
    # By counting what comes before: sorts leave the order of equals open, and softmaxes underflow to equals.
    before = (others > mine) | ((others == mine) & (place < place[:, None]))
    return logits.softmax(-1), before.sum(-1) < router.top_k


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(linear: nn.Linear, x: Tensor) -> Tensor:
    with without_autocast(x):  # rounded logits would make ties
        x = _precise(x)
        return F.linear(x, linear.weight.to(x.dtype))


def _softmax(linear: nn.Linear, x: Tensor) -> Tensor:
    return _logits(linear, x).softmax(-1)


class MixtureOfHeadAttention(SelfAttention):
    """Self-attention of all tokens whose heads are weighed, and some of them left out, by every token.

    "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. All heads are computed for all tokens
    and multiplied by the gates of a `HeadRouter`: what a token leaves out others look at, and gathering what is left
    costs more than it saves at the lengths of images. The layer's `router.aux_loss(x)` keeps heads evenly used.

    Cost: 4 N C^2 + 2 N^2 C + (h + 2) N C multiply-adds for N tokens, C channels and h heads.

    Args:
        dim: channels C.
        num_heads: attention heads h; must divide `dim`.
        shared: heads that are always on; all of them, two or more, if none of the others is kept.
        top_k: heads that a token keeps of the others.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or there are not as many heads as `shared` and `top_k` say.

    Shape:
        (B, N, C) to (B, N, C); the grid of the patches is accepted and ignored.

    Example:
        >>> import torch
        >>> attention = MixtureOfHeadAttention(64, num_heads=8, shared=2, top_k=4)
        >>> x = torch.randn(1, 15, 64)
        >>> attention(x).shape, attention.router.aux_loss(x).shape
        (torch.Size([1, 15, 64]), torch.Size([]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared: int,
        top_k: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, **dd)
        self.router = HeadRouter(dim, num_heads, shared, top_k, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, scale=self.scale)
        return self.merge(y * head_gates(self.router, x).to(y.dtype))


def head_gates(router: HeadRouter, x: Tensor) -> Tensor:
    """The gates of a sequence (B, N, C), or a map (B, H, W, C), for what the heads return: (B, h, N, 1)."""
    return router(x).flatten(1, -2).transpose(1, 2)[..., None]
