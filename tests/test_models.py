"""What every registered model keeps to: timm's model contract, any input size, every execution mode."""

import copy
import math

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from timm.models._features_fx import create_feature_extractor
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_feature_extractor

import visionattn
from visionattn.errors import VisionattnError

ALL = visionattn.list_models()
TESTS = visionattn.list_models("test_*")
# Every published variant in the slow tests; in the quick ones those that show something of their own.
QUICK = {*TESTS, "dinat_mini", "dinat_s_tiny", "vitrpb_small", "van_b0", "convit_tiny", "halonet26t", "haloregnetz_b"}
QUICK |= {"davit_tiny", "davit_base_fl", "attnet_xxs", "focalnet_tiny_srf", "focalnet_tiny_iso", "hornet_tiny_gf"}
QUICK |= {"litv2_small", "patnet_t0", "patnet_t2_full", "illama_tiny", "sparsifiner_deit_small", "sparsifiner_lvvit_s"}
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
SIZES = [(32, 32), (97, 61), (224, 320), (333, 500)]


def image(*size, batch=2, chans=3, **kwargs):
    return torch.randn(batch, chans, *(size or (32, 32)), **kwargs)


def model_on_meta(name, **kwargs):
    with torch.device("meta"):
        return visionattn.create_model(name, **kwargs)


def trained(model):
    """Parameters that the loss of a task trains: a model freezes the others itself."""
    return [p for p in model.parameters() if p.requires_grad]


def classifiers(cfg):
    """Names of the heads, the one that the features go to first."""
    return (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_every_parameter(name):
    model = model_on_meta(name, num_classes=42).train()
    out = model(image(64, 96, device="meta"))
    assert out.shape == (2, 42)
    out.sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", EVERY)
def test_pretrained_cfg_and_classifier(name):
    model = model_on_meta(name)
    cfg, keys = model.pretrained_cfg, model.state_dict().keys()
    assert model.default_cfg is cfg
    assert f"{cfg['first_conv']}.weight" in keys
    assert {f"{head}.weight" for head in classifiers(cfg)} <= keys or cfg["num_classes"] == 0
    heads = tuple(map(model.get_submodule, classifiers(cfg)))
    assert model.get_classifier() == (heads[0] if len(heads) == 1 else heads)
    assert model.num_classes == cfg["num_classes"] and model.in_chans == 3 and model.drop_rate == 0
    size = cfg["input_size"][-1]
    x = image(size, size, device="meta")
    features = model.forward_features(x)
    if cfg["pool_size"]:
        assert features.shape[1:] == (model.num_features, *cfg["pool_size"])
    else:
        assert features.shape[-1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and model.num_classes == 7
    assert model_on_meta(name, num_classes=0, global_pool="")(x).shape == features.shape


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("create", [visionattn.create_model, timm.create_model])
def test_features_only(name, create):
    if create is timm.create_model and not timm.model_entrypoint(name).__module__.startswith("visionattn"):
        pytest.skip("timm creates its own model of that name")
    with torch.device("meta"):
        model = create(name, features_only=True)
    assert len(model.feature_info.channels()) >= 3
    size = 224
    maps = model(image(size, size, device="meta"))
    for feature, chans, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (2, chans, math.ceil(size / reduction), math.ceil(size / reduction))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("chans", [1, 5])
def test_in_chans(name, chans):
    model = model_on_meta(name, in_chans=chans, num_classes=42)
    assert model(image(chans=chans, device="meta")).shape == (2, 42)


@pytest.mark.parametrize("name", EVERY)
def test_parameter_groups(name):
    model = model_on_meta(name, num_classes=42)
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= names.keys()
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(names)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in groups) == len(trained(model))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    first = f"{model.pretrained_cfg['first_conv']}.weight"
    for head in classifiers(model.pretrained_cfg):
        assert scale[id(names[first])] < scale[id(names[f"{head}.weight"])] == 1


@pytest.mark.parametrize("name", TESTS)
def test_forward_intermediates(name):
    model = visionattn.create_model(name).eval()
    x = image(64, 96)
    with torch.no_grad():
        final, every = model.forward_intermediates(x)
        close(model.forward_head(final), model(x))
        close(final, model.forward_features(x))
        two = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        extractor = visionattn.create_model(name, features_only=True, out_indices=(0, 1)).eval()
        getter = visionattn.create_model(name, features_only=True, out_indices=(0, 1), feature_cls="getter").eval()
        for features in (extractor, getter):
            state = features.state_dict()
            own = {k.replace(".", "_"): v for k, v in model.state_dict().items()}
            own |= {f"model_{k}": v for k, v in own.items()}
            features.load_state_dict({k: own[k.replace(".", "_")] for k in state})
            for ours, theirs in zip(every[:2], features(x), strict=True):
                close(ours, theirs)
    for a, b in zip(two + last_two + early, [every[0], every[-1], *every[-2:], every[1]], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(VisionattnError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="HWC")


@pytest.mark.parametrize("name", TESTS)
def test_prune_intermediate_layers(name):
    model = visionattn.create_model(name).eval()
    x = image()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
        assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected[0])
        assert not any(n.startswith(("norm.", "head.")) for n, _ in model.named_parameters())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TESTS)
