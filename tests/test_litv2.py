"""LITv2: its layers against their definitions, options, sizes and what the goldens cannot see."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import HiLoAttention
from visionattn.macs import counted_flops
from visionattn.models.litv2 import DeformableMerging


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def attend(q, k, v, heads, scale):
    """(B, N, C) queries, (B, M, C) keys and values to (B, N, C)."""
    q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)


def hilo_attention(layer, x, alpha):
    """On the zero-padded map, one window at a time; no padding is masked."""
    (B, H, W, C), s = x.shape, layer.window_size
    low_heads = layer.num_heads if s == 1 else int(layer.num_heads * alpha)
    high_heads, scale = layer.num_heads - low_heads, layer.scale
    x = F.pad(x, (0, 0, 0, -W % s, 0, -H % s))
    outs = []
    if high_heads:
        high = x.new_empty(*x.shape[:3], high_heads * C // layer.num_heads)
        for i in range(0, x.shape[1], s):
            for j in range(0, x.shape[2], s):
                q, k, v = layer.h_qkv(x[:, i : i + s, j : j + s].flatten(1, 2)).chunk(3, -1)
                high[:, i : i + s, j : j + s] = attend(q, k, v, high_heads, scale).view(B, s, s, -1)
        outs.append(layer.h_proj(high))
    if low_heads:
        pooled = x.unflatten(1, (-1, s)).unflatten(3, (-1, s)).mean((2, 4)).flatten(1, 2)
        k, v = layer.l_kv(pooled).chunk(2, -1)
        low = attend(layer.l_q(x.flatten(1, 2)), k, v, low_heads, scale)
        outs.append(layer.l_proj(low).view(*x.shape[:3], -1))
    return torch.cat(outs, 3)[:, :H, :W]


def deformable_merging(layer, x):
    """Every tap of every position, without the norm and the activation."""
    B, C, H, W = x.shape
    offset = F.conv2d(x, layer.offset.weight, layer.offset.bias, stride=2)
    out = x.new_zeros(B, 2 * C, H // 2, W // 2) + layer.reduction.bias[:, None, None]
    for b, oy, ox, tap in torch.cartesian_prod(*(torch.arange(n) for n in (B, H // 2, W // 2, 4))).tolist():
        i, j = divmod(tap, 2)
        y = 2 * oy + i + offset[b, 2 * tap, oy, ox]
        z = 2 * ox + j + offset[b, 2 * tap + 1, oy, ox]
        sample = x.new_zeros(C)
        top, left = (int(p.detach().floor()) for p in (y, z))
        for yy in (top, top + 1):
            for zz in (left, left + 1):
                if 0 <= yy < H and 0 <= zz < W:
                    sample = sample + (1 - (y - yy).abs()) * (1 - (z - zz).abs()) * x[b, :, yy, zz]
        out[b, :, oy, ox] += layer.reduction.weight[:, :, i, j] @ sample
    return out


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 3), (9, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"alpha": 0.5, "qkv_bias": True},
        {"alpha": 0.7, "qkv_bias": True, "window_size": 4, "qk_scale": 0.3},
        {"alpha": 1.0, "qkv_bias": True},
        {"alpha": 0.3, "window_size": 1},
    ],
)
def test_hilo_attention_is_its_definition(size, options):
    layer = randomised(HiLoAttention(12, 3, **options))
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), hilo_attention(layer, x, options["alpha"])
    close(out, expected)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, atol=1e-11)
    turned = x.detach().transpose(1, 2)
    close(layer(turned), hilo_attention(layer, turned, options["alpha"]))


@pytest.mark.parametrize(
    "heads, alpha, low", [(12, 0.9, 10), (12, 0.7, 8), (12, 0.2, 2), (16, 0.9, 14), (8, 0.0, 0), (8, 1.0, 8)]
)
def test_heads_are_split_by_truncation(heads, alpha, low):
    layer = HiLoAttention(4 * heads, heads, alpha=alpha)
    assert (layer.low_heads, layer.high_heads) == (low, heads - low)
    assert {name.split(".")[0] for name in layer.state_dict()} == {
        *(("l_q", "l_kv", "l_proj") if low else ()), *(("h_qkv", "h_proj") if low < heads else ())
    }  # fmt: skip


def test_dropout():
    for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        layer = HiLoAttention(12, 3, alpha=0.5, **options)
        x = torch.randn(1, 6, 6, 12)
        first, second = layer(x), layer(x)
        assert not torch.equal(first[..., :8], second[..., :8]) and not torch.equal(first[..., 8:], second[..., 8:])
        layer.eval()
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 3), "dim 10 is not divisible by num_heads 3"),
        ((12, 3, False, None, 0.0, 0.0, 0), "window_size >= 1, got 0"),
        ((12, 3, False, None, 0.0, 0.0, 2, 1.1), "alpha between 0 and 1, got 1.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiLoAttention(*arguments)
    with pytest.raises(VisionattnError, match="of one length, got 4, 4, 4, 2"):
        visionattn.create_model("test_litv2", local_ws=(2, 1))


def test_merging_is_its_definition():
    layer = randomised(DeformableMerging(3)).eval()
    layer.norm = layer.act = nn.Identity()
    for size in ((6, 4), (5, 7), (2, 3)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        close(layer(x), deformable_merging(layer, x))
    layer.reduction.weight.data.fill_(1)  # an odd last row counts only if offsets reach it
    layer.offset.weight.data.zero_()
    layer.offset.bias.data.zero_()
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    first = layer(x)
    x[:, :, 4] = 7
    assert torch.equal(layer(x), first)
    layer.offset.bias.data[0::2] = 1.5
    assert not torch.equal(layer(x)[:, :, 1], layer(x * (x != 7))[:, :, 1])


def test_merging_starts_as_a_convolution():
    layer = DeformableMerging(4).eval()
    x = torch.randn(2, 4, 6, 8)
    y = F.conv2d(x, layer.reduction.weight, layer.reduction.bias, stride=2)
    close(layer(x), F.gelu(layer.norm(y)), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_samples_in_full_precision(dtype):
    layer = randomised(DeformableMerging(4)).float().eval()
    x = torch.randn(2, 4, 40, 40)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype):
            close(layer(x), expected, atol=1e-5)
        half = layer(x.to(dtype).float())
        with torch.autocast("cpu", dtype):
            assert layer(x.to(dtype)).dtype == dtype
            close(layer(x.to(dtype)).float(), half, atol=torch.finfo(dtype).eps * half.abs().max().item())


@pytest.mark.parametrize(
    "layer, shape",
    [
        (HiLoAttention(6, 3, True, alpha=0.5), (1, 3, 5, 6)),
        (HiLoAttention(4, 2, window_size=1), (1, 3, 2, 4)),
        (DeformableMerging(2).eval(), (1, 2, 5, 4)),
    ],
    ids=["hilo", "global", "merging"],
)
def test_gradients(layer, shape):
    layer = randomised(layer)
    names = dict(layer.named_parameters())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())))


@pytest.mark.parametrize(
    "alpha, window, published",
    [(0.5, 2, 83467776), (0, 2, 116207616), (0.9, 2, 77697536), (1, 2, 79629312), (0.5, 1, 145108992)],
)
def test_cost(alpha, window, published):
    C, N = 384, 14 * 14
    with torch.device("meta"):
        layer = HiLoAttention(C, 12, window_size=window, alpha=alpha)
        with counted_flops() as counter:
            layer(torch.randn(1, 14, 14, C))
    high = C // 12 * layer.high_heads
    low, pooled = C - high, N // window**2
    expected = 3 * N * C * high + 2 * N * window**2 * high + N * high**2
    expected += N * C * low + 2 * pooled * C * low + 2 * N * pooled * low + N * low**2
    assert counter.get_total_flops() / 2 == expected == published


def test_initialisation():
    model = visionattn.create_model("litv2_small", depths=(1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05) and not module.bias.any()
        if name.endswith("dwconv"):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05) and not module.bias.any()
        if name.endswith("offset"):
            assert not module.weight.any() and not module.bias.any()
        if name.endswith("reduction"):
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.max() <= bound and module.bias.abs().max() <= bound
            assert module.weight.max().item() == pytest.approx(bound, rel=0.01)


def test_norm_epsilons_and_drop_path():
    with torch.device("meta"):
        model = visionattn.create_model("litv2_small", drop_path_rate=0.2)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 and {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / 11 for i in (1, 2, 3, *(i for i in range(4, 12) for _ in (1, 2)))])


def test_norm_comes_before_the_pooling():
    model = visionattn.create_model("test_litv2").eval()
    x = torch.randn(2, 3, 96, 64)
    tokens = model.stages(model.stem(x)).flatten(2).transpose(1, 2)
    expected = F.layer_norm(tokens, (128,), model.norm.weight, model.norm.bias, 1e-5).mean(1)
    close(model.forward_head(model.forward_features(x), pre_logits=True), expected, atol=1e-6)


def test_sizes():
    model = visionattn.create_model("test_litv2").eval()
    x = torch.randn(1, 3, 54, 91)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(14, 23), (7, 11), (3, 5), (1, 2)]
    assert torch.equal(model(F.pad(x, (0, 1, 0, 2))), model(x))


def test_windows_do_not_change_parameters():
    model = visionattn.create_model("test_litv2").eval()
    coarse = visionattn.create_model("test_litv2", local_ws=(0, 0, 4, 1)).eval()
    coarse.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 128, 128)
    assert not torch.equal(coarse(x), model(x))


def test_attention_and_convolution_by_stage():
    model = visionattn.create_model("test_litv2", has_msa=(1, 0, 0, 1), local_ws=(4, 0, 0, 1)).eval()
    assert [hasattr(stage.blocks[0], "mixer") for stage in model.stages] == [True, False, False, True]
    assert model(torch.randn(1, 3, 36, 40)).shape == (1, 1000)


def test_fused():
    model = visionattn.create_model("test_litv2").eval()
    for name, value in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    for stage in model.stages[1:]:
        nn.init.normal_(stage.downsample.offset.bias)
    x = torch.randn(2, 3, 97, 61)
    with torch.no_grad():
        expected = model(x)
        close(model.fuse()(x), expected, atol=1e-5 * max(1, expected.abs().max().item()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
