"""Detectors and segmenters over every family, and other libraries' over ours."""

import re
import subprocess
import sys
from itertools import cycle

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from torchvision.models import detection

import visionattn
from visionattn.errors import UnknownArgumentError, VisionattnError
from visionattn.weights.layouts import load_pretrained

smp = pytest.importorskip("segmentation_models_pytorch")

ALL = visionattn.list_models()
TESTS = visionattn.list_models("test_*")
DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet", "fcos")
SEGMENTERS = ("upernet", "fpn", "segformer", "unet")
SIZES = [(64, 96), (61, 83)]
CLASSES = 3
SMALL_RCNN = {
    **{f"rpn_{which}_nms_top_n_{mode}": 40 for which in ("pre", "post") for mode in ("train", "test")},
    "box_batch_size_per_image": 32,
    "box_detections_per_img": 5,
    "box_score_thresh": 0.0,
}
SMALL_ONE_STAGE = {"detections_per_img": 5, "topk_candidates": 40, "score_thresh": 0.0}


def every_family(heads):
    """(backbone, head) pairs: each family with one head in turn, and with the others in the slow tests."""
    quick = dict(zip(TESTS, cycle(heads), strict=False))
    return [
        pytest.param(name, head, marks=() if quick[name] == head else pytest.mark.slow)
        for name in TESTS
        for head in heads
    ]


def create_detector(name, head, num_classes=CLASSES, **kwargs):
    small = SMALL_RCNN if "rcnn" in head else SMALL_ONE_STAGE
    return visionattn.create_detector(name, head, num_classes, fpn_channels=64, **{**small, **kwargs})


def create_segmenter(name, head, num_classes=CLASSES, **kwargs):
    width = {"decoder_channels": 32} if head == "upernet" else {}
    return visionattn.create_segmenter(name, head, num_classes, **{**width, **kwargs})


def scene(height, width):
    """An image and its objects, the second of which lies at the border."""
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 30.0, width, height]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return torch.randn(3, height, width), {"boxes": boxes, "labels": torch.tensor([1, CLASSES]), "masks": masks}


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name, head", every_family(DETECTORS))
def test_detectors_train_and_evaluate(name, head):
    model = create_detector(name, head).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    for size in SIZES:
        images, targets = zip(*(scene(*size) for _ in range(2)), strict=True)
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values()) and without_gradient(model) == []
        optimizer.step()
    with torch.no_grad():
        results = model.eval()([torch.randn(3, *size) for size in SIZES])
    for (height, width), found in zip(SIZES, results, strict=True):
        assert 0 < len(found["boxes"]) == len(found["scores"]) <= 5
        assert found["boxes"].min() >= 0 and (found["boxes"].amax(0) <= torch.tensor([width, height] * 2)).all()
        assert set(found["labels"].tolist()) <= {1, 2, 3}
        if head == "mask_rcnn":
            assert found["masks"].shape == (len(found["boxes"]), 1, height, width)


@pytest.mark.parametrize("name, head", every_family(SEGMENTERS))
def test_segmenters_train_and_evaluate(name, head):
    model = create_segmenter(name, head, auxiliary=True).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    for size in SIZES:
        target = torch.randint(CLASSES, (2, *size))
        outputs = model(torch.randn(2, 3, *size))
        assert [output.shape for output in outputs] == [(2, CLASSES, *size)] * 2
        optimizer.zero_grad()
        sum(F.cross_entropy(output, target) for output in outputs).backward()
        assert without_gradient(model) == []
        optimizer.step()
        with torch.no_grad():
            logits = model.eval()(torch.randn(1, 3, *size))
        assert logits.shape == (1, CLASSES, *size) and logits.isfinite().all()
        model.train()


