"""Self-attention whose keys and values are shared by groups of heads, as many as the keys have weight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts, check_rates
from .heads import check_heads
from .pointwise import Pointwise

KINDS = "gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa"


class KeyDrivenGQA(nn.Module):
    """Grouped-query attention: K < h heads of keys and values, each for a run of query heads.

    "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", arXiv 2408.08454. The runs are of
    n_1, ..., n_K query heads, h in all, some of them none:

        gqa        all alike
        kdgqa      in proportion to m - min m, of what the keys of a head weigh: m = sum over samples |k|
        dgqa_diff  in proportion to |c - m|, c being what they weighed before
        dgqa_ema   in proportion to 0.9 m + 0.1 c
        pgqa       all alike, and noise is subtracted from what a head returns, by its mean and standard deviation

    Shares are rounded, half to even; while there are too many heads the first of the longest runs loses one, while
    there are too few the first of the shortest gets one. Where no share is larger than 0, or one is not finite, all
    are alike, so that one key head has all queries; of two, kdgqa gives all to the heavier one.

    With kdgqa and dgqa what a sample gets depends on those beside it. `per_sample` has runs for every sample of kdgqa.
    The runs of dgqa are kept, as `allocation`, and stay so while `frozen` is true. Otherwise evaluation finds new ones
    and sets c to m, as is published: its outputs depend on what came before. Training does so every `window_size`
    steps, setting c to (c + m) / window_size. `cache`, `allocation` and `step`, which is counted on from epoch to
    epoch, are in the state dict.

    Cost: (2 + 2 K / h) N C^2 + 2 N^2 C multiply-adds for N tokens and C channels.

    Args:
        dim: channels C.
        num_heads: query heads h; must divide `dim`.
        num_kv_heads: key and value heads K, num_heads // 2 if None; with gqa and pgqa they must divide `num_heads`.
        kind: one of these.
        qkv_bias: bias of the query, key and value projections.
        window_size: training steps from one allocation of dgqa to the next.
        per_sample: an allocation for every sample, of kdgqa.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        frozen: keep the allocation of dgqa; may be set at any time.

    Raises:
        ValueError: if the numbers of heads do not divide what they must, an option is none of these, or noise is given
            that is of no use or of another shape.

    Shape:
        (B, N, C) to (B, N, C); the grid of the patches is accepted and ignored. `noise` of pgqa (K, h / K, N C / h) is
        uniform in [0, 1), drawn at every call if it is not given.

    Example:
        >>> import torch
        >>> KeyDrivenGQA(64, num_heads=8, num_kv_heads=2, kind="kdgqa")(torch.randn(1, 15, 64)).shape
        torch.Size([1, 15, 64])
    """

    last_product = "proj"
    layouts = {"timm": [(r"^qkv\.", "q.")]}  # of which adapt_state_dict makes three

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        kind: str = "gqa",
        qkv_bias: bool = False,
        window_size: int = 1,
        per_sample: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        frozen: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        groups = num_heads // 2 if num_kv_heads is None else num_kv_heads
        if kind not in KINDS:
            raise ValueError(f"expected kind one of {', '.join(KINDS)}, got {kind!r}")
        check_counts(num_kv_heads=groups, window_size=window_size)
        if groups > num_heads or (kind in ("gqa", "pgqa") and num_heads % groups):
            raise ValueError(f"{num_heads} heads of queries cannot share {groups} heads of keys with kind {kind!r}")
        check_rates(attn_drop=attn_drop)
        if per_sample and kind != "kdgqa":
            raise ValueError(f"per_sample is of use to kind 'kdgqa', not to {kind!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.num_kv_heads, self.kind = num_heads, groups, kind
        self.window_size, self.per_sample, self.frozen = window_size, per_sample, frozen
        self.q = Pointwise(dim, dim, bias=qkv_bias, **dd)
        self.k, self.v = (Pointwise(dim, groups * (dim // num_heads), bias=qkv_bias, **dd) for _ in range(2))
        self.attn_drop = attn_drop
        self.proj = Pointwise(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        if self.keeps:
            ends = torch.arange(groups + 1, device=device) * num_heads // groups
            self.register_buffer("cache", torch.zeros(groups, **dd))
            self.register_buffer("allocation", ends.diff())
            self.register_buffer("step", torch.zeros((), dtype=torch.long, device=device))

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, noise: Tensor | None = None) -> Tensor:
        if noise is not None and self.kind != "pgqa":
            raise ValueError(f"noise is of use to kind 'pgqa', not to {self.kind!r}")
        q, k, v = self.heads(x)
        return self.merge(_attend(self, q, k, v), noise)

    @property
    def keeps(self) -> bool:
        """Whether there is an allocation that is kept from call to call."""
        return self.kind.startswith("dgqa")

    def heads(self, x: Tensor) -> list[Tensor]:
        """Queries (B, h, N, d), keys and values (B, K, N, d)."""
        head_dim = self.q.out_features // self.num_heads
        return [linear(x).unflatten(2, (-1, head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v)]

    def merge(self, y: Tensor, noise: Tensor | None = None) -> Tensor:
        """Attended values (B, h, N, d) to (B, N, C)."""
        if self.kind == "pgqa":
            y = _perturbed(y, self.num_kv_heads, noise)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    @torch.no_grad()
    def allocate(self, k: Tensor) -> Tensor:
        """Query heads of every key head (1, K), or (B, K) of every sample, from keys (B, K, N, d); dgqa keeps them."""
        if self.keeps and self.frozen:
            return self.allocation[None]
        norms = torch.linalg.vector_norm(k, dim=(2, 3), dtype=torch.promote_types(k.dtype, torch.float32))
        norms = norms if self.per_sample else norms.sum(0, keepdim=True)
        if self.kind == "kdgqa":
            return shared_out(norms - norms.amin(1, keepdim=True), self.num_heads)
        cache = self.cache.to(norms.dtype)
        shares = (cache - norms).abs() if self.kind == "dgqa_diff" else 0.9 * norms + 0.1 * cache
        found, cache = shared_out(shares, self.num_heads)[0], norms[0]
        if self.training:
            due = self.step % self.window_size == 0
            found = torch.where(due, found, self.allocation)
            cache = torch.where(due, (self.cache + norms[0]) / self.window_size, self.cache)
            self.step += 1
        self.cache.copy_(cache)
        self.allocation.copy_(found)
        return found[None]

    def adapt_state_dict(self, state_dict: dict[str, Tensor], made_for: Mapping[str, Any]) -> dict[str, Tensor]:
        """Takes weights of plain attention, whose heads of keys, and of values, are averaged over the run that shares
        them; and of a dgqa that has not kept all that ours keeps."""
        found = dict(self.named_buffers()) | state_dict
        for part in ("weight", "bias"):
            if len(fused := found.get(f"q.{part}", ())) != 3 * self.q.out_features:
                continue
            found[f"q.{part}"], *others = fused.chunk(3)
            for name, each in zip("kv", others, strict=True):
                runs = each.unflatten(0, (self.num_kv_heads, self.num_heads // self.num_kv_heads, -1))
                found[f"{name}.{part}"] = runs.mean(1).flatten(0, 1)
        return found

    def extra_repr(self) -> str:
        shown = "num_heads", "num_kv_heads", "kind", "window_size", "per_sample", "frozen"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def changing_allocations(module: nn.Module) -> list[KeyDrivenGQA]:
    """The layers inside that find new allocations with every forward pass."""
    return [each for each in module.modules() if isinstance(each, KeyDrivenGQA) and each.keeps and not each.frozen]


@contextmanager
def kept(layers: Sequence[KeyDrivenGQA]) -> Iterator[None]:
    """The allocations of these layers stay as they are."""
    for layer in layers:
        layer.frozen = True
    try:
        yield
    finally:
        for layer in layers:
            layer.frozen = False


def shared_out(shares: Tensor, heads: int) -> Tensor:
    """Whole numbers that sum to `heads`, in proportion to shares (..., K) that are not negative.

    Without a branch, as a graph of a GPU wants it: rounding is off by half a head for each share, at most.
    """
    total = shares.sum(-1, keepdim=True)
    known = (total > 0) & total.isfinite()  # or there would be no number to round
    n = (heads * torch.where(known, shares / total, 1 / shares.shape[-1])).round().long()
    for _ in range(shares.shape[-1] // 2):
        excess = n.sum(-1, keepdim=True) - heads
        n = n + (excess < 0).long() * _first(n == n.amin(-1, keepdim=True))
        n = n - (excess > 0).long() * _first(n == n.amax(-1, keepdim=True))
    return n


def _first(mask: Tensor) -> Tensor:
    """1 at the first place of a row (..., K) that is true, 0 elsewhere; which of equals argmax finds is open."""
    return (mask & (mask.cumsum(-1) == 1)).long()


def owners(n: Tensor, heads: int) -> Tensor:
    """The key head of every query head (..., h), from the lengths of runs (..., K)."""
    place = torch.arange(heads, device=n.device)
    return (place[:, None] >= n.cumsum(-1).unsqueeze(-2)).sum(-1)


@torch.fx.wrap
def shared_heads(layer: KeyDrivenGQA, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, K, N, d) of every query head (B, h, N, d)."""
    owner = owners(layer.allocate(k), layer.num_heads)
    if not layer.per_sample:
        return k.index_select(1, owner[0]), v.index_select(1, owner[0])
    owner = owner[:, :, None, None].expand(-1, -1, *k.shape[2:])
    return k.gather(1, owner), v.gather(1, owner)


