"""Models with int8 weights, for inference on CPUs.

Products over channels, most of what the models compute, are done in int8: weights are rounded once, with a scale for
each output channel, and inputs in every call, with one scale for all of them. The result is float32 again.
"""

from typing import TypeVar

import torch
from torch import nn

from .backbone import Backbone
from .errors import VisionattnError
from .layers.int8 import Int8Linear
from .layers.pointwise import Pointwise, Pointwise2d

T = TypeVar("T", bound=nn.Module)
KINDS = (nn.Linear, Pointwise, Pointwise2d)


def quantize(model: T, min_channels: int = 96) -> T:
    """Replace the linear maps of a model by int8 ones, in place, after merging its batch norms as `fuse` does.

    The model is for inference in float32 on CPUs. In graphs (`torch.compile`, export), on other devices and where
    gradients pass through, int8 weights are converted back in every call, which is slow. Images of a batch share the
    scales of inputs and have a slight influence on each other.

    Args:
        model: in eval mode. It is not trainable any more.
        min_channels: input and output channels from which on int8 pays. Smaller maps, convolutions and classifiers
            stay as they are.

    Returns:
        the model. Its state dict has `int8` and `scale` where it had `weight`, and is loaded by a quantized model.

    Raises:
        VisionattnError: in training mode, on other devices, in another precision, if no map is that large or if the
            model is quantized already.
    """
    if model.training:
        raise VisionattnError("expected a model in eval mode to quantize, got one in training mode: call eval() first")
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        raise VisionattnError("int8 weights need a PyTorch with oneDNN")
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            found = f"{parameter.dtype} on {parameter.device}"
            raise VisionattnError(f"expected a model in torch.float32 on the CPU to quantize, got {found}")
    if is_quantized(model):
        raise VisionattnError(f"this {type(model).__name__} is quantized already")
    parents = list(model.modules())
    for parent in parents:
        if isinstance(parent, Backbone):
            parent.fuse()
    chosen = [
        (parent, name, child)
        for parent in parents
        for name, child in parent.named_children()
        if type(child) in KINDS and min(child.weight.shape) >= min_channels and not isinstance(parent, Backbone)
    ]
    if not chosen:
        raise VisionattnError(f"no linear map of {type(model).__name__} has {min_channels} channels in and out")
    for parent, name, child in chosen:
        setattr(parent, name, Int8Linear(child, isinstance(child, Pointwise2d)))
    return model.requires_grad_(False)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has int8 weights."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
