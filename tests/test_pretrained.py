"""Published files of every family through `pretrained=True`: as they are, and fitted to other models."""

import json
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from timm.models import adapt_input_conv

import visionattn
from visionattn.errors import VisionattnError
from visionattn.publish import convert_file
from visionattn.weights import read_checkpoint
from visionattn.weights.download import MIRROR
from visionattn.weights.files import DESCRIPTION, write_checkpoint
from visionattn.weights.layouts import convert_state_dict, fit_state_dict

GOLDENS = Path(__file__).parent / "goldens"
FILES = [
    "attnet/attnet_xxs", "convit/convit_tiny", "convit/convit_tiny.timm", "davit/test_davit-134x162",
    "davit/test_davit-134x162.timm", "dinat/dinat_mini", "dinat/dinat_mini.hf", "dinat/dinat_isotropic_small",
    "focalnet/test_focalnet-134x162", "focalnet/test_focalnet-134x162.timm", "halonet/halonet26t",
    "hornet/hornet_tiny_gf", "illama/illama_tiny", "litv2/litv2_small_alpha05", "patnet/patnet_t0",
    "sparsifiner/sparsifiner_deit_small-96x96", "sparsifiner/sparsifiner_lvvit_s-96x96", "van/van_b0", "van/van_b0.hf",
]  # fmt: skip


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(MIRROR, str(tmp_path))
    return tmp_path


def publish(file: str, folder: Path) -> tuple[dict, dict, Path]:
    """Put a published file where it is looked for; what made it, what it computes and its place."""
    meta, arrays = golden.load(GOLDENS / f"{file}.npz")
    path = folder / f"{meta['create']['name']}.pth"
    torch.save({"model": golden.fill_state_dict(meta["keys"]), "epoch": 299}, path)
    return meta, arrays, path


def assert_parity(model, meta: dict, expected: np.ndarray) -> None:
    dtype = torch.float32 if meta["tolerance"]["float32"] else torch.float64
    x = torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"]))).to(dtype)
    with torch.no_grad():
        found = model.eval().to(dtype)(x).numpy()
    assert np.abs(found - expected).max() <= meta["tolerance"][str(dtype)[6:]] * np.abs(expected).max()


@pytest.mark.parametrize("file", FILES)
def test_published_files(file, mirror, caplog):
    meta, arrays, path = publish(file, mirror)
    name, kwargs = meta["create"]["name"], meta["create"]["kwargs"]
    model = visionattn.create_model(name, pretrained=True, **kwargs)
    assert not caplog.records, "silence means that all was used"
    assert_parity(model, meta, arrays["logits"])
    reference = convert_state_dict(torch.load(path), model)

    # Image sizes go to those who have something made for one; a multiple of every patch size.
    other = visionattn.create_model(
        name, pretrained=True, **kwargs | {"num_classes": 10, "in_chans": 1, "img_size": 64}
    )
    (record,) = caplog.records
    told = record.getMessage()
    assert record.levelname == "WARNING" and told.startswith(f"{name}.pth: re-initialised ") and "\n" not in told
    assert other.num_classes == 10 and other.pretrained_cfg["input_size"] == (3, 64, 64)
    conv, changed = f"{other.first_conv}.weight", []
    for key, value in other.state_dict().items():
        old = reference[key].float() if value.is_floating_point() else reference[key]
        if key == conv:
            assert torch.equal(value, adapt_input_conv(1, old))
        elif value.shape != old.shape or not torch.equal(value, old):
            changed.append(key)
    allowed = r"head\.|aux_head\.|pos_embed|.*\.predictor\.|.*complex_weight"
    assert {"head.weight", "head.bias"} <= set(changed) and all(re.match(allowed, key) for key in changed)
    report = fit_state_dict(torch.load(path), other)[1]
    listed = " ".join(report["re-initialised"] + report["resized"])
    assert not report["dropped"] and all(key in listed for key in [*changed, conv])
    assert other.eval()(torch.randn(1, 1, 64, 64)).isfinite().all()


@pytest.mark.parametrize("file", ["convit/convit_tiny.timm", "davit/test_davit-134x162", "van/van_b0.hf"])
def test_converted_files_need_no_name(file, tmp_path, caplog):
    meta, arrays, path = publish(file, tmp_path)
    name, kwargs, out = meta["create"]["name"], meta["create"]["kwargs"], str(tmp_path / "out.safetensors")
    made = convert_file(str(path), out, name, kwargs)
    assert made["model"] == name and made["adapted"] == {} and made["source"].endswith(path.name)
    assert made["license"] == visionattn.model_info(name).license and len(made["sha256"]) == 64
    assert not made["classes"] or made["classes"][0] == "n01440764"
    model = visionattn.create_model(out)
    assert_parity(model, meta, arrays["logits"])
    transform, own = (visionattn.data.create_transform(m) for m in (model, visionattn.create_model(name)))
    assert str(transform) == str(own)
    assert not caplog.records
    with pytest.raises(VisionattnError, match="out.safetensors exists: choose another name"):
        convert_file(str(path), out, name, kwargs)
    with pytest.raises(VisionattnError, match="does not fit test_illama"):
        convert_file(str(path), out, "test_illama", replace=True)
    assert visionattn.create_model(out).num_classes == model.num_classes


