"""Batch norm of a product that expands channels, in training: without a pass over what is normed, which is not kept.

What a product W makes of inputs with mean m and covariance S has the means W m and the variances diag(W S W^T), and
the gradients of its norm are products of W and S likewise. Where C_in is a fraction of C_out these cost less than the
passes of a norm over the larger map, and of the norm and the sum with a shortcut only the input and the result stay.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import Function

from .direct import in_own_precision, is_direct, is_watched, replayed, replays
from .norm_act_product import is_learning, learn
from .pointwise import Pointwise2d
from .product import FUSED, product, takes_conv

EXPANSION = 2  # channels out per channel in from which on this is worth it
LEAST = 1e-3  # part of what the variance of a product's channel could be, below which it is not told by covariances
POSITIONS = 8  # per channel in, likewise: S costs C_in^2 for each, and what is made of S C_in^2 C_out


Term = tuple[Pointwise2d | nn.Conv2d, nn.BatchNorm2d, Tensor]
"""A product for which `is_summed` holds, a batch norm, and the map (B, C_in, H, W); a stride is left out."""


def is_summed(x: Tensor, products: Sequence[nn.Module], *parts: nn.Module | None) -> bool:
    """Whether, in training, `normed_sum` takes the place of products, their norms and what comes between and after.

    Args:
        x: a map that they compute with.
        products: which make the terms.
        parts: all modules that it takes the place of; stochastic depth has to be off.
    """
    if not torch.is_grad_enabled() or not all(map(_is_pointwise, products)):
        return False
    modules = [module for part in parts if part is not None for module in part.modules()]
    if any(isinstance(module, DropPath) for module in modules) or not any(map(is_learning, modules)):
        return False
    parameters = (p for module in modules for p in module.parameters(recurse=False))
    return is_direct(x, *parameters) and not is_watched(*modules)


def _is_pointwise(product: nn.Module) -> bool:
    """Whether a module is a product over channels, of every or of some positions, without bias."""
    if type(product) is nn.Conv2d:
        plain = product.kernel_size == (1, 1) and product.padding == (0, 0) and product.groups == 1
        return plain and product.bias is None
    return type(product) is Pointwise2d and product.bias is None


def normed_sum(terms: Sequence[Term], shortcut: Tensor | None, act: nn.Module) -> Tensor:
    """act of the sum of norm(product(x)) over the terms, and a shortcut, that are all direct and not watched."""
    flat, learned = [], []
    for product_, norm, x in terms:
        weight = product_.weight
        large = len(weight) >= EXPANSION * x.shape[1] and x.numel() >= POSITIONS * x.shape[1] ** 2
        if is_learning(norm) and large and (statistics := _statistics(x, weight)) is not None:
            flat += x, weight, norm.weight, norm.bias
            learned.append((norm, *statistics))
        else:
            y = norm(product(x.permute(0, 2, 3, 1), weight.flatten(1), None).permute(0, 3, 1, 2))
            shortcut = y if shortcut is None else y.add_(shortcut)  # no gradient needs what the norm returned
    if not learned:
        return act(shortcut)
    relu = type(act) is nn.ReLU
    y = _CovarianceNorm.apply(learned, relu, shortcut, *flat)
    return y if relu else act(y)


@torch.no_grad()
def _statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Mean and covariance of a map's channels, and the variance of each of the product's; None where that is what is
    left of larger numbers that cancel, of which it has the rounding."""
    w, rows = weight.flatten(1), _rows(x)
    centre = rows.mean(0)
    centred = rows - centre
    covariance = centred.t() @ centred / len(rows)
    spread = (w @ covariance).mul_(w).sum(1)
    most = (w.abs() @ covariance.diagonal().sqrt()).square()
    return (centre, covariance, spread) if (spread > LEAST * most).all() else None


