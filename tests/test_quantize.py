"""int8 weights for inference on CPUs."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import visionattn
from visionattn.errors import VisionattnError
from visionattn.export import export
from visionattn.layers.int8 import Int8Linear
from visionattn.layers.pointwise import Mlp, Pointwise, Pointwise2d

TESTS = visionattn.list_models("test_*")


def made(name: str) -> nn.Module:
    """A model that is no longer as it was initialised, where many branches add nothing."""
    model = visionattn.create_model(name).eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 1.0 if key.endswith(("weight", "gamma")) else 0.0, 0.2)
    return model


def int8_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.flatten(1), b.flatten(1)).min().item()


@pytest.mark.parametrize("name", TESTS)
def test_output_stays_close(name):
    model, x = made(name), torch.randn(2, 3, 64, 64)
    quantized = copy.deepcopy(model)
    assert visionattn.quantize(quantized, 16) is quantized
    assert int8_layers(quantized) and type(quantized.get_classifier()) is type(model.get_classifier())
    with torch.no_grad():
        expected, out = model(x), quantized(x)
        assert torch.equal(copy.deepcopy(quantized).fuse()(x), out)
    assert cosine(out, expected) > 0.99 and not torch.equal(out, expected)
    assert cosine(quantized(x), out) > 0.999  # other parts round differently then
    with torch.inference_mode():
        assert torch.equal(quantized(x), out)


def test_what_is_quantized_is_told_as_that(tmp_path):
    with pytest.raises(VisionattnError, match="no linear map of VAN has 1000 channels in and out"):
        visionattn.quantize(made("test_van"), 1000)
    model = visionattn.quantize(made("test_van"), 16)
    with pytest.raises(VisionattnError, match="is quantized already"):
        visionattn.quantize(model, 16)
    with pytest.raises(VisionattnError, match="export the model itself, with int8"):
        export(model, tmp_path / "model.onnx", "onnx")


@pytest.mark.parametrize("name", ["test_van", "test_convit"])
def test_a_quantized_model_is_a_model(name):
    model, x = visionattn.quantize(made(name), 16), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        other = visionattn.quantize(made(name), 16)
        other(x)  # what it keeps is of other weights
        other.load_state_dict(load(save(model.state_dict())))
        assert torch.equal(other(x), expected)
        exported = torch.export.export(model, (x,)).module()
        assert cosine(exported(x), expected) > 0.99
        assert cosine(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), expected) > 0.98
        with torch.autocast("cpu", torch.bfloat16):
            assert cosine(model(x).float(), expected) > 0.98


@pytest.mark.parametrize("kind", [nn.Linear, Pointwise, Pointwise2d])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer(kind, bias):
    linear = kind(40, 24, bias=bias)
    layer = Int8Linear(linear, kind is Pointwise2d).requires_grad_(False)
    assert (layer.weight - linear.weight).abs().max() <= layer.scale.max() / 2 * 1.001
    x = torch.randn(2, 40, 5, 7) if kind is Pointwise2d else torch.randn(2, 5, 40)
    with torch.no_grad():
        for scale, shift in ((1, 0), (1e-6, 0), (1e4, 3e4), (1, -8)):  # and one sign alone
            expected = linear(x * scale + shift)
            assert (layer(x * scale + shift) - expected).abs().max() < 0.02 * expected.abs().max()
        zero = linear(x * 0)
        torch.testing.assert_close(layer(x * 1e-38), zero)
        assert layer(x[:0]).shape == linear(x[:0]).shape
        x.view(-1)[3] = torch.nan
        assert layer(x).isnan().sum() == 24
        assert layer.double()(x.double()).dtype == torch.float64


def test_gradients_of_inputs():
    layer, x = Int8Linear(Pointwise(40, 24)), torch.randn(3, 40, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(3, -1))


def test_pieces(monkeypatch):
    mlp, x = Mlp(64, 128), torch.randn(50, 64)
    model = visionattn.quantize(nn.Sequential(mlp).eval(), 64)
    with torch.no_grad():
        whole = model(x)
        monkeypatch.setattr("visionattn.layers.pointwise.CHUNK", 4096)
        monkeypatch.setattr("visionattn.layers.int8.SCRATCH", 100)
        assert cosine(model(x), whole) > 0.999


def test_what_cannot_be_quantized():
    model = visionattn.create_model("test_van")
    for given, told in (
        (model.train(), "expected a model in eval mode to quantize"),
        (copy.deepcopy(model).eval().bfloat16(), "got torch.bfloat16 on cpu"),
        (copy.deepcopy(model).eval().to("meta"), "got torch.float32 on meta"),
        (copy.deepcopy(model).eval(), "no linear map of .* has 1000 channels"),
    ):
        before = int8_layers(given)
        with pytest.raises(VisionattnError, match=told):
            visionattn.quantize(given, 1000)
        assert int8_layers(given) == before
