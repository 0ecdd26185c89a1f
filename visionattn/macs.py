"""Multiply-adds of a model, counted as the papers count them: linear maps, convolutions and attention products.

Attention is counted by its definition, not as it is executed (tiles compute masked pairs; positional attention is
factorised).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .backbone import Stage
from .create import create_model
from .layers import (
    AgentAttention,
    AggregatedAttention,
    AttentiveConv2d,
    ChannelAttention,
    ConnectivityPredictor,
    ContMix2d,
    CosineAttention,
    FlowAttention,
    GatedPositionalSelfAttention,
    HaloAttention2d,
    HeadGate,
    HiLoAttention,
    HybridScaleAttention,
    KeyDrivenGQA,
    LinearLogNormalAttention,
    NeighborhoodAttention2d,
    NormAwareLinearAttention,
    PartialSelfAttention,
    PolarizedSelfAttention,
    ReducedAttention,
    SelectiveSelfAttention,
    SelfAttention,
    SelfGuidedAttention,
    StripeAttention2d,
    SubspaceAttention,
    WindowAttention2d,
)
from .layers.aggregated_attention import HIDDEN, distances
from .layers.context_mixing import working_size
from .layers.dilated_reparam import ChannelScale
from .layers.mixer_gate import TokenLinear
from .layers.self_guided_attention import GlobalEnhancedAttention, section_bounds
from .models.litv2 import DeformableMerging


def _neighborhood(module, inputs):
    x = inputs[0]  # (B, H, W, C) or, for the isotropic models, (B, N, C) and the grid
    H, W = x.shape[1:3] if x.ndim == 4 else inputs[1]
    window = module.window(int(H), int(W))
    # Where the map is padded, the published code computes the padded queries too, and projects them.
    padded = [max(n, k * d) for n, (k, d, _) in zip((H, W), window, strict=True)]
    keys, C = window[0][0] * window[1][0], x.shape[-1]
    N = padded[0] * padded[1]
    return 2 * N * keys * C + 3 * (N - H * W) * C * C


def _halo(module, inputs):
    C, H, W = inputs[0].shape[-3:]
    block, window, s = module.block_size, module.block_size + 2 * module.halo_size, module.query_stride
    N = -(-H // block) * -(-W // block) * (block // s) ** 2  # with padded queries, which are projected too
    dim = module.num_heads * module.dim_head
    # The published position logits are products with the whole tables.
    attention = N * (window**2 * (dim + module.dim_out) + 2 * (2 * window - 1) * dim)
    return attention + (N - -(-H // s) * -(-W // s)) * C * dim


def _dense(module, inputs):
    N, C = inputs[0].shape[1:]
    return 2 * N * N * C


def _reduced(module, inputs):
    N, C = inputs[0].shape[1:]
    return (3 if module.kind == "super" else 2) * N * N * C


def _temperatures(module, inputs):
    return len(module.on) * inputs[0].shape[1:].numel() * (module.token == "shared")


def _head_gate(module, inputs):
    products = 0 if module.kind in ("constant", "token_all") else module.weight.numel()  # of all channels: a linear map
    hidden = 0 if module.hidden_weight is None else module.hidden_weight.numel()
    return inputs[0].shape[1] * (products + hidden)


def _partial(module, inputs):
    N = inputs[0].shape[2:].numel()
    return 2 * N * N * module.widths[1]


def _gated_positional(module, inputs):
    return _dense(module, inputs) + 3 * module.num_heads * inputs[0].shape[1] ** 2


def _window(module, inputs):
    _, H, W, C = inputs[0].shape
    w = module.window_size
    N = -(-H // w) * -(-W // w) * w**2  # with the padding, which the published code projects too
    return 2 * N * w**2 * C + 4 * (N - H * W) * C * C


def _agents(module, inputs):
    C = inputs[0].shape[-1]
    return 4 * inputs[0].shape[1:-1].numel() * prod(module.agent_shape) * C


def _stripe(module, inputs):
    _, H, W, C = inputs[0].shape
    if module.stripe is None:
        return 2 * (H * W) ** 2 * C
    padded = [-(-n // module.stripe) * module.stripe for n in (H, W)]
    return (padded[0] * W**2 + padded[1] * H**2) * module.stripe * C


def _channel(module, inputs):
    C = inputs[0].shape[-1]
    return 2 * inputs[0].shape[1:].numel() * C // module.num_heads


def _log_normal(module, inputs):
    N, C = inputs[0].shape[1:]
    width = C // module.num_heads
    block = module.window_size**2 if module.window_size else width
    return 2 * N * C * (width + module.block_diagonal * block)


def _attentive_conv(module, inputs):
    C = module.x_proj.in_features
    return (
        (inputs[0][0].numel() // C - module.kernel_size**2) * C * C
    )  # the published code projects the map before it pools it


def _polarized(module, inputs):
    C, N = inputs[0].shape[1], inputs[0].shape[2:].numel()
    pooled = 3 if module.order == "parallel" else 2  # of its products, which the published code has of the map
    return C // 2 * (pooled * C * (N - 1) + 2 * N)


def _norm_aware(module, inputs):
    C = module.out_proj.in_features
    N = inputs[0][0].numel() // C
    return 2 * N * C * (N if module.kernel == "softmax" else 2 * C // module.num_heads)


def _contmix(module, inputs):
    x = inputs[0]
    height, width = working_size(*x.shape[2:], max(module.kernel_sizes))
    N, half, taps, regions = height * width, x.shape[1] // 2, *module.taps.weight.shape
    # The published code computes affinities before it projects them to taps, here the keys are projected.
    return N * (regions * half + module.groups * regions * taps + taps * half) - taps * regions * half


def _channel_scale(module, inputs):
    return inputs[0][0].numel()  # a convolution in the published code


def _predictor(module, inputs):
    (heads, N, d), (rank, reduced) = inputs[0].shape[1:], (module.proj_n.shape[1], module.proj_c_q.out_features)
    return heads * N * (2 * d * reduced + 2 * reduced * rank + N * rank)


def _hilo(module, inputs):
    _, H, W, C = inputs[0].shape
    w = module.window_size
    windows = -(-H // w) * -(-W // w)
    N, high = windows * w**2, C // module.num_heads * module.high_heads
    # With the padding, which the published code projects too.
    padded = (N - H * W) * (3 * C * high + high**2 + C * (C - high) + (C - high) ** 2)
    return padded + 2 * N * (w**2 * high + windows * (C - high))


def _position_mlp(size, key_size):
    axes = (len(distances(length, keys, torch.device("cpu"))[0]) for length, keys in zip(size, key_size, strict=True))
    return 2 * HIDDEN * prod(axes)  # its first layer, a sum over the axes here; the second one is a linear map


def _cosine(module, inputs):
    size, N = inputs[0].shape[1:3], inputs[0].shape[1:3].numel()
    return 2 * N * N * inputs[0].shape[-1] + _position_mlp(size, size)


def _aggregated(module, inputs):
    (H, W, C), pooled = inputs[0].shape[1:], module.pooled_size(*inputs[0].shape[1:3])
    return H * W * C * (2 * prod(pooled) + 3 * module.window**2) + _position_mlp((H, W), pooled)


def _hybrid_scale(module, inputs):
    _, H, W, C = inputs[0].shape
    w, keys = module.window_size, max(1, H // module.sr_ratio) * max(1, W // module.sr_ratio)
    return H * W * keys * C + -(-H // w) * -(-W // w) * w**4 * C


def _self_guided(module, inputs):
    _, H, W, C = inputs[0].shape
    keys = sum(groups for _, _, groups in section_bounds(module, H * W))
    return (2 * keys + 1) * H * W * C  # the published code merges once more, for the other half of the heads


def _all_to_all(module, inputs):
    _, H, W, C = inputs[0].shape
    return 2 * (H * W) ** 2 * C


def _token_linear(module, inputs):
    return module.weight.numel() * inputs[0].shape[2]


def _deformable(module, inputs):
    _, C, H, W = inputs[0].shape
    return 8 * C * C * (H // 2) * (W // 2)  # the product with the samples; the interpolation is not counted


# Multiply-adds of one sample in a layer besides its linear maps and convolutions, from the layer and its inputs.
ATTENTION = {
    AgentAttention: _agents,
    StripeAttention2d: _stripe,
    NeighborhoodAttention2d: _neighborhood,
    GatedPositionalSelfAttention: _gated_positional,
    HaloAttention2d: _halo,
    SelfAttention: _dense,
    ReducedAttention: _reduced,
    KeyDrivenGQA: _dense,
    SelectiveSelfAttention: _temperatures,  # besides what it counts as a SelfAttention
    HeadGate: _head_gate,
    ConnectivityPredictor: _predictor,
    WindowAttention2d: _window,
    ChannelAttention: _channel,
    FlowAttention: _channel,  # its product of keys and values is between channels too
    LinearLogNormalAttention: _log_normal,
    HiLoAttention: _hilo,
    DeformableMerging: _deformable,
    AttentiveConv2d: _attentive_conv,
    ContMix2d: _contmix,
    ChannelScale: _channel_scale,
    SubspaceAttention: _channel_scale,
    PartialSelfAttention: _partial,
    PolarizedSelfAttention: _polarized,
    NormAwareLinearAttention: _norm_aware,
    CosineAttention: _cosine,
    AggregatedAttention: _aggregated,
    HybridScaleAttention: _hybrid_scale,
    SelfGuidedAttention: _self_guided,
    GlobalEnhancedAttention: _all_to_all,
    TokenLinear: _token_linear,
}


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """torch's counter of operations. Fused attention is taken apart: not every torch counts it on every device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def count_macs(model: nn.Module, input_size: Sequence[int], parts: Sequence[str] = ()) -> dict[str, int]:
    """Multiply-adds of one sample, in all and in parts of a model.

    Args:
        model: on the meta device, in eval mode.
        input_size: (channels, height, width) in pixels.
        parts: names of modules.

    Returns:
        multiply-adds by the names of the parts; those of the whole by "".
    """
    found: Counter[str] = Counter()

    def hook(module: nn.Module, inputs: Any, name: str, macs: Any) -> None:
        found.update({part: macs(module, inputs) for part in _around(name, parts)})

    handles = [
        module.register_forward_pre_hook(partial(hook, name=name, macs=macs))
        for name, module in model.named_modules()
        for layer, macs in ATTENTION.items()
        if isinstance(module, layer)
    ]
    with counted_flops() as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    for handle in handles:
        handle.remove()
    by_module = counter.get_flop_counts()
    found[""] += _products(by_module["Global"])
    for part in parts:
        found[part] += _in_module(by_module, f"{type(model).__name__}.{part}", model.get_submodule(part))
    for name, module in model.named_modules():
        if isinstance(module, ConnectivityPredictor):  # of its products it depends which are executed as linear maps
            own = _products(by_module[f"{type(model).__name__}.{name}"])
            found.subtract(dict.fromkeys(_around(name, parts), own))
    return dict(found)


