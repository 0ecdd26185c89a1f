"""Recursive gated convolution and the global-local filter."""

import math

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from .cache import ParameterCache
from .depthwise import DepthwiseConv2d, depthwise
from .direct import is_direct, is_watched
from .pointwise import Pointwise2d
from .symbolic import is_exporting, is_symbolic

OLD_INDUCTOR = torch.__version__ < "2.14"  # of 2.11 it is known, and of 2.14 that it is mended


def resize_filter(weight: Tensor, height: int, width: int) -> Tensor:
    """Frequency filter for maps of another size, interpolated bilinearly with the corners aligned.

    Frequencies are in the order of the transform, from zero over positive to negative ones, and the interpolation runs
    across the jump between them; so the published weights are used.

    Args:
        weight: (C, h, w, 2), real and imaginary parts last.
        height: of the result; that of the map.
        width: of the result; that of the half spectrum, W // 2 + 1 for a map W wide.
    """
    if not is_symbolic(height, width) and weight.shape[1:3] == (height, width):
        return weight
    weight = F.interpolate(weight.permute(3, 0, 1, 2), (height, width), mode="bilinear", align_corners=True)
    return weight.permute(1, 2, 3, 0)


class GlobalLocalFilter(nn.Module):
    """Convolves half of the channels locally and filters the other half globally, in the frequency domain.

    "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", arXiv 2207.14284. Between two
    LayerNorms, the first half of the channels passes a 3 x 3 depthwise convolution and the second half is multiplied by
    a learned filter in the spectrum, which is a circular convolution as large as the map. Local and global channels
    alternate in the output.

    Cost: 9/2 N C multiply-adds for N = H W positions and C channels, besides two real Fourier transforms and the
    product of C / 2 channels.

    Args:
        dim: channels C, even.
        h: height of the stored filter: of the maps it is made for.
        w: width of the stored filter: W // 2 + 1 for maps W wide.

    Raises:
        ValueError: if `dim` is odd or the filter has no size.

    Shape:
        (B, C, H, W) to (B, C, H, W), any H and W; the filter is resized to the map.

    Example:
        >>> import torch
        >>> GlobalLocalFilter(32, h=14, w=8)(torch.randn(1, 32, 20, 31)).shape
        torch.Size([1, 32, 20, 31])
    """

    def __init__(self, dim: int, h: int = 14, w: int = 8, device=None, dtype=None) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"expected an even dim, got {dim}")
        if h < 1 or w < 1:
            raise ValueError(f"expected a filter of at least 1 x 1, got {h} x {w}")
        dd = {"device": device, "dtype": dtype}
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, h, w, 2, **dd))
        self.dw = depthwise(dim // 2, 3, bias=False, **dd)
        self.pre_norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.post_norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self._filter_cache = ParameterCache()
        self.phases = 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.complex_weight, std=0.02)

    def spread(self, factor: int) -> None:
        """Filter the phases of a map of `factor` times the resolution, each by itself."""
        self.phases *= factor

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.pre_norm(x).chunk(2, 1)
        far = _filtered(self, far) if self.phases == 1 else _filtered_phases(self, far)
        x = torch.stack([self.dw(near), far], 2)
        return self.post_norm(x.flatten(1, 2))


@torch.fx.wrap
def _filtered_phases(layer: GlobalLocalFilter, x: Tensor) -> Tensor:
    """`_filtered` of the n x n maps of every n-th row and column of a map, which zeros fill up to a multiple of n."""
    (B, _, H, W), n = x.shape, layer.phases
    x = F.pad(x, (0, -W % n, 0, -H % n)).unflatten(3, (-1, n)).unflatten(2, (-1, n))
    x = _filtered(layer, x.permute(0, 3, 5, 1, 2, 4).flatten(0, 2))
    return x.unflatten(0, (B, n, n)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)[:, :, :H, :W]


