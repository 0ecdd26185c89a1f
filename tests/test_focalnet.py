"""FocalNet: its layer against its definition, options, layouts and what the goldens cannot see."""

import re

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import FocalModulation
from visionattn.macs import counted_flops
from visionattn.weights import convert_state_dict

SMALL = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_classes": 5}


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def focal_modulation(layer, x):
    """As the paper writes it, on (B, C, H, W)."""
    C, L = x.shape[-1], len(layer.focal_layers)
    q, context, gates = layer.f(x).permute(0, 3, 1, 2).split([C, C, L + 1], 1)
    total = 0
    for level, conv in enumerate(layer.focal_layers):
        k = conv.kernel_size[0]
        context = F.gelu(F.conv2d(context, conv.weight, padding=k // 2, groups=C))
        total = total + context * gates[:, level : level + 1]
    total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, L:]
    if layer.normalize_modulator:
        total = total / (L + 1)
    out = q * F.conv2d(total, layer.h.weight[:, :, None, None], layer.h.bias)
    return layer.proj(layer.norm(out.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("size", [(9, 14), (1, 1), (2, 7)])
@pytest.mark.parametrize(
    "window, level, options",
    [
        (3, 2, {}),
        (5, 1, {"bias": False, "focal_factor": 4}),
        (3, 4, {"use_postln_in_modulation": True, "normalize_modulator": True}),
    ],
)
def test_focal_modulation_is_its_definition(size, window, level, options):
    layer = randomised(FocalModulation(6, window, level, **options))
    assert [conv.kernel_size[0] for conv in layer.focal_layers] == [
        window + i * options.get("focal_factor", 2) for i in range(level)
    ]
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    close(layer(x), focal_modulation(layer, x))
    q, modulator, gates = layer.modulate(x)
    close(layer.proj(layer.norm(q * modulator)), layer(x))
    assert gates.shape == (2, *size, level + 1)


def test_focal_modulation_gradients():
    layer = randomised(FocalModulation(3, 3, 2, use_postln_in_modulation=True))
    names = dict(layer.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in names.values())))


def test_focal_modulation_cost():
    """The cost line, less the gating, which FLOP counters do not count."""
    H, W, C, L = 9, 14, 8, 3
    with counted_flops() as counter, torch.no_grad():
        FocalModulation(C, 3, L)(torch.randn(1, H, W, C))
    assert counter.get_total_flops() == 2 * H * W * (4 * C**2 + C * (L + 1) + C * (9 + 25 + 49))


def test_focal_modulation_bias_and_bad_arguments():
    names = set(FocalModulation(8, 3, 2, bias=False).state_dict())
    assert names == {
        *("f.weight", "h.weight", "proj.weight", "proj.bias", "focal_layers.0.weight", "focal_layers.1.weight")
    }
    with pytest.raises(ValueError, match="focal_level of at least 1, got 0"):
        FocalModulation(8, 3, 0)
    with pytest.raises(ValueError, match="got focal_window 4 and focal_factor 2"):
        FocalModulation(8, 4, 1)
    with pytest.raises(ValueError, match="got focal_window 3 and focal_factor 1"):
        FocalModulation(8, 3, 1, focal_factor=1)


def focalnet(name="focalnet_tiny_srf", **kwargs):
    return visionattn.create_model(name, **SMALL | kwargs)


def test_norms_epsilons_and_activations():
    with torch.device("meta"):
        for name in ("focalnet_huge_fl4", "focalnet_tiny_srf", "focalnet_base_iso"):
            model = visionattn.create_model(name)
            assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert not isinstance(focalnet(patch_norm=False).stem.norm, LayerNorm2d)
    assert isinstance(focalnet(patch_norm=False).stages[1].downsample.norm, LayerNorm2d)


def test_initialisation():
    """Convolutions of the published code keep PyTorch's default, that of the modulator included."""
    torch.manual_seed(0)
    model = focalnet(embed_dim=64, use_layerscale=True)
    for stage in model.stages:
        mixer, bound = stage.blocks[0].mixer, stage.dim**-0.5
        for linear in (mixer.f, mixer.proj, stage.blocks[0].mlp.fc1):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()
        assert mixer.h.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert 0 < mixer.h.bias.abs().max() <= bound
        assert mixer.focal_layers[0].weight.std().item() == pytest.approx(1 / 3 / 3**0.5, rel=0.1)
        assert (stage.blocks[0].ls1.gamma == 1e-4).all()
    assert model.stem.proj.bias.any() and model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_drop_path_and_dropout():
    model = visionattn.create_model("focalnet_tiny_srf", drop_path_rate=0.3, drop_rate=0.1, embed_dim=8)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    assert sum(isinstance(m, DropPath) for m in model.modules()) == 22
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1, 0.0}
    assert model.stem.drop.p == model.stages[0].blocks[0].mixer.proj_drop.p == 0.1


