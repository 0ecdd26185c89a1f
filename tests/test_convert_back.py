"""Nobody is locked in: the published layouts are written again, and what loads them computes the same."""

import json
from pathlib import Path

import golden
import pytest
import timm
import torch
from numerics import filled
from PIL import Image
from safetensors.torch import load_file

import visionattn
from visionattn.cli import main
from visionattn.errors import VisionattnError
from visionattn.outward import hf_config, timm_state_dict, write_layout
from visionattn.weights.description import made_for
from visionattn.weights.files import DESCRIPTION, write_checkpoint
from visionattn.weights.inverse import to_layout
from visionattn.weights.layouts import convert_state_dict

NO_MODELS = ("mixers", "methods")
GOLDENS = sorted(p for p in (Path(__file__).parent / "goldens").glob("*/*.npz") if p.parent.name not in NO_MODELS)
LARGEST = 6e7


def cases() -> list:
    """The smallest golden of each architecture and layout at once, the others when there is time."""
    metas = [(path, golden.load(path)[0]) for path in GOLDENS if not path.stem.endswith("-resized")]  # of another size
    metas = [(path, meta) for path, meta in metas if meta["source"] != "timm" and meta["num_params"] < LARGEST]
    seen, found = set(), []
    for path, meta in sorted(metas, key=lambda pair: pair[1]["num_params"]):
        key = path.parent.name, meta["source"], meta["create"]["name"].rpartition("_")[0]
        found.append(pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if key in seen else []))
        seen.add(key)
    return found


@pytest.mark.parametrize("path", cases())
def test_published_names_and_shapes_come_back(path):
    meta, _ = golden.load(path)
    model = visionattn.create_model(meta["create"]["name"], **meta["create"]["kwargs"])
    found = to_layout(model, meta["source"])
    never_applied = ("van.layernorm.",)
    expected = {key: tuple(shape) for key, shape, _ in meta["keys"] if not key.startswith(never_applied)}
    assert {key: tuple(value.shape) for key, value in found.items()} == expected
    back = convert_state_dict(found, model)
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


