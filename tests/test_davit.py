"""DaViT: its layers against their definitions, options, layouts and what the goldens cannot see."""

import re

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import ChannelAttention, ConvPosEnc, WindowAttention2d
from visionattn.layers.channel_attention import InPlaces
from visionattn.layers.heads import split_heads
from visionattn.layers.local_attention import local_plan
from visionattn.layers.pointwise import Pointwise
from visionattn.layers.window_attention import graph_window_axis, window_axis
from visionattn.macs import counted_flops
from visionattn.models.davit import Downsample
from visionattn.weights import convert_state_dict


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def window_attention(layer, x):
    """One window at a time, of the zero-padded map."""
    (_, H, W, C), w = x.shape, layer.window_size
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
    out = torch.empty_like(x)
    for i in range(0, x.shape[1], w):
        for j in range(0, x.shape[2], w):
            window = x[:, i : i + w, j : j + w]
            q, k, v = layer.qkv(window.flatten(1, 2)).unflatten(2, (3, layer.num_heads, -1)).unbind(2)
            logits = torch.einsum("bqhd,bkhd->bhqk", q * (C // layer.num_heads) ** -0.5, k)
            mixed = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)
            out[:, i : i + w, j : j + w] = layer.proj(mixed).view_as(window)
    return out[:, :H, :W]


def channel_attention(layer, x):
    q, k, v = layer.qkv(x.flatten(1, -2)).unflatten(2, (3, layer.num_heads, -1)).unbind(2)  # (B, N, heads, d)
    N, _, d = q.shape[1:]
    if layer.version == 1:
        attention = (d**-0.5 * torch.einsum("bnhi,bnhj->bhij", k, v)).softmax(-1)
        mixed = torch.einsum("bhij,bnhj->bnhi", attention, q)
    else:
        attention = (N**-0.5 * torch.einsum("bnhi,bnhj->bhij", q, k)).softmax(-1)
        mixed = torch.einsum("bhij,bnhj->bnhi", attention, v)
    return layer.proj(mixed.flatten(2)).view_as(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(12, 8), (9, 14), (3, 2), (1, 21), (4, 4)])
def test_window_attention_is_its_definition(size, bias):
    layer = randomised(WindowAttention2d(6, 2, 4, qkv_bias=bias))
    x = torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), window_attention(layer, x)
    close(out, expected)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, atol=1e-11)
    close(layer(x.detach().transpose(1, 2)), window_attention(layer, x.transpose(1, 2)))


def test_windows_of_any_map_need_no_table():
    axes = window_axis, graph_window_axis
    (group,) = local_plan(axes, (1000, 1400), ((3,), (3,)), torch.device("cpu")).groups
    assert group.pairs is None and group.mask is None and len(group.queries) == 334 * 467


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(5, 7), (1,), (30,)])
def test_channel_attention_is_its_definition(size, version):
    layer = randomised(ChannelAttention(12, 3, version=version))
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    close(layer(x), channel_attention(layer, x))


def test_versions_of_channel_attention_differ_by_roles_and_scale():
    one, two = randomised(ChannelAttention(8, 2, version=1)), ChannelAttention(8, 2, version=2).double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)  # N = d: equal scales
    state = one.state_dict()
    for name in ("qkv.weight", "qkv.bias"):
        q, k, v = state[name].chunk(3)
        state[name] = torch.cat([k, v, q])
    two.load_state_dict(state)
    close(one(x), two(x))


def test_channel_weights_of_a_large_map_are_no_denormal_numbers():
    """As logits grow with the map, some would be; they slow down all products with them."""
    qkv = (1.6 * torch.randn(1, 3136, 192, generator=torch.Generator().manual_seed(0))).requires_grad_()
    out = InPlaces.apply(qkv, 2, 1)
    _, weights = out.grad_fn.saved_tensors
    q, k, v = split_heads(qkv.detach().double(), 2)
    expected = (32**-0.5 * k.mT @ v).softmax(-1)
    tiny = torch.finfo(torch.float32).tiny
    assert (expected.float() > 0)[expected < tiny].any() and not (weights > 0)[weights < tiny].any()
    close(weights.double(), expected, atol=1e-3)
    close(out.double(), (q @ expected.mT).transpose(1, 2).flatten(2), atol=1e-2)


