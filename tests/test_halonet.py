"""Halo attention and HaloNet: what the goldens cannot see."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import HaloAttention2d, halo_attention, local_attention, size_constant
from visionattn.macs import counted_flops
from visionattn.models.halonet import Bottleneck, HaloNet
from visionattn.weights import convert_state_dict


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def definition(layer, x):
    """One query at a time."""
    B, _, H, W = x.shape
    heads, d, b, h, s = layer.num_heads, layer.dim_head, layer.block_size, layer.halo_size, layer.query_stride
    w = b + 2 * h
    q = layer.q(x.permute(0, 2, 3, 1)).unflatten(3, (heads, d))
    kv = layer.kv(x.permute(0, 2, 3, 1)).unflatten(3, (heads, -1))
    zero = torch.zeros_like(kv[:, 0, 0])
    out = []
    for i in range(0, H, s):
        for j in range(0, W, s):
            logits, values = [], []
            for u in range(w):
                for t in range(w):
                    r, c = i // b * b - h + u, j // b * b - h + t
                    inside = 0 <= r < H and 0 <= c < W
                    if not inside and (layer.mask == "all" or r >= H + h or c >= W + h):
                        continue
                    k, v = (kv[:, r, c] if inside else zero).split([d, layer.dim_out // heads], -1)
                    position = layer.height_rel[w - 1 + u - i % b // s] + layer.width_rel[w - 1 + t - j % b // s]
                    factor = layer.scale if layer.scale_pos_embed else 1
                    logits.append((q[:, i, j] * (k * layer.scale + position * factor)).sum(-1))
                    values.append(v)
            weights = torch.stack(logits, 1).softmax(1)
            out.append((weights[..., None] * torch.stack(values, 1)).sum(1).flatten(1))
    out = torch.stack(out, 2).view(B, layer.dim_out, -(-H // s), -(-W // s))
    if layer.stride == s:
        return out
    pad = F.pad(out, (0, W % 2, 0, H % 2))
    count = F.pad(torch.ones(1, 1, H, W, dtype=x.dtype), (0, W % 2, 0, H % 2))
    return F.avg_pool2d(pad, 2) / F.avg_pool2d(count, 2)


@pytest.mark.parametrize(
    "size, options",
    [
        ((8, 4), {}),  # blocks divide the map
        ((8, 8), {"stride": 2, "qkv_bias": True}),
        ((5, 7), {"qkv_bias": True}),  # alignment padding, the last block of a row and of a column
        ((5, 7), {"mask": "all", "qkv_bias": True}),
        ((8, 4), {"mask": "all"}),
        ((9, 6), {"stride": 2}),
        ((7, 3), {"stride": 2, "mask": "all"}),
        ((9, 7), {"stride": 2, "block_size": 3}),  # odd blocks: pooled, at odd sizes over what there is
        ((5, 8), {"stride": 2, "avg_down": True}),
        ((6, 5), {"dim_out": 12, "dim_head": 3, "halo_size": 3}),  # a halo nearly as wide as the block
        ((6, 5), {"dim_out": 16, "qk_ratio": 0.5, "scale_pos_embed": True}),
        ((5, 6), {"halo_size": 0}),  # windows
        ((1, 1), {"stride": 2}),
        ((2, 9), {"halo_size": 5, "mask": "all"}),  # a halo wider than block and map
        ((4, 8), {"num_heads": 8}),  # more heads than blocks
        ((3, 7), {"num_heads": 8, "mask": "all"}),
    ],
)
def test_halo_attention_is_its_definition(size, options):
    options = {"num_heads": 2, "block_size": 4, "halo_size": 1} | options
    layer = randomised(HaloAttention2d(8, **options))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    parameters = [x, *layer.parameters()]
    out, expected = layer(x), definition(layer, x)
    close(out, expected)
    weight = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), parameters, retain_graph=True) for y in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-11)
    with torch.no_grad():
        close(layer(x), expected)
        close(layer(x), expected)  # from the cache


def test_sizes():
    layer = HaloAttention2d(16, 24, num_heads=4, qk_ratio=0.5)
    assert layer.dim_head == 4 and layer.q.weight.shape == (16, 16) and layer.kv.weight.shape == (40, 16)
    assert layer.height_rel.shape == layer.width_rel.shape == (27, 4)
    assert HaloAttention2d(576, qk_ratio=0.33).dim_head == 24 and HaloAttention2d(864, qk_ratio=0.33).dim_head == 36
    assert layer(torch.randn(2, 16, 9, 30)).shape == (2, 24, 9, 30)
    assert HaloAttention2d(16, stride=2, block_size=7)(torch.randn(1, 16, 9, 30)).shape == (1, 16, 5, 15)


@pytest.mark.parametrize("mask", ["pad", "all"])
def test_nothing_is_read_from_the_padding(mask, monkeypatch):
    """Keys that do not count may be anything."""
    layer = randomised(HaloAttention2d(8, num_heads=2, block_size=4, halo_size=2, mask=mask))
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64)
    expected = layer(x)

    def other_keys(*args):
        axis = halo_axis(*args)
        masked = (axis.pairs < 0).all(1)
        assert masked.any() and ((axis.pairs < 0).any(1) == masked).all()
        axis.keys[masked] = torch.randint(axis.num_keys, (masked.sum(),)).numpy()
        return axis

    halo_axis = halo_attention.halo_axis
    monkeypatch.setattr(halo_attention, "halo_axis", other_keys)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("size", [(16, 12), (15, 13)])
@pytest.mark.parametrize("stride", [1, 2])
def test_large_maps(size, stride, monkeypatch):
    layer = randomised(HaloAttention2d(8, stride=stride, num_heads=2, block_size=4, halo_size=1))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    expected = layer(x)
    monkeypatch.setattr(local_attention, "MAX_PAIRS", 0)
    monkeypatch.setattr(size_constant, "_kept", OrderedDict())
    close(layer(x), expected)
    assert size_constant._kept


@pytest.mark.parametrize("stride, dead", [(1, 6), (2, 10)])
def test_rows_never_read(stride, dead):
    layer = HaloAttention2d(16, stride=stride, num_heads=2)
    layer(torch.randn(1, 16, 16, 16)).square().sum().backward()
    for table in (layer.height_rel, layer.width_rel):
        assert (table.grad[:dead] == 0).all() and (table.grad[dead:] != 0).any(1).all()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 2, "avg_down": True, "mask": "all"}])
def test_gradients(options):
    layer = randomised(HaloAttention2d(4, 8, num_heads=2, block_size=4, halo_size=1, **options))
    names = dict(layer.named_parameters())
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())))


@pytest.mark.parametrize("stride", [1, 2])
def test_cost(stride):
    """The docstring's line, with the attention products at the width they are executed at."""
    C, heads, d, D_v, b, h, H, W = 24, 2, 8, 48, 8, 2, 16, 24
    N, D_qk, w, s = H * W, heads * d, b + 2 * h, stride
    layer = HaloAttention2d(C, D_v, stride, heads, d, b, h)
    macs = N * C * (D_qk // s**2 + D_qk + D_v) + N // s**2 * w**2 * (D_qk + D_v) + 2 * N // s**2 * w * D_qk
    width = 32  # 8 + 2 * 12
    macs += N // s**2 * w**2 * (2 * width * heads - D_qk - D_v)
    with counted_flops() as counter, torch.no_grad():
        layer(torch.randn(1, C, H, W))
    assert counter.get_total_flops() == 2 * macs


def test_resized_window():
    layer = HaloAttention2d(8, num_heads=2, block_size=4, halo_size=2)
    with torch.no_grad():  # linear in the displacement
        layer.height_rel.copy_(torch.arange(15.0)[:, None] - 9)
        layer.width_rel.copy_(9 - torch.arange(15.0)[:, None])
    layer.resize(8, 4)
    assert layer.height_rel.shape == (31, 4) and layer.height_rel.requires_grad
    assert (layer.height_rel[:8] == 0).all()
    close(layer.height_rel[8:, 0], torch.linspace(-5, 5, 23), 1e-6)  # zero displacement stays in the middle
    close(layer.width_rel, -layer.height_rel, 1e-6)
    assert layer(torch.randn(1, 8, 10, 9)).shape == (1, 8, 10, 9)
    strided = HaloAttention2d(8, stride=2, num_heads=2)
    strided.resize(7, 2)
    assert strided.query_stride == 1 and strided(torch.randn(1, 8, 10, 9)).shape == (1, 8, 5, 5)
    model = visionattn.create_model("test_halonet")
    model.resize_window(6, 2)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    same = HaloAttention2d(8, num_heads=2)
    tables = [t[6:].clone() for t in (same.height_rel, same.width_rel)]
    same.resize(8, 3)
    for table, before in zip((same.height_rel, same.width_rel), tables, strict=True):
        close(table[6:], before, 1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "dim_out 16 is not divisible by num_heads 3"),
        ({"stride": 3}, "expected stride 1 or 2 .* got stride 3"),
        ({"halo_size": -1}, "halo_size -1"),
        ({"block_size": 1, "stride": 2}, "block_size 1"),
        ({"num_heads": 16, "qk_ratio": 0.1}, "dim_head 0"),
        ({"mask": "none"}, "expected mask 'pad' or 'all', got 'none'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        HaloAttention2d(16, **options)


def test_tables_in_the_cache_follow_their_parameters():
    layer = HaloAttention2d(8, num_heads=2, block_size=4, halo_size=1)
    x = torch.randn(1, 8, 5, 6)
    for change in (lambda p: p.data.normal_(), lambda p: p.add_(1), lambda p: p):
        with torch.no_grad():
            change(layer.height_rel)
            change(layer.width_rel)
            cached = layer(x)
        close(layer(x), cached, 1e-6)
    assert set(layer.state_dict()) == {"q.weight", "kv.weight", "height_rel", "width_rel"}


@pytest.mark.parametrize("options", [{}, {"stride": 2, "mask": "all"}])
def test_execution_modes(options, tmp_path):
    """Of the layer, as fresh blocks multiply it by zero."""
    layer = HaloAttention2d(16, num_heads=2, block_size=4, halo_size=1, **options).eval()
    x = torch.randn(2, 16, 9, 7)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x), expected, 1e-6)
    gradients = (torch.autograd.grad(run(x).square().sum(), list(layer.parameters())) for run in (layer, compiled))
    for ours, theirs in zip(*gradients, strict=True):
        close(theirs, ours, 1e-4)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    close(exported(x[:1].repeat(3, 1, 1, 1)), expected[:1].repeat(3, 1, 1, 1), 1e-6)
    with torch.no_grad():
        close(layer(x.to(memory_format=torch.channels_last)), expected, 1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            close(layer(x).float(), expected, 0.05)
        close(copy.deepcopy(layer).half()(x.half()).float(), expected, 0.01)
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), expected.detach(), 1e-5)


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return visionattn.create_model(name, **kwargs)


