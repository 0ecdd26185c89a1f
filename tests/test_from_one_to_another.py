"""Arguments that are None, tables of another grid, and weights from one task to another."""

import logging

import pytest
import timm
import torch

import visionattn
from visionattn.arguments import fits, hints
from visionattn.errors import VisionattnError
from visionattn.registry import _entries
from visionattn.training.checkpoint import save_checkpoint
from visionattn.training.config import parse_train
from visionattn.weights.description import describe_file

TESTS = visionattn.list_models("test_*")
CLASSES = {entry.takes: name for name, entry in reversed(_entries.items()) if entry.variant}
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize("cls", CLASSES)
def test_none_is_passed_on_where_the_class_has_a_use_for_it(cls, monkeypatch):
    """In all families: through our function, timm's entry point and the options of train.py."""
    given = {}

    def record(self, *args, **kwargs):
        given.update(kwargs)
        raise KeyboardInterrupt  # nothing of it is needed

    name, types = CLASSES[cls], hints(cls)
    monkeypatch.setattr(cls, "__init__", record)
    nothing = dict.fromkeys(types)
    for make in (visionattn.create_model, lambda name, **kwargs: timm.model_entrypoint(name)(**kwargs)):
        if make is not visionattn.create_model and timm.model_entrypoint(name).__module__.startswith("timm."):
            continue  # a name that timm has itself
        given.clear()
        with pytest.raises(KeyboardInterrupt):
            make(name, **nothing)
        for argument, hint in types.items():
            if fits(None, hint):
                assert given[argument] is None, argument
            else:
                assert given.get(argument, 0) is not None, argument


def test_none_says_what_it_says():
    assert isinstance(visionattn.create_model("test_van", layer_scale=None).stages[0].blocks[0].ls1, torch.nn.Identity)
    assert visionattn.create_model("test_van", num_classes=None, drop_rate=None, nothing=None).num_classes == 1000
    model = visionattn.create_model("test_sparsifiner", basis_coef_topk=None)
    assert model.blocks[0].mixer.predictor.basis_coef_topk is None
    config, _ = parse_train(["--model", "test_van", "--model_kwargs.layer_scale", "null"])
    assert config.model_kwargs == {"layer_scale": None}
    smp = visionattn.create_segmenter("test_van", "fpn", 3, backbone_kwargs={"layer_scale": None})
    assert isinstance(smp.inner.stages[0].blocks[0].ls1, torch.nn.Identity)


def test_none_in_headers_and_yaml(tmp_path):
    model = visionattn.create_model("test_van", layer_scale=None, num_classes=3)
    known = {"model": "test_van", "model_kwargs": {"layer_scale": None, "num_classes": 3}}
    save_checkpoint(tmp_path / "w.safetensors", model.state_dict(), known)
    made = visionattn.create_model(str(tmp_path / "w.safetensors"))
    assert made.state_dict().keys() == model.state_dict().keys()
    (tmp_path / "o.yaml").write_text("model: test_van\nmodel_kwargs: {layer_scale: null}")
    assert parse_train(["--config", str(tmp_path / "o.yaml")])[0].model_kwargs == {"layer_scale": None}


@pytest.mark.parametrize("arguments", [{"depths": "abc"}, {"depths": 3}, {"num_classes": "ten"}, {"layer_scale": "no"}])
def test_arguments_of_another_type_are_told(arguments):
    (name,) = arguments
    with pytest.raises(VisionattnError, match=f"test_van takes {name} as .*, got"):
        visionattn.create_model("test_van", **arguments)


TABLES = {
    "test_illama": {},
    "test_convit": {},
    "test_sparsifiner": {},
    "vitrpb_small": SMALL | {"patch_size": 8, "num_classes": 4},
}
"""Models with tables of positions."""


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("old", "new"), [(32, (16, 64)), ((16, 64), (64, 16)), ((16, 64), (16, 64)), ((16, 64), 32), ((16, 64), (48, 56))]
)
@pytest.mark.parametrize("says", [True, False])
def test_tables_are_resampled_by_their_grid(tmp_path, caplog, name, old, new, says):
    """As in the forward pass: a file in a model for another size gives what its own model gives at that size."""
    kwargs, path = TABLES[name], tmp_path / "w.safetensors"
    source = visionattn.create_model(name, img_size=old, **kwargs).eval()
    torch.nn.init.normal_(source.pos_embed.weight if source.pos_embed else source.blocks[0].mixer.rpb)
    arguments = kwargs | {"img_size": old}
    save_checkpoint(path, source.state_dict(), {"model": name, "model_kwargs": arguments} if says else {})
    caplog.set_level(logging.INFO)
    model = visionattn.create_model(name, checkpoint_path=str(path), img_size=new, **kwargs).eval()
    square = not says and name != "vitrpb_small"  # whose table has the shape of its grid
    if square:  # nothing tells that it is not
        source.pos_embed.grid_size = (4, 4)
        if name == "test_sparsifiner":
            for block in source.blocks:
                block.mixer.predictor.grid_size = (4, 4)
    x = torch.randn(2, 3, *((new, new) if isinstance(new, int) else new))
    counts = name == "test_sparsifiner" and new == (48, 56)  # other numbers of bases: the predictors are new
    if not counts:
        with torch.no_grad():
            torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)
    moved = (4, 4) if square else tuple(side // 8 for side in ((old, old) if isinstance(old, int) else old))
    target = tuple(side // 8 for side in ((new, new) if isinstance(new, int) else new))
    assert ("resized" in caplog.text) == (moved != target)
    if says and not counts:
        named = visionattn.create_model(str(path), img_size=new).state_dict()
        assert all(torch.equal(value, named[key]) for key, value in model.state_dict().items())


def test_filters_go_by_their_shape(tmp_path):
    """As many frequencies in another shape."""
    sizes = {"filter_hw": (None, None, (6, 2), (2, 2))}
    source = visionattn.create_model("test_hornet", **sizes)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = visionattn.create_model("test_hornet", checkpoint_path=str(tmp_path / "w.pth"))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), source.eval()(x), rtol=1e-4, atol=1e-5)


