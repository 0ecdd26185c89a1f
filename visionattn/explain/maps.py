"""What attention blocks weigh by: the slow path that returns weights, apart from the fast one and equal to it.

`LAYERS` has a function for every class of blocks. It computes what the layer computes, by the layer's own parameters
and the equation of its paper, from weights that it forms in full, and returns these maps with the output made of them.
A block joins by an entry; a class without one, and without one of a class it is derived from, has no maps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VisionattnError
from ..layers import (
    AgentAttention,
    AggregatedAttention,
    AttentiveConv2d,
    CausalSelfAttention,
    ChannelAttention,
    ContMix2d,
    CosineAttention,
    FlowAttention,
    FocalModulation,
    GatedPositionalSelfAttention,
    HaloAttention2d,
    HiLoAttention,
    HybridScaleAttention,
    LargeKernelAttention,
    MixtureOfHeadAttention,
    NeighborhoodAttention2d,
    NormAwareLinearAttention,
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
    RecursiveGatedConv,
    SelfAttention,
    SelfGuidedAttention,
    ShiftedWindowAttention2d,
    SparseAttention,
    StripeAttention2d,
    TokenAttentiveConv2d,
    TokenFocalModulation,
    TokenNeighborhoodAttention,
    WindowAttention2d,
)
from ..layers.agent_attention import pooled as pooled_agents
from ..layers.aggregated_attention import bins, neighbours_inside, unit_vectors
from ..layers.causal_attention import rotary_table, rotate
from ..layers.channel_attention import ROLES
from ..layers.context_mixing import pooled
from ..layers.dynamic_conv import window_starts
from ..layers.flow_attention import capacities, flows
from ..layers.halo_attention import _relative, graph_halo_axis, halo_axis
from ..layers.heads import split_heads
from ..layers.hilo_attention import _pooled
from ..layers.local_attention import Plan, local_plan, padded_heads, relative_bias
from ..layers.mixture_of_head import head_gates
from ..layers.norm_aware_attention import turned_heads
from ..layers.partial_attention import distance_buckets
from ..layers.self_guided_attention import (
    GlobalEnhancedAttention,
    attention_weights,
    guided_heads,
    merged_tokens,
    of_windows,
    section_bounds,
    significance_order,
    windows_of,
)
from ..layers.shifted_window_attention import graph_shifted_window_axis, shifted_window_axis
from ..layers.stripe_attention import graph_stripe_axis, in_stripes, stripe_axis
from ..layers.window_attention import graph_window_axis, window_axis
from ..models.attnet import AttentiveMixer
from ..models.hornet import GatedConvMixer
from ..models.nalaformer import NormAwareMixer

ON_MAP = ("batch", "head", "query_row", "query_col", "key_row", "key_col")
IN_WINDOWS = ("batch", "head", "query_row", "query_col", "key")
OF_TOKENS = ("batch", "head", "query", "key")
GATE = ("batch", "channel", "row", "col")
HEAD_GATE = ("batch", "head", "row", "col")
NOWHERE = -(2**15)
"""Row and column of a key that is masked."""


@dataclass(frozen=True)
class Map:
    """What a layer weighs by.

    Args:
        kind: "attention", of which rows sum to 1 unless it is linear or a mask follows; "content" and "position", the
            two that ConViT's is mixed of; "mask", where attention may go; "gate" and "modulator", which multiply;
            "kernel", which convolves.
        kind: "attention", of which rows sum to 1; "content" and "position", the two that ConViT's is mixed of;
            "collect", from agents to keys, and "spread", from queries to agents, of which agents' is the product;
            "mask", where attention may go; "gate" and "modulator", which multiply; "kernel", which convolves.
        values: the weights.
        axes: a name for each dimension of `values`. Attention is over `ON_MAP`; or over `IN_WINDOWS`, where `keys` says
            which they are; or over `OF_TOKENS`, of which one may be the class token.
        part: which of several maps of a layer it is: "high" and "low" of HiLo, the number of a gate.
        layer: name of the layer in its model.
        keys: (query_row, query_col, key, 2), row and column of each key. Those outside `key_grid` are padding, which
            takes part with a weight of its own; those that are masked are at `NOWHERE`.
        key_grid: height and width of the map of keys, where it has `keys`.
        grid: of tokens: height and width of the map of patches.
        class_token: of tokens: place of the class token, 0 or -1; None if there is none.
        patches: of tokens: (batch, n), which patches are there, where some were pruned; None for all.
    """

    kind: str
    values: Tensor
    axes: tuple[str, ...]
    part: str = ""
    layer: str = ""
    keys: Tensor | None = None
    key_grid: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    class_token: int | None = None
    patches: Tensor | None = None

    @property
    def title(self) -> str:
        """Name of the layer, and of the map if it has several."""
        kind = "" if self.kind == "attention" else self.kind
        return " ".join(filter(None, [self.layer, kind, self.part]))

    def size(self, axis: str) -> int:
        """Length of an axis."""
        return self.values.shape[self.axes.index(axis)]

    @property
    def queries(self) -> tuple[int, int]:
        """Height and width of the map of queries."""
        return self.grid if "query" in self.axes else (self.size("query_row"), self.size("query_col"))

    @property
    def key_size(self) -> tuple[int, int]:
        """Height and width of the map of keys."""
        return self.key_grid or self.grid or tuple(self.values.shape[-2:])

    def spread(self, r: Tensor, token: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The weights of all keys, summed over queries that count by r: all that pictures and rollout ask for.

        Args:
            r: (batch, query_row, query_col), how much each query counts.
            token: (batch,), how much the class token does.

        Returns:
            weights (batch, head, key_row, key_col), without those of padding, and those (batch, head) of the class
            token, if there is one.
        """
        if self.axes == ON_MAP:
            return torch.einsum("bhyxtu,byx->bhtu", self.values, r), None
        weighed = self.values * r[:, None, :, :, None] if self.axes == IN_WINDOWS else None
        if weighed is not None:
            H, W = self.key_grid
            row, col = self.keys.unbind(-1)
            inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
            place = torch.where(inside, row * W + col, H * W).flatten()
            total = weighed.new_zeros(*weighed.shape[:2], H * W + 1).index_add_(2, place, weighed.flatten(2))
            return total[..., :-1].unflatten(2, (H, W)), None
        flat = r.flatten(1) if self.patches is None else r.flatten(1).gather(1, self.patches)
        if self.class_token is not None:
            own = torch.zeros_like(flat[:, 0]) if token is None else token
            flat = torch.cat([own[:, None], flat] if self.class_token == 0 else [flat, own[:, None]], 1)
        total, own = torch.einsum("bhqk,bq->bhk", self.values, flat), None
        if self.class_token is not None:
            own, total = total[..., self.class_token], total[..., 1:] if self.class_token == 0 else total[..., :-1]
        if self.patches is not None:
            whole = total.new_zeros(*total.shape[:2], r[0].numel())
            total = whole.scatter(2, self.patches[:, None].expand_as(total), total)
        return total.unflatten(2, self.grid), own


