"""The attention blocks alone: exact at borders, for any size, and differentiable."""

import copy
import inspect
import math
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from visionattn import layers
from visionattn.layers import (
    CausalSelfAttention,
    GatedPositionalSelfAttention,
    LargeKernelAttention,
    NeighborhoodAttention2d,
    SelfAttention,
    TokenRelPosAttention,
    VanAttention,
    local_attention,
    size_constant,
)
from visionattn.layers.cache import ParameterCache
from visionattn.layers.heads import parted_heads
from visionattn.macs import counted_flops


def keys_of(query, length, kernel, dilation, stride):
    """[(key position, index into the bias table)] of one query on one axis, by the definition."""
    group, position = query % dilation, query // dilation
    n = len(range(group, length, dilation))
    lead = min(position // stride * stride + stride // 2, n - 1)
    start = min(max(lead - kernel // 2, 0), n - kernel)
    return [(t * dilation + group, t - position + kernel - 1) for t in range(start, start + kernel)]


def neighborhood_attention(layer, x):
    """One query at a time."""
    B, H, W, C = x.shape
    axes = list(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True))
    Hp, Wp = (max(n, k * d) for n, (k, d, _) in zip((H, W), axes, strict=True))
    padded = F.pad(x, (0, 0, 0, Wp - W, 0, Hp - H))
    q, k, v = layer.qkv(padded).view(B, Hp, Wp, 3, layer.num_heads, -1).unbind(3)
    out = torch.empty_like(x)
    for i in range(H):
        for j in range(W):
            pairs = [(a, b) for a in keys_of(i, Hp, *axes[0]) for b in keys_of(j, Wp, *axes[1])]
            ys, xs = [a[0] for a, _ in pairs], [b[0] for _, b in pairs]
            logits = torch.einsum("bhd,bnhd->bhn", q[:, i, j] * layer.scale, k[:, ys, xs])
            if layer.rpb is not None:
                logits = logits + layer.rpb[:, [a[1] for a, _ in pairs], [b[1] for _, b in pairs]]
            out[:, i, j] = torch.einsum("bhn,bnhd->bhd", logits.softmax(-1), v[:, ys, xs]).flatten(1)
    return layer.proj(out)


def randomised(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


@pytest.mark.parametrize(
    "size, kernel, dilation, stride, options",
    [
        ((14, 14), 7, 1, 1, {}),
        ((16, 17), 7, 1, 1, {}),  # cut into tiles, the last one partial
        ((23, 9), 3, 2, 1, {}),  # groups of unequal length
        ((21, 22), 3, 2, 1, {"rel_pos_bias": False}),
        ((5, 30), 7, 1, 1, {}),  # padded along one axis
        ((3, 4), 3, 4, 1, {"qkv_bias": False}),  # padded along both, groups without queries
        ((1, 1), 3, 2, 1, {}),
        ((20, 13), (7, 4), (1, 3), 1, {}),  # even kernel, axes of their own
        ((19, 20), 6, 1, 3, {}),
        ((21, 16), 5, 2, (5, 2), {"rel_pos_bias": False}),  # stride = kernel: windows
        ((17, 17), 2, 1, 1, {"qk_scale": 0.3}),
        ((6, 3), 3, 1, 1, {"num_heads": 8}),  # more heads than tiles
    ],
)
def test_neighborhood_attention_is_its_definition(size, kernel, dilation, stride, options):
    options = {"num_heads": 2, "kernel_size": kernel, "dilation": dilation, "stride": stride} | options
    layer = randomised(NeighborhoodAttention2d(8, **options))
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, *layer.parameters()]
    out, expected = layer(x), neighborhood_attention(layer, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_gradients_of_heads_that_lie_side_by_side_are_not_copied(order):
    x, whole = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 3, 2, 4)
    sides = [whole[:, :, i].transpose(1, 2) for i in order]
    (grad,) = torch.autograd.grad(parted_heads(x, 2), x, sides)
    torch.testing.assert_close(grad, whole[:, :, list(order)].flatten(2), rtol=0, atol=0)
    assert (grad.data_ptr() == whole.data_ptr()) == (order == (0, 1, 2))


def test_gradients_of_heads_that_are_differentiated_or_negated():
    x, whole = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 3, 2, 4, requires_grad=True)
    heads = parted_heads(x, 2)
    (grad,) = torch.autograd.grad(heads, x, [side.transpose(1, 2) for side in whole.unbind(2)], create_graph=True)
    (found,) = torch.autograd.grad(grad.square().sum(), whole)
    torch.testing.assert_close(found, 2 * whole, rtol=0, atol=0)
    sides = [torch._neg_view(side.transpose(1, 2)) for side in whole.detach().unbind(2)]
    (grad,) = torch.autograd.grad(parted_heads(x, 2), x, sides)
    torch.testing.assert_close(grad, -whole.flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_maps_without_positions(size):
    for layer in (NeighborhoodAttention2d(8, 2), layers.WindowAttention2d(8, 2), layers.ChannelAttention(8, 2)):
        assert layer(torch.randn(2, *size, 8)).shape == (2, *size, 8)
    assert layers.HaloAttention2d(8, num_heads=2)(torch.randn(2, 8, *size)).shape == (2, 8, *size)
    assert layers.CausalSelfAttention(8, 2)(torch.randn(2, 0, 8)).shape == (2, 0, 8)


def test_stride_of_the_kernel_is_window_attention():
    layer = randomised(NeighborhoodAttention2d(8, 2, 4, stride=4, rel_pos_bias=False))
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    windows = x.view(2, 3, 4, 2, 4, 8).transpose(2, 3).reshape(12, 16, 8)
    q, k, v = layer.qkv(windows).view(12, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    expected = out.view(2, 3, 2, 4, 4, 8).transpose(2, 3).reshape(2, 12, 8, 8)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_neighborhood_attention_never_gathers_per_query():
    """Keys copied per query stay near (1 + (K - 1) / T)^2, far from K^2; bias memory does not grow with the map."""
    for size, groups in ((56, 1), (112, 9), (224, 9)):
        plan = local_attention.local_plan(NeighborhoodAttention2d.axes, (size, size), ((7,), (7,)), torch.device("cpu"))
        assert sum(group.keys.numel() for group in plan.groups) / size**2 < 4
        assert len(plan.groups) == groups
        assert sum(group.pairs.numel() for group in plan.groups) <= local_attention.MAX_PAIRS


@pytest.mark.parametrize("rel_pos_bias", [True, False])
def test_large_maps_share_biases(rel_pos_bias, monkeypatch):
    layer = randomised(NeighborhoodAttention2d(8, 2, 3, 2, rel_pos_bias=rel_pos_bias))
    x = torch.randn(2, 40, 37, 8, dtype=torch.float64)
    expected = layer(x)
    monkeypatch.setattr(local_attention, "MAX_PAIRS", 0)
    monkeypatch.setattr(size_constant, "_kept", OrderedDict())
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    ((plan, _),) = size_constant._kept.values()
    assert len(plan.groups) > 9


def test_attention_dropout():
    layer = NeighborhoodAttention2d(8, 2, 3, attn_drop=0.5)
    x = torch.randn(1, 9, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 3), "dim 10 is not divisible by num_heads 3"),
        ((8, 2, 1), "got kernel_size 1"),
        ((8, 2, 3, -1), "dilation -1"),
        ((8, 2, 3, 0), "dilation 0"),
        ((8, 2, 3, 1, 4), "stride 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2d(*arguments)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("FlowAttention", {"num_heads": 2, "eps": -1.0}, "eps >= 0, got -1.0"),
        ("LinearLogNormalAttention", {"eps": math.nan}, "eps >= 0, got nan"),
        ("ReversedAttention", {"num_heads": 2, "temperature": 0}, "temperature > 0, got 0"),
        ("ReversedAttention", {"num_heads": 2, "controller_ratio": 0.01}, r"dim \* controller_ratio >= 1, got 0"),
        ("ActivatorGate", {"hidden_dim": 0}, "an integer hidden_dim >= 1, got 0"),
        ("ActivatorBlock", {"hidden_dim": 8, "mlp_dim": 0}, "an integer hidden_dim >= 1, got 0"),
        ("MixerGate", {"num_tokens": 4, "token_dim": 0, "channel_dim": 8}, "an integer token_dim >= 1, got 0"),
        ("ReducedAttention", {"kind": "super", "num_tokens": 0}, "an integer num_tokens >= 1, got 0"),
        ("SelectiveSelfAttention", {"on": ""}, "on to be some of the letters q, k and v, got ''"),
        ("SelectiveSelfAttention", {"on": None}, "some of the letters q, k and v, got None"),
        ("SelectiveSelfAttention", {"token": "mlp", "hidden_ratio": 0.01}, r"dim \* hidden_ratio >= 1, got 0"),
        ("SelfAttention", {"gate_rescale": True}, "gate_opening and gate_rescale are of a gate: expected one of const"),
        ("SelfAttention", {"clip": 0.5}, r"clip \(gamma, zeta\) with gamma <= 0 and zeta >= 1, got 0.5"),
        ("SelfAttention", {"num_heads": "a"}, "an integer num_heads >= 1, got 'a'"),
        ("SelfAttention", {"num_heads": -4}, "an integer num_heads >= 1, got -4"),
        ("SelfAttention", {"num_heads": 2.0}, "an integer num_heads >= 1, got 2.0"),
        ("SelfAttention", {"num_heads": True}, "an integer num_heads >= 1, got True"),
        ("SubspaceAttention", {"num_subspaces": 0}, "an integer num_subspaces >= 1, got 0"),
        ("KeyDrivenGQA", {"num_kv_heads": 0}, "an integer num_kv_heads >= 1, got 0"),
        ("HaloAttention2d", {"num_heads": 0}, "an integer num_heads >= 1, got 0"),
        ("ContMix2d", {"num_heads": -2}, "an integer num_heads >= 1, got -2"),
        ("PartialConv2d", {"n_div": 0}, "an integer n_div >= 1, got 0"),
        ("PartialSelfAttention", {"num_heads": 0}, "an integer num_heads >= 1, got 0"),
        ("LargeKernelAttention", {"kernel_size": -1}, "an integer kernel_size >= 1, got -1"),
        ("LargeKernelAttention", {"dilation": 0}, "an integer dilation >= 1, got 0"),
        ("AttentiveConv2d", {"kernel_size": -1}, "an integer kernel_size >= 1, got -1"),
        ("AgentAttention", {"map_size": 0}, "an integer map_size >= 1, got 0"),
        ("SparseAttention", {"num_tokens": 17, "reduce_n_factor": 0}, "an integer reduce_n_factor >= 1, got 0"),
        ("SparseAttention", {"num_tokens": 17, "attn_keep_rate": 2.0}, "attn_keep_rate between 0 and 1, got 2.0"),
    ],
)
def test_nonsense_is_refused_at_once(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(layers, name)(16, **arguments)


WITHOUT_DEFAULT = {
    "MixtureOfHeadAttention": {"shared": 1, "top_k": 1},
    "HybridScaleAttention": {"sr_ratio": 1},
    "SelfGuidedAttention": {"sections": ((1.0, 1),)},
}


@pytest.mark.parametrize("layer", [each for each in vars(layers).values() if inspect.isclass(each)])
def test_dropout_rates_are_rates(layer):
    if "attn_drop" in inspect.signature(layer).parameters:
        with pytest.raises(ValueError, match="attn_drop between 0 and 1, got 2.0"):
            layer(16, num_heads=2, **WITHOUT_DEFAULT.get(layer.__name__, {}), attn_drop=2.0)


def test_large_kernel_attention():
    layer = randomised(LargeKernelAttention(6))
    x = torch.randn(2, 6, 13, 20, dtype=torch.float64)
    y = F.conv2d(x, layer.depthwise.weight, layer.depthwise.bias, padding=2, groups=6)
    y = F.conv2d(y, layer.dilated.weight, layer.dilated.bias, padding=9, dilation=3, groups=6)
    y = F.conv2d(y, layer.pointwise.weight[:, :, None, None], layer.pointwise.bias)
    torch.testing.assert_close(layer(x), x * y, rtol=0, atol=1e-12)
    unit = VanAttention(6).double()
    bare = copy.deepcopy(unit)
    bare.shortcut = False
    torch.testing.assert_close(unit(x) - bare(x), x)
    with pytest.raises(ValueError, match="an odd kernel_size, got 4"):
        LargeKernelAttention(6, kernel_size=4)


def gated_attention(layer, x, grid):
    """All pairs, as the paper writes it."""
    (B, N, _), heads = x.shape, layer.num_heads
    q, k = layer.qk(x).view(B, N, 2, heads, -1).permute(2, 0, 3, 1, 4)
    v = layer.v(x).view(B, N, heads, -1).transpose(1, 2)
    row, col = torch.arange(N) // grid[1], torch.arange(N) % grid[1]
    dx, dy = (p[None, :] - p[:, None] for p in (col, row))
    feature = torch.stack([dx, dy, dx**2 + dy**2], -1).to(x.dtype)
    content = (q @ k.transpose(-2, -1) * layer.scale).softmax(-1)
    position = layer.pos_proj(feature).permute(2, 0, 1).softmax(-1)
    gate = layer.gating_param.sigmoid()[:, None, None]
    attention = (1 - gate) * content + gate * position
    attention = attention / attention.sum(-1, keepdim=True)
    return layer.proj((attention @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 5)])
def test_gated_positional_attention_is_its_definition(grid):
    layer = randomised(GatedPositionalSelfAttention(12, 3, qkv_bias=True))
    x = torch.randn(2, math.prod(grid), 12, dtype=torch.float64)
    expected = gated_attention(layer, x, grid)
    torch.testing.assert_close(layer(x, grid), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, grid), expected, rtol=0, atol=1e-12)
    if grid[0] == grid[1]:
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    else:
        with pytest.raises(ValueError, match="expected grid height x width to be the"):
            layer(x)


