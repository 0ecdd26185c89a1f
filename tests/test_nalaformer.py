"""NaLaFormer: its attention against the paper's equations, edge cases, and what its network is made of."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import visionattn
from visionattn.layers import NormAwareLinearAttention
from visionattn.models.nalaformer import ConvMlp


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def turn(x, place):
    """Channels (d,) by the angles of a place, one pair after the other."""
    j = len(x) // 4
    angles = [10000 ** (-i / max(1, j - 1)) for i in range(j)]
    angles = [place[0] * angle for angle in angles] + [place[1] * angle for angle in angles]
    out = []
    for (a, b), t in zip(x.view(-1, 2), angles, strict=True):
        out += [a * math.cos(t) - b * math.sin(t), b * math.cos(t) + a * math.sin(t)]
    return torch.stack(out)


def attend(q, k, v, places, kernel):
    """(N, d) of one head, one weight after the other."""
    d = q.shape[1]
    if kernel == "softmax":
        q, k = (torch.stack([turn(x, place) for x, place in zip(y, places, strict=True)]) for y in (q, k))
        return (q @ k.T / d**0.5).softmax(-1) @ v
    k = k**3
    length = q.square().sum(1, keepdim=True).sqrt()
    power = 3 * (0.5 + torch.tanh(length))
    q = [(q / length).relu() ** power, (-q / length).relu() ** power]
    k = [k.relu(), (-k).relu()]
    rows = []
    for n, place in enumerate(places):
        weights = [
            sum(turn(a[n], place) @ turn(b[m], other) for a, b in zip(q, k, strict=True))
            for m, other in enumerate(places)
        ]
        share = sum(a[n] @ b.mean(0) for a, b in zip(q, k, strict=True)) + 1e-6
        rows.append(torch.stack(weights) @ v / len(places) / share)
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", ["norm_aware", "softmax"])
@pytest.mark.parametrize(("dim", "heads"), [(16, 2), (8, 2)])  # of 4 channels a pair turns by 1
def test_it_is_its_definition(kernel, dim, heads):
    layer = randomised(NormAwareLinearAttention(dim, heads, kernel))
    x = torch.randn(1, dim, 3, 2, dtype=torch.float64, requires_grad=True)
    q, k, v, g = layer.qkvg(x[0].flatten(1).T).chunk(4, 1)
    places = [(row, col) for row in range(3) for col in range(2)]
    parts = (each.split(dim // heads, 1) for each in (q, k, v))
    y = torch.cat([attend(*head, places, kernel) for head in zip(*parts, strict=True)], 1)
    y = y + layer.lepe(v.T.view(1, dim, 3, 2))[0].flatten(1).T
    expected = layer.out_proj(layer.ln(y) * F.silu(g)).T.view(1, dim, 3, 2)
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(f.square().sum(), inputs) for f in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_it_has_all_derivatives():
    layer = randomised(NormAwareLinearAttention(4, 1))
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, x) and gradgradcheck(layer, x)


def test_queries_of_zeros():
    """They have no direction, and weigh nothing."""
    layer = NormAwareLinearAttention(8, 2)
    nn.init.zeros_(layer.qkvg.weight[:8])
    nn.init.zeros_(layer.qkvg.bias[:8])
    x = torch.randn(1, 8, 3, 4)
    out = layer(x)
    v, g = layer.qkvg(x.permute(0, 2, 3, 1)).chunk(4, -1)[2:]
    local = layer.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, layer.out_proj(layer.ln(local) * F.silu(g)).permute(0, 3, 1, 2))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("autocast", [True, False])
def test_cubes_of_keys_are_in_single_precision(autocast):
    layer = NormAwareLinearAttention(16, 2).eval()
    nn.init.normal_(layer.qkvg.weight[16:32], std=20)
    x = torch.randn(1, 16, 6, 5)
    with torch.no_grad():
        assert layer.qkvg(x.permute(0, 2, 3, 1))[..., 16:32].abs().max() > 100  # whose cube float16 does not have
        expected = layer(x)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            out = layer(x) if autocast else layer.half()(x.half())
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3), "dim 10 is not divisible by num_heads 3"),
        ((12, 2), "expected a multiple of 4 channels per head, got 12 / 2"),
        ((8, 2, "relu"), "expected kernel one of norm_aware, softmax, got 'relu'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormAwareLinearAttention(*arguments)


def test_kernels_and_scales_of_the_stages():
    with torch.device("meta"):
        model = visionattn.create_model("nalaformer_b")
    blocks = [list(stage.blocks) for stage in model.stages]
    assert [{block.mixer.kernel for block in each} for each in blocks] == [{"norm_aware"}] * 2 + [{"softmax"}] * 2
    model = visionattn.create_model("test_nalaformer", layer_scales=(1.0, 1.0, 1e-6, 0.5))
    for stage, scale in zip(model.stages, (1.0, 1.0, 1e-6, 0.5), strict=True):
        assert all((ls.gamma == scale).all() for block in stage.blocks for ls in (block.ls1, block.ls2))


def test_initialisation():
    """Linear maps keep torch's, as the published initialiser skips them; the head is a convolution there."""
    model = visionattn.create_model("test_nalaformer")
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) or name == "head":
            assert (m.bias == 0).all() and m.weight.std().item() == pytest.approx(0.02, rel=0.25)
        elif isinstance(m, nn.Linear):
            bound = m.in_features**-0.5
            assert (m.bias != 0).any() and 0.9 * bound < m.weight.abs().max() <= bound


def test_mlp():
    mlp, x = ConvMlp(6, 10).double(), torch.randn(2, 5, 7, 6, dtype=torch.float64)
    z = F.gelu(mlp.fc1(x))
    conv = F.conv2d(z.permute(0, 3, 1, 2), mlp.dwconv.proj.weight, mlp.dwconv.proj.bias, padding=1, groups=10)
    torch.testing.assert_close(mlp(x), mlp.fc2(z + conv.permute(0, 2, 3, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["norm_aware", "softmax"])
def test_without_rotary_and_convolution_it_knows_no_positions(kernel):
    layer, x = NormAwareLinearAttention(16, 2, kernel, lepe=False, rotary=False), torch.randn(1, 16, 4, 5)
    order = torch.randperm(20)
    moved = layer(x.flatten(2)[..., order].unflatten(2, (4, 5))).flatten(2)
    torch.testing.assert_close(moved, layer(x).flatten(2)[..., order])
