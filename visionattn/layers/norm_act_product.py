"""Batch norm, activation and a product over channels, with the least that a backward pass needs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .direct import in_own_precision, is_direct, is_watched, replayed, replays
from .fuse import is_batch_norm
from .pointwise import Pointwise2d
from .product import is_small
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
        # As torch's norms do, without a new version: a graph that one of these has made holds the statistics.
        norm.running_mean.data.lerp_(mean, norm.momentum)
        norm.running_var.data.lerp_(var * (count / (count - 1)), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale


class _NormActProduct(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, relu: bool, statistics: tuple) -> Tensor:
        *running, momentum, eps = statistics
        y, mean, inverse = torch.native_batch_norm(x, gamma, beta, *running, True, momentum, eps)
        y = _last(y).relu_() if relu else torch.ops.aten.gelu_(_last(y))
        ctx.save_for_backward(x, gamma, beta, weight, mean, inverse)
        ctx.relu, ctx.eps = relu, eps
        return F.linear(y, weight).permute(0, 3, 1, 2)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, mean, inverse = ctx.saved_tensors
        act = F.relu if ctx.relu else F.gelu
        if replays(grad):

            def plain(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
                y = act(F.batch_norm(x, None, None, gamma, beta, True, 0.0, ctx.eps)).permute(0, 2, 3, 1)
                return F.linear(y, weight).permute(0, 3, 1, 2)

            return *replayed(plain, [x, gamma, beta, weight], ctx.needs_input_grad[:4], grad), None, None
        scale = gamma * inverse
        y = _last(torch.addcmul((beta - mean * scale)[:, None, None], x, scale[:, None, None]))
        rows = _last(grad).flatten(0, 2)
        dy = (rows @ weight).view(y.shape)
        if ctx.relu:
            dweight = rows.t() @ y.relu_().flatten(0, 2)
            torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)
        else:
            dweight = rows.t() @ F.gelu(y).flatten(0, 2)
            torch.ops.aten.gelu_backward.grad_input(dy, y, grad_input=dy)
        dy = dy.permute(0, 3, 1, 2)
        dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            dy, x, gamma, None, None, mean, inverse, True, ctx.eps, [True, True, True]
        )
        return dx, dgamma, dbeta, dweight, None, None


WORTH = 2**18
"""Elements of a map from which on a pass over it costs more than to scale the parameters beside it."""

IN_PLACE = 2**16
"""Elements from which on to write over a map is faster than torch's norm and GELU, which take less time to begin."""


def is_frozen(norm: nn.Module, x: Tensor, *products: nn.Module, size: int | None = None) -> bool:
    """Whether a batch norm of a map like x is an affine function that may be computed otherwise, by these products
    around it for example, as nobody wants gradients or sees what they return, and the map has `size` elements.

    Args:
        size: `WORTH` if None.
    """
    return (
        not torch.is_grad_enabled()
        and type(norm) is nn.BatchNorm2d
        and not norm.training
        and is_direct(x)
        and x.numel() >= (WORTH if size is None else size)
        and norm.affine
        and is_batch_norm(norm)
        and is_direct(norm.running_mean, *[product.weight for product in products])
        and not is_watched(norm, *products)
    )


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A frozen norm as x * scale + shift, in its own precision."""
    scale = (norm.running_var + norm.eps).rsqrt_().mul_(norm.weight)
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


def norm_of_product(norm: nn.Module, product: nn.Module, y: Tensor) -> Tensor:
    """norm(y) for what a product returned, which is a map of its own. A frozen norm is computed in its place where that
    is fast: torch's takes some four times as long on channels_last memory, and half as long on other."""
    if not is_frozen(norm, y, product, size=IN_PLACE) or not y.is_contiguous(memory_format=torch.channels_last):
        return norm(y)
    scale, shift = affine(norm)
    rows = _last(y)
    torch.addcmul(shift, rows, scale, out=rows)
    return y


def activated(act: nn.Module, x: Tensor, *makers: nn.Module) -> Tensor:
    """act(x), in place of x where nobody else has it.

    Args:
        makers: modules, one of which returned x.
    """
    plain = type(act) is nn.GELU and act.approximate == "none" and not torch.is_grad_enabled()
    if plain and is_direct(x) and x.numel() >= IN_PLACE and not is_watched(act, *makers):
        torch.ops.aten.gelu_(_last(x))
        return x
    return act(x)


def small_mlp(fc1: nn.Module, norm: nn.Module, act: nn.Module, fc2: nn.Module, x: Tensor) -> Tensor | None:
    """fc2(act(norm(fc1(x)))) of a map (B, C, H, W) that is so small that calls of modules and choices between ways take
    as long as what they compute; None of others."""
    gelu = type(act) is nn.GELU and act.approximate == "none"
    if not (
        type(fc1) is type(fc2) is Pointwise2d
        and (gelu or type(act) is nn.ReLU)
        and is_frozen(norm, x, fc1, fc2, size=0)
        and is_small(x, fc1.out_features)
        and not is_watched(act)
    ):
        return None
    scale, shift = affine(norm)
    rows = F.linear(_last(x), fc1.weight, fc1.bias)
    torch.addcmul(shift, rows, scale, out=rows)
    if not gelu:
        rows = F.relu_(rows)
    elif rows.numel() >= IN_PLACE:
        torch.ops.aten.gelu_(rows)
    else:
        rows = F.gelu(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # see _last
    return F.linear(rows, fc2.weight, fc2.bias).permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H, W, C): torch's GELU is half as fast again on what is contiguous without a format, but
    takes longer to begin."""
    return x.permute(0, 2, 3, 1)


def normed_product(norm: nn.Module, product: Pointwise2d, x: Tensor) -> Tensor:
    """product(norm(x)) of (B, C, H, W), of a product without bias; a norm that is frozen comes with it."""
    if not is_frozen(norm, x, product):
        return product(norm(x))
    scale, shift = affine(norm)
    return multiply(_last(x), product.weight * scale, product.weight @ shift).permute(0, 3, 1, 2)
