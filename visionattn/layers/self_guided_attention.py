"""Attention at two scales that tells how much every position is attended to, and attention to keys merged by that."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_rates
from .depthwise import depthwise
from .heads import check_heads, parted_heads, split_heads
from .patch import PatchConv2d
from .pointwise import Pointwise
from .precision import without_autocast
from .symbolic import ceil_div, fixed, is_symbolic

MAX_WEIGHTS = 2**24
"""Attention weights of a call that are held at once, as long as it is not known how many gradients will need."""


class EnhancedAttention(nn.Module):
    """What the kinds of attention of SG-Former have in common: a depthwise convolution of a linear map of the input
    joins the attended values before the output projection.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` does not divide `dim`.
    """

    last_product = "proj"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_rates(attn_drop=attn_drop)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.q = Pointwise(dim, dim, bias=qkv_bias, **dd)
        self.attn_drop = attn_drop
        self.lepe_linear = Pointwise(dim, dim, **dd)
        self.lepe_conv = depthwise(dim, 3, **dd)
        self.proj = Pointwise(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def merge(self, attended: Tensor, x: Tensor) -> Tensor:
        """Attended values and the input, both (B, H, W, C), to the output."""
        lepe = self.lepe_conv(self.lepe_linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(attended + lepe))

    @property
    def dropout(self) -> float:
        """Dropout rate of the attention weights in the present mode."""
        return self.attn_drop if self.training else 0.0


class HybridScaleAttention(EnhancedAttention):
    """Self-attention of the first half of the heads to a summary of the map, and of the others inside windows, which
    also tells how much attention every position receives.

    "SG-Former: Self-guided Transformer with Evolving Token Reallocation", arXiv 2308.12216. The summary is a strided
    convolution, which drops rows and columns that are over. Windows are tiled from the top left corner; what the last
    ones lack is masked. The significance of a position is the mean attention that its window pays to it, and that the
    whole map pays to the place of the summary it is nearest to. It has no gradient.

    Cost: 5 N C^2 + (N C + C^2) N / r^2 + (w^2 + 9) N C multiply-adds for N = H W positions, C channels, a summary by r
    and w x w windows.

    Args:
        dim: channels C.
        num_heads: attention heads, an even number that divides `dim`.
        sr_ratio: kernel and stride r of the summary.
        window_size: side w of a window.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights, before the significance is taken from them.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` is odd or does not divide `dim`, or a size is not positive.

    Shape:
        (B, H, W, C) to (B, H, W, C) and the significance (B, H, W), any H and W.

    Example:
        >>> import torch
        >>> out, significance = HybridScaleAttention(64, num_heads=2, sr_ratio=8)(torch.randn(1, 30, 41, 64))
        >>> out.shape, significance.shape
        (torch.Size([1, 30, 41, 64]), torch.Size([1, 30, 41]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        window_size: int = 7,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, **dd)
        _check_halves(num_heads)
        if min(sr_ratio, window_size) < 1:
            raise ValueError(f"expected sr_ratio and window_size >= 1, got {sr_ratio} and {window_size}")
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.local_kv = Pointwise(dim, dim, bias=qkv_bias, **dd)
        self.sr = PatchConv2d(dim, dim, sr_ratio, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.act = nn.GELU()
        self.global_kv = Pointwise(dim, dim, bias=qkv_bias, **dd)

    def summary(self, x: Tensor) -> Tensor:
        """What the global heads attend to: (B, H, W, C) to (B, floor(H / r), floor(W / r), C)."""
        return self.act(self.norm(self.sr(_at_least(x, self.sr_ratio).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = _hybrid(self, self.q(x), self.global_kv(self.summary(x)), self.local_kv(x))
        return self.merge(found[0], x), found[1]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}, window_size={self.window_size}"


class SelfGuidedAttention(EnhancedAttention):
    """Self-attention to keys that are merged of many insignificant positions, or of few significant ones.

    "SG-Former: Self-guided Transformer with Evolving Token Reallocation", arXiv 2308.12216. Positions are put in the
    order of their significance. Sections of this order are cut into groups of consecutive positions, of which a linear
    map makes one token each; all positions attend to those. The order has no gradient. Sections that are no multiple of
    their groups are filled up with zeros at the less significant end.

    Cost: 3 N C^2 + 2 L C^2 + 2 N L C + 10 N C multiply-adds for N = H W positions, C channels and L merged tokens, N
    times the sum of share / group.

    Args:
        dim: channels C.
        num_heads: attention heads, an even number that divides `dim`.
        sections: (share of the positions, positions of a group) of each section, the least significant first.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.

    Raises:
        ValueError: if `num_heads` is odd or does not divide `dim`, or the shares do not sum to 1.

    Shape:
        (B, H, W, C) and the significance (B, H, W) to (B, H, W, C), any H and W. Nothing but the order of the
        significance counts.

    Example:
        >>> import torch
        >>> attention = SelfGuidedAttention(64, num_heads=2, sections=((0.5, 8), (0.5, 2)))
        >>> attention(torch.randn(1, 30, 41, 64), torch.rand(1, 30, 41)).shape
        torch.Size([1, 30, 41, 64])
    """

    by_rank = True
    """Values are told by their rank, which may turn on last digits: see `export.running.usual_disagreement`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sections: Sequence[tuple[float, int]],
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, **dd)
        _check_halves(num_heads)
        ends = list(accumulate(Fraction(share).limit_denominator(1000) for share, _ in sections))
        if not ends or ends[-1] != 1 or min(share for share, _ in sections) < 0:
            raise ValueError(f"expected sections whose shares sum to 1, got {tuple(sections)}")
        self.sections = tuple(sections)
        self.ends = tuple((end.numerator, end.denominator) for end in ends)  # what graphs can multiply sizes with
        self.kv = Pointwise(dim, 2 * dim, bias=qkv_bias, **dd)  # keys and values of the first heads, then of the others
        self.pools = nn.ModuleList(nn.Linear(group, 1, **dd) for _, group in sections)

    def forward(self, x: Tensor, significance: Tensor) -> Tensor:
        return self.merge(_guided(self, self.q(x), self.kv(merged_tokens(self, x, significance))), x)


class GlobalEnhancedAttention(EnhancedAttention):
    """Self-attention of all positions, as in the last stage of SG-Former. Arguments as for `EnhancedAttention`.

    Cost: 5 N C^2 + 2 N^2 C + 9 N C multiply-adds for N = H W positions and C channels.

    Shape:
        (B, H, W, C) to (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, device=device, dtype=dtype)
        self.kv = Pointwise(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(_all_to_all(self, self.q(x), self.kv(x)), x)


def _check_halves(num_heads: int) -> None:
    if num_heads % 2:
        raise ValueError(f"expected an even num_heads, as there are two halves of them, got {num_heads}")


@torch.fx.wrap
def _at_least(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) with zeros at the bottom and right up to a height and width of `size`."""
    H, W = x.shape[1:3]
    if is_symbolic(H, W) or min(H, W) >= size:  # a graph whose size is open refuses smaller maps
        return x
    return F.pad(x, (0, 0, 0, max(size - W, 0), 0, max(size - H, 0)))


@torch.fx.wrap
def _hybrid(layer: HybridScaleAttention, q: Tensor, global_kv: Tensor, local_kv: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) queries and keys and values of windows, (B, H', W', C) keys and values of the summary to attended
    values (B, H, W, C) and significance (B, H, W)."""
    heads, halves = layer.num_heads // 2, q.chunk(2, -1)
    (queries,), (k, v) = split_heads(halves[0], heads, 1), parted_heads(global_kv, heads, 2)
    out, received = _global(queries, k, v, layer.scale, layer.dropout)
    coarse = received.unflatten(1, tuple(global_kv.shape[1:3]))
    for axis, length in ((1, q.shape[1]), (2, q.shape[2])):  # nearest, by whole numbers
        nearest = torch.arange(length, device=q.device) * coarse.shape[axis] // length
        coarse = coarse.index_select(axis, nearest)
    local, received = _in_windows(torch.cat([halves[1], local_kv], -1), layer)
    return torch.cat([out.transpose(1, 2).flatten(2).view_as(local), local], -1), coarse + received


def attention_weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale) in float32 at least, as the order of what is made of it counts.

    Args:
        q: queries (B, heads, N, d).
        k: keys (B, heads, M, d).
        scale: factor of the logits.
        mask: which keys count, broadcast to (B, heads, N, M); None for all.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        logits = (q.to(dtype) * scale) @ k.to(dtype).transpose(2, 3)
        return (logits if mask is None else logits.masked_fill(~mask, torch.finfo(dtype).min)).softmax(3)


def _global(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> tuple[Tensor, Tensor]:
    """Attended values (B, heads, N, d), and the attention (B, M) that each key receives from the mean query."""
    B, heads, N, _ = q.shape
    if dropout or is_symbolic(B, N) or B * heads * N * k.shape[2] <= MAX_WEIGHTS:
        weights = F.dropout(attention_weights(q, k, scale), dropout)
        return weights.to(v.dtype) @ v, weights.detach().mean((1, 2))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    received = 0
    with torch.no_grad():
        for part in q.split(max(1, MAX_WEIGHTS // (B * heads * k.shape[2])), 2):
            received = received + attention_weights(part, k, scale).sum((1, 2))
    return out, received / (heads * N)


def _in_windows(qkv: Tensor, layer: HybridScaleAttention) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3 C') projections to attended values (B, H, W, C'), and the attention (B, H, W) that each position
    receives from the mean query of its window."""
    H, W = fixed(*qkv.shape[1:3])
    (q, k, v), inside = windows_of(qkv, layer.num_heads // 2, layer.window_size)
    weights = attention_weights(q, k, layer.scale, None if inside is None else inside[:, None, None])
    weights = F.dropout(weights, layer.dropout)
    out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    received = weights.detach().mean(1)
    if inside is None:
        received = received.mean(1)
    else:  # from those queries that are in the map
        inside = inside.to(received.dtype)
        received = (inside[:, None] @ received)[:, 0] / inside.sum(1, keepdim=True).clamp(min=1)
    return of_windows(out, layer.window_size, H, W), of_windows(received[..., None], layer.window_size, H, W)[..., 0]


def windows_of(qkv: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Projections (B, H, W, 3 C) to those of windows (3, B * windows, heads, size^2, d), and which positions of them
    (B * windows, size^2) are in the map, or None if all are."""
    B, (H, W) = qkv.shape[0], fixed(*qkv.shape[1:3])
    rows, cols = _window_counts(H, W, size)
    pad_h, pad_w = rows * size - H, cols * size - W

    def cut(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)

    if not is_symbolic(H, W) and not pad_h and not pad_w:
        return parted_heads(cut(qkv), heads), None
    qkv = F.pad(qkv, (0, 0, 0, pad_w, 0, pad_h))
    row, col = (torch.arange(n + pad, device=qkv.device) < n for n, pad in ((H, pad_h), (W, pad_w)))
    inside = cut((row[:, None] & col)[None, ..., None].expand(B, -1, -1, 1))
    return parted_heads(cut(qkv), heads), inside.flatten(1)


def _window_counts(H: int, W: int, size: int) -> tuple[int, int]:
    """Rows and columns of windows; one more in graphs of open sizes, which would take it that there is but one."""
    spare = int(is_symbolic(H, W))
    return ceil_div(H, size) + spare, ceil_div(W, size) + spare


def of_windows(x: Tensor, size: int, H: int, W: int) -> Tensor:
    """Windows (B * windows, size^2, C) to the map (B, H, W, C)."""
    rows, cols = _window_counts(H, W, size)
    x = x.unflatten(0, (-1, rows, cols)).unflatten(3, (size, size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :H, :W]


def significance_order(significance: Tensor) -> Tensor:
    """Positions (B, N) of a map (B, H, W), the least significant first. Equals come in any order."""
    return significance.detach().flatten(1).argsort(1)


def section_bounds(layer: SelfGuidedAttention, N: int) -> list[tuple[int, int, int]]:
    """Of each section its first rank, the one after its last, and the number of its groups."""
    ends = [N * numerator // denominator for numerator, denominator in layer.ends]
    starts = [0, *ends[:-1]]
    return [
        (start, end, ceil_div(end - start, group))
        for start, end, (_, group) in zip(starts, ends, layer.sections, strict=True)
    ]


@torch.fx.wrap
def merged_tokens(layer: SelfGuidedAttention, x: Tensor, significance: Tensor) -> Tensor:
    """(B, H, W, C) to merged tokens (B, L, C), the least significant first."""
    B, H, W, C = x.shape
    N = H * W
    place = significance_order(significance) + torch.arange(B, device=x.device)[:, None] * N
    tokens = x.reshape(B * N, C).index_select(0, place.flatten()).view(B, N, C)
    bounds, merged = section_bounds(layer, N), []
    spare = int(is_symbolic(N))  # a group of zeros: graphs would take it for given that a section has but one group
    for pool, (start, end, groups) in zip(layer.pools, bounds, strict=True):
        size, groups = pool.in_features, groups + spare
        part = F.pad(tokens[:, start:end], (0, 0, groups * size - (end - start), 0)).view(B, groups, size, C)
        merged.append(pool(part.transpose(2, 3)).squeeze(3))
    merged = torch.cat(merged, 1)
    if not spare:
        return merged
    *firsts, length = accumulate(groups for _, _, groups in bounds)
    kept = torch.arange(length, device=x.device)
    return merged.index_select(1, kept + 1 + sum(kept >= first for first in firsts))


@torch.fx.wrap
def _guided(layer: SelfGuidedAttention, q: Tensor, kv: Tensor) -> Tensor:
    """(B, H, W, C) queries and (B, L, 2C) keys and values to (B, H, W, C)."""
    return _attended(layer, q, *guided_heads(layer, kv))


def guided_heads(layer: SelfGuidedAttention, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Projections (B, L, 2C) of merged tokens to keys and values (B, heads, L, d)."""
    k, v, other_k, other_v = parted_heads(kv, layer.num_heads // 2, 4)
    return torch.cat([k, other_k], 1), torch.cat([v, other_v], 1)


@torch.fx.wrap
def _all_to_all(layer: GlobalEnhancedAttention, q: Tensor, kv: Tensor) -> Tensor:
    """(B, H, W, C) queries and (B, H, W, 2C) keys and values to (B, H, W, C)."""
    return _attended(layer, q, *parted_heads(kv, layer.num_heads, 2))


def _attended(layer: EnhancedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, W, C) queries and (B, heads, M, d) keys and values to (B, H, W, C)."""
    (queries,) = split_heads(q, layer.num_heads, 1)
    out = F.scaled_dot_product_attention(queries, k, v, dropout_p=layer.dropout, scale=layer.scale)
    return out.transpose(1, 2).reshape(q.shape)
