"""Attentive convolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_counts
from .direct import is_direct
from .pointwise import Pointwise, Pointwise2d
from .precision import without_autocast
from .symbolic import is_symbolic


class AttentiveConv2d(nn.Module):
    """Depthwise convolution with a kernel per sample and channel that is made from the whole map.

    "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency", arXiv
    2510.20092. A projection of the map is pooled to K^2 numbers per channel, one per strip of the map in raster order,
    which become the taps of the kernel; the taps inhibit each other by a learned part of their mean:

        taps = linear(act(kernel_proj(strips(x)))),    out = proj((taps - sigmoid(a) mean(taps)) * x_proj(x))

    Cost: 2 N C^2 + N C K^2 + K^2 C^2 + K^4 C multiply-adds for N = H W positions, C channels and a K x K kernel (the
    paper projects before it pools, which is the same and takes N C^2 instead of K^2 C^2).

    Args:
        dim: channels C.
        kernel_size: K, odd.
        act_layer: activation of the pooled projections, exact GELU by default.
        bias: of the three projections.

    Raises:
        ValueError: if `kernel_size` is even.

    Shape:
        (B, C, H, W) to (B, C, H, W), any H and W.

    Example:
        >>> import torch
        >>> AttentiveConv2d(32)(torch.randn(1, 32, 20, 31)).shape
        torch.Size([1, 32, 20, 31])
    """

    last_product = "proj"

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.kernel_size = kernel_size
        self.kernel_proj = Pointwise(dim, dim, bias=bias, **dd)
        self.act = act_layer()
        self.kernel_gen = nn.Linear(kernel_size**2, kernel_size**2, **dd)
        self.difference_control = nn.Parameter(torch.zeros(dim, **dd))
        self.x_proj = Pointwise2d(dim, dim, bias=bias, **dd)
        self.proj = Pointwise2d(dim, dim, bias=bias, **dd)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels (B, C, K, K) of a map (B, C, H, W)."""
        return _kernels(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_convolve(self.x_proj(x), _kernels(self, x)))


@torch.fx.wrap
def _kernels(module: AttentiveConv2d, x: Tensor) -> Tensor:
    K = module.kernel_size
    with without_autocast(x):
        strips = _strips(x.flatten(2), K * K).to(module.difference_control.dtype)  # (B, C, K^2)
        taps = module.kernel_gen(module.act(module.kernel_proj(strips.transpose(1, 2)).transpose(1, 2)))
        taps = taps - module.difference_control.sigmoid()[:, None] * taps.mean(2, keepdim=True)
    return taps.unflatten(2, (K, K))


def _strips(x: Tensor, count: int) -> Tensor:
    """Means (B, C, count) of the strips of (B, C, N); where the graph leaves N open, which ONNX has no pooling for, by
    a product."""
    N = x.shape[2]
    if not is_symbolic(N):
        return F.adaptive_avg_pool1d(x, count)
    strip, position = torch.arange(count, device=x.device)[:, None], torch.arange(N, device=x.device)
    inside = (position >= strip * N // count) & (position < ((strip + 1) * N + count - 1) // count)
    weights = inside.to(torch.promote_types(x.dtype, torch.float32))
    return x.to(weights.dtype) @ (weights / weights.sum(1, keepdim=True)).T


@torch.fx.wrap
def _convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """Depthwise convolution of (B, C, H, W) by (B, C, K, K), zero-padded."""
    (B, C, H, W), K = x.shape, kernels.shape[-1]
    kernels = kernels.to(x.dtype)
    if torch.compiler.is_compiling() or not B:
        # A sum that a compiler fuses, where a convolution would make the batch size a constant of the graph, and would
        # refuse one of 0.
        padded = F.pad(x, (K // 2,) * 4)
        taps = [(i, j) for i in range(K) for j in range(K)]
        return sum(kernels[:, :, i, j, None, None] * padded[:, :, i : i + H, j : j + W] for i, j in taps)
    weight = kernels.reshape(B * C, 1, K, K)
    if is_direct(x):  # channels stay last where they are, and with them the samples
        x = x.permute(2, 3, 0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, padding=K // 2, groups=B * C)
        return x.view(B, C, H, W).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x.reshape(1, B * C, H, W), weight, padding=K // 2, groups=B * C).view(B, C, H, W)


class TokenAttentiveConv2d(AttentiveConv2d):
    """Attentive convolution of a sequence of patches: (B, H * W, C) and the grid (H, W) to (B, H * W, C).

    In place of self-attention in diffusion transformers it has a tanh-approximated GELU or SiLU as `act_layer`.
    """

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(x.unflatten(1, grid).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
