"""`output_stride`: pyramids that keep the resolution of their last stages."""

import copy
import math

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from numerics import filled

import visionattn
from visionattn.errors import VisionattnError
from visionattn.models.dinat import DiNATs

DILATING = ["test_dinat", "test_focalnet", "test_hornet", "test_van"]
PLAIN = {"use_conv_embed": False, "use_postln": False}
CONVOLUTIONS = {"gflayer": (False,) * 4, "filter_hw": None}
SWIN = {"embed_dim": 16, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 4, 8), "kernel_size": 3}


def pyramid(name, **kwargs):
    model = DiNATs(**SWIN, **kwargs) if name == "swin" else visionattn.create_model(name, **kwargs)
    model = filled(model).double()
    for key, parameter in model.named_parameters():
        if ".mixer.f." in key:  # the gate of what FocalNet's blocks draw from the whole map
            parameter.data[-1] = 0
    return model


EVEN, ODD = (128, 192), (75, 130)  # these where nothing is dropped


@pytest.mark.parametrize(
    "name, kwargs, sizes",
    [
        *((name, {}, [EVEN] if name == "test_hornet" else [EVEN, ODD]) for name in DILATING),
        ("test_focalnet", PLAIN, [EVEN]),
        ("test_focalnet", PLAIN | {"pad_to_patch": True}, [ODD]),
        ("test_hornet", CONVOLUTIONS, [EVEN]),
        ("swin", {}, [ODD]),
    ],
)
def test_every_nth_position_is_what_it_was(name, kwargs, sizes):
    model = pyramid(name, **kwargs)
    for size in sizes:
        assert_as_coarse(model, torch.randn(1, 3, *size, dtype=torch.float64), size)


def assert_as_coarse(model, x, size):
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        for output_stride in (16, 8, 4):
            dilated = copy.deepcopy(model)
            dilated.dilate(output_stride)
            assert dilated.state_dict().keys() == model.state_dict().keys()
            maps = dilated.forward_intermediates(x, intermediates_only=True)
            for i, (found, coarse) in enumerate(zip(maps, expected, strict=True)):
                stride = dilated.feature_info[i]["reduction"]
                assert stride == min(4 * 2**i, output_stride)
                n = 4 * 2**i // stride
                assert found.shape[2:] == expected[i - int(math.log2(n))].shape[2:]
                found = found[:, :, ::n, ::n][:, :, : coarse.shape[2], : coarse.shape[3]]
                torch.testing.assert_close(found, coarse, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", DILATING)
def test_dilated_models_are_models(name, tmp_path):
    state = filled(visionattn.create_model(name)).state_dict()
    torch.save(state, tmp_path / "published.pth")
    options = {"output_stride": 8, "checkpoint_path": str(tmp_path / "published.pth")}
    model, x = visionattn.create_model(name, **options).eval(), torch.randn(2, 3, 64, 96)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg["pool_size"] == (4, 4)
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (2, 1000) and not torch.allclose(expected, plain_logits(name, x), atol=1e-2)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        maps = visionattn.create_model(name, features_only=True, **options).eval()(x)
        for found, feature in zip(maps, model.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(found, feature)
        fused = copy.deepcopy(model).fuse()
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    extractor = timm.create_model(name, features_only=True, output_stride=16, out_indices=(1, 3))
    assert extractor.feature_info.reduction() == [8, 16]


def plain_logits(name, x):
    return filled(visionattn.create_model(name))(x)


@pytest.mark.parametrize("decoder, strides", [(smp.DeepLabV3, (8, 16)), (smp.DeepLabV3Plus, (8, 16)), (smp.PAN, (16,))])
@pytest.mark.parametrize("name", DILATING)
def test_decoders_that_ask_for_a_stride(name, decoder, strides):
    for output_stride in strides:
        model = decoder(f"tu-{name}", encoder_weights=None, encoder_output_stride=output_stride, classes=3).eval()
        x = torch.randn(1, 3, 128, 160)
        assert model.encoder(x)[-1].shape[2:] == (128 // output_stride, 160 // output_stride)
        assert model(x).shape == (1, 3, 128, 160)


def test_other_strides_are_refused():
    able = "a pyramid of one of the families dinat, focalnet, hornet, van"
    for name in sorted(set(visionattn.list_models("test_*")) - set(DILATING)):
        for create in (visionattn.create_model, timm.create_model):
            with pytest.raises(VisionattnError, match=f"{name} has maps of strides .*: output_stride 16 needs {able}"):
                create(name, features_only=True, output_stride=16)
        last = visionattn.create_model(name).feature_info[-1]["reduction"]
        assert visionattn.create_model(name, output_stride=last).feature_info[-1]["reduction"] == last
    for name in DILATING:
        with pytest.raises(VisionattnError, match=rf"{name} expects output_stride one of \[4, 8, 16, 32\], got 2"):
            visionattn.create_model(name, output_stride=2)
        with pytest.raises(VisionattnError, match=rf"{name} is dilated already, to strides \[4, 8, 16, 16\]"):
            visionattn.create_model(name, output_stride=16).dilate(8)
