"""Whether attention collapses or grows outliers: entropy and logits of every head, kurtosis of what layers return.

Training diverges as attention entropy falls ("Stabilizing Transformer Training by Preventing Attention Entropy
Collapse", arXiv 2303.06296), and activations that int8 cannot hold grow where heads try to do nothing ("Quantizable
Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929).
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import VisionattnError
from .explain.capture import evaluating
from .explain.maps import LAYERS, entry_of, layer_maps
from .layers import (
    AttentiveConv2d,
    ContMix2d,
    HaloAttention2d,
    LargeKernelAttention,
    NormAwareLinearAttention,
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
    PolarizedSelfAttention,
    RecursiveGatedConv,
    SubspaceAttention,
)
from .layers.checks import check_counts
from .layers.precision import without_autocast

IMAGES = 2
"""Images of a batch whose attention is looked at: all of their queries."""
SIDE = 64
"""Height and width in positions of the part of a larger map that is looked at."""
OF_ALL_IMAGES = ("rotary", "mask")
"""What layers are called with that has no batch."""
CHANNELS_FIRST = (
    *(AttentiveConv2d, ContMix2d, HaloAttention2d, LargeKernelAttention, NormAwareLinearAttention, RecursiveGatedConv),
    *(PartialChannelAttention, PartialSelfAttention, PartialSpatialAttention),
    *(PolarizedSelfAttention, SubspaceAttention),
)
"""Layers of `explain` on maps (B, C, H, W); channels come last elsewhere."""


def entropy(logits: Tensor) -> Tensor:
    """Entropy -sum A log A of A = softmax(logits) in nats, between 0 and the logarithm of the number of keys.

    Args:
        logits: (..., keys); -inf for keys that are masked.

    Returns:
        (...), nan where all keys are masked.

    Example:
        >>> import torch
        >>> entropy(torch.zeros(8))
        tensor(2.0794)
    """
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def attention_entropy(q: Tensor, k: Tensor, scale: float | None = None, rows: int = 64) -> Tensor:
    """Entropy of softmax(scale q k^T) for every query, in nats.

    Args:
        q: queries (..., N, d).
        k: keys (..., M, d).
        scale: factor of the logits, d**-0.5 if None.
        rows: queries whose logits are held at once.

    Returns:
        (..., N).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.cat([entropy(part @ k.mT * scale) for part in q.split(rows, -2)], -1)


def entropy_bound(norm: Tensor, keys: int) -> Tensor:
    """The least entropy of a softmax over logits whose distance from their mean is `norm` at most.

    It falls exponentially with the norm, and is met where one key sticks out of others that are equal.

    Args:
        norm: Euclidean norms t of centred logits (...).
        keys: number of keys N, 2 at least.

    Returns:
        log(1 + (N - 1) b) + t sqrt(N (N - 1)) b / (1 + (N - 1) b) with b = exp(-t sqrt(N / (N - 1))), (...).

    Raises:
        ValueError: if there are fewer keys.
    """
    if keys < 2:
        raise ValueError(f"expected two keys or more, got {keys}")
    others = keys - 1
    b = torch.exp(-norm * math.sqrt(keys / others))
    return torch.log1p(others * b) + norm * math.sqrt(keys * others) * b / (1 + others * b)


