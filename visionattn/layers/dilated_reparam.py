"""Large depthwise kernels that are trained as several dilated ones, and pieces of the blocks that have them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .checks import check_not_negative
from .conv_position import ConvPosEnc
from .depthwise import DepthwiseConv2d, depthwise
from .direct import is_direct, is_watched
from .fuse import is_batch_norm, like, scale_and_shift, scale_output
from .pointwise import Pointwise2d

BRANCHES: dict[int, Sequence[tuple[int, int]]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Kernel and dilation of the small convolutions beside each large kernel."""


class DilatedReparamConv2d(nn.Module):
    """A large depthwise convolution that is trained as the sum of it and of smaller dilated ones, each with its norm.

    "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
    Recognition", arXiv 2311.15599. In inference the sum is one convolution with a bias, in which `fuse` leaves it:
    the taps of the smaller kernels lie among those of the large one.

    Cost: N C K^2 multiply-adds for N = H W positions, C channels and a K x K kernel; in training those of the branches
    besides, N C k^2 each.

    Args:
        dim: channels C.
        kernel_size: K, one of 5, 7, ... 19.
        deploy: be the one convolution from the start.

    Raises:
        ValueError: if there are no branches for `kernel_size`.

    Shape:
        (B, C, H, W) to (B, C, H, W).

    Example:
        >>> import torch
        >>> DilatedReparamConv2d(32, 13)(torch.randn(1, 32, 20, 31)).shape
        torch.Size([1, 32, 20, 31])
    """

    def __init__(self, dim: int, kernel_size: int, deploy: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f"expected kernel_size one of {', '.join(map(str, BRANCHES))}, got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.conv = depthwise(dim, kernel_size, bias=deploy, **dd)
        self.norm = nn.Identity() if deploy else nn.BatchNorm2d(dim, **dd)
        branches = {} if deploy else {f"{k}_{r}": DilatedBranch(dim, k, r, **dd) for k, r in BRANCHES[kernel_size]}
        self.branches = nn.ModuleDict(branches)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution, in float64."""
        kernel = torch.zeros_like(self.conv.weight, dtype=torch.float64)
        bias, centre = 0, kernel.shape[-1] // 2
        for conv, norm in self._parts():
            scale, shift = scale_and_shift(norm)
            reach, step = (each[0] // self.conv.dilation[0] for each in (conv.padding, conv.dilation))
            taps = slice(centre - reach, centre + reach + 1, step)
            kernel[:, :, taps, taps] += conv.weight.detach().double() * scale[:, None, None, None]
            bias = bias + shift
        return kernel, bias

    def _parts(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv, self.norm), *((branch.conv, branch.norm) for branch in self.branches.values())]

    def fuse(self) -> None:
        """Become the one convolution, for inference."""
        if is_batch_norm(self.norm):
            self.conv.weight, self.conv.bias = (like(value, self.conv.weight) for value in self.merged())
            self.norm, self.branches = nn.Identity(), nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        if self._merges(x):
            return self.conv.with_parameters(x, *(value.to(x.dtype) for value in self.merged()))
        y = self.norm(self.conv(x))
        for branch in self.branches.values():
            y = y + branch(x)
        return y

    def _merges(self, x: Tensor) -> bool:
        """Whether nobody would see that there was but one convolution."""
        return (
            len(self.branches) > 0
            and not torch.is_grad_enabled()
            and is_direct(x, self.conv.weight)
            and not is_watched(*list(self.modules())[1:])
            and all(
                type(conv) is DepthwiseConv2d and type(norm) is nn.BatchNorm2d and not norm.training and norm.affine
                for conv, norm in self._parts()
            )
        )

    @staticmethod
    def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict that `fuse` would have left, of one in the form that is trained."""
        dim, _, kernel_size, _ = tensors["conv.weight"].shape
        module = DilatedReparamConv2d(dim, kernel_size, device="meta").eval()
        module.load_state_dict(tensors, assign=True)
        module.fuse()
        return module.state_dict()

    @staticmethod
    def fold_all(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with `fold` of every kernel in it that is in the form that is trained."""
        state_dict = dict(state_dict)
        for prefix in sorted({k.partition(".branches.")[0] + "." for k in state_dict if ".branches." in k}):
            parts = {k.removeprefix(prefix): state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
            state_dict |= {prefix + k: v for k, v in DilatedReparamConv2d.fold(parts).items()}
        return state_dict


class DilatedBranch(nn.Module):
    """Depthwise convolution without bias, then batch norm: (B, C, H, W) to the same."""

    def __init__(self, dim: int, kernel_size: int, dilation: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size, dilation, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class DilatedReparamNorm(nn.Module):
    """`DilatedReparamConv2d`, then batch norm: (B, C, H, W) to the same."""

    def __init__(self, dim: int, kernel_size: int, deploy: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        self.reparam = DilatedReparamConv2d(dim, kernel_size, deploy, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def fuse(self) -> None:
        """Merge the norm into the one convolution, for inference."""
        if is_batch_norm(self.norm) and self.reparam.conv.bias is not None:
            scale_output(self.reparam.conv, *scale_and_shift(self.norm))
            self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reparam(x))


class ResidualDepthwise(ConvPosEnc):
    """`ConvPosEnc` of (B, C, H, W), whose shortcut `fuse` adds to the convolution.

    Args: those of `ConvPosEnc`.
    """

    residual = True

    def fuse(self) -> None:
        """Add the shortcut to the middle tap, for inference."""
        if self.residual:
            weight = self.proj.weight.detach().clone()
            centre = weight.shape[-1] // 2
            weight[:, :, centre, centre] += 1
            self.proj.weight = like(weight, self.proj.weight)
            self.residual = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.residual else self.proj(x)


class GlobalResponseNorm2d(nn.Module):
    """Scales every channel by its norm over the map as a share of the average channel's: (B, C, H, W) to the same.

    "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", arXiv 2301.00808. timm's keeps vectors,
    which weight decay spares; these are published, and decayed, as (1, C, 1, 1).
    """

    def __init__(self, dim: int, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        check_not_negative(eps=eps)
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        # In float32 under autocast too: squares of a map exceed what half precision holds.
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        share = norm / (norm.mean(1, keepdim=True) + self.eps)
        return torch.addcmul(self.beta.to(x.dtype), x, (self.gamma * share + 1).to(x.dtype))


class ChannelScale(nn.Module):
    """x * weight + bias of every channel, as a 1 x 1 depthwise convolution has them: (B, C, H, W) to the same."""

    def __init__(self, dim: int, init: float = 1.0, device=None, dtype=None) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), float(init), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.view(-1, 1, 1).to(x.dtype), self.bias.view(-1, 1, 1).to(x.dtype)
        return torch.addcmul(bias, x, weight)


class GrnMlp(nn.Module):
    """MLP with a residual 3 x 3 depthwise convolution and global response norm: (B, C, H, W) to (B, C_out, H, W).

    Args:
        dim: channels in.
        hidden_dim: channels between.
    """

    last_product = "fc2"

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Pointwise2d(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.dwconv = ResidualDepthwise(hidden_dim, **dd)
        self.grn = GlobalResponseNorm2d(hidden_dim, **dd)
        self.fc2 = Pointwise2d(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.dwconv(self.act(self.fc1(x)))))
