"""Position encoding by a depthwise convolution."""

import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import DepthwiseConv2d, depthwise
from .direct import is_direct, is_watched


class ConvPosEnc(nn.Module):
    """Adds a depthwise convolution of the map to it, whose zero padding tells positions apart.

    "Conditional Positional Encodings for Vision Transformers", arXiv 2102.10882.

    Cost: N C k^2 multiply-adds for N positions, C channels and a k x k kernel.

    Args:
        dim: channels.
        kernel_size: of the convolution, odd.
        act: apply exact GELU to the convolution.

    Raises:
        ValueError: if `kernel_size` is even.

    Shape:
        (B, H, W, C) to (B, H, W, C).

    Example:
        >>> import torch
        >>> ConvPosEnc(64)(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
    """

    def __init__(self, dim: int, kernel_size: int = 3, act: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = depthwise(dim, kernel_size, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        weight, k = self.proj.weight, self.proj.kernel_size[0] // 2
        if not self.act and is_direct(x, weight) and type(self.proj) is DepthwiseConv2d and not is_watched(self.proj):
            # A kernel that passes its centre on adds the map in the same pass.
            weight = weight + F.pad(weight.new_ones(1, 1, 1, 1), (k, k, k, k))
            y = self.proj.with_parameters(x.permute(0, 3, 1, 2), weight, self.proj.bias)
            return y.permute(0, 2, 3, 1)
        y = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + (F.gelu(y) if self.act else y)
