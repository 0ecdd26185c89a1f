"""AttNet: attentive convolution against its definition, and what the goldens cannot see."""

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_half_precision
from timm.layers import LayerNorm2d
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import AttentiveConv2d, TokenAttentiveConv2d
from visionattn.layers.norm import ChannelNorm, ChannelRmsNorm
from visionattn.macs import counted_flops
from visionattn.models.attnet import GatedMlp
from visionattn.weights import convert_state_dict


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def attentive_conv(layer, x):
    """As published: project, then pool; one sample and channel at a time."""
    (B, C, H, W), K = x.shape, layer.kernel_size

    def project(linear, x):
        return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)

    p, L = project(layer.kernel_proj, x).flatten(2), H * W
    strips = [p[:, :, k * L // K**2 : -(-(k + 1) * L // K**2)].mean(2) for k in range(K**2)]
    taps = layer.act(torch.stack(strips, 2)) @ layer.kernel_gen.weight.T + layer.kernel_gen.bias
    values, out = project(layer.x_proj, x), torch.zeros_like(x)
    for b in range(B):
        for c in range(C):
            kernel = taps[b, c] - layer.difference_control[c].sigmoid() * taps[b, c].mean()
            out[b, c] = F.conv2d(values[b, c][None, None], kernel.view(1, 1, K, K), padding=K // 2)[0, 0]
    return project(layer.proj, out)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"act_layer": nn.SiLU}])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("size", [(7, 5), (2, 3), (1, 1), (9, 9)])
