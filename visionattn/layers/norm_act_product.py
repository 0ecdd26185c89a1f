"""Batch norm, activation and a product over channels, with the least that a backward pass needs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .direct import is_direct, is_watched
from .fuse import is_batch_norm, scale_and_shift
from .pointwise import Pointwise2d
from .product import product as multiply


def is_learning(norm: nn.Module) -> bool:
    """Whether `norm` is a plain batch norm that is being trained."""
    plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.momentum is not None
    return plain and norm.training and norm.track_running_stats


def norm_act_product(norm: nn.Module, act: nn.Module, product: Pointwise2d, x: Tensor) -> Tensor:
    """product(act(norm(x))) of (B, C, H, W), of which training keeps nothing but x.

    Args:
        norm: batch norm.
        act: ReLU or GELU; others are computed one module after the other.
        product: without bias.
        x: output of a product.
    """
    relu = type(act) is nn.ReLU
    if (
        is_learning(norm)
        and (relu or (type(act) is nn.GELU and act.approximate == "none"))
        and torch.is_grad_enabled()
        and type(product) is Pointwise2d
        and product.bias is None
        and is_direct(x, norm.weight, norm.bias, product.weight)
        and x.numel() > x.shape[1]
        and not is_watched(norm, act, product)
    ):
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        statistics = norm.running_mean, norm.running_var, norm.momentum, norm.eps
        return _NormActProduct.apply(x, norm.weight, norm.bias, product.weight, relu, statistics)
    return product(act(norm(x)))


def learn(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A learning norm as x * scale + shift, for statistics that are known without a pass over x; notes these.

    Args:
        norm: for which `is_learning` holds.
        mean: of every channel.
        var: of every channel, with the divisor `count`.
        count: of the values of a channel.
    """
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale


class _NormActProduct(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, relu: bool, statistics: tuple) -> Tensor:
        *running, momentum, eps = statistics
        y, mean, inverse = torch.native_batch_norm(x, gamma, beta, *running, True, momentum, eps)
        y = y.relu_() if relu else torch.ops.aten.gelu_(y)
        ctx.save_for_backward(x, gamma, beta, weight, mean, inverse)
        ctx.relu, ctx.eps = relu, eps
        return F.linear(y.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, mean, inverse = ctx.saved_tensors
        act = F.relu if ctx.relu else F.gelu
        if torch.is_grad_enabled():  # the gradients will be differentiated
            inputs, wanted = (x, gamma, beta, weight), ctx.needs_input_grad[:4]
            y = act(F.batch_norm(x, None, None, gamma, beta, True, 0.0, ctx.eps)).permute(0, 2, 3, 1)
            out = F.linear(y, weight).permute(0, 3, 1, 2)
            needed = [t for t, want in zip(inputs, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
            return *(next(found) if want else None for want in wanted), None, None
        scale = gamma * inverse
        y = torch.addcmul((beta - mean * scale)[:, None, None], x, scale[:, None, None])
        rows, dy = grad.permute(0, 2, 3, 1).flatten(0, 2), None
        dy = (rows @ weight).view(*x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        if ctx.relu:
            dweight = rows.t() @ y.relu_().permute(0, 2, 3, 1).flatten(0, 2)
            torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)
        else:
            dweight = rows.t() @ F.gelu(y).permute(0, 2, 3, 1).flatten(0, 2)
            torch.ops.aten.gelu_backward.grad_input(dy, y, grad_input=dy)
        dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            dy, x, gamma, None, None, mean, inverse, True, ctx.eps, [True, True, True]
        )
        return dx, dgamma, dbeta, dweight, None, None


def is_frozen(norm: nn.Module, x: Tensor, *products: nn.Module) -> bool:
    """Whether a batch norm is an affine function that these products around it may take in on the fly, as nobody wants
    gradients or sees what they return."""
    return (
        not torch.is_grad_enabled()
        and type(norm) is nn.BatchNorm2d
        and not norm.training
        and is_batch_norm(norm)
        and is_direct(x, norm.running_mean, *(product.weight for product in products))
        and not is_watched(norm, *products)
    )


def activated(act: nn.Module, x: Tensor, *makers: nn.Module) -> Tensor:
    """act(x), in place of x where nobody else has it.

    Args:
        makers: modules, one of which returned x.
    """
    plain = type(act) is nn.GELU and act.approximate == "none"
    if plain and not torch.is_grad_enabled() and is_direct(x) and not is_watched(act, *makers):
        return torch.ops.aten.gelu_(x)
    return act(x)


def normed_product(norm: nn.Module, product: Pointwise2d, x: Tensor) -> Tensor:
    """product(norm(x)) of (B, C, H, W), of a product without bias; a norm that is frozen comes with it."""
    if not is_frozen(norm, x, product) or not pays(product, x):
        return product(norm(x))
    scale, shift = (t.to(x.dtype) for t in scale_and_shift(norm))
    weight, bias = product.weight * scale, product.weight @ shift
    return multiply(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def pays(product: nn.Conv2d | Pointwise2d, x: Tensor) -> bool:
    """Whether a pass over the parameters of a product costs less than one over the map that it makes of `x`."""
    stride = product.stride[0] * product.stride[1] if isinstance(product, nn.Conv2d) else 1
    return x.shape[0] * x.shape[2] * x.shape[3] // stride > product.weight[0].numel()