def attentions(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, HaloAttention2d)}


def test_where_the_attention_is():
    heads = {n: m.num_heads for n, m in attentions(on_meta("halonet50ts")).items()}
    assert heads.pop("stages.1.blocks.3.mixer") == 4 and set(heads.values()) == {8}
    assert [int(n.split(".")[1]) for n in heads] == [2, 2, 2, 3]
    strides = {n: (m.stride, m.query_stride) for n, m in attentions(on_meta("haloregnetz_b")).items()}
    assert strides.pop("stages.3.blocks.0.mixer") == (2, 1) and set(strides.values()) == {(1, 1)}  # odd blocks
    assert attentions(on_meta("halonet26t"))["stages.3.blocks.0.mixer"].query_stride == 2
    assert {m.dim_head for m in attentions(on_meta("eca_halonext26ts")).values()} == {16}
    wide = attentions(on_meta("halonet_h5"))["stages.0.blocks.0.mixer"]
    assert (wide.dim_head, wide.dim_out) == (16, 160)


def test_blocks():
    model = on_meta("haloregnetz_b")
    blocks = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert [b.shortcut is None for b in blocks] == [b.mixer.stride in (2, (2, 2)) for b in blocks]
    assert {type(b.act3) for b in blocks} == {nn.Identity} and {type(b.act1) for b in blocks} == {nn.SiLU}
    assert [b.conv1.out_features for b in blocks[:3]] == [96, 144, 144]  # of the width that comes in
    gate = blocks[1].gate
    assert gate.fc1.out_channels == 40 and type(gate.act) is nn.ReLU
    assert blocks[0].mixer.groups == 6 and type(blocks[-1].gate) is nn.Identity
    eca = [m for m in on_meta("eca_halonext26ts").modules() if isinstance(m, Bottleneck)]
    kernels = {b.conv1.out_features: b.gate.conv.kernel_size for b in eca if isinstance(b.mixer, nn.Conv2d)}
    assert kernels == {64: (3,), 128: (5,), 256: (5,)}
    gates = [m for m in on_meta("sehalonet33ts").modules() if isinstance(m, Bottleneck)]
    assert gates[0].gate.fc1.out_channels == 8 and gates[-1].conv1.out_features == 512
    for name in ("haloregnetz_b", "halonet26t", "halonet_h6"):
        norms = [m for m in on_meta(name).modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}


