"""Convolution and batch norm."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import DepthwiseConv2d
from .direct import is_watched
from .norm_act_product import affine, is_frozen, norm_of_product
from .pointwise import Pointwise2d
from .product import product as multiply

IN_PLACE = {nn.ReLU: F.relu_, nn.SiLU: partial(F.silu, inplace=True), nn.Identity: lambda x: x}
"""What writes an activation over its input."""


PRODUCTS = nn.Conv2d, DepthwiseConv2d, Pointwise2d


class ConvNorm(nn.Module):
    """Convolution, then batch norm. By default it keeps the size up to its stride.

    Args:
        in_dim: channels of the input.
        dim: channels of the output.
        kernel_size: of the convolution.
        stride: of the convolution.
        groups: of the convolution.
        padding: of the convolution; kernel_size // 2 if None.
        bias: of the convolution.
        norm: have the norm.

    Shape:
        (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride)) for odd kernels.
    """

    fused_pairs = (("proj", "norm"),)

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        bias: bool = False,
        norm: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        padding = kernel_size // 2 if padding is None else padding
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, groups=groups, bias=bias, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return product_norm(self.proj, self.norm, x)


class PointwiseNorm(nn.Module):
    """Product over channels without bias, then batch norm, which `fuse` merges: (B, C_in, H, W) to (B, C_out, H, W)."""

    fused_pairs = (("proj", "norm"),)
    last_product = "proj"

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = Pointwise2d(in_dim, dim, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return product_norm(self.proj, self.norm, x)


def product_norm(product: nn.Conv2d | Pointwise2d, norm: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """act(norm(product(x))) of maps (B, C, H, W).

    In inference on a CPU a batch norm is merged into the product, as `fuse` does for good, where a pass over the map
    costs more than one over the weights, and else computed in place.
    """
    if _merges(x, product, norm, act):
        scale, shift = affine(norm)
        if product.bias is not None:
            shift = torch.addcmul(shift, product.bias, scale)
        weight = product.weight * scale.view(-1, *[1] * (product.weight.ndim - 1))
        if isinstance(product, DepthwiseConv2d):
            y = product.with_parameters(x, weight, shift)
        elif isinstance(product, nn.Conv2d):
            y = product._conv_forward(x, weight, shift)
        else:
            y = multiply(x.permute(0, 2, 3, 1), weight, shift).permute(0, 3, 1, 2)
        return y if act is None else IN_PLACE[type(act)](y)
    y = product(x)
    y = norm_of_product(norm, product, y) if type(product) in PRODUCTS else norm(y)
    return y if act is None else act(y)


def _merges(x: Tensor, product: nn.Module, norm: nn.Module, act: nn.Module | None = None) -> bool:
    return (
        type(product) in PRODUCTS
        and (act is None or (type(act) in IN_PLACE and not is_watched(act)))
        and is_frozen(norm, x, product)
        and x.numel() // x.shape[1] > product.weight[0].numel()
    )
