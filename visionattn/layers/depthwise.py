"""Depthwise convolution.

On CPUs oneDNN has slow paths, which are gone around in eager execution: a convolution whose taps are far apart takes
some ten times the time of one that is not dilated, and so does the gradient of a kernel of more than three columns.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .checks import check_counts
from .direct import in_own_precision, is_direct, replayed, replays

REACH = 6
"""Padding up to which oneDNN's fast path takes dilated depthwise convolutions."""

CHUNK = 2**22
"""Bytes of a map that is taken apart at once, about a core's cache."""


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of (B, C, H, W) that keeps the size, with kernels of odd sides.

    Where it computes with its own gradients or is dilated, it returns channels_last memory on CPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.with_parameters(x, self.weight, self.bias)

    def with_parameters(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module computes, with another weight and bias."""
        parameters = [weight] if bias is None else [weight, bias]
        if not is_direct(x, *parameters) or x.ndim != 4 or not self.is_regular():
            return self._conv_forward(x, weight, bias)
        if torch.is_grad_enabled() and (weight.shape[-1] > 3 or self.dilation[0] > 1):
            return _Depthwise.apply(x, weight, bias, self.dilation[0])
        return depthwise_conv(x, weight, bias, self.dilation[0])

    def is_regular(self) -> bool:
        """Whether it still is what this module makes, at any dilation."""
        (kh, kw), d = self.kernel_size, self.dilation[0]
        same = self.stride == (1, 1) and self.dilation == (d, d) and self.padding == (kh // 2 * d, kw // 2 * d)
        return same and kh * kw % 2 == 1 and self.padding_mode == "zeros" and self.weight.shape[:2] == (self.groups, 1)


def depthwise(
    dim: int, kernel_size: int, dilation: int = 1, bias: bool = True, device=None, dtype=None
) -> DepthwiseConv2d:
    """Depthwise convolution of (B, C, H, W) that keeps the size, and raises ValueError if `kernel_size` is even."""
    check_counts(dim=dim, kernel_size=kernel_size, dilation=dilation)
    if kernel_size % 2 == 0:
        raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
    padding = kernel_size // 2 * dilation
    return DepthwiseConv2d(
        dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=bias, device=device, dtype=dtype
    )


class _Depthwise(Function):
    """`depthwise_conv` with `depthwise_backward`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return depthwise_conv(x, weight, bias, dilation)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if replays(grad):
            padding = [k // 2 * ctx.dilation for k in weight.shape[2:]]
            plain = partial(F.conv2d, padding=padding, dilation=ctx.dilation, groups=len(weight))
            dx, dweight = replayed(plain, [x, weight], ctx.needs_input_grad[:2], grad)
        else:
            dx, dweight = depthwise_backward(grad, x, weight, ctx.dilation, ctx.needs_input_grad[:2])
        return dx, dweight, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Depthwise convolution that keeps the size.

    A dilated one does not mix positions whose rows or columns differ modulo the dilation: the phases of the map, which
    are convolved without dilation where their taps are too far apart for the fast path.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k') with odd k and k'.
        bias: (C,) or None.
        dilation: of rows and columns.

    Returns:
        (B, C, H, W), channels_last in memory where it was taken apart.
    """
    padding = weight.shape[2] // 2 * dilation, weight.shape[3] // 2 * dilation
    if dilation == 1 or max(padding) <= REACH:
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=len(weight))
    (H, W), out = x.shape[2:], torch.empty_like(x, memory_format=torch.channels_last)
    h, w = -(-H // dilation), -(-W // dilation)
    weight = _reached(weight, h, w)
    for x_i, out_i in zip(_chunks(x), _chunks(out), strict=True):
        phases = depthwise_conv(_split(x_i, dilation, h, w)[1], weight, bias, 1)
        _copy_phases(phases.permute(0, 2, 3, 1).unflatten(0, (-1, dilation, dilation)), out_i, back=True)
    return out


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, wanted: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `depthwise_conv` with respect to its input and weight, of those that are `wanted`."""
    kw = weight.shape[3]
    if dilation == 1 and kw <= 3:
        padding, mask = [k // 2 * dilation for k in weight.shape[2:]], [*wanted, False]
        dilations = [dilation, dilation]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], padding, dilations, False, [0, 0], len(weight), mask
        )[:2]
    dx = depthwise_conv(grad, weight.flip(2, 3), None, dilation) if wanted[0] else None
    return dx, _kernel_gradient(grad, x, weight, dilation) if wanted[1] else None


def _kernel_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """The gradient of a kernel of any width, three columns at a time, which are fast.

    To move the map to the taps of the next three nothing is copied: with zeros between its rows, enough of them for the
    taps, the map that is moved by a column is the same memory from one position later on.
    """
    C, (H, W) = len(weight), x.shape[2:]
    h, w = -(-H // dilation), -(-W // dilation)
    kh, kw = _reached(weight, h, w).shape[2:]
    rows, gap = max(h, kh), max(kw // 2, 2)  # a kernel of more rows than the map has no fast gradient
    three, dweight = weight.new_empty(C, 1, kh, 3), weight.new_zeros(weight.shape)
    reached = _reached(dweight, h, w)
    for grad_i, x_i in zip(_chunks(grad), _chunks(x), strict=True):
        grad_i = _split(grad_i, dilation, rows, w + gap - 2)[1]
        memory, phases = _split(x_i, dilation, rows, w + gap, kw // 2)
        for tap in range(0, kw, 3):
            moved = memory[tap * C : tap * C + phases.numel()].view(-1, rows, w + gap, C).permute(0, 3, 1, 2)
            part = torch.ops.aten.convolution_backward(
                grad_i, moved, three, None, [1, 1], [kh // 2, 0], [1, 1], False, [0, 0], C, [False, True, False]
            )[1]
            reached[..., tap : tap + 3] += part[..., : kw - tap]
    return dweight


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """The samples of a batch, so many at once that they stay in the cache."""
    return x.split(max(1, CHUNK // max(1, x.shape[1:].numel() * x.element_size())))


def _reached(weight: Tensor, height: int, width: int) -> Tensor:
    """The taps that reach into a map from some position of it."""
    rows, cols = (max(0, k // 2 - size + 1) for k, size in zip(weight.shape[2:], (height, width), strict=True))
    return weight[:, :, rows : weight.shape[2] - rows, cols : weight.shape[3] - cols]


def _split(x: Tensor, dilation: int, height: int, width: int, margin: int = 0) -> tuple[Tensor, Tensor]:
    """The phases of a map (B, C, H, W) as a batch of B * dilation**2 maps (C, height, width), channels_last, with zeros
    at the bottom and right.

    Returns:
        memory of the phases, with the zeros of `margin` positions before and after them, and the phases.
    """
    B, C = x.shape[:2]
    size, margin = B * dilation**2 * height * width * C, margin * C
    memory = x.new_zeros(margin + size + margin)
    phases = memory[margin : margin + size].view(B, dilation, dilation, height, width, C)
    _copy_phases(phases, x)
    return memory, phases.flatten(0, 2).permute(0, 3, 1, 2)


def _copy_phases(phases: Tensor, x: Tensor, back: bool = False) -> None:
    """Copies a map (B, C, H, W) to its phases (B, dilation, dilation, height, width, C), or back."""
    dilation, x = phases.shape[1], x.permute(0, 2, 3, 1)
    for i in range(dilation):
        for j in range(dilation):
            part = x[:, i::dilation, j::dilation]
            phase = phases[:, i, j, : part.shape[1], : part.shape[2]]
            part.copy_(phase) if back else phase.copy_(part)
