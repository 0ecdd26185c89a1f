"""Attention with an additive bias that is trained."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel

from .direct import in_own_precision, is_direct, replayed, replays
from .heads import empty_side_by_side

MIN_PAIRS = 2**12
"""Pairs of a head below which fused attention takes less time to begin."""


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """F.scaled_dot_product_attention with a bias. Where one is trained, that computes the definition on CPUs, with more
    passes over all pairs than it needs.

    Args:
        q: queries (B, heads, N, d).
        k: keys (B, heads, M, d).
        v: values (B, heads, M, d_v).
        bias: (1, heads, N, M), or one that broadcasts otherwise.
        scale: factor of the logits.

    Returns:
        (B, heads, N, d_v).
    """
    if (
        torch.is_grad_enabled()
        and bias.requires_grad
        and is_direct(q, k, v, bias)
        and bias.shape == (1, q.shape[1], q.shape[2], k.shape[2])
        and q.shape[2] * k.shape[2] >= MIN_PAIRS
    ):
        return _BiasedAttention.apply(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


class _BiasedAttention(Function):
    """By products that start from the bias, keep the weights, and write image by image where the results belong."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        B, heads, N, _ = q.shape
        weights, out = bias.expand(B, -1, -1, -1).clone(), q.new_empty(B, N, heads, v.shape[-1]).transpose(1, 2)
        for i in range(B):
            weights[i].baddbmm_(q[i], k[i].mT, alpha=scale)
        torch._softmax(weights, 3, False, out=weights)
        for i in range(B):
            torch.bmm(weights[i], v[i], out=out[i])
        ctx.save_for_backward(q, k, v, bias, weights)
        ctx.scale = scale
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, weights = ctx.saved_tensors
        if replays(grad):

            def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH):  # the others on CPUs have no second derivative
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=ctx.scale)

            return *replayed(plain, inputs, ctx.needs_input_grad[:4], grad), None
        q, k, v, _ = inputs
        dq, dk, dv = (x.transpose(1, 2) for x in empty_side_by_side(q, k, v))
        dlogits = torch.empty_like(weights)
        for i in range(len(q)):
            torch.bmm(grad[i], v[i].mT, out=dlogits[i])
            torch.bmm(weights[i].mT, grad[i], out=dv[i])
        torch._softmax_backward_data(dlogits, weights, 3, weights.dtype, grad_input=dlogits)
        for i in range(len(q)):
            torch.baddbmm(dq[i], dlogits[i], k[i], beta=0, alpha=ctx.scale, out=dq[i])
            torch.baddbmm(dk[i], dlogits[i].mT, q[i], beta=0, alpha=ctx.scale, out=dk[i])
        return dq, dk, dv, dlogits.sum(0, keepdim=True), None
