"""Attention between channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .direct import in_own_precision, is_direct, is_watched, replayed, replays
from .heads import check_heads, split_heads
from .pointwise import CHUNK, Pointwise
from .precision import without_autocast
from .product import product
from .symbolic import Size, is_symbolic

ROLES = {1: (1, 2, 0), 2: (0, 1, 2)}
"""Which of (q, k, v) are (first, second, mixed) in each version."""
LARGE = 2
"""Positions per channel from which on products of the weights cost less than they save."""


class ChannelAttention(nn.Module):
    """Self-attention in which the tokens are channels and their features are the whole map.

    "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645. Channels attend to those of their own group:

        A = softmax(scale * first^T second),    out = mixed A^T

    with (first, second, mixed) = (k, v, q) and scale d**-0.5 for groups of d channels in version 1, the paper's
    published weights, and (q, k, v) and N**-0.5 for N positions in version 2, Florence-2's. Global, yet linear in N.

    Cost: 4 N C^2 + 2 N C d multiply-adds for N positions, C channels and groups of d = C / num_heads.

    Args:
        dim: channels C.
        num_heads: groups of channels; must divide `dim`.
        qkv_bias: bias of the query, key and value projections.
        version: 1 or 2.

    Raises:
        ValueError: if `num_heads` does not divide `dim` or there is no such version.

    Shape:
        (B, ..., C) to (B, ..., C): maps (B, H, W, C) or sequences (B, N, C).

    Example:
        >>> import torch
        >>> ChannelAttention(64, num_heads=2)(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, version: int = 1, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if version not in (1, 2):
            raise ValueError(f"expected version 1 or 2, got {version}")
        self.num_heads = num_heads
        self.version = version
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = Pointwise(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _merged(self, x) if self._merges(x) else self.proj(_channel_attention(self, self.qkv(x)))

    def _merges(self, x: Tensor) -> bool:
        """Whether `_merged` computes this, and faster."""
        return (
            is_direct(x, *self.parameters())
            and not torch.is_grad_enabled()
            and type(self.qkv) is type(self.proj) is Pointwise
            and (self.qkv.out_features, self.proj.out_features) == (3 * x.shape[-1], x.shape[-1])
            and x.numel() >= max(1, len(x)) * LARGE * x.shape[-1] ** 2
            and not is_watched(self.qkv, self.proj)
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, version={self.version}"


@torch.fx.wrap
def _channel_attention(layer: ChannelAttention, qkv: Tensor) -> Tensor:
    """(B, ..., 3C) projections to (B, ..., C)."""
    if is_direct(qkv):
        return InPlaces.apply(qkv, layer.num_heads, layer.version)
    return _plain(qkv, layer.num_heads, layer.version)


def _plain(qkv: Tensor, heads: int, version: int) -> Tensor:
    parts = split_heads(qkv, heads)  # (3, B, heads, N, d)
    first, second, mixed = (parts[i] for i in ROLES[version])
    scale = first.shape[3] ** -0.5 if version == 1 else _rsqrt(first.shape[2], qkv)
    # The logits are sums over the map: in float32 at least. Fused attention would take N as its head dimension, which
    # its kernels do not.
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    with without_autocast(qkv):
        weights = (first.to(dtype).transpose(2, 3) @ second.to(dtype) * scale).softmax(3)
    out = mixed @ weights.to(mixed.dtype).transpose(2, 3)
    return out.transpose(1, 2).reshape(*qkv.shape[:-1], qkv.shape[-1] // 3)


class InPlaces(Function):
    """`_plain` and its gradient by products that read the projections and write results where they are, sample by
    sample, as those of a whole batch would have them copied first."""

    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int, version: int) -> Tensor:
        parts = split_heads(qkv.contiguous(), heads)
        first, second, mixed = (parts[i] for i in ROLES[version])
        B, _, N, d = first.shape
        scale = (d if version == 1 else N) ** -0.5
        weights, out = qkv.new_empty(B, heads, d, d), qkv.new_empty(B, N, heads, d)
        for i in range(B):
            torch.bmm(first[i].transpose(1, 2), second[i], out=weights[i])
        weights = _softmax(weights.mul_(scale))
        for i in range(B):
            torch.bmm(mixed[i], weights[i].transpose(1, 2), out=out[i].transpose(0, 1))
        ctx.save_for_backward(qkv, weights)
        ctx.heads, ctx.version, ctx.scale = heads, version, scale
        return out.view(*qkv.shape[:-1], qkv.shape[-1] // 3)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, weights = ctx.saved_tensors
        if replays(grad):
            return *replayed(lambda qkv: _plain(qkv, ctx.heads, ctx.version), [qkv], [True], grad), None, None
        dqkv, dweights = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(weights)
        first, second, mixed = (split_heads(qkv.contiguous(), ctx.heads)[i] for i in ROLES[ctx.version])
        dfirst, dsecond, dmixed = (split_heads(dqkv, ctx.heads)[i] for i in ROLES[ctx.version])
        (grad,) = split_heads(grad.contiguous(), ctx.heads, 1)
        for i in range(len(qkv)):
            torch.bmm(grad[i], weights[i], out=dmixed[i])
            torch.bmm(grad[i].transpose(1, 2), mixed[i], out=dweights[i])
        dlogits = torch._softmax_backward_data(dweights, weights, 3, weights.dtype).mul_(ctx.scale)
        for i in range(len(qkv)):
            torch.bmm(second[i], dlogits[i].transpose(1, 2), out=dfirst[i])
            torch.bmm(first[i], dlogits[i], out=dsecond[i])
        return dqkv, None, None


def _softmax(logits: Tensor) -> Tensor:
    """Logits grow with the map. Weights that are too small to count, or no normal numbers, slow products down."""
    return F.threshold_(logits.softmax(-1), torch.finfo(logits.dtype).eps ** 3, 0.0)


def _merged(layer: ChannelAttention, x: Tensor) -> Tensor:
    """What the layer computes, outside autograd, without a tensor of all projections: the logits are summed up over
    parts of the map, and what comes after them is one linear map of the input."""
    (B, *_, C), heads, first = x.shape, layer.num_heads, ROLES[layer.version][0]
    x, out = x.contiguous().view(B, -1, C), torch.empty_like(x, memory_format=torch.contiguous_format)
    pair = slice(first * C, (first + 2) * C)  # the first and the second are neighbours
    mixed = ROLES[layer.version][2] * C
    weight, bias = layer.qkv.weight, layer.qkv.bias
    scale = (C // heads if layer.version == 1 else x.shape[1]) ** -0.5
    for x_i, out_i in zip(x, out.view(x.shape), strict=True):
        logits = x.new_zeros(heads, C // heads, C // heads)
        for rows in x_i.split(max(1, CHUNK // (2 * C * x.itemsize))):
            projected = product(rows, weight[pair], None if bias is None else bias[pair])
            one, two = split_heads(projected[None], heads, 2)[:, 0]
            logits.baddbmm_(one.mT, two, alpha=scale)
        attention = _softmax(logits)
        to_out = layer.proj.weight @ (attention @ weight[mixed : mixed + C].view(heads, -1, C)).flatten(0, 1)
        shift = layer.proj.bias
        if bias is not None:
            moved = layer.proj.weight @ (attention @ bias[mixed : mixed + C].view(heads, -1, 1)).flatten()
            shift = moved if shift is None else shift + moved
        out_i.copy_(product(x_i, to_out, shift))
    return out


def _rsqrt(size: Size, x: Tensor) -> float | Tensor:
    """1 / sqrt(size). Of a size that the graph leaves open by a tensor: powers of a size are integers in ONNX."""
    return torch.full((1,), size, dtype=torch.float32, device=x.device).rsqrt() if is_symbolic(size) else size**-0.5
