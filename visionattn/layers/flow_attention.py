"""Linear attention by conservation of flow."""

import torch
from torch import Tensor, nn

from .checks import check_not_negative
from .heads import check_heads, parted_heads
from .pointwise import Pointwise
from .precision import without_autocast


class FlowAttention(nn.Module):
    """Attention as a flow from keys, the sources, to queries, the sinks, of which neither makes nor loses any.

    "Flowformer: Linearizing Transformers with Conservation Flows", arXiv 2202.06258. With q and k of a head through the
    logistic function sigma, eps added to them and to every sum that they meet, and once more to what that gives:

        a_n = 1 / (q_n . sum_m k_m)                    b_m = 1 / (k_m . sum_n q_n)
        i_n = q_n . sum_m b_m k_m                      o_m = clip(k_m . sum_n a_n q_n, -1, 1)
        out_n = sigma(i_n) a_n q_n^T sum_m k_m (c_m v_m)^T,    c = N softmax(o)

    Sources of which each gives what it has compete by c for the sinks, and sinks of which each takes what it can are
    allotted sigma(i). Global, linear in N, and blind to where a token is.

    Cost: 4 N C^2 + 2 N C d multiply-adds for N tokens, C channels and heads of d = C / num_heads.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        eps: keeps what is divided by from 0.

    Raises:
        ValueError: if `num_heads` does not divide `dim`.

    Shape:
        (B, ..., C) to (B, ..., C): maps (B, H, W, C) or sequences (B, N, C); a grid is accepted and ignored.

    Example:
        >>> import torch
        >>> FlowAttention(96)(torch.randn(1, 30, 41, 96)).shape
        torch.Size([1, 30, 41, 96])
    """

    last_product = "proj"

    def __init__(
        self, dim: int, num_heads: int = 12, qkv_bias: bool = True, eps: float = 1e-6, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_not_negative(eps=eps)
        self.num_heads = num_heads
        self.eps = eps
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = Pointwise(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj(_flow_attention(self, self.qkv(x)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, eps={self.eps}"


@torch.fx.wrap
def _flow_attention(layer: FlowAttention, qkv: Tensor) -> Tensor:
    """(B, ..., 3C) projections to (B, ..., C)."""
    # In float32 at least: sums over all tokens, and eps beside them, are lost in half precision.
    with without_autocast(qkv):
        q, k, v = capacities(layer, qkv)
        taken, given = flows(q, k, layer.eps)
        out = q @ (k.mT @ (given * v)) * taken
    return out.to(qkv.dtype).transpose(1, 2).reshape(*qkv.shape[:-1], qkv.shape[-1] // 3)


def capacities(layer: FlowAttention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma(q), sigma(k) and v (B, heads, N, d) of projections (B, ..., 3C)."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = (each.to(dtype) for each in parted_heads(qkv, layer.num_heads))
    # One head after the other, as the eight products with them want it: each would copy otherwise.
    return q.contiguous().sigmoid(), k.contiguous().sigmoid(), v


def flows(q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What sinks take, sigma(i) a, and what sources give, c: (B, heads, N, 1) each.

    Args:
        q: (B, heads, N, d), not negative; so is k.
        k: likewise.
        eps: of `FlowAttention`.
    """
    incoming = 1 / _meeting(q, k.sum(2).unsqueeze(3), eps)
    outgoing = 1 / _meeting(k, q.sum(2).unsqueeze(3), eps)
    sink = _meeting(q, k.mT @ outgoing, eps)
    source = _meeting(k, q.mT @ incoming, eps).clamp(-1, 1)
    weight = source.exp()  # of at most 1
    return sink.sigmoid() * incoming, weight / weight.mean(2, keepdim=True)


def _meeting(x: Tensor, total: Tensor, eps: float) -> Tensor:
    """(x + eps) . (total + eps) + eps, the first sum not made: (B, heads, N, d) and (B, heads, d, 1) to (..., N, 1)."""
    total = total + eps
    return x @ total + eps * (1 + total.sum(2, keepdim=True))