@pytest.mark.parametrize(
    "options, sizes",
    [
        ({}, [(50, 57), (25, 28), (12, 14), (6, 7)]),
        ({"use_conv_embed": True}, [(51, 57), (26, 29), (13, 15), (7, 8)]),
        ({"pad_to_patch": True}, [(51, 58), (26, 29), (13, 15), (7, 8)]),
        ({"pad_to_patch": True, "use_conv_embed": True}, [(51, 58), (26, 29), (13, 15), (7, 8)]),
        ({"patch_size": 8}, [(25, 28), (12, 14), (6, 7), (3, 3)]),
    ],
)
def test_sizes(options, sizes):
    model = focalnet(**options).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 203, 230), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == sizes
    model = focalnet(img_size=(203, 230), **options)
    assert model.pretrained_cfg["pool_size"] == sizes[-1]


def test_isotropic_drops_what_is_over():
    model = visionattn.create_model("focalnet_tiny_iso", embed_dim=16, depth=3, num_classes=5).eval()
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        close(model(x), model(x[:, :, :48, :64]), atol=1e-6)
        (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert last.shape == (1, 16, 3, 4)


PUBLISHED = {  # our names to those of each layout, applied in order
    "official": [
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"^stages\.(\d)\.blocks\.", r"layers.\1.blocks."),
        (r"^blocks\.", "layers.0.blocks."),
        (r"mixer\.norm\.", "modulation.ln."),
        (r"mixer\.focal_layers\.(\d)\.", r"modulation.focal_layers.\1.0."),
        (r"mixer\.", "modulation."),
        (r"ls(\d)\.gamma", r"gamma_\1"),
    ],
    "timm": [
        (r"^stages\.", "layers."),
        (r"^head\.", "head.fc."),
        (r"mixer\.focal_layers\.(\d)\.", r"modulation.focal_layers.\1.0."),
        (r"mixer\.", "modulation."),
    ],
    "hf": [
        (r"^stem\.proj\.", "focalnet.embeddings.patch_embeddings.projection."),
        (r"^stem\.norm\.", "focalnet.embeddings.norm."),
        (
            r"^stages\.(\d)\.downsample\.proj\.",
            lambda m: f"focalnet.encoder.stages.{int(m[1]) - 1}.downsample.projection.",
        ),
        (r"^stages\.(\d)\.downsample\.norm\.", lambda m: f"focalnet.encoder.stages.{int(m[1]) - 1}.downsample.norm."),
        (r"^(?:stages\.(\d)\.)?blocks\.", lambda m: f"focalnet.encoder.stages.{m[1] or 0}.layers."),
        (r"^norm\.", "focalnet.layernorm."),
        (r"^head\.", "classifier."),
        (r"mixer\.f\.", "modulation.projection_in."),
        (r"mixer\.h\.", "modulation.projection_context."),
        (r"mixer\.proj\.", "modulation.projection_out."),
        (r"mixer\.norm\.", "modulation.layernorm."),
        (r"mixer\.focal_layers\.(\d)\.", r"modulation.focal_layers.\1.0."),
        (r"ls(\d)\.gamma", r"gamma_\1"),
    ],
}


def published(model, layout, post_norm):
    names = r"\.(mixer\.[fh]|mixer\.proj|mlp\.fc\d)\.weight$" if layout == "timm" else r"\.mixer\.h\.weight$"
    out = {}
    for key, value in model.state_dict().items():
        value = value[:, :, None, None] if re.search(names, key) else value
        if layout == "timm" and post_norm:
            key = re.sub(r"blocks\.(\d+)\.norm(\d)\.", r"blocks.\1.norm\2_post.", key)
        for pattern, replacement in PUBLISHED[layout]:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    if layout == "hf":
        out["focalnet.embeddings.mask_token"] = torch.zeros(1, 1, 8)
    return out


