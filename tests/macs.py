"""Multiply-adds of a model, counted as the papers count them: linear maps, convolutions and attention products.

Attention is counted by its definition, not as it is executed (tiles compute masked pairs; positional attention is
factorised).
"""

from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import visionattn
from visionattn.layers import GatedPositionalSelfAttention, NeighborhoodAttention2d
from visionattn.models.convit import SelfAttention


def _neighborhood(module, inputs):
    x = inputs[0]  # (B, H, W, C) or, for the isotropic models, (B, N, C) and the grid
    H, W = x.shape[1:3] if x.ndim == 4 else inputs[1]
    window = module.window(int(H), int(W))
    # Where the map is padded, the published code computes the padded queries too, and projects them.
    padded = [max(n, k * d) for n, (k, d, _) in zip((H, W), window, strict=True)]
    keys, C = window[0][0] * window[1][0], x.shape[-1]
    N = padded[0] * padded[1]
    return 2 * N * keys * C + 3 * (N - H * W) * C * C


def _dense(module, inputs):
    N, C = inputs[0].shape[1:]
    return 2 * N * N * C


def _gated_positional(module, inputs):
    return _dense(module, inputs) + 3 * module.num_heads * inputs[0].shape[1] ** 2


# Multiply-adds of one sample in a layer besides its linear maps and convolutions, from the layer and its inputs.
ATTENTION = {
    NeighborhoodAttention2d: _neighborhood,
    GatedPositionalSelfAttention: _gated_positional,
    SelfAttention: _dense,
}


def count(name, input_size):
    with torch.device("meta"):
        model = visionattn.create_model(name).eval()
    total = 0

    def hook(module, inputs, count):
        nonlocal total
        total += count(module, inputs)

    for module in model.modules():
        for layer, macs in ATTENTION.items():
            if isinstance(module, layer):
                module.register_forward_pre_hook(partial(hook, count=macs))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    return (
        total
        + sum(counts.get(op, 0) for op in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution)) // 2
    )