@pytest.mark.parametrize("version, bias", [(1, True), (1, False), (2, True)])
def test_channel_attention_without_gradients(version, bias, monkeypatch):
    """Large maps are summed up in parts."""
    monkeypatch.setattr("visionattn.layers.channel_attention.CHUNK", 7 * 2 * 8 * 8)
    layer, x = randomised(ChannelAttention(8, 2, bias, version)), torch.randn(2, 6, 5, 8, dtype=torch.float64)
    expected = layer(x)
    with torch.no_grad():
        assert layer._merges(x)
        close(layer(x), expected)
        close(layer(x.transpose(1, 2)), expected.transpose(1, 2))
        assert layer(x[:0]).shape == x[:0].shape
        layer.proj.register_forward_hook(lambda module, args, out: 2 * out)
        close(layer(x), 2 * expected)


def test_other_projections_of_channel_attention():
    layer, x = randomised(ChannelAttention(4, 2)), torch.randn(2, 9, 8, 4, dtype=torch.float64)
    layer.proj.bias = None
    with torch.no_grad():
        close(layer(x), layer(x.requires_grad_()))
        layer.proj = randomised(Pointwise(4, 6))
        assert layer(x).shape == (2, 9, 8, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channel_logits_do_not_overflow(dtype):
    layer = ChannelAttention(8, 2)
    x = torch.full((1, 64, 64, 8), 8.0)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype):
            close(layer(x).float(), expected, atol=4 * torch.finfo(dtype).eps * expected.abs().max().item())
        out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("act", [False, True])
def test_conv_position_is_its_definition(act):
    layer = randomised(ConvPosEnc(6, 5, act))
    x = torch.randn(2, 7, 4, 6, dtype=torch.float64)
    y = F.conv2d(x.permute(0, 3, 1, 2), layer.proj.weight, layer.proj.bias, padding=2, groups=6).permute(0, 2, 3, 1)
    close(layer(x), x + (y * 0.5 * (1 + torch.erf(y / 2**0.5)) if act else y))


LAYERS = [
    (WindowAttention2d(4, 2, 3), (1, 4, 5, 4)),
    (ChannelAttention(4, 2), (1, 3, 2, 4)),
    (ChannelAttention(4, 2, version=2), (1, 5, 4)),
    (ConvPosEnc(4, act=True), (1, 3, 5, 4)),
]


@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda value: getattr(value, "_get_name", str)())
def test_gradients(layer, shape):
    layer = randomised(layer)
    names = dict(layer.named_parameters())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())))


