"""Self-attention whose keys are chosen for every query by a cheap prediction of the attention map."""

import math
from collections.abc import Iterator
from itertools import repeat
from operator import index

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.autograd import Function

from .cache import ParameterCache
from .checks import check_counts, check_rates
from .direct import in_own_precision, is_direct, replayed, replays
from .pointwise import Pointwise
from .position import resample_rows
from .self_attention import SelfAttention
from .symbolic import is_symbolic

PAIRS = 2**19
"""Scores that are computed at once on a CPU: some copies of them stay in the second cache."""


def _step(k: Tensor, pairs: int = PAIRS) -> int:
    """Samples that have so many pairs of queries and keys (B, heads, N, d)."""
    return max(1, pairs // (k.shape[1] * k.shape[2] ** 2))


def _joined(parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(t[0] if len(t) == 1 else torch.cat(t) for t in zip(*parts, strict=True))


def largest(x: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest values of the last dimension."""
    if count < x.shape[-1] and is_direct(x):  # numpy selects in a third of the time
        parted = torch.from_numpy(np.partition(x.numpy(), -count))
        bound = parted[..., -count, None]
        mask, unique = x >= bound, parted[..., :-count].amax(-1) < bound[..., 0]
        if not unique.all():  # among equals choose as below
            mask[~unique] = _largest(x[~unique], count)
        return mask
    return _largest(x, count)


def _largest(x: Tensor, count: int) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(count, sorted=False).indices, 1)


class ConnectivityPredictor(nn.Module):
    """Predicts the attention map as a product of low rank, and keeps the highest scores of every query.

    "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755.
    Keys are reduced to c channels and, over the tokens, to K of them; the attention of the reduced queries to those
    says how to mix K learned rows of scores, the basis. Heads share the parameters. The choice has no gradient.

    Cost: 2 N C c + (2 c + N) h N K multiply-adds for N tokens, C channels and h heads, a little less in fact, as the
    class token needs no prediction.

    Args:
        head_dim: channels d of a head.
        num_tokens: tokens N, the class token included, that the matrices over tokens are made for.
        num_heads: attention heads; the logits are divided by its square root.
        attn_keep_rate: part of the N keys that every query keeps.
        reduce_n_factor: K = N // reduce_n_factor.
        reduce_c_factor: c = d // reduce_c_factor.
        share_inout_proj: use one matrix to reduce tokens and as the basis.
        basis_threshold: entries of the basis up to this size are taken for 0.
        basis_coef_topk: coefficients of the mixture that every query keeps; None to use the threshold.
        basis_coef_threshold: without `basis_coef_topk`, coefficients up to this are taken for 0.
        attn_score_topk: keep a fixed number of keys; if not, those with a score above the threshold.
        attn_score_threshold: without `attn_score_topk`, the score that a key must exceed.
        grid_size: (H, W) of the patches with H W = N - 1; square by default.

    Raises:
        ValueError: if nothing is left of the tokens or channels, or the grid does not fit.

    Shape:
        queries and keys (B, heads, N, d), the class token first, to a boolean mask (B, heads, N - 1, N) of the keys of
        every patch. With a `grid` (H, W) of another size the matrices are resampled. With `kept` (B, n) only those
        patches of the grid are present, and N = n + 1.

    Example:
        >>> import torch
        >>> predictor = ConnectivityPredictor(16, num_tokens=50, num_heads=2)
        >>> mask = predictor(torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16))
        >>> mask.shape, mask.sum(-1).unique()
        (torch.Size([1, 2, 49, 50]), tensor([13]))
    """

    by_rank = True
    """Values are told by their rank, which may turn on last digits: see `export.running.usual_disagreement`."""

    def __init__(
        self,
        head_dim: int,
        num_tokens: int = 197,
        num_heads: int = 8,
        attn_keep_rate: float = 0.25,
        reduce_n_factor: int = 8,
        reduce_c_factor: int = 2,
        share_inout_proj: bool = False,
        basis_threshold: float = 0.02,
        basis_coef_topk: int | None = 8,
        basis_coef_threshold: float = 0.05,
        attn_score_topk: bool = True,
        attn_score_threshold: float = 1e-4,
        grid_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_counts(
            num_tokens=num_tokens, num_heads=num_heads, reduce_n_factor=reduce_n_factor, reduce_c_factor=reduce_c_factor
        )
        check_rates(attn_keep_rate=attn_keep_rate)
        if basis_coef_topk is not None:
            check_counts(basis_coef_topk=basis_coef_topk)
        rank, reduced = num_tokens // reduce_n_factor, head_dim // reduce_c_factor
        if not rank or not reduced:
            raise ValueError(
                f"expected at least {reduce_n_factor} tokens and {reduce_c_factor} channels per head, "
                f"got {num_tokens} and {head_dim}"
            )
        self.grid_size = grid_size or (math.isqrt(num_tokens - 1),) * 2
        if math.prod(self.grid_size) != num_tokens - 1:
            raise ValueError(f"expected grid_size of {num_tokens - 1} patches, got {self.grid_size}")
        self.scale = num_heads**-0.5
        self.attn_keep_rate = attn_keep_rate
        self.basis_threshold = basis_threshold
        self.basis_coef_topk, self.basis_coef_threshold = basis_coef_topk, basis_coef_threshold
        self.attn_score_topk, self.attn_score_threshold = attn_score_topk, attn_score_threshold
        self.proj_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        self.proj_back_n = self.proj_n if share_inout_proj else nn.Parameter(torch.empty(num_tokens, rank, **dd))
        self.proj_c_q = Pointwise(head_dim, reduced, **dd)
        self.proj_c_k = Pointwise(head_dim, reduced, **dd)
        self._cache = ParameterCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.proj_n, self.proj_back_n, self.proj_c_q.weight, self.proj_c_k.weight):
            trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.proj_c_q.bias)
        nn.init.zeros_(self.proj_c_k.bias)

    def forward(self, q: Tensor, k: Tensor, grid: tuple[int, int] | None = None, kept: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            coefficients, basis = self._factors(q, k, grid, kept)
            if self.basis_coef_topk is not None:
                coefficients = coefficients.where(
                    largest(coefficients, min(self.basis_coef_topk, coefficients.shape[-1])), 0
                )
            else:
                coefficients = F.threshold(coefficients, self.basis_coef_threshold, 0.0)
            basis = F.threshold(basis.abs(), self.basis_threshold, 0.0)
            if self.attn_score_topk and is_direct(coefficients):
                budget, step = self.budget(k.shape[2], grid, kept), _step(k)
                bases = basis.split(step) if basis.ndim == 4 else repeat(basis)
                parts = zip(coefficients.split(step), bases, strict=False)
                return torch.cat([largest(part @ basis, budget) for part, basis in parts])
            scores = coefficients @ basis
            if not self.attn_score_topk:
                return scores > self.attn_score_threshold
            if is_symbolic(k.shape[2]):  # no pruning then, and the budget is every place below it
                places = torch.arange(k.shape[2], device=k.device)
                order = scores.argsort(descending=True)
                budget = torch.full((1,), k.shape[2], dtype=torch.float64, device=k.device) * self.attn_keep_rate
                chosen = places < budget
                return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, chosen.expand_as(order))
            return largest(scores, self.budget(index(k.shape[2]), grid, kept))

    def patches(self, grid: tuple[int, int] | None) -> int:
        height, width = grid or self.grid_size
        return index(height) * index(width)

    def budget(self, num_keys: int, grid: tuple[int, int] | None = None, kept: Tensor | None = None) -> int:
        """How many of the keys a query keeps."""
        budget = math.ceil(self.attn_keep_rate * (self.patches(grid) + 1))
        # The published code counts only patches where some are pruned.
        return min(budget, num_keys if kept is None else num_keys - 1)

    def scores(self, q: Tensor, k: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Differentiable prediction (B, heads, N - 1, N) of the attention map, as its training takes it: with the
        signed basis and every coefficient."""
        coefficients, basis = self._factors(q, k, grid)
        return coefficients @ basis

    def _factors(
        self, q: Tensor, k: Tensor, grid: tuple[int, int] | None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Coefficients (B, heads, N - 1, K) and signed basis (K, N) or (B, 1, K, N)."""
        down, up = self._matrices(grid)
        if kept is not None:
            rows = F.pad(kept + 1, (1, 0))[:, None]  # (B, 1, N)
            down, up = down[rows], up[rows]
        keys = self.proj_c_k(k).transpose(-2, -1) @ down  # (B, heads, c, K)
        return (self.proj_c_q(q[:, :, 1:]) @ keys * self.scale).softmax(-1), up.transpose(-2, -1)

    def _matrices(self, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        if grid is None or (not is_symbolic(*grid) and tuple(grid) == self.grid_size):
            return self.proj_n, self.proj_back_n

        def resample() -> tuple[Tensor, Tensor]:
            down, up = (resample_rows(m, self.grid_size, grid, prefix=1) for m in (self.proj_n, self.proj_back_n))
            return down * (self.proj_n.shape[0] / down.shape[0]), up  # the sum over tokens keeps its size

        return self._cache(tuple(grid), [self.proj_n, self.proj_back_n], resample)


class SparseAttention(SelfAttention):
    """Self-attention of patches, each with the keys that a predictor chose for it, and of a class token with all keys.

    "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755.

    Cost: 4 N C^2 + 2 N^2 C multiply-adds for N tokens and C channels, masked keys included, and the predictor's.

    Args:
        dim: channels C.
        num_tokens: tokens N, the class token included, that the predictor is made for.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor of the logits, (dim / num_heads)**-0.5 if None.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        **predictor: further arguments of `ConnectivityPredictor` (`attn_keep_rate`, `reduce_n_factor`, ...).

    Attributes:
        reconstruct: in training mode attend to all keys, and leave the predictor's scores in `predicted`.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or the tokens or channels are too few for the predictor.

    Shape:
        (B, N, C), the class token first, to (B, N, C). `grid` and `kept` are as in `ConnectivityPredictor`; tokens of
        patches that are not kept take part in the class token's softmax, with logit and value 0. With
        `return_weights`, also the class token's attention to the patches (B, N - 1), averaged over the heads.

    Example:
        >>> import torch
        >>> SparseAttention(64, num_tokens=50, num_heads=4, attn_keep_rate=0.1)(torch.randn(1, 50, 64)).shape
        torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int = 197,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
        **predictor,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, device=device, dtype=dtype)
        self.predictor = ConnectivityPredictor(
            dim // num_heads, num_tokens, num_heads, **predictor, device=device, dtype=dtype
        )
        self.reconstruct = False
        self.predicted: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        kept: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        attended = _sparse_attention(self, self.heads(x), grid, kept)
        y = self.merge(attended[0])
        return (y, attended[1]) if return_weights else y


class _MaskedAttention(Function):
    """Fused attention with a boolean mask, as which the mask is kept: by itself torch keeps numbers."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        parts = zip(*(t.split(_step(k, 8 * PAIRS)) for t in (q, k, v, mask)), strict=True)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = _joined(attend(*qkv, attn_mask=_bias(part, q), scale=scale) for *qkv, part in parts)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once, or checkpoints refuse
        q, k, v, mask = saved[:4]
        if replays(grad):

            def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return (ctx.scale * q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v

            return *replayed(plain, [q, k, v], ctx.needs_input_grad[:3], grad), None, None
        parts = zip(*(t.split(_step(k, 8 * PAIRS)) for t in (grad, *saved)), strict=True)
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = (
            differentiate(g, *qkv, out, sums, 0.0, False, attn_mask=_bias(part, q), scale=ctx.scale)
            for g, *qkv, part, out, sums in parts
        )
        return *_joined(grads), None, None


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    return mask.to(q.dtype).sub_(1).mul_(1e30)  # infinities take longer to make


@torch.fx.wrap
def _sparse_attention(
    attention: SparseAttention, qkv: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int] | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries, keys and values (B, heads, N, d) to the same and the class token's weights (B, N - 1)."""
    predictor, dropout, scale = attention.predictor, attention.dropout, attention.scale
    q, k, v = qkv
    num_keys, dropped, sparse = k.shape[2], 0, predictor.attn_keep_rate < 1
    if not is_symbolic(num_keys):
        num_keys, patches = index(num_keys), predictor.patches(grid)
        if num_keys != (patches if kept is None else kept.shape[1]) + 1:
            raise ValueError(f"expected a class token and the {patches} patches of the grid, got {num_keys} tokens")
        dropped, sparse = patches + 1 - num_keys, predictor.budget(num_keys, grid, kept) < num_keys

    logits = (q[:, :, :1] * scale) @ k.transpose(-2, -1)
    if dropped:  # one key with logit 0 for each of them
        logits = F.pad(logits, (0, 1), value=math.log(dropped))
    weights = logits.softmax(-1)[..., :num_keys]
    of_class = F.dropout(weights, dropout) @ v

    mask = filled = None
    if attention.reconstruct and attention.training:
        attention.predicted = predictor.scores(q, k, grid)
    elif not predictor.attn_score_topk or sparse:
        mask = predictor(q, k, grid, kept)
        if not predictor.attn_score_topk:  # the output of a query without keys is 0
            filled = mask.any(-1, keepdim=True)
            mask = mask | ~filled
    if mask is not None and not dropout and is_direct(q):
        of_patches = _MaskedAttention.apply(q[:, :, 1:], k, v, mask, scale)
    else:
        of_patches = F.scaled_dot_product_attention(q[:, :, 1:], k, v, mask, dropout, scale=scale)
    if filled is not None:
        of_patches = of_patches * filled
    return torch.cat([of_class, of_patches], 2), weights[:, :, 0, 1:].mean(1)
