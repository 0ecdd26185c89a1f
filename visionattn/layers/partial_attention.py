"""Partial convolution and the attention that PATNet gives to the channels it leaves alone."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .cache import ParameterCache
from .checks import check_counts, check_rates
from .direct import in_own_precision, is_direct, is_watched, replays
from .fuse import is_batch_norm, scale_and_shift, scale_output
from .heads import parted_heads
from .norm_act_product import affine, is_frozen, is_learning, learn, normed_product
from .pointwise import Pointwise, Pointwise2d
from .size_constant import size_constant
from .symbolic import Size, fixed, for_batch, is_exporting, is_symbolic


class PartialConv2d(nn.Module):
    """A dense 3 x 3 convolution of the first channels; the others pass unchanged.

    "Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks", arXiv 2303.03667.

    Cost: 9 N (C // n_div)^2 multiply-adds for N = H W positions and C channels.

    Args:
        dim: channels C.
        n_div: C // n_div channels are convolved.

    Raises:
        ValueError: if that leaves no channel to convolve or none to pass.

    Shape:
        (B, C, H, W) to (B, C, H, W).

    Example:
        >>> import torch
        >>> PartialConv2d(64)(torch.randn(1, 64, 30, 41)).shape
        torch.Size([1, 64, 30, 41])
    """

    def __init__(self, dim: int, n_div: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        check_counts(dim=dim, n_div=n_div)
        self.widths = dim // n_div, dim - dim // n_div
        if min(self.widths) < 1:
            raise ValueError(f"expected dim // n_div between 1 and dim - 1, got dim {dim} and n_div {n_div}")
        self.conv = nn.Conv2d(self.widths[0], self.widths[0], 3, padding=1, bias=False, device=device, dtype=dtype)

    def attend(self, x: Tensor) -> Tensor:
        """What becomes of the other channels (B, C - C // n_div, H, W)."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.widths, 1)
        return torch.cat([self.conv(parts[0]), self.attend(parts[1])], 1)


class PartialChannelAttention(PartialConv2d):
    """Partial convolution, and a gate per channel for the other channels, from their means and standard deviations.

    "Partial Convolution Meets Visual Attention", arXiv 2503.03148, where it is PAT_ch.

    Cost: 9 N c^2 + 2 (C - c)^2 multiply-adds for N = H W positions, C channels and c = C // n_div, and elementwise N C.

    Args:
        dim: channels C.
        n_div: C // n_div channels are convolved, the others gated.

    Raises:
        ValueError: if that leaves no channel to convolve or none to gate.

    Shape:
        (B, C, H, W) to (B, C, H, W), H W > 1: a single position has no standard deviation.

    Example:
        >>> import torch
        >>> PartialChannelAttention(64)(torch.randn(2, 64, 30, 41)).shape
        torch.Size([2, 64, 30, 41])
    """

    def __init__(self, dim: int, n_div: int = 4, device=None, dtype=None) -> None:
        super().__init__(dim, n_div, device, dtype)
        dd = {"device": device, "dtype": dtype}
        width = self.widths[1]
        self.gate = Pointwise(2 * width, width, bias=False, **dd)
        self.gate_norm = nn.BatchNorm1d(width, **dd)
        self.norm = nn.BatchNorm2d(width, **dd)
        # The second norm in a merged layer: the factor joins the gate.
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)

    def fuse(self) -> None:
        """Merge the norms for inference."""
        if not is_batch_norm(self.norm):
            return
        scale_output(self.gate, *scale_and_shift(self.gate_norm))
        scale, shift = (t.to(self.norm.running_mean) for t in scale_and_shift(self.norm))
        self.scale, self.shift = scale, shift[:, None, None]
        self.gate_norm = self.norm = nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        var, mean = _var_mean(x)
        # The root of a constant channel's variance has no finite gradient; in half precision the bound would be 0.
        std = var.to(torch.promote_types(var.dtype, torch.float32)).clamp(min=1e-12).sqrt().to(var.dtype)
        gate = F.hardsigmoid(self.gate_norm(self.gate(torch.stack([mean, std], -1).flatten(1))))
        scale, shift = self.scale, self.shift
        if is_frozen(self.norm, x):
            scale, shift = affine(self.norm)
            shift = shift[:, None, None]
        elif is_learning(self.norm) and is_direct(x, self.norm.weight) and not is_watched(self.norm):
            # What a gate makes of a channel's mean and variance is known without a pass over the map.
            N, gated = x.shape[2] * x.shape[3], gate * mean
            centre = gated.mean(0)
            spread = (gate.square() * var).mean(0) * ((N - 1) / N) + (gated - centre).square().mean(0)
            scale, shift = learn(self.norm, centre, spread, len(x) * N)
            shift = shift[:, None, None]
        if scale is not None:
            gate = gate * scale
        gate = gate[:, :, None, None]
        return self.norm(x * gate) if shift is None else torch.addcmul(shift, x, gate)


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variances and means (B, C) of maps (B, C, H, W)."""
    if not is_direct(x):
        return torch.var_mean(x, (2, 3))
    return _VarMean.apply(x) if torch.is_grad_enabled() else _centred_var_mean(x)


def _centred_var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of channels, which are several times as fast as torch's reduction."""
    if len(x) == 1:  # the statistics of batch norms, in one operation where ten small ones would be
        N = x.shape[2] * x.shape[3]
        x = x.contiguous(memory_format=torch.channels_last)
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return var.mul_(N).div_(N - 1)[None], mean[None]
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    mean = rows.mean(1)
    return (rows - mean[:, None]).square_().sum(1) / (rows.shape[1] - 1), mean


class _VarMean(Function):
    """`_centred_var_mean` that keeps its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = _centred_var_mean(x)
        ctx.save_for_backward(x, mean)
        return var, mean

    @staticmethod
    @in_own_precision
    def backward(ctx, dvar: Tensor, dmean: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            mean = x.mean((2, 3))
        N = x.shape[2] * x.shape[3]
        slope = 2 * dvar / (N - 1)
        return torch.addcmul((dmean / N - mean * slope)[:, :, None, None], x, slope[:, :, None, None])


class PartialSpatialAttention(nn.Module):
    """Gates the first channels by a map computed from them, and mixes the others.

    "Partial Convolution Meets Visual Attention", arXiv 2503.03148, where it is PAT_sp.

    Cost: N c^2 + N (C - c) num_maps multiply-adds for N = H W positions, C channels of which c = int(C partial) are
    mixed, and elementwise N C.

    Args:
        dim: channels C.
        partial: part of the channels that is mixed.
        num_maps: gates, 1 or one per gated channel.

    Raises:
        ValueError: if no channel is left to gate or to mix, or the gates do not fit.

    Shape:
        (B, C, H, W) to (B, C, H, W).

    Example:
        >>> import torch
        >>> PartialSpatialAttention(64)(torch.randn(1, 64, 30, 41)).shape
        torch.Size([1, 64, 30, 41])
    """

    def __init__(self, dim: int, partial: float = 0.5, num_maps: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        mixed = int(dim * partial)
        self.widths = dim - mixed, mixed
        if min(self.widths) < 1:
            raise ValueError(f"expected int(dim * partial) between 1 and dim - 1, got dim {dim} and partial {partial}")
        if num_maps not in (1, self.widths[0]):
            raise ValueError(f"expected num_maps 1 or {self.widths[0]}, the number of gated channels, got {num_maps}")
        self.gate = Pointwise2d(self.widths[0], num_maps, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(self.widths[0], **dd)
        self.norm2 = nn.BatchNorm2d(mixed, **dd)
        self.mix = Pointwise2d(mixed, mixed, bias=False, **dd)

    @torch.no_grad()
    def merged(self, product: Pointwise2d) -> tuple[Pointwise2d, "MergedSpatialAttention"]:
        """This layer after `product` as another product and what then remains, for inference.

        A gate is one number per position (or channel), so that it commutes with the scale of the norm after it; the
        rest is linear. The new product returns gated channels, mixed channels and logits of the gates.

        Args:
            product: without bias, to the channels of this layer.
        """
        scale1, shift1 = scale_and_shift(self.norm1)
        scale2, shift2 = scale_and_shift(self.norm2)
        gated, mixed = product.weight.double().split(self.widths)
        mix = self.mix.weight.double()
        gate = self.gate.weight.double()
        weight = torch.cat([scale1[:, None] * gated, (mix * scale2) @ mixed, gate @ gated])
        bias = torch.cat([shift1.new_zeros(self.widths[0]), mix @ shift2, shift1.new_zeros(len(gate))])
        merged = Pointwise2d(product.in_features, len(weight), device=product.weight.device, dtype=product.weight.dtype)
        merged.weight.copy_(weight)
        merged.bias.copy_(bias)
        return merged.requires_grad_(product.weight.requires_grad), MergedSpatialAttention(
            (*self.widths, len(gate)), shift1.to(product.weight)
        )

    def forward(self, x: Tensor) -> Tensor:
        gated, mixed = x.split(self.widths, 1)
        gate = F.hardsigmoid(self.gate(gated))
        if is_frozen(self.norm1, x) and is_frozen(self.norm2, x, self.mix):
            scale, shift = (t[:, None, None] for t in affine(self.norm1))
            out = torch.empty_like(x)
            torch.addcmul(shift, gated * scale, gate, out=out[:, : self.widths[0]])
            out[:, self.widths[0] :] = normed_product(self.norm2, self.mix, mixed)
            return out
        # torch's batch norm is ten times as slow on channels that lie between others.
        mixed = mixed.contiguous(memory_format=torch.channels_last)
        return torch.cat([_apart(self.norm1(gated * gate)), self.mix(self.norm2(mixed))], 1)


def _apart(x: Tensor) -> Tensor:
    """x, whose gradient will not lie between that of other channels."""
    return _Apart.apply(x) if torch.is_grad_enabled() and is_direct(x) else x


class _Apart(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad if replays(grad) else grad.contiguous(memory_format=torch.channels_last)


class MergedSpatialAttention(nn.Module):
    """What remains of `PartialSpatialAttention` when its products are merged into the one before it.

    Args:
        widths: gated channels, mixed channels, gates.
        shift: of the gated channels.
    """

    def __init__(self, widths: tuple[int, int, int], shift: Tensor) -> None:
        super().__init__()
        self.widths = widths
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.widths, 1)
        return torch.cat([torch.addcmul(self.shift, parts[0], F.hardsigmoid(parts[2])), parts[1]], 1)


class PartialSelfAttention(PartialConv2d):
    """Partial convolution, and self-attention with a bias that depends on the distance for the other channels.

    "Partial Convolution Meets Visual Attention", arXiv 2503.03148, where it is PAT_sf; the bias is that of "Rethinking
    and Improving Relative Position Encoding for Vision Transformer", arXiv 2107.14222: one per head and bucket of
    Euclidean distances, which grow logarithmically beyond `alpha`.

    Cost: 9 N c^2 + 4 N d^2 + 2 N^2 d multiply-adds for N = H W positions, C channels, c = C // n_div and d = C - c.

    Args:
        dim: channels C.
        n_div: C // n_div channels are convolved, the others attend.
        num_heads: attention heads; must divide the number of the others.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the attention's output.
        qkv_bias: bias of the query, key and value projections.
        rpe: (alpha, beta, gamma): distances up to alpha have buckets of their own, gamma is in the last, beta.

    Raises:
        ValueError: if `num_heads` does not divide the attending channels or there are none, or none to convolve.

    Shape:
        (B, C, H, W) to (B, C, H, W), any H and W.

    Example:
        >>> import torch
        >>> PartialSelfAttention(64)(torch.randn(1, 64, 30, 41)).shape
        torch.Size([1, 64, 30, 41])
    """

    def __init__(
        self,
        dim: int,
        n_div: int = 4,
        num_heads: int = 4,
        attn_drop: float = 0.1,
        proj_drop: float = 0.1,
        qkv_bias: bool = False,
        rpe: tuple[int, int, int] = (20, 40, 160),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, n_div, device, dtype)
        dd = {"device": device, "dtype": dtype}
        width = self.widths[1]
        check_counts(num_heads=num_heads)
        check_rates(attn_drop=attn_drop)
        if width % num_heads:
            raise ValueError(f"the {width} attending channels of {dim} are not divisible by num_heads {num_heads}")
        self.num_heads, self.rpe = num_heads, tuple(rpe)
        self.norm = nn.LayerNorm(width, eps=1e-6, **dd)
        self.qkv = Pointwise(width, 3 * width, bias=qkv_bias, **dd)
        # As published, with columns for negative distances, which there are none of.
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * self.rpe[1] + 1, **dd))
        self.attn_drop = attn_drop
        self.proj = Pointwise(width, width, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._bias_cache = ParameterCache()

    def attend(self, x: Tensor) -> Tensor:
        out = _distance_biased_attention(self, self.qkv(self.norm(x.permute(0, 2, 3, 1))))
        return self.proj_drop(self.proj(out)).permute(0, 3, 1, 2)


@torch.fx.wrap
def _distance_biased_attention(layer: PartialSelfAttention, qkv: Tensor) -> Tensor:
    """(B, H, W, 3C) projections to (B, H, W, C). Opaque to symbolic tracing, as the bias depends on the size."""
    H, W = fixed(*qkv.shape[1:3])

    def bias() -> Tensor:
        buckets = (_graph_buckets if is_symbolic(H, W) else distance_buckets)(H, W, layer.rpe, qkv.device)
        return layer.rpb.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)[None].to(qkv.dtype)

    q, k, v = parted_heads(qkv, layer.num_heads)
    mask = for_batch(layer._bias_cache((H, W, qkv.dtype), [layer.rpb], bias), q)
    dropout = layer.attn_drop if layer.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = out.transpose(1, 2)
    if is_exporting():  # kernels differ in the layout of what they return, and a view would choose one
        out = out.clone(memory_format=torch.contiguous_format)
    return out.flatten(2).unflatten(1, (H, W))


@size_constant
def distance_buckets(height: int, width: int, rpe: tuple[int, int, int], device: torch.device) -> Tensor:
    """(N, N) column of the bias table for each pair of the N = height * width positions of a map."""
    # In float32, as the published tables were trained.
    dy, dx = np.ogrid[:height, :width]
    bucket = _bucket(np.round(np.sqrt((dy**2 + dx**2).astype(np.float32))), *rpe)
    y, x = np.divmod(np.arange(height * width), width)
    return torch.from_numpy(bucket[abs(y[:, None] - y), abs(x[:, None] - x)]).to(device)


def _bucket(distance: np.ndarray, alpha: int, beta: int, gamma: int) -> np.ndarray:
    """Column of the bias table for each rounded distance."""
    far = np.log(np.maximum(distance, alpha) / alpha) / math.log(gamma / alpha) * (beta - alpha)
    return beta + np.where(distance <= alpha, distance, np.minimum(np.round(alpha + far), beta)).astype(np.int64)


def _graph_buckets(height: Size, width: Size, rpe: tuple[int, int, int], device: torch.device) -> Tensor:
    """`distance_buckets` in a graph. Only the bucket of a rounded distance, of which there are few, is a constant."""
    dy, dx = ((p - p[:, None]).square() for p in (torch.arange(n, device=device) for n in (height, width)))
    distance = (dy[:, None, :, None] + dx[None, :, None, :]).to(torch.float32).sqrt().round()
    distance = distance.to(torch.int64).clamp(max=rpe[-1]).reshape(height * width, height * width)
    return _bucket_table(rpe, device)[distance]


@size_constant
def _bucket_table(rpe: tuple[int, int, int], device: torch.device) -> Tensor:
    return torch.from_numpy(_bucket(np.arange(rpe[-1] + 1, dtype=np.float32), *rpe)).to(device)
