"""timm's model contract, which every registered model keeps to: heads, features, intermediates, pruning, parameters."""

import copy
import math

import pytest
import timm
import torch
from numerics import filled
from timm.layers import SelectAdaptivePool2d
from timm.layers.format import get_channel_dim, get_spatial_dim, nchw_to
from timm.optim import param_groups_layer_decay

import visionattn
from visionattn.backbone import Hierarchical, Isotropic
from visionattn.backbone.base import FORMATS
from visionattn.backbone.hierarchical import POOLS
from visionattn.errors import UnknownArgumentError, VisionattnError
from visionattn.registry import timm_name

ALL = visionattn.list_models()
TESTS = visionattn.list_models("test_*")
# Every published variant in the slow tests; in the quick ones those that show something of their own.
QUICK = {*TESTS, "dinat_mini", "dinat_s_tiny", "vitrpb_small", "van_b0", "convit_tiny", "halonet26t", "haloregnetz_b"}
QUICK |= {"davit_tiny", "davit_base_fl", "attnet_xxs", "focalnet_tiny_srf", "focalnet_tiny_iso", "hornet_tiny_gf"}
QUICK |= {"litv2_small", "patnet_t0", "patnet_t2_full", "illama_tiny", "sparsifiner_deit_small", "sparsifiner_lvvit_s"}
QUICK |= {"nalaformer_xt"}
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


def image(*size, batch=2, chans=3, **kwargs):
    return torch.randn(batch, chans, *(size or (32, 32)), **kwargs)


def on_meta(name, create=visionattn.create_model, **kwargs):
    with torch.device("meta"):
        return create(name, **kwargs)


def lively(name, **kwargs):
    return filled(visionattn.create_model(name, **kwargs))


def trained(model):
    """Parameters that the loss of a task trains: a model freezes the others itself."""
    return [p for p in model.parameters() if p.requires_grad]


def classifiers(cfg):
    """Names of the heads, the one that the features go to first."""
    return (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def refused(call, *args, **kwargs):
    """Whether a call is answered with a line."""
    try:
        call(*args, **kwargs)
    except VisionattnError as e:
        assert "\n" not in str(e)
        return True
    return False


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_the_trained_parameters_alone(name):
    model = on_meta(name, num_classes=42).train()
    out = model(image(64, 96, device="meta"))
    assert out.shape == (2, 42)
    out.sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".predictor." in n}


@pytest.mark.parametrize("name", TESTS)
def test_gradients_reach_the_trained_parameters_of_extractors(name):
    for indices in ((0,), (1, 3)):
        model = on_meta(name, features_only=True, out_indices=indices).train()
        sum(feature.sum() for feature in model(image(device="meta"))).backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []


