"""Root mean square norm of channels that come last."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .direct import in_own_precision, is_direct, replayed, replays


class RmsNorm(nn.RMSNorm):
    """torch's, which is made of elementwise operations on a CPU, in fewer passes there.

    Shape:
        (..., C) to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.normalized_shape, self.weight, self.eps)


@torch.fx.wrap
def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None) -> Tensor:
    if weight is not None and eps is not None and len(shape) == 1 and is_direct(x, weight) and x.dtype == weight.dtype:
        if torch.is_grad_enabled():
            return _RmsNorm.apply(x, weight, eps)
        return (x * _scale(x, eps)).mul_(weight)
    return F.rms_norm(x, shape, weight, eps)


def _scale(x: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # in half the time of a mean of squares
    return torch.addcmul(x.new_full((), eps), length, length, value=1 / x.shape[-1]).rsqrt_()


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if replays(grad):

            def plain(x: Tensor, weight: Tensor) -> Tensor:
                return F.rms_norm(x, weight.shape, weight, ctx.eps)

            return *replayed(plain, [x, weight], ctx.needs_input_grad[:2], grad), None
        products = (grad * x).reshape(-1, x.shape[-1])
        dweight = products.t().mv(scale.view(-1))
        correction = products.mv(weight).view_as(scale).mul_(scale**3).div_(-x.shape[-1])
        return (grad * weight).mul_(scale).addcmul_(x, correction), dweight, None