def test_initialisation():
    model = visionattn.create_model("haloregnetz_b")
    for block in (m for m in model.modules() if isinstance(m, Bottleneck)):
        assert (block.norm3.weight == (block.shortcut is None)).all() and (block.norm3.bias == 0).all()
        close(block.conv3.weight.std().item(), math.sqrt(2 / block.conv3.out_features), 0.02)
    mixer, block = model.stages[3].blocks[1].mixer, model.stages[2].blocks[1]
    for weight, std in (
        (mixer.q.weight, 864**-0.5),
        (mixer.kv.weight, 864**-0.5),
        (mixer.height_rel, 36**-0.5),
        (mixer.width_rel, 36**-0.5),
        (block.mixer.weight, math.sqrt(2 / (9 * 16))),
        (block.gate.fc1.weight, math.sqrt(2 / 144)),
        (model.head.weight, 0.01),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.06)
    assert (block.gate.fc1.bias == 0).all() and (model.head.bias == 0).all()


def test_other_strides():
    model = on_meta("halonet26t", strides=(1, 2, 2, 1))
    assert model.feature_info[-1]["reduction"] == model.check.size == 16
    assert model(torch.empty(1, 3, 16, 17, device="meta")).shape == (1, 1000)
    assert model.forward_features(torch.empty(1, 3, 160, 100, device="meta")).shape == (1, 2048, 10, 7)
    with torch.device("meta"):
        model = HaloNet(stem="3x3", stem_pool=False)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]


