"""Blocked local attention with a bias or axis logits, image by image, on CPUs in full precision.

Rows that hold all heads are copied, and no more tiles at a time than caches hold. With a bias fused attention computes
the result; as it has no gradient of one, training multiplies out the definition and keeps the weights. Axis logits are
products with further features of the queries, which fused attention wants keys and values to be as wide as.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from .biased_attention import biased_attention
from .direct import in_own_precision, is_direct, replayed, replays
from .fused_tiles import axis_places, fused_attention
from .heads import empty_side_by_side
from .plan import Plan, TileGroup

MAX_TILE = 2**16  # pairs, beyond which weights are too many to keep
CHUNK = 2**22  # bytes of keys and values that are copied at a time
FEW = 4  # heads for each tile from which on these are taken one by one, all heads at once


def takes_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    biases: Sequence[Tensor | None],
    dropout: float,
    axis_logits: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Whether `tile_products` or `axis_products` computes this attention."""
    added = biases if axis_logits is None else axis_logits
    return (
        not dropout
        and q.is_cpu
        and all(each is not None and each.dtype == q.dtype for each in added)
        and is_direct(q, k, v, *added)
        and all(_fits(group, bias) for group, bias in zip(plan.groups, biases, strict=True))
    )


def _fits(group: TileGroup, bias: Tensor | None) -> bool:
    (_, T), w = group.queries.shape, group.keys.shape[1]
    return T * w <= MAX_TILE and (bias is None or bias.shape[-1] == w)  # plans for kernels have wider ones


def tile_products(q: Tensor, k: Tensor, v: Tensor, plan: Plan, biases: Sequence[Tensor], scale: float) -> Tensor:
    """`local_attention`, where `takes_products`."""
    group = plan.groups[0]
    if _is_whole(group.queries, q) and _is_whole(group.keys, k):  # a tile that is the map
        return biased_attention(q, k, v, group.of_tiles(biases[0]), scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *biases)):
        return _TileProducts.apply(plan, scale, fused_attention, None, q, k, v, *biases)
    return _fused(plan, scale, q, k, v, biases)


def axis_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    masks: Sequence[Tensor | None],
    scale: float,
    axis_logits: tuple[Tensor, Tensor],
) -> Tensor:
    """`local_attention` with axis logits, where `takes_products`."""
    widths, places = [x.shape[-1] for x in (q, *axis_logits)], axis_places(*axis_logits)
    # Rows hold all heads, as tiles are copied.
    features = torch.cat([x.transpose(1, 2) for x in (q * scale, *axis_logits)], -1).transpose(1, 2)

    def plain(features: Tensor, k: Tensor, v: Tensor, plan: Plan, masks: Sequence[Tensor], scale: float) -> Tensor:
        q, *axis_logits = features.split(widths, -1)
        with sdpa_kernel(SDPBackend.MATH):  # the others on CPUs have no second derivative
            return fused_attention(q, k, v, plan, masks, scale, axis_logits=tuple(axis_logits))

    if torch.is_grad_enabled() and any(x.requires_grad for x in (features, k, v)):
        return _TileProducts.apply(plan, 1.0, plain, places, features, k, v, *masks)
    return _multiplied(plan, 1.0, places, features, k, v, masks, None)


def _is_whole(places: Tensor, x: Tensor) -> bool:
    """Whether a tile has all of (B, heads, N, d) in their order, which that of shifted windows is not."""
    N = x.shape[2]
    return places.shape == (1, N) and torch.equal(places[0], torch.arange(N, device=places.device))


