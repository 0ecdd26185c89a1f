"""HorNet: its layers against their definitions, options, checkpoints and what the goldens cannot see."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import GlobalLocalFilter, RecursiveGatedConv
from visionattn.macs import counted_flops
from visionattn.weights import convert_state_dict


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def layer_norm(x, norm):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def dft(n, inverse=False):
    """(n, n) matrix of the discrete Fourier transform."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.exp((2j if inverse else -2j) * torch.pi / n * k[:, None] * k)
    return matrix / n if inverse else matrix


def resized(weight, height, width):
    """Filter sampled at `height` x `width` points from corner to corner, by linear interpolation along each axis."""
    for axis, n in ((1, height), (2, width)):
        old = weight.shape[axis]
        at = torch.arange(n, dtype=weight.dtype) * ((old - 1) / max(n - 1, 1))
        low = at.floor().long().clamp(max=old - 1)
        part = (at - low).view([-1 if a == axis else 1 for a in range(4)])
        pair = weight.index_select(axis, low), weight.index_select(axis, (low + 1).clamp(max=old - 1))
        weight = pair[0] * (1 - part) + pair[1] * part
    return weight


def global_local_filter(layer, x):
    """With the transforms written out."""
    H, W = x.shape[-2:]
    x = layer_norm(x, layer.pre_norm)
    near, far = x.chunk(2, 1)
    near = F.conv2d(near, layer.dw.weight, padding=1, groups=near.shape[1])
    half = W // 2 + 1
    spectrum = (dft(H) @ far.to(torch.complex128) @ dft(W))[..., :half]
    spectrum = dft(H, inverse=True) @ (spectrum * torch.view_as_complex(resized(layer.complex_weight, H, half)))
    weight = torch.full((half,), 2.0, dtype=torch.float64)  # the other half of the spectrum is the conjugate
    weight[0] = 1
    if W % 2 == 0:
        weight[-1] = 1
    far = (spectrum * weight @ dft(W, inverse=True)[:half]).real
    out = torch.empty_like(x)
    out[:, 0::2], out[:, 1::2] = near, far
    return layer_norm(out, layer.post_norm)


def recursive_gated_conv(layer, x):
    def product(linear, x):
        return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)

    C, order = x.shape[1], len(layer.pws) + 1
    dims = [C // 2 ** (order - 1 - k) for k in range(order)]
    z = product(layer.proj_in, x)
    p, q = z[:, : dims[0]], z[:, dims[0] :]
    if isinstance(layer.filter, GlobalLocalFilter):
        w = global_local_filter(layer.filter, q)
    else:
        padding = layer.filter.weight.shape[-1] // 2
        w = F.conv2d(q, layer.filter.weight, layer.filter.bias, padding=padding, groups=sum(dims))
    w = layer.scale * w
    y = p * w[:, : dims[0]]
    for k, pw in enumerate(layer.pws):
        begin = sum(dims[: k + 1])
        y = product(pw, y) * w[:, begin : begin + dims[k + 1]]
    return product(layer.proj_out, y)


@pytest.mark.parametrize("size", [(6, 8), (6, 9), (5, 7), (11, 4), (1, 1), (3, 1), (1, 2)])
def test_global_local_filter_is_its_definition(size):
    layer = randomised(GlobalLocalFilter(6, 6, 5))
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), global_local_filter(layer, x)
    close(out, expected)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, atol=1e-10)
    with torch.no_grad():
        close(layer(x), expected)
        layer.complex_weight.mul_(2)
        close(layer(x), global_local_filter(layer, x))


@pytest.mark.parametrize("size", [(7, 6), (4, 9)])
def test_filter_is_a_circular_convolution(size):
    """Moving the map around its border moves what the filter makes of it."""
    layer = GlobalLocalFilter(4).double()
    nn.init.dirac_(layer.dw.weight, groups=2)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    close(layer(x.roll((2, 3), (2, 3))), layer(x).roll((2, 3), (2, 3)))


@pytest.mark.parametrize("filter", ["dw", "global_local"])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_recursive_gated_conv_is_its_definition(order, filter):
    layer = randomised(RecursiveGatedConv(16, order, scale=0.4, kernel_size=5, filter=filter, filter_size=(6, 5)))
    x = torch.randn(2, 16, 7, 10, dtype=torch.float64)
    expected = recursive_gated_conv(layer, x)
    close(layer(x) / expected.abs().max(), expected / expected.abs().max())
    close(layer(x.to(memory_format=torch.channels_last)), layer(x), atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize(
    "layer",
    [RecursiveGatedConv(4, 2, 0.5, 3), RecursiveGatedConv(4, 2, filter="global_local", filter_size=(3, 2))],
    ids=["dw", "global_local"],
)
def test_gradients(layer):
    layer = randomised(layer)
    names = dict(layer.named_parameters())
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())))