@pytest.mark.parametrize("mask", ["pad", "all"])
def test_masked_model(mask):
    model = visionattn.create_model("test_halonet", mask=mask)
    assert {m.mask for m in attentions(model).values()} == {mask}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stem": "5x5"}, "expected stem one of 'tiered', '7x7', '3x3', got '5x5'"),
        ({"act_layer": "gelu"}, "expected act_layer one of"),
        ({"channel_attn": "cbam"}, "expected channel_attn one of"),
        ({"downsample": "avg"}, "expected downsample one of"),
        (
            {"num_heads": (2, 2, 4)},
            "expected layout, channels, strides, bottle_ratio, num_heads of one length, got 4, 4, 4, 4, 3",
        ),
        ({"layout": ("c", "c", "b", "h")}, "expected letters of layout one of 'c', 'h', got 'b'"),
    ],
)
def test_bad_model_arguments(options, message):
    with pytest.raises(VisionattnError, match=message):
        visionattn.create_model("test_halonet", **options)


def test_pruning_behind_the_final_product():
    model = visionattn.create_model("test_halonet").eval()
    assert model.num_features == 96 and model.feature_info[-1]["num_chs"] == 128
    model.prune_intermediate_layers([3], prune_norm=False, prune_head=False)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    model.prune_intermediate_layers([3], prune_norm=True)
    assert model.num_features == 128 and model(torch.randn(1, 3, 32, 32)).shape == (1, 128, 1, 1)


def test_fused():
    model = visionattn.create_model("test_halonet").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        close(model.fuse()(x), expected, 1e-5)
    left = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == [n.replace("mixer", "norm2") for n in attentions(model)]  # attention is no product


def test_conversion():
    model = visionattn.create_model("test_halonet")
    state = model.state_dict()
    assert convert_state_dict(state, model).keys() == state.keys()
    with pytest.raises(VisionattnError, match="state dict does not fit test_halonet: missing"):
        convert_state_dict(visionattn.create_model("test_van").state_dict(), model)
