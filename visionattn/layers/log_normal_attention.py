"""Linear attention as concentrated as softmax attention, with softmax attention inside blocks of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts, check_not_negative
from .heads import check_heads
from .pointwise import Pointwise
from .precision import without_autocast
from .size_constant import size_constant
from .symbolic import Size, ceil_div, fixed, for_batch, is_symbolic

MODES = {"average": (), "learnable_scale": ("r", "p"), "learnable_ratio": ("r",)}
"""How both attentions are combined, and names of the factors that are learned."""
SLOPE, OFFSET = 0.14855178144710912, 0.35487039130661086
"""Fitted by the authors: what variance of log-weights the exponents of features have to have."""


class LinearLogNormalAttention(nn.Module):
    """Linear attention of exponentials whose weights are spread as those of softmax attention, and this inside blocks.

    "Linear Log-Normal Attention with Unbiased Concentration", arXiv 2311.13541. Weights of softmax attention are
    log-normally distributed, and so are those of linear attention with exp(a q) and exp(b k) as features, a and b being
    such that the variances are the same:

        a sigma_q = b sigma_k = sqrt((sigma_q^2 sigma_k^2 + 0.3549) / (2 * 0.1486))

    with the standard deviations sigma of all queries and of all keys, of all heads, tokens and, as published, samples:
    what a sample gets depends on those beside it, unless `per_sample` is set. Gradients take a and b, which follow the
    input, for constants, as published: finite differences are others. Softmax attention inside blocks, of d tokens in
    their order or of a window of the map, adds what is near. The exponentials are in float32 at least.

    Cost: 4 N C^2 + 4 N C d multiply-adds for N tokens, C channels and heads of d = C / num_heads; 4 N C^2 + 2 N C d
    without blocks, 4 N C^2 + 2 N C (d + w^2) with windows of w x w.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        mode: "average" of both attentions; their sum with factors per channel that are learned, "learnable_scale"; or
            with one for the first and what it lacks of 1 for the second, "learnable_ratio".
        block_diagonal: whether there is attention inside blocks.
        eps: keeps the sum that weights are divided by from 0.
        per_sample: standard deviations of every sample by itself.
        window_size: side w of the windows of the map that blocks are; None for d tokens in their order.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or an option is none of these.

    Shape:
        (B, N, C) to (B, N, C). The grid (H, W) of the patches is needed for windows, N = H W then.

    Example:
        >>> import torch
        >>> LinearLogNormalAttention(64, num_heads=4)(torch.randn(1, 75, 64)).shape
        torch.Size([1, 75, 64])
    """

    last_product = "proj"
    layouts = {
        "official": [
            (r"^to_q\.weight$", "qkv.weight#0"),
            (r"^to_k\.weight$", "qkv.weight#1"),
            (r"^to_v\.weight$", "qkv.weight#2"),
            (r"^to_out\.", "proj."),
            (r"^lin_attn\.", ""),
        ]
    }

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mode: str = "average",
        block_diagonal: bool = True,
        eps: float = 1e-5,
        per_sample: bool = False,
        window_size: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if mode not in MODES:
            raise ValueError(f"expected mode one of {', '.join(MODES)}, got {mode!r}")
        check_not_negative(eps=eps)
        if window_size is not None:
            check_counts(window_size=window_size)
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.mode, self.block_diagonal = num_heads, mode, block_diagonal
        self.eps, self.per_sample, self.window_size = eps, per_sample, window_size
        self.qkv = Pointwise(dim, 3 * dim, bias=False, **dd)
        for name in MODES[mode] if block_diagonal else ():
            factors = torch.full((1, num_heads, 1, dim // num_heads), 0.5, **dd)
            self.register_parameter(name, nn.Parameter(factors))
        self.proj = Pointwise(dim, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj(_attend(self, self.heads(x), grid).transpose(1, 2).flatten(2))

    @property
    def needs_grid(self) -> bool:
        """Whether its tokens are the patches of a grid, and no others."""
        return self.window_size is not None

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values (3, B, heads, N, d)."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def combine(self, spread: Tensor, near: Tensor) -> Tensor:
        """What linear attention returns and what attention inside blocks does, (B, heads, N, d) both, as one."""
        if self.mode == "average":
            return (spread + near) / 2
        return self.r * spread + (self.p if self.mode == "learnable_scale" else 1 - self.r) * near

    def blocks(self, length: Size, grid: tuple[int, int] | None) -> tuple[tuple[Size, Size], tuple[int, int]]:
        """The map of N tokens, which is a row without windows, and the height and width of its blocks.

        Raises:
            ValueError: if the blocks are windows and the tokens are those of no grid.
        """
        if self.window_size is None:
            return (1, length), (1, self.qkv.in_features // self.num_heads)
        if grid is None or grid[0] * grid[1] != length:
            raise ValueError(f"expected a grid of {length} tokens, whose windows are blocks, got {grid}")
        return fixed(*grid), (self.window_size, self.window_size)

    def extra_repr(self) -> str:
        shown = "num_heads", "mode", "block_diagonal", "eps", "per_sample", "window_size"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def features(layer: LinearLogNormalAttention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials of queries and keys (B, heads, N, d), of which linear weights are products."""
    axes = (1, 2, 3) if layer.per_sample else (0, 1, 2, 3)
    with torch.no_grad():
        tiny = torch.finfo(q.dtype).tiny  # queries or keys that are all the same have features of 1, whatever the scale
        q_std, k_std = (x.std(axes, keepdim=True).clamp(min=tiny) for x in (q, k))
        matched = ((q_std**2 * k_std**2 + OFFSET) / (2 * SLOPE)).sqrt()
    # The largest exponents are taken away, which nearly cancels; before they are scaled, so that none is infinite.
    q = (q - q.amax(3, keepdim=True)) * (matched / q_std)
    k = (k - k.amax((2, 3), keepdim=True)) * (matched / k_std)
    return q.exp(), k.exp()