@pytest.mark.parametrize("layout", PUBLISHED)
@pytest.mark.parametrize("name", ["test_focalnet", "focalnet_tiny_srf", "focalnet_base_iso"])
def test_layouts(name, layout):
    kwargs = {"embed_dim": 8, "num_classes": 5} | ({"depth": 2} if name.endswith("iso") else {})
    if name.endswith("iso") and layout == "timm":
        pytest.skip("timm has no isotropic models")
    model = visionattn.create_model(name, **kwargs)
    state_dict = published(model, layout, name != "focalnet_tiny_srf")
    assert not any("mixer" in key for key in state_dict)
    converted = convert_state_dict({"model": state_dict}, model)
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(value, converted[key]) for key, value in model.state_dict().items())


def test_a_backbone_for_dense_prediction():
    """As the published one: norms of all outputs, padding, larger kernels; from a classifier's checkpoint."""
    plain = focalnet(focal_levels=2).eval()
    for p in plain.parameters():
        nn.init.normal_(p, std=0.3)
    dense = {"focal_windows": 9, "feature_norms": True, "pad_to_patch": True, "num_classes": 0}
    with pytest.raises(VisionattnError, match="missing 8 keys"):
        convert_state_dict(published(plain, "official", False), focalnet(**dense))
    model = focalnet(**dense, adapt_checkpoints=True).eval()
    checkpoint = {f"visual.{k}": v for k, v in published(plain, "official", False).items()}
    model.load_state_dict(convert_state_dict({"teacher": {**checkpoint, "text.weight": torch.ones(1)}}, model))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = plain.forward_intermediates(x, intermediates_only=True)
        found = model.forward_intermediates(x, intermediates_only=True)
    for ours, expected in zip(found, maps, strict=True):
        close(ours, F.layer_norm(expected.permute(0, 2, 3, 1), expected.shape[1:2]).permute(0, 3, 1, 2), atol=1e-5)
    features = visionattn.create_model(
        "focalnet_tiny_srf", features_only=True, out_indices=(0, 1), feature_norms=True, **SMALL
    )
    assert len(features.model.feature_norms) == 2
    published_dense = {re.sub(r"^feature_norms\.", "norm", k): v for k, v in model.state_dict().items()}
    assert convert_state_dict(published_dense, model).keys() == model.state_dict().keys()


def test_more_levels():
    plain, more = focalnet(focal_levels=2), focalnet(focal_levels=4, adapt_checkpoints=True)
    converted = convert_state_dict(plain.state_dict(), more)
    more.load_state_dict(converted)
    source, fitted = plain.stages[1].blocks[0].mixer.f, more.stages[1].blocks[0].mixer.f
    C = 16
    assert torch.equal(fitted.weight[: 2 * C + 2], source.weight[: 2 * C + 2])
    assert torch.equal(fitted.weight[-1], source.weight[-1]) and not fitted.weight[2 * C + 2 : -1].any()
    assert fitted.bias.shape == (2 * C + 5,)
    with pytest.raises(VisionattnError, match="left over"):
        convert_state_dict(more.state_dict(), focalnet(focal_levels=2, adapt_checkpoints=True))
    small = focalnet(focal_levels=2, focal_windows=1, adapt_checkpoints=True)
    cropped = convert_state_dict(plain.state_dict(), small)["stages.0.blocks.0.mixer.focal_layers.1.weight"]
    assert torch.equal(cropped, plain.stages[0].blocks[0].mixer.focal_layers[1].weight[:, :, 1:-1, 1:-1])


def test_published_facts():
    info = visionattn.model_info("focalnet_large_fl4")
    assert info.input_size == (3, 384, 384) and info.weights["ms_in22k"].num_classes == 21842
    with torch.device("meta"):
        normalised = {
            name
            for name in visionattn.list_models("focalnet_*_fl*")
            if visionattn.create_model(name).stages[0].blocks[0].mixer.normalize_modulator
        }
    assert normalised == {"focalnet_large_fl4"}
