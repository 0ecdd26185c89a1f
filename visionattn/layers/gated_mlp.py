"""The gated MLP with a depthwise convolution and a norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .checks import check_counts
from .depthwise import DepthwiseConv2d, depthwise
from .direct import in_own_precision, is_direct, is_watched, replayed, replays
from .norm import ChannelRmsNorm
from .pointwise import CHUNK, Pointwise2d

EPS = 1e-6


class GatedMlp(nn.Module):
    """fc2(norm(act(dwconv(gate)) * value)) of the two halves of fc1.

    Args:
        dim: channels in and out.
        hidden_dim: channels of the gate and of the value.
        dconv: convolve the gate, 3 x 3 and depthwise.
        norm: root mean square norm of the product.
        act_layer: activation of the gate.
        drop: dropout rate before and after fc2.

    Shape:
        (B, C, H, W) to (B, C, H, W).
    """

    last_product = "fc2"

    def __init__(
        self, dim: int, hidden_dim: int, dconv: bool = True, norm: bool = True,
        act_layer: Callable[[], nn.Module] = nn.GELU, drop: float = 0.0, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_counts(dim=dim, hidden_dim=hidden_dim)
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Pointwise2d(dim, 2 * hidden_dim, **dd)
        self.dwconv = depthwise(hidden_dim, 3, **dd) if dconv else nn.Identity()
        self.act = act_layer()
        self.norm = ChannelRmsNorm(hidden_dim, eps=EPS, **dd) if norm else nn.Identity()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Pointwise2d(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if (parameters := self._direct(x)) is not None:
            compute = _GatedMlp.apply if torch.is_grad_enabled() else _forward
            return compute(x.permute(0, 2, 3, 1), *parameters).permute(0, 3, 1, 2)
        gate, value = self.fc1(x).chunk(2, 1)
        return self.drop2(self.fc2(self.drop1(self.norm(self.act(self.dwconv(gate)) * value))))

    def _direct(self, x: Tensor) -> tuple[Tensor | None, ...] | None:
        """The parameters, or None if not all that they mean is what `_plain` says."""
        fc1, dwconv, act, norm, fc2 = parts = self.fc1, self.dwconv, self.act, self.norm, self.fc2
        if type(fc1) is not Pointwise2d or type(fc2) is not Pointwise2d or type(dwconv) is not DepthwiseConv2d:
            return None
        if type(act) is not nn.GELU or act.approximate != "none" or dwconv.dilation != (1, 1):
            return None
        if any(drop.p and drop.training for drop in (self.drop1, self.drop2)):
            return None
        weight = norm.weight if type(norm) is ChannelRmsNorm else None
        if weight is None and type(norm) is not nn.Identity:
            return None
        parameters = fc1.weight, fc1.bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias
        if not is_direct(x, *parameters, *(() if weight is None else (weight,))):
            return None
        return None if is_watched(*parts, self.drop1, self.drop2) else (*parameters, weight)


def _plain(x: Tensor, w1: Tensor, b1: Tensor, wd: Tensor, bd: Tensor, w2: Tensor, b2: Tensor, wn: Tensor | None):
    """The layer for (B, H, W, C) as its equation has it, of float32 or float64."""
    gate, value = F.linear(x, w1, b1).chunk(2, -1)
    z = F.gelu(_convolve(gate, wd, bd)) * value
    return F.linear(z if wn is None else F.rms_norm(z, wn.shape, wn, EPS), w2, b2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor, wd: Tensor, bd: Tensor, w2: Tensor, b2: Tensor, wn: Tensor | None,
    kept: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`_plain`, some samples after the others. The norm's factor, one number per position, is applied after fc2.

    Args:
        kept: gets the gate, the convolved gate, the value and the norm's factor of each group of samples.
    """
    (wg, wv), (bg, bv), w2 = w1.chunk(2), b1.chunk(2), w2 if wn is None else w2 * wn
    out = x.new_empty(*x.shape[:3], len(w2))
    step = _step(x, wg)
    for x_i, out_i in zip(x.split(step), out.split(step), strict=True):
        gate, value = F.linear(x_i, wg, bg), F.linear(x_i, wv, bv)  # apart, so that both are contiguous
        conv = _convolve(gate, wd, bd)
        z = (torch.ops.aten.gelu_(conv) if kept is None else F.gelu(conv)).mul_(value).flatten(0, 2)
        out_i = out_i.flatten(0, 2)
        factor = None
        if wn is None:
            torch.addmm(b2, z, w2.t(), out=out_i)
        else:
            factor = torch.linalg.vector_norm(z, dim=-1, keepdim=True).square_().div_(len(wn)).add_(EPS).rsqrt_()
            torch.addcmul(b2, torch.mm(z, w2.t(), out=out_i), factor, out=out_i)
        if kept is not None:
            kept += gate, conv, value, factor
        del gate, value, conv, z  # by the next samples, which may have their memory
    return out


