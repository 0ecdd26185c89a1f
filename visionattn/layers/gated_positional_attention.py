"""Gated positional self-attention."""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .cache import ParameterCache
from .checks import check_rates
from .heads import check_heads, parted_heads
from .pointwise import Pointwise
from .symbolic import is_symbolic


class GatedPositionalSelfAttention(nn.Module):
    """Self-attention of patches whose heads mix a content attention with a positional one by a learned gate.

    "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", arXiv 2103.10697. The positional
    logits are u0 dx + u1 dy + u2 (dx^2 + dy^2) of the offset from query to key. They have no dx dy term, so that
    attention is the product of one over rows and one over columns, is the same for every sample, and no matrix over
    pairs of patches is ever formed.

    Cost: 4 N C^2 + 2 N^2 C + N (H + W) C multiply-adds for N = H W patches and C channels.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the content logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights (of content and position independently).
        proj_drop: dropout rate of the output.
        locality_strength: how concentrated the initial positional attention is.
        use_local_init: start as a convolution: heads look at the taps of a kernel, values are the input.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or N is no square and no grid was given.

    Shape:
        (B, N, C) and optionally the grid (H, W) with N = H W, by default square, to (B, N, C).

    Example:
        >>> import torch
        >>> GatedPositionalSelfAttention(64, num_heads=4)(torch.randn(1, 15, 64), grid=(3, 5)).shape
        torch.Size([1, 15, 64])
    """

    needs_grid = True
    """Its tokens are the patches of a grid, and no others."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_rates(attn_drop=attn_drop)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qk = Pointwise(dim, 2 * dim, bias=qkv_bias, **dd)
        self.v = Pointwise(dim, dim, bias=qkv_bias, **dd)
        self.attn_drop = attn_drop
        self.proj = Pointwise(dim, dim, **dd)
        self.pos_proj = nn.Linear(3, num_heads, **dd)
        self.gating_param = nn.Parameter(torch.ones(num_heads, **dd))
        self.proj_drop = nn.Dropout(proj_drop)
        self.locality_strength = locality_strength
        self.use_local_init = use_local_init
        self._position_cache = ParameterCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.qk, self.v, self.proj, self.pos_proj):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.ones_(self.gating_param)
        if self.use_local_init:
            self.local_init()

    @torch.no_grad()
    def local_init(self) -> None:
        """Set values to the input and head a + K b of K^2 to look at tap (row a, column b) of a K x K kernel."""
        nn.init.eye_(self.v.weight)
        K = math.isqrt(self.num_heads)
        centre = (K - 1) / 2
        for head in range(K * K):
            a, b = head % K, head // K
            self.pos_proj.weight[head] = torch.tensor([2 * (b - centre), 2 * (a - centre), -1.0])
        self.pos_proj.weight.mul_(self.locality_strength)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj_drop(self.proj(_gated(self, self.qk(x), self.v(x), grid)))

    def _position_attention(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Attention over rows (heads, H, H), scaled by the gate, and over columns (heads, W, W)."""
        # In float32 at least: the logits grow with the squared distance.
        dtype = torch.promote_types(self.pos_proj.weight.dtype, torch.float32)
        u = self.pos_proj.weight.to(dtype)[:, :, None, None]

        bias = self.pos_proj.bias.to(dtype)[:, None, None]  # without effect on a softmax, but part of the checkpoints

        def attention(linear: Tensor, length: int) -> Tensor:
            position = torch.arange(length, device=u.device, dtype=dtype)
            offset = position - position[:, None]
            return (linear * offset + u[:, 2] * offset.square() + bias).softmax(-1)

        gate = self.gating_param.to(dtype).sigmoid()[:, None, None]
        return gate * attention(u[:, 1], height), attention(u[:, 0], width)


@torch.fx.wrap
def _gated(layer: GatedPositionalSelfAttention, qk: Tensor, v: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(B, N, 2C) queries and keys and (B, N, C) values to (B, N, C)."""
    B, N, C = v.shape
    H, W = grid or (math.isqrt(N),) * 2
    if not is_symbolic(N) and H * W != N:
        raise ValueError(f"expected grid height x width to be the {N} patches of the input, got {H} x {W}")
    heads = layer.num_heads
    q, k = parted_heads(qk, heads, 2)
    v = v.view(B, N, heads, C // heads)
    dropout = layer.attn_drop if layer.training else 0.0
    content = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), dropout_p=dropout, scale=layer.scale)
    parameters = [*layer.pos_proj.parameters(), layer.gating_param]
    rows, cols = layer._position_cache((H, W), parameters, lambda: layer._position_attention(H, W))
    rows = F.dropout(rows.to(v.dtype), dropout)
    position = torch.einsum("hyt,btxhd->byxhd", rows, v.view(B, H, W, heads, C // heads))
    position = torch.einsum("hxt,bythd->byxhd", cols.to(v.dtype), position)
    content_gate = 1 - layer.gating_param.sigmoid().to(v.dtype)[:, None]
    return (content.transpose(1, 2) * content_gate + position.reshape(B, N, heads, C // heads)).reshape(B, N, C)
