"""Convolution and batch norm."""

from torch import Tensor, nn


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
        return self.norm(self.proj(x))