def test_gated_positional_attention_starts_as_a_convolution():
    layer = GatedPositionalSelfAttention(36, 9, locality_strength=50)
    assert torch.equal(layer.v.weight, torch.eye(36)) and (layer.gating_param == 1).all()
    rows, cols = (t.detach() for t in layer._position_attention(8, 8))
    gate = torch.tensor(1.0).sigmoid()
    for head in range(9):
        dy, dx = head % 3 - 1, head // 3 - 1
        assert rows[head, 4, 4 + dy] == pytest.approx(gate.item()) and cols[head, 4, 4 + dx] == pytest.approx(1)
    ten = GatedPositionalSelfAttention(40, 10, locality_strength=2)  # the tenth head has no tap
    assert ten.pos_proj.weight[9].abs().max() < 0.2 and ten.pos_proj.weight[8, 2] == -2


@pytest.mark.parametrize(
    "layer, shape",
    [
        (NeighborhoodAttention2d(4, 2, 3, 2), (1, 7, 5, 4)),
        (NeighborhoodAttention2d(4, 2, 3), (1, 7, 8, 4)),
        (LargeKernelAttention(3), (1, 3, 5, 6)),
        (VanAttention(3), (1, 3, 5, 6)),
        (GatedPositionalSelfAttention(4, 2), (1, 9, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_gradients(layer, shape):
    layer = randomised(copy.deepcopy(layer))
    names = dict(layer.named_parameters())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())))


@pytest.mark.parametrize("size", [(9, 12), (9, 13)])
def test_gradients_of_several_chunks_of_tiles(size, monkeypatch):
    """Of one plan, which are cut elsewhere where channels are more."""
    monkeypatch.setattr("visionattn.layers.tile_products.CHUNK", 2**13)
    for dim in (4, 6, 12, 4):
        layer = randomised(NeighborhoodAttention2d(dim, 2, 3))
        x = torch.randn(2, *size, dim, dtype=torch.float64, requires_grad=True)
        assert gradcheck(layer, x, fast_mode=True)


def test_cached_biases_follow_their_parameters():
    layer = NeighborhoodAttention2d(8, 2, 3).eval()
    x = torch.randn(1, 9, 9, 8)

    def check():
        with torch.no_grad():
            cached = layer(x)
        torch.testing.assert_close(cached, layer(x))  # with gradients on nothing is cached

    check()
    with torch.no_grad():
        layer.rpb.add_(1 - torch.rand_like(layer.rpb))
    check()
    layer.rpb.data.normal_()
    check()
    layer.load_state_dict(NeighborhoodAttention2d(8, 2, 3).state_dict())
    check()
    layer.load_state_dict(NeighborhoodAttention2d(8, 2, 3).state_dict(), assign=True)
    check()
    with torch.inference_mode():
        layer(x)
    check()
    layer.double()
    x = x.double()
    check()
    assert set(layer.state_dict()) == {"rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert pickle.loads(pickle.dumps(layer))._bias_cache is not layer._bias_cache


def test_cache_keeps_one_result():
    cache, calls, p = ParameterCache(), [], torch.zeros(2)
    build = lambda: calls.append(1) or len(calls)  # noqa: E731
    assert cache("a", [p], build) == 1 and cache("a", [p], build) == 2  # gradients are on
    with torch.no_grad():
        assert [cache(key, [p], build) for key in "aabba"] == [3, 3, 4, 4, 5]
        p.add_(1)
        assert cache("a", [p], build) == 6


H, W, C = 14, 28, 16


@pytest.mark.parametrize(
    "layer, shape, macs",
    [
        # Where groups are as large as the window no masked pair is computed.
        (NeighborhoodAttention2d(C, 2, (7, 14), 2), (1, H, W, C), 4 * H * W * C**2 + 2 * H * W * C * 7 * 14),
        (LargeKernelAttention(C), (1, C, H, W), H * W * (C * 25 + C * 49 + C**2)),
        (VanAttention(C), (1, C, H, W), H * W * (C * 25 + C * 49 + C**2) + 2 * H * W * C**2),
        (
            GatedPositionalSelfAttention(C, 2),
            (1, H * H, C),
            4 * H**2 * C**2 + 2 * H**4 * C + H**2 * (H + H) * C,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_costs(layer, shape, macs):
    """The cost lines of the docstrings, less what FLOP counters do not count (the elementwise gate of N C)."""
    with counted_flops() as counter, torch.no_grad():
        layer(torch.randn(shape))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_global_attention_with_relative_bias(grid):
    layer = randomised(TokenRelPosAttention(8, 2, 4))
    x = torch.randn(2, math.prod(grid), 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    row, col = torch.arange(math.prod(grid)) // grid[1], torch.arange(math.prod(grid)) % grid[1]
    table = layer.rpb
    if grid != (4, 4):
        table = F.interpolate(table[None], (2 * grid[0] - 1, 2 * grid[1] - 1), mode="bicubic", align_corners=False)[0]
    offset = row[None, :] - row[:, None] + grid[0] - 1, col[None, :] - col[:, None] + grid[1] - 1  # key - query
    attention = (q @ k.transpose(-2, -1) * layer.scale + table[:, offset[0], offset[1]]).softmax(-1)
    expected = layer.proj((attention @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid), expected, rtol=0, atol=1e-12)


def test_self_attention():
    layer = randomised(SelfAttention(12, 3, qkv_bias=True))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = layer.proj(((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    with counted_flops() as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * (4 * 7 * 12**2 + 2 * 7**2 * 12)
    with pytest.raises(ValueError, match="dim 12 is not divisible by num_heads 5"):
        SelfAttention(12, 5)


@pytest.mark.parametrize("layer", [SelfAttention(8, 2), CausalSelfAttention(8, 2)])
def test_tokens_are_not_taken_for_maps(layer):
    with pytest.raises(RuntimeError, match="unflatten"):
        layer(torch.randn(1, 3, 5, 8))
    assert [*inspect.signature(type(layer)).parameters][:3] == ["dim", "num_heads", "qkv_bias"]
