"""What models keep between calls changes no result: whichever thread, mode, device or transform they are called in."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torchvision.models.detection.anchor_utils import AnchorGenerator

import visionattn
from visionattn import create_detector, create_segmenter
from visionattn.heads.detector import Anchors
from visionattn.layers import NeighborhoodAttention2d
from visionattn.layers.cache import ParameterCache

TESTS = visionattn.list_models("test_*")
SMALL = {"fpn_channels": 16, "rpn_post_nms_top_n_test": 10, "box_score_thresh": 0.0, "box_detections_per_img": 5}


def classifier(name):
    return visionattn.create_model(name, num_classes=3)


def extractor(name):
    return visionattn.create_model(name, features_only=True)


def detector(name):
    return create_detector(name, "faster_rcnn", 3, **SMALL)


def fcos(name):
    return create_detector(name, "fcos", 3, fpn_channels=64, score_thresh=0.0, detections_per_img=5)


def segmenter(name):
    return create_segmenter(name, "fpn", 3, pyramid_channels=32, segmentation_channels=32)


OTHERS = [(make, name) for make in (extractor, detector, segmenter) for name in ("test_dinat", "test_convit")]
MODELS = [pytest.param(make, name, id=f"{name}-{make.__name__}") for make, name in OTHERS]
MODELS += [pytest.param(classifier, name, id=name) for name in TESTS]


def in_threads(call, arguments, threads=4):
    """`call` of every argument, all threads starting together and giving way to each other at any moment."""
    start, interval = Barrier(threads), sys.getswitchinterval()

    def work(mine):
        start.wait()
        return [call(argument) for argument in mine]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            shares = list(pool.map(work, [arguments[i::threads] for i in range(threads)]))
    finally:
        sys.setswitchinterval(interval)
    return [shares[i % threads][i // threads] for i in range(len(arguments))]


def no_grad(model):
    def call(x):
        with torch.no_grad():  # a thread has a mode of its own
            return model(x)

    return call


@pytest.mark.parametrize("calls", [64, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make, name", MODELS)
def test_threads_get_what_one_thread_gets(make, name, calls):
    model = make(name).eval()
    images = [torch.randn(1, 3, *size) for size in ((32, 64), (64, 32), (64, 64), (32, 64), (33, 47), (64, 32))]
    call = no_grad(model)
    expected = [call(image) for image in images]
    chosen = [i % len(images) for i in range(calls)]
    for i, found in zip(chosen, in_threads(call, [images[i] for i in chosen]), strict=True):
        torch.testing.assert_close(found, expected[i], rtol=0, atol=0)


def test_a_cache_gives_each_thread_its_own():
    cache, parameters, keys = ParameterCache(), [torch.zeros(1)] * 20, [i % 3 for i in range(4000)]
    found = in_threads(no_grad(lambda key: cache(key, parameters, lambda: (torch.tensor(key),))), keys)
    assert [value.item() for (value,) in found] == keys


@pytest.mark.parametrize("make, name", [*MODELS, pytest.param(fcos, "test_davit", id="fcos")])
def test_a_model_trains_after_inference_mode(make, name):
    model = make(name)
    images = torch.randn(2, 3, 72, 180)  # a size that no other test has made tables for
    with torch.inference_mode():
        model.eval()(images)
    model.train()
    if make in (detector, fcos):
        targets = [{"boxes": torch.tensor([[3.0, 4, 40, 50]]), "labels": torch.tensor([1])}] * 2
        out = model(images, targets)
    else:
        out = model(images)
    values = out.values() if isinstance(out, dict) else out if isinstance(out, list) else [out]
    sum(value.sum() for value in values).backward()
    assert any(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def meta():
    return nn.Parameter(torch.zeros(2, device="meta"))


def inference(device):
    with torch.inference_mode():
        return torch.zeros(2, device=device)


@pytest.mark.parametrize(
    "make, write",
    [
        (lambda: nn.Parameter(torch.zeros(2)), lambda p: p.data.add_(1)),
        (lambda: inference("cpu"), lambda p: p.add_(1)),
        (meta, lambda p: p.data.add_(1)),
        (meta, lambda p: p.add_(1)),
        (meta, lambda p: setattr(p, "data", torch.ones(2, device="meta"))),
        (lambda: inference("meta"), lambda p: p.add_(1)),
        (lambda: inference("meta"), lambda p: torch._foreach_add_([p], 1)),
    ],
)
def test_every_write_is_noticed(make, write):
    cache, p, built = ParameterCache(), make(), []
    with torch.inference_mode(p.is_inference()), torch.no_grad():
        for _ in range(3):
            before = len(built)
            cache("size", [p], lambda: built.append(1) or p + 1)
            assert len(built) > before
            write(p)


def test_what_depends_on_no_parameter_is_kept_on_every_device():
    cache, built = ParameterCache(), []
    with torch.no_grad():
        for device in ("meta", "meta", "cpu", "cpu"):
            table = cache((3, device), [], lambda: built.append(1) or [torch.ones(3, device=device), None])[0]  # noqa: B023
            assert table.device.type == device
    assert len(built) == 2


def test_only_results_of_moderate_size_are_kept(monkeypatch):
    monkeypatch.setattr(ParameterCache, "max_bytes", 16)
    cache, built = ParameterCache(), []
    with torch.no_grad():
        for length in (4, 4, 5, 5):
            cache(length, [], lambda: built.append(1) or (torch.ones(length),))  # noqa: B023
    assert len(built) == 3


def test_ensembles_under_vmap_leave_nothing_behind():
    layers = [NeighborhoodAttention2d(8, 2, 3).eval() for _ in range(3)]
    x = torch.randn(1, 9, 9, 8)
    parameters, buffers = stack_module_state(layers)
    expected = torch.stack([layer(x) for layer in layers])
    with torch.no_grad():
        for _ in range(2):
            together = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
            torch.testing.assert_close(together, expected)
            torch.testing.assert_close(layers[0](x), expected[0])


def test_detectors_do_not_depend_on_their_first_image():
    """torchvision guesses the strides of the maps from it."""
    images = [torch.randn(3, 64, 64) for _ in range(2)]
    fresh, used = detector("test_van").eval(), detector("test_van").eval()
    used.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        used([torch.randn(3, 33, 33)])
        for ours, theirs in zip(used(images), fresh(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_anchors_depend_on_no_earlier_pass():
    """torchvision keeps them in the precision, on the device and in the mode that they were last in."""
    with torch.device("meta"):
        anchors = Anchors(((45, 1001),), ((0.5, 1.0),))
    expected = AnchorGenerator(((45, 1001),), ((0.5, 1.0),)).cell_anchors
    with torch.inference_mode():
        anchors.set_cell_anchors(torch.bfloat16, torch.device("cpu"))
        anchors.set_cell_anchors(torch.float32, torch.device("cpu"))
    torch.testing.assert_close(anchors.cell_anchors, expected, rtol=0, atol=0)
    assert not anchors.cell_anchors[0].is_inference()