def test_attentive_convolution_is_its_definition(size, kernel_size, options, monkeypatch):
    layer = randomised(AttentiveConv2d(4, kernel_size, **options))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = attentive_conv(layer, x)
    close(layer(x), expected)
    close(layer(x.to(memory_format=torch.channels_last)), expected)
    tokens = TokenAttentiveConv2d(4, kernel_size, **options).double()
    tokens.load_state_dict(layer.state_dict())
    close(tokens(x.flatten(2).transpose(1, 2), size), expected.flatten(2).transpose(1, 2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the form for compilers
    close(layer(x), expected)


def published_values(layer, shape, *arguments):
    """Mean, deviation, first and last three values of the output in float64, with the goldens' weights and input."""
    wide = () if isinstance(layer, TokenAttentiveConv2d) else (1, 1)  # 1 x 1 convolutions or linear maps
    keys = [
        (
            k.replace("norm.", "norm_layer."),
            [*v.shape, *(wide if v.ndim == 2 and "kernel_gen" not in k else ())],
            "float64",
        )
        for k, v in layer.state_dict().items()
    ]
    state = golden.fill_state_dict(keys)
    own = layer.state_dict()
    layer.double().load_state_dict(
        {k: state[k.replace("norm.", "norm_layer.")].reshape(v.shape) for k, v in own.items()}
    )
    forward = getattr(layer.forward, "__wrapped__", type(layer).forward)  # of published maps, which are channels first
    with torch.no_grad():
        out = forward(layer, torch.from_numpy(golden.fixed_input(shape)), *arguments).numpy()
    return [out.mean(), out.std(ddof=1), *out.ravel()[:3], *out.ravel()[-3:]]


@pytest.mark.parametrize(
    "make, shape, grid, mean, std, first, last",
    [
        (lambda: AttentiveConv2d(16), (2, 16, 7, 5), (), 0.028985, 0.744480, (0.372465, 0.497970, -0.002413),
         (0.238765, 0.513905, 0.150546)),
        (lambda: AttentiveConv2d(16, 5), (2, 16, 7, 5), (), 0.002889, 1.742577, (-0.403799, 3.034175, -0.525631),
         (2.883809, -0.094861, 0.038011)),
        (lambda: TokenAttentiveConv2d(16, act_layer=lambda: nn.GELU("tanh")), (2, 36, 16), ((6, 6),), 0.009116,
         0.693866, (-0.082918, -0.311558, 0.147016), (0.275749, 0.483211, 0.245731)),
        (lambda: GatedMlp(16, 21, dconv=True, norm=True), (2, 16, 7, 5), (), 0.009625, 0.895653,
         (0.104018, -0.136520, 0.867404), (-0.067673, 0.908077, 0.858863)),
    ],
)  # fmt: skip
def test_published_layers(make, shape, grid, mean, std, first, last):
    found = published_values(make(), shape, *grid)
    np.testing.assert_allclose(found, [mean, std, *first, *last], rtol=0, atol=1.5e-6)


def test_gradients():
    layer = randomised(AttentiveConv2d(3))
    names = dict(layer.named_parameters())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_cost(kernel_size):
    N, C, K = 14 * 20, 24, kernel_size
    with counted_flops() as counter, torch.no_grad():
        AttentiveConv2d(C, K)(torch.randn(1, C, 14, 20))
    assert counter.get_total_flops() == 2 * (2 * N * C**2 + N * C * K**2 + K**2 * C**2 + K**4 * C)


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected an odd kernel_size, got 4"):
        AttentiveConv2d(8, 4)
    with pytest.raises(VisionattnError, match="got 'catavgmax'"):
        attnet(global_pool="catavgmax")
    with pytest.raises(VisionattnError, match="expected a model in eval mode to fuse"):
        attnet().train().fuse()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_keep_their_precision_under_autocast(dtype):
    layer, x = AttentiveConv2d(16), torch.randn(2, 16, 8, 8)
    expected = layer.kernels(x)
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer.kernels(x), expected)
    assert_half_precision(layer.eval(), x, dtype)


def attnet(**kwargs):
    return visionattn.create_model("test_attnet", **kwargs)


def alive(model):
    """`model` in eval mode, with no parameter or statistic at a value that hides it."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if value.ndim == 1 else nn.init.normal_(value, std=0.1)
            if name.endswith("gamma"):
                value.mul_(0.1)
    return model.eval()


def test_norms():
    model = attnet()
    assert {m.eps for m in model.modules() if isinstance(m, LayerNorm2d | ChannelRmsNorm)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, ChannelNorm | nn.BatchNorm2d)} == {1e-5}
    assert model.norm_after_pool and isinstance(model.norm, ChannelNorm)
    x, norm = torch.randn(2, 5, 4, 3, dtype=torch.float64) + 3, randomised(ChannelRmsNorm(5, eps=1e-6))
    close(norm(x), x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * norm.weight[:, None, None])


def test_channel_norm_takes_maps_and_pooled_features():
    x, norm = torch.randn(2, 5, 4, 3, dtype=torch.float64), randomised(ChannelNorm(5))
    close(norm(x), F.layer_norm(x.movedim(1, -1), (5,), norm.weight, norm.bias).movedim(-1, 1))
    close(norm(x[:, :, 0, 0]), F.layer_norm(x[:, :, 0, 0], (5,), norm.weight, norm.bias))


def test_initialisation():
    model = attnet()
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            assert (p == 1e-6).all()
        elif p.ndim == 1:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name


def test_options():
    model = attnet(use_layer_scale=False, glu_norm=(False,) * 4, glu_dconv=(True, False, True, False), conv_bias=False)
    names = set(model.state_dict())
    assert not any(".ls" in n or ".mlp.norm" in n or "x_proj.bias" in n for n in names)
    assert "stages.0.blocks.0.mlp.dwconv.weight" in names and "stages.1.blocks.0.mlp.dwconv.weight" not in names
    assert attnet(kernel_sizes=(5, 5, 3, 3)).stages[0].blocks[0].mixer.kernel_gen.weight.shape == (25, 25)
    assert {m.fc2.in_features for m in attnet(exp_rates=(2, 2, 2, 2)).modules() if isinstance(m, GatedMlp)} == {
        int(2 * 2 * dim / 3) for dim in (16, 32, 48, 64)
    }


@pytest.mark.parametrize("in_model", [False, True])
def test_layer_scales_of_the_checkpoint(in_model):
    """They need not be those of the variant."""
    source, model = alive(attnet(use_layer_scale=not in_model)), attnet(use_layer_scale=in_model).eval()
    model.load_state_dict(convert_state_dict(source.state_dict(), model))
    x = torch.randn(2, 3, 64, 48)
    close(model(x), source(x), atol=1e-4)


def test_published_figures_are_of_the_weights_that_were_not_averaged():
    model = attnet()
    state = model.state_dict()
    file = {"model_ema": {k: torch.zeros_like(v) for k, v in state.items()}, "epoch": 1, "model": state}
    converted = convert_state_dict(file, model)
    assert all(torch.equal(converted[k], v) for k, v in state.items())


def test_fusing_changes_nothing():
    model = alive(attnet())
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        assert model.fuse() is model
        close(model(x), expected, atol=1e-5 * max(1, expected.abs().max().item()))
        close(model.fuse()(x), expected, atol=1e-5 * max(1, expected.abs().max().item()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
