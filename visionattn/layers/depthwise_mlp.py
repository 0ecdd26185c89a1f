"""MLP with a convolution."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .checks import check_counts
from .depthwise import DepthwiseConv2d, depthwise, depthwise_backward, depthwise_conv
from .direct import in_own_precision, is_direct, is_watched, replayed, replays
from .int8 import Int8Linear
from .pointwise import CHUNK, Pointwise2d
from .product import product


class DepthwiseMlp(nn.Module):
    """MLP with a 3 x 3 depthwise convolution before the activation: (B, C, H, W) to (B, C, H, W).

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        drop: dropout rate after the activation and after the second product.
    """

    last_product = "fc2"

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        check_counts(dim=dim, hidden_dim=hidden_dim)
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Pointwise2d(dim, hidden_dim, **dd)
        self.dwconv = depthwise(hidden_dim, 3, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Pointwise2d(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_direct(x, Pointwise2d):
            fc1, conv, fc2 = self.fc1, self.dwconv, self.fc2
            compute = _DepthwiseMlp.apply if torch.is_grad_enabled() else _forward
            return compute(x, fc1.weight, fc1.bias, conv.weight, conv.bias, fc2.weight, fc2.bias, conv.dilation[0])
        if self._is_direct(x, Int8Linear) and self.fc1.is_direct(x):
            step = _step(x, self.fc1.scale)
            return torch.cat([self.fc2(torch.ops.aten.gelu_(self.dwconv(self.fc1(part)))) for part in x.split(step)])
        return self.drop2(self.fc2(self.drop1(self.act(self.dwconv(self.fc1(x))))))

    def _is_direct(self, x: Tensor, kind: type[nn.Module]) -> bool:
        modules = self.fc1, self.dwconv, self.act, self.drop1, self.fc2, self.drop2
        return (
            is_direct(x, *self.parameters())
            and type(self.dwconv) is DepthwiseConv2d
            and self.dwconv.is_regular()
            and type(self.fc1) is type(self.fc2) is kind
            and type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and not any(drop.p and drop.training for drop in (self.drop1, self.drop2))
            and not is_watched(*modules)
        )


class _DepthwiseMlp(Function):
    """The MLP, of which only the input and the first product are kept for the backward pass: the convolution and the
    activation cost less to compute again than to keep."""

    @staticmethod
    def forward(ctx, x: Tensor, *args) -> Tensor:
        hidden = []
        out = _forward(x, *args, hidden)
        ctx.save_for_backward(x, *args[:-1], *hidden)
        ctx.dilation = args[-1]
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w, b, w2, b2, *hidden = saved = ctx.saved_tensors  # once, or checkpoints refuse
        wanted, dilation = ctx.needs_input_grad, ctx.dilation
        if replays(grad):
            return *replayed(partial(_plain, dilation=dilation), saved[:7], wanted[:7], grad), None
        dx = torch.empty_like(x, memory_format=torch.channels_last) if wanted[0] else None
        dw1, db1, dw, db, dw2, db2 = (
            torch.zeros_like(t) if needed else None
            for t, needed in zip((w1, b1, w, b, w2, b2), wanted[1:7], strict=True)
        )
        start = 0
        for h in hidden:
            part = slice(start, start := start + len(h))
            x_i, grad_i = _rows(x[part]), _rows(grad[part])
            a = depthwise_conv(h, w, b, dilation)
            if dw2 is not None:
                dw2.addmm_(grad_i.t(), _rows(F.gelu(a)))
            if db2 is not None:
                db2 += grad_i.sum(0)
            da = (grad_i @ w2).view(len(h), *h.shape[2:], len(w1)).permute(0, 3, 1, 2)
            torch.ops.aten.gelu_backward.grad_input(da, a, grad_input=da)
            if db is not None:
                db += _rows(da).sum(0)
            dh, dw_i = depthwise_backward(da, h, w, dilation, (any(wanted[:3]), wanted[3]))
            if dw is not None:
                dw += dw_i
            if dw1 is not None:
                dw1.addmm_(_rows(dh).t(), x_i)
            if db1 is not None:
                db1 += _rows(dh).sum(0)
            if dx is not None:
                torch.mm(_rows(dh), w1, out=_rows(dx[part]))
        return dx, dw1, db1, dw, db, dw2, db2, None


def _plain(
    x: Tensor, w1: Tensor, b1: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor, dilation: int
) -> Tensor:  # fmt: skip
    h = F.linear(x.permute(0, 2, 3, 1), w1, b1).permute(0, 3, 1, 2)
    return F.linear(F.gelu(depthwise_conv(h, w, b, dilation)).permute(0, 2, 3, 1), w2, b2).permute(0, 3, 1, 2)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor, dilation: int,
    hidden: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The MLP on some samples after the other, outside autograd; `hidden` gets what the first products return."""
    out = x.new_empty(len(x), *x.shape[2:], len(w2)).permute(0, 3, 1, 2)
    step = _step(x, w1)
    for x_i, out_i in zip(x.split(step), out.split(step), strict=True):
        h = product(x_i.permute(0, 2, 3, 1), w1, b1).permute(0, 3, 1, 2)
        if hidden is not None:
            hidden.append(h)
        h = torch.ops.aten.gelu_(depthwise_conv(h, w, b, dilation))
        torch.addmm(b2, _rows(h), w2.t(), out=_rows(out_i))
    return out


def _step(x: Tensor, w1: Tensor) -> int:
    """How many samples are computed at once, where a batch can be cut so fine."""
    return max(1, CHUNK // max(1, len(w1) * x.shape[2:].numel() * x.element_size()))


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B H W, C), a view where it is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