def _chunks(plan: Plan, k: Tensor, v: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Few tiles at a time: their group, their span in it, and that of their queries among those of all groups."""
    width, first = k.shape[1] * (k.shape[-1] + v.shape[-1]) * k.itemsize, 0
    for i, group in enumerate(plan.groups):
        (tiles, T), step = group.queries.shape, max(1, CHUNK // (width * group.keys.shape[1]))
        for start in range(0, tiles, step):
            count = min(step, tiles - start)
            yield i, slice(start, start + count), slice(first, first + count * T)
            first += count * T


def _tiles(rows: Tensor, index: Tensor) -> Tensor:
    """(heads, tiles, n, d) from (heads, N, d) for an index (tiles, n)."""
    heads = len(rows)
    rows = rows.transpose(0, 1).flatten(1).index_select(0, index.flatten())
    return rows.view(*index.shape, heads, -1).movedim(2, 0)


def _fused(plan: Plan, scale: float, q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor]) -> Tensor:
    B, heads, N, _ = q.shape
    result = q.new_empty(B, N, heads, v.shape[-1])
    out = q.new_empty(_count(plan), *result.shape[2:])
    masks = [
        group.of_tiles(bias)[0].unflatten(0, (heads, -1)).expand(-1, len(group.keys), -1, -1)
        for bias, group in zip(biases, plan.groups, strict=True)
    ]
    for b in range(B):
        for i, tiles, span in _chunks(plan, k, v):
            queries, keys = plan.groups[i].queries[tiles], plan.groups[i].keys[tiles]
            inputs = _tiles(q[b], queries), _tiles(k[b], keys), _tiles(v[b], keys), masks[i][:, tiles]
            *inputs, mask = (x.transpose(0, 1) for x in inputs)
            attended = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale)
            out[span].unflatten(0, queries.shape).copy_(attended.transpose(1, 2))
            del inputs, attended
        torch.index_select(out, 0, plan.inverse, out=result[b])
    return result.transpose(1, 2)


def _count(plan: Plan) -> int:
    """Queries of all tiles."""
    return sum(group.queries.numel() for group in plan.groups)


def _rows(plan: Plan, heads: int) -> Tensor:
    """Where the queries (N * heads) are among those of all tiles (heads * places)."""
    return (plan.inverse[:, None] + torch.arange(heads, device=plan.inverse.device) * _count(plan)).flatten()


class _Sums:
    """Sums of what the tiles of a chunk have for each key, of all heads.

    Args:
        keys: (places,) of the tiles.
        num_keys: M; None to sum for those keys alone that are there.
    """

    def __init__(self, keys: Tensor, num_keys: int | None) -> None:
        self.keys, counts = torch.unique(keys, return_counts=True) if num_keys is None else (None, None)
        if num_keys is not None:
            counts = torch.bincount(keys, minlength=num_keys)
        self.order, self.starts = keys.argsort(stable=True), counts.cumsum(0) - counts

    def of_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """Which rows of (heads * places) are summed, and where those of each head and key begin."""
        first = torch.arange(heads, device=self.order.device)[:, None] * len(self.order)
        return (first + self.order).flatten(), (first + self.starts).flatten()

    def add(self, tiles: Tensor, rows: tuple[Tensor, Tensor], total: Tensor) -> None:
        """Put the sums over (heads, places, d) into (M, heads, d), or add those of some keys."""
        sums = F.embedding_bag(rows[0], tiles.flatten(0, 1), rows[1], mode="sum")
        sums = sums.unflatten(0, (len(tiles), -1)).transpose(0, 1)
        if self.keys is None:
            total.copy_(sums)
        else:  # row by row, which index_add_ does not
            total.index_copy_(0, self.keys, total.index_select(0, self.keys).add_(sums))


_SUMS = WeakTensorKeyDictionary()
"""Of each plan, by its `inverse`, the sums of its chunks, which take less memory than the plan and go with it: to make
them in every backward pass takes longer than a softmax of all weights."""


def _sums(plan: Plan, chunks: Sequence[tuple[int, slice, slice]], num_keys: int) -> list[_Sums]:
    """For each of the chunks of a plan of so many keys."""
    kept, key = _SUMS.setdefault(plan.inverse, {}), tuple((i, tiles.stop) for i, tiles, _ in chunks)
    if key not in kept:
        whole = num_keys if len(chunks) == 1 else None
        kept[key] = [_Sums(plan.groups[i].keys[tiles].flatten(), whole) for i, tiles, _ in chunks]
    return kept[key]


def _by_kind(bias: Tensor, group: TileGroup, heads: int) -> tuple[Tensor, Tensor]:
    """A bias as (heads, kinds, T, w), and which of the kinds each tile is of."""
    if bias.ndim == 5:
        return bias[0], group.kinds
    bias, tiles = bias[0].unflatten(0, (heads, -1)), torch.arange(len(group.queries), device=bias.device)
    return bias, tiles if bias.shape[1] == len(tiles) else torch.zeros_like(tiles)


def _items(by_tile: bool, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of (heads, tiles, ...) the heads, or the tiles."""
    return zip(*(x.unbind(int(by_tile)) for x in tensors), strict=True)


def _copies(by_tile: bool, bias: Tensor, kinds: Tensor) -> Iterator[Tensor]:
    """Of a bias (heads, kinds, T, w) what each item adds, a tensor of its own."""
    if by_tile:
        return (bias[:, kind].clone() for kind in kinds.tolist())
    return (of_head.index_select(0, kinds) for of_head in bias)


def _add(by_tile: bool, bias: Tensor, kinds: Tensor, item: int, x: Tensor) -> None:
    """Add what an item has to a bias (heads, kinds, T, w)."""
    if by_tile:
        bias[:, kinds[item]] += x
    else:
        bias[item].index_add_(0, kinds, x)


def _multiply(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    if out.is_contiguous():
        out.baddbmm_(a, b, beta=0, alpha=scale)
    else:
        torch.mul(torch.bmm(a, b), scale, out=out)


def _widened(k: Tensor, places: Tensor | None) -> Tensor:
    return k if places is None else torch.cat([k, places.expand(len(k), -1, -1)], -1)


def _is_by_tile(queries: Tensor) -> bool:
    """Whether tiles of queries (heads, tiles, T, d) are taken one by one."""
    return FEW * queries.shape[1] <= queries.shape[0]


def _attend(
    tiles: tuple[Tensor, Tensor, Tensor], out: Tensor, bias: tuple[Tensor, Tensor] | None, scale: float,
    places: Tensor | None, kept: list[Tensor] | None,
) -> None:  # fmt: skip
    """Attention of tiles of queries, keys and values, with a bias and its kinds, into (heads, tiles, T, d_v)."""
    by_tile = _is_by_tile(out)
    starts = repeat(None) if bias is None else _copies(by_tile, *bias)
    for (q, k, v, out_i), start in zip(_items(by_tile, *tiles, out), starts, strict=False):
        k = _widened(k, places).transpose(1, 2)
        if start is not None and start.dtype == q.dtype:
            weights = start.baddbmm_(q, k, alpha=scale)
        else:
            weights = torch.bmm(q, k)
            weights = weights if start is None else weights.masked_fill_(~start, -torch.inf)
        torch.softmax(weights, -1, out=weights)
        _multiply(weights, v, 1.0, out_i)
        if kept is not None:
            kept.append(weights)


def _differentiate(
    tiles: tuple[Tensor, Tensor, Tensor], dout: Tensor, dq: Tensor, dbias: tuple[Tensor, Tensor] | None, scale: float,
    places: Tensor | None, kept: Iterator[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of tiles of keys and values; those of queries are put, and those of a bias added, where they belong."""
    by_tile = _is_by_tile(dq)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in tiles[1:])
    items = _items(by_tile, *tiles, dout, dq, dk, dv)
    for item, (q, k, v, dout_i, dq_i, dk_i, dv_i) in enumerate(items):
        weights = next(kept)
        _multiply(weights.transpose(1, 2), dout_i, 1.0, dv_i)
        dlogits = torch.bmm(dout_i, v.transpose(1, 2))
        torch._softmax_backward_data(dlogits, weights, -1, weights.dtype, grad_input=dlogits)
        if dbias is not None:
            _add(by_tile, *dbias, item, dlogits)
        _multiply(dlogits.transpose(1, 2), q[..., : k.shape[-1]], scale, dk_i)
        _multiply(dlogits, _widened(k, places), scale, dq_i)
    return dk, dv


def _multiplied(
    plan: Plan, scale: float, places: Tensor | None, q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor | None],
    kept: list[Tensor] | None,
) -> Tensor:  # fmt: skip
    """Attention of tiles by its definition, outside autograd.

    Args:
        places: further features (w, n) of the keys of every window.
        biases: those of the groups; or masks, with a scale of 1.
        kept: gets the weights.
    """
    B, heads, N, _ = q.shape
    result = q.new_empty(B, N, heads, v.shape[-1])
    out, rows = q.new_empty(heads, _count(plan), v.shape[-1]), _rows(plan, heads)
    added = [
        None if bias is None else _by_kind(bias, group, heads) for bias, group in zip(biases, plan.groups, strict=True)
    ]
    for b in range(B):
        for i, tiles, span in _chunks(plan, k, v):
            queries, keys = plan.groups[i].queries[tiles], plan.groups[i].keys[tiles]
            # No copy has a name here, nor after a pass below: it would last until the next ones are made.
            _attend(
                (_tiles(q[b], queries), _tiles(k[b], keys), _tiles(v[b], keys)),
                out[:, span].unflatten(1, queries.shape),
                None if added[i] is None else (added[i][0], added[i][1][tiles]), scale, places, kept,
            )  # fmt: skip
        torch.index_select(out.flatten(0, 1), 0, rows, out=result[b].flatten(0, 1))
    return result.transpose(1, 2)


class _TileProducts(Function):
    """`_multiplied` that keeps the weights, and its gradients."""

    @staticmethod
    def forward(
        ctx, plan: Plan, scale: float, plain: Callable[..., Tensor], places: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        q, k, v, *biases = inputs
        out = _multiplied(plan, scale, places, q, k, v, biases, kept := [])
        ctx.save_for_backward(places, *inputs, *kept)
        ctx.plan, ctx.scale, ctx.plain = plan, scale, plain
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, scale, wanted = ctx.plan, ctx.scale, ctx.needs_input_grad[4:]
        places, *saved = ctx.saved_tensors  # once, or checkpoints refuse
        inputs, kept = saved[: len(wanted)], iter(saved[len(wanted) :])
        q, k, v, *biases = inputs
        if replays(grad):

            def plain(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
                return ctx.plain(q, k, v, plan, biases, scale)

            return None, None, None, None, *replayed(plain, inputs, wanted, grad)
        heads, num_queries, rows = q.shape[1], _count(plan), _rows(plan, q.shape[1])
        dq, dk, dv = empty_side_by_side(q, k, v)
        chunks = list(_chunks(plan, k, v))
        sums = _sums(plan, chunks, k.shape[2])
        rows_of = [each.of_heads(heads) for each in sums]
        dbiases = [torch.zeros_like(bias) if want else None for bias, want in zip(biases, wanted[3:], strict=True)]
        added = [
            None if x is None else _by_kind(x, group, heads) for x, group in zip(dbiases, plan.groups, strict=True)
        ]
        make = grad.new_empty if num_queries == len(plan.inverse) else grad.new_zeros  # repeated queries have none
        dout, dq_tiles = make(num_queries, heads, v.shape[-1]), q.new_empty(heads, num_queries, q.shape[-1])
        for b in range(len(q)):
            dout.index_copy_(0, plan.inverse, grad[b].transpose(0, 1))
            into = (dk[b], dv[b]) if len(chunks) == 1 else (dk[b].zero_(), dv[b].zero_())
            for (i, tiles, span), of_chunk, summed in zip(chunks, sums, rows_of, strict=True):
                queries, keys = plan.groups[i].queries[tiles], plan.groups[i].keys[tiles]
                found = _differentiate(
                    (_tiles(q[b], queries), _tiles(k[b], keys), _tiles(v[b], keys)),
                    dout[span].unflatten(0, queries.shape).movedim(2, 0),
                    dq_tiles[:, span].unflatten(1, queries.shape),
                    None if added[i] is None else (added[i][0], added[i][1][tiles]), scale, places, kept,
                )  # fmt: skip
                for dtiles, total in zip(found, into, strict=True):
                    of_chunk.add(dtiles.flatten(1, 2), summed, total)
                del found, dtiles
            dq[b] = dq_tiles.flatten(0, 1).index_select(0, rows).view(dq.shape[1:])
        return None, None, None, None, *(x.transpose(1, 2) for x in (dq, dk, dv)), *dbiases
