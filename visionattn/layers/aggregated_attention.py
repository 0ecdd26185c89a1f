"""Cosine attention with a continuous position bias: global, and to a neighbourhood and a pooled map in one softmax."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from .adaptive_pool import adaptive_pool, bins
from .biased_attention import biased_attention
from .cache import ParameterCache
from .checks import check_counts
from .heads import check_heads, parted_heads
from .mixture_of_head import HeadRouter, head_gates
from .pointwise import Pointwise
from .precision import without_autocast
from .size_constant import size_constant
from .symbolic import Size, fixed, for_batch, is_symbolic, larger, smaller

HIDDEN = 512
"""Hidden units of the MLP that makes the position bias."""
TEMPERATURE = 1 / 0.24
"""Initial temperature of the logits."""


class _CosineAttention(nn.Module):
    """What both kinds share: queries of a learned temperature, the position bias, and the router."""

    last_product = "proj"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_size: int | tuple[int, int] | None,
        shared: int | None,
        top_k: int,
        router: Callable[..., nn.Module] | None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.pretrain_size = None if pretrain_size is None else to_2tuple(pretrain_size)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.proj = Pointwise(dim, dim, **dd)
        self.cpb_fc1 = nn.Linear(2, HIDDEN, **dd)
        self.cpb_fc2 = nn.Linear(HIDDEN, num_heads, **dd)
        self.router = None
        if router is not None:
            self.router = router(dim, num_heads, num_heads if shared is None else shared, top_k, **dd)
        self._bias_cache = ParameterCache()
        nn.init.constant_(self.temperature, np.log(np.expm1(TEMPERATURE)).item())
        trunc_normal_(self.query_embedding, std=0.02)

    def queries(self, unit: Tensor, num_keys: Tensor) -> Tensor:
        """What is multiplied with the keys, of normalised queries (B, heads, N, d).

        Args:
            unit: normalised queries.
            num_keys: of each query, (N,) or ().
        """
        temperature = F.softplus(self.temperature.to(unit.dtype))
        return (unit + self.query_embedding) * (temperature * num_keys.to(unit.dtype).log()[..., None])

    def position_bias(self, size: tuple[Size, Size], key_size: tuple[Size, Size], dtype: torch.dtype) -> Tensor:
        """Bias (heads, H * W, H' * W') of a map's positions to those of the map pooled to `key_size`."""
        size, key_size = tuple(size), tuple(key_size)
        mlp = [*self.cpb_fc1.parameters(), *self.cpb_fc2.parameters()]
        return self._bias_cache(
            (size, key_size, self.pretrain_size, dtype), mlp, lambda: self._position_bias(size, key_size).to(dtype)
        )

    def _position_bias(self, size: tuple[Size, Size], key_size: tuple[Size, Size]) -> Tensor:
        # An MLP of two coordinates, on the distances that there are: the first layer is a sum over the axes.
        w1, b1, w2, b2 = self.cpb_fc1.weight, self.cpb_fc1.bias, self.cpb_fc2.weight, self.cpb_fc2.bias
        dtype = torch.promote_types(w1.dtype, torch.float32)
        parts, places = [], []
        for axis in (0, 1):
            distance, place = distances(size[axis], key_size[axis], w1.device)
            side = size[axis] if self.pretrain_size is None else self.pretrain_size[axis]
            delta = 8 * distance.to(dtype) / larger(side - 1, 1)
            parts.append((delta.sign() * (delta.abs() + 1).log2() / 3)[:, None] * w1[:, axis].to(dtype))
            places.append(place)
        with without_autocast(w1):
            hidden = F.relu(parts[0][:, None] + (parts[1] + b1.to(dtype)))
            table = F.linear(hidden, w2.to(dtype), b2.to(dtype))  # (rows, columns, heads)
        bias = table.index_select(0, places[0].flatten()).index_select(1, places[1].flatten())
        bias = bias.unflatten(0, places[0].shape).unflatten(2, places[1].shape)  # (H, H', W, W', heads)
        return bias.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        """What the heads return (B, heads, N, d) to the output (B, H, W, C), by the gates of the input x."""
        if self.router is not None:
            y = y * head_gates(self.router, x).to(y.dtype)
        y = y.transpose(1, 2)
        if is_symbolic(y.shape[1]):  # ONNX's attention has other strides than the one that is traced
            y = y.clone(memory_format=torch.contiguous_format)
        return self.proj(y.flatten(2).view(x.shape))