def dense_file(path, name: str, task: str, **head_kwargs):
    """A detector or segmenter of three classes, and its checkpoint as train.py leaves it."""
    create, head = {
        "detection": (visionattn.create_detector, "fcos"),
        "segmentation": (visionattn.create_segmenter, "fpn"),
    }[task]
    model = create(name, head, 3, **head_kwargs).eval()
    for parameter in model.inner.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    known = {"task": task, "model": name, "model_kwargs": {}, "head": head, "head_kwargs": head_kwargs}
    data = {"mean": [0.5] * 3, "std": [0.5] * 3}
    save_checkpoint(path, model.state_dict(), known | {"classes": ["a", "b", "c"], "data": data})
    return model


def assert_same_backbone(model: torch.nn.Module, source: torch.nn.Module) -> None:
    """Everything is the same but the norms of features, which not all have."""
    own, theirs = model.state_dict(), source.inner.state_dict()
    shared = {key for key in theirs if not key.startswith("feature_norms.")}
    assert shared <= own.keys() and all(torch.equal(own[key], theirs[key]) for key in shared)


@pytest.mark.parametrize("name", TESTS)
def test_backbones_go_from_one_task_to_another(tmp_path, caplog, name):
    path = str(tmp_path / "w.safetensors")
    caplog.set_level(logging.INFO)
    source = dense_file(path, name, "detection", fpn_channels=64)
    classifier = visionattn.create_model(name, checkpoint_path=path, num_classes=5)
    assert_same_backbone(classifier, source)
    told = caplog.records[-1].getMessage()
    assert "w.safetensors: re-initialised" in told and "dropped" in told
    features = visionattn.create_model(path, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    again = visionattn.create_model(name, features_only=True, checkpoint_path=path).eval()
    assert all(torch.equal(a, b) for a, b in zip(features(x), again(x), strict=True))
    segmenter = visionattn.create_segmenter(name, "fpn", 4, backbone_kwargs={"checkpoint_path": path})
    assert_same_backbone(segmenter.inner, source)
    assert_same_backbone(visionattn.create_segmenter(path, "fpn", 4).inner, source)


def test_other_heads_and_classes_of_a_file(tmp_path, caplog):
    path, other = str(tmp_path / "w.safetensors"), str(tmp_path / "other.safetensors")
    source = dense_file(path, "test_van", "detection", fpn_channels=64)
    model = visionattn.create_model(path, num_classes=5)
    new = {key for key, value in model.state_dict().items() if not torch.equal(value, source.state_dict()[key])}
    assert new == {f"head.classification_head.cls_logits.{kind}" for kind in ("weight", "bias")}
    assert "label_names" not in model.pretrained_cfg and model.pretrained_cfg["mean"] == [0.5] * 3
    for changed in ({"head": "retinanet"}, {"fpn_channels": 96, "pretrained": False, "checkpoint_path": path}):
        assert_same_backbone(visionattn.create_model(path, **changed).inner, source)
    second = dense_file(other, "test_van", "segmentation")
    model = visionattn.create_model(path, checkpoint_path=other)
    assert_same_backbone(model.inner, second)
    assert torch.equal(model.head.regression_head.bbox_reg.weight, source.head.regression_head.bbox_reg.weight)
    third = dense_file(other, "test_van", "detection", fpn_channels=64)
    model = visionattn.create_model(path, checkpoint_path=other)
    assert all(torch.equal(value, third.state_dict()[key]) for key, value in model.state_dict().items())
    model = visionattn.create_model(path, backbone_kwargs={"drop_path_rate": 0.5})
    assert model.inner.stages[3].blocks[0].drop_path1.drop_prob == 0.5
    for wrong, told in (
        ({"checkpoint_path": str(tmp_path / "missing.pth")}, "missing.pth does not exist"),
        ({"pretrained_backbone": True}, "cannot fetch test_van"),
        ({"num_classes": "many"}, "takes num_classes as an integer"),
        ({"head": "nope"}, "expected head one of"),
    ):
        with pytest.raises(VisionattnError, match=told):
            visionattn.create_model(path, **wrong)


def test_runs_begin_with_files_of_other_tasks(tmp_path):
    from visionattn.tasks import make_task

    path = str(tmp_path / "w.safetensors")
    source = dense_file(path, "test_van", "detection", fpn_channels=64)
    options = {
        "detection": ["--head", "retinanet", "--head_kwargs.fpn_channels", "64"],
        "segmentation": [],
        "classification": [],
    }
    for task, rest in options.items():
        for start in (["--model", "test_van", "--checkpoint", path], ["--model", path]):
            made = make_task(parse_train(["--task", task, *rest, *start])[0])
            model = made.create_model(7)
            assert_same_backbone(getattr(model, "inner", model), source)
            assert made.made == ("test_van", {})
    assert describe_file(path).task == "detection"
