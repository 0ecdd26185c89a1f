"""Published layouts, wrappers, and files that are not what they should be."""

import builtins
import hashlib
import io
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.errors import VisionattnError
from visionattn.publish import convert_file, push
from visionattn.weights import convert_state_dict, load_checkpoint, read_checkpoint, write_checkpoint

TESTS = visionattn.list_models("test_*")


@pytest.fixture
def van():
    return visionattn.create_model("test_van")


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("name", TESTS)
def test_our_own_layout_stays(name):
    state_dict = visionattn.create_model(name).state_dict()
    converted = convert_state_dict(state_dict, visionattn.create_model(name))
    assert_same(converted, state_dict)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: {"model": sd, "epoch": 3, "optimizer": {"state": {}}},
        lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}},
        lambda sd: {"state_dict": {k: v * 0 for k, v in sd.items()}, "state_dict_ema": sd},
        lambda sd: {"model": {"state_dict": {f"_orig_mod.module.{k}": v for k, v in sd.items()}}},
        lambda sd: sd | {"training_state.step": torch.tensor(3)},
    ],
)
def test_wrappers(van, wrap):
    state_dict = van.state_dict()
    assert_same(convert_state_dict(wrap(state_dict), van), state_dict)


def test_a_headless_model_takes_a_checkpoint_with_head(van):
    headless = visionattn.create_model("test_van", num_classes=0)
    headless.load_state_dict(convert_state_dict(van.state_dict(), headless), strict=True)


def test_another_model_is_refused(van):
    state_dict = visionattn.create_model("test_dinat").state_dict()
    with pytest.raises(
        VisionattnError, match=r"does not fit test_van: missing \d+ keys \(.+, \.\.\.\); left over \d+ keys"
    ):
        convert_state_dict(state_dict, van)
    state_dict = van.state_dict()
    del state_dict["head.bias"]
    with pytest.raises(VisionattnError, match=r"missing 1 keys \(head.bias\); left over none"):
        convert_state_dict(state_dict, van)
    with pytest.raises(VisionattnError, match="expected a state dict"):
        convert_state_dict({"model": {}}, van)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files(van, tmp_path, suffix):
    path = tmp_path / f"van{suffix}"
    state_dict = {k: v + 1 for k, v in van.state_dict().items()}
    if suffix == ".pth":
        torch.save({"model": state_dict}, path)
    else:
        save_file(state_dict, path, {"model": "test_van"})
        assert read_checkpoint(path)[1] == {"model": "test_van"}
    load_checkpoint(van, path)
    assert_same(van.state_dict(), state_dict)
    assert_same(visionattn.create_model("test_van", checkpoint_path=str(path)).state_dict(), state_dict)
    features = visionattn.create_model("test_van", features_only=True, checkpoint_path=str(path))
    assert torch.equal(features.stages_3.norm.weight, state_dict["stages.3.norm.weight"])
    with pytest.raises(VisionattnError, match=r"does not fit test_van: 2 keys \(head.* instead of"):
        load_checkpoint(visionattn.create_model("test_van", num_classes=3), path)
    path.write_bytes(path.read_bytes()[:-1000])
    before = {k: v.clone() for k, v in van.state_dict().items()}
    with pytest.raises(VisionattnError, match=f"checkpoint {path} is damaged"):
        load_checkpoint(van, path)
    assert_same(van.state_dict(), before)


def test_tensors_of_any_strides_are_written(tmp_path):
    tensors = {"one": torch.empty_strided((1,), (5,)).fill_(2), "turned": torch.randn(4, 6).t()[1:]}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.empty(0, 3), "half": torch.randn(3).bfloat16()}
    write_checkpoint(tmp_path / "x.safetensors", tensors, {})
    assert_same(read_checkpoint(tmp_path / "x.safetensors")[0], tensors)


@pytest.mark.parametrize("length", [0x4B50, 0x0280])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, length):
    """The first bytes of a safetensors file are a number, and those of an archive or a pickle may come up in it."""
    path = tmp_path / "w.safetensors"
    for padding in range(length - 200, length):
        save_file({"w": torch.ones(2)}, path, {"x": "a" * padding})
        if (found := int.from_bytes(path.read_bytes()[:8], "little")) >= length:
            break
    assert found == length
    assert torch.equal(read_checkpoint(path)[0]["w"], torch.ones(2))


def test_a_file_that_a_run_replaces_while_it_is_read(tmp_path, monkeypatch):
    path, newer, from_file = tmp_path / "last.safetensors", tmp_path / "new", torch.UntypedStorage.from_file
    for name, epoch in ((path, 1), (newer, 2)):
        write_checkpoint(name, {"w": torch.full((9,), float(epoch))}, {"epoch": str(epoch)})

    def replaced_first(name, *args, **kwargs):  # safetensors has read the header and comes for the tensors
        newer.replace(path)
        return from_file(name, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced_first)
    tensors, metadata = read_checkpoint(path)
    assert not newer.exists() and metadata == {"epoch": "1"} and torch.equal(tensors["w"], torch.full((9,), 1.0))


