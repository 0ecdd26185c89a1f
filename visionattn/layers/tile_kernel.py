"""Attention of a plan's tiles as Triton kernels: what `local_attention` computes, without its copies.

A program reads the queries of a tile and the keys of its window by the indices of the plan, so neither tiles nor
windows nor weights are stored. Backward makes the weights three times: for queries, for keys and values, and for the
bias, summed over samples. A key that several tiles hold gets a gradient per tile, and a last kernel adds these up.
There are no atomic additions, hence the same bits in every run.

Shapes: q, o (B, heads, N, d), k, v (B, heads, M, d), T queries and W keys of a tile, logits in powers of 2 inside.
`tests/test_tile_kernel.py` runs all of it in Triton's interpreter, without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

INTERPRETED = triton.knobs.runtime.interpret
BLOCK = 64  # queries, and keys, that a program takes at once; half of it in float32
PROGRAMS = 1024  # that the bias's gradient is cut into, a part of the batch each
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] tables, Tensor[] biases, Tensor? axis, int rows, float scale"
LOG2E = tl.constexpr(1.4426950408889634)

# Compiled once for all sizes of maps and tiles; strides, which tell how memory is aligned, are looked at.
kernel = triton.jit(do_not_specialize=("first", "N", "T", "W", "rows", "place_of_keys", "M", "B", "cases", "size"))


@triton.jit
def _queries(tile, block, queries, inverse, first, T, BM: tl.constexpr):
    """Places of queries in their tile, positions on the map, whether they count: of a query's copies one does."""
    place = block * BM + tl.arange(0, BM)
    inside = place < T
    at = tl.load(queries + tile * T + place, mask=inside, other=0)
    return place, at, inside & (tl.load(inverse + at) == first + tile * T + place)