@size_constant
def distances(length: Size, keys: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distances along an axis from positions to the means of the bins that adaptive pooling has, each once; and which
    of these (length, keys) each pair has. The distances are multiples of a half."""
    if is_symbolic(length, keys):
        start, end = bins(torch.arange(keys, device=device), length, keys)
        double = 2 * torch.arange(length, device=device)[:, None] - (start + end - 1)
        last = 2 * length - 2
        return (torch.arange(2 * last + 1, device=device) - last) / 2, double + last
    start, end = bins(np.arange(keys), length, keys)
    double, place = np.unique(2 * np.arange(length)[:, None] - (start + end - 1), return_inverse=True)
    distance, place = torch.from_numpy(double / 2).float(), torch.from_numpy(place.reshape(length, keys))
    return distance.to(device), place.to(device)


def unit_vectors(x: Tensor) -> Tensor:
    """Vectors of length 1, in float32 at least: half precision has no room for what keeps zeros from being divided."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12)


class CosineAttention(_CosineAttention):
    """Self-attention of all positions by angles, with a learned temperature and a continuous position bias.

    "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132; the router is that of "MoH:
    Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. With unit queries q and keys k, a learned
    query e and temperature t of every head, and b, which an MLP makes of the distance of two positions:

        softmax((q + e) t ln(N) k + b) v

    Cost: 4 N C^2 + 2 N^2 C multiply-adds for N = H W positions of C channels, (h + 2) N C for the router of h heads,
    and 512 (h + 2) for every distance that occurs, once for the weights.

    Args:
        dim: channels C.
        num_heads: attention heads h; must divide `dim`.
        pretrain_size: side of the map, int or (height, width), that distances are measured by; that of the input if
            None.
        shared: heads that are always on, all of them if None; see `HeadRouter`.
        top_k: heads that a position keeps of the others.
        router: makes the gates of the heads from `dim`, `num_heads`, `shared` and `top_k`; None for heads that count
            alike, as in TransNeXt.
        qkv_bias: bias of the query, key and value projections.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or there are not as many heads as `shared` and `top_k` say.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W.

    Example:
        >>> import torch
        >>> CosineAttention(64, num_heads=4, shared=1, top_k=2)(torch.randn(1, 5, 7, 64)).shape
        torch.Size([1, 5, 7, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_size: int | tuple[int, int] | None = None,
        shared: int | None = None,
        top_k: int = 0,
        router: Callable[..., nn.Module] | None = HeadRouter,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, pretrain_size, shared, top_k, router, device, dtype)
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(_attend(self, self.qkv(x)), x)

    def attended(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, d) of projections (B, H, W, 3C), and the bias (1, heads, N, N)."""
        size = fixed(*qkv.shape[1:3])
        q, k, v = parted_heads(qkv, self.num_heads)
        num_keys = torch.scalar_tensor(size[0] * size[1], dtype=torch.float32, device=qkv.device)
        q, k = (each.to(v.dtype) for each in (self.queries(unit_vectors(q), num_keys), unit_vectors(k)))
        return q, k, v, for_batch(self.position_bias(size, size, v.dtype)[None], q)


@torch.fx.wrap
def _attend(layer: CosineAttention, qkv: Tensor) -> Tensor:
    """(B, H, W, 3C) projections to what the heads return, (B, heads, N, d)."""
    q, k, v, bias = layer.attended(qkv)
    return biased_attention(q, k, v, bias, 1.0)


class AggregatedAttention(_CosineAttention):
    """Self-attention of every position to those around it and to a pooled map, in one softmax, and by learned weights.

    "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132; the router is that of "MoH:
    Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. With unit queries q and keys k of the map, k'
    and v' of the pooled one, a learned query e and temperature t of every head, n the number of keys that a position
    has, b' which an MLP makes of its distance to a place of the pooled map, and the biases b, tokens T and biases c of
    the K^2 neighbours:

        a, a' = softmax([(q + e) t ln(n) k + b, (q + e) t ln(n) k' + b'])
        y = (a + q T + c) v + a' v'

    The pooled part is fused attention, in which one more key stands for the neighbours together: its logit is the
    logarithm of their sum, and what it weighs is their share. The neighbours are K^2 shifted views of the padded map.

    Cost: 5 N C^2 + 2 L C^2 + 2 N L C + 3 K^2 N C multiply-adds for N = H W positions of C channels, L of the pooled map
    and K x K neighbours, (h + 2) N C for the router of h heads, and 512 (h + 2) for every distance that occurs, once
    for the weights.

    Args:
        dim: channels C.
        num_heads: attention heads h; must divide `dim`.
        window: side K of the neighbourhood, odd.
        pool_ratio: the pooled map is so many times smaller, floor(H / pool_ratio) x floor(W / pool_ratio), or 1.
        pool_size: side of the pooled map in place of that, which makes the cost linear; smaller maps are not pooled.
        pretrain_size: side of the map, int or (height, width), that distances are measured by; that of the input if
            None.
        shared: heads that are always on, all of them if None; see `HeadRouter`.
        top_k: heads that a position keeps of the others.
        router: makes the gates of the heads from `dim`, `num_heads`, `shared` and `top_k`; None for heads that count
            alike, as in TransNeXt.
        qkv_bias: bias of the query, key and value projections.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, `window` is even, or there are not as many heads as `shared`
            and `top_k` say.

    Shape:
        (B, H, W, C) to (B, H, W, C), any H and W.

    Example:
        >>> import torch
        >>> AggregatedAttention(32, num_heads=4, pool_ratio=4)(torch.randn(1, 15, 22, 32)).shape
        torch.Size([1, 15, 22, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 3,
        pool_ratio: int = 8,
        pool_size: int | tuple[int, int] | None = None,
        pretrain_size: int | tuple[int, int] | None = None,
        shared: int | None = None,
        top_k: int = 0,
        router: Callable[..., nn.Module] | None = HeadRouter,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, pretrain_size, shared, top_k, router, device, dtype)
        check_counts(window=window, pool_ratio=pool_ratio)
        if window % 2 == 0:
            raise ValueError(f"expected an odd window, got {window}")
        dd = {"device": device, "dtype": dtype}
        self.window, self.pool_ratio = window, pool_ratio
        self.pool_size = None if pool_size is None else to_2tuple(pool_size)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, window**2, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, window**2, **dd))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, window**2, **dd))
        self.q = Pointwise(dim, dim, bias=qkv_bias, **dd)
        self.kv = Pointwise(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = Pointwise(dim, dim, **dd)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)

    def pooled_size(self, height: Size, width: Size) -> tuple[Size, Size]:
        """Height and width of the pooled map."""
        if self.pool_size is None:
            return tuple(larger(1, side // self.pool_ratio) for side in (height, width))
        return tuple(smaller(*pair) for pair in zip((height, width), self.pool_size, strict=True))

    def pooled(self, x: Tensor) -> Tensor:
        """The map that is pooled, of the input: (B, H, W, C) to (B, H', W', C)."""
        return self.norm(_pooled(self, self.act(self.sr(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(_aggregate(self, self.q(x), self.kv(x), self.kv(self.pooled(x))), x)

    def extra_repr(self) -> str:
        pool = f"pool_ratio={self.pool_ratio}" if self.pool_size is None else f"pool_size={self.pool_size}"
        return f"num_heads={self.num_heads}, window={self.window}, {pool}"


@torch.fx.wrap
def _pooled(layer: AggregatedAttention, x: Tensor) -> Tensor:
    """(B, H, W, C) to the pooled map (B, H', W', C)."""
    size = layer.pooled_size(*fixed(*x.shape[1:3]))
    return adaptive_pool(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


@size_constant
def neighbours_inside(height: Size, width: Size, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the neighbours of every position are in the map, (H, W, K^2), and how many, (H * W,)."""
    offset = torch.arange(window, device=device) - window // 2
    rows, cols = (torch.arange(side, device=device)[:, None] + offset for side in (height, width))
    rows, cols = (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)
    inside = (rows[:, None, :, None] & cols[None, :, None]).flatten(2)
    return inside, inside.sum(-1).flatten()


def _shifted(x: Tensor, window: int) -> list[Tensor]:
    """The neighbours of every position of (B, heads, d, H, W), with zeros outside, K^2 views of one padded map."""
    (H, W), padded = x.shape[3:], F.pad(x, (window // 2,) * 4)
    return [padded[..., i : i + H, j : j + W] for i in range(window) for j in range(window)]


def _copied(x: Tensor, window: int) -> Tensor:
    """The neighbours in one tensor (B, heads, d, K^2, H, W), for graphs of open sizes: these take seconds to make for
    every view."""
    taps = torch.eye(window**2, dtype=x.dtype, device=x.device).view(-1, 1, window, window)
    copies = F.conv2d(x.flatten(0, 2)[:, None], taps, padding=window // 2)
    return copies.unflatten(0, x.shape[:3])


def _products(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Products of (B, heads, d, H, W) with the neighbours, (B, heads, K^2, H, W)."""
    if is_symbolic(*q.shape[3:]):
        return (q[:, :, :, None] * _copied(k, window)).sum(2)
    return torch.stack([(q * neighbour).sum(2) for neighbour in _shifted(k, window)], 2)


def _sums(weights: Tensor, v: Tensor, window: int) -> Tensor:
    """Sums of the neighbours (B, heads, d, H, W) by weights (B, heads, K^2, H, W)."""
    if is_symbolic(*v.shape[3:]):
        return (weights[:, :, None] * _copied(v, window)).sum(3)
    return sum(w[:, :, None] * n for w, n in zip(weights.unbind(2), _shifted(v, window), strict=True))


@torch.fx.wrap
def _aggregate(layer: AggregatedAttention, q: Tensor, kv: Tensor, pooled: Tensor) -> Tensor:
    """Projections (B, H, W, C), (B, H, W, 2C) and (B, H', W', 2C) to what the heads return, (B, heads, N, d)."""
    size, pooled_size, heads = fixed(*q.shape[1:3]), fixed(*pooled.shape[1:3]), layer.num_heads
    dtype, (inside, num_inside) = q.dtype, neighbours_inside(*size, layer.window, q.device)
    (q,), (k, v), (pooled_k, pooled_v) = (parted_heads(x, heads, parts) for x, parts in ((q, 1), (kv, 2), (pooled, 2)))
    unit, k, pooled_k = unit_vectors(q), unit_vectors(k), unit_vectors(pooled_k)
    query = layer.queries(unit, num_inside + pooled_size[0] * pooled_size[1])

    # The neighbours' logits (B, heads, K^2, H, W), and their sum
    q_map, k_map, v_map = (x.mT.unflatten(3, size) for x in (query.to(dtype), k.to(dtype), v))
    logits = _products(q_map, k_map, layer.window)
    logits = logits.float() if dtype in (torch.float16, torch.bfloat16) else logits
    logits = logits + layer.relative_pos_bias_local.to(logits.dtype)[..., None, None]
    logits = logits.masked_fill(~inside.permute(2, 0, 1), -torch.inf)
    total = logits.logsumexp(2)

    # Attention to the pooled map and to one more key, whose logit is that sum and whose value tells its weight
    d = q.shape[-1]
    spare = -(d + 2) % 8  # fused kernels want widths that are multiples of 8
    high = total.flatten(2)[..., None].to(dtype)
    low = (total.flatten(2)[..., None] - high).to(dtype)  # what half precision leaves of it
    one = high.new_ones(())
    query = F.pad(torch.cat([query.to(dtype), high, low], -1), (0, spare))
    last = F.pad(one.expand(*q.shape[:2], 1, 2), (d, spare))
    key = torch.cat([F.pad(pooled_k.to(dtype), (0, 2 + spare)), last], 2)
    last = F.pad(one.expand(*q.shape[:2], 1, 1), (d, 1 + spare))
    value = torch.cat([F.pad(pooled_v, (0, 2 + spare)), last], 2)
    bias = F.pad(layer.position_bias(size, pooled_size, dtype), (0, 1))[None]
    y = biased_attention(query, key, value, for_batch(bias, query), 1.0)

    # The neighbours, by their share and by the learned weights
    learned = unit @ layer.learnable_tokens.to(unit.dtype) + layer.learnable_bias  # (B, heads, N, K^2)
    share = y[..., d].unflatten(2, size)[:, :, None]
    weights = (logits.softmax(2) * share + learned.mT.unflatten(3, size)).to(dtype)
    return y[..., :d] + _sums(weights, v_map, layer.window).flatten(3).mT
