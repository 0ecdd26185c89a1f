"""One attention map for every group of channels, at almost no parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts
from .direct import is_direct


class SubspaceAttention(nn.Module):
    """Adds to every group of channels what one map of softmax weights, over all positions, lets pass of it.

    "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks", arXiv 2006.15102.
    For the channels c of a group:

        z_c = maxpool3x3(relu(BN(s_c x_c + t_c)))
        A = softmax(relu(BN(sum_c w_c z_c + b)))
        y_c = x_c + A x_c

    A sums to one over the map: the block is close to the identity but at its peaks.

    Cost: N C multiply-adds for N = H W positions and C channels, and elementwise 2 N C.

    Args:
        dim: channels C.
        num_subspaces: groups of channels; must divide `dim`.

    Raises:
        ValueError: if `num_subspaces` does not divide `dim`; in training, of a single position.

    Shape:
        (B, C, H, W) to (B, C, H, W), any H and W; in training more than one position in all, as batch norms want.

    Example:
        >>> import torch
        >>> SubspaceAttention(64)(torch.randn(2, 64, 15, 22)).shape
        torch.Size([2, 64, 15, 22])
    """

    fused_pairs = (("conv_dws", "bn_dws"), ("conv_point", "bn_point"))
    # The published code has a module with a norm for every group; here all of them are one.
    layouts = {
        "official": [
            (r"^subspaces\.0\.(\w+\.num_batches_tracked)$", r"\1"),
            (r"^subspaces\..*\.num_batches_tracked$", ""),
            (r"^subspaces\.(\d+)\.(.*)$", r"\2#\1"),
        ]
    }

    def __init__(self, dim: int, num_subspaces: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        check_counts(dim=dim, num_subspaces=num_subspaces)
        if dim % num_subspaces:
            raise ValueError(f"dim {dim} is not divisible by num_subspaces {num_subspaces}")
        dd = {"device": device, "dtype": dtype}
        self.num_subspaces = num_subspaces
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim, **dd)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=0.9, **dd)
        self.conv_point = nn.Conv2d(dim, num_subspaces, 1, groups=num_subspaces, **dd)
        self.bn_point = nn.BatchNorm2d(num_subspaces, momentum=0.9, **dd)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.flatten(2).unflatten(1, (self.num_subspaces, -1))  # (B, g, C / g, N)
        y = groups * (1 + spatial_weights(self, x))[:, :, None]
        return y.to(x.dtype).flatten(1, 2).unflatten(2, x.shape[2:])

    def extra_repr(self) -> str:
        return f"num_subspaces={self.num_subspaces}"


@torch.fx.wrap
def spatial_weights(layer: SubspaceAttention, x: Tensor) -> Tensor:
    """A (B, g, N) of a map (B, C, H, W), in float32 at least: in bfloat16 1 + A is 1 where A is below 0.004."""
    scale, shift = layer.conv_dws.weight[:, 0], layer.conv_dws.bias[:, None, None]
    z = F.relu(layer.bn_dws(torch.addcmul(shift, x, scale)))  # a tenth of the time of a convolution
    if is_direct(z):  # on CPUs, where pooling takes a sixth of the time
        z = z.contiguous(memory_format=torch.channels_last)
    logits = F.relu(layer.bn_point(layer.conv_point(F.max_pool2d(z, 3, 1, 1))))
    return logits.flatten(2).softmax(2, dtype=torch.promote_types(logits.dtype, torch.float32))