@torch.fx.wrap
def _attend(layer: LinearLogNormalAttention, qkv: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Queries, keys and values (3, B, heads, N, d) to (B, heads, N, d)."""
    q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    with without_autocast(qkv):
        Q, K = features(layer, q, k)
        sums = Q @ (K.mT @ F.pad(v, (0, 1), value=1.0))  # of values, and last of weights
        out = sums[..., :-1] / (sums[..., -1:] + layer.eps)
    if layer.block_diagonal:
        (length,) = fixed(qkv.shape[3])
        out = layer.combine(out, _in_blocks(qkv, *layer.blocks(length, grid)))
    return out.to(qkv.dtype)


def _in_blocks(qkv: Tensor, size: tuple[Size, Size], block: tuple[int, int]) -> Tensor:
    """Softmax attention inside blocks of a map, the last of which may be smaller.

    Args:
        qkv: (3, B, heads, N, d), row-major.
        size: height and width of the map.
        block: those of a block.
    """
    (H, W), (rows, cols) = size, [ceil_div(n, side) for n, side in zip(size, block, strict=True)]
    B, mask, places = qkv.shape[1], None, None
    rest = cols * block[1] - W, 0, rows * block[0] - H
    x = qkv.permute(1, 3, 0, 2, 4).unflatten(1, (H, W))  # as the projection wrote it
    if is_symbolic(H, W) or any(rest):
        inside, places = _on_map(H, W, *block, qkv.device)
        mask = inside.repeat(B, 1)[:, None, None]
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, *rest))
    x = x.unflatten(2, (cols, block[1])).unflatten(1, (rows, block[0])).transpose(2, 3)
    q, k, v = x.flatten(3, 4).flatten(0, 2).permute(2, 0, 3, 1, 4)  # (B * blocks, heads, tokens, d)
    out = F.scaled_dot_product_attention(q, k, v, None if mask is None else for_batch(mask, q)).transpose(1, 2)
    out = out.unflatten(1, block).unflatten(0, (B, rows, cols)).transpose(2, 3)  # (B, rows, y, cols, x, heads, d)
    out = out.flatten(3, 4).flatten(1, 3)
    return (out if places is None else out.index_select(1, places)).transpose(1, 2)


@size_constant
def _on_map(H: Size, W: Size, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a map H x W that is padded to blocks of height x width: which tokens of a block are on the map
    (blocks, tokens), and the places (H W,) of these among all."""
    rows, cols = (torch.arange(ceil_div(n, side) * side, device=device) for n, side in ((H, height), (W, width)))
    y, x = (rows < H).unflatten(0, (-1, height)), (cols < W).unflatten(0, (-1, width))
    inside = y[:, None, :, None] & x[None, :, None, :]
    return inside.flatten(2).flatten(0, 1), (rows[:H, None] * cols.shape[0] + cols[:W]).flatten()
