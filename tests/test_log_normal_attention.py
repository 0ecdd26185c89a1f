"""Linear log-normal attention: its layer against its equation, and inputs that have no spread."""

import math

import pytest
import torch
from torch import nn

from visionattn.layers import LinearLogNormalAttention
from visionattn.layers.log_normal_attention import features
from visionattn.macs import counted_flops


def lively(layer):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.double()


def defined(layer, x, blocks):
    """One block at a time, as the paper writes it; `blocks` are lists of tokens."""
    (B, N, _), heads = x.shape, layer.num_heads
    q, k, v = layer.qkv(x).view(B, N, 3, heads, -1).permute(2, 0, 3, 1, 4)
    every = (1, 2, 3) if layer.per_sample else (0, 1, 2, 3)
    a, b = q.detach().std(every, keepdim=True), k.detach().std(every, keepdim=True)
    s = ((a**2 * b**2 + 0.35487039130661086) / (2 * 0.14855178144710912)).sqrt()
    Q = ((s / a * q) - (s / a * q).amax(3, keepdim=True)).exp()
    K = ((s / b * k) - (s / b * k).amax((2, 3), keepdim=True)).exp()
    weights = Q @ K.mT
    out = weights / (weights.sum(3, keepdim=True) + layer.eps) @ v
    if layer.block_diagonal:
        near = torch.empty_like(out)
        for tokens in blocks:
            inside = q[:, :, tokens], k[:, :, tokens], v[:, :, tokens]
            near[:, :, tokens] = (inside[0] @ inside[1].mT * q.shape[3] ** -0.5).softmax(3) @ inside[2]
        if layer.mode == "average":
            out = 0.5 * (out + near)
        else:
            out = layer.r * out + (layer.p if layer.mode == "learnable_scale" else 1 - layer.r) * near
    return layer.proj(out.transpose(1, 2).flatten(2))


def strips(tokens, length):
    return [list(range(tokens))[i : i + length] for i in range(0, tokens, length)]


def windows(H, W, side):
    return [
        [y * W + x for y in range(top, min(top + side, H)) for x in range(left, min(left + side, W))]
        for top in range(0, H, side)
        for left in range(0, W, side)
    ]


@pytest.mark.parametrize(
    "options, grid, blocks",
    [
        ({}, (2, 7), strips(14, 4)),
        ({"mode": "learnable_scale", "per_sample": True}, (3, 4), strips(12, 4)),
        ({"mode": "learnable_ratio", "eps": 0.3}, (1, 3), strips(3, 4)),  # less than a block; an eps that can be seen
        ({"block_diagonal": False, "mode": "learnable_scale"}, (1, 9), []),
        ({"window_size": 2}, (3, 5), windows(3, 5, 2)),
        ({"window_size": 3, "mode": "learnable_scale"}, (6, 3), windows(6, 3, 3)),
        ({"window_size": 4, "per_sample": True}, (3, 2), windows(3, 2, 4)),
    ],
)
def test_layer_is_its_equation(options, grid, blocks):
    layer = lively(LinearLogNormalAttention(12, 3, **options))
    x = torch.randn(2, math.prod(grid), 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    found, expected = layer(x, grid), defined(layer, x, blocks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@torch.no_grad()
def test_samples_by_themselves():
    layer, x = LinearLogNormalAttention(16, 2, per_sample=True).double(), torch.randn(4, 9, 16, dtype=torch.float64)
    x[1] *= 5
    torch.testing.assert_close(layer(x), torch.cat([layer(one) for one in x.split(1)]), rtol=0, atol=1e-13)
    layer.per_sample = False
    assert not torch.allclose(layer(x)[:1], layer(x[:1]))
    torch.testing.assert_close(layer(x)[1:], layer(x.flip(0)).flip(0)[1:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_queries_and_keys_that_are_all_the_same(part):
    """Have no standard deviation to divide by. Whatever the scale, features of equals are 1."""
    layer = LinearLogNormalAttention(8, 2, block_diagonal=False)
    with torch.no_grad():
        layer.qkv.weight[8 * part : 8 * part + 8 if part < 2 else None].fill_(0)
    x = torch.randn(2, 6, 8, requires_grad=True)
    out = layer(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.isfinite().all() and grad.isfinite().all()
    if part < 2:
        q, k, v = layer.heads(x)
        assert (features(layer, q, k)[part] == 1).all()
    same = layer(torch.ones(2, 6, 8))  # tokens that are equal
    torch.testing.assert_close(same, same[:1, :1].expand_as(same))
    assert layer(torch.zeros(2, 6, 8)).isfinite().all()


@torch.no_grad()
def test_concentration_of_softmax_attention():
    """Logarithms of linear weights vary as much as those of softmax attention, nearly, whatever the scale."""
    layer = LinearLogNormalAttention(256, 4)
    for scale in (1.0, 1.5, 2.0):
        q, k = scale * torch.randn(2, 1, 4, 512, 64)
        queries, keys = features(layer, q, k)
        linear = (queries @ keys.mT).log().var(-1).mean()
        softmax = (q @ k.mT / 8).var(-1).mean()
        assert 0.8 < linear / softmax < 1.25, (scale, linear, softmax)


def test_details():
    for arguments, told in (({"mode": "mean"}, "one of average, learnable_scale, learnable_ratio, got 'mean'"),
                            ({"window_size": 0}, "an integer window_size >= 1, got 0"),
                            ({"num_heads": 5}, "dim 16 is not divisible by num_heads 5")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            LinearLogNormalAttention(16, **arguments)
    (N, C), x = (24, 16), torch.randn(2, 24, 16)
    windows = LinearLogNormalAttention(C, 2, window_size=2)
    for grid in (None, (5, 5)):
        with pytest.raises(ValueError, match="expected a grid of 24 tokens, whose windows are blocks, got"):
            windows(x, grid)
    layer = LinearLogNormalAttention(C, 2)
    with counted_flops() as counter, torch.no_grad():
        layer(x[:1])
    assert counter.get_total_flops() == 2 * (4 * N * C**2 + 4 * N * C * 8 + 2 * N * C)  # the last: sums of weights
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert (layer(x) - expected).abs().max() < 0.02 * expected.abs().max()