def test_published_buffers_are_what_windows_compute_by():
    model = filled(visionattn.create_model("agent_swin_tiny", attn_type="AABB", img_size=64 * 7)).double()
    found, w = to_layout(model, "official"), 14
    for name, sides in (("layers.2.blocks.1", (28, 28)), ("layers.3.blocks.1", (14, 14))):
        layer = model.get_submodule(name.replace("layers", "stages")).mixer
        assert layer.window_size == w and layer.map_size == sides
        shift = 7 if f"{name}.attn_mask" in found else 0
        assert (name == "layers.2.blocks.1") == bool(shift)
        x = torch.randn(2, *sides, layer.qkv.weight.shape[1]).double()
        rolled = x.roll((-shift, -shift), (1, 2)).unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3)
        windows = rolled.flatten(3, 4).flatten(0, 2)  # (images times windows, places, channels)
        q, k, v = layer.qkv(windows).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        table = found[f"{name}.attn.relative_position_bias_table"]
        bias = table[found[f"{name}.attn.relative_position_index"]].permute(2, 0, 1)
        if shift:
            bias = (bias + found[f"{name}.attn_mask"][:, None]).repeat(2, 1, 1, 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias.expand(len(q), -1, -1, -1))
        out = layer.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (w, w)).unflatten(0, (2, sides[0] // w, -1))
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))
        torch.testing.assert_close(layer(x), out)


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "davit_tiny", "halonet26t", "convit_tiny"])
def test_timm_computes_the_same(name):
    model = filled(visionattn.create_model(name, num_classes=7))
    theirs = timm.create_model(name, num_classes=7).eval()
    theirs.load_state_dict(timm_state_dict(model, name), strict=True)
    x = torch.randn(1, 3, 224, 224) if name == "convit_tiny" else torch.randn(1, 3, 256, 256)
    x = x if name in ("convit_tiny", "halonet26t") else x[..., :64, :64]
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(theirs(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def saved(path: Path, name: str, **kwargs) -> torch.nn.Module:
    model = filled(visionattn.create_model(name, **kwargs))
    description = {"model": name, "model_kwargs": kwargs}
    write_checkpoint(path, model.state_dict(), {DESCRIPTION: json.dumps(description)})
    return model


def test_transformers_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"depths": [1, 1, 1, 1], "embed_dim": 16, "num_classes": 5}
    model = saved(tmp_path / "ours.safetensors", "focalnet_tiny_lrf", **small)
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    theirs, told = transformers.FocalNetForImageClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(told.values()) and theirs.config.num_labels == 5
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(theirs.eval()(x).logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert json.loads((tmp_path / "hf/preprocessor_config.json").read_text())["crop_size"] == {
        "height": 224,
        "width": 224,
    }


def test_transformers_prepares_grey_images(tmp_path):
    transformers = pytest.importorskip("transformers")
    saved(tmp_path / "ours.safetensors", "test_focalnet", in_chans=1, num_classes=5)
    write_layout(str(tmp_path / "ours.safetensors"), tmp_path / "hf", "hf")
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert prepare(Image.new("L", (70, 50)), return_tensors="pt")["pixel_values"].shape[:2] == (1, 1)


@pytest.mark.parametrize("name", ["dinat_mini", "nat_mini", "van_b0"])
def test_layouts_that_transformers_had_are_read_again(tmp_path, name):
    small = {"depths": [1, 1, 1, 1], "num_classes": 3}
    model = saved(tmp_path / "ours.safetensors", name, **small | ({"dilations": [[1]] * 4} if "dinat" in name else {}))
    files = write_layout(str(tmp_path / "ours.safetensors"), tmp_path / "hf", "hf")
    assert [Path(file).name for file in files] == ["model.safetensors", "config.json", "preprocessor_config.json"]
    kind = name.partition("_")[0]
    assert all(key.startswith((f"{kind}.", "classifier.")) for key in load_file(files[0]))
    config = json.loads(Path(files[1]).read_text())
    assert config["model_type"] == kind and len(config["id2label"]) == 3
    again = visionattn.create_model(name, checkpoint_path=files[0], **small)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_dinats_configuration_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = hf_config(visionattn.create_model("dinat_mini"), "dinat_mini", made_for("dinat_mini", {}))
    theirs = transformers.DinatConfig().to_dict()
    assert {key: config[key] for key in config if key in theirs and "label" not in key and key != "architectures"} == {
        key: theirs[key] for key in config if key in theirs and "label" not in key and key != "architectures"
    }


def test_what_has_no_such_layout_is_told_in_a_line(tmp_path, capsys):
    ours = tmp_path / "ours.safetensors"
    saved(ours, "test_van", num_classes=3)
    out = str(tmp_path / "out.pth")
    for to, told in (("timm", "timm has no test_van of its own"), ("official", "")):
        code = main(["convert", str(ours), out, "--to", to])
        assert code == (2 if told else 0) and told in capsys.readouterr().err
    again = visionattn.create_model("test_van", num_classes=3, checkpoint_path=out)
    assert again.num_classes == 3
    published = str(tmp_path / "published.pth")  # which says no more than its tensors do
    assert main(["convert", out, published, "--to", "official", "--model", "test_van"]) == 0
    ours, theirs = (torch.load(path, weights_only=True) for path in (published, out))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours = tmp_path / "ours.safetensors"
    assert main(["convert", str(ours), out, "--to", "official"]) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    saved(ours, "test_halonet")
    with pytest.raises(VisionattnError, match="test_halonet has no layout official; it was published as timm"):
        write_layout(str(ours), out, "official", replace=True)
    saved(ours, "test_nalaformer")
    with pytest.raises(VisionattnError, match="no layout official; no weights of its family were published"):
        write_layout(str(ours), out, "official", replace=True)