@pytest.mark.parametrize("filter", ["dw", "global_local"])
@pytest.mark.parametrize("order", [1, 3, 5])
def test_cost(order, filter):
    C, k, H, W = 32, 7, 12, 9
    layer, m = RecursiveGatedConv(C, order, filter=filter), 2 - 2 ** (1 - order)
    with counted_flops() as counter:
        layer(torch.randn(1, C, H, W))
    spatial = k**2 * m * C if filter == "dw" else 9 / 2 * m * C
    expected = H * W * (3 * C**2 + 2 / 3 * (1 - 4 ** (1 - order)) * C**2 + spatial)
    assert counter.get_total_flops() / 2 == pytest.approx(expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"order": 0}, "got order 0 and dim 12"),
        ({"order": 4}, "dim divisible by 2"),
        ({"order": 2, "kernel_size": 4}, "an odd kernel_size, got 4"),
        ({"order": 2, "filter": "gf"}, "'dw' or 'global_local', got 'gf'"),
        ({"order": 2, "dim": 4, "filter": "global_local", "filter_size": (0, 1)}, "at least 1 x 1, got 0 x 1"),
    ],
)
def test_bad_arguments_of_the_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecursiveGatedConv(**{"dim": 12} | arguments)
    with pytest.raises(ValueError, match="an even dim, got 7"):
        GlobalLocalFilter(7)


def test_bad_arguments_of_the_model():
    with pytest.raises(VisionattnError, match="of one length, got 4, 3, 4, 4"):
        visionattn.create_model("test_hornet", orders=(2, 3, 4))
    with pytest.raises(VisionattnError, match="in filter_hw for stage 0 with gflayer, got None"):
        visionattn.create_model("test_hornet", gflayer=(True,) * 4)


def test_norm_epsilons_and_drop_path():
    with torch.device("meta"):
        model = visionattn.create_model("hornet_tiny_gf", drop_path_rate=0.3)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates[0::2] == rates[1::2] == pytest.approx([0.3 * i / 24 for i in range(1, 25)])


def test_initialisation():
    model = visionattn.create_model("test_hornet", head_init_scale=0.5)
    mixer = model.stages[2].blocks[0].mixer
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            scale = 0.5 if module is model.head else 1
            assert module.weight.std().item() == pytest.approx(0.02 * scale, rel=0.25)
            assert module.bias is None or not module.bias.any()
    assert mixer.filter.complex_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.stages[0].blocks[0].ls1.gamma.unique().tolist() == pytest.approx([1e-6])
    uniform = visionattn.create_model("test_hornet", uniform_init=True)
    weight = uniform.stages[3].blocks[0].mixer.proj_in.weight
    assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(weight.shape)), rel=0.01)
    assert not any(
        "ls1" in name for name in visionattn.create_model("test_hornet", layer_scale_init_value=0).state_dict()
    )


def test_pooling_comes_before_the_norm():
    model = visionattn.create_model("test_hornet").eval()
    nn.init.normal_(model.norm.weight)
    x = torch.randn(2, 3, 96, 64)
    pooled = model.stages(model.stem(x)).mean((2, 3))
    close(model.forward_head(model.forward_features(x), pre_logits=True), model.norm(pooled), atol=1e-6)


def test_what_does_not_fill_a_patch_is_ignored():
    model = visionattn.create_model("test_hornet").eval()
    x = torch.randn(1, 3, 66, 91)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 22), (8, 11), (4, 5), (2, 2)]
    other = x.clone()
    other[..., 64:, :] = 7
    other[..., 88:] = 7
    assert torch.equal(model(other), model(x))


def test_filters_are_resized_when_loaded():
    small = visionattn.create_model("test_hornet", layer_scale_init_value=1).eval()
    large = visionattn.create_model("test_hornet", filter_hw=(None, None, (6, 4), (3, 2)), layer_scale_init_value=1)
    large.load_state_dict(convert_state_dict({"model": small.state_dict()}, large))
    x = torch.randn(1, 3, 96, 96)
    close(large.eval()(x), small(x), atol=1e-5)
    state = small.state_dict()
    assert all(v is state[k] for k, v in convert_state_dict(state, small).items())


def test_published_weights_are_not_the_averaged_ones():
    model = visionattn.create_model("test_hornet")
    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    assert convert_state_dict({"model_ema": state, "model": model.state_dict()}, model)["head.weight"].any()


def test_layer_decay_groups():
    with torch.device("meta"):
        model = visionattn.create_model("hornet_tiny_7x7")
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = {name: round(13 - math.log(scale[id(p)], 0.7)) for name, p in model.named_parameters()}
    for prefix, group in {
        "stem": 0, "stages.0.": 1, "stages.1.downsample": 2, "stages.1.blocks.2": 2, "stages.2.downsample": 3,
        "stages.2.blocks.1.": 3, "stages.2.blocks.2.": 4, "stages.2.blocks.15.": 10, "stages.2.blocks.17.": 11,
        "stages.3.": 12, "norm": 13, "head": 13,
    }.items():  # fmt: skip
        assert {depth for name, depth in found.items() if name.startswith(prefix)} == {group}, prefix
