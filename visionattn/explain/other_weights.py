"""Attention of all tokens to all by weights that are no softmax of queries and keys alone."""

import torch
from torch import Tensor

from ..layers import CogAttention, KeyDrivenGQA, LinearLogNormalAttention
from ..layers.cog_attention import signed_softmax
from ..layers.key_driven_gqa import owners
from ..layers.log_normal_attention import features
from .map import OF_TOKENS, Explained, Map


def cog_attention(
    layer: CogAttention, x: Tensor, grid: tuple[int, int] | None = None, mask: Tensor | None = None
) -> Explained:
    """Rows sum to 1 without their signs."""
    q, k, v = layer.heads(x)
    logits = q @ k.mT * layer.scale
    weights, size = signed_softmax(logits, mask), logits.abs()
    size = size if mask is None else size.masked_fill(~mask, -torch.inf)
    return [Map("attention", weights, OF_TOKENS, logits=size)], layer.merge(weights @ v)


def log_normal_attention(layer: LinearLogNormalAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Explained:
    """Of all tokens and inside blocks, by maps of their own: what is learned adds them channel by channel."""
    q, k, v = layer.heads(x)
    queries, keys = features(layer, q, k)
    weights = queries @ keys.mT
    weights = weights / (weights.sum(-1, keepdim=True) + layer.eps)
    if not layer.block_diagonal:
        return [Map("attention", weights, OF_TOKENS)], layer.proj((weights @ v).transpose(1, 2).flatten(2))
    (_, W), (height, width) = layer.blocks(x.shape[1], grid)
    place = torch.arange(x.shape[1], device=x.device)
    block = place // W // height * W + place % W // width
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(block[:, None] != block, -torch.inf)
    near = logits.softmax(-1)
    maps = [Map("attention", weights, OF_TOKENS, "linear"), Map("attention", near, OF_TOKENS, "blocks", logits=logits)]
    return maps, layer.proj(layer.combine(weights @ v, near @ v).transpose(1, 2).flatten(2))


def key_driven_gqa(
    layer: KeyDrivenGQA, x: Tensor, grid: tuple[int, int] | None = None, noise: Tensor | None = None
) -> Explained:
    """By the keys that heads share; of a layer that keeps who shares them, as it was last."""
    q, k, v = layer.heads(x)
    K, h = layer.num_kv_heads, layer.num_heads
    if layer.kind == "kdgqa":
        runs = layer.allocate(k)
    else:
        runs = layer.allocation[None] if layer.keeps else torch.full((1, K), h // K, device=x.device)
    owner = owners(runs, h).expand(len(x), -1)
    sample = torch.arange(len(x), device=x.device)[:, None]
    logits = q @ k[sample, owner].mT * q.shape[3] ** -0.5
    weights = logits.softmax(-1)
    return [Map("attention", weights, OF_TOKENS, logits=logits)], layer.merge(weights @ v[sample, owner], noise)
