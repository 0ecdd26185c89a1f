"""Which of torch's libraries multiplies: for what `is_direct` is true of, on CPUs.

`F.linear` calls MKL, a 1 x 1 convolution of the same numbers oneDNN. Which one is faster depends on the processor: up
to three times on some, equal on others. And where inputs have few channels MKL, which first copies the bias to the
result, is slower than oneDNN's linear map, which torch has for its compiler: without gradients, and outside autograd
with GELU in the same pass.
"""

import json
import platform
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..errors import VisionattnError
from .direct import in_own_precision

ROUTES = ("auto", "linear", "conv")
FEW_CHANNELS = 128
LARGE = 2**24  # multiply-adds, below which nothing is measured: MKL is called in less time
CLEARLY = 1.2  # times as fast: two measurements of equal routes must not differ in what they choose
FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_route = "auto"


def set_pointwise(route: str) -> None:
    """Set how products over channels are computed on CPUs; graphs, other devices and half precision are as they are.

    Args:
        route: "linear" for `F.linear`, "conv" for 1 x 1 convolutions, or "auto" for the one that is faster here, by a
            measurement of 0.1 s that is made once and kept in torch's cache folder. They round differently.

    Raises:
        VisionattnError: if there is no such route.
    """
    global _route
    if route not in ROUTES:
        raise VisionattnError(f"expected a route of pointwise products among {', '.join(ROUTES)}, got {route!r}")
    _route = route


def get_pointwise() -> str:
    """The route of large products, "linear" or "conv": what was set, or measured."""
    return _measured(torch.get_num_threads()) if _route == "auto" else _route


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """F.linear(x, weight, bias), or its exact GELU; `is_direct` must be true of all."""
    graph = torch.is_grad_enabled()
    conv = takes_conv(x, weight)
    few = bias is not None and weight.shape[1] <= FEW_CHANNELS and not is_small(x, len(weight))
    fused = FUSED and _fit(x, weight, bias)
    if fused and not graph and (gelu or conv or few):
        return _linear(x, weight, bias, gelu)
    y = _conv(x, weight, bias) if conv else (_FewChannels.apply if fused and few else F.linear)(x, weight, bias)
    if not gelu:
        return y
    return F.gelu(y) if graph else torch.ops.aten.gelu_(y)


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN takes these; of what is wrong with others `F.linear` tells."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.shape[-1:] == weight.shape[1:]
        and weight.numel() > 0
        and (bias is None or bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))


class _FewChannels(Function):
    """oneDNN's linear map, with gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _linear(x, weight, bias)

    @staticmethod
    @in_own_precision
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = None if weight is None else (rows @ weight).reshape(*grad.shape[:-1], weight.shape[1])
        dweight = None if x is None else rows.t() @ x.reshape(-1, x.shape[-1])
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


def is_small(x: Tensor, width: int) -> bool:
    """Whether a product with `width` outputs is over before it could pay to choose a library."""
    return _route == "auto" and x.numel() * width < LARGE


def takes_conv(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` computes by convolution."""
    if _route != "auto":
        return _route == "conv" and x.numel() > 0
    return not is_small(x, len(weight)) and x.dtype == torch.float32 and get_pointwise() == "conv"


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(rows, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@cache
def _measured(threads: int) -> str:
    key = f"{platform.processor() or platform.machine()}, {_processor()}, {threads} threads, torch {torch.__version__}"
    file = Path(torch.hub.get_dir()).parent / "visionattn" / "pointwise.json"
    try:
        kept = json.loads(file.read_text())
        if kept.get(key) in ROUTES[1:]:
            return kept[key]
    except (OSError, ValueError, AttributeError):
        kept = {}
    route = _measure()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{time.time_ns()}")
        new.write_text(json.dumps(kept | {key: route}, indent=1))
        new.replace(file)
    except OSError:
        pass  # it is measured again next time
    return route


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


@torch.no_grad()
def _measure() -> str:
    """The route that is clearly faster at what the models spend most of their time on."""
    x, weight = (torch.ones(n, 384, device="cpu") for n in (1568, 1536))
    times = {F.linear: [], _conv: []}
    with torch.inference_mode(False):
        for _ in range(5):
            for compute, found in times.items():
                start = time.perf_counter()
                compute(x, weight, None)
                found.append(time.perf_counter() - start)
    linear, conv = (min(found) for found in times.values())
    return "conv" if conv * CLEARLY < linear else "linear"