def test_conversion_reads_classes_and_channels_from_the_file(tmp_path):
    weights = visionattn.create_model("test_illama", num_classes=7, in_chans=1).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    made = convert_file(str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"), "test_illama")
    assert made["model_kwargs"] == {"num_classes": 7, "in_chans": 1} and made["classes"] is None
    model = visionattn.create_model(str(tmp_path / "w.safetensors"))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert read_checkpoint(tmp_path / "w.safetensors")[1]["format"] == "pt"


def test_a_file_of_ours_is_converted_by_what_it_says(tmp_path, caplog):
    """Arguments of which no shape tells are not lost, nor silently others."""
    first, again, other = (str(tmp_path / f"{i}.safetensors") for i in range(3))
    kwargs = {"mixer": "flow", "num_classes": 3, "drop_path_rate": 0.1}
    model = visionattn.create_model("test_isotropic", **kwargs)
    header = {"model": "test_isotropic", "model_kwargs": kwargs, "classes": ["a", "b", "c"]}
    write_checkpoint(first, model.state_dict(), {"format": "pt", DESCRIPTION: json.dumps(header)})
    for name in ("", "test_isotropic"):
        made = convert_file(first, again, name, replace=True)
        assert made["model_kwargs"] == kwargs and made["classes"] == ["a", "b", "c"]
    visionattn.create_model("test_isotropic", mixer="flow", num_classes=3, img_size=64, checkpoint_path=again)
    visionattn.create_model(again, num_classes=5)
    assert "made with" not in caplog.text
    convert_file(first, other, model_kwargs={"mixer": "softmax"})
    visionattn.create_model("test_isotropic", num_classes=3, checkpoint_path=again)
    visionattn.create_model(again, mixer="softmax")
    assert caplog.text.count("made with mixer='flow', loaded into a model with 'softmax'") == 3
    with pytest.raises(VisionattnError, match="does not say which model it is of: give --model"):
        torch.save(model.state_dict(), tmp_path / "w.pth")
        convert_file(str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"))


def test_a_changed_file_is_noticed(tmp_path):
    weights = visionattn.create_model("test_van").state_dict()
    torch.save(weights, tmp_path / "w.pth")
    convert_file(str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"), "test_van")
    data = bytearray((tmp_path / "w.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(VisionattnError, match="w.safetensors is damaged .its content does not match its hash"):
        visionattn.create_model(str(tmp_path / "w.safetensors"))


def test_files_that_do_not_say_what_they_are(tmp_path):
    torch.save(visionattn.create_model("test_van").state_dict(), tmp_path / "w.pth")
    told = "w.pth does not say which model it is of: give it as checkpoint_path of a name"
    with pytest.raises(VisionattnError, match=told):
        visionattn.create_model(str(tmp_path / "w.pth"))
    with pytest.raises(VisionattnError, match="nowhere.safetensors does not exist"):
        visionattn.create_model("nowhere.safetensors")


def test_options_beside_the_weights_are_left_out(tmp_path):
    from argparse import Namespace

    weights = visionattn.create_model("test_van").state_dict()
    options = Namespace(lr=0.1, output=Path("runs"), best=np.float64(81.5), classes=np.int64(3))
    torch.save(
        {"model": weights, "args": options, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        tmp_path / "w.pth",
    )
    content = read_checkpoint(tmp_path / "w.pth")[0]
    assert content.keys() == {"model", "optimizer"} and content["optimizer"]["param_groups"] == [{"lr": 0.1}]
    converted = convert_state_dict(content, visionattn.create_model("test_van"))
    assert all(torch.equal(converted[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["test_dinat", "test_davit"])
def test_files_of_dense_prediction(name, tmp_path, caplog):
    """A detector's file: the backbone under a prefix, a norm for each output, no norm before the head and no head."""
    weights = visionattn.create_model(name).state_dict()
    published = {f"backbone.{k}": v + 1 for k, v in weights.items() if not k.startswith(("norm.", "head."))}
    published |= {f"backbone.norm{i}.weight": torch.ones(8) for i in range(4)} | {"neck.conv.weight": torch.ones(3)}
    torch.save({"state_dict": published, "meta": {"epoch": 12}}, tmp_path / "w.pth")
    model = visionattn.create_model(name, checkpoint_path=str(tmp_path / "w.pth"))
    assert torch.equal(model.stages[2].blocks[0].norm1.weight, weights["stages.2.blocks.0.norm1.weight"] + 1)
    (record,) = caplog.records
    assert "re-initialised 4 keys (norm.weight, norm.bias, head.weight, head.bias)" in record.getMessage()
    assert "dropped 5 keys" in record.getMessage()


def test_tables_follow_the_window(caplog):
    weights = visionattn.create_model("test_dinat").state_dict()
    model = visionattn.create_model("test_dinat", kernel_size=5)
    tensors, report = fit_state_dict(weights, model)
    table = "stages.0.blocks.0.mixer.rpb"
    expected = torch.nn.functional.interpolate(weights[table][None], (9, 9), mode="bicubic", align_corners=False)[0]
    assert torch.equal(tensors[table], expected)
    assert len(report["resized"]) == 8 and not report["re-initialised"] and not report["dropped"]


def test_tags_choose_the_file(mirror, caplog):
    """A name alone is that of the default weights only."""
    torch.save({}, mirror / "van_b4.pth")
    with pytest.raises(VisionattnError, match=f"{MIRROR} .* has none of van_b4.in22k.safetensors, van_b4.in22k.pth"):
        visionattn.create_model("van_b4.in22k", pretrained=True)
