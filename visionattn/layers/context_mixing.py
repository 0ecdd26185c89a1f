"""Dynamic convolution whose kernels know the whole map, and the gated block around it."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, trunc_normal_
from torch import Tensor, nn

from .adaptive_pool import adaptive_pool
from .cache import ParameterCache
from .checks import check_counts, check_not_negative
from .conv_norm import PointwiseNorm
from .dilated_reparam import ChannelScale, DilatedReparamNorm, GrnMlp, ResidualDepthwise
from .dynamic_conv import dynamic_conv2d, segments, window_starts
from .fuse import is_batch_norm, scale_and_shift, scale_input
from .pointwise import Pointwise2d
from .symbolic import Size, fixed, for_batch, is_symbolic, larger, smaller


class ContMix2d(nn.Module):
    """Dynamic depthwise convolution: every position makes its kernels from what it has to do with parts of a context.

    "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", arXiv 2502.20087.
    The context is pooled to R = pool_size^2 regions. A position's affinities to them become, by one linear map that
    all groups share, the logits of a small kernel and of a large one, which convolve half of the channels each:

        affinity = q(x) k(pool(context))^T,    taps = softmax(affinity M^T + m + relative position bias)

    What is computed is q (M k)^T, which is the same: attention to K^2 keys, fused where the queries of the map share
    their windows. Windows are shifted inwards at borders. A map with a side less than the kernel is enlarged to it,
    bilinearly, and what comes out averaged down again.

    Cost: N C^2 / 2 + R C_c C / 2 + C / 2 R T + N T C multiply-adds for N = H W positions, C channels, C_c of the
    context and T taps of both kernels; with `value_proj` N C^2 more.

    Args:
        dim: channels C.
        num_heads: half as many as there are groups of channels with a kernel each.
        kernel_size: of the large kernel, odd.
        small_kernel_size: of the small kernel, odd.
        context_dim: channels of the context; None for maps that are their own.
        pool_size: side of the grid of regions.
        value_proj: project what is convolved, in place of taking it as it is.
        bias_std: of the initial relative position bias.

    Raises:
        ValueError: if a kernel is even, or 4 * num_heads does not divide `dim`.

    Shape:
        (B, C, H, W), and with `context_dim` a context (B, C_c, H, W), to (B, C, H, W). Another map (B, C, H, W) may be
        given as the values.

    Example:
        >>> import torch
        >>> x, context = torch.randn(1, 32, 20, 31), torch.randn(1, 8, 20, 31)
        >>> ContMix2d(32, num_heads=2)(x).shape
        torch.Size([1, 32, 20, 31])
        >>> ContMix2d(32, num_heads=2, context_dim=8)(x, context).shape
        torch.Size([1, 32, 20, 31])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        context_dim: int | None = None,
        pool_size: int = 7,
        value_proj: bool = True,
        bias_std: float = 0.02,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_counts(
            dim=dim, num_heads=num_heads, kernel_size=kernel_size, small_kernel_size=small_kernel_size,
            context_dim=dim if context_dim is None else context_dim, pool_size=pool_size,
        )  # fmt: skip
        check_not_negative(bias_std=bias_std)
        if dim % (4 * num_heads):
            raise ValueError(f"dim {dim} is not divisible by 4 * num_heads {num_heads}")
        if kernel_size % 2 == 0 or small_kernel_size % 2 == 0:
            raise ValueError(f"expected odd kernel sizes, got {small_kernel_size} and {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        self.groups = 2 * num_heads
        self.scale = (dim // self.groups) ** -0.5  # of the channels of a group in both halves, as published
        self.kernel_sizes = small_kernel_size, kernel_size
        self.pool_size = pool_size
        self.q = PointwiseNorm(dim, dim // 2, **dd)
        self.k = PointwiseNorm(dim if context_dim is None else context_dim, dim // 2, **dd)
        self.v = PointwiseNorm(dim, dim, **dd) if value_proj else nn.Identity()
        self.taps = nn.Linear(pool_size**2, small_kernel_size**2 + kernel_size**2, **dd)
        tables = [(self.groups, 2 * k - 1, 2 * k - 1) for k in self.kernel_sizes]
        self.small_rpb, self.large_rpb = (nn.Parameter(torch.empty(table, **dd)) for table in tables)
        self.bias_std = bias_std
        self._caches = ParameterCache(), ParameterCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.small_rpb, self.large_rpb):
            trunc_normal_(table, std=self.bias_std) if self.bias_std else nn.init.zeros_(table)

    def forward(self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        return _context_mixing(self, x, context, value)

    def prepare(
        self, x: Tensor, context: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What is mixed, on the size that the kernels need.

        Returns:
            scaled queries (B, G, H, W, c), and for the small and the large kernel a key for each tap (B, G, K^2, c) and
            the values (B, G, H, W, c).
        """
        size, G = working_size(*x.shape[2:], max(self.kernel_sizes)), self.groups
        x = enlarged(x, size)
        context = x if context is None else enlarged(context, size)
        value = self.v(x if value is None else enlarged(value, size))
        q, k = self.q(x) * self.scale, self.k(adaptive_pool(context, (self.pool_size, self.pool_size)))
        k = k.flatten(2).unflatten(1, (G, -1)).transpose(-1, -2)  # (B, G, R, c)
        keys = (self.taps.weight.to(k.dtype) @ k).split([n * n for n in self.kernel_sizes], 2)
        values = [_grouped(half, G) for half in value.chunk(2, 1)]
        return _grouped(q, G), list(keys), values

    def biases(self, size: tuple[Size, Size], dtype: torch.dtype) -> list[Tensor]:
        """What is added to the logits of the taps of both kernels, (G, H, W, K^2)."""
        parts = self.taps.bias.split([n * n for n in self.kernel_sizes])
        tables = self.small_rpb, self.large_rpb

        def build(i: int) -> Tensor:
            return (tap_bias(tables[i], size, self.kernel_sizes[i]) + parts[i]).to(dtype)

        key = (*size, dtype)
        return [self._caches[i](key, [tables[i], self.taps.bias], lambda i=i: build(i)) for i in (0, 1)]

    def extra_repr(self) -> str:
        return f"groups={self.groups}, kernel_sizes={self.kernel_sizes}, pool_size={self.pool_size}"


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, G c, H, W) to (B, G, H, W, c)."""
    return x.unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2)


@torch.fx.wrap
def _context_mixing(layer: ContMix2d, x: Tensor, context: Tensor | None, value: Tensor | None) -> Tensor:
    """Opaque to symbolic tracing, as it depends on the size."""
    size = fixed(*x.shape[2:])
    q, keys, values = layer.prepare(x, context, value)
    biases = layer.biases(fixed(*q.shape[2:4]), q.dtype)
    parts = zip(keys, values, biases, layer.kernel_sizes, strict=True)
    halves = [dynamic_attention(q, k, v.to(q.dtype), bias, K) for k, v, bias, K in parts]
    out = torch.cat([half.permute(0, 1, 4, 2, 3).flatten(1, 2) for half in halves], 1)
    return adaptive_pool(out, size)


def dynamic_attention(q: Tensor, keys: Tensor, value: Tensor, bias: Tensor, kernel_size: int) -> Tensor:
    """`dynamic_conv2d` by the softmax of q keys^T + bias; fused where the queries share few windows.

    Args:
        q: (B, G, H, W, c) scaled queries.
        keys: (B, G, K^2, c), one for each tap.
        value: (B, G, H, W, c).
        bias: (G, H, W, K^2).
        kernel_size: K.
    """
    K, (H, W) = kernel_size, q.shape[2:4]
    if is_symbolic(H, W) or max(H, W) > K + 1:
        logits = q.flatten(2, 3) @ keys.mT + for_batch(bias.flatten(1, 2), q.flatten(2, 3))
        return dynamic_conv2d(logits.softmax(-1).unflatten(2, (H, W)), value, K)
    rows = []
    for top, end, y in segments(H, K):
        parts = []
        for left, right, x in segments(W, K):
            of_group = q[:, :, top:end, left:right].flatten(2, 3)
            window = value[:, :, y : y + K, x : x + K].flatten(2, 3)
            mask = bias[:, top:end, left:right].flatten(1, 2)
            mixed = F.scaled_dot_product_attention(of_group, keys, window, attn_mask=mask, scale=1.0)
            parts.append(mixed.unflatten(2, (end - top, right - left)))
        rows.append(torch.cat(parts, 3) if len(parts) > 1 else parts[0])
    return torch.cat(rows, 2) if len(rows) > 1 else rows[0]


def tap_bias(table: Tensor, size: tuple[Size, Size], kernel_size: int) -> Tensor:
    """Relative position bias of every position's taps, (G, H, W, K^2), by a table (G, 2 K - 1, 2 K - 1) of key minus
    query."""
    K, device = kernel_size, table.device
    rows, cols = (
        window_starts(n, K, device)[:, None] + torch.arange(K, device=device) - torch.arange(n, device=device)[:, None]
        for n in size
    )
    chosen = table.index_select(1, rows.flatten() + K - 1).index_select(2, cols.flatten() + K - 1)
    return chosen.unflatten(2, cols.shape).unflatten(1, rows.shape).permute(0, 1, 3, 2, 4).flatten(-2)


def working_size(height: Size, width: Size, kernel_size: int) -> tuple[Size, Size]:
    """The size of a map that the kernel fits in: that of the map, or with the short side as long as the kernel.

    The long side is rounded down from what floating point makes of it, as published; in graphs that leave sizes open
    from the quotient itself, which is one more at a few long shapes, 3 x 27 for one.
    """
    K = kernel_size
    if not is_symbolic(height, width):
        if min(height, width) >= K:
            return height, width
        return (K, max(K, int(K / height * width))) if height < width else (max(K, int(K / width * height)), K)
    short = smaller(height, width)
    side = larger(short, K)
    return larger(side * height // short, K), larger(side * width // short, K)


def enlarged(x: Tensor, size: tuple[Size, Size]) -> Tensor:
    """A map (B, C, H, W) interpolated bilinearly to a size."""
    if not is_symbolic(*size) and x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class GatedContMix(nn.Module):
    """`ContMix2d` and a large depthwise convolution, added, reweighed and gated: what OverLoCK's blocks mix by.

    Args:
        dim: channels C of what is mixed.
        out_dim: channels of the output.
        context_dim: channels of the context; None to mix and project what the kernels are made of.

    Others as in `ContMixBlock`.

    Shape:
        (B, C, H, W) to (B, C_out, H, W). With `context_dim` the kernels are made of (B, C + C_c, H, W).
    """

    last_product = "proj"

    def __init__(
        self, dim: int, out_dim: int, num_heads: int, kernel_size: int, smk_size: int, context_dim: int | None,
        deploy: bool, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        alone = context_dim is None
        self.dim = dim
        self.contmix = ContMix2d(
            dim, num_heads, kernel_size, smk_size, context_dim, value_proj=alone, bias_std=0.02 if alone else 0.0, **dd
        )
        self.mix_proj = PointwiseNorm(dim, dim, **dd)
        self.lepe = DilatedReparamNorm(dim, kernel_size, deploy, **dd)
        self.se = SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU, **dd)
        self.gate = PointwiseNorm(dim, dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.proj = Pointwise2d(dim, out_dim, **dd)

    def fuse(self) -> None:
        """Merge the norm into the product after it, for inference."""
        if is_batch_norm(self.norm):
            scale_input(self.proj, *scale_and_shift(self.norm))
            self.norm = nn.Identity()

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        gate, local = F.silu(self.gate(x)), self.lepe(x)
        queries_and_keys = (x,) if source is None else (source[:, : self.dim], source[:, self.dim :], x)
        mixed = self.contmix(*queries_and_keys)
        return self.proj(self.norm(gate * self.se(self.mix_proj(mixed) + local)))


class ContMixBlock(nn.Module):
    """The residual block of ContMix without a context: x + mixer(norm1(x)), then x + mlp(norm2(x)), each after a
    residual 3 x 3 depthwise convolution.

    "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", arXiv 2502.20087.

    Cost: about N C^2 (5.5 + 2 r) + N C (K^2 + T) multiply-adds for N = H W positions, C channels, an MLP of r C hidden
    channels, and T taps of ContMix's kernels.

    Args:
        dim: channels C.
        kernel_size: large kernel K of the convolutions, of 5, 7, ... 19.
        smk_size: small kernel of the dynamic convolution.
        num_heads: half as many as there are groups of channels with a dynamic kernel each.
        mlp_ratio: hidden channels of the MLP per channel.
        res_scale: scale the shortcuts instead of the branches.
        ls_init_value: initial scale, None for no scales.
        drop_path: probability of dropping a branch of a sample.
        deploy: have the large convolution as `DilatedReparamConv2d` is in inference.

    Shape:
        (B, C, H, W) to (B, C, H, W).

    Example:
        >>> import torch
        >>> ContMixBlock(32)(torch.randn(1, 32, 20, 31)).shape
        torch.Size([1, 32, 20, 31])
    """

    def __init__(
        self,
        dim: int = 64,
        kernel_size: int = 7,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4,
        res_scale: bool = False,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        mixing = num_heads, kernel_size, smk_size
        self._make(dim, None, mixing, mlp_ratio, res_scale, ls_init_value, drop_path, deploy, device, dtype)

    def _make(
        self, dim: int, context_dim: int | None, mixing: tuple[int, int, int], mlp_ratio: float, res_scale: bool,
        ls_init_value: float | None, drop_path: float, deploy: bool, device, dtype,
    ) -> None:  # fmt: skip
        dd = {"device": device, "dtype": dtype}
        width = dim + (context_dim or 0)
        self.res_scale = res_scale
        self.cpe1 = ResidualDepthwise(width, **dd)
        self.norm1 = LayerNorm2d(width, eps=1e-6, **dd)
        self.mixer = GatedContMix(dim, width, *mixing, context_dim, deploy, **dd)
        self.ls1, self.ls2 = (
            nn.Identity() if ls_init_value is None else ChannelScale(width, ls_init_value, **dd) for _ in range(2)
        )
        self.cpe2 = ResidualDepthwise(width, **dd)
        self.norm2 = LayerNorm2d(width, eps=1e-6, **dd)
        self.mlp = GrnMlp(width, int(mlp_ratio * dim), **dd)
        self.drop_path1, self.drop_path2 = (DropPath(drop_path) if drop_path else nn.Identity() for _ in range(2))

    def mix(self, x: Tensor) -> Tensor:
        """The first branch."""
        return self.mixer(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = scaled_sum(x, self.mix(self.norm1(x)), self.ls1, self.drop_path1, self.res_scale)
        x = self.cpe2(x)
        return scaled_sum(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2, self.res_scale)


def scaled_sum(x: Tensor, y: Tensor, scale: nn.Module, drop: nn.Module, res_scale: bool) -> Tensor:
    """Shortcut and branch, one of which is scaled."""
    return scale(x) + drop(y) if res_scale else x + drop(scale(y))
