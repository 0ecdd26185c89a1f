"""Arguments that cannot be met together, or that a script takes under another name: one line each."""

import json
from pathlib import Path

import pytest
import timm
import torch

import visionattn
from visionattn.backbone import Hierarchical
from visionattn.errors import UnknownArgumentError, VisionattnError
from visionattn.registry import find
from visionattn.tasks import make_task
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import options_of, validate
from visionattn.weights.files import DESCRIPTION, write_checkpoint


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("test_dinat", {"depths": (3, 3, 3, 3)}),
        ("test_dinat", {"num_heads": None}),
        ("test_halonet", {"num_heads": 0}),
        ("test_van", {"embed_dims": (0, 0, 0, 0)}),
        ("test_davit", {"embed_dims": (8, 8, 8, 7)}),
        ("test_illama", {"num_heads": 5}),
        ("test_convit", {"patch_size": 0}),
        ("test_hornet", {"base_dim": -8}),
    ],
)
def test_arguments_that_do_not_go_together(name, kwargs):
    key = next(iter(kwargs))
    with pytest.raises(VisionattnError, match=rf"^{name} cannot be made with {key}=.*, num_classes=3 \("):
        visionattn.create_model(name, **kwargs, num_classes=3)
    with pytest.raises(VisionattnError, match=rf"^{name} cannot be made with {key}="):
        visionattn.create_detector(name, "fcos", 3, backbone_kwargs=kwargs)


@pytest.mark.parametrize("name", visionattn.list_models("test_*"))
def test_numbers_of_stages(name):
    """A list of one more stage than the others, or one less, is told of in words."""
    _, _, entry = find(name)
    lists = {key: tuple(value) for key, value in entry.variant.kwargs.items() if isinstance(value, tuple | list)}
    if not issubclass(entry.takes, Hierarchical) or len(lists) < 2:  # one list may be as long as one likes
        return
    for key, value in lists.items():
        for other in (value[:-1], value + value[-1:]):
            with torch.device("meta"), pytest.raises(VisionattnError, match="of one length|of (the )?. stages"):
                visionattn.create_model(name, **{key: other})


@pytest.mark.parametrize("head", ["fcos", "faster_rcnn"])
def test_pyramids_have_channels(head):
    with pytest.raises(VisionattnError, match="fpn_channels from 1 up, got 0"):
        visionattn.create_detector("test_van", head, 3, fpn_channels=0)


@pytest.mark.parametrize(
    "key, told",
    [
        ("name", "--model"),
        ("pretrained", "--pretrained"),
        ("features_only", "the whole model"),
        ("checkpoint_path", "--checkpoint"),
        ("device", "accelerate"),
        ("dtype", "--precision"),
    ],
)
def test_arguments_that_options_stand_for(key, told):
    with pytest.raises(VisionattnError, match=rf"^model_kwargs\.{key} .*{told}"):
        make_task(parse_train(["--model_kwargs", f'{{"{key}": "1"}}'])[0])


def test_scripts_choose_among_the_weights_of_a_file(tmp_path):
    student, teacher = (visionattn.create_model("test_van", num_classes=10).state_dict() for _ in range(2))
    path = tmp_path / "both.pth"
    torch.save({"student": student, "teacher": teacher}, path)
    options = ["--model", "test_van", "--checkpoint", str(path), "--model_kwargs.checkpoint_prefix"]
    for task, rest in (("classification", []), ("segmentation", ["--head", "fpn"])):
        for prefix, weights in (("student", student), ("teacher", teacher)):
            task_of = make_task(parse_train(["--task", task, *rest, *options, prefix])[0])
            model = task_of.create_model(10)
            assert torch.equal(getattr(model, "inner", model).stem.proj.weight, weights["stem.proj.weight"])
            assert task_of.made == ("test_van", {})
    figures = [
        validate(parse_validate([*options, prefix, "--model_kwargs.num_classes", "10"], options_of))["loss"]
        for prefix in ("student", "teacher")
    ]
    assert figures[0] != figures[1]


def test_files_may_be_given_as_paths(tmp_path):
    model = visionattn.create_model("test_van", num_classes=3)
    header = {DESCRIPTION: json.dumps({"model": "test_van", "model_kwargs": {"num_classes": 3}})}
    write_checkpoint(path := Path(tmp_path, "w.safetensors"), model.state_dict(), header)
    assert torch.equal(visionattn.create_model(path).head.weight, model.head.weight)
    detector = visionattn.create_detector(path, "fcos", 2, fpn_channels=64)
    assert torch.equal(detector.inner.stem.proj.weight, model.stem.proj.weight)


def test_headers_ask_for_images_that_can_be_made(tmp_path):
    model = visionattn.create_model("test_van", num_classes=10)
    header = {
        "model": "test_van",
        "model_kwargs": {"num_classes": 10},
        "data": {"name": "digits", "img_size": 2**14 - 1},
    }
    write_checkpoint(path := tmp_path / "w.safetensors", model.state_dict(), {DESCRIPTION: json.dumps(header)})
    with pytest.raises(VisionattnError, match="entry data.img_size is 16383, more than its tensors allow"):
        parse_validate(["--checkpoint", str(path)], options_of)


@pytest.mark.parametrize(
    "kwargs, told",
    [
        ({"features_only": True, "out_indices": 2.0}, "out_indices as an integer or a list, got 2.0"),
        ({"features_only": True, "output_fmt": 3}, "output_fmt as a text, got 3"),
        ({"features_only": "yes"}, "features_only as true or false, got 'yes'"),
        ({"pretrained_cfg": 3}, "pretrained_cfg as a text or a mapping or PretrainedCfg or null, got 3"),
        ({"pretrained_cfg_overlay": 3}, "pretrained_cfg_overlay as a mapping or null, got 3"),
        ({"cache_dir": 3}, "cache_dir as a text or PathLike or null, got 3"),
    ],
)
@pytest.mark.parametrize("create", [visionattn.create_model, timm.create_model])
def test_arguments_of_the_builder_have_types_too(create, kwargs, told):
    name = "test_van" if create is visionattn.create_model else "va_test_van"
    with pytest.raises(UnknownArgumentError, match=f"^test_van takes {told}$"):
        create(name, **kwargs)


def test_names_are_texts_or_paths():
    for name in (None, 3, ["test_van"]):
        with pytest.raises(UnknownArgumentError, match="create_model takes name as a text or PathLike, got"):
            visionattn.create_model(name)