def with_every(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """A map (B, C, H, W) and what a stride leaves of it, with one pass over the map for both gradients."""
    return (x, x) if stride == 1 else _WithEvery.apply(x, stride)


class _WithEvery(Function):
    @staticmethod
    def forward(ctx, x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        ctx.stride = stride
        return x, x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor, picked: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[:, :, :: ctx.stride, :: ctx.stride] += picked
        return grad, None


class _CovarianceNorm(Function):
    @staticmethod
    def forward(ctx, learned: list[tuple], relu: bool, shortcut: Tensor | None, *flat: Tensor) -> Tensor:
        kept, products, shifts = [], [], []
        for (norm, centre, covariance, spread), term in zip(learned, _batched(flat, 4), strict=True):
            w = term[1].flatten(1)
            scale, shift = learn(norm, w @ centre, spread, term[0].numel() // len(centre))
            products.append((term[0], w * scale[:, None]))
            shifts.append(shift)
            kept += *term, centre, covariance, (spread + norm.eps).rsqrt()
        y = _sum(products, sum(shifts), shortcut)
        y = y.relu_() if relu else y
        ctx.save_for_backward(y if relu else None, *kept)
        ctx.eps = [norm.eps for norm, *_ in learned]
        return y

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, *tensors = ctx.saved_tensors
        _, _, wants_shortcut, *wanted = ctx.needs_input_grad
        terms = _batched(tensors, 7)
        if replays(grad):
            grad = grad if y is None else grad * (y > 0)

            def plain(*inputs: Tensor) -> Tensor:
                return sum(_plain(*term, eps) for term, eps in zip(_batched(inputs, 4), ctx.eps, strict=True))

            found = replayed(plain, [t for term in terms for t in term[:4]], wanted, grad)
        else:
            if y is not None:
                grad = torch.ops.aten.threshold_backward(grad, y, 0)
            shift, found = _rows(grad).sum(0), []
            for term, wants_x in zip(terms, wanted[::4], strict=True):
                found += _gradients(grad, shift, *term, wants_x)
        return None, None, grad if wants_shortcut else None, *found


def _gradients(
    grad: Tensor, dbeta: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, centre: Tensor,
    covariance: Tensor, inverse: Tensor, wants_x: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, gamma and beta of a term. Of the norm's input z = w x the gradient is
    scale * (grad - dbeta / count - (z - mean) * slope), whose products with x and w need no z."""
    rows, drows, w = _rows(x), _rows(grad), weight.flatten(1)
    scale, count, conv = gamma * inverse, len(rows), takes_conv(rows, w)
    dw = _grad_weight(x, grad, weight) if conv else drows.t() @ rows
    dw.addr_(dbeta, centre, alpha=-1)
    dgamma = (dw * w).sum(1).mul_(inverse)
    slope = dgamma * inverse / count
    dx = None
    if wants_x:
        turned = w.t() @ (w * (scale * slope)[:, None])
        dx = product(drows, (w * scale[:, None]).t(), turned @ centre - (scale * dbeta / count) @ w)
        dx = dx.sub_(product(rows, turned, None)) if conv else dx.addmm_(rows, turned, alpha=-1)
        dx = dx.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
    dw = dw.addcmul_(w @ covariance, (slope * count)[:, None], value=-1).mul_(scale[:, None])
    return dx, dw.view_as(weight), dgamma, dbeta


def _plain(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
    return F.batch_norm(y, None, None, gamma, beta, True, 0.0, eps)


def _batched(items: Sequence, n: int) -> list[Sequence]:
    return [items[i : i + n] for i in range(0, len(items), n)]


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _grad_weight(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    fixed = [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    kernel = weight.view(*weight.shape[:2], 1, 1)
    return torch.ops.aten.convolution_backward(grad, x, kernel, None, *fixed)[1].flatten(1)


def _sum(products: list[tuple[Tensor, Tensor]], bias: Tensor, y: Tensor | None) -> Tensor:
    """y + bias + the products. oneDNN adds as it multiplies; its ReLU would make 0 of what is no number."""
    for i, (x, weight) in enumerate(products):
        last = i == len(products) - 1
        x, kernel, shift = x.contiguous(memory_format=torch.channels_last), weight[:, :, None, None], bias * last
        rest = [0, 0], [1, 1], [1, 1], 1, "add", 1.0, None, [], None
        if y is None or not FUSED or x.dtype != torch.float32:
            term = F.conv2d(x, kernel, shift)
            y = term if y is None else term.add_(y)
        elif i:
            torch.ops.mkldnn._convolution_pointwise_.binary(y, x, kernel, shift, *rest)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, y, kernel, shift, *rest)
    return y