Explained = tuple[list[Map], Tensor]


def layer_maps(layer: nn.Module, *args: Any, **kwargs: Any) -> Explained:
    """Maps of a layer, and its output computed from them.

    Args:
        layer: an attention block, in evaluation mode.
        *args: what it is called with.
        **kwargs: likewise.

    Raises:
        VisionattnError: if nobody has written how it weighs.
    """
    if (entry := entry_of(layer)) is None:
        raise VisionattnError(f"{type(layer).__name__} has no maps: they are those of {', '.join(_names())}")
    return entry(layer, *args, **kwargs)


def entry_of(layer: nn.Module) -> Callable[..., Explained] | None:
    """The function of `LAYERS` for a layer, that of the nearest class it is derived from."""
    return next((LAYERS[each] for each in type(layer).__mro__ if each in LAYERS), None)


def _names() -> list[str]:
    return [each.__name__ for each in LAYERS]


# Attention of all to all


def self_attention(layer: SelfAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    q, k, v = layer.heads(x)
    weights = (q @ k.mT * layer.scale).softmax(-1)
    return [Map("attention", weights, OF_TOKENS)], layer.merge(weights @ v)


def mixture_of_head_attention(
    layer: MixtureOfHeadAttention, x: Tensor, grid: tuple[int, int] | None = None
) -> Explained:
    q, k, v = layer.heads(x)
    weights, gates = (q @ k.mT * layer.scale).softmax(-1), head_gates(layer.router, x)
    placed = [] if grid is None else [Map("gate", gates.squeeze(3).unflatten(2, tuple(grid)), HEAD_GATE)]
    return [Map("attention", weights, OF_TOKENS), *placed], layer.merge(weights @ v * gates)


def causal_attention(
    layer: CausalSelfAttention,
    x: Tensor,
    rotary: Tensor | tuple[Tensor, Tensor] | None = None,
    soft_mask_rate: float | Tensor = 0.0,
    mask: Tensor | None = None,
) -> Explained:
    """The mask comes after the softmax: rows sum to 1 only with what it takes away."""
    q, k, v = layer.heads(x)
    if rotary is None:
        rotary = rotary_table(q.shape[2], q.shape[3], q.device, torch.promote_types(q.dtype, torch.float32))
    cos, sin = (rotary.cos(), rotary.sin()) if isinstance(rotary, Tensor) else rotary
    weights = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT * layer.scale).softmax(-1)
    weights = weights.tril() + soft_mask_rate * weights.triu(1)
    return [Map("attention", weights, OF_TOKENS)], layer.merge(weights @ v)


