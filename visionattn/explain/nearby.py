"""Attention to what is near: windows, neighbourhoods, halos and kernels of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import (
    AggregatedAttention,
    ContMix2d,
    CosineAttention,
    HaloAttention2d,
    HiLoAttention,
    HybridScaleAttention,
    NeighborhoodAttention2d,
    ShiftedWindowAttention2d,
    StripeAttention2d,
    WindowAttention2d,
)
from ..layers.adaptive_pool import adaptive_pool, bins
from ..layers.aggregated_attention import neighbours_inside, unit_vectors
from ..layers.dynamic_conv import window_starts
from ..layers.halo_attention import _relative, graph_halo_axis, halo_axis
from ..layers.heads import split_heads
from ..layers.hilo_attention import _pooled
from ..layers.local_attention import Plan, local_plan, padded_heads, relative_bias
from ..layers.self_guided_attention import (
    attention_weights,
    of_windows,
    windows_of,
)
from ..layers.shifted_window_attention import graph_shifted_window_axis, shifted_window_axis
from ..layers.stripe_attention import graph_stripe_axis, in_stripes, stripe_axis
from ..layers.window_attention import graph_window_axis, window_axis
from .map import HEAD_GATE, IN_WINDOWS, NOWHERE, ON_MAP, Explained, Map, merged, on_map


def _local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    biases: list[Tensor] | None,
    scale: float,
    size: tuple[int, int],
    key_grid: tuple[int, int],
    axis_logits: tuple[Tensor, Tensor] | None = None,
    shift: int = 0,
) -> tuple[Map, Tensor]:
    """What `local_attention` computes: the map, and (B, heads, N, d_v).

    Args:
        size: height and width of the queries.
        key_grid: height and width of the keys that are no padding.
        shift: rows and columns of padding before these.
    """
    found, places, counted = [], [], []
    for group, bias in zip(plan.groups, biases or [group.mask for group in plan.groups], strict=True):
        logits = q[:, :, group.queries] @ k[:, :, group.keys].mT * scale  # (B, heads, tiles, T, w)
        if axis_logits is not None:
            rows, cols = (each[:, :, group.queries] for each in axis_logits)
            logits = logits + (rows[..., :, None] + cols[..., None, :]).flatten(-2)
        if bias is not None:
            bias = bias[..., : logits.shape[-1]].unflatten(1, (q.shape[1], -1))
            logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
        found.append(logits.flatten(2, 3))
        counted.append((logits[0, 0] > -torch.inf).flatten(0, 1))
        places.append(group.keys[:, None].expand(-1, logits.shape[3], -1).flatten(0, 1))
    logits, keys = torch.cat(found, 2)[:, :, plan.inverse], torch.cat(places)[plan.inverse]
    counts = torch.cat(counted)[plan.inverse]
    # Tiles share a window: of its keys each query has some.
    order = counts.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.sum(1).max())]
    keys, counts = keys.gather(1, order), counts.gather(1, order)
    logits = logits.gather(3, order.expand(*logits.shape[:3], -1))
    weights = logits.softmax(-1)
    out = torch.einsum("bhnk,bhnkd->bhnd", weights, v[:, :, keys])
    width = key_grid[1] + 2 * shift if shift else key_grid[1] + plan.padding[1]
    keys = torch.stack([keys // width - shift, keys % width - shift], -1)
    keys = torch.where(counts[..., None], keys, NOWHERE).unflatten(0, size)
    weights = weights.unflatten(2, size)
    return Map("attention", weights, IN_WINDOWS, keys=keys, key_grid=key_grid, logits=logits), out


def _in_windows(qkv: Tensor, bias: Tensor | None, heads: int, window: int, scale: float) -> tuple[Map, Tensor]:
    size = tuple(qkv.shape[1:3])
    plan = local_plan((window_axis, graph_window_axis), size, ((window,), (window,)), qkv.device)
    found, out = _local(*padded_heads(qkv, bias, heads, plan), plan, None, scale, size, size)
    return found, merged(out, size)


def window_attention(layer: WindowAttention2d, x: Tensor) -> Explained:
    scale = (x.shape[3] // layer.num_heads) ** -0.5
    found, out = _in_windows(layer.qkv(x), layer.qkv.bias, layer.num_heads, layer.window_size, scale)
    return [found], layer.proj(out)


def shifted_window_attention(layer: ShiftedWindowAttention2d, x: Tensor) -> Explained:
    size = tuple(x.shape[1:3])
    window = layer.window(*size, x.device)
    plan = local_plan((shifted_window_axis, graph_shifted_window_axis), size, (window, window), x.device)
    qkv = layer.qkv(x)
    q, k, v = padded_heads(qkv, layer.qkv.bias, layer.num_heads, plan)
    found, out = _local(q, k, v, plan, relative_bias(layer.rpb.flatten(1), plan), q.shape[3] ** -0.5, size, size)
    return [found], layer.proj(merged(out, size))


def stripe_attention(layer: StripeAttention2d, x: Tensor) -> Explained:
    size, qkv, maps, outs = tuple(x.shape[1:3]), layer.qkv(x), [], []
    parts, names = len(layer.windows), ("vertical", "horizontal") if layer.stripe else ("",)
    values = qkv.chunk(3, -1)[2].permute(0, 3, 1, 2).chunk(parts, 1)
    q, k, v = (each.chunk(parts, 1) for each in split_heads(qkv, layer.num_heads))
    for i, (rows, cols) in enumerate(layer.windows):
        heads = layer.num_heads // parts
        plan = local_plan((stripe_axis, graph_stripe_axis), size, ((rows,), (cols,)), x.device, heads)
        found, out = _local(q[i], k[i], v[i], plan, None, q[i].shape[3] ** -0.5, size, size)
        maps.append(_part(found, names[i]))
        outs.append(merged(out, size) + in_stripes(layer.lepe[i], values[i], rows, cols).permute(0, 2, 3, 1))
    return maps, layer.proj(torch.cat(outs, -1))


def hilo_attention(layer: HiLoAttention, x: Tensor) -> Explained:
    maps, outs = [], []
    if layer.high_heads:
        high, out = _in_windows(layer.h_qkv(x), layer.h_qkv.bias, layer.high_heads, layer.window_size, layer.scale)
        maps.append(_part(high, "high"))
        outs.append(layer.h_proj(out))
    if layer.low_heads:
        pooled = _pooled(x, layer.window_size)
        (q,), (k, v) = (
            split_heads(layer.l_q(x), layer.low_heads, 1),
            split_heads(layer.l_kv(pooled), layer.low_heads, 2),
        )
        logits, sizes = q @ k.mT * layer.scale, (x.shape[1:3], pooled.shape[1:3])
        weights = logits.softmax(-1)
        maps.append(Map("attention", on_map(weights, *sizes), ON_MAP, "low", logits=logits))
        outs.append(layer.l_proj(merged(weights @ v, x.shape[1:3])))
    return maps, layer.proj_drop(torch.cat(outs, -1))


def hybrid_scale_attention(layer: HybridScaleAttention, x: Tensor) -> Explained:
    size, heads, w = tuple(x.shape[1:3]), layer.num_heads // 2, layer.window_size
    halves, summary = layer.q(x).chunk(2, -1), layer.summary(x)
    (q,), (k, v) = split_heads(halves[0], heads, 1), split_heads(layer.global_kv(summary), heads, 2)
    logits = q @ k.mT * layer.scale
    weights = logits.softmax(-1)
    wide = Map("attention", on_map(weights, size, summary.shape[1:3]), ON_MAP, "global", logits=logits)
    out = merged(weights @ v, size)
    (q, k, v), inside = windows_of(torch.cat([halves[1], layer.local_kv(x)], -1), heads, w)
    mask = None if inside is None else inside[:, None, None]
    weights = attention_weights(q, k, layer.scale, mask).to(v.dtype)
    local = of_windows((weights @ v).transpose(1, 2).flatten(2), w, *size)
    logits = q * layer.scale @ k.mT
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    values, logits = (
        of_windows(each.transpose(1, 2).flatten(2), w, *size).unflatten(3, (heads, -1)).permute(0, 3, 1, 2, 4)
        for each in (weights, logits)
    )
    axes = torch.arange(size[0], device=x.device), torch.arange(size[1], device=x.device)
    row, col = (place[:, None] // w * w + torch.arange(w, device=x.device) for place in axes)
    row, col = torch.where(row < size[0], row, NOWHERE), torch.where(col < size[1], col, NOWHERE)
    keys = torch.stack(torch.broadcast_tensors(row[:, None, :, None], col[None, :, None, :]), -1).flatten(2, 3)
    near = Map("attention", values, IN_WINDOWS, "local", keys=keys, key_grid=size, logits=logits)
    return [wide, near], layer.merge(torch.cat([out, local], -1), x)


def _part(found: Map, part: str) -> Map:
    return Map(**vars(found) | {"part": part})


def neighborhood_attention(layer: NeighborhoodAttention2d, x: Tensor) -> Explained:
    size, heads = tuple(x.shape[1:3]), layer.num_heads
    table = None if layer.rpb is None else layer.table(*size)
    plan = local_plan(layer.axes, size, layer.window(*size), x.device, heads if table is None else None)
    biases = None if table is None else relative_bias(table.flatten(1), plan)
    qkv = layer.qkv(x)
    found, out = _local(*padded_heads(qkv, layer.qkv.bias, heads, plan), plan, biases, layer.scale, size, size)
    return [found], layer.proj_drop(layer.proj(merged(out, size)))


def cosine_attention(layer: CosineAttention, x: Tensor) -> Explained:
    (q, k, v, bias), size = layer.attended(layer.qkv(x)), x.shape[1:3]
    logits = q @ k.mT + bias
    weights = logits.softmax(-1)
    found = Map("attention", on_map(weights, size, size), ON_MAP, logits=logits)
    return [found, *_gates_of_heads(layer, x)], layer.merge(weights @ v, x)


def aggregated_attention(layer: AggregatedAttention, x: Tensor) -> Explained:
    """Attention to the neighbours and, behind them, to the places of the pooled map, which are said to be where the
    middles of their bins are; and the learned weights of the neighbours."""
    size, heads, K, pooled = tuple(x.shape[1:3]), layer.num_heads, layer.window, layer.pooled(x)
    pooled_size, (inside, num_inside) = tuple(pooled.shape[1:3]), neighbours_inside(*size, K, x.device)
    (q,), (k, v) = split_heads(layer.q(x), heads, 1), split_heads(layer.kv(x), heads, 2)
    pooled_k, pooled_v = split_heads(layer.kv(pooled), heads, 2)
    unit, inside = unit_vectors(q), inside.flatten(0, 1)
    query = layer.queries(unit, num_inside + pooled_size[0] * pooled_size[1])
    near_k, near_v = (_neighbours(each, size, K) for each in (unit_vectors(k), v))  # (B, heads, N, K^2, d)
    near = torch.einsum("bhnd,bhnjd->bhnj", query, near_k) + layer.relative_pos_bias_local[:, None]
    far = query @ unit_vectors(pooled_k).mT + layer.position_bias(size, pooled_size, query.dtype)
    logits = torch.cat([near.masked_fill(~inside, -torch.inf), far], -1)
    weights = logits.softmax(-1)
    learned = (unit @ layer.learnable_tokens + layer.learnable_bias) * inside
    y = torch.einsum("bhnj,bhnjd->bhnd", weights[..., : K * K] + learned, near_v) + weights[..., K * K :] @ pooled_v

    own = torch.cartesian_prod(*(torch.arange(side, device=x.device) for side in size)).unflatten(0, size)
    step = torch.cartesian_prod(*(torch.arange(K, device=x.device) - K // 2,) * 2)
    beside = (own[:, :, None] + step).masked_fill(~inside.unflatten(0, size)[..., None], NOWHERE)
    pools = (bins(torch.arange(n, device=x.device), m, n) for m, n in zip(size, pooled_size, strict=True))
    middles = [(start + end - 1) // 2 for start, end in pools]
    keys = torch.cat([beside, torch.cartesian_prod(*middles).expand(*size, -1, -1)], 2)
    maps = [
        Map("attention", weights.unflatten(2, size), IN_WINDOWS, keys=keys, key_grid=size, logits=logits),
        Map("kernel", learned.unflatten(2, size), IN_WINDOWS, keys=beside, key_grid=size),
    ]
    return [*maps, *_gates_of_heads(layer, x)], layer.merge(y, x)


def _neighbours(x: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """(B, heads, N, d) of a map to the neighbours of every position, (B, heads, N, K^2, d), with zeros outside."""
    patches = F.unfold(x.mT.unflatten(3, size).flatten(0, 1), window, padding=window // 2)
    return patches.unflatten(1, (-1, window**2)).unflatten(0, x.shape[:2]).permute(0, 1, 4, 3, 2)


def _gates_of_heads(layer: CosineAttention | AggregatedAttention, x: Tensor) -> list[Map]:
    return [] if layer.router is None else [Map("gate", layer.router(x).permute(0, 3, 1, 2), HEAD_GATE)]


def halo_attention(layer: HaloAttention2d, x: Tensor) -> Explained:
    stride, heads, d = layer.query_stride, layer.num_heads, layer.dim_head
    x = x.permute(0, 2, 3, 1)
    key_grid, q, kv = tuple(x.shape[1:3]), layer.q(x[:, ::stride, ::stride]), layer.kv(x)
    size, shift = tuple(q.shape[1:3]), layer.halo_size if layer.mask == "pad" else 0
    window = layer.block_size, layer.halo_size, stride, layer.mask
    plan = local_plan((halo_axis, graph_halo_axis), key_grid, (window, window), x.device, heads)
    kv = F.pad(kv, (0, 0, *(shift,) * 4))
    k, v = kv.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2).split([d, layer.dim_out // heads], -1)
    (q,) = split_heads(q, heads, 1)
    position = (q * layer.scale if layer.scale_pos_embed else q).unflatten(2, size)
    tables = zip((layer.height_rel, layer.width_rel), size, strict=True)
    height, width = (_relative(table, n, layer.block_size // stride) for table, n in tables)
    logits = torch.einsum("bnyxd,yud->bnyxu", position, height), torch.einsum("bnyxd,xud->bnyxu", position, width)
    logits = logits[0].flatten(2, 3), logits[1].flatten(2, 3)
    found, out = _local(q, k, v, plan, None, layer.scale, size, key_grid, logits, shift)
    return [found], layer.pool(merged(out, size).permute(0, 3, 1, 2))


def context_mixing(
    layer: ContMix2d, x: Tensor, context: Tensor | None = None, value: Tensor | None = None
) -> Explained:
    """Taps of dynamic kernels, which sum to 1, on the map that the layer enlarges where it is too small for them."""
    q, keys, values = layer.prepare(x, context, value)
    size, maps, halves = tuple(q.shape[2:4]), [], []
    biases = layer.biases(size, q.dtype)
    parts = zip(("small", "large"), layer.kernel_sizes, keys, values, biases, strict=True)
    for part, K, k, v, bias in parts:
        logits = q.flatten(2, 3) @ k.mT + bias.flatten(1, 2)
        weights = logits.softmax(-1)
        rows, cols = (window_starts(n, K, x.device)[:, None] + torch.arange(K, device=x.device) for n in size)
        rows, cols = (t.expand(*size, K, K) for t in (rows[:, None, :, None], cols[None, :, None, :]))
        places = torch.stack([rows, cols], -1).flatten(2, 3)  # (H, W, K^2, 2)
        seen = v.flatten(2, 3)[:, :, (places[..., 0] * size[1] + places[..., 1]).flatten(0, 1)]
        out = torch.einsum("bgnk,bgnkd->bgdn", weights, seen)
        halves.append(out.flatten(1, 2).unflatten(2, size))
        known = {"keys": places, "key_grid": size, "logits": logits}
        maps.append(Map("attention", weights.unflatten(2, size), IN_WINDOWS, part, **known))
    return maps, adaptive_pool(torch.cat(halves, 1), tuple(x.shape[2:]))
