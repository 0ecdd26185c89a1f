"""Linear attention that keeps the length of the query, and softmax attention in the same frame."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_attention import rotate
from .depthwise import depthwise
from .direct import is_direct
from .heads import check_heads
from .pointwise import Pointwise
from .precision import without_autocast
from .size_constant import size_constant
from .symbolic import Size

KERNELS = "norm_aware", "softmax"


@size_constant
def map_rotary_table(
    height: Size, width: Size, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (H W, d / 2) of angles by which channel pairs turn: the first half of them by the row times
    10000^(-i / (d / 4 - 1)), the second by the column.

    Args:
        height: rows H of the map.
        width: columns W of the map.
        head_dim: channels d of a head.
        device: of the tables.
        dtype: of the tables.
    """
    frequency = 10000.0 ** -torch.linspace(0, 1, head_dim // 4, device=device, dtype=dtype)
    rows, cols = (torch.arange(n, device=device, dtype=dtype)[:, None] * frequency for n in (height, width))
    angles = torch.cat([rows[:, None].expand(-1, width, -1), cols.expand(height, -1, -1)], -1).flatten(0, 1)
    return angles.cos(), angles.sin()


class NormAwareLinearAttention(nn.Module):
    """Linear attention whose query is raised to a power that grows with its length, in a gated frame.

    "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137. The query's length, which
    normalised linear attention forgets, becomes the exponent of its direction: a long query weighs peakedly. What is
    positive and what is negative in queries and keys are features of their own. Both are turned by the position of
    their place, except where the sum of the weights is taken: rows do not sum to one, and a weight may be negative.

    What attention returns is added to a 5 x 5 depthwise convolution of the values, normalised, and gated.

    Cost: 5 N C^2 + 4 N C d + 25 N C multiply-adds for N = H W positions, C channels and d of a head, 2 N^2 C instead of
    4 N C d with softmax.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim` into multiples of 4.
        kernel: "norm_aware", or "softmax" for softmax attention of the turned queries and keys in its place.
        lepe: add the convolution of the values.
        rotary: turn queries and keys.

    Raises:
        ValueError: if `num_heads` does not divide `dim` so, or `kernel` is none of these.

    Shape:
        (B, C, H, W) to (B, C, H, W), any H and W.

    Example:
        >>> import torch
        >>> NormAwareLinearAttention(64, num_heads=2)(torch.randn(1, 64, 15, 22)).shape
        torch.Size([1, 64, 15, 22])
    """

    last_product = "out_proj"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel: str = "norm_aware",
        lepe: bool = True,
        rotary: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if dim // num_heads % 4:
            raise ValueError(f"expected a multiple of 4 channels per head, got {dim} / {num_heads}")
        if kernel not in KERNELS:
            raise ValueError(f"expected kernel one of {', '.join(KERNELS)}, got {kernel!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.kernel, self.rotary = num_heads, kernel, rotary
        self.qkvg = Pointwise(dim, 4 * dim, **dd)
        self.lepe = depthwise(dim, 5, **dd) if lepe else None
        self.ln = nn.LayerNorm(dim, **dd)
        self.out_proj = Pointwise(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkv, gate = self.project(x)
        return self.merge(_attend(self, qkv), qkv, gate)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values (B, H, W, 3 C) and gates (B, H, W, C) of (B, C, H, W)."""
        C = x.shape[1]
        return self.qkvg(x.permute(0, 2, 3, 1)).split([3 * C, C], -1)

    def merge(self, y: Tensor, qkv: Tensor, gate: Tensor) -> Tensor:
        """What attention returns (B, H, W, C), with the local term of the values and the gate, to (B, C, H, W)."""
        if self.lepe is not None:
            v = qkv.chunk(3, -1)[2]
            y = y + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out_proj(self.ln(y) * F.silu(gate)).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel={self.kernel!r}"


def turned_heads(layer: NormAwareLinearAttention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is weighed by: queries and keys, turned, values (B, heads, N, d), and the factors of the rows.

    With softmax queries and keys are (B, heads, N, d) and there are no factors. Else their positive and their negative
    features are (2, B, heads, N, d), and the weights are z q k^T / N, with z (B, heads, N, 1), summed over both; these
    are in float32 at least, as keys are cubed.
    """
    _, H, W, C = qkv.shape
    head_dim, dtype = C // 3 // layer.num_heads, torch.promote_types(qkv.dtype, torch.float32)
    table = map_rotary_table(H, W, head_dim, qkv.device, dtype) if layer.rotary else ()
    q, k, v = qkv.flatten(1, 2).unflatten(2, (3, layer.num_heads, head_dim)).permute(2, 0, 3, 1, 4)
    if layer.kernel == "softmax":
        return _turn(q, *table), _turn(k, *table), v, None
    q, k, v = q.to(dtype), k.to(dtype) ** 3, v.to(dtype)
    length = q.norm(dim=-1, keepdim=True)
    direction = q / length.clamp(min=1e-12)  # a query of zeros has none
    q = direction.sign() * direction.abs() ** (3 * (0.5 + length.tanh()))
    q, k = (torch.stack([x, -x]).relu() for x in (q, k))
    z = 1 / ((q @ k.mean(-2).unsqueeze(-1)).sum(0) + 1e-6)  # of what is not turned yet
    return _turn(q, *table), _turn(k, *table), v, z


def _turn(x: Tensor, *table: Tensor) -> Tensor:
    """`rotate` by a table, in a tenth of its time where complex numbers may be used; `x` if there is none."""
    if not table:
        return x
    cos, sin = table
    if not is_direct(x, cos, sin):
        return rotate(x, cos, sin)
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


@torch.fx.wrap
def _attend(layer: NormAwareLinearAttention, qkv: Tensor) -> Tensor:
    """(B, H, W, 3 C) projections to (B, H, W, C)."""
    with without_autocast(qkv):
        q, k, v, z = turned_heads(layer, qkv)
        y = F.scaled_dot_product_attention(q, k, v) if z is None else z * (q @ (k.mT @ v / v.shape[2])).sum(0)
    return y.transpose(1, 2).flatten(2).unflatten(1, qkv.shape[1:3]).to(qkv.dtype)