@pytest.mark.parametrize("name", TESTS)
def test_gradients_are_those_of_the_outputs(name):
    """Against the difference of two outputs along a direction in which every parameter and the image move."""
    model = lively(name, num_classes=5).double()
    x = image(64, 48, dtype=torch.float64).requires_grad_()
    moved = [x, *trained(model)]
    weights = torch.randn(2, 5, dtype=torch.float64)
    gradients = torch.autograd.grad((weights * model(x)).sum(), moved)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    directions = [torch.randn_like(p) / p.numel() ** 0.5 for p in moved]
    outs = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, direction in zip(moved, directions, strict=True):
                p += step * direction
            outs.append((weights * model(x)).sum())
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close((outs[0] - outs[1]) / 2e-6, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_pretrained_cfg_and_classifier(name):
    model = on_meta(name)
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
    if isinstance(model, Isotropic):
        class_token = model.cls_token is not None
        assert features.shape[1:] == (math.prod(cfg["pool_size"]) + class_token, model.num_features)
    else:
        assert features.shape[1:] == (model.num_features, *cfg["pool_size"])
    assert timm.get_pretrained_cfg(timm_name(name)).pool_size == cfg["pool_size"]
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and model.num_classes == 7
    assert on_meta(name, num_classes=0, global_pool="")(x).shape == features.shape


@pytest.mark.parametrize("name", TESTS)
def test_pool_size_follows_the_image(name):
    for size in ((96, 64), (50, 75)):
        model = on_meta(name, img_size=size)
        last = model.forward_intermediates(image(*size, device="meta"), indices=1, intermediates_only=True)[0]
        assert model.pretrained_cfg["pool_size"] == last.shape[2:]
        assert on_meta(name, img_size=size, features_only=True).pretrained_cfg["pool_size"] == last.shape[2:]


@pytest.mark.parametrize("name", TESTS)
def test_global_pool(name):
    """Of every kind that timm knows, those that a model has not are refused, and the others fit their heads."""
    x = image(64, 32)
    model = lively(name, num_classes=7)
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    features, taken = model.forward_features(x), []
    for pool in (*POOLS, "token", "map"):
        model.reset_classifier(7, "max")
        if refused(model.reset_classifier, 5, pool):
            assert model.num_classes == 7 and model.forward_head(features).shape == (2, 7)  # as it was
            continue
        taken.append(pool)
        pooled, out = model.forward_head(features, pre_logits=True), model.forward_head(features)
        axis = -1 if pool or isinstance(model, Isotropic) else 1
        assert (pooled.shape[axis], out.shape[axis]) == (model.head_hidden_size, 5)
        assert pooled.ndim == out.ndim == (2 if pool else features.ndim) and out.isfinite().all()
        if pool not in ("", "token") and not getattr(model, "norm_after_pool", False) and not hasattr(model, "hidden"):
            close(pooled, SelectAdaptivePool2d(pool_type=pool, flatten=True)(last))
        model.reset_classifier(0)
        assert torch.equal(model.forward_head(features), pooled)
    if isinstance(model, Hierarchical):
        doubling = () if model.norm_after_pool else ("catavgmax", "fastcatavgmax")
        assert set(taken) == {pool for pool in POOLS if not pool.endswith("catavgmax")} | set(doubling)
    else:
        assert set(taken) == {"", "avg", "max", "avgmax"} | ({"token"} if model.cls_token is not None else set())
    for pool in ("catavgmax", "", "map"):
        if pool not in taken:
            assert refused(on_meta, name, global_pool=pool)
            continue
        made = on_meta(name, num_classes=5, global_pool=pool)
        model.reset_classifier(5, pool)
        assert made.head_hidden_size == model.head_hidden_size
        assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("create", [visionattn.create_model, timm.create_model])
def test_features_only(name, create):
    model = on_meta(timm_name(name) if create is timm.create_model else name, create, features_only=True)
    assert len(model.feature_info.channels()) >= 3
    size = 224
    maps = model(image(size, size, device="meta"))
    for feature, chans, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (2, chans, math.ceil(size / reduction), math.ceil(size / reduction))


@pytest.mark.parametrize("feature_cls", [None, "getter", "list", "dict", "hook", "fx"])
@pytest.mark.parametrize("name", TESTS)
def test_options_of_extractors(name, feature_cls):
    model = lively(name)
    if isinstance(model, Isotropic) and feature_cls not in (None, "getter"):
        assert refused(visionattn.create_model, name, features_only=True, feature_cls=feature_cls, output_fmt="NHWC")
        return
    x = image(64, 32)
    maps = model.forward_intermediates(x, intermediates_only=True)
    options = ((2, "NHWC"), ((-3, -1), "NLC"), ((2, 0), "NCHW"), ((1,), "NHWC"))
    for indices, output_fmt in options[:1] if feature_cls == "fx" else options:
        options = {"out_indices": indices, "output_fmt": output_fmt, "feature_cls": feature_cls}
        extractor = visionattn.create_model(name, features_only=True, **options).eval()
        extractor.load_state_dict(matching(model, extractor))
        found = extractor(x)
        found = list(found.values()) if isinstance(found, dict) else found
        chosen = range(-indices, 0) if isinstance(indices, int) else indices
        expected = [maps[i] for i in sorted(i % len(maps) for i in chosen)]
        for a, b in zip(found, expected, strict=True):
            close(a, nchw_to(b, output_fmt), 1e-5 * max(1, b.abs().max().item()))
        info = extractor.feature_info
        assert [f.shape[get_channel_dim(output_fmt)] for f in found] == info.channels()
        for feature, reduction in zip(found, info.reduction(), strict=True):
            sides = [length // reduction for length in (64, 32)]
            assert math.prod(feature.shape[axis] for axis in get_spatial_dim(output_fmt)) == math.prod(sides)
        if feature_cls == "fx":
            assert refused(extractor.set_grad_checkpointing)


def matching(model, extractor):
    """The state of `model` under the names of an extractor of it."""
    own = {k.replace(".", "_"): v for k, v in model.state_dict().items()}
    own |= {f"{prefix}_{k}": v for k, v in own.items() for prefix in ("model", "body", "graph_module")}
    return {k: own[k.replace(".", "_")] for k in extractor.state_dict()}


@pytest.mark.parametrize("feature_cls", [None, "getter", "hook"])
@pytest.mark.parametrize("name", TESTS)
def test_extractors_recompute_their_activations(name, feature_cls):
    plain = visionattn.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(0, 1)).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x, outs, runs = image(64, 32), [], []
    for model in (plain, saving):
        if feature_cls == "hook":  # copies of hooks are those of the original
            model = visionattn.create_model(name, features_only=True, feature_cls="hook", out_indices=(0, 1)).train()
            model.load_state_dict(plain.state_dict())
            model.set_grad_checkpointing(len(outs) == 1)
        block = next(m for n, m in model.named_modules() if n.endswith(("stages.0", "stages_0", "blocks")))
        block = block[0] if hasattr(block, "__getitem__") else block.blocks[0]
        counted = []
        block.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(1)
        outs.append(torch.cat([feature.flatten() for feature in model(x)]))
        outs[-1].square().mean().backward()
        runs.append((len(counted), [p.grad for p in trained(model)], list(model.buffers())))
    close(*outs)
    assert (runs[0][0], runs[1][0]) == (1, 2)
    for ours, theirs in zip(runs[0][1] + runs[0][2], runs[1][1] + runs[1][2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_impossible_features_are_refused():
    for name in ("test_van", "test_focalnet", "test_convit"):
        for indices in ((4,), (0, -5), (), 0, 5, (1.0,)):
            with pytest.raises(VisionattnError, match=f"{name} has features 0 to 3, got out_indices"):
                visionattn.create_model(name, features_only=True, out_indices=indices)
        with pytest.raises(VisionattnError, match="expected output_fmt one of NCHW, NHWC, NCL, NLC, got 'HWC'"):
            visionattn.create_model(name, features_only=True, output_fmt="HWC")
        with pytest.raises(VisionattnError, match="expected feature_cls one of getter, list, dict, hook, fx, got 'l'"):
            visionattn.create_model(name, features_only=True, feature_cls="l")
        with pytest.raises(UnknownArgumentError, match="unknown arguments out_indices, output_fmt"):
            visionattn.create_model(name, out_indices=(1, 2), output_fmt="NCHW")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("chans", [1, 5])
def test_in_chans(name, chans):
    model = on_meta(name, in_chans=chans, num_classes=42)
    assert model(image(chans=chans, device="meta")).shape == (2, 42)


@pytest.mark.parametrize("name", EVERY)
def test_parameter_groups(name):
    model = on_meta(name, num_classes=42)
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
    model = lively(name)
    x = image(64, 96)
    with torch.no_grad():
        final, every = model.forward_intermediates(x)
        close(model.forward_head(final), model(x))
        close(final, model.forward_features(x))
        two = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        for output_fmt in FORMATS:
            others = model.forward_intermediates(x, output_fmt=output_fmt, intermediates_only=True)
            for ours, theirs in zip(others, every, strict=True):
                assert torch.equal(ours, nchw_to(theirs, output_fmt))
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        norm = model.norm
        if isinstance(model, Isotropic):
            close(normed, norm(every[-1].movedim(1, -1)).movedim(-1, 1))
        else:
            close(normed, norm(every[-1]))
    for a, b in zip(two + last_two + early, [every[0], every[-1], *every[-2:], every[1]], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(VisionattnError, match="expected output_fmt one of NCHW, NHWC, NCL, NLC, got 'HWC'"):
        model.forward_intermediates(x, output_fmt="HWC")


@pytest.mark.parametrize("name", TESTS)
def test_pruned_models_are_models(name):
    whole, x = lively(name, num_classes=7), image(32, 48)
    every = whole.forward_intermediates(x, intermediates_only=True)
    isotropic = isinstance(whole, Isotropic)
    tokens = whole.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True) if isotropic else None
    for i, prune_norm in enumerate((True, False, True, False)):
        pruned, again = copy.deepcopy(whole), copy.deepcopy(whole)
        for model in (pruned, again):
            assert model.prune_intermediate_layers([i - len(every)], prune_norm=prune_norm) == [i]
        assert len(pruned.feature_info) == i + 1
        assert torch.equal(pruned.forward_intermediates(x, [i], intermediates_only=True)[0], every[i])
        if prune_norm:
            assert not any(n.startswith(("norm.", "head.")) for n, _ in pruned.named_parameters())
        for pool in ("avg", "catavgmax", "fastmax", "token", "", None):
            if refused(pruned.reset_classifier, 5, pool):
                continue
            again.reset_classifier(5, pool)
            again.load_state_dict(pruned.state_dict())
            final, intermediates = pruned.forward_intermediates(x)
            assert torch.equal(final, pruned.forward_features(x)) and torch.equal(intermediates[-1], every[i])
            out, pooled = pruned.forward_head(final), pruned.forward_head(final, pre_logits=True)
            close(out, again(x))  # which may compute no more than the head needs
            axis = -1 if isotropic or pool else 1
            assert (out.shape[axis], pooled.shape[axis]) == (5, pruned.head_hidden_size)
            if prune_norm and pool and pool != "token":
                close(pooled, SelectAdaptivePool2d(pool_type=pool, flatten=True)(every[i]))
            if prune_norm and pool == "token":
                close(pooled, tokens[i][1][:, 0])
            out.sum().backward()
            unused = [n for n, p in pruned.named_parameters() if p.requires_grad != (p.grad is not None)]
            assert unused == []
            pruned.zero_grad()
        joined = isotropic and tokens[i][1].shape[1] == 1
        assert refused(pruned.reset_classifier, 5, "token") == (not joined)
        assert ("cls_token" in pruned.state_dict()) == joined