def test_any_size(name, size):
    model = visionattn.create_model(name).eval()
    extractor = visionattn.create_model(name, features_only=True).eval()
    x = image(*size)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 1000) and out.isfinite().all()
        for feature, reduction in zip(extractor(x), extractor.feature_info.reduction(), strict=True):
            assert feature.shape[2:] == tuple(model.map_size(length, reduction) for length in size)
        close(torch.cat([model(image_[None]) for image_ in x]), out)  # samples do not see each other
        assert torch.equal(model(x), out)


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
    plain = visionattn.create_model(name, drop_path_rate=0.2).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x, outs = image(batch=4), []
    for model in (plain, saving):
        torch.manual_seed(1)
        outs.append(model(x))
        outs[-1].square().mean().backward()
    close(*outs)
    for a, b in zip(trained(plain), trained(saving), strict=True):
        close(a.grad, b.grad, atol=1e-5 * max(1, a.grad.abs().max().item()))
    for (n, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=n)


@pytest.mark.parametrize("name", TESTS)
def test_execution_modes_agree(name):
    model = visionattn.create_model(name).eval()
    x = image(64, 96)
    with torch.no_grad():
        expected = model(x)
        close(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)
        with torch.autocast("cpu", torch.bfloat16):
            close(model(x).float(), expected, atol=0.1 * expected.abs().max().item())
        for dtype in (torch.bfloat16, torch.float16):
            close(copy.deepcopy(model).to(dtype)(x.to(dtype)).float(), expected, atol=0.1 * expected.abs().max().item())
        with torch.inference_mode():
            close(model(x), expected)
        close(model(x), expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TESTS)
def test_compile(name, backend):
    torch._dynamo.reset()
    model = visionattn.create_model(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = image(64, 48)
    outs, gradients = [], []
    for run in (model, compiled):
        outs.append(run(x))
        gradients.append(torch.autograd.grad(outs[-1].sum(), trained(model)))
    close(*outs)
    for theirs, ours in zip(*gradients, strict=True):
        close(ours, theirs, atol=1e-4 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("name", TESTS)
def test_compiled_graph_follows_the_size(name):
    torch._dynamo.reset()
    model = visionattn.create_model(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for size in ((32, 32), (64, 48), (33, 70)):
        x = image(*size)
        close(compiled(x), model(x))


@pytest.mark.parametrize("name", TESTS)
def test_export(name):
    model = visionattn.create_model(name).eval()
    exported = torch.export.export(model, (image(64, 48),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    x = image(64, 48, batch=3)
    with torch.no_grad():
        close(exported(x), model(x))
        close(model(image(64, 48)), model(image(64, 48)), atol=1e9)  # exporting left nothing behind in the caches


@pytest.mark.parametrize("name", TESTS)
def test_onnx(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = visionattn.create_model(name).eval()
    x = image()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        close(torch.from_numpy(out), model(x), atol=1e-4)


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("create", [create_feature_extractor, torchvision_feature_extractor])
def test_symbolic_tracing(name, create):
    model = visionattn.create_model(name).eval()
    node = model.feature_info[1]["module"]
    x = image(64, 48)
    graph = create(model, {"head": "logits", node: "feature"})
    graph(x)["logits"].sum().backward()
    out = graph(x)
    close(out["logits"], model(x))


@pytest.mark.parametrize("name", TESTS)
def test_factory_arguments(name):
    model = visionattn.create_model(name, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(image(dtype=torch.float64)).dtype == torch.float64
    with torch.device("meta"):
        assert {p.device.type for p in visionattn.create_model(name).parameters()} == {"meta"}


@pytest.mark.parametrize("name", TESTS)
def test_rates(name):
    model = visionattn.create_model(name, drop_rate=0.1, drop_path_rate=0.1).train()
    x = image()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def norms(model, *kinds):
    return {m.eps for m in model.modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("name", EVERY)
def test_activations_are_exact_gelu(name):
    assert {m.approximate for m in model_on_meta(name).modules() if isinstance(m, nn.GELU)} <= {"none"}


def test_norm_epsilons():
    """The goldens cannot tell these apart."""
    for name in ("dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"):
        assert norms(model_on_meta(name), nn.LayerNorm) == {1e-5}
    van = model_on_meta("van_b0")
    assert norms(van, LayerNorm2d) == {1e-6} and norms(van, nn.BatchNorm2d) == {1e-5}
    assert norms(model_on_meta("convit_tiny"), nn.LayerNorm) == {1e-6}