def _step(x: Tensor, wg: Tensor) -> int:
    """Samples that are computed at once."""
    size = x[:1].numel() // x.shape[-1] * len(wg) * x.element_size()
    return max(1, CHUNK // max(1, size))


class _GatedMlp(Function):
    """`_forward` that keeps no activation, product or norm for the backward pass, but computes them again."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor | None) -> Tensor:
        kept = []
        out = _forward(x, *parameters, kept)
        ctx.save_for_backward(x, *parameters, out, *kept)
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out = (saved := ctx.saved_tensors)[:9]
        kept = saved[9:]
        if replays(grad):
            return replayed(_plain, inputs, ctx.needs_input_grad, grad)
        x, w1, b1, wd, bd, w2, b2, wn = inputs
        (wg, wv), scaled = w1.chunk(2), w2 if wn is None else w2 * wn
        dx, dw1, db1, dw2, dwd, dbd = (torch.zeros_like(t) for t in (x, w1, b1, w2, wd, bd))
        (dwg, dwv), (dbg, dbv) = dw1.chunk(2), db1.chunk(2)
        step = _step(x, wg)
        for i, start in enumerate(range(0, len(x), step)):
            gate, conv, value, factor = kept[4 * i : 4 * i + 4]
            x_i, dx_i, grad_i, out_i = (t[start : start + step].flatten(0, 2) for t in (x, dx, grad, out))
            act = F.gelu(conv)
            z = act * value
            z_rows = z.flatten(0, 2)
            if wn is None:
                dz = grad_i @ scaled
            else:
                # The norm's own part of the gradient, - z factor^2 mean(dz z), from the smaller side of fc2.
                inner = ((out_i - b2) * grad_i).sum(-1, keepdim=True)
                grad_i = grad_i * factor
                dz = (grad_i @ scaled).addcmul_(z_rows, inner * factor.square() / len(wn), value=-1)
            dw2.addmm_(grad_i.t(), z_rows)
            dz = dz.view_as(z)
            dconv = torch.mul(dz, value, out=z)
            dvalue = dz.mul_(act).flatten(0, 2)
            torch.ops.aten.gelu_backward.grad_input(dconv, conv, grad_input=dconv)
            dgate, dwd_i, dbd_i = _convolve_backward(dconv, gate, wd)
            dgate = dgate.flatten(0, 2)
            torch.mm(dgate, wg, out=dx_i).addmm_(dvalue, wv)
            for d, dw, db in ((dgate, dwg, dbg), (dvalue, dwv, dbv)):
                dw.addmm_(d.t(), x_i)
                db += d.sum(0)
            dwd += dwd_i
            dbd += dbd_i
            del act, z, z_rows, dz, dconv, dvalue, dgate, d
        dwn = None
        if wn is not None:
            dw2, dwn = dw2 * wn, (dw2 * w2).sum(0)
        return dx, dw1, db1, dwd, dbd, dw2, grad.sum((0, 1, 2)), dwn


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias of `_convolve`."""
    dx, dw, db = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0],
        len(weight), [True, True, True],
    )  # fmt: skip
    return dx.permute(0, 2, 3, 1), dw, db
