"""What clients of timm reach by name: every model of ours, under `va_` even where timm owns the name."""

import json

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from numerics import filled
from safetensors.torch import save_file
from timm.models import save_for_hf

import visionattn
from visionattn.errors import UnknownModelError
from visionattn.publish import push
from visionattn.registry import timm_name
from visionattn.weights.files import DESCRIPTION, write_checkpoint

OWNED = [name for name in visionattn.list_models() if timm_name(name) != name]


def on_meta(create, name, **kwargs):
    with torch.device("meta"):
        return create(name, **kwargs)


def ours(model):
    return type(model).__module__.startswith("visionattn.")


def test_every_name_has_a_second_one():
    assert {"halonet26t", "davit_tiny", "focalnet_tiny_srf", "convit_tiny"} <= set(OWNED)
    names = visionattn.list_models()
    assert all(timm.is_model(f"va_{name}") for name in names)
    assert not any(name.startswith("va_") for name in names)
    assert not ours(on_meta(timm.create_model, "halonet26t"))
    for name in OWNED:
        assert timm.model_entrypoint(f"va_{name}").__module__.startswith("visionattn.models."), name
    for name in ("halonet26t", "davit_tiny", "convit_tiny", "van_b0"):
        model = on_meta(timm.create_model, f"va_{name}")
        assert ours(model) and model.pretrained_cfg["architecture"] == f"va_{name}"
        assert type(on_meta(visionattn.create_model, f"va_{name}")) is type(model)
    assert model.pretrained_cfg["tag"] == "in1k" and timm.list_pretrained("va_van_b0*") == ["va_van_b0.in1k"]
    assert visionattn.model_info("va_convit_tiny").name == "convit_tiny"
    assert on_meta(visionattn.create_model, "va_van_tiny.in1k").pretrained_cfg["architecture"] == "van_b0"
    with pytest.raises(UnknownModelError, match="unknown model va_van_b7; did you mean van_b"):
        visionattn.create_model("va_van_b7")
    with pytest.raises(UnknownModelError, match="davit_tiny has no weights tagged in2k; it has msft_in1k"):
        timm.create_model("va_davit_tiny.in2k")


def test_weights_go_by_the_plain_name(tmp_path, monkeypatch):
    state = filled(visionattn.create_model("convit_tiny")).state_dict()
    save_file(state, tmp_path / "convit_tiny.fb_in1k.safetensors")
    monkeypatch.setenv("VISIONATTN_WEIGHTS", str(tmp_path))
    for name in ("va_convit_tiny", "va_convit_tiny.fb_in1k"):
        model = timm.create_model(name, pretrained=True)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    x = torch.randn(1, 3, 40, 50)
    found = model.eval().forward_intermediates(x, [0, 1], intermediates_only=True)
    for one, other in zip(maps(x), found, strict=True):
        torch.testing.assert_close(one, other)
    encoder = smp.Unet("tu-va_davit_tiny", encoder_weights=None, classes=2).encoder
    assert encoder.model.feature_info.reduction() == [4, 8, 16, 32]
    assert smp.encoders.get_preprocessing_params("tu-va_davit_tiny.msft_in1k")["mean"] == [0.485, 0.456, 0.406]


def test_what_timm_saves_is_found_again(tmp_path):
    model, x = timm.create_model("va_test_halonet", num_classes=5).eval(), torch.randn(1, 3, 64, 48)
    save_for_hf(model, tmp_path)
    for create in (timm.create_model, visionattn.create_model):
        again = create(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert ours(again) and torch.equal(again(x), model(x))


def test_what_is_pushed_is_ours_for_timm(tmp_path):
    for name, pushed in (("convit_tiny", "va_convit_tiny"), ("test_van", "test_van")):
        model = visionattn.create_model(name, num_classes=3)
        description = {"model": name, "model_kwargs": {"num_classes": 3}, "task": "classification"}
        path, place = tmp_path / f"{name}.safetensors", f"local-dir:{tmp_path / name}"
        write_checkpoint(str(path), model.state_dict(), {"format": "pt", DESCRIPTION: json.dumps(description)})
        push(str(path), place)
        assert json.loads((tmp_path / name / "config.json").read_text())["architecture"] == pushed
        x = torch.randn(1, 3, 32, 48)
        for create in (timm.create_model, visionattn.create_model):
            again = create(place, pretrained=True).eval()
            assert ours(again)
            torch.testing.assert_close(again(x), model.eval()(x))


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone="va_test_convit", out_indices=(0, 2))
    maps = transformers.TimmBackbone(config).eval()(torch.randn(1, 3, 64, 48)).feature_maps
    assert [feature.shape for feature in maps] == [(1, 64, 8, 6)] * 2
    config = transformers.TimmWrapperConfig(architecture="va_test_patnet", num_labels=5)
    model, x = transformers.TimmWrapperForImageClassification(config).eval(), torch.randn(1, 3, 64, 48)
    assert ours(model.timm_model) and model.supports_gradient_checkpointing
    model.save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, model(x).logits)