def activation_kurtosis(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Kurtosis of the channels of each token, about 3 where they are normal: the fourth central moment over the square
    of the unbiased variance.

    Args:
        x: (..., C).
        eps: added to what is divided by.

    Returns:
        (...).
    """
    return (x - x.mean(-1, keepdim=True)).pow(4).mean(-1) / (x.var(-1).square() + eps)


def activation_quantizer(x: Tensor, low: Tensor | float, high: Tensor | float, bits: int = 8) -> dict[str, Tensor]:
    """What integers make of activations, on a scale that begins at `low` and ends at `high` and has an exact zero, as
    post-training quantisation has it: how much of a layer's values a few outliers cost.

    Args:
        x: activations of any shape.
        low: least value that is met; 0 where that is positive.
        high: largest one.
        bits: of a code.

    Returns:
        y: what the codes stand for, whose gradient goes to those of x that are between the ends; code: round(x / scale)
        + zero_point, from 0 to 2^bits - 1; scale; zero_point.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 0.3, 4.1])
        >>> activation_quantizer(x, x.min(), x.max())["y"]
        tensor([-1.0000,  0.0000,  0.3000,  4.1000])
    """
    check_counts(bits=bits)
    levels = 2**bits - 1
    low, high = (torch.as_tensor(end, dtype=torch.float32, device=x.device) for end in (low, high))
    low, high = low.clamp(max=0), high.clamp(min=1e-8)
    scale = (high - low) / levels
    zero = (-low / scale).round().clamp(0, levels)
    y = torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), 0, levels)
    return {"y": y, "code": (y.detach() / scale).round() + zero, "scale": scale, "zero_point": zero}


class AttentionMonitor:
    """Figures of the attention layers of a model, from forward passes that are made anyhow.

    Of each layer that `explain` knows, once it has been called, what it was called with for the first two images goes
    through the slow path, in float32 and without a gradient. Nothing that the model draws or computes changes, other
    than by rounding where hooks keep a model from a shortcut: compiled models, and iLLaMA on CPUs. No hook is left
    outside of `watching`.

    Args:
        model: with layers of ours. Hooks are put on its own modules, however it is wrapped.

    Raises:
        VisionattnError: if no layer of the model is known.

    Example:
        >>> import torch, visionattn
        >>> model = visionattn.create_model("test_litv2")
        >>> monitor = AttentionMonitor(model)
        >>> with monitor.watching():
        ...     logits = model(torch.randn(4, 3, 64, 64))
        >>> found = monitor.take()
        >>> 0 < found["attention/stages.2.blocks.0.mixer/low/entropy/0"] < 4
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: module for name, module in model.named_modules() if entry_of(module) is not None}
        if not self.layers:
            raise VisionattnError("no layer of this model is known to explain: there is nothing to monitor")
        self.found: dict[str, float] = {}
        self.seen: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the forward pass inside, which runs without compiled graphs: these would pass hooks by."""
        self.found, self.seen = {}, set()
        handles = [
            module.register_forward_hook(partial(self._measure, name), with_kwargs=True)
            for name, module in self.layers.items()
        ]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[str, float]:
        """What was measured since this was last called, by name:

        `attention/<layer>/entropy/<head>`: mean over images and queries, in nats;
        `attention/<layer>/max_logit/<head>`: the largest logit;
        `attention/<layer>/kurtosis`: mean `activation_kurtosis` of what the layer returns;
        `attention/<layer>/max_abs`: its largest magnitude.

        A layer with several softmaxes has their names behind its own: `high`, `low`, `content`, `collect`.
        """
        found, self.found = self.found, {}
        return found

    @torch.no_grad()
    def _measure(self, name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if name in self.seen:  # called again, or by the slow path of a layer around it
            return
        self.seen.add(name)
        output = (output if isinstance(output, Tensor) else output[0]).detach().float()
        if not output.numel():
            return
        tokens = output.movedim(1, -1) if _channels_first(layer) else output
        found = {"kurtosis": activation_kurtosis(tokens).mean(), "max_abs": output.abs().max()}
        inputs = inspect.signature(entry_of(layer)).bind(layer, *args, **kwargs)
        few = {key: _few(layer, key, value) for key, value in list(inputs.arguments.items())[1:]}
        few = _part(layer, few)
        maps = []
        if few is not None:
            drawn = [output.device] if output.is_cuda else []  # whatever the layer draws, the model draws what it would
            with evaluating(layer), without_autocast(output), torch.random.fork_rng(drawn):
                maps = layer_maps(layer, **few)[0]
        for each in maps:
            if each.logits is None:
                continue
            label = "".join(f"{part}/" for part in (each.kind, each.part) if part not in ("", "attention"))
            logits = each.logits.float().flatten(2, -2)  # (B, heads, queries, keys)
            found |= {f"{label}entropy/{h}": value for h, value in enumerate(entropy(logits).nanmean((0, 2)))}
            found |= {f"{label}max_logit/{h}": value for h, value in enumerate(logits.amax((0, 2, 3)))}
        values = torch.stack([value.float() for value in found.values()]).tolist()  # the device is waited for once
        self.found |= {f"attention/{name}/{key}": value for key, value in zip(found, values, strict=True)}


def _channels_first(layer: nn.Module) -> bool:
    return next(each for each in type(layer).__mro__ if each in LAYERS) in CHANNELS_FIRST


def _few(layer: nn.Module, name: str, value: Any) -> Any:
    """An argument of a layer for the first images, in the precision of the layer."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    value = value.detach() if name in OF_ALL_IMAGES else value[:IMAGES].detach()
    return value.to(next(layer.parameters()).dtype) if value.is_floating_point() else value


def _part(layer: nn.Module, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The inputs of a layer cut to `SIDE`; None if they are more and cannot be cut: pairs of positions would take too
    much memory."""
    (name, x), *others = inputs.items()
    if x.ndim == 3:
        return inputs if x.shape[1] <= SIDE**2 + 1 else None
    rows = 2 if _channels_first(layer) else 1
    if max(x.shape[rows : rows + 2]) <= SIDE:
        return inputs
    cut = x.narrow(rows, 0, min(SIDE, x.shape[rows])).narrow(rows + 1, 0, min(SIDE, x.shape[rows + 1]))
    return None if any(isinstance(value, Tensor) for _, value in others) else {**inputs, name: cut}
