"""Blocked local attention with a bias, image by image, on CPUs in full precision.

Rows that hold all heads are copied, and no more tiles at a time than caches hold. Fused attention computes the result;
as it has no gradient of a bias, training multiplies out the definition and keeps the weights.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .direct import in_own_precision, is_direct, replayed, replays
from .plan import Plan, TileGroup

MAX_TILE = 2**16  # pairs, beyond which weights are too many to keep
CHUNK = 2**22  # bytes of keys and values that are copied at a time


def takes_products(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, biases: Sequence[Tensor | None], dropout: float
) -> bool:
    """Whether `tile_products` computes this attention."""
    return (
        not dropout
        and q.is_cpu
        and all(bias is not None and bias.dtype == q.dtype for bias in biases)
        and is_direct(q, k, v, *biases)
        and all(_fits(group, bias) for group, bias in zip(plan.groups, biases, strict=True))
    )


def _fits(group: TileGroup, bias: Tensor) -> bool:
    (_, T), w = group.queries.shape, group.keys.shape[1]
    return T * w <= MAX_TILE and bias.shape[-1] == w  # plans for kernels have wider ones


def tile_products(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, biases: Sequence[Tensor], scale: float, plain: Callable[..., Tensor]
) -> Tensor:
    """`local_attention`, where `takes_products`; `plain` is what else computes it, for gradients of gradients."""
    group = plan.groups[0]
    if _is_whole(group.queries, q) and _is_whole(group.keys, k):  # a tile that is the map
        return F.scaled_dot_product_attention(q, k, v, attn_mask=biases[0], scale=scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *biases)):
        return _TileProducts.apply(plan, scale, plain, q, k, v, *biases)
    return _forward(plan, scale, q, k, v, biases, None)


def _is_whole(places: Tensor, x: Tensor) -> bool:
    """Whether a tile has all of (B, heads, N, d) in their order, which that of shifted windows is not."""
    N = x.shape[2]
    return places.shape == (1, N) and torch.equal(places[0], torch.arange(N))


def _chunks(plan: Plan, biases: Sequence[Tensor | None], k: Tensor, v: Tensor) -> Iterator[tuple]:
    """Few tiles at a time: their span among the queries of all groups, queries (tiles, T), keys (tiles, w), and the
    part of the biases that is theirs, (heads, tiles, T, w), where there are any."""
    width, first = k.shape[1] * (k.shape[-1] + v.shape[-1]) * k.itemsize, 0
    for group, bias in zip(plan.groups, biases, strict=True):
        (tiles, T), step = group.queries.shape, max(1, CHUNK // (width * group.keys.shape[1]))
        if bias is not None:
            bias = bias[0].unflatten(0, (k.shape[1], -1)).expand(-1, tiles, -1, -1)
        for start in range(0, tiles, step):
            part = slice(start, start + step)
            queries = group.queries[part]
            span = slice(first + start * T, first + start * T + queries.numel())
            yield span, queries, group.keys[part], None if bias is None else bias[:, part]
        first += tiles * T


def _tiles(rows: Tensor, index: Tensor) -> Tensor:
    """(heads, tiles, n, d) from (heads, N, d) for an index (tiles, n)."""
    heads = len(rows)
    rows = rows.transpose(0, 1).flatten(1).index_select(0, index.flatten())
    return rows.view(*index.shape, heads, -1).movedim(2, 0)


def _of_items(*tiles: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The heads of (heads, tiles, ...), or the tiles if there are fewer."""
    heads, count = tiles[0].shape[:2]
    return zip(*(x.unbind(int(count < heads)) for x in tiles), strict=True)