@triton.jit
def _rows(x, row, mask, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Rows of a matrix as operand of a product, zero where the mask is not set."""
    col = tl.arange(0, BLOCK_WIDTH)
    rows = tl.load(x + row[:, None] * stride + col, mask=mask[:, None] & (col < WIDTH), other=0.0)
    return rows.to(DOT)


@triton.jit
def _store(x, row, mask, value, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    col = tl.arange(0, BLOCK_WIDTH)
    value = value.to(x.dtype.element_ty)
    tl.store(x + row[:, None] * WIDTH + col, value, mask=mask[:, None] & (col < WIDTH))


@triton.jit
def _selector(key, rows, E: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr):
    """(BE, BN): which axis logits of a query a key adds, that of its row in the window and that of its column."""
    feature, cols = tl.arange(0, BE)[:, None], E - rows
    return ((feature == (key // cols)[None]) | (feature == rows + (key % cols)[None])).to(DOT)


@triton.jit
def _logits(
    q, k, axis, bias, place, key, T, W, stride, rows, scale,
    BIAS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BM, BN) logits times log2(e), -inf for pairs that do not count."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if E:
        logits += tl.dot(axis, _selector(key, rows, E, BE, q.dtype), input_precision=PRECISION) * LOG2E
    counts = (key < W)[None]
    if BIAS:
        # The mask is one that leaves whole vectors, as a bias is as wide as they want.
        at, mask = place[:, None] * stride + key[None], (place < T)[:, None] & (key < stride)[None]
        value = tl.load(bias + at, mask=mask, other=1)
        if BIAS == 1:
            logits += value.to(tl.float32) * LOG2E
        else:
            counts = counts & (value != 0)
    return tl.where(counts, logits, float("-inf"))


@kernel
def _forward(
    q, k, v, axis, bias, queries, keys, inverse, o, lse,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, bh, bt, stride, first, N, T, W, rows, scale,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks, h, b, heads = tl.cdiv(T, BM), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    tile = tl.program_id(0) // blocks
    bias += h * bh + tile * bt
    place, at, own = _queries(tile, tl.program_id(0) % blocks, queries, inverse, first, T, BM)
    query, x = _rows(q + b * qb + h * qh, at, own, qn, D, BD, DOT), (b * heads + h) * N + at
    features = _rows(axis, x, own, E, E, BE, DOT) if E else query
    highest, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BV), tl.float32)
    for start in range(0, W, BN):
        key = start + tl.arange(0, BN)
        inside = key < W
        row = tl.load(keys + tile * W + key, mask=inside, other=0)
        keyed = _rows(k + b * kb + h * kh, row, inside, kn, D, BD, DOT)
        logits = _logits(query, keyed, features, bias, place, key, T, W, stride, rows, scale, BIAS, E, BE, PRECISION)
        new = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # no pair of these keys counts
        weights, shrink = tl.exp2(logits - base[:, None]), tl.exp2(highest - base)
        value = _rows(v + b * vb + h * vh, row, inside, vn, V, BV, DOT)
        out = out * shrink[:, None] + tl.dot(weights.to(DOT), value, input_precision=PRECISION)
        total, highest = total * shrink + tl.sum(weights, 1), new
    _store(o, (b * N + at) * heads + h, own, out / total[:, None], V, BV)
    tl.store(lse + x, highest + tl.log2(total), mask=own)


@kernel
def _query_gradients(
    q, k, v, axis, bias, queries, keys, inverse, o, lse, do, delta, dq, daxis,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, bh, bt, stride, first, N, T, W, rows, scale,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the queries and axis logits; leaves <o, do> in `delta` for the others."""
    blocks, h, b, heads = tl.cdiv(T, BM), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    tile = tl.program_id(0) // blocks
    bias += h * bh + tile * bt
    place, at, own = _queries(tile, tl.program_id(0) % blocks, queries, inverse, first, T, BM)
    query, x = _rows(q + b * qb + h * qh, at, own, qn, D, BD, DOT), (b * heads + h) * N + at
    features = _rows(axis, x, own, E, E, BE, DOT) if E else query
    y = (b * N + at) * heads + h
    grad = _rows(do, y, own, V, V, BV, DOT)
    along = tl.sum(_rows(o, y, own, V, V, BV, tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + x, along, mask=own)
    base = tl.load(lse + x, mask=own, other=float("inf"))  # weights of 0 for queries that are not ours
    out = tl.zeros((BM, BD), tl.float32)
    featured = tl.zeros((BM, BE), tl.float32)
    for start in range(0, W, BN):
        key = start + tl.arange(0, BN)
        inside = key < W
        row = tl.load(keys + tile * W + key, mask=inside, other=0)
        keyed = _rows(k + b * kb + h * kh, row, inside, kn, D, BD, DOT)
        logits = _logits(query, keyed, features, bias, place, key, T, W, stride, rows, scale, BIAS, E, BE, PRECISION)
        value = _rows(v + b * vb + h * vh, row, inside, vn, V, BV, DOT)
        dweights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        dlogits = (tl.exp2(logits - base[:, None]) * (dweights - along[:, None])).to(DOT)
        out += tl.dot(dlogits, keyed, input_precision=PRECISION)
        if E:
            featured += tl.dot(dlogits, tl.trans(_selector(key, rows, E, BE, DOT)), input_precision=PRECISION)
    _store(dq, y, own, out * scale, D, BD)
    if E:
        _store(daxis, x, own, featured, E, BE)


@kernel
def _key_gradients(
    q, k, v, axis, bias, queries, keys, inverse, lse, do, delta, dk, dv,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, bh, bt, stride, first, N, T, W, rows, scale, place_of_keys, M,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Of keys and values: at their position, or, if tiles share them, at their place among the keys of all tiles."""
    blocks, h, b, heads = tl.cdiv(W, BN), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    tile = tl.program_id(0) // blocks
    bias += h * bh + tile * bt
    key = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    inside = key < W
    row = tl.load(keys + tile * W + key, mask=inside, other=0)
    keyed = _rows(k + b * kb + h * kh, row, inside, kn, D, BD, DOT)
    value = _rows(v + b * vb + h * vh, row, inside, vn, V, BV, DOT)
    key_out, value_out = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BV), tl.float32)
    for block in range(0, tl.cdiv(T, BM)):
        place, at, own = _queries(tile, block, queries, inverse, first, T, BM)
        query, x = _rows(q + b * qb + h * qh, at, own, qn, D, BD, DOT), (b * heads + h) * N + at
        features = _rows(axis, x, own, E, E, BE, DOT) if E else query
        grad = _rows(do, (b * N + at) * heads + h, own, V, V, BV, DOT)
        logits = _logits(query, keyed, features, bias, place, key, T, W, stride, rows, scale, BIAS, E, BE, PRECISION)
        weights = tl.exp2(logits - tl.load(lse + x, mask=own, other=float("inf"))[:, None])
        value_out += tl.dot(tl.trans(weights.to(DOT)), grad, input_precision=PRECISION)
        dweights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        dlogits = (weights * (dweights - tl.load(delta + x, mask=own, other=0.0)[:, None])).to(DOT)
        key_out += tl.dot(tl.trans(dlogits), query, input_precision=PRECISION)
    if SHARED:
        row = place_of_keys + tile * W + key
    row = (b * M + row) * heads + h
    _store(dk, row, inside, key_out * scale, D, BD)
    _store(dv, row, inside, value_out, V, BV)


@kernel
def _bias_gradient(
    q, k, v, axis, bias, queries, keys, inverse, lse, do, delta, dbias,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, bh, bt, stride, first, N, T, W, rows, scale, B, cases, size,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of a tile's bias, summed over part of the `cases`: the samples, and the tiles if these share it."""
    blocks, h, part, heads = tl.cdiv(W, BN), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    block, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BN
    tile = block // tl.cdiv(T, BM)
    bias += h * bh + tile * bt  # of the others too, if they share it
    key = start + tl.arange(0, BN)
    inside, place = key < W, block % tl.cdiv(T, BM) * BM + tl.arange(0, BM)
    each = tl.cdiv(cases, tl.num_programs(2))
    out = tl.zeros((BM, BN), tl.float32)
    for case in range(part * each, tl.minimum(part * each + each, cases)):
        b, t = (case % B).to(tl.int64), tile + case // B
        _, at, own = _queries(t, block % tl.cdiv(T, BM), queries, inverse, first, T, BM)
        row = tl.load(keys + t * W + key, mask=inside, other=0)
        query, x = _rows(q + b * qb + h * qh, at, own, qn, D, BD, DOT), (b * heads + h) * N + at
        features = _rows(axis, x, own, E, E, BE, DOT) if E else query
        grad = _rows(do, (b * N + at) * heads + h, own, V, V, BV, DOT)
        keyed = _rows(k + b * kb + h * kh, row, inside, kn, D, BD, DOT)
        value = _rows(v + b * vb + h * vh, row, inside, vn, V, BV, DOT)
        logits = _logits(query, keyed, features, bias, place, key, T, W, stride, rows, scale, BIAS, E, BE, PRECISION)
        weights = tl.exp2(logits - tl.load(lse + x, mask=own, other=float("inf"))[:, None])
        dweights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        out += weights * (dweights - tl.load(delta + x, mask=own, other=0.0)[:, None])
    dbias += part.to(tl.int64) * size + h * bh + tile * bt
    mask = (place < T)[:, None] & (key < stride)[None]
    tl.store(dbias + (place[:, None] * stride + key[None]), out, mask=mask)


@triton.jit
def _sum_of_holders(x, holders, out, M, P, most, width, BM: tl.constexpr, BC: tl.constexpr):
    """(B, P, width) rows by place to (B, M, width), the sum of the places that hold each key."""
    key, col = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    b, inside = tl.program_id(2).to(tl.int64), col < width
    total = tl.zeros((BM, BC), tl.float32)
    for i in range(0, most):
        place = tl.load(holders + key * most + i, mask=key < M, other=-1)
        at, mask = x + (b * P + place[:, None]) * width + col, (place >= 0)[:, None] & inside
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out + (b * M + key[:, None]) * width + col
    tl.store(at, total.to(out.dtype.element_ty), mask=(key < M)[:, None] & inside)


def _empty(x: Tensor, length: int, width: int) -> Tensor:
    """(B, heads, length, width), laid out as a projection reads it: heads beside their channels."""
    return x.new_empty(x.shape[0], length, x.shape[1], width).transpose(1, 2)


def _launches(q, k, v, tables, biases, axis, rows, scale):
    """The arguments that all kernels share, for each group of tiles: tensors, strides and numbers, constants, and
    (tiles, blocks of queries, blocks of keys)."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    axis = None if axis is None else axis.contiguous()
    (heads, N, d), width, features = q.shape[1:], v.shape[-1], 0 if axis is None else axis.shape[-1]
    full = torch.get_float32_matmul_precision() == "highest"
    constants = {
        "D": d, "BD": max(16, next_power_of_2(d)), "V": width, "BV": max(16, next_power_of_2(width)),
        "E": features, "BE": max(16, next_power_of_2(features)), "PRECISION": "ieee" if full else "tf32",
        # The interpreter keeps bfloat16 as integers and multiplies these.
        "DOT": tl.float32 if INTERPRETED else getattr(tl, str(q.dtype).removeprefix("torch.")),
        "num_warps": 8 if max(d, width) > 64 else 4, "num_stages": 2,
    }  # fmt: skip
    first, block = 0, BLOCK // 2 if q.dtype == torch.float32 else BLOCK
    for query, key, bias in zip(tables[2::2], tables[3::2], biases, strict=True):
        (tiles, T), W = query.shape, key.shape[1]
        BM, BN = (max(16, min(block, next_power_of_2(n))) for n in (T, W))
        kind, strides = 0, (0, 0, 0)
        if bias.numel():
            kind, stride = (2 if bias.dtype == torch.bool else 1), bias.shape[-1]
            own = tiles if bias.shape[1] == heads * tiles else 0
            strides = max(own, 1) * T * stride, T * stride if own else 0, stride
            bias = bias.contiguous().view(torch.uint8 if kind == 2 else bias.dtype)
        tensors = [q, k, v, q if axis is None else axis, bias, query, key, tables[0]]
        numbers = [*(s for x in (q, k, v) for s in x.stride()[:3]), *strides, first, N, T, W, rows, scale]
        yield tensors, numbers, {**constants, "BM": BM, "BN": BN, "BIAS": kind}, (tiles, cdiv(T, BM), cdiv(W, BN))
        first += tiles * T


@torch.library.custom_op("visionattn::tile_attention", mutates_args=(), schema=f"({INPUTS}) -> (Tensor, Tensor)")
def _attention(q, k, v, tables, biases, axis, rows, scale):
    """Output, and the logarithm to base 2 of the softmax's denominators. Tables are the plan's `inverse` and `holders`,
    and the queries and keys of each group."""
    out, lse = _attention_shapes(q, k, v, tables, biases, axis, rows, scale)
    with torch.cuda.device_of(q):
        launches = _launches(q, k, v, tables, biases, axis, rows, scale)
        for tensors, numbers, constants, (tiles, blocks, _) in launches:
            _forward[tiles * blocks, q.shape[1], q.shape[0]](*tensors, out, lse, *numbers, **constants)
    return out, lse


@_attention.register_fake
def _attention_shapes(q, k, v, tables, biases, axis, rows, scale):
    return _empty(q, q.shape[2], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "visionattn::tile_attention_backward", mutates_args=(),
    schema=f"(Tensor do, Tensor out, Tensor lse, {INPUTS}, bool of_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
)  # fmt: skip
def _gradients(do, out, lse, q, k, v, tables, biases, axis, rows, scale, of_bias):
    inputs = q, k, v, tables, biases, axis, rows, scale
    dq, dk, dv, daxis, dbiases = _gradients_shapes(do, out, lse, *inputs, of_bias)
    do, out = (x.transpose(1, 2).contiguous() for x in (do, out))
    delta, (B, heads), M, holders = torch.empty_like(lse), q.shape[:2], k.shape[2], tables[1]
    place, places = 0, sum(key.numel() for key in tables[3::2])
    shared = holders.shape != (places, 1)
    by_place = [_empty(x, places, x.shape[-1]) if shared else grad for x, grad in ((k, dk), (v, dv))]
    with torch.cuda.device_of(q):
        for i, (tensors, numbers, constants, (tiles, queried, keyed)) in enumerate(_launches(*inputs)):
            _query_gradients[tiles * queried, heads, B](*tensors, out, lse, do, delta, dq, daxis, *numbers, **constants)
            tensors, rest = [*tensors, lse, do, delta], (place, places if shared else M)
            _key_gradients[tiles * keyed, heads, B](*tensors, *by_place, *numbers, *rest, **constants, SHARED=shared)
            place += tables[3 + 2 * i].numel()
            if of_bias:
                own = tiles if biases[i].shape[1] == heads * tiles else 1
                cases, programs = B * tiles // own, own * queried * keyed
                parts = min(cases, cdiv(PROGRAMS, programs * heads))
                part, rest = biases[i].new_empty(parts, *biases[i].shape, dtype=torch.float32), biases[i].numel()
                _bias_gradient[programs, heads, parts](*tensors, part, *numbers, B, cases, rest, **constants)
                dbiases[i].copy_(part.sum(0))
        for x, grad in zip(by_place, (dk, dv), strict=True) if shared else ():
            width, most = heads * grad.shape[-1], holders.shape[1]
            _sum_of_holders[cdiv(M, 16), cdiv(width, 128), B](x, holders, grad, M, places, most, width, BM=16, BC=128)
    return dq, dk, dv, daxis, dbiases


@_gradients.register_fake
def _gradients_shapes(do, out, lse, q, k, v, tables, biases, axis, rows, scale, of_bias):
    dq, dk, dv = (_empty(x, *x.shape[2:]) for x in (q, k, v))
    daxis = q.new_empty(0 if axis is None else axis.shape)
    return dq, dk, dv, daxis, [bias.new_empty(bias.shape) for bias in biases] if of_bias else []


def _save(ctx, inputs, output):
    q, k, v, tables, biases, axis, ctx.rows, ctx.scale = inputs
    ctx.tables = len(tables)
    ctx.save_for_backward(*output, q, k, v, axis, *tables, *biases)


def _backward(ctx, do, _):
    kept = ctx.saved_tensors  # once, or checkpoints refuse
    *saved, axis = kept[:6]
    tables, biases = (kept[6:][part] for part in (slice(ctx.tables), slice(ctx.tables, None)))
    of_bias = any(ctx.needs_input_grad[4])
    dq, dk, dv, daxis, dbiases = _gradients(do, *saved, tables, biases, axis, ctx.rows, ctx.scale, of_bias)
    dbiases = dbiases if of_bias else [None] * len(biases)
    return dq, dk, dv, [None] * ctx.tables, dbiases, None if axis is None else daxis, None, None


_attention.register_autograd(_backward, setup_context=_save)


def tile_attention(q, k, v, plan, biases, scale, axis_logits=None) -> Tensor:
    """`local_attention` without dropout, for a plan that has `holders`; masks are among the biases."""
    axis, rows = None, 0
    if axis_logits is not None:
        axis, rows = torch.cat(axis_logits, -1).to(q.dtype), axis_logits[0].shape[-1]
    tables = [plan.inverse, plan.holders, *(table for group in plan.groups for table in group[:2])]
    biases = [q.new_empty(0) if bias is None else bias for bias in biases]
    return _attention(q, k, v, tables, biases, axis, rows, scale)[0]
