"""What every registered model keeps to besides timm's contract: any input size, every execution mode."""

import copy

import pytest
import torch
from numerics import assert_half_precision, filled
from test_contract import QUICK
from timm.layers import LayerNorm2d
from timm.models._features_fx import create_feature_extractor
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_feature_extractor

import visionattn
from visionattn.errors import VisionattnError

TESTS = visionattn.list_models("test_*")
SIZES = [(32, 32), (97, 61), (224, 320), (333, 500)]


def image(*size, batch=2, chans=3, **kwargs):
    return torch.randn(batch, chans, *(size or (32, 32)), **kwargs)


def model_on_meta(name, **kwargs):
    with torch.device("meta"):
        return visionattn.create_model(name, **kwargs)


def side(name, length, reduction):
    """Positions along an axis of a map: families differ in what they make of pixels that are over."""
    if name in ("test_hornet", "test_patnet"):  # drop them
        return length // reduction
    if name == "test_litv2":
        return -(-length // 4) // (reduction // 4)
    if name == "test_focalnet":
        return -(-((length + 1) // 4) // (reduction // 4))
    return -(-length // reduction)


def trained(model):
    """Parameters that the loss of a task trains: a model freezes the others itself."""
    return [p for p in model.parameters() if p.requires_grad]


def lively(name, **kwargs):
    return filled(visionattn.create_model(name, **kwargs))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def rounding(x):
    return 1e-5 * max(1, x.abs().max().item())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TESTS)
def test_any_size(name, size):
    # Sparsifiner's attention is of all places.
    shallow, first = ({"depth": 1}, {"out_indices": 1}) if name == "test_sparsifiner" else ({}, {})
    model = lively(name, **shallow)
    extractor = visionattn.create_model(name, features_only=True, **shallow, **first).eval()
    x = image(*size)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 1000) and out.isfinite().all()
        for feature, reduction in zip(extractor(x), extractor.feature_info.reduction(), strict=True):
            assert feature.shape[2:] == tuple(side(name, length, reduction) for length in size)
        assert torch.equal(model(x), out)
        if any(getattr(layer, "by_rank", False) for layer in model.modules()):  # which last digits may turn
            model, x = model.double(), x.double()
            out = model(x)
        close(torch.cat([model(image_[None]) for image_ in x]), out, rounding(out))  # samples do not see each other


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("features_only", [False, True])
def test_too_small_an_input_is_refused(name, features_only):
    model = visionattn.create_model(name, features_only=features_only)
    smallest = visionattn.create_model(name).check.size
    model(image(smallest, smallest))
    with pytest.raises(VisionattnError, match=f"{name} expects at least {smallest} x {smallest} input, got"):
        model(image(smallest - 1, 64))


@pytest.mark.parametrize("name", TESTS)
def test_gradient_checkpointing_changes_nothing(name):
    plain = lively(name, drop_path_rate=0.2).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x, outs = image(batch=4), []
    for model in (plain, saving):
        torch.manual_seed(1)
        outs.append(model(x))
        outs[-1].square().mean().backward()
    close(*outs)
    for a, b in zip(trained(plain), trained(saving), strict=True):
        close(a.grad, b.grad, atol=rounding(a.grad))
    for (n, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=n)


@pytest.mark.parametrize("name", TESTS)
def test_execution_modes_agree(name):
    model = lively(name)
    x = image(64, 96)
    with torch.no_grad():
        expected = model(x)
        close(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)
        with torch.inference_mode():
            close(model(x), expected)
        close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TESTS)
def test_half_precision_costs_what_rounding_does(name, dtype):
    assert_half_precision(lively(name), image(64, 96), dtype)


@pytest.mark.parametrize("name", TESTS)
def test_no_images(name):
    model = lively(name)
    out = model(image(64, 48, batch=0))
    assert out.shape == (0, 1000)
    out.sum().backward()
    with torch.no_grad():
        assert model(image(64, 48, batch=0)).shape == (0, 1000)


@pytest.mark.parametrize("name", ["test_van", "test_agent_attention", "test_agent_deit"])
def test_images_too_small_to_be_made_for(name):
    least = visionattn.create_model(name).check.size
    with pytest.raises(VisionattnError, match=f"{name} expects an img_size of at least {least}, got {least - 1}"):
        visionattn.create_model(name, img_size=least - 1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TESTS)
def test_compile(name, backend):
    torch._dynamo.reset()
    model = lively(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    x = image(64, 48)
    outs, gradients = [], []
    for run in (model, compiled):
        outs.append(run(x))
        gradients.append(torch.autograd.grad(outs[-1].sum(), trained(model)))
    atol = rounding(outs[0])  # eager layers may round otherwise than their graphs
    close(*outs, atol)
    for theirs, ours in zip(*gradients, strict=True):
        close(ours, theirs, atol=1e-4 * max(1, theirs.abs().max().item()))
    if backend == "aot_eager":  # captured alone: nothing depends on the size after that
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    x = image(33, 70)  # by a graph of its own
    with torch.no_grad():
        close(compiled(x), model(x), atol)


@pytest.mark.parametrize("name", TESTS)
def test_export(name):
    model = lively(name)
    exported = torch.export.export(model, (image(64, 48),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    x = image(64, 48, batch=3)
    with torch.no_grad():
        expected = model(x)
        close(exported(x), expected, rounding(expected))
        close(expected, lively(name)(x))  # exporting left nothing behind in the caches


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("create", [create_feature_extractor, torchvision_feature_extractor])
def test_symbolic_tracing(name, create):
    model = lively(name)
    node = model.feature_info[1]["module"]
    x = image(64, 48)
    graph = create(model, {"head": "logits", node: "feature"})
    out = graph(x)
    close(out["logits"], model(x), rounding(out["logits"]))
    found, expected = (torch.autograd.grad(run.square().sum(), trained(model)) for run in (out["logits"], model(x)))
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, atol=rounding(theirs))
    features = []
    model.get_submodule(node).register_forward_hook(lambda module, args, feature: features.append(feature))
    model(x)
    close(out["feature"], features[0], atol=rounding(features[0]))


@pytest.mark.parametrize("name", TESTS)
def test_factory_arguments(name):
    model = visionattn.create_model(name, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(image(dtype=torch.float64)).dtype == torch.float64
    with torch.device("meta"):
        assert {p.device.type for p in visionattn.create_model(name).parameters()} == {"meta"}


@pytest.mark.parametrize("name", TESTS)
def test_rates(name):
    x, last = image(), copy.deepcopy(visionattn.create_model(name).state_dict())
    for rate in ("drop_rate", "drop_path_rate"):
        model = filled(visionattn.create_model(name, **{rate: 0.5}))
        assert model.state_dict().keys() == last.keys()
        expected = lively(name)(x)
        assert torch.equal(model(x), expected)
        # Batch norm in training mode is another model, dropped or not.
        for module in model.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert not torch.allclose(model(x), expected, atol=1e-3), rate


def norms(model, *kinds):
    return {m.eps for m in model.modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("name", sorted(QUICK))
def test_activations_are_exact_gelu(name):
    assert {m.approximate for m in model_on_meta(name).modules() if isinstance(m, nn.GELU)} <= {"none"}


def test_norm_epsilons():
    """The goldens cannot tell these apart."""
    for name in ("dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"):
        assert norms(model_on_meta(name), nn.LayerNorm) == {1e-5}
    van = model_on_meta("van_b0")
    assert norms(van, LayerNorm2d) == {1e-6} and norms(van, nn.BatchNorm2d) == {1e-5}
    assert norms(model_on_meta("convit_tiny"), nn.LayerNorm) == {1e-6}