def _around(name: str, parts: Sequence[str]) -> list[str]:
    """The parts that a module is in, and the whole."""
    return ["", *(part for part in parts if f"{name}.".startswith(f"{part}."))]


def _in_module(by_module: dict[str, dict], name: str, module: nn.Module) -> int:
    """Multiply-adds of products in a module, or in its children if it is not called itself."""
    if name in by_module:
        return _products(by_module[name])
    return sum(_in_module(by_module, f"{name}.{key}", child) for key, child in module.named_children())


def _products(flops: dict[Any, int]) -> int:
    """Multiply-adds of linear maps and convolutions."""
    ops = torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution
    return sum(flops.get(op, 0) for op in ops) // 2


def count(name: str, input_size: Sequence[int]) -> int:
    """Multiply-adds of one sample in a registered model.

    Args:
        name: of the model.
        input_size: (channels, height, width) in pixels.
    """
    with torch.device("meta"):
        model = create_model(name).eval()
    return count_macs(model, input_size)[""]


def stages(model: nn.Module, input_size: Sequence[int]) -> list[dict[str, Any]]:
    """The parts of a model one after the other.

    Args:
        model: a backbone on the meta device, in eval mode.
        input_size: (channels, height, width) in pixels.

    Returns:
        of each part its name (`stage`), number of `blocks`, shape of the `output`, `params`, and multiply-adds in 1e9
        (`gmacs`).
    """
    parts = [name for name, module in model.named_children() if next(module.parameters(), None) is not None]
    if "stages" in parts:
        at = parts.index("stages")
        parts[at : at + 1] = [f"stages.{i}" for i in range(len(model.stages))]
    shapes: dict[str, str] = {}

    def note(module: nn.Module, inputs: Any, output: Any, name: str) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        width = module.dim if isinstance(module, Stage) else output.shape[1]  # of its feature: it may pass on more
        shapes[name] = " x ".join(map(str, (width, *output.shape[2:])))

    handles = []
    for name in parts:
        module = model.get_submodule(name)
        handles.append((module[-1] if name == "blocks" else module).register_forward_hook(partial(note, name=name)))
    macs = count_macs(model, input_size, parts)
    for handle in handles:
        handle.remove()
    return [
        {
            "stage": name,
            "blocks": len(getattr(part, "blocks", part if isinstance(part, nn.Sequential) else ())) or None,
            "output": shapes.get(name, "-"),
            "params": sum(p.numel() for p in part.parameters()),
            "gmacs": round(macs[name] / 1e9, 6),
        }
        for name, part in ((name, model.get_submodule(name)) for name in parts)
    ]