@pytest.mark.parametrize(
    "layer, macs",
    [
        (WindowAttention2d(32, 2, 7), 4 * 160 * 32**2 + 2 * 14 * 21 * 32 * 49),
        (ChannelAttention(32, 4), 4 * 160 * 32**2 + 2 * 160 * 32 * 8),
        (ConvPosEnc(32), 160 * 32 * 9),
    ],
    ids=lambda value: getattr(value, "_get_name", str)(),
)
def test_costs(layer, macs):
    with counted_flops() as counter, torch.no_grad():
        layer(torch.randn(1, 10, 16, 32))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WindowAttention2d(10, 3), "dim 10 is not divisible by num_heads 3"),
        (lambda: WindowAttention2d(8, 2, 0), "expected an integer window_size >= 1, got 0"),
        (lambda: ChannelAttention(10, 3), "dim 10 is not divisible by num_heads 3"),
        (lambda: ChannelAttention(8, 2, version=3), "expected version 1 or 2, got 3"),
        (lambda: ConvPosEnc(8, 4), "expected an odd kernel_size, got 4"),
        (lambda: davit(attention_types=("spatial", "global")), "expected attention_types of .*'global'"),
        (lambda: davit(attention_types=()), "expected attention_types of"),
        (lambda: davit(down_kernel_size=4), "expected down_kernel_size of .* got 4"),
        (lambda: davit(weight_init="linear"), "expected weight_init of .* got 'linear'"),
        (lambda: davit(global_pool="catavgmax"), "got 'catavgmax'"),
        (lambda: davit().reset_classifier(3, "catavgmax"), "got 'catavgmax'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def davit(**kwargs):
    return visionattn.create_model("test_davit", **kwargs)


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return visionattn.create_model(name, **kwargs)


def test_head_norms_after_pooling():
    model = davit().eval()
    nn.init.normal_(model.norm.weight)
    x = torch.randn(2, 3, 64, 48)
    features = model.forward_features(x)
    pooled = F.layer_norm(features.mean((2, 3)), (256,), model.norm.weight, model.norm.bias, 1e-5)
    close(model.forward_head(features, pre_logits=True), pooled, atol=1e-5)
    close(model(x), model.head(pooled), atol=1e-5)
    first = davit(head_norm_first=True).eval()
    first.load_state_dict(model.state_dict())
    normed = F.layer_norm(features.movedim(1, -1), (256,), model.norm.weight, model.norm.bias, 1e-5)
    close(first(x), model.head(normed.mean((1, 2))), atol=1e-5)
    close(first.forward_features(x), normed.movedim(-1, 1), atol=1e-5)


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("size", [(8, 6), (7, 6), (5, 9)])
def test_downsampling_pads_after_the_norm(kernel_size, size):
    layer = randomised(Downsample(4, 6, kernel_size))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    normed = F.layer_norm(x.movedim(1, -1), (4,), layer.norm.weight, layer.norm.bias, 1e-5).movedim(-1, 1)
    padded = F.pad(normed, (0, size[1] % 2, 0, size[0] % 2))
    expected = F.conv2d(padded, layer.proj.weight, layer.proj.bias, stride=2, padding=kernel_size // 3)
    close(layer(x), expected)
    assert expected.shape[2:] == tuple(-(-n // 2) for n in size)


def test_norm_epsilons():
    model = on_meta("davit_tiny")
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    model = on_meta("davit_tiny", norm_eps=1e-6)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_initialisation():
    model = davit()
    for m in model.modules():
        if isinstance(m, nn.Linear):
            assert (m.bias == 0).all() and m.weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif isinstance(m, nn.Conv2d):  # torch's default
            bound = m.weight[0].numel() ** -0.5
            assert (m.bias != 0).any() and 0.9 * bound < m.weight.abs().max() <= bound
    for m in davit(weight_init="conv").modules():
        if isinstance(m, nn.Conv2d):
            assert (m.bias == 0).all() and m.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_drop_path_grows_block_by_block():
    model = davit(drop_path_rate=0.9)
    rates = [[getattr(block, f"drop_path{i}") for i in (1, 2)] for stage in model.stages for block in stage.blocks]
    assert all(isinstance(a, nn.Identity) and isinstance(b, nn.Identity) for a, b in rates[:1])
    assert all(isinstance(p, DropPath) for pair in rates[1:] for p in pair)
    found = [[p.drop_prob for p in pair] for pair in rates[1:]]
    torch.testing.assert_close(found, [[0.1 * i] * 2 for i in range(1, 10)])


def test_blocks_without_mlp():
    model = davit(ffn=False, drop_path_rate=0.1)
    names = dict(model.named_parameters())
    assert not any(".mlp." in n or ".norm2." in n for n in names) and any(".cpe2." in n for n in names)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in names.values())


def test_position_activation():
    model, plain = davit(cpe_act=True).eval(), davit().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(model(x), plain(x))


@pytest.mark.parametrize("types", [("channel", "spatial"), ("channel",), ("spatial", "spatial", "channel")])
def test_other_attention_types(types):
    model = davit(attention_types=types)
    kinds = [type(b.mixer) for b in model.stages[2].blocks]
    assert kinds == [WindowAttention2d if t == "spatial" else ChannelAttention for t in types] * 2
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 1000)
    check_conversion(official(model.state_dict(), len(types)), model)


def official(state, types=2):
    """Our state dict in the official layout."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.", "patch_embeds.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"patch_embeds.\1.", key)
        key = re.sub(
            r"^stages\.(\d)\.blocks\.(\d+)\.",
            lambda m: f"main_blocks.{m[1]}.{int(m[2]) // types}.{int(m[2]) % types}.",
            key,
        )
        key = key.replace(".cpe1.", ".cpe.0.").replace(".cpe2.", ".cpe.1.").replace(".mixer.", ".attn.")
        out[re.sub(r"^norm\.", "norms.", key)] = value
    return out


def timm(state, named):
    out = {}
    for key, value in official(state).items():
        key = re.sub(r"^patch_embeds\.0\.(proj)?", lambda m: "stem." + ("conv" if m[1] else ""), key)
        key = re.sub(r"^patch_embeds\.(\d)\.", r"stages.\1.downsample.", key).replace(
            "downsample.proj", "downsample.conv"
        )
        key = re.sub(r"^main_blocks\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
        if named:
            key = re.sub(r"^(stages\.\d\.blocks\.\d+)\.0\.", r"\1.spatial_block.", key)
            key = re.sub(r"^(stages\.\d\.blocks\.\d+)\.1\.", r"\1.channel_block.", key)
        key = key.replace(".cpe.0.", ".cpe1.").replace(".cpe.1.", ".cpe2.")
        out[re.sub(r"^norms\.", "head.norm.", re.sub(r"^head\.", "head.fc.", key))] = value
    return out


def florence2(state):
    """A vision-language model around our state dict, less norm and head."""
    out = {"language_model.final_logits_bias": torch.zeros(1, 9), "image_projection": torch.zeros(3)}
    for key, value in official(state).items():
        if key.startswith(("norms.", "head.")):
            continue
        key = key.replace("patch_embeds.", "convs.").replace("main_blocks.", "blocks.")
        kind = "channel" if re.match(r"blocks\.\d\.\d+\.1\.", key) else "window"
        key = re.sub(r"^blocks\.(\d)\.(\d+)\.0\.", r"blocks.\1.\2.spatial_block.", key)
        key = re.sub(r"^blocks\.(\d)\.(\d+)\.1\.", r"blocks.\1.\2.channel_block.", key)
        key = key.replace(".cpe.0.proj.", ".conv1.fn.dw.").replace(".cpe.1.proj.", ".conv2.fn.dw.")
        key = key.replace(".norm1.", f".{kind}_attn.norm.").replace(".attn.", f".{kind}_attn.fn.")
        key = key.replace(".norm2.", ".ffn.norm.").replace(".mlp.", ".ffn.fn.net.")
        out[f"vision_tower.{key}"] = value
    return out


def check_conversion(state, model):
    converted, own = convert_state_dict(state, model), model.state_dict()
    assert converted.keys() == own.keys() and all(torch.equal(own[k], v) for k, v in converted.items())


@pytest.mark.parametrize(
    "layout", [official, lambda s: timm(s, True), lambda s: timm(s, False), lambda s: {"model": official(s)}]
)
def test_layouts(layout):
    model = davit()
    check_conversion(layout(model.state_dict()), model)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_image_towers_lack_norm_and_head(num_classes):
    model = davit(channel_attn_v2=True, num_classes=num_classes)
    state = florence2(model.state_dict())
    assert any(".window_attn.fn.qkv." in k for k in state) and any(
        ".channel_block.channel_attn.norm." in k for k in state
    )
    check_conversion(state, model)
    with pytest.raises(VisionattnError, match=r"does not fit test_davit: missing 2 keys \(norm.bias, norm.weight\)"):
        convert_state_dict(state, davit(num_classes=0))
    other = visionattn.create_model("test_van")
    with pytest.raises(VisionattnError, match=r"does not fit test_davit: missing \d+ keys .*; left over \d+ keys"):
        convert_state_dict(other.state_dict(), model)


def test_image_towers_have_no_classes():
    model = on_meta("davit_base_fl")
    assert model.num_classes == 0 and model.pretrained_cfg["input_size"] == (3, 768, 768)
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1024)
    assert {b.mixer.version for s in model.stages for b in s.blocks[1::2]} == {2}
    assert {s.downsample.proj.kernel_size for s in model.stages[1:]} == {(3, 3)}
