"""Attention of all places to all, and between channels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import (
    AgentAttention,
    CausalSelfAttention,
    ChannelAttention,
    FlowAttention,
    GatedPositionalSelfAttention,
    MixtureOfHeadAttention,
    NormAwareLinearAttention,
    PartialSelfAttention,
    ReducedAttention,
    ReversedAttention,
    SelfAttention,
    SelfGuidedAttention,
    SparseAttention,
)
from ..layers.agent_attention import pooled
from ..layers.causal_attention import rotary_table, rotate
from ..layers.channel_attention import ROLES
from ..layers.flow_attention import capacities, flows
from ..layers.heads import split_heads
from ..layers.mixture_of_head import head_gates
from ..layers.norm_aware_attention import turned_heads
from ..layers.partial_attention import distance_buckets
from ..layers.reversed_attention import gates as reversed_gates
from ..layers.self_guided_attention import (
    GlobalEnhancedAttention,
    guided_heads,
    merged_tokens,
    section_bounds,
    significance_order,
)
from .map import HEAD_GATE, OF_TOKENS, ON_MAP, Explained, Map, merged, on_map


def self_attention(layer: SelfAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    """Clipped weights do not sum to 1."""
    q, k, v = layer.heads(x)
    logits = q @ k.mT * layer.scale
    weights = layer.weigh(logits)
    maps, y = [Map("attention", weights, OF_TOKENS, logits=logits)], weights @ v
    if layer.gate is not None:
        gate = layer.gate(x).to(y.dtype)
        maps.append(Map("gate", gate.squeeze(3).expand(weights.shape[:3]), ("batch", "head", "query")))
        y = y * gate
    return maps, layer.merge(y)


def reduced_attention(layer: ReducedAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    """The tokens of "super" are mixed first: its weights are the product of both steps, and rows do not sum to 1."""
    q, k, v = layer.heads(x)
    logits = q @ k.mT * q.shape[3] ** -0.5
    weights = logits.softmax(-1)
    of_input = weights if layer.align is None else weights @ layer.align.weight
    return [Map("attention", of_input, OF_TOKENS, logits=logits)], layer.merge(weights @ v)


def reversed_attention(
    layer: ReversedAttention,
    x: Tensor,
    message: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    return_dependency: bool = False,
) -> Explained:
    """A query is who receives; what a key has to say sums to its message over all queries and heads."""
    q, k, v = layer.heads(x)
    gate, _ = reversed_gates(layer, x, message)
    weights = (gate * layer.weights(q, k)).mT
    logits = q @ k.mT * layer.scale  # a row is who a message is spread over
    return [Map("attention", weights, OF_TOKENS, logits=logits)], layer.merge(weights @ v)


def mixture_of_head_attention(
    layer: MixtureOfHeadAttention, x: Tensor, grid: tuple[int, int] | None = None
) -> Explained:
    q, k, v = layer.heads(x)
    logits, gates = q @ k.mT * layer.scale, head_gates(layer.router, x)
    weights = logits.softmax(-1)
    placed = [] if grid is None else [Map("gate", gates.squeeze(3).unflatten(2, tuple(grid)), HEAD_GATE)]
    return [Map("attention", weights, OF_TOKENS, logits=logits), *placed], layer.merge(weights @ v * gates)


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
    logits = rotate(q, cos, sin) @ rotate(k, cos, sin).mT * layer.scale
    weights = logits.softmax(-1)
    weights = weights.tril() + soft_mask_rate * weights.triu(1)
    return [Map("attention", weights, OF_TOKENS, logits=logits)], layer.merge(weights @ v)


def soft_causal_attention(layer: CausalSelfAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    """That with the mask that the layer has in evaluation."""
    return causal_attention(layer, x, soft_mask_rate=layer.soft_mask_rate)


def gated_attention(layer: GatedPositionalSelfAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    B, N, C = x.shape
    H, W = grid or (int(N**0.5),) * 2
    q, k = split_heads(layer.qk(x), layer.num_heads, 2)
    (v,) = split_heads(layer.v(x), layer.num_heads, 1)
    logits = q @ k.mT * layer.scale
    content = logits.softmax(-1)
    place = torch.arange(N, device=x.device)
    dx, dy = (p - p[:, None] for p in (place % W, place // W))
    offsets = torch.stack([dx, dy, dx**2 + dy**2], -1).to(layer.pos_proj.weight.dtype)
    position = layer.pos_proj(offsets).permute(2, 0, 1).softmax(-1).expand(B, -1, -1, -1)
    gate = layer.gating_param.sigmoid()
    weights = (1 - gate[:, None, None]) * content + gate[:, None, None] * position
    out = (weights @ v).transpose(1, 2).reshape(B, N, C)
    maps = [
        Map("attention", weights, OF_TOKENS),
        Map("content", content, OF_TOKENS, logits=logits),
        Map("position", position, OF_TOKENS),
        Map("gate", gate, ("head",)),
    ]
    return maps, layer.proj_drop(layer.proj(out))


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
    masked = logits.masked_fill(~mask, -torch.inf)
    weights = masked.softmax(-1).nan_to_num(0)  # queries without a key have none
    if dropped := predictor.patches(grid) + 1 - num_keys:
        of_class = torch.cat([logits[:, :, :1], logits.new_zeros(*logits.shape[:2], 1, dropped)], -1)
        weights = torch.cat([of_class.softmax(-1)[..., :num_keys], weights[:, :, 1:]], 2)
    attention = Map("attention", weights, OF_TOKENS, patches=kept, logits=masked)
    maps = [attention, Map("mask", mask, OF_TOKENS, patches=kept)]
    return maps, layer.merge(weights @ v)


def partial_self_attention(layer: PartialSelfAttention, x: Tensor) -> Explained:
    parts = x.split(layer.widths, 1)
    (H, W), heads = x.shape[2:], layer.num_heads
    q, k, v = split_heads(layer.qkv(layer.norm(parts[1].permute(0, 2, 3, 1))), heads)
    bias = layer.rpb[:, distance_buckets(H, W, layer.rpe, x.device)]
    logits = q @ k.mT * q.shape[3] ** -0.5 + bias
    weights = logits.softmax(-1)
    out = layer.proj_drop(layer.proj(merged(weights @ v, (H, W)))).permute(0, 3, 1, 2)
    maps = [Map("attention", on_map(weights, (H, W), (H, W)), ON_MAP, logits=logits)]
    return maps, torch.cat([layer.conv(parts[0]), out], 1)


def norm_aware_attention(layer: NormAwareLinearAttention, x: Tensor) -> Explained:
    """With its linear kernel rows do not sum to 1, and weights may be negative."""
    qkv, gate = layer.project(x)
    q, k, v, z = turned_heads(layer, qkv)
    logits = q @ k.mT * q.shape[-1] ** -0.5 if z is None else None
    weights = z * (q @ k.mT).sum(0) / v.shape[2] if logits is None else logits.softmax(-1)
    size = x.shape[2:]
    maps = [Map("attention", on_map(weights, size, size), ON_MAP, logits=logits)]
    return maps, layer.merge(merged(weights @ v, size).to(x.dtype), qkv, gate)


def enhanced_attention(layer: GlobalEnhancedAttention, x: Tensor) -> Explained:
    (q,), (k, v) = split_heads(layer.q(x), layer.num_heads, 1), split_heads(layer.kv(x), layer.num_heads, 2)
    logits, size = q @ k.mT * layer.scale, x.shape[1:3]
    weights = logits.softmax(-1)
    maps = [Map("attention", on_map(weights, size, size), ON_MAP, logits=logits)]
    return maps, layer.merge(merged(weights @ v, size), x)


def self_guided_attention(layer: SelfGuidedAttention, x: Tensor, significance: Tensor) -> Explained:
    """The positions that a token is merged of share what it is weighed by."""
    (q,) = split_heads(layer.q(x), layer.num_heads, 1)
    k, v = guided_heads(layer, layer.kv(merged_tokens(layer, x, significance)))
    logits, size = q @ k.mT * layer.scale, x.shape[1:3]
    weights = logits.softmax(-1)
    order, token, first = significance_order(significance), [], 0  # of each rank, its token
    for (start, end, groups), (_, group) in zip(section_bounds(layer, order.shape[1]), layer.sections, strict=True):
        rank = torch.arange(groups * group - (end - start), groups * group, device=x.device)
        token.append(first + rank // group)
        first += groups
    token = torch.cat(token)
    shares = (weights / token.bincount(minlength=first))[..., token]
    values = torch.empty_like(shares).scatter_(3, order[:, None, None].expand_as(shares), shares)
    maps = [Map("attention", on_map(values, size, size), ON_MAP, logits=logits)]
    return maps, layer.merge(merged(weights @ v, size), x)


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
    return [Map("attention", on_map(weights, size, size), ON_MAP), gates], out


def channel_attention(layer: ChannelAttention, x: Tensor) -> Explained:
    parts = split_heads(layer.qkv(x), layer.num_heads)
    first, second, mixed = (parts[i] for i in ROLES[layer.version])
    scale = first.shape[3 if layer.version == 1 else 2] ** -0.5
    logits = first.mT @ second * scale
    weights = logits.softmax(-1)
    out = (mixed @ weights.mT).transpose(1, 2).reshape(x.shape)
    axes = "batch", "head", "query_channel", "key_channel"
    return [Map("attention", weights, axes, logits=logits)], layer.proj(out)


def agent_attention(layer: AgentAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    """Attention of queries to keys is the product of both steps, which have maps of their own."""
    qkv, heads, first = layer.qkv(x).flatten(1, -2), layer.num_heads, int(layer.class_token)
    H, W = tuple(x.shape[1:3]) if x.ndim == 4 else grid or (math.isqrt(x.shape[1] - first),) * 2
    q, k, v = split_heads(qkv, heads)
    patches = qkv[:, first:].unflatten(1, (H, W)).chunk(3, -1)
    (agents,) = split_heads(pooled(patches[0], layer.agent_shape), heads, 1)
    to_keys, to_agents = layer.biases(H, W)  # (heads, agents, N) both
    scale = q.shape[3] ** -0.5
    logits = {"collect": agents @ k.mT * scale + to_keys, "spread": q @ agents.mT * scale + to_agents.mT}
    collect, spread = (each.softmax(-1) for each in logits.values())
    local = layer.dwc(patches[2].permute(0, 3, 1, 2)).flatten(2).mT
    out = (spread @ (collect @ v)).transpose(1, 2).flatten(2) + F.pad(local, (0, 0, first, 0))
    weights, axes = spread @ collect, OF_TOKENS
    if x.ndim == 4:
        weights, axes, out = on_map(weights, (H, W), (H, W)), ON_MAP, out.unflatten(1, (H, W))
    steps = {
        "collect": on_map(collect[..., first:], layer.agent_shape, (H, W)),
        "spread": on_map(spread[:, :, first:], (H, W), layer.agent_shape),
    }
    maps = [
        Map("attention", weights, axes),
        *(Map(kind, each, ON_MAP, logits=logits[kind]) for kind, each in steps.items()),
    ]
    return maps, layer.proj(out)