def test_files_are_opened_once(van, tmp_path, monkeypatch):
    """By whatever asks for a file's model, its header, its tensors and its hash."""
    given, out = str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors")
    torch.save(van.state_dict(), given)
    opened, once = Counter(), builtins.open

    def counting(file, mode="r", *args, **kwargs):
        opened[str(file)] += mode == "rb"
        return once(file, mode, *args, **kwargs)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", counting)
    made = convert_file(given, out, "test_van")
    assert made["sha256"] == hashlib.sha256(Path(given).read_bytes()).hexdigest()
    assert opened.pop(given) == 2  # the test's own
    for go in (
        lambda: visionattn.create_model("test_van", checkpoint_path=given),
        lambda: visionattn.create_model(out),
        lambda: visionattn.create_model(out, features_only=True),
        lambda: visionattn.create_detector(out, "fcos", 3, fpn_channels=64),
        lambda: push(out, f"local-dir:{tmp_path}/repository"),
    ):
        opened.clear()
        go()
        assert opened[given] + opened[out] == 1


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_is_executed(van, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state_dict = {k: v + 1 for k, v in van.state_dict().items()}
    torch.save({"model": state_dict, "args": Malicious()}, "bad.pth")
    load_checkpoint(van, "bad.pth")
    assert_same(van.state_dict(), state_dict)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(VisionattnError, match="does not exist"):
        load_checkpoint(van, "missing.pth")
    torch.save(torch.ones(2), "tensor.pth")
    with pytest.raises(VisionattnError, match="holds a Tensor, expected a dictionary"):
        load_checkpoint(van, "tensor.pth")
    torch.save(Malicious(), "other.pth")
    with pytest.raises(VisionattnError, match=r"holds a \w+.mkdir, expected a dictionary of tensors"):
        load_checkpoint(van, "other.pth")
    assert not (tmp_path / "executed").exists()


def test_pretrained_converts_what_it_fetches(tmp_path):
    """A local file stands in for the download, as in timm."""
    source = visionattn.create_model("test_van")
    published = {}
    for key, value in source.state_dict().items():  # the official names
        for ours, theirs in (
            ("stem.", "patch_embed1."),
            ("mixer.proj1", "attn.proj_1"),
            ("mixer.proj2", "attn.proj_2"),
        ):
            key = key.replace(ours, theirs)
        for s in "1234":
            key = key.replace(f"stages.{int(s) - 1}.downsample.", f"patch_embed{s}.")
            key = key.replace(f"stages.{int(s) - 1}.blocks.", f"block{s}.").replace(
                f"stages.{int(s) - 1}.norm", f"norm{s}"
            )
        key = key.replace("mixer.lka.", "attn.spatial_gating_unit.").replace("mlp.dwconv", "mlp.dwconv.dwconv")
        for ours, theirs in (("dilated", "conv_spatial"), ("depthwise", "conv0"), ("pointwise", "conv1")):
            key = key.replace(f"unit.{ours}", f"unit.{theirs}")
        key = key.replace("ls1.gamma", "layer_scale_1").replace("ls2.gamma", "layer_scale_2")
        is_conv = key.endswith("weight") and any(n in key for n in ("proj_", "conv1", "fc"))
        published[key] = value[:, :, None, None] if is_conv else value
    torch.save({"state_dict": published}, tmp_path / "van.pth")
    overlay = {"file": str(tmp_path / "van.pth")}
    model = visionattn.create_model("test_van", pretrained=True, pretrained_cfg_overlay=overlay)
    assert_same(model.state_dict(), source.state_dict())
    overlay = {"file": str(tmp_path / "van.pth")}
    model = visionattn.create_model(
        "test_van", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1
    )
    assert model.stem.proj.weight.shape[1] == 1 and model.num_classes == 3
    assert torch.equal(model.stages[3].blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight)


def test_index_buffers_of_files_are_dropped():
    """The published ViT with relative position bias keeps its index table; it is rebuilt, never read."""
    model = visionattn.create_model("vitrpb_small", depth=1, embed_dim=32, num_heads=2, num_classes=3)
    published = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "patch_embed.").replace("blocks.0.", "layers.0.").replace("mixer.", "attn.")
        published[key] = value
    published["layers.0.attn.relative_position_index"] = torch.zeros(196, 196, dtype=torch.int64)
    assert_same(convert_state_dict(published, model), model.state_dict())

    model = visionattn.create_model("test_convit")
    published = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "patch_embed.").replace("mixer.", "attn.").replace("pos_embed.weight", "pos_embed")
        published[key] = value
    published["blocks.0.attn.rel_indices"] = torch.zeros(1, 16, 16, 3)
    assert_same(convert_state_dict(published, model), model.state_dict())


@pytest.mark.parametrize("name", TESTS)
def test_no_family_takes_the_checkpoints_of_another(name):
    model = visionattn.create_model(name)
    for other in TESTS:
        if other != name:
            with pytest.raises(VisionattnError, match=f"state dict does not fit {name}: missing .*; left over"):
                convert_state_dict(visionattn.create_model(other).state_dict(), model)
