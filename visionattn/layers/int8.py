"""Linear maps with int8 weights, on CPUs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .direct import is_direct

LEVELS = 254.9 if getattr(torch.cpu, "_is_vnni_supported", bool)() else 126.9
"""Of inputs; without instructions for int8 pairs of products are added in 16 bits, which must not overflow.
A little below the largest one, so that nothing is rounded to the next."""
SMALLEST = 1e-37
"""Step between levels, below which inputs count as 0: that of levels in float32 would be infinite."""
SCRATCH = 2**16
"""Numbers that are rounded at once: they stay in the cache."""


class Int8Linear(nn.Module):
    """Linear map with int8 weights.

    Args:
        linear: what it replaces.
        of_maps: map the second axis of maps (B, C, H, W), as a `Pointwise2d` does, and not the last one.

    Attributes:
        weight: what the int8 weights stand for.
    """

    def __init__(self, linear: nn.Linear, of_maps: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.of_maps = of_maps
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        self.register_buffer("int8", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self._packed: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        return self.int8.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        if self.of_maps:
            return self._multiply(x.permute(0, 2, 3, 1), gelu).permute(0, 3, 1, 2)
        return self._multiply(x, gelu)

    def _multiply(self, x: Tensor, gelu: bool) -> Tensor:
        if self.is_direct(x):
            low, high = (each.item() for each in torch.aminmax(x))
            step = (max(high, 0.0) - min(low, 0.0)) / LEVELS
            if math.isfinite(step):
                return self._multiply_int8(x, step if step > SMALLEST else 1.0, min(low, 0.0), gelu)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y

    def _multiply_int8(self, x: Tensor, step: float, low: float, gelu: bool) -> Tensor:
        rows, zero = x.reshape(-1, x.shape[-1]), round(-low / step)
        offset, rounded = torch.tensor(zero + 0.5, device=x.device), rows.new_empty(rows.shape, dtype=torch.uint8)
        count = max(1, SCRATCH // rows.shape[1])
        scratch = rows.new_empty(min(count, len(rows)), rows.shape[1])
        for rows_i, rounded_i in zip(rows.split(count), rounded.split(count), strict=True):
            # Conversion cuts off what is behind the point.
            rounded_i.copy_(torch.add(offset, rows_i, alpha=1 / step, out=scratch[: len(rows_i)]))
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                zeros = torch.zeros(self.out_features, dtype=torch.int32, device=x.device)
                self._packed = torch.ops.onednn.qlinear_prepack(self.int8, None), zeros
        post = ("gelu", [], "none") if gelu else ("none", [], "")
        weight, zeros = self._packed
        y = torch.ops.onednn.qlinear_pointwise(
            rounded, step, zero, weight, self.scale, zeros, self.bias, 1.0, 0, torch.float32, *post
        )
        return y.view(*x.shape[:-1], -1)

    def is_direct(self, x: Tensor) -> bool:
        """Whether the product is computed in int8."""
        tensors = (x, self.scale) if self.bias is None else (x, self.scale, self.bias)
        has_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return not has_gradients and is_direct(*tensors) and x.dtype == torch.float32 and x.numel() > 0

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._packed = None

    def _apply(self, *args, **kwargs) -> "Int8Linear":
        self._packed = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