def gated_attention(layer: GatedPositionalSelfAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    B, N, C = x.shape
    H, W = grid or (int(N**0.5),) * 2
    q, k = split_heads(layer.qk(x), layer.num_heads, 2)
    (v,) = split_heads(layer.v(x), layer.num_heads, 1)
    content = (q @ k.mT * layer.scale).softmax(-1)
    place = torch.arange(N, device=x.device)
    dx, dy = (p - p[:, None] for p in (place % W, place // W))
    offsets = torch.stack([dx, dy, dx**2 + dy**2], -1).to(layer.pos_proj.weight.dtype)
    position = layer.pos_proj(offsets).permute(2, 0, 1).softmax(-1).expand(B, -1, -1, -1)
    gate = layer.gating_param.sigmoid()
    weights = (1 - gate[:, None, None]) * content + gate[:, None, None] * position
    out = (weights @ v).transpose(1, 2).reshape(B, N, C)
    maps = {"attention": weights, "content": content, "position": position}
    gates = Map("gate", gate, ("head",))
    return [*(Map(kind, each, OF_TOKENS) for kind, each in maps.items()), gates], layer.proj_drop(layer.proj(out))


def sparse_attention(
    layer: SparseAttention,
    x: Tensor,
    grid: tuple[int, int] | None = None,
    kept: Tensor | None = None,
    return_weights: bool = False,
) -> Explained:
    """Where patches were pruned the class token's row sums to 1 with what those get, whose value is 0."""
    q, k, v = layer.heads(x)
    predictor, num_keys = layer.predictor, k.shape[2]
    logits = q @ k.mT * layer.scale
    mask = torch.ones_like(logits, dtype=torch.bool)
    if predictor.attn_keep_rate < 1 or not predictor.attn_score_topk:
        mask[:, :, 1:] = predictor(q, k, grid, kept)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)  # queries without a key have none
    if dropped := predictor.patches(grid) + 1 - num_keys:
        of_class = torch.cat([logits[:, :, :1], logits.new_zeros(*logits.shape[:2], 1, dropped)], -1)
        weights = torch.cat([of_class.softmax(-1)[..., :num_keys], weights[:, :, 1:]], 2)
    maps = [Map("attention", weights, OF_TOKENS, patches=kept), Map("mask", mask, OF_TOKENS, patches=kept)]
    return maps, layer.merge(weights @ v)


def partial_self_attention(layer: PartialSelfAttention, x: Tensor) -> Explained:
    parts = x.split(layer.widths, 1)
    (H, W), heads = x.shape[2:], layer.num_heads
    q, k, v = split_heads(layer.qkv(layer.norm(parts[1].permute(0, 2, 3, 1))), heads)
    bias = layer.rpb[:, distance_buckets(H, W, layer.rpe, x.device)]
    weights = (q @ k.mT * q.shape[3] ** -0.5 + bias).softmax(-1)
    out = layer.proj_drop(layer.proj(_merged(weights @ v, (H, W)))).permute(0, 3, 1, 2)
    return [Map("attention", _on_map(weights, (H, W), (H, W)), ON_MAP)], torch.cat([layer.conv(parts[0]), out], 1)


def norm_aware_attention(layer: NormAwareLinearAttention, x: Tensor) -> Explained:
    """With its linear kernel rows do not sum to 1, and weights may be negative."""
    qkv, gate = layer.project(x)
    q, k, v, z = turned_heads(layer, qkv)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) if z is None else z * (q @ k.mT).sum(0) / v.shape[2]
    size = x.shape[2:]
    maps = [Map("attention", _on_map(weights, size, size), ON_MAP)]
    return maps, layer.merge(_merged(weights @ v, size).to(x.dtype), qkv, gate)


def enhanced_attention(layer: GlobalEnhancedAttention, x: Tensor) -> Explained:
    (q,), (k, v) = split_heads(layer.q(x), layer.num_heads, 1), split_heads(layer.kv(x), layer.num_heads, 2)
    weights, size = (q @ k.mT * layer.scale).softmax(-1), x.shape[1:3]
    return [Map("attention", _on_map(weights, size, size), ON_MAP)], layer.merge(_merged(weights @ v, size), x)


def self_guided_attention(layer: SelfGuidedAttention, x: Tensor, significance: Tensor) -> Explained:
    """The positions that a token is merged of share what it is weighed by."""
    (q,) = split_heads(layer.q(x), layer.num_heads, 1)
    k, v = guided_heads(layer, layer.kv(merged_tokens(layer, x, significance)))
    weights, size = (q @ k.mT * layer.scale).softmax(-1), x.shape[1:3]
    order, token, first = significance_order(significance), [], 0  # of each rank, its token
    for (start, end, groups), (_, group) in zip(section_bounds(layer, order.shape[1]), layer.sections, strict=True):
        rank = torch.arange(groups * group - (end - start), groups * group, device=x.device)
        token.append(first + rank // group)
        first += groups
    token = torch.cat(token)
    shares = (weights / token.bincount(minlength=first))[..., token]
    values = torch.empty_like(shares).scatter_(3, order[:, None, None].expand_as(shares), shares)
    return [Map("attention", _on_map(values, size, size), ON_MAP)], layer.merge(_merged(weights @ v, size), x)


def flow_attention(layer: FlowAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    """What sources send to a sink, as shares of it, and by how much it is more or less than the mean of them."""
    q, k, v = capacities(layer, layer.qkv(x))
    taken, given = flows(q, k, layer.eps)
    weights = q @ k.mT * given.mT
    total = weights.sum(-1, keepdim=True)
    weights, gate = weights / total, taken * total
    out = layer.proj((gate * (weights @ v)).transpose(1, 2).reshape(x.shape))
    if x.ndim == 3:
        return [Map("attention", weights, OF_TOKENS), Map("gate", gate[..., 0], ("batch", "head", "query"))], out
    size = x.shape[1:3]
    gates = Map("gate", gate[..., 0].unflatten(2, size), ("batch", "head", "row", "col"))
    return [Map("attention", _on_map(weights, size, size), ON_MAP), gates], out


def channel_attention(layer: ChannelAttention, x: Tensor) -> Explained:
    parts = split_heads(layer.qkv(x), layer.num_heads)
    first, second, mixed = (parts[i] for i in ROLES[layer.version])
    scale = first.shape[3 if layer.version == 1 else 2] ** -0.5
    weights = (first.mT @ second * scale).softmax(-1)
    out = (mixed @ weights.mT).transpose(1, 2).reshape(x.shape)
    return [Map("attention", weights, ("batch", "head", "query_channel", "key_channel"))], layer.proj(out)


def agent_attention(layer: AgentAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    """Attention of queries to keys is the product of both steps, which have maps of their own."""
    qkv, heads, first = layer.qkv(x).flatten(1, -2), layer.num_heads, int(layer.class_token)
    H, W = tuple(x.shape[1:3]) if x.ndim == 4 else grid or (math.isqrt(x.shape[1] - first),) * 2
    q, k, v = split_heads(qkv, heads)
    patches = qkv[:, first:].unflatten(1, (H, W)).chunk(3, -1)
    (agents,) = split_heads(pooled_agents(patches[0], layer.agent_shape), heads, 1)
    to_keys, to_agents = layer.biases(H, W)
    scale = q.shape[3] ** -0.5
    collect = (agents @ k.mT * scale + to_keys).softmax(-1)
    spread = (q @ agents.mT * scale + to_agents).softmax(-1)
    local = layer.dwc(patches[2].permute(0, 3, 1, 2)).flatten(2).mT
    out = (spread @ (collect @ v)).transpose(1, 2).flatten(2) + F.pad(local, (0, 0, first, 0))
    weights, axes = spread @ collect, OF_TOKENS
    if x.ndim == 4:
        weights, axes, out = _on_map(weights, (H, W), (H, W)), ON_MAP, out.unflatten(1, (H, W))
    steps = {
        "collect": _on_map(collect[..., first:], layer.agent_shape, (H, W)),
        "spread": _on_map(spread[:, :, first:], (H, W), layer.agent_shape),
    }
    maps = [Map("attention", weights, axes), *(Map(kind, each, ON_MAP) for kind, each in steps.items())]
    return maps, layer.proj(out)


def _on_map(weights: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    return weights.unflatten(3, keys).unflatten(2, queries)


def _merged(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, heads, N, d) to (B, H, W, C)."""
    return x.transpose(1, 2).flatten(2).unflatten(1, tuple(size))


# Local attention


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
        found.append(logits.softmax(-1).flatten(2, 3))
        counted.append((logits[0, 0] > -torch.inf).flatten(0, 1))
        places.append(group.keys[:, None].expand(-1, logits.shape[3], -1).flatten(0, 1))
    weights, keys = torch.cat(found, 2)[:, :, plan.inverse], torch.cat(places)[plan.inverse]
    counts = torch.cat(counted)[plan.inverse]
    # Tiles share a window: of its keys each query has some.
    order = counts.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.sum(1).max())]
    keys, counts = keys.gather(1, order), counts.gather(1, order)
    weights = weights.gather(3, order.expand(*weights.shape[:3], -1))
    out = torch.einsum("bhnk,bhnkd->bhnd", weights, v[:, :, keys])
    width = key_grid[1] + 2 * shift if shift else key_grid[1] + plan.padding[1]
    keys = torch.stack([keys // width - shift, keys % width - shift], -1)
    keys = torch.where(counts[..., None], keys, NOWHERE).unflatten(0, size)
    return Map("attention", weights.unflatten(2, size), IN_WINDOWS, keys=keys, key_grid=key_grid), out


def _in_windows(qkv: Tensor, bias: Tensor | None, heads: int, window: int, scale: float) -> tuple[Map, Tensor]:
    size = tuple(qkv.shape[1:3])
    plan = local_plan((window_axis, graph_window_axis), size, ((window,), (window,)), qkv.device)
    found, out = _local(*padded_heads(qkv, bias, heads, plan), plan, None, scale, size, size)
    return found, _merged(out, size)


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
    return [found], layer.proj(_merged(out, size))


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
        outs.append(_merged(out, size) + in_stripes(layer.lepe[i], values[i], rows, cols).permute(0, 2, 3, 1))
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
        weights = (q @ k.mT * layer.scale).softmax(-1)
        maps.append(Map("attention", _on_map(weights, x.shape[1:3], pooled.shape[1:3]), ON_MAP, "low"))
        outs.append(layer.l_proj(_merged(weights @ v, x.shape[1:3])))
    return maps, layer.proj_drop(torch.cat(outs, -1))


def hybrid_scale_attention(layer: HybridScaleAttention, x: Tensor) -> Explained:
    size, heads, w = tuple(x.shape[1:3]), layer.num_heads // 2, layer.window_size
    halves, summary = layer.q(x).chunk(2, -1), layer.summary(x)
    (q,), (k, v) = split_heads(halves[0], heads, 1), split_heads(layer.global_kv(summary), heads, 2)
    weights = (q @ k.mT * layer.scale).softmax(-1)
    wide = Map("attention", _on_map(weights, size, summary.shape[1:3]), ON_MAP, "global")
    out = _merged(weights @ v, size)
    (q, k, v), inside = windows_of(torch.cat([halves[1], layer.local_kv(x)], -1), heads, w)
    mask = None if inside is None else inside[:, None, None]
    weights = attention_weights(q, k, layer.scale, mask).to(v.dtype)
    local = of_windows((weights @ v).transpose(1, 2).flatten(2), w, *size)
    values = of_windows(weights.transpose(1, 2).flatten(2), w, *size).unflatten(3, (heads, -1)).permute(0, 3, 1, 2, 4)
    axes = torch.arange(size[0], device=x.device), torch.arange(size[1], device=x.device)
    row, col = (place[:, None] // w * w + torch.arange(w, device=x.device) for place in axes)
    row, col = torch.where(row < size[0], row, NOWHERE), torch.where(col < size[1], col, NOWHERE)
    keys = torch.stack(torch.broadcast_tensors(row[:, None, :, None], col[None, :, None, :]), -1).flatten(2, 3)
    near = Map("attention", values, IN_WINDOWS, "local", keys=keys, key_grid=size)
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
    return [found], layer.proj_drop(layer.proj(_merged(out, size)))


def cosine_attention(layer: CosineAttention, x: Tensor) -> Explained:
    (q, k, v, bias), size = layer.attended(layer.qkv(x)), x.shape[1:3]
    weights = (q @ k.mT + bias).softmax(-1)
    found = Map("attention", _on_map(weights, size, size), ON_MAP)
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
    weights = torch.cat([near.masked_fill(~inside, -torch.inf), far], -1).softmax(-1)
    learned = (unit @ layer.learnable_tokens + layer.learnable_bias) * inside
    y = torch.einsum("bhnj,bhnjd->bhnd", weights[..., : K * K] + learned, near_v) + weights[..., K * K :] @ pooled_v

    own = torch.cartesian_prod(*(torch.arange(side, device=x.device) for side in size)).unflatten(0, size)
    step = torch.cartesian_prod(*(torch.arange(K, device=x.device) - K // 2,) * 2)
    beside = (own[:, :, None] + step).masked_fill(~inside.unflatten(0, size)[..., None], NOWHERE)
    pools = (bins(torch.arange(n, device=x.device), m, n) for m, n in zip(size, pooled_size, strict=True))
    middles = [(start + end - 1) // 2 for start, end in pools]
    keys = torch.cat([beside, torch.cartesian_prod(*middles).expand(*size, -1, -1)], 2)
    maps = [
        Map("attention", weights.unflatten(2, size), IN_WINDOWS, keys=keys, key_grid=size),
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
    return [found], layer.pool(_merged(out, size).permute(0, 3, 1, 2))


def context_mixing(
    layer: ContMix2d, x: Tensor, context: Tensor | None = None, value: Tensor | None = None
) -> Explained:
    """Taps of dynamic kernels, which sum to 1, on the map that the layer enlarges where it is too small for them."""
    q, keys, values = layer.prepare(x, context, value)
    size, maps, halves = tuple(q.shape[2:4]), [], []
    biases = layer.biases(size, q.dtype)
    parts = zip(("small", "large"), layer.kernel_sizes, keys, values, biases, strict=True)
    for part, K, k, v, bias in parts:
        weights = (q.flatten(2, 3) @ k.mT + bias.flatten(1, 2)).softmax(-1)
        rows, cols = (window_starts(n, K, x.device)[:, None] + torch.arange(K, device=x.device) for n in size)
        rows, cols = (t.expand(*size, K, K) for t in (rows[:, None, :, None], cols[None, :, None, :]))
        places = torch.stack([rows, cols], -1).flatten(2, 3)  # (H, W, K^2, 2)
        seen = v.flatten(2, 3)[:, :, (places[..., 0] * size[1] + places[..., 1]).flatten(0, 1)]
        out = torch.einsum("bgnk,bgnkd->bgdn", weights, seen)
        halves.append(out.flatten(1, 2).unflatten(2, size))
        maps.append(Map("attention", weights.unflatten(2, size), IN_WINDOWS, part, keys=places, key_grid=size))
    return maps, pooled(torch.cat(halves, 1), tuple(x.shape[2:]))


# Gates, modulators and kernels


def focal_modulation(layer: FocalModulation, x: Tensor) -> Explained:
    q, modulator, gates = layer.modulate(x)
    maps = [
        Map("modulator", modulator.permute(0, 3, 1, 2), GATE),
        Map("gate", gates.permute(0, 3, 1, 2), ("batch", "level", "row", "col")),
    ]
    return maps, layer.proj_drop(layer.proj(layer.norm(q * modulator)))


def large_kernel_attention(layer: LargeKernelAttention, x: Tensor) -> Explained:
    gate = layer.pointwise(layer.dilated(layer.depthwise(x)))
    return [Map("gate", gate, GATE)], x * gate


def recursive_gated_conv(layer: RecursiveGatedConv, x: Tensor) -> Explained:
    y, q = layer.proj_in(x).split([layer.dims[0], sum(layer.dims)], 1)
    gates = (layer.scale * layer.filter(q)).split(layer.dims, 1)
    y = y * gates[0]
    for project, gate in zip(layer.pws, gates[1:], strict=True):
        y = project(y) * gate
    return [Map("gate", gate, GATE, str(i)) for i, gate in enumerate(gates, 1)], layer.proj_out(y)


def attentive_conv(layer: AttentiveConv2d, x: Tensor) -> Explained:
    kernels, (B, C, H, W), K = layer.kernels(x), x.shape, layer.kernel_size
    patches = F.unfold(layer.x_proj(x), K, padding=K // 2).view(B, C, K * K, H, W)
    out = torch.einsum("bck,bckyx->bcyx", kernels.flatten(2), patches)
    return [Map("kernel", kernels, ("batch", "channel", "kernel_row", "kernel_col"))], layer.proj(out)


def partial_channel_attention(layer: PartialChannelAttention, x: Tensor) -> Explained:
    parts = x.split(layer.widths, 1)
    var, mean = torch.var_mean(parts[1], (2, 3))
    statistics = torch.stack([mean, var.clamp(min=1e-12).sqrt()], -1).flatten(1)
    gate = F.hardsigmoid(layer.gate_norm(layer.gate(statistics)))
    scaled = gate if layer.scale is None else gate * layer.scale  # of a norm that was merged
    gated = layer.norm(parts[1] * scaled[:, :, None, None])
    gated = gated if layer.shift is None else gated + layer.shift
    return [Map("gate", gate, ("batch", "channel"))], torch.cat([layer.conv(parts[0]), gated], 1)


def partial_spatial_attention(layer: PartialSpatialAttention, x: Tensor) -> Explained:
    gated, mixed = x.split(layer.widths, 1)
    gate = F.hardsigmoid(layer.gate(gated))
    return [Map("gate", gate, GATE)], torch.cat([layer.norm1(gated * gate), layer.mix(layer.norm2(mixed))], 1)


def _of_tokens(entry: Callable[..., Explained], first: bool = False) -> Callable[..., Explained]:
    """The function of a layer on sequences, of one on maps (B, H, W, C), or (B, C, H, W) with `first`."""

    @wraps(entry)
    def explain(layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> Explained:
        x = x.unflatten(1, tuple(grid))
        maps, out = entry(layer, x.permute(0, 3, 1, 2) if first else x)
        return maps, (out.permute(0, 2, 3, 1) if first else out).flatten(1, 2)

    return explain


def _channels_last(entry: Callable[..., Explained]) -> Callable[..., Explained]:
    """The function of a layer on maps (B, H, W, C), of one on (B, C, H, W)."""

    @wraps(entry)
    def explain(layer: nn.Module, x: Tensor) -> Explained:
        maps, out = entry(layer, x.permute(0, 3, 1, 2))
        return maps, out.permute(0, 2, 3, 1)

    return explain


LAYERS: dict[type[nn.Module], Callable[..., Explained]] = {
    SelfAttention: self_attention,
    MixtureOfHeadAttention: mixture_of_head_attention,
    AgentAttention: agent_attention,
    CausalSelfAttention: causal_attention,
    GatedPositionalSelfAttention: gated_attention,
    SparseAttention: sparse_attention,
    PartialSelfAttention: partial_self_attention,
    NormAwareLinearAttention: norm_aware_attention,
    NormAwareMixer: _channels_last(norm_aware_attention),
    ChannelAttention: channel_attention,
    FlowAttention: flow_attention,
    WindowAttention2d: window_attention,
    ShiftedWindowAttention2d: shifted_window_attention,
    StripeAttention2d: stripe_attention,
    HiLoAttention: hilo_attention,
    HybridScaleAttention: hybrid_scale_attention,
    SelfGuidedAttention: self_guided_attention,
    GlobalEnhancedAttention: enhanced_attention,
    NeighborhoodAttention2d: neighborhood_attention,
    TokenNeighborhoodAttention: _of_tokens(neighborhood_attention),
    CosineAttention: cosine_attention,
    AggregatedAttention: aggregated_attention,
    HaloAttention2d: halo_attention,
    ContMix2d: context_mixing,
    FocalModulation: focal_modulation,
    TokenFocalModulation: _of_tokens(focal_modulation),
    LargeKernelAttention: large_kernel_attention,
    RecursiveGatedConv: recursive_gated_conv,
    GatedConvMixer: _channels_last(recursive_gated_conv),
    AttentiveConv2d: attentive_conv,
    AttentiveMixer: _channels_last(attentive_conv),
    TokenAttentiveConv2d: _of_tokens(attentive_conv, first=True),
    PartialChannelAttention: partial_channel_attention,
    PartialSpatialAttention: partial_spatial_attention,
}
"""How the maps of a layer are computed: `f(layer, *inputs)` returns them, and the output made of them."""
