"""Merging batch norms and layer scales into the linear maps and convolutions next to them, for inference.

A module that can be merged has a method `fuse()` that changes it in place; `fuse_modules` calls those of a whole model.
For norms that follow a product nothing need be written: the pairs that a class names in its attribute `fused_pairs`,
`fused_pairs = (("conv", "norm"),)`, and neighbours in an `nn.Sequential` are merged by themselves. A mixer or MLP that
ends in a product names it in its attribute `last_product`, and the layer scale of its block is merged into that.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .spectral import fold


def fuse_modules(model: nn.Module) -> None:
    """Merge all that can be merged inside `model`, in place; inner modules first, and before them all that
    `sigma_reparam` changed.

    Args:
        model: a model in eval mode. A module that has several places in it is copied for each, as the norms and scales
            around them may differ.
    """
    separate(fold(model), set())
    for module in reversed(list(model.modules())[1:]):
        if isinstance(module, nn.Sequential):
            names = list(module._modules)
            pairs = zip(names, names[1:], strict=False)
        else:
            pairs = getattr(module, "fused_pairs", ())
        for product, norm in pairs:
            fuse_pair(module, product, norm)
        if hasattr(module, "fuse"):
            module.fuse()


def separate(model: nn.Module, seen: set[nn.Module]) -> None:
    """Give every place in `model` a module of its own, if it has parameters.

    Args:
        model: what is changed.
        seen: modules that have a place already; those of `model` are added.
    """
    for name, module in model._modules.items():
        if module in seen and any(True for _ in module.parameters()):
            module = model._modules[name] = copy.deepcopy(module)
        if module is not None and module not in seen:
            seen.add(module)
            separate(module, seen)


def fuse_pair(parent: nn.Module, product: str, norm: str) -> None:
    """Merge a norm into the product before it and put the norm's activation, if any, in its place.

    Anything but a batch norm with running statistics after a convolution or linear map is left as it is.

    Args:
        parent: the module both belong to.
        product: name of the convolution or linear map.
        norm: name of the norm.
    """
    first, second = getattr(parent, product), getattr(parent, norm)
    if isinstance(first, nn.Linear | nn.Conv1d | nn.Conv2d) and is_batch_norm(second):
        scale_output(first, *scale_and_shift(second))
        setattr(parent, norm, getattr(second, "act", nn.Identity()))  # timm's norms may come with an activation


def fuse_scale(parent: nn.Module, scale: str, before: nn.Module) -> None:
    """Merge a learned layer scale into what comes before it, and leave an identity in its place.

    Args:
        parent: the module that the scale belongs to.
        scale: name of the scale; without a parameter `gamma` it stays.
        before: the mixer, MLP or norm that the scale is applied to; it stays, with the scale, if it ends in no product.
    """
    gamma = getattr(getattr(parent, scale), "gamma", None)
    product = getattr(before, getattr(before, "last_product", ""), before)
    plain = isinstance(product, nn.Linear | nn.Conv2d | nn.LayerNorm) and "weight" in product._parameters
    if gamma is not None and plain:  # other weights are made of something
        scale_output(product, gamma.detach())
        setattr(parent, scale, nn.Identity())


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is an affine function of every channel in eval mode, apart from timm's activation after it."""
    return isinstance(module, BatchNorm) and module.running_mean is not None


def scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as x * scale + shift, in float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is None:
        return scale, -mean * scale
    scale = norm.weight.detach().double() * scale
    return scale, norm.bias.detach().double() - mean * scale


@torch.no_grad()
def scale_output(product: nn.Linear | nn.Conv2d | nn.LayerNorm, scale: Tensor, shift: Tensor | None = None) -> None:
    """Make `product(x)` what `product(x) * scale + shift` was.

    Args:
        product: convolution, linear map, or norm with a weight per channel.
        scale: per output channel.
        shift: per output channel, None for none.
    """
    weight, scale = fold(product).weight, scale.double()
    product.weight = like(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)), weight)
    bias = product.bias
    if bias is not None:
        shift = bias.double() * scale + (0 if shift is None else shift)
    if shift is not None:
        product.bias = like(shift, weight)


@torch.no_grad()
def scale_input(product: nn.Linear, scale: Tensor | None, shift: Tensor) -> None:
    """Make `product(x)` what `product(x * scale + shift)` was.

    Args:
        product: linear map.
        scale: per input channel, None for 1.
        shift: per input channel.
    """
    weight, bias = fold(product).weight.double(), product.bias
    product.bias = like(weight @ shift.double() + (0 if bias is None else bias.double()), product.weight)
    if scale is not None:
        product.weight = like(weight * scale.double(), product.weight)


def like(value: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of another value and shape, of the same kind and place, and as frozen."""
    return nn.Parameter(value.to(parameter), parameter.requires_grad)