def _forward(
    plan: Plan, scale: float, q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor], kept: list[Tensor] | None
) -> Tensor:
    B, heads, N, _ = q.shape
    result = q.new_empty(B, N, heads, v.shape[-1])
    out = q.new_empty(sum(group.queries.numel() for group in plan.groups), *result.shape[2:])
    for b in range(B):
        for span, queries, keys, bias in _chunks(plan, biases, k, v):
            tiles = _tiles(q[b], queries), _tiles(k[b], keys), _tiles(v[b], keys)
            into = out[span].unflatten(0, queries.shape)
            if kept is None:
                tiles, mask = (x.transpose(0, 1) for x in tiles), bias.transpose(0, 1)
                into.copy_(F.scaled_dot_product_attention(*tiles, attn_mask=mask, scale=scale).transpose(1, 2))
                continue
            for bias_i, into_i, q_i, k_i, v_i in _of_items(bias, into.movedim(2, 0), *tiles):
                weights = torch.baddbmm(bias_i, q_i, k_i.transpose(1, 2), alpha=scale)
                kept.append(torch.softmax(weights, -1, out=weights))
                into_i.copy_(torch.bmm(weights, v_i))
        torch.index_select(out, 0, plan.inverse, out=result[b])
    return result.transpose(1, 2)


def _accumulate(total: Tensor, x: Tensor) -> None:
    """Add to a total, which all share where it is expanded."""
    if total.stride(0) == 0 and len(x) > 1:
        total, x = total[0], x.sum(0)
    total.add_(x)


class _TileProducts(Function):
    """`_forward` that keeps the weights, and its gradients."""

    @staticmethod
    def forward(ctx, plan: Plan, scale: float, plain: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        kept = []
        out = _forward(plan, scale, *inputs[:3], inputs[3:], kept)
        ctx.save_for_backward(*inputs, *kept)
        ctx.plan, ctx.scale, ctx.plain = plan, scale, plain
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, scale, wanted = ctx.plan, ctx.scale, ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors  # once, or checkpoints refuse
        inputs, kept = saved[: len(wanted)], iter(saved[len(wanted) :])
        q, k, v, *biases = inputs
        if replays(grad):

            def plain(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
                return ctx.plain(q, k, v, plan, biases, scale)

            return None, None, None, *replayed(plain, inputs, wanted, grad)
        dq, dk, dv = q.new_empty(q.transpose(1, 2).shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        dbiases = [torch.zeros_like(x) if want else None for x, want in zip(biases, wanted[3:], strict=True)]
        places = sum(group.queries.numel() for group in plan.groups)
        dout, dq_tiles = grad.new_zeros(places, q.shape[1], v.shape[-1]), q.new_empty(places, *dq.shape[2:])
        heads = torch.arange(k.shape[1])[:, None] * k.shape[2]
        for b in range(len(q)):
            dout.index_copy_(0, plan.inverse, grad[b].transpose(0, 1))  # that of repeated queries is zero
            for span, queries, keys, dbias in _chunks(plan, dbiases, k, v):
                tiles = _tiles(q[b], queries) * scale, _tiles(k[b], keys), _tiles(v[b], keys)
                tiles += tuple(x[span].unflatten(0, queries.shape).movedim(2, 0) for x in (dout, dq_tiles))
                index = (heads + keys[:, None]).transpose(0, 1)  # of rows of (heads * M, d)
                items = list(_of_items(index, *tiles))
                shape = len(items), *items[0][0].shape
                dk_i, dv_i = k.new_empty(*shape, k.shape[-1]), v.new_empty(*shape, v.shape[-1])
                dbias = None if dbias is None else list(_of_items(dbias))
                for i, (_, q_i, k_i, v_i, dout_i, dq_i) in enumerate(items):
                    weights = next(kept)
                    torch.bmm(weights.transpose(1, 2), dout_i, out=dv_i[i])
                    dlogits = torch.bmm(dout_i, v_i.transpose(1, 2))
                    torch._softmax_backward_data(dlogits, weights, -1, weights.dtype, grad_input=dlogits)
                    if dbias is not None:
                        _accumulate(*dbias[i], dlogits)
                    torch.bmm(dlogits.transpose(1, 2), q_i, out=dk_i[i])
                    torch.mul(torch.bmm(dlogits, k_i), scale, out=dq_i)
                index = torch.stack([item[0] for item in items]).flatten()
                for x, part in ((dk, dk_i), (dv, dv_i)):
                    x[b].flatten(0, 1).index_add_(0, index, part.flatten(0, -2))
            torch.index_select(dq_tiles, 0, plan.inverse, out=dq[b])
        return None, None, None, dq.transpose(1, 2), dk, dv, *dbiases
