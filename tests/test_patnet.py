"""PATNet: its layers against their definitions, options, layouts and what the goldens cannot see."""

import math

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import PartialChannelAttention, PartialConv2d, PartialSelfAttention, PartialSpatialAttention
from visionattn.layers.partial_attention import distance_buckets
from visionattn.macs import counted_flops
from visionattn.weights import convert_state_dict

LAYERS = [
    PartialConv2d(8),
    PartialChannelAttention(8),
    PartialSpatialAttention(8),
    PartialSelfAttention(8, num_heads=2),
]


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def batch_norm(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


def convolved(layer, x):
    return F.conv2d(x, layer.conv.weight, padding=1)


def channel_attention(layer, x):
    c = x.shape[1] // 4
    first, rest = x[:, :c], x[:, c:]
    mean = rest.mean((2, 3))
    std = ((rest - mean[:, :, None, None]).square().sum((2, 3)) / (rest.shape[2] * rest.shape[3] - 1)).sqrt()
    weight = layer.gate.weight.view(*rest.shape[1:2], -1, 2)
    gate = batch_norm(layer.gate_norm, mean @ weight[:, :, 0].T + std @ weight[:, :, 1].T)
    gate = (gate / 6 + 0.5).clamp(0, 1)[:, :, None, None]
    return torch.cat([convolved(layer, first), batch_norm(layer.norm, rest * gate)], 1)


def spatial_attention(layer, x):
    first, last = x[:, : layer.widths[0]], x[:, layer.widths[0] :]
    gate = torch.einsum("oc,bchw->bohw", layer.gate.weight, first)
    first = batch_norm(layer.norm1, first * (gate / 6 + 0.5).clamp(0, 1))
    return torch.cat([first, torch.einsum("oc,bchw->bohw", layer.mix.weight, batch_norm(layer.norm2, last))], 1)


def self_attention(layer, x):
    c, (H, W) = x.shape[1] // 4, x.shape[2:]
    rest = F.layer_norm(x[:, c:].permute(0, 2, 3, 1), (x.shape[1] - c,), layer.norm.weight, layer.norm.bias, 1e-6)
    q, k, v = layer.qkv(rest.flatten(1, 2)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(layer.num_heads, H * W, H * W, dtype=x.dtype)
    for p in range(H * W):
        for p2 in range(H * W):
            d = round(math.hypot(p // W - p2 // W, p % W - p2 % W))
            bucket = d if d <= 20 else min(40, round(20 + 20 * math.log(d / 20) / math.log(8)))
            bias[:, p, p2] = layer.rpb[:, 40 + bucket]
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    out = layer.proj((attention @ v).transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (H, W))
    return torch.cat([convolved(layer, x[:, :c]), out], 1)


@pytest.mark.parametrize("size", [(7, 5), (1, 30), (2, 1)])
@pytest.mark.parametrize(
    "layer, definition",
    [
        (PartialChannelAttention(12), channel_attention),
        (PartialSpatialAttention(11), spatial_attention),
        (PartialSpatialAttention(8, partial=0.25, num_maps=6), spatial_attention),
        (PartialSelfAttention(16, num_heads=3), self_attention),
        (PartialSelfAttention(8, num_heads=2, qkv_bias=True), self_attention),
        (PartialConv2d(8), lambda layer, x: torch.cat([convolved(layer, x[:, :2]), x[:, 2:]], 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_are_their_definitions(layer, definition, size):
    layer = randomised(layer).eval()
    dim = sum(layer.widths)
    x = torch.randn(2, dim, *size, dtype=torch.float64)
    expected = definition(layer, x)
    close(layer(x), expected)
    with torch.no_grad():
        close(layer(x), expected)
        close(layer(x.to(memory_format=torch.channels_last)), expected)


# Published names of the layers' own tensors, and the first and last three values that the published code computes.
SPOTS = [
    (
        PartialChannelAttention(32),
        (2, 32, 7, 5),
        [-0.318404, -1.042151, 1.861549, 0.064665, -0.734698, -0.787965],
        {"conv.weight": "partial_conv3.weight", "gate.weight": "attn.cfc1.weight", "gate_norm.": "attn.bn."},
    ),
    (
        PartialSelfAttention(64),
        (2, 64, 6, 9),
        [1.025389, -0.282744, 0.887739, -0.324301, -0.393231, -0.274731],
        {"conv.": "partial_conv3.", "rpb": "attn.rpe_k.lookup_table_bias", "proj.": "attn.proj.", "qkv.": "attn.qkv."},
    ),
    (
        PartialSelfAttention(64),
        (2, 64, 2, 30),
        [-0.015207, -1.272756, -1.049337, 0.380879, -0.145992, 0.381052],
        {"conv.": "partial_conv3.", "rpb": "attn.rpe_k.lookup_table_bias", "proj.": "attn.proj.", "qkv.": "attn.qkv."},
    ),
    (
        PartialSpatialAttention(32),
        (2, 32, 7, 5),
        [0.186094, 0.038856, 0.373376, -1.088083, 0.017324, 0.054802],
        {"gate.": "conv_attn.", "mix.": "conv.", "norm1.": "norm."},
    ),
]


@pytest.mark.parametrize("layer, shape, values, names", SPOTS)
def test_published_values(layer, shape, values, names):
    state_dict = {}
    for key, tensor in layer.state_dict().items():
        name = next((key.replace(ours, theirs, 1) for ours, theirs in names.items() if key.startswith(ours)), key)
        if name == "attn.cfc1.weight":
            own = len(tensor), len(tensor), 1, 2
        else:
            own = (*tensor.shape, 1, 1) if name.startswith("conv") else tuple(tensor.shape)
        filled = golden.fill(name, own) if tensor.is_floating_point() else np.zeros(own, np.int64)
        state_dict[key] = torch.from_numpy(np.array(filled)).view(tensor.shape).to(tensor.dtype)
    layer.load_state_dict(state_dict)
    with torch.no_grad():
        out = layer.double().eval()(torch.from_numpy(golden.fixed_input(shape))).flatten()
    close(out[[0, 1, 2, -3, -2, -1]], torch.tensor(values, dtype=torch.float64), atol=2e-6)


def test_distance_buckets():
    buckets = distance_buckets(1, 2000, (20, 40, 160), torch.device("cpu"))[0] - 40
    assert buckets[:21].tolist() == list(range(21))
    for d, q in {21: 20, 22: 21, 23: 21, 24: 22, 32: 25, 40: 27, 48: 28, 59: 30, 160: 40, 1999: 40}.items():
        assert buckets[d] == q
    table = distance_buckets(5, 7, (20, 40, 160), torch.device("cpu"))
    assert table.shape == (35, 35) and (table == table.T).all() and (table.diag() == 40).all()
    assert table[0, 8] == 41  # the root of 2 rounds down


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("training", [False, True])
def test_gradients(layer, training):
    layer = randomised(layer).train(training)
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(layer, "attn_drop"):
        layer.attn_drop = 0.0
    names = dict(layer.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())), atol=1e-4)


def test_constant_channels_have_finite_gradients():
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = PartialChannelAttention(8).to(dtype), torch.zeros(2, 8, 4, 4, dtype=dtype, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


N, C = 35, 16
WIDTH = 3 * C // 4


@pytest.mark.parametrize(
    "layer, macs",
    [
        (PartialConv2d(C), 9 * N * 16),
        (PartialChannelAttention(C), 9 * N * 16 + 2 * WIDTH**2),
        (PartialSpatialAttention(C), N * 64 + N * 8),
        (PartialSelfAttention(C), 9 * N * 16 + 4 * N * WIDTH**2 + 2 * N**2 * WIDTH),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_costs(layer, macs):
    """The cost lines, less what FLOP counters do not count."""
    with counted_flops() as counter, torch.no_grad():
        layer.eval()(torch.randn(1, C, 7, 5))
    assert counter.get_total_flops() == 2 * macs


def test_bad_arguments():
    with pytest.raises(ValueError, match="got dim 3 and n_div 4"):
        PartialConv2d(3)
    with pytest.raises(ValueError, match="got dim 8 and n_div 1"):
        PartialChannelAttention(8, n_div=1)
    with pytest.raises(ValueError, match="the 12 attending channels of 16 are not divisible by num_heads 5"):
        PartialSelfAttention(16, num_heads=5)
    with pytest.raises(ValueError, match="num_maps 1 or 4, the number of gated channels, got 2"):
        PartialSpatialAttention(8, num_maps=2)
    with pytest.raises(ValueError, match="got dim 8 and partial 0.1"):
        PartialSpatialAttention(8, partial=0.1)
    with pytest.raises(VisionattnError, match="expected act_layer one of gelu, relu, got silu"):
        patnet(act_layer="silu")


def patnet(**kwargs):
    return visionattn.create_model("test_patnet", **kwargs)


def test_dropout_of_attention_is_as_published():
    layer = visionattn.create_model("patnet_t0").stages[3].blocks[0].mixer
    assert layer.attn_drop == layer.proj_drop.p == 0.1
    layer = patnet(attn_drop_rate=0.2, proj_drop_rate=0.3).stages[3].blocks[0].mixer
    assert layer.attn_drop == 0.2 and layer.proj_drop.p == 0.3


def test_norm_epsilons():
    model = patnet()
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)} == {1e-5}
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)} == {0.1}


def test_initialisation():
    torch.manual_seed(0)
    model = patnet(embed_dim=64, layer_scale_init_value=0.1)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.numel() > 1000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
    assert not model.stages[3].blocks[0].mixer.rpb.any() and (model.stages[0].blocks[0].ls2.gamma == 0.1).all()


def test_blocks():
    """One residual, and two in the last stage, whatever its mixer."""
    for options in ({}, {"use_channel_attn": False, "use_spatial_attn": False, "layer_scale_init_value": 0.5}):
        model = randomised(patnet(**options)).eval()
        for i, stage in enumerate(model.stages):
            block = stage.blocks[0]
            x = torch.randn(2, stage.dim, 6, 5, dtype=torch.float64)
            scale = block.ls2.gamma[:, None, None] if options else 1
            y = x + block.mixer(x) if i == 3 else block.mixer(x)
            close(block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), (y if i == 3 else x) + scale * block.mlp(y))
    assert not any(isinstance(m, PartialChannelAttention | PartialSelfAttention) for m in model.modules())
    assert isinstance(block.mixer, PartialConv2d)


def test_sizes():
    model = patnet().eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 233, 150), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(58, 37), (29, 18), (14, 9), (7, 4)]


def test_head():
    model = patnet(num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    hidden = F.gelu(features.mean((2, 3)) @ model.hidden.weight.T)
    close(model(x), model.head(hidden), atol=1e-5)
    assert model.num_features == 128 and model.head_hidden_size == 96
    model.reset_classifier(0)
    close(model(x), hidden, atol=1e-5)
    model.reset_classifier(3, reset_other=True)
    close(model(x), model.head(features.mean((2, 3))), atol=1e-5)
    assert model.head_hidden_size == 128
    assert patnet(num_classes=0)(x).shape == (2, 96)


def published(model):
    """State dict with the published names and shapes."""
    theirs = {
        "stem.": "patch_embed.", "hidden.": "avgpool_pre_head.1.", ".mixer.conv.": ".spatial_mixing.partial_conv3.",
        ".mixer.gate.": ".spatial_mixing.attn.cfc1.", ".mixer.gate_norm.": ".spatial_mixing.attn.bn.",
        ".mixer.rpb": ".spatial_mixing.attn.rpe_k.lookup_table_bias", ".mixer.norm.": ".spatial_mixing.norm.",
        ".mixer.": ".spatial_mixing.attn.", ".fc1.": ".0.", ".mlp.norm.": ".mlp.1.", ".fc2.": ".3.",
        ".spatial.gate.": ".4.conv_attn.", ".spatial.mix.": ".4.conv.", ".spatial.norm1.": ".4.norm.",
        ".spatial.norm2.": ".4.norm2.", ".ls2.gamma": ".layer_scale",
    }  # fmt: skip
    for i in (3, 2, 1, 0):  # the published numbers count the merging between stages too
        theirs[f"stages.{i}.blocks."] = f"stages.{2 * i}.blocks."
        theirs[f"stages.{i}.downsample.proj."] = f"stages.{2 * i - 1}.reduction."
        theirs[f"stages.{i}.downsample.norm."] = f"stages.{2 * i - 1}.norm."
        theirs[f"feature_norms.{i}."] = f"norm{2 * i}."
    out = {}
    for key, value in model.state_dict().items():
        name = key
        for a, b in theirs.items():
            name = name.replace(a, b)
        if name.endswith("cfc1.weight"):
            value = value.view(len(value), len(value), 1, 2)
        elif value.ndim == 2 and "spatial_mixing" not in name and not name.startswith("head."):
            value = value[:, :, None, None]
        out[name] = value
    return out


def test_a_backbone_for_dense_prediction():
    model = randomised(patnet(fork_feat=True)).eval()
    names = set(model.state_dict())
    assert not any(name.startswith(("head.", "hidden.")) for name in names)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    found = model.forward_intermediates(x, intermediates_only=True)
    norms, model.feature_norms = model.feature_norms, None
    for norm, ours, raw in zip(norms, found, model.forward_intermediates(x, intermediates_only=True), strict=True):
        close(ours, batch_norm(norm, raw))
    model.feature_norms = norms
    assert convert_state_dict(published(model), model).keys() == model.state_dict().keys()
    extractor = visionattn.create_model("test_patnet", fork_feat=True, features_only=True).eval()
    assert [m.shape[1] for m in extractor(torch.randn(1, 3, 32, 32))] == [16, 32, 64, 128]


def test_checkpoints_of_the_training_framework():
    model = patnet(layer_scale_init_value=0.1)
    own = model.state_dict()
    converted = convert_state_dict({"state_dict": {f"model.{k}": v for k, v in published(model).items()}}, model)
    assert converted.keys() == own.keys() and all(torch.equal(converted[k], v) for k, v in own.items())


def test_merging_removes_the_products_of_the_spatial_attention():
    model = patnet().eval()
    before = model.stages[0].blocks[0].mlp
    assert before.spatial.mix.weight.shape == (8, 8)
    block = model.fuse().stages[0].blocks[0]
    assert block.mlp.fc2.weight.shape == (17, 32) and not list(block.mlp.spatial.parameters())
    assert block.mixer.shift is None and block.mixer.scale.shape == (12,)