@pytest.mark.parametrize("name, head", [(name, "fcos") for name in TESTS] + [("test_dinat", "mask_rcnn")])
def test_what_is_found_does_not_depend_on_the_batch(name, head):
    model = create_detector(name, head).eval()
    images = [torch.randn(3, *size) for size in [(61, 83), (64, 96), (90, 70), (64, 96), (33, 40), (20, 130)]]
    with torch.no_grad():
        together, alone = model(images), [model([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert len(a["boxes"]) == 5
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("head", DETECTORS)
def test_labels_count_from_one(head):
    model = create_detector("test_van", head)
    scores = model.roi_heads.box_predictor.cls_score if "rcnn" in head else model.head.classification_head.cls_logits
    with torch.no_grad():
        scores.weight.zero_()
        scores.bias.view(-1, CLASSES + ("rcnn" in head)).copy_(torch.tensor([-9.0] * ("rcnn" in head) + [-9, -9, 9]))
        found = model.eval()([torch.randn(3, 64, 64)])[0]
        assert set(found["labels"].tolist()) == {3}
        image, target = scene(64, 64)
        losses = []
        for label in (3, 1):
            torch.manual_seed(0)
            target["labels"] = torch.tensor([label, label])
            losses.append(sum(model.train()([image], [target]).values()))
    assert losses[0] < losses[1]


def test_images_keep_their_size_unless_asked():
    seen = []
    for kwargs in ({}, {"min_size": 128, "max_size": 160}):
        model = create_detector("test_van", "fcos", **kwargs).eval()
        model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            found = model([torch.ones(3, 40, 60)])[0]
        assert found["boxes"].amax(0).tolist() <= [60, 40] * 2
    assert [tuple(x.shape[2:]) for x in seen] == [(64, 64), (128, 160)]
    assert (
        seen[0][..., :40, :60].eq(1).all() and seen[0].sum() == 3 * 40 * 60
    )  # not normalised again, padded with zeros


@pytest.mark.parametrize("name", TESTS)
def test_maps_are_normalised_as_published(name):
    """By a norm of each stage that is used, where the family's models for dense prediction have some."""
    maps = create_segmenter(name, "fpn").encoder
    norms = maps.backbone.feature_norms if maps.pyramid is None else None
    if maps.pyramid is not None or maps.backbone.feature_norm is None:
        assert norms is None
    else:
        kind = torch.nn.BatchNorm2d if name == "test_patnet" else torch.nn.LayerNorm
        assert [type(norm) for norm in norms] == [next(c for c in type(norms[0]).__mro__ if issubclass(c, kind))] * 4
        maps = create_detector(name, "retinanet").backbone.maps  # of strides 8, 16, 32
        assert {n.split(".")[1] for n, _ in maps.backbone.named_parameters() if "feature_norms" in n} == set("123")
    channels = maps.channels
    x = torch.randn(2, 3, 64, 96)
    for stride, width, feature in zip((4, 8, 16, 32)[-len(channels) :], channels, maps(x), strict=True):
        assert feature.shape == (2, width, 64 // stride, 96 // stride)


def test_norms_are_of_the_maps_that_features_only_gives():
    maps = create_segmenter("test_dinat", "fpn").encoder.eval()
    plain = visionattn.create_model("test_dinat", features_only=True).eval()
    plain.load_state_dict(
        {k.replace("stages.", "stages_"): v for k, v in maps.backbone.state_dict().items() if k[:8] != "feature_"}
    )
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for normalised, feature in zip(maps(x), plain(x), strict=True):
            expected = F.layer_norm(feature.movedim(1, 3), feature.shape[1:2]).movedim(3, 1)
            torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, kwargs", [("test_convit", {}), ("convit_tiny", {}), ("convit_tiny", {"patch_size": 32})]
)
def test_simple_pyramid(name, kwargs):
    with torch.device("meta"):
        maps = create_segmenter(name, "fpn", backbone_kwargs=kwargs).encoder
        features = maps(torch.empty(1, 3, 128, 96))
    assert [tuple(f.shape[1:]) for f in features] == [
        (width, 128 // stride, 96 // stride) for width, stride in zip(maps.channels, (4, 8, 16, 32), strict=True)
    ]


QUICK = {*TESTS, "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small", "focalnet_tiny_iso", "convit_tiny"}
QUICK |= {"illama_tiny", "halonet26t", "haloregnetz_b", "davit_base_fl", "patnet_t2_full"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_any_backbone_builds(name):
    kwargs = {"patch_size": 4} if name == "pyramid_xsmall" else {}
    with torch.device("meta"):
        detector = visionattn.create_detector(name, "mask_rcnn", 80, backbone_kwargs=kwargs).train()
        maps = detector.backbone(torch.empty(2, 3, 128, 160))
        segmenter = visionattn.create_segmenter(name, "upernet", 150, backbone_kwargs=kwargs).train()
        logits = segmenter(torch.empty(2, 3, 100, 130))
    assert isinstance(detector, detection.MaskRCNN)
    strides = [128 // level.shape[2] for level in maps.values()]
    assert strides == [4, 8, 16, 32, 64] and {level.shape[1] for level in maps.values()} == {256}
    assert logits.shape == (2, 150, 100, 130)


def test_maps_that_are_too_fine_are_told_of():
    with pytest.raises(VisionattnError, match=r"got one with \[1, 2, 4, 8\]: make it with patch_size=4"):
        visionattn.create_segmenter("pyramid_xsmall", "fpn", 5)


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("create, head", [(create_detector, "fcos"), (create_segmenter, "fpn")])
def test_layer_groups(name, create, head):
    model = create(name, head)
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= names.keys()
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {n: scale[id(p)] for n, p in names.items() if p.requires_grad}
    inside = f"{model.backbone_name}."
    assert {s for n, s in scales.items() if not n.startswith(inside)} == {1.0}
    assert scales[f"{inside}{model.inner.first_conv}.weight"] == min(scales.values()) < 0.2
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {decays[id(names[n])] for n in model.no_weight_decay()} <= {0.0}


def test_the_backbone_s_own_rates_and_schedules():
    model = create_segmenter("test_litv2", "fpn")
    assert list(model.learning_rates()) == ["encoder.backbone.stages.*.downsample.offset.weight"]
    kwargs = {"soft_mask_rate": 0.5, "soft_mask_epochs": 10.0}
    model = create_detector("test_illama", "fcos", backbone_kwargs=kwargs)
    model.advance(5.0)
    assert model.inner.scheduled_rate == 0.5


def published(state_dict):
    """The official layout of DiNAT's detectors."""
    rules = [(r"^stem", "patch_embed"), (r"^feature_norms\.(\d)", r"norm\1"), (r"\.mixer\.", ".attn.")]
    rules += [(r"^stages\.(\d)\.downsample", lambda m: f"levels.{int(m[1]) - 1}.downsample")]
    rules += [(r"^stages\.(\d)\.blocks", r"levels.\1.blocks"), (r"ls(\d)\.gamma", r"gamma\1")]
    out = {"neck.convs.weight": torch.ones(1)}
    for key, value in state_dict.items():
        for rule in rules:
            key = re.sub(*rule, key)
        out[f"backbone.{key}"] = value
    return {"state_dict": out}


def test_published_checkpoints_of_detectors_and_classifiers(tmp_path):
    first = create_detector("test_dinat", "faster_rcnn")
    for norm in first.inner.feature_norms:
        torch.nn.init.normal_(norm.weight)
    torch.save(published(first.inner.state_dict()), tmp_path / "detector.pth")
    options = {"checkpoint_path": str(tmp_path / "detector.pth")}
    second = create_segmenter("test_dinat", "fpn", backbone_kwargs=options)
    expected = first.inner.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in second.inner.state_dict().items())
    third = create_detector("test_dinat", "retinanet", backbone_kwargs=options)  # without the norm of stride 4
    assert third.inner.state_dict().keys() == {k for k in expected if not k.startswith("feature_norms.0.")}
    assert torch.equal(third.inner.feature_norms[3].weight, expected["feature_norms.3.weight"])

    classifier = visionattn.create_model("test_dinat")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    options = {"checkpoint_path": str(tmp_path / "classifier.pth")}
    state = create_segmenter("test_dinat", "fpn", backbone_kwargs=options).inner.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in classifier.state_dict().items() if k in state)
    assert all(v.eq("weight" in k).all() for k, v in state.items() if k.startswith("feature_norms"))


@pytest.mark.parametrize("create, head", [(create_detector, h) for h in DETECTORS] + [(create_segmenter, "fpn")])
def test_other_classes_keep_everything_but_their_scores(create, head):
    first = create("test_van", head).state_dict()
    second = create("test_van", head, num_classes=5)
    load_pretrained(second, first)
    state = second.state_dict()
    changed = {k for k, v in first.items() if not (v.shape == state[k].shape and torch.equal(v, state[k]))}
    assert changed and all(k.startswith(second.classifier) for k in changed)


def test_boxes_keep_their_precision_under_autocast():
    for head in DETECTORS:
        model = create_detector("test_van", head)
        image, target = scene(61, 83)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(loss.dtype == torch.float32 for loss in model.train()([image], [target]).values())
            with torch.no_grad():
                found = model.eval()([image])[0]
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_memory_formats_and_gradient_checkpointing_change_nothing():
    model = create_segmenter("test_davit", "upernet").train()
    x = torch.randn(2, 3, 61, 83)
    expected = model(x)
    expected.sum().backward()
    gradient = model.inner.stem.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    out = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.inner.stem.proj.weight.grad, gradient, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "name", ["test_dinat", *(pytest.param(n, marks=pytest.mark.slow) for n in TESTS if n != "test_dinat")]
)
def test_compile(name):
    torch._dynamo.reset()
    detector, segmenter = create_detector(name, "fcos").eval(), create_segmenter(name, "upernet").eval()
    image = torch.randn(3, 61, 83)
    with torch.no_grad():
        found, logits = detector([image])[0], segmenter(image[None])
        for model in (detector, segmenter):
            model.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(detector([image])[0], found)
        torch.testing.assert_close(segmenter(image[None]), logits)


@pytest.mark.parametrize(
    "create, kwargs, message",
    [
        ("create_detector", {"head": "cascade"}, "expected head one of faster_rcnn, mask_rcnn, retinanet, fcos, got"),
        ("create_detector", {"head": "fcos", "box_score_thresh": 0.1}, "fcos got unknown arguments box_score_thresh"),
        ("create_detector", {"head": "fcos", "fpn_channels": 32}, "expected fpn_channels of 64"),
        ("create_detector", {"head": "fcos", "anchor_sizes": (8, 16)}, "expected anchor_sizes of 5 levels, got 2"),
        ("create_segmenter", {"head": "upernett"}, "expected head one of upernet, fpn, segformer, unet, got"),
        ("create_segmenter", {"head": "fpn", "decoder_channels": 8}, "fpn got unknown arguments decoder_channels"),
        ("create_segmenter", {"head": "fpn", "backbone_kwargs": {"num_classes": 3}}, "takes no num_classes"),
        ("create_segmenter", {"head": "fpn", "backbone": "test_convit", "backbone_kwargs": {"patch_size": 6}}, "got 6"),
        ("create_segmenter", {"head": "fpn", "backbone": "dinat_minu"}, "unknown model dinat_minu; did you mean"),
    ],
)
def test_requests_that_cannot_be_met(create, kwargs, message):
    with pytest.raises(VisionattnError, match=message) as caught:
        getattr(visionattn, create)(**{"backbone": "test_van", "num_classes": 3, **kwargs})
    assert isinstance(caught.value, UnknownArgumentError) == ("unknown arg" in message or "takes no" in message)


def test_import_stays_light():
    code = "import sys, visionattn; assert 'segmentation_models_pytorch' not in sys.modules, 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_segmentation_models_pytorch_takes_our_names():
    model = smp.UPerNet("tu-dinat_mini", encoder_weights=None, classes=5).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.encoder.model.stem.proj[0].weight.clone()
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.randint(5, (2, 64, 64))).backward()
    optimizer.step()
    assert type(model.encoder.model.stem).__module__ == "visionattn.models.dinat"
    assert not torch.equal(model.encoder.model.stem.proj[0].weight, before)


def test_hugging_face_takes_our_names():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(backbone="test_dinat", use_pretrained_backbone=False, out_indices=[3])
    sizes = {
        f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    config = transformers.DetrConfig(backbone_config=backbone, d_model=32, num_queries=5, num_labels=3, **sizes)
    model = transformers.DetrForObjectDetection(config)
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    out = model(torch.randn(2, 3, 64, 96), labels=[label] * 2)
    out.loss.backward()
    assert out.logits.shape == (2, 5, 4) and without_gradient(model) == []