@torch.fx.wrap
def _attend(layer: KeyDrivenGQA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries (B, h, N, d), keys and values (B, K, N, d) to (B, h, N, d)."""
    equal, dropout = layer.kind in ("gqa", "pgqa"), layer.attn_drop if layer.training else 0.0
    if not equal:
        k, v = shared_heads(layer, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=equal)


@torch.fx.wrap
def _perturbed(y: Tensor, groups: int, noise: Tensor | None) -> Tensor:
    """What heads return (B, h, N, d) less noise of its mean and standard deviation.

    Args:
        y: (B, h, N, d).
        groups: K, in each of which head i keeps what it has in place i but for the mean of the noise.
        noise: (K, h / K, N d), or None.
    """
    rows = y.to(torch.promote_types(y.dtype, torch.float32)).flatten(2).unflatten(1, (groups, -1))
    if noise is None:
        noise = torch.rand(rows.shape[1:], device=y.device, dtype=rows.dtype)
    elif noise.shape != rows.shape[1:]:
        raise ValueError(f"expected noise of shape {tuple(rows.shape[1:])}, got {tuple(noise.shape)}")
    head, place = (torch.arange(n, device=y.device) for n in rows.shape[2:])
    noise = noise.to(rows.dtype).masked_fill(head[:, None] == place, 0)
    noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
    out = rows - (noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True))
    return out.view(y.shape).to(y.dtype)
