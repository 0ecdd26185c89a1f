"""SG-Former: its layers against their definitions, options, sizes and what the goldens cannot see."""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import filled
from timm.layers import DropPath, GroupNorm1
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import HybridScaleAttention, SelfGuidedAttention, self_guided_attention
from visionattn.macs import counted_flops
from visionattn.models.sgformer import REDUCED

THREE = ((1 / 4, 5), (1 / 2, 3), (1 / 4, 2))


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def attend(q, k, v, heads, scale):
    """(N, C) queries, (M, C) keys and values to (N, C), and the weights (heads, N, M)."""
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
    weights = (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1), weights


def enhanced(layer, x, attended):
    lepe = layer.lepe_conv(layer.lepe_linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer.proj(attended + lepe)


def hybrid_scale(layer, x):
    """One image, and one window, after the other; what is outside the map is never there."""
    (B, H, W, C), r, w, heads = x.shape, layer.sr_ratio, layer.window_size, layer.num_heads // 2
    out, significance = torch.empty_like(x), x.new_empty(B, H, W)
    for b in range(B):
        padded = F.pad(x[b], (0, 0, 0, max(0, r - W), 0, max(0, r - H)))
        y = F.conv2d(padded.permute(2, 0, 1)[None], layer.sr.weight, layer.sr.bias, stride=r)[0].permute(1, 2, 0)
        (h, v), y = y.shape[:2], F.gelu(F.layer_norm(y, (C,), layer.norm.weight, layer.norm.bias, 1e-5))
        q1, q2 = layer.q(x[b]).chunk(2, -1)
        found, weights = attend(q1.flatten(0, 1), *layer.global_kv(y).flatten(0, 1).chunk(2, -1), heads, layer.scale)
        out[b, ..., : C // 2] = found.unflatten(0, (H, W))
        coarse = weights.mean((0, 1)).unflatten(0, (h, v))
        for i in range(0, H, w):
            for j in range(0, W, w):
                q, kv = (each[i : i + w, j : j + w] for each in (q2, layer.local_kv(x[b])))
                found, weights = attend(q.flatten(0, 1), *kv.flatten(0, 1).chunk(2, -1), heads, layer.scale)
                out[b, i : i + w, j : j + w, C // 2 :] = found.unflatten(0, q.shape[:2])
                significance[b, i : i + w, j : j + w] = weights.mean((0, 1)).unflatten(0, q.shape[:2])
        for i, j in torch.cartesian_prod(torch.arange(H), torch.arange(W)).tolist():
            significance[b, i, j] += coarse[i * h // H, j * v // W]
    return enhanced(layer, x, out), significance.detach()


def self_guided(layer, x, significance):
    """One group after the other."""
    (B, H, W, C), heads = x.shape, layer.num_heads // 2
    out = torch.empty_like(x)
    for b in range(B):
        tokens = x[b].flatten(0, 1)[significance[b].flatten().argsort()]
        merged, end, share = [], 0, 0
        for (part, size), pool in zip(layer.sections, layer.pools, strict=True):
            share += part
            start, end = end, math.floor(H * W * share)
            section = tokens[start:end]
            section = torch.cat([section.new_zeros(-len(section) % size, C), section])
            merged += [pool.weight[0] @ group + pool.bias for group in section.split(size) if len(group)]
        first, second = layer.kv(torch.stack(merged)).chunk(2, -1)
        halves = zip(layer.q(x[b]).flatten(0, 1).chunk(2, -1), (first, second), strict=True)
        found = [attend(q, *kv.chunk(2, -1), heads, layer.scale)[0] for q, kv in halves]
        out[b] = torch.cat(found, 1).unflatten(0, (H, W))
    return enhanced(layer, x, out)


@pytest.mark.parametrize("size", [(14, 7), (15, 20), (3, 5), (1, 1), (8, 9)])
@pytest.mark.parametrize("options", [{}, {"window_size": 3, "qkv_bias": False, "qk_scale": 0.3}])
def test_hybrid_scale_attention_is_its_definition(size, options, monkeypatch):
    layer = randomised(HybridScaleAttention(12, 4, 4, **options))
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    (out, significance), (expected, expected_significance) = layer(x), hybrid_scale(layer, x)
    close(out, expected)
    close(significance, expected_significance)
    assert not significance.requires_grad
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, atol=1e-11)
    monkeypatch.setattr(self_guided_attention, "MAX_WEIGHTS", 7)  # as on large maps
    out, significance = layer(x)
    close(out, expected)
    close(significance, expected_significance)


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (2, 3), (1, 1), (16, 20)])
@pytest.mark.parametrize("sections", [THREE, ((1 / 2, 2), (1 / 2, 1)), ((1.0, 4),)])
def test_self_guided_attention_is_its_definition(size, sections):
    layer = randomised(SelfGuidedAttention(12, 4, sections))
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    significance = torch.rand(2, *size)
    out, expected = layer(x, significance), self_guided(layer, x, significance)
    close(out, expected)
    weight = torch.randn_like(out)
    inputs = [x, *layer.parameters()]  # a single position leaves some without use
    gradients = [torch.autograd.grad((y * weight).sum(), inputs, materialize_grads=True) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, atol=1e-11)
    close(layer(x.transpose(1, 2), significance.mT), self_guided(layer, x.transpose(1, 2), significance.mT))
    close(layer(x, significance.exp()), out)  # the order alone counts


@pytest.mark.parametrize("ratio, keys", [(8, 60), (4, 60), (2, 147)])
def test_keys_at_224(ratio, keys):
    side = 7 * ratio
    layer = SelfGuidedAttention(8, 2, REDUCED[ratio])
    x, significance = torch.randn(1, side, side, 8), torch.rand(1, side, side)
    assert self_guided_attention.merged_tokens(layer, x, significance).shape == (1, keys, 8)


def test_attention_received_sums_to_one():
    """In every window, and over the summary."""
    layer = randomised(HybridScaleAttention(8, 2, 7))
    x = torch.randn(1, 14, 21, 8, dtype=torch.float64)
    sums = layer(x)[1].unflatten(1, (2, 7)).unflatten(3, (3, 7)).sum((2, 4))
    local = torch.ones(2, 3, dtype=torch.float64)
    close((sums[0] - local).sum() / 49, local.sum() / 6)


def test_costs():
    C, H, W = 16, 56, 56
    hybrid, guided = HybridScaleAttention(C, 2, 8), SelfGuidedAttention(C, 2, REDUCED[8])
    N, L = H * W, 60
    x = torch.randn(1, H, W, C)
    for layer, inputs, macs in (
        (hybrid, (x,), 5 * N * C**2 + (N * C + C**2) * N // 64 + (49 + 9) * N * C),
        (guided, (x, torch.rand(1, H, W)), 3 * N * C**2 + 2 * L * C**2 + 2 * N * L * C + 10 * N * C),
    ):
        with counted_flops() as counter, torch.no_grad():
            layer(*inputs)
        assert counter.get_total_flops() == 2 * macs


def test_dropout():
    x, significance = torch.randn(1, 9, 9, 8), torch.rand(1, 9, 9)
    for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        hybrid, guided = HybridScaleAttention(8, 2, 2, **options), SelfGuidedAttention(8, 2, THREE, **options)
        (first, s), (second, t) = hybrid(x), hybrid(x)
        assert not torch.equal(first, second) and torch.equal(s, t) == ("proj_drop" in options)
        assert not torch.equal(guided(x, significance), guided(x, significance))
        for layer, inputs in ((hybrid.eval(), (x,)), (guided.eval(), (x, significance))):
            assert all(map(torch.equal, layer(*inputs), layer(*inputs)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HybridScaleAttention(9, 3, 4), "an even num_heads, .* got 3"),
        (lambda: HybridScaleAttention(10, 4, 4), "dim 10 is not divisible by num_heads 4"),
        (lambda: HybridScaleAttention(8, 2, 0), "sr_ratio and window_size >= 1, got 0 and 7"),
        (lambda: SelfGuidedAttention(9, 3, THREE), "an even num_heads, .* got 3"),
        (lambda: SelfGuidedAttention(8, 2, ((0.5, 4),)), "whose shares sum to 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_depths():
    with pytest.raises(VisionattnError, match="even depths of all stages but the last"):
        visionattn.create_model("test_sgformer", depths=(2, 3, 2, 1))
    with pytest.raises(VisionattnError, match="of 4 stages, got 4, 3 and 4"):
        visionattn.create_model("test_sgformer", depths=(2, 2, 2))


def test_gradients():
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    hybrid, guided = randomised(HybridScaleAttention(4, 2, 2, 3)), randomised(SelfGuidedAttention(4, 2, THREE))
    significance = torch.rand(1, 3, 5)
    assert gradcheck(lambda x: hybrid(x)[0], (x,)) and gradcheck(lambda x: guided(x, significance), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_significance_is_that_of_full_precision(dtype):
    layer = HybridScaleAttention(16, 2, 4)
    x = torch.randn(1, 28, 28, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        out, significance = layer(x)
    assert out.dtype == dtype and significance.dtype == torch.float32
    assert len(significance.unique()) > 700  # of 784


def test_float32_agrees_where_the_order_does():
    """What is not exact is nothing but the order."""
    model = filled(visionattn.create_model("test_sgformer"))
    x, orders = torch.randn(1, 3, 224, 160), []
    guided = [m for m in model.modules() if isinstance(m, SelfGuidedAttention)]

    def keep(layer, args):
        orders.append(args[1].flatten(1).argsort().argsort().view_as(args[1]).float())

    def hand_in(layer, args):
        return args[0], orders.pop(0)

    with torch.no_grad():
        hooks = [m.register_forward_pre_hook(keep) for m in guided]
        expected = model.double()(x.double())
        for hook in hooks:
            hook.remove()
        for m in guided:
            m.register_forward_pre_hook(hand_in)
        found = model.float()(x)
    assert not orders and len(guided) == 3
    close(found, expected.float(), atol=1e-5)


def test_position_table():
    """Sines and cosines of the column, then of the row; resampled for maps of another size."""
    model = visionattn.create_model("test_sgformer", img_size=(32, 48)).eval()
    table = model.stem.pos_embed.weight[0].unflatten(0, (8, 12))
    angles = 10000 ** -(torch.arange(4) / 4)
    for y, x in ((0, 0), (3, 11), (7, 2)):
        parts = [x * angles, x * angles, y * angles, y * angles]
        wanted = torch.cat([f(part) for f, part in zip((torch.sin, torch.cos) * 2, parts, strict=True)])
        close(table[y, x], wanted, atol=1e-5)
    image, seen = torch.randn(1, 3, 50, 33), []
    model.stem.norm.register_forward_hook(lambda module, args, out: seen.append(out.permute(0, 3, 1, 2)))
    out = model.stem(image)
    resized = F.interpolate(table.permute(2, 0, 1)[None], (13, 9), mode="bicubic", align_corners=False)
    close(out, seen[0] + resized, atol=1e-6)
    other = visionattn.create_model("test_sgformer", img_size=64)
    fitted = visionattn.weights.fit_state_dict(model.state_dict(), other, {"img_size": (32, 48)})[0]
    resized = F.interpolate(table.permute(2, 0, 1)[None], (16, 16), mode="bicubic", align_corners=False)
    close(fitted["stem.pos_embed.weight"][0], resized[0].flatten(1).T, atol=1e-6)


def test_initialisation():
    model = visionattn.create_model("sgformer_s", depths=(2, 2, 2, 1))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 1000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05) and not module.bias.any()
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
            assert module.bias is None or not module.bias.any()
    assert not model.no_weight_decay()


def test_norms_and_drop_path():
    with torch.device("meta"):
        model = visionattn.create_model("sgformer_s", drop_path_rate=0.2)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if name == "stem.norm" or name.endswith("mixer.norm") else 1e-6)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 12 and all(isinstance(m, GroupNorm1) and m.eps == 1e-5 for m in norms)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / 22 for i in range(1, 23) for _ in (1, 2)])
