"""Large kernel attention."""

from collections.abc import Callable

from torch import Tensor, nn

from .depthwise import depthwise
from .pointwise import Pointwise2d


class LargeKernelAttention(nn.Module):
    """Gates the input by a large convolution of it: x * pointwise(dilated(depthwise(x))).

    "Visual Attention Network", arXiv 2202.09741. The large kernel is factorised into a small depthwise convolution, a
    dilated depthwise one and a pointwise product; nothing normalises the gate.

    Cost: N (C k^2 + C l^2 + C^2 + C) multiply-adds for N = H W positions, C channels and kernels k and l.

    Args:
        dim: channels.
        kernel_size: of the first depthwise convolution, odd.
        dilated_kernel_size: of the dilated depthwise convolution, odd.
        dilation: of the dilated depthwise convolution.
        bias: of the three convolutions.

    Shape:
        (B, C, H, W) to (B, C, H, W).

    Example:
        >>> import torch
        >>> LargeKernelAttention(32)(torch.randn(1, 32, 20, 31)).shape
        torch.Size([1, 32, 20, 31])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 5,
        dilated_kernel_size: int = 7,
        dilation: int = 3,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.depthwise = depthwise(dim, kernel_size, bias=bias, **dd)
        self.dilated = depthwise(dim, dilated_kernel_size, dilation, bias=bias, **dd)
        self.pointwise = Pointwise2d(dim, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pointwise(self.dilated(self.depthwise(x)))


class VanAttention(nn.Module):
    """VAN's attention unit: large kernel attention between two pointwise products, with a shortcut around all of it.

    "Visual Attention Network", arXiv 2202.09741.

    Cost: that of large kernel attention and 2 N C^2 multiply-adds.

    Args:
        dim: channels.
        act_layer: activation before the attention, exact GELU by default.
        lka: makes the attention for `dim` channels.
        shortcut: add the unit's own input to its output.

    Shape:
        (B, C, H, W) to (B, C, H, W).

    Example:
        >>> import torch
        >>> VanAttention(32)(torch.randn(1, 32, 20, 31)).shape
        torch.Size([1, 32, 20, 31])
    """

    def __init__(
        self,
        dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        lka: Callable[..., nn.Module] = LargeKernelAttention,
        shortcut: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj1 = Pointwise2d(dim, dim, **dd)
        self.act = act_layer()
        self.lka = lka(dim, **dd)
        self.proj2 = Pointwise2d(dim, dim, **dd)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj2(self.lka(self.act(self.proj1(x))))
        return x + y if self.shortcut else y
