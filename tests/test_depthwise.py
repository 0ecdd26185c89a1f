"""What is computed past autograd's own convolutions, against them."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck, gradgradcheck
from torchvision.ops import deform_conv2d

from visionattn.layers import depthwise, depthwise_mlp
from visionattn.layers.deformable import deformed_patches
from visionattn.layers.depthwise_mlp import DepthwiseMlp
from visionattn.layers.dilation import spread


def image(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    torch.testing.assert_close(grad(ours, inputs, g), grad(theirs, inputs, g))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 7), (14, 13), (20, 31)])
@pytest.mark.parametrize("dilation", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
def test_convolution(kernel, dilation, size, monkeypatch):
    monkeypatch.setattr(depthwise, "CHUNK", 2000)  # several chunks
    conv = depthwise.depthwise(4, kernel, dilation).double()
    x = image(3, 4, *size)
    theirs = F.conv2d(x, conv.weight, conv.bias, padding=kernel // 2 * dilation, dilation=dilation, groups=4)
    assert_same(conv(x), theirs, [x, *conv.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(conv(x), theirs)


@pytest.mark.parametrize("dilation", [1, 2])
def test_mlp(dilation, monkeypatch):
    monkeypatch.setattr(depthwise_mlp, "CHUNK", 2000)
    mlp = DepthwiseMlp(3, 5).double()
    spread(mlp, dilation)
    x = image(3, 3, 5, 6)
    theirs = mlp.fc2(mlp.act(mlp.dwconv(mlp.fc1(x))))
    assert_same(mlp(x), theirs, [x, *mlp.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), theirs)
    seen = []
    mlp.act.register_forward_hook(lambda *args: seen.append(args))
    mlp(x)
    assert seen
    for parameter in mlp.fc1.parameters():
        parameter.requires_grad_(False)
    mlp(x.detach()).sum().backward()
    assert mlp.fc1.weight.grad is None and mlp.fc2.weight.grad is not None


@pytest.mark.parametrize("layer", [depthwise.depthwise(2, 5, 2), DepthwiseMlp(2, 3)], ids=["convolution", "mlp"])
def test_gradients_of_gradients(layer):
    x = image(1, 2, 4, 5)
    assert gradcheck(layer.double(), x) and gradgradcheck(layer, x)


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (6, 4)])
def test_deformed_patches(size):
    H, W = size
    x, offset = image(3, 4, H, W), image(3, 8, H // 2, W // 2)
    weight = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    ours = F.linear(deformed_patches(x.permute(0, 2, 3, 1), 3 * offset, 2), weight.permute(0, 2, 3, 1).flatten(1))
    assert_same(ours.permute(0, 3, 1, 2), deform_conv2d(x, 3 * offset, weight, stride=2), [x, offset])
