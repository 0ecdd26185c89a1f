"""Blocks that belong to no family: each is its equation, written out, and runs wherever a family's block does."""

import copy

import pytest
import torch
import torch.nn.functional as F

from visionattn.layers import (
    PolarizedSelfAttention,
    ReducedAttention,
    ReversedAttention,
    SubspaceAttention,
    reversed_attention,
)
from visionattn.layers.fuse import fuse_modules
from visionattn.layers.reduced_attention import resize_token_mixing
from visionattn.macs import count_macs, counted_flops


class Received(torch.nn.Module):
    """Reversed attention of some message, which is handed on too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y, message = self.layer(x, x.mean(2).sigmoid())
        return torch.cat([y, message[..., None]], 2)


MAP, TOKENS = (0, 2, 3), (0, 1)
LAYERS = {
    "polarized": (lambda **dd: PolarizedSelfAttention(8, **dd), (3, 8, 5, 7), MAP),
    "polarized in sequence": (lambda **dd: PolarizedSelfAttention(16, "sequential", **dd), (3, 16, 5, 7), MAP),
    "subspace": (lambda **dd: SubspaceAttention(8, 2, **dd), (3, 8, 5, 7), MAP),
    "efficient": (lambda **dd: ReducedAttention(8, 2, "efficient", **dd), (3, 11, 8), TOKENS),
    "optimised": (lambda **dd: ReducedAttention(8, 2, bias=False, **dd), (3, 11, 8), TOKENS),
    "super": (lambda **dd: ReducedAttention(8, 2, "super", 11, **dd), (3, 11, 8), (0,)),
    "reversed": (lambda **dd: Received(ReversedAttention(8, 2, controller_bias=1, **dd)), (3, 11, 8), TOKENS),
}
"""Makes a block, the shape of an input, and the axes of it that may have any length."""


def lively(layer):
    """In float64, with parameters and statistics that all count."""
    for p in layer.parameters():
        torch.nn.init.normal_(p, 0.3 if p.ndim < 2 else 0, 0.5)
    for p in layer.buffers():
        if p.is_floating_point():
            torch.nn.init.uniform_(p, 0.01, 0.5)
    return layer.double()


def polarized(layer, x):
    """At full resolution, as the published code goes about it."""

    def channels(x):
        weights = layer.conv_q_right(x).flatten(2).softmax(2)
        y = (layer.conv_v_right(x).flatten(2) @ weights.mT)[..., None]
        if layer.order == "parallel":
            return layer.conv_up(y).sigmoid()
        y, norm = layer.conv_up[0](y), layer.conv_up[1]
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        return layer.conv_up[3]((y * norm.weight + norm.bias).relu()).sigmoid()

    def positions(x):
        query, values = layer.conv_q_left(x).mean((2, 3))[:, None], layer.conv_v_left(x).flatten(2)
        met = (query @ values).softmax(2) if layer.order == "parallel" else query @ values.softmax(2)
        return met.sigmoid().unflatten(2, x.shape[2:])

    if layer.order == "parallel":
        return x * channels(x) + x * positions(x)
    y = x * channels(x)
    return y * positions(y)


def subspace(layer, x):
    """One group after the other, and every position looks around itself."""

    def norm(norm, x):
        mean, var = norm.running_mean, norm.running_var
        if norm.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        mean, std, weight, bias = (t[:, None, None] for t in (mean, (var + 1e-5).sqrt(), norm.weight, norm.bias))
        return (x - mean) / std * weight + bias

    z = norm(layer.bn_dws, layer.conv_dws(x)).relu()
    rows, cols = (
        (torch.arange(n)[:, None] + torch.arange(-1, 2)).clamp(0, n - 1) for n in z.shape[2:]
    )  # outside is what is next to it: no more than the maximum without
    z = z[:, :, rows][..., cols].amax((3, 5))
    out, size = [], x.shape[1] // layer.num_subspaces
    y = torch.stack(
        [(layer.conv_point.weight[i, :, 0, 0, None, None] * part).sum(1) for i, part in enumerate(z.split(size, 1))], 1
    )
    logits = norm(layer.bn_point, y + layer.conv_point.bias[:, None, None]).relu()
    for part, logit in zip(x.split(size, 1), logits.unbind(1), strict=True):
        weights = logit.exp() / logit.exp().sum((1, 2), keepdim=True)
        out.append(part + weights[:, None] * part)
    return torch.cat(out, 1)


def reduced(layer, x):
    """One head after the other."""
    q, k, v = layer.q(x), x, x
    if layer.kind == "optimised":
        k = layer.k(x)
    if layer.kind == "super":
        v = torch.einsum("nm,bmc->bnc", layer.align.weight, x)
    d, out = x.shape[2] // layer.num_heads, []
    for i in range(0, x.shape[2], d):
        q_h, k_h, v_h = (each[..., i : i + d] for each in (q, k, v))
        out.append((q_h @ k_h.mT / d**0.5).softmax(-1) @ v_h)
    return layer.proj(torch.cat(out, -1))


def reversed_(layer, x):
    """One child after the other."""
    layer, message = layer.layer, x.mean(2).sigmoid()
    (B, N, C), h = x.shape, layer.num_heads
    q, k, v = layer.qkv(x).view(B, N, 3, h, -1).unbind(2)  # (B, N, h, d)
    fc1, fc2 = layer.message_controller.fc1.weight, layer.message_controller.fc2.weight
    message = message * (F.gelu(x @ fc1.T) @ fc2.T + layer.controller_bias).sigmoid()[..., 0]
    head = (x @ layer.head_selector.weight.T / layer.temperature).softmax(2)
    out = 0
    for j in range(N):
        weights = (torch.einsum("bhd,bihd->bih", q[:, j], k) / (C // h) ** 0.5).softmax(1)
        out = out + weights[..., None] * (head[:, j] * message[:, j, None])[:, None, :, None] * v[:, j, None]
    return torch.cat([layer.proj(out.flatten(2)), message[..., None]], 2)


@pytest.mark.parametrize(
    "layer, equation, size",
    [
        (PolarizedSelfAttention(8), polarized, (2, 8, 5, 7)),
        (PolarizedSelfAttention(3), polarized, (2, 3, 6, 4)),  # an odd number, of which half is one
        (PolarizedSelfAttention(16, "sequential"), polarized, (2, 16, 5, 7)),
        (PolarizedSelfAttention(13, "sequential"), polarized, (1, 13, 1, 1)),  # one channel is normalised to zero
        (SubspaceAttention(12).eval(), subspace, (2, 12, 5, 7)),
        (SubspaceAttention(6, 6).eval(), subspace, (2, 6, 1, 2)),
        (SubspaceAttention(6, 1), subspace, (2, 6, 5, 3)),
        (ReducedAttention(12, 3), reduced, (2, 7, 12)),
        (ReducedAttention(12, 2, "efficient", bias=False), reduced, (2, 1, 12)),
        (ReducedAttention(12, 1, "super", 9), reduced, (2, 9, 12)),
        (Received(ReversedAttention(12, 3)), reversed_, (2, 7, 12)),
        (Received(ReversedAttention(12, 1, False, 0.5, 0.25, 1.5)), reversed_, (2, 8, 12)),
    ],
)
def test_a_block_is_its_equation(layer, equation, size):
    layer, x = lively(layer), torch.randn(size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    found, expected = layer(x), equation(layer, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_a_block_runs_everywhere(name):
    make, size, _ = LAYERS[name]
    layer, x = lively(make()).float().eval(), torch.randn(size)
    with torch.no_grad():
        expected = layer(x)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
        half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
        torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    out = make(device="meta", dtype=torch.float64)(x.double().to("meta"))
    assert out.shape == expected.shape and out.dtype == torch.float64
    out = layer.train()(x)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_exported_with_open_sizes(name):
    make, size, axes = LAYERS[name]
    layer = lively(make()).float().eval()
    sizes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),)
    exported = torch.export.export(layer, (torch.randn(size),), dynamic_shapes=sizes).module()
    for batch, scale in ((1, 2), (4, 3)):
        x = torch.randn([batch, *(n * scale if axis in axes else n for axis, n in enumerate(size[1:], 1))])
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer, size, executed, published",
    [
        # Pooled before they are projected, against projected before they are pooled.
        (PolarizedSelfAttention(16), (16, 5, 7), 3 * 35 * 16 + 2 * 256, 35 * (16 + 3 * 128 + 2 * 8) + 128),
        (
            PolarizedSelfAttention(16, "sequential"),
            (16, 5, 7),
            35 * (128 + 40) + 19 * 16,
            35 * (16 + 3 * 128 + 2 * 8) + 8 * 2 + 2 * 16,
        ),
        (SubspaceAttention(16), (16, 5, 7), 35 * 16, 2 * 35 * 16),  # one of its two convolutions is elementwise
        (ReducedAttention(16, 2), (35, 16), 35 * 3 * 256 + 2 * 35**2 * 16, None),
        (ReducedAttention(16, 2, "efficient"), (35, 16), 35 * 2 * 256 + 2 * 35**2 * 16, None),
        (ReducedAttention(16, 2, "super", 35), (35, 16), 35 * 2 * 256 + 3 * 35**2 * 16, None),
        (Received(ReversedAttention(16, 2)), (35, 16), 35 * (9 * 128 + 16 * 2 + 8) + 2 * 35**2 * 16, None),
    ],
)
def test_costs(layer, size, executed, published):
    """The cost lines of the docstrings, and what the tables of models count."""
    layer = layer.eval()
    with counted_flops() as counter, torch.no_grad():
        layer(torch.randn(1, *size))
    assert counter.get_total_flops() == 2 * executed
    assert count_macs(layer.to("meta"), size)[""] == (published or executed)


def test_polarized_details():
    with pytest.raises(ValueError, match="one of parallel, sequential, got 'both'"):
        PolarizedSelfAttention(8, "both")
    with pytest.raises(ValueError, match="dim of at least 8 with order 'sequential', got 7"):
        PolarizedSelfAttention(7, "sequential")
    layer = PolarizedSelfAttention(512)
    for conv in (layer.conv_q_right, layer.conv_v_right, layer.conv_q_left, layer.conv_v_left):
        assert conv.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.1)
    assert layer.conv_up.weight.abs().max() <= 256**-0.5  # as torch draws it


def test_subspace_details():
    with pytest.raises(ValueError, match="dim 10 is not divisible by num_subspaces 4"):
        SubspaceAttention(10)
    layer, x = lively(SubspaceAttention(8, 2)), torch.randn(3, 8, 5, 7, dtype=torch.float64)
    before = layer.bn_dws.running_mean.clone(), layer.bn_point.running_var.clone()
    layer(x)
    y = layer.conv_dws(x).mean((0, 2, 3))
    torch.testing.assert_close(layer.bn_dws.running_mean, 0.1 * before[0] + 0.9 * y)
    assert layer.bn_point.momentum == 0.9 and not torch.equal(layer.bn_point.running_var, before[1])
    network = torch.nn.Sequential(copy.deepcopy(layer)).eval()
    fuse_modules(network)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(network(x), layer.eval()(x))


def test_reduced_details():
    for arguments, message in (
        ((10, 4), "dim 10 is not divisible by num_heads 4"),
        ((8, 2, "full"), "one of optimised, efficient, super, got 'full'"),
        ((8, 2, "super"), "num_tokens with kind 'super' alone, got None with 'super'"),
        ((8, 2, "efficient", 49), "num_tokens with kind 'super' alone, got 49 with 'efficient'"),
    ):
        with pytest.raises(ValueError, match=message):
            ReducedAttention(*arguments)
    with pytest.raises(ValueError, match="the 49 tokens .* got 50"):
        ReducedAttention(8, 2, "super", 49)(torch.randn(1, 50, 8))
    layer = ReducedAttention(64, 2, "super", 200)
    noise = layer.align.weight.detach() - torch.eye(200)
    assert abs(noise.mean()) < 1e-3 and noise.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.q.weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.01) and not layer.q.bias.any()


@pytest.mark.parametrize("new", [(4, 6), (8, 12), (2, 3), (5, 4)])
def test_token_mixing_follows_the_size(new):
    """A class token before the map and another token behind it."""
    weight = torch.randn(26, 26, dtype=torch.float64)
    found = resize_token_mixing(weight, (4, 6), new, 1, 1)
    patches = new[0] * new[1]
    assert found.shape == (patches + 2, patches + 2)
    if new == (4, 6):
        assert torch.equal(found, weight)
    torch.testing.assert_close(found[[0, -1]][:, [0, -1]], weight[[0, -1]][:, [0, -1]])
    # What is the same everywhere is mixed as it was, and a ramp of rows becomes a ramp.
    torch.testing.assert_close(found[[0, -1]].sum(1), weight[[0, -1]].sum(1))
    ramp = (torch.arange(26.0, dtype=torch.float64)[:, None] - 1) // 6
    mixed = resize_token_mixing((ramp @ torch.ones(1, 26, dtype=torch.float64)) / 26, (4, 6), new, 1, 1).sum(1)
    rows = mixed[1:-1].view(new)
    torch.testing.assert_close(rows, rows[:, :1].expand(new))
    assert (rows[:, 0].diff() > 0).all() and rows.mean().item() == pytest.approx(1.5)


def test_reversed_attention_by_block(monkeypatch):
    layer, x = lively(Received(ReversedAttention(12, 3))), torch.randn(2, 10, 12, dtype=torch.float64)
    inputs = [x.requires_grad_(), *layer.parameters()]
    expected = layer(x)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    monkeypatch.setattr(reversed_attention, "SENDERS", 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for run, kept in ((layer, 10), (layer, 9), (compiled, 9)):  # kept, and computed again for the gradients
        monkeypatch.setattr(reversed_attention, "MAX_KEPT", kept)
        found = run(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for one, other in zip(torch.autograd.grad((found * weight).sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    found = torch.export.export(layer.eval(), (x.detach(),)).module()(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_reversed_details():
    with pytest.raises(ValueError, match="dim 8 is not divisible by num_heads 3"):
        ReversedAttention(8, 3)
    layer, x = ReversedAttention(8, 1, attn_drop=0.5), torch.randn(2, 9, 8)
    y, message, dropped = layer(x, return_dependency=True)
    expected, _, dependency = layer.eval()(x, grid=(3, 3), return_dependency=True)
    kept = dropped / dependency
    assert ((kept == 0) | ((kept - 2).abs() < 1e-5)).all() and 0.3 < kept.mean() / 2 < 0.7
    torch.testing.assert_close(y, layer.proj(dropped @ layer.qkv(x)[..., 16:]))  # of one head
    torch.testing.assert_close(expected, layer(x)[0])
    # A child gives away what it still has to say, no more and no less; without a message it is silent.
    torch.testing.assert_close(dependency.sum(1), message)
    assert not layer(x, torch.zeros(2, 9), return_dependency=True)[2].any()
    # As initialised: no bias without one, a half of every message is left; 0.98 of it with 4.
    assert not layer.qkv.bias.any() and layer.head_selector.bias is None
    assert (message - 0.5).abs().max() < 0.01
    message = ReversedAttention(8, 1, controller_bias=4)(x)[1]
    torch.testing.assert_close(message, torch.full((2, 9), 4.0).sigmoid())


@torch.no_grad()
def test_spatial_gates_around_a_half_survive_half_precision():
    """Over 400 positions they lie within 0.0004 of each other, and the numbers of bfloat16 there 0.004 apart."""
    layer, x = PolarizedSelfAttention(16).bfloat16(), torch.randn(1, 16, 20, 20).bfloat16()
    exact = copy.deepcopy(layer).float()(x.float())
    assert (layer(x) == exact.bfloat16()).float().mean() > 0.99
