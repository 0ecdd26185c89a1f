"""What models keep between calls changes no result: whichever thread, mode, device or transform they are called in."""

import copy
import gc
import pickle
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap
from torchvision.models.detection.anchor_utils import AnchorGenerator

import visionattn
from visionattn import create_detector, create_segmenter
from visionattn.heads.detector import Anchors
from visionattn.layers import (
    CausalSelfAttention,
    HaloAttention2d,
    HiLoAttention,
    NeighborhoodAttention2d,
    PartialSelfAttention,
    WindowAttention2d,
    size_constant,
)
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


def test_what_depends_on_no_parameter_is_kept_on_every_device(kept):
    built = []

    @size_constant.size_constant
    def table(length, device):
        built.append(1)
        return [torch.ones(length, device=device), None]

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert [table(3, device)[0].device.type for device in ("meta", "meta", "cpu", "cpu")] == ["meta"] * 2 + [
                "cpu"
            ] * 2
    assert len(built) == 2


def test_a_graph_takes_several_tensors_of_a_function(kept):
    table, other = size_constant.size_constant(torch.ones), size_constant.size_constant(torch.zeros)
    graph = torch.compile(lambda x: x + table(3) + table(1) + other(3), fullgraph=True, backend="aot_eager")
    assert graph(torch.ones(3)).tolist() == [3.0] * 3


def test_only_results_of_moderate_size_are_kept(monkeypatch):
    monkeypatch.setattr(ParameterCache, "max_bytes", 16)
    cache, p, built = ParameterCache(), torch.zeros(1), []
    with torch.no_grad():
        for length in (3, 3, 4, 4):
            cache(length, [p], lambda: built.append(1) or (torch.ones(length),))  # noqa: B023
    assert len(built) == 3


@pytest.fixture
def kept(monkeypatch):
    """What is kept by size: nothing at first, and up to a MiB in all."""
    monkeypatch.setattr(size_constant, "MAX_BYTES", 2**20, raising=False)
    monkeypatch.setattr(size_constant, "_kept", OrderedDict())
    return size_constant._kept


@pytest.fixture
def mixers():
    """Layers whose tiles, buckets, masks or tables depend on the size of their maps (B, 8, H, W)."""
    maps = [HaloAttention2d(8, num_heads=2, block_size=4, halo_size=1), PartialSelfAttention(8, n_div=2, num_heads=2)]
    others = [NeighborhoodAttention2d(8, 2, 3, rel_pos_bias=bias) for bias in (True, False)]
    others += [WindowAttention2d(8, 2, 3), HiLoAttention(8, 2), CausalSelfAttention(8, 2)]
    return nn.ModuleList([*maps, *others]).eval()


def mixed(mixers, size, x=None):
    """The output of every layer on a map of that size, as one vector."""
    x = torch.linspace(-1, 1, 8 * size[0] * size[1]).view(1, 8, *size).sin() if x is None else x
    maps, others = mixers[:2], mixers[2:-1]
    outs = [layer(x) for layer in maps] + [layer(x.movedim(1, 3)) for layer in others]
    return torch.cat([out.flatten() for out in (*outs, mixers[-1](x.flatten(2).transpose(1, 2)))])


def bytes_of_tensors():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


SIZES = [(5 + i % 14, 5 + i // 14) for i in range(200)]


def test_many_sizes_take_bounded_memory(kept, mixers):
    """As training at many scales calls for; in inference mode and from threads as well."""
    before = bytes_of_tensors()
    with torch.no_grad():
        expected = [mixed(mixers, size) for size in SIZES]
    used = sum(out.nbytes for out in expected)
    of_parameters = 2**19  # what the layers keep of these
    assert bytes_of_tensors() - before - used < size_constant.MAX_BYTES + of_parameters
    assert 2**19 < sum(size for _, size in kept.values()) <= 2**20

    with torch.inference_mode():
        for size, out in zip(SIZES[::20], expected[::20], strict=True):
            assert torch.equal(mixed(mixers, size), out)
    found = in_threads(no_grad(lambda size: mixed(mixers, size)), SIZES[::10])
    assert all(map(torch.equal, found, expected[::10]))
    assert bytes_of_tensors() - before - 1.1 * used < size_constant.MAX_BYTES + of_parameters
    mixed(mixers, SIZES[-20]).sum().backward()  # on what inference mode has made
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixers.parameters())


def test_what_was_used_last_is_kept(monkeypatch, kept):
    monkeypatch.setattr(size_constant, "MAX_BYTES", 40)
    built = []
    table = size_constant.size_constant(lambda length: built.append(length) or torch.ones(length))
    for length in (4, 4, 5, 4, 3, 4, 5, 11, 11):
        table(length)
    assert built == [4, 5, 3, 5, 11, 11]


@pytest.mark.parametrize("mode", ["vmap", "grad", "functionalize", "fake", "make_fx", "export", "jit"])
def test_tracers_and_transforms_leave_nothing_behind(mode, kept, mixers):
    """Nor copies of a module, which has none of it."""
    size = 7, 9
    x = torch.randn(1, 8, *size)
    with torch.no_grad():
        expected = mixed(mixers, size, x)
    kept.clear()

    def call(x):
        return mixed(mixers, size, x)

    if mode == "vmap":
        vmap(call)(x[None])
    elif mode == "grad":
        mixers.requires_grad_(False)  # torch has no gradient of parameters within a transform here
        torch.func.grad(lambda x: call(x).sum())(x)
        mixers.requires_grad_()
    elif mode == "functionalize":
        torch.func.functionalize(call)(x)
    elif mode == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            call(fake.from_tensor(x))
    elif mode == "make_fx":
        torch.fx.experimental.proxy_tensor.make_fx(call, tracing_mode="real")(x)
    elif mode == "export":
        torch.export.export(mixers[2], (x.movedim(1, 3),), strict=False)
    else:
        torch.compile(mixers[2], backend="eager", fullgraph=True)(x.movedim(1, 3))
    with torch.no_grad():
        assert torch.equal(call(x), expected)
    call(x).sum().backward()
    with torch.no_grad():
        assert torch.equal(mixed(pickle.loads(pickle.dumps(copy.deepcopy(mixers))), size, x), expected)


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
