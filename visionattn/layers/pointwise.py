"""Products over channels alone, behind one class so that how they are executed can change in one place."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .checks import check_counts
from .direct import in_own_precision, is_direct, is_watched, replayed, replays
from .int8 import Int8Linear
from .product import is_small, product, takes_conv

CHUNK = 2**23
"""Bytes of hidden channels that are computed at once: they stay in the cache, and below the 32 MB from which on glibc
returns memory to the system after every use, which costs more than a product that fills it."""


class Pointwise(nn.Linear):
    """Linear map of the channels of every position; on maps, what others write as a 1 x 1 convolution.

    Shape:
        (..., C_in) to (..., C_out), channels last.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # which may be made of others whenever it is asked for
        if not is_direct(x) or is_small(x, self.out_features):
            return F.linear(x, weight, bias)
        parameters = (weight,) if bias is None else (weight, bias)
        return product(x, weight, bias) if is_direct(*parameters) else F.linear(x, weight, bias)


class Pointwise2d(Pointwise):
    """Linear map of the channels of every position of a channels-first map, in channels_last memory at no extra copy.

    Shape:
        (B, C_in, H, W) to (B, C_out, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two pointwise products with an activation between them.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        act_layer: activation, exact GELU by default.
        drop: dropout rate after each product.

    Shape:
        (..., C) to (..., C), channels last.
    """

    last_product = "fc2"

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, hidden_dim=hidden_dim)
        self.fc1 = Pointwise(dim, hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Pointwise(hidden_dim, dim, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_direct(x):
            compute = GeluMlp.apply if torch.is_grad_enabled() else gelu_mlp
            return compute(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        if type(self.fc1) is type(self.fc2) is Int8Linear and self.fc1.is_direct(x) and self._is_plain():
            rows = x.reshape(-1, x.shape[-1])
            step = _step(rows, self.fc1.scale)
            return torch.cat([self.fc2(self.fc1(part, gelu=True)) for part in rows.split(step)]).view(*x.shape[:-1], -1)
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))

    def _is_direct(self, x: Tensor) -> bool:
        fc1, fc2 = self.fc1, self.fc2
        return (
            type(fc1) is type(fc2) is Pointwise
            and fc1.bias is not None
            and fc2.bias is not None
            and is_direct(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
            and not (torch.is_grad_enabled() and takes_conv(x, fc1.weight))  # whose gradients are convolutions too
            and self._is_plain()
        )

    def _is_plain(self) -> bool:
        """Whether nothing is between the products but exact GELU."""
        drops = self.drop1, self.drop2
        return (
            type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and not any(drop.p and drop.training for drop in drops)
            and not is_watched(self.fc1, self.act, self.fc2, *drops)
        )


def _plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


class GeluMlp(Function):
    """`gelu_mlp` that keeps for the backward pass what the first product returns, and not its activation, which costs
    less to compute again than to keep."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        hidden = []
        out = gelu_mlp(x, *parameters, hidden)
        ctx.save_for_backward(x, *parameters, *hidden)
        return out

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, b2, *hidden = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if replays(grad):
            return replayed(_plain, [x, w1, b1, w2, b2], wanted, grad)
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        step = _step(rows, w1)
        dx = torch.empty_like(rows) if wanted[0] else None
        dw1, db1, dw2 = (
            torch.empty_like(t) if needed else None for t, needed in zip((w1, b1, w2), wanted[1:4], strict=True)
        )
        memory = torch.empty_like(hidden[0])
        for i, (x_i, a, grad_i) in enumerate(zip(rows.split(step), hidden, grad.split(step), strict=True)):
            beta, da = float(i > 0), memory[: len(a)]
            if dw2 is not None:
                dw2.addmm_(grad_i.t(), torch.ops.aten.gelu.out(a, out=da), beta=beta)
            torch.mm(grad_i, w2, out=da)
            torch.ops.aten.gelu_backward.grad_input(da, a, grad_input=da)
            if dw1 is not None:
                dw1.addmm_(da.t(), x_i, beta=beta)
            if db1 is not None:
                db1 = da.sum(0) if i == 0 else db1.add_(da.sum(0))
            if dx is not None:
                torch.mm(da, w1, out=dx[i * step : i * step + len(x_i)])
        db2 = grad.sum(0) if wanted[4] else None
        return dx if dx is None else dx.view_as(x), dw1, db1, dw2, db2


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, hidden: list[Tensor] | None = None) -> Tensor:
    """F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2), a chunk of positions after the other, outside autograd.

    Args:
        x: (..., C_in).
        w1, b1, w2, b2: weights and biases of the products.
        hidden: gets what the first product returns, chunk by chunk.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(*x.shape[:-1], len(w2))
    step = _step(rows, w1)
    for x_i, out_i in zip(rows.split(step), out.view(-1, len(w2)).split(step), strict=True):
        h = product(x_i, w1, b1, gelu=hidden is None)
        if hidden is not None:
            hidden.append(h)
            h = F.gelu(h)
        if takes_conv(h, w2):
            out_i.copy_(product(h, w2, b2))
        else:
            torch.addmm(b2, h, w2.t(), out=out_i)
    return out


def _step(rows: Tensor, w1: Tensor) -> int:
    """How many rows are computed at once: chunks of one size."""
    chunks = max(1, -(-len(rows) * len(w1) * w1.element_size() // CHUNK))
    return max(1, -(-len(rows) // chunks))
