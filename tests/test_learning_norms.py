"""What is computed past autograd and module by module is what the modules compute: see `layers.direct`."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from visionattn.layers import PartialChannelAttention, PartialSpatialAttention, RecursiveGatedConv
from visionattn.layers.conv_norm import ConvNorm
from visionattn.layers.gated_mlp import GatedMlp
from visionattn.layers.partial_attention import _var_mean
from visionattn.models.halonet import Bottleneck
from visionattn.models.patnet import PartialMlp


class FirstBottleneck(nn.Module):
    """A bottleneck on (B, C, H, W)."""

    def __init__(self, stride, act, **kwargs):
        super().__init__()
        mixer = nn.Conv2d(4, 4, 3, stride, 1, bias=False)
        shape = {"gate": None, "stride": stride, "linear_out": False, "drop_path": 0.0}
        self.block = Bottleneck(8, mixer=mixer, mixer_dim=4, hidden_dim=4, act_layer=act, **shape, **kwargs)

    def forward(self, x):
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


LAYERS = {
    "bottleneck": lambda: FirstBottleneck(1, nn.ReLU, dim=8, downsample=True),
    "bottleneck-projecting": lambda: FirstBottleneck(1, nn.SiLU, dim=16, downsample=True),
    "bottleneck-strided": lambda: FirstBottleneck(2, nn.ReLU, dim=12, downsample=True),
    "bottleneck-without-shortcut": lambda: FirstBottleneck(2, nn.ReLU, dim=12, downsample=False),
    "gated": lambda: GatedMlp(8, 5),
    "gated-without-norm": lambda: GatedMlp(8, 5, norm=False),
    "norm-relu-product": lambda: PartialMlp(8, 12, nn.ReLU, spatial=False),
    "norm-gelu-product": lambda: PartialMlp(8, 12, nn.GELU, spatial=False),
    "channel-attention": lambda: PartialChannelAttention(8),
    "spatial-attention": lambda: PartialSpatialAttention(8),
    "recursive-gates": lambda: RecursiveGatedConv(8, 3, 0.3),
    "convolution-norm": lambda: ConvNorm(8, 4, 3, 2),
}


def layer_and_map(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    for value in layer.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if value.ndim == 1 else nn.init.normal_(value, std=0.5)
    return layer, torch.randn(3, 8, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)


def everything(layer, x, training):
    layer.train(training)
    x = x.clone().requires_grad_(training)
    with torch.set_grad_enabled(training):
        out = layer(x)
    found = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *layer.parameters()]) if training else []
    return [out, *found, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_as_the_modules_compute(name, training, monkeypatch):
    monkeypatch.setattr("visionattn.layers.gated_mlp.CHUNK", 2 * 4 * 5 * 5 * 8)  # two samples
    monkeypatch.setattr("visionattn.layers.norm_act_product.WORTH", 0)
    monkeypatch.setattr("visionattn.layers.covariance_norm.POSITIONS", 1)
    layer, x = layer_and_map(name)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    direct = everything(layer, x, training)
    layer.load_state_dict(state)
    seen = []
    for module in layer.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    for a, b in zip(direct, everything(layer, x, training), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert set(seen) == {module for module in layer.modules() if not isinstance(module, nn.ModuleList)}


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("bottleneck")])
def test_single_precision(name, monkeypatch):
    monkeypatch.setattr("visionattn.layers.covariance_norm.POSITIONS", 1)
    layer, x = layer_and_map(name)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    exact = everything(layer, x, True)
    layer.load_state_dict(state)
    for a, b in zip(everything(layer.float(), x.float(), True), exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


# torch's hard sigmoid, which is in the others, has no second derivative.
@pytest.mark.parametrize("name", [name for name in LAYERS if not name.endswith("attention")])
def test_second_derivatives(name, monkeypatch):
    monkeypatch.setattr("visionattn.layers.covariance_norm.POSITIONS", 1)
    layer, x = layer_and_map(name)
    layer.train()
    x = x[:2, :, :2, :3].clone().requires_grad_()
    weights = [p for p in layer.parameters() if p.ndim == 1 or p.ndim == 2][:2]

    def call(x, *weights):
        return layer(x)

    assert gradcheck(call, (x, *weights), fast_mode=True)
    assert gradgradcheck(call, (x, *weights), fast_mode=True)


def test_second_derivatives_of_variances():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(_var_mean, x) and gradgradcheck(_var_mean, x)