@torch.fx.wrap
def _filtered(layer: GlobalLocalFilter, x: Tensor) -> Tensor:
    """(B, C / 2, H, W) times the filter in the spectrum."""
    H, W = x.shape[-2:]
    if not torch.compiler.is_compiling() and not len(x):  # which MKL refuses
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)  # there are no transforms of these sizes in half precision

    def build() -> Tensor:
        weight = resize_filter(layer.complex_weight.to(dtype), H, W // 2 + 1)
        return weight if real else torch.complex(weight[..., 0], weight[..., 1])

    # ONNX has no transforms of an open size, nor complex numbers; and Inductor of old compiles no transforms of
    # maps that are not laid out in rows.
    real = is_symbolic(H, W) if is_exporting() else torch.compiler.is_compiling() and OLD_INDUCTOR
    if real:
        return _filtered_by_products(x.to(dtype), build()).to(x.dtype)

    spectrum = torch.fft.rfft2(x.to(dtype)) * layer._filter_cache((H, W, dtype), [layer.complex_weight], build)
    # In two steps: the filtered spectrum is not Hermitian, and libraries differ in what a two-dimensional inverse makes
    # of that.
    return torch.fft.irfft(torch.fft.ifft(spectrum, dim=-2), n=W, dim=-1).to(x.dtype)


def _filtered_by_products(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, H, W) times a filter (C, H, W // 2 + 1, 2) in the spectrum, by products with the waves, which are real."""
    # ONNX has no remainders of a division by a size: by tensors instead.
    H, W = (torch.full((1,), size, dtype=torch.int64, device=x.device) for size in x.shape[-2:])
    rows, cols, bins = (torch.arange(n, device=x.device) for n in (*x.shape[-2:], x.shape[-1] // 2 + 1))

    def waves(frequency: Tensor, position: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        angle = (frequency[:, None] * position % length).to(x.dtype) / length * (2 * math.pi)
        return angle.cos(), angle.sin()

    (cos_h, sin_h), (cos_w, sin_w) = waves(rows, rows, H), waves(bins, cols, W)
    re, im = x @ cos_w.T, -x @ sin_w.T
    re, im = cos_h @ re + sin_h @ im, cos_h @ im - sin_h @ re
    a, b = weight.unbind(-1)
    re, im = re * a - im * b, re * b + im * a
    re, im = cos_h @ re - sin_h @ im, sin_h @ re + cos_h @ im
    # Of the half spectrum all count twice but those that are their own mirror image.
    twice = (2 - (2 * bins % W == 0).to(x.dtype)) / (H * W)
    return (re * twice) @ cos_w - (im * twice) @ sin_w


class RecursiveGatedConv(nn.Module):
    """Gates of growing width, each a slice of one convolution of the input, applied one after the other.

    "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", arXiv 2207.14284. The input
    is projected to p and q, w = scale * filter(q) is cut into slices of C / 2^(n-1), ..., C / 2, C channels, and
    y_0 = p w_0, y_k = project_k(y_(k-1)) w_k: products of up to n + 1 positions.

    Cost: N (3 C^2 + 2/3 (1 - 4^(1-n)) C^2 + k^2 m C) multiply-adds for N = H W positions, C channels, order n,
    m = 2 - 2^(1-n) and a k x k kernel; the last term is 9/2 m C with the global-local filter.

    Args:
        dim: channels C; divisible by 2^(order - 1).
        order: number of gates n.
        scale: factor of the filter's output.
        kernel_size: of the depthwise convolution, odd.
        filter: "dw" for a depthwise convolution, "global_local" for a `GlobalLocalFilter`.
        filter_size: (height, width) of the stored filter of the latter.

    Raises:
        ValueError: if the order, the kernel or the filter is none of those.

    Shape:
        (B, C, H, W) to (B, C, H, W).

    Example:
        >>> import torch
        >>> RecursiveGatedConv(64, order=3)(torch.randn(1, 64, 20, 31)).shape
        torch.Size([1, 64, 20, 31])
    """

    last_product = "proj_out"

    def __init__(
        self,
        dim: int,
        order: int = 5,
        scale: float = 1.0,
        kernel_size: int = 7,
        filter: str = "dw",
        filter_size: tuple[int, int] = (14, 8),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise ValueError(f"expected order >= 1 and dim divisible by 2^(order - 1), got order {order} and dim {dim}")
        if filter not in ("dw", "global_local"):
            raise ValueError(f"expected filter 'dw' or 'global_local', got {filter!r}")
        dd = {"device": device, "dtype": dtype}
        self.dims = [dim // 2**k for k in reversed(range(order))]
        self.scale = scale
        self.proj_in = Pointwise2d(dim, 2 * dim, **dd)
        if filter == "dw":
            self.filter = depthwise(sum(self.dims), kernel_size, **dd)
        else:
            self.filter = GlobalLocalFilter(sum(self.dims), *filter_size, **dd)
        self.pws = nn.ModuleList(Pointwise2d(c, 2 * c, **dd) for c in self.dims[:-1])
        self.proj_out = Pointwise2d(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        widths = [self.dims[0], sum(self.dims)]
        direct = type(self.proj_in) is Pointwise2d and is_direct(x, self.proj_in.weight, self.proj_in.bias)
        if direct and not is_watched(self.proj_in, self.filter, *self.pws):
            # Two products, as the filter would copy channels that lie between others; and its kernel is scaled.
            x = x.permute(0, 2, 3, 1)
            parameters = zip(self.proj_in.weight.split(widths), self.proj_in.bias.split(widths), strict=True)
            p, q = (F.linear(x, weight, bias).permute(0, 3, 1, 2) for weight, bias in parameters)
            w = _scaled(self.filter, q, self.scale)
        else:
            direct = False
            p, q = self.proj_in(x).split(widths, 1)
            w = self.scale * self.filter(q)
        gated = Tensor.mul_ if direct and not torch.is_grad_enabled() else torch.mul
        w = w.split(self.dims, 1)
        y = gated(p, w[0])
        for k, project in enumerate(self.pws, start=1):
            y = gated(project(y), w[k])
        return self.proj_out(y)

    def extra_repr(self) -> str:
        return f"order={len(self.dims)}, scale={self.scale}"


def _scaled(filter: nn.Module, x: Tensor, scale: float) -> Tensor:
    """scale * filter(x), with the scale in the parameters of what the filter does last."""
    if type(filter) is DepthwiseConv2d:
        return filter.with_parameters(x, filter.weight * scale, filter.bias * scale)
    return scale * filter(x)
