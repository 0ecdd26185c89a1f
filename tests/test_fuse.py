"""Merging batch norms for inference."""

import copy

import pytest
import torch
from numerics import assert_half_precision
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import PartialChannelAttention
from visionattn.layers.fuse import fuse_modules, scale_input
from visionattn.layers.pointwise import Pointwise2d

TESTS = visionattn.list_models("test_*")
SCALED = [
    ("test_van", {}),
    ("test_attnet", {"use_layer_scale": True}),
    ("test_dinat", {"layer_scale": 0.5}),
    ("test_focalnet", {"use_layerscale": True}),
    ("test_focalnet", {"use_layerscale": True, "use_postln": True}),
    ("test_hornet", {"layer_scale_init_value": 0.5}),
    ("test_nalaformer", {}),
    ("test_patnet", {"layer_scale_init_value": 0.5, "use_spatial_attn": False}),
]
CASES = [
    *((name, {}) for name in TESTS),
    ("test_van", {"layer_scale": None}),
    ("test_patnet", {"layer_scale_init_value": 0.5}),
    ("test_patnet", {"use_channel_attn": False, "patch_norm": False}),
    *(case for case in SCALED if case[1]),
]


def randomise(model):
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 1.0 if name.endswith(("weight", "gamma")) else 0.0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.2)
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.eval()


def batch_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, BatchNorm)]


@pytest.mark.parametrize("name, options", CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_output_stays(name, options):
    model = randomise(visionattn.create_model(name, **options))
    x = torch.randn(2, 3, 64, 97)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        fused = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            expected = fused(x.to(dtype))
            assert fused.fuse() is fused
            for _ in range(2):  # again changes nothing
                out = fused(x.to(dtype))
                assert (out - expected).abs().max() <= tolerance * expected.abs().max()
                fused.fuse()


@pytest.mark.parametrize("name, options", [("test_van", {}), *SCALED])
@pytest.mark.parametrize("part", ["mlp", "mixer"])
def test_a_module_with_two_places_is_merged_for_each(name, options, part):
    model = randomise(visionattn.create_model(name, **options)).double()
    blocks = next(stage.blocks for stage in model.stages if len(stage.blocks) > 1)
    setattr(blocks[0], part, getattr(blocks[1], part))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["van", "patnet", "attnet", "litv2", "nalaformer"])
def test_no_batch_norm_is_left(name):
    model = visionattn.create_model(f"test_{name}").eval()
    assert batch_norms(model) and not batch_norms(model.fuse())


@pytest.mark.parametrize("name, options", SCALED)
def test_no_layer_scale_is_left(name, options):
    model = visionattn.create_model(name, **options).eval()
    assert any(hasattr(module, "gamma") for module in model.modules())
    assert not any(hasattr(module, "gamma") for module in model.fuse().modules())


@pytest.mark.parametrize("name", visionattn.list_models("test_*"))
def test_what_is_frozen_stays_so(name):
    model = visionattn.create_model(name).eval().requires_grad_(False).fuse()
    assert [key for key, parameter in model.named_parameters() if parameter.requires_grad] == []


@pytest.mark.parametrize("name, options", [*SCALED, ("test_patnet", {})])
def test_a_fused_model_is_a_model(name, options):
    model = randomise(visionattn.create_model(name, **options)).fuse()
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        fused = visionattn.create_model(name, **options).eval().fuse()
        fused.load_state_dict(model.state_dict(), strict=True)
        torch.testing.assert_close(fused(x), expected)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        assert_half_precision(model, x, torch.bfloat16)


def test_training_mode_is_refused():
    model = visionattn.create_model("test_van").train()
    with pytest.raises(VisionattnError, match="expected a model in eval mode to fuse, got one in training mode"):
        model.fuse()


class Pair(nn.Module):
    fused_pairs = (("conv", "norm"),)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 3, 2, 1, groups=2)
        self.norm = BatchNormAct2d(4)
        self.linear = Pointwise2d(4, 5, bias=False)
        self.last = nn.BatchNorm2d(5, affine=False)

    def forward(self, x):
        return self.last(self.linear(self.norm(self.conv(x))))


def test_pairs_and_sequences():
    """Pairs that a class names and neighbours in a sequence are merged, others are left alone."""
    model = randomise(nn.Sequential(Pair(), nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    model.double()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    expected = model(x)
    fuse_modules(nn.Sequential(model))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert batch_norms(model) == ["0.last", "4"]
    assert isinstance(model[0].norm, nn.ReLU) and model[0].conv.bias.requires_grad
    without_statistics = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    fuse_modules(nn.Sequential(without_statistics))
    assert batch_norms(without_statistics) == ["1"]


@pytest.mark.parametrize("scaled", [True, False])
def test_scale_input(scaled):
    linear, x = nn.Linear(4, 3, bias=scaled).double(), torch.randn(5, 4, dtype=torch.float64)
    scale, shift = torch.rand(4), torch.randn(4)
    expected = linear(x * (scale if scaled else 1) + shift)
    scale_input(linear, scale if scaled else None, shift)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-12)


def test_a_layer_alone():
    layer = randomise(PartialChannelAttention(12)).double()
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    expected = layer(x)
    layer.fuse()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert batch_norms(layer) == []
