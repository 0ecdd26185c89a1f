"""Gates, modulators and kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import (
    AttentiveConv2d,
    FocalModulation,
    LargeKernelAttention,
    PartialChannelAttention,
    PartialSpatialAttention,
    PolarizedSelfAttention,
    RecursiveGatedConv,
    SubspaceAttention,
)
from ..layers.polarized_attention import channel_gate, spatial_gate
from ..layers.subspace_attention import spatial_weights
from .map import GATE, HEAD_GATE, Explained, Map


def focal_modulation(layer: FocalModulation, x: Tensor) -> Explained:
    q, modulator, gates = layer.modulate(x)
    maps = [
        Map("modulator", modulator.permute(0, 3, 1, 2), GATE),
        Map("gate", gates.permute(0, 3, 1, 2), ("batch", "level", "row", "col")),
    ]
    return maps, layer.proj_drop(layer.proj(layer.norm(q * modulator)))


def large_kernel_attention(layer: LargeKernelAttention, x: Tensor) -> Explained:
    gate = layer.pointwise(layer.dilated(layer.depthwise(x)))
    return [Map("gate", gate, GATE)], x * gate


def recursive_gated_conv(layer: RecursiveGatedConv, x: Tensor) -> Explained:
    y, q = layer.proj_in(x).split([layer.dims[0], sum(layer.dims)], 1)
    gates = (layer.scale * layer.filter(q)).split(layer.dims, 1)
    y = y * gates[0]
    for project, gate in zip(layer.pws, gates[1:], strict=True):
        y = project(y) * gate
    return [Map("gate", gate, GATE, str(i)) for i, gate in enumerate(gates, 1)], layer.proj_out(y)


def attentive_conv(layer: AttentiveConv2d, x: Tensor) -> Explained:
    kernels, (B, C, H, W), K = layer.kernels(x), x.shape, layer.kernel_size
    patches = F.unfold(layer.x_proj(x), K, padding=K // 2).view(B, C, K * K, H, W)
    out = torch.einsum("bck,bckyx->bcyx", kernels.flatten(2), patches)
    return [Map("kernel", kernels, ("batch", "channel", "kernel_row", "kernel_col"))], layer.proj(out)


def partial_channel_attention(layer: PartialChannelAttention, x: Tensor) -> Explained:
    parts = x.split(layer.widths, 1)
    var, mean = torch.var_mean(parts[1], (2, 3))
    statistics = torch.stack([mean, var.clamp(min=1e-12).sqrt()], -1).flatten(1)
    gate = F.hardsigmoid(layer.gate_norm(layer.gate(statistics)))
    scaled = gate if layer.scale is None else gate * layer.scale  # of a norm that was merged
    gated = layer.norm(parts[1] * scaled[:, :, None, None])
    gated = gated if layer.shift is None else gated + layer.shift
    return [Map("gate", gate, ("batch", "channel"))], torch.cat([layer.conv(parts[0]), gated], 1)


def partial_spatial_attention(layer: PartialSpatialAttention, x: Tensor) -> Explained:
    gated, mixed = x.split(layer.widths, 1)
    gate = F.hardsigmoid(layer.gate(gated))
    return [Map("gate", gate, GATE)], torch.cat([layer.norm1(gated * gate), layer.mix(layer.norm2(mixed))], 1)


def polarized_attention(layer: PolarizedSelfAttention, x: Tensor) -> Explained:
    channel = channel_gate(layer, x)
    spatial = spatial_gate(layer, x if layer.order == "parallel" else x * channel)
    maps = [Map("gate", channel.flatten(1), ("batch", "channel"), "channel"), Map("gate", spatial, GATE, "spatial")]
    return maps, x * (channel + spatial if layer.order == "parallel" else channel * spatial)


def subspace_attention(layer: SubspaceAttention, x: Tensor) -> Explained:
    """A head is a group of channels."""
    gate = 1 + spatial_weights(layer, x).unflatten(2, x.shape[2:])
    return [Map("gate", gate, HEAD_GATE)], x * gate.repeat_interleave(x.shape[1] // layer.num_subspaces, 1)
