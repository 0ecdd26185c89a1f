"""Patch embedding and merging of hierarchical transformers."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .pointwise import Pointwise


class PatchStem(nn.Module):
    """Convolution of stride 4 and LayerNorm, the image zero-padded at the bottom and right: to a quarter the size.

    Args:
        in_chans: channels of the image.
        dim: channels of the output.
        kernel_size: of the convolution, by default of patches that do not overlap.
        padding: of the convolution.
        norm_eps: epsilon of the norm.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int = 4,
        padding: int = 0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, 4, padding, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=norm_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))))


class PatchConv2d(nn.Conv2d):
    """Convolution of patches side by side, which can give up its stride: zeros at the bottom and right then keep the
    size.

    Args:
        in_chans: channels of the input.
        dim: channels of the output.
        patch_size: kernel and stride.

    Shape:
        (B, C_in, H, W) to (B, C_out, floor(H / patch_size), floor(W / patch_size)).
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None) -> None:
        super().__init__(in_chans, dim, patch_size, patch_size, device=device, dtype=dtype)
        self.pad_end = 0

    def unstride(self, dilation: int) -> None:
        """Take steps of one position on a map of `dilation` times the resolution."""
        self.stride, self.dilation = (1, 1), (dilation, dilation)
        self.pad_end = dilation * (self.kernel_size[0] - 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, self.pad_end, 0, self.pad_end)) if self.pad_end else x)


class PatchMerging(nn.Module):
    """Concatenates the 2 x 2 phases of a map, LayerNorm, linear: (B, C, H, W) to (B, 2C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = Pointwise(4 * dim, 2 * dim, bias=False, device=device, dtype=dtype)
        self.distance = 0  # of what is concatenated in a map that keeps its size

    def unstride(self, dilation: int) -> None:
        """Take steps of one position on a map of `dilation` times the resolution."""
        self.distance = dilation

    def forward(self, x: Tensor) -> Tensor:
        if d := self.distance:
            x = F.pad(x, (0, d, 0, d)).permute(0, 2, 3, 1)
            here, there = slice(None, -d), slice(d, None)
            x = torch.cat([x[:, row, col] for col in (here, there) for row in (here, there)], 3)
        else:
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)).permute(0, 2, 3, 1)
            x = torch.cat([x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)], 3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)
