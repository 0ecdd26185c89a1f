"""Token mixers in the place of attention: what is kept is exact, and what cannot stand is refused."""

import copy
import logging
import pickle
from itertools import chain

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from torch import nn

import visionattn
from visionattn import layers, replace_attention
from visionattn.errors import VisionattnError
from visionattn.swap import ReplacedAttention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 6, "depth": 2, "num_classes": 5}
MAPS = {"class_token": False, "global_pool": "avg"}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def made(name: str = "vit_tiny_patch16_224", **kwargs) -> nn.Module:
    """A small model of timm whose every parameter does something."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | kwargs).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return model


def told(caplog) -> str:
    (record,) = caplog.records
    caplog.clear()
    return record.getMessage()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "qkv_bias": False, "proj_bias": False}),
        ("vit_tiny_patch16_224", {"init_values": 0.5, **MAPS}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
    ],
)
@torch.no_grad()
def test_softmax_attention_is_what_it_replaces(name, options, caplog):
    caplog.set_level(logging.INFO)
    model = made(name, **options)
    expected, count = model(X), sum(p.numel() for p in model.parameters())
    assert replace_attention(model, "softmax") is model
    torch.testing.assert_close(model(X), expected)
    assert sum(p.numel() for p in model.parameters()) == count + ("beit" in name) * 2 * 48  # of the keys' bias
    assert (
        "2 x blocks.*.attn: kept queries, keys, values, output" in (text := told(caplog)) and "dropped nothing" in text
    )


@torch.no_grad()
def test_projections_of_groups(caplog):
    """A key for three heads is three keys alike; keys of three heads are one, their mean."""
    grouped = AttentionRope(48, 6, qkv_fused=False, num_kv_heads=2, attn_head_dim=8).eval()
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": grouped})])})
    x = torch.randn(2, 17, 48)
    replace_attention(model, "softmax")
    torch.testing.assert_close(model["blocks"][0]["attn"](x), grouped(x))
    if hasattr(layers, "KeyDrivenGQA"):
        replace_attention(model, "gqa", num_kv_heads=2)
        torch.testing.assert_close(model["blocks"][0]["attn"](x), grouped(x))
        qkv = made().blocks[1].attn.qkv
        model = replace_attention(made(), "gqa", num_kv_heads=2)
        mixer = model.blocks[1].attn.mixer
        for found, whole in ((mixer.k.weight, qkv.weight[48:96]), (mixer.v.bias, qkv.bias[96:])):
            torch.testing.assert_close(found, whole.unflatten(0, (2, 3, 8)).mean(1).flatten(0, 1))


def test_what_is_told(caplog):
    caplog.set_level(logging.INFO)
    model = made(qk_norm=True, attn_drop_rate=0.1)
    qkv = model.blocks[0].attn.qkv.weight
    replace_attention(model, "flow", "blocks.0.attn")
    assert torch.equal(model.blocks[0].attn.mixer.qkv.weight, qkv) and isinstance(model.blocks[1].attn, Attention)
    assert told(caplog) == (
        "flow in the place of 1 x blocks.0.attn: kept queries, keys, values, output; fresh nothing; "
        "dropped q_norm, k_norm, attn_drop"
    )
    replace_attention(made(**MAPS), "norm_aware")
    assert "kept queries, keys, values, output; fresh gates, lepe, ln; dropped nothing" in told(caplog)
    replace_attention(made(**MAPS), "halo", qkv_bias=False)  # and no projection of the output
    assert told(caplog).endswith(
        "kept queries, keys, values; fresh height_rel, width_rel; "
        "dropped bias of queries, bias of keys, bias of values, output"
    )
    replace_attention(made("beit_base_patch16_224"), "mixer_gate")
    assert "kept nothing; fresh norm1" in (text := told(caplog)) and text.endswith(
        "dropped queries, keys, values, output, relative_position_bias_table"
    )
    replace_attention(model := made(), "flow", keep_weights=False)
    assert "kept nothing; fresh queries" in told(caplog)
    assert not torch.equal(model.blocks[0].attn.mixer.qkv.weight, made().blocks[0].attn.qkv.weight)


def test_what_carries_over():
    model = made(attn_drop_rate=0.1, proj_drop_rate=0.2, qkv_bias=False).to(torch.float64).train()
    replace_attention(model, "flow", "blocks.0.attn")
    replace_attention(model, "softmax", "blocks.1.attn")
    first, second = (block.attn for block in model.blocks)
    assert first.drop.p == 0.2 and first.mixer.num_heads == 6 and first.mixer.qkv.bias is None and first.training
    assert second.drop.p == 0 and second.mixer.attn_drop == 0.1 and second.mixer.proj_drop.p == 0.2
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    replace_attention(model.eval(), "softmax", num_heads=3, proj_drop=0.0)
    mixer = model.blocks[0].attn.mixer
    assert (mixer.num_heads, mixer.attn_drop, mixer.proj_drop.p, mixer.training) == (3, 0.1, 0.0, False)
    replace_attention(made(qk_norm=True, **MAPS), "soft_causal")  # is derived from what takes these norms
    with torch.device("meta"):
        assert replace_attention(timm.create_model("vit_tiny_patch16_224", **SMALL), "moh")(X.to("meta")).is_meta


@torch.no_grad()
def test_one_after_the_other():
    model = made()
    expected = model(X)
    for mixer in ("flow", "moh", "softmax"):
        replace_attention(model, mixer)
    torch.testing.assert_close(model(X), expected)
    assert type(model.blocks[0].attn.mixer) is layers.SelfAttention
    for mixer in ("none", "activator"):  # have no projections to give
        replace_attention(model, mixer)
    assert replace_attention(model, "softmax")(X).shape == expected.shape
    model = replace_attention(replace_attention(made(**MAPS), "pat_sf"), "softmax")  # of a part of the channels
    assert model(X).shape == expected.shape


def test_attention_in_two_places_is_one_module_still():
    model = made()
    model.blocks[1].attn = model.blocks[0].attn
    replace_attention(model, "flow")
    assert type(model.blocks[0].attn) is ReplacedAttention and model.blocks[1].attn is model.blocks[0].attn


def test_what_is_frozen_stays_so_and_what_is_fresh_learns():
    model = replace_attention(made().requires_grad_(False), "selective")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"blocks.{i}.attn.mixer.{name}" for i in (0, 1) for name in ("temp_q", "alpha_q", "temp_v", "alpha_v")
    }


@pytest.mark.parametrize(
    ("mixer", "options"), [("flow", {"reg_tokens": 2}), ("mixer_gate", {"reg_tokens": 2}), ("neighborhood", MAPS)]
)
def test_the_model_stays_a_model(mixer, options):
    model = replace_attention(made(**options), mixer)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert copy.deepcopy(model)(X).shape == (2, 5)
    other = replace_attention(timm.create_model("vit_tiny_patch16_224", **SMALL | options).eval(), mixer)
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(other(X), expected)
    assert model.forward_intermediates(X, intermediates_only=True)[-1].shape == (2, 48, 4, 4)


@pytest.mark.parametrize(("mixer", "options"), [("flow", {"reg_tokens": 2}), ("neighborhood", MAPS)])
@torch.no_grad()
def test_graphs(mixer, options):
    model = replace_attention(made(depth=1, **options), mixer)
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), expected)
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(exported.module()(X[:1]), expected[:1])


@torch.no_grad()
def test_maps_are_row_by_row():
    model = replace_attention(made(img_size=(32, 48), **MAPS), "halo")
    attn, x = model.blocks[0].attn, torch.randn(2, 24, 48)
    found = attn.mixer(x.mT.unflatten(2, (4, 6))).flatten(2).mT
    torch.testing.assert_close(attn(x), found)
    with pytest.raises(VisionattnError, match="halo in the place of attention takes maps of 4 x 6 patches, got 25"):
        attn(torch.randn(2, 25, 48))


@torch.no_grad()
def test_models_of_ours():
    """They tell the grid, at any size."""
    model = visionattn.create_model("test_convit").eval()
    replace_attention(model, "softmax", "blocks.*.mixer")
    assert model(torch.randn(1, 3, 97, 61)).shape == (1, 1000)
    model = visionattn.create_model("test_isotropic").eval()
    x = torch.randn(1, 3, 97, 61)
    expected = model(x)
    torch.testing.assert_close(replace_attention(model, "softmax", "blocks.*.mixer")(x), expected)
    assert replace_attention(model, "neighborhood", "blocks.*.mixer")(x).shape == (1, 1000)


GRIDDED = "gpsa", "sparsifiner"
REFUSED = [
    ("flou", {}, "unknown mixer flou; did you mean flow"),
    ("halo", {}, "halo cannot stand for blocks.0.attn of VisionTransformer: it takes maps, and 1 of the tokens"),
    *((name, {"reg_tokens": 1}, "it takes patches of a grid, and 2 of the tokens, class or reg") for name in GRIDDED),
    ("log_normal", {"mixer": {"window_size": 2}}, "it takes patches of a grid, and 1 of the tokens, class or register"),
    ("gpsa", {"dynamic_img_size": True, **MAPS}, "it takes patches of a grid, and the model does not tell the size of"),
    ("soft_causal", {}, "its tokens see those before them, and the class token is the first"),
    ("reversed", {}, "it hands something on to the next block"),
    ("flow", {"num_heads": 3, "embed_dim": 45, "mixer": {"num_heads": 2}}, "45 is not divisible by num_heads 2"),
    *(
        ("flow", {"mixer": {name: 7}}, f"mixer flow got unknown arguments {name}; it takes eps, num_heads, qkv_bias")
        for name in ("window", "dim", "device")
    ),
    ("gqa", {"mixer": {"num_heads": "a"}}, "mixer gqa takes num_heads as an integer, got 'a'"),
    ("gqa", {"mixer": {"num_heads": -4}}, "expected an integer num_heads >= 1, got -4"),
    (
        "halo",
        {"mixer": {"stride": 2}, **MAPS},
        r"makes \(1, 4, 48\) of \(1, 16, 48\) with these arguments",
    ),
    ("moh", {"mixer": {"balance": 0.1}}, "balance is the weight of a loss"),
    ("soft_causal", {"mixer": {"soft_mask_epochs": 5}, **MAPS}, "soft_mask_epochs is of a schedule"),
    ("mixer_gate", {"mixer": {"num_tokens": 7}}, "made for 7 tokens, got 17"),
    ("super", {"mixer": {"num_tokens": 3}}, "expected the 3 tokens that super attention was made for"),
    ("flow", {"mixer": {"where": "block.*.attn"}}, r"no module block.\*.attn; did you mean blocks.\*.attn\?"),
    *(("flow", {"mixer": {"where": w}}, "takes where as a text, got ") for w in (None, 3, ["blocks.*.attn"])),
    (None, {}, "replace_attention takes mixer as a text, got None"),
    ("flow", {"mixer": {"where": "blocks.*.mlp"}}, "blocks.0.mlp of VisionTransformer is Mlp; expected attention of"),
]


@pytest.mark.parametrize(("mixer", "options", "message"), REFUSED)
def test_what_cannot_stand(mixer, options, message):
    options = dict(options)
    kwargs = options.pop("mixer", {})
    model = made(**options)
    with pytest.raises(VisionattnError, match=message) as error:
        replace_attention(model, mixer, **kwargs)
    assert "\n" not in str(error.value) and not any(isinstance(m, ReplacedAttention) for m in model.modules())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "naflexvit_base_patch16_gap"])
def test_mixers_of_patches_alone(name):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    for mixer in GRIDDED:
        with pytest.raises(
            VisionattnError, match="it takes patches of a grid, and [45] of the tokens, class or register"
        ):
            replace_attention(model, mixer)


@torch.no_grad()
def test_another_map_of_as_many_patches():
    """The map is that of the image size at present, in copies too; and it is no part of what stands in."""
    model = replace_attention(made(**MAPS), "lka")
    model.set_input_size((16, 64))
    assert not any("patches" in name for name, _ in chain(model.named_modules(), model.named_parameters()))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attn, x = each.blocks[0].attn, torch.randn(2, 16, 48)
        torch.testing.assert_close(attn(x), attn.mixer(x.mT.unflatten(2, (2, 8))).flatten(2).mT)
    each.set_input_size((32, 64))
    assert (attn.grid, model.blocks[0].attn.grid) == ((4, 8), (2, 8))


@pytest.mark.parametrize("model", [None, 3, "vit_tiny_patch16_224"])
def test_what_is_no_model(model):
    with pytest.raises(VisionattnError, match="replace_attention takes model as Module, got "):
        replace_attention(model, "flow")


def test_masks_and_unknown_sizes():
    model = replace_attention(made(), "flow")
    with pytest.raises(VisionattnError, match="flow in the place of attention takes no mask"):
        model(X, is_causal=True)
    bare = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": Attention(48, 6)})])})
    with pytest.raises(VisionattnError, match="its number of tokens is fixed, and the model does not tell it"):
        replace_attention(bare, "mixer_gate")
    with pytest.raises(VisionattnError, match="it takes maps, and the model does not tell the size"):
        replace_attention(bare, "halo")
    replace_attention(bare, "mixer_gate", num_tokens=9)
    assert bare["blocks"][0]["attn"](torch.randn(1, 9, 48)).shape == (1, 9, 48)
    with pytest.raises(VisionattnError, match="it takes maps, and the model does not tell the size"):
        replace_attention(made(dynamic_img_size=True, **MAPS), "halo")
    with pytest.raises(VisionattnError, match="is called with a map"):
        replace_attention(visionattn.create_model("test_isotropic", mixer="agent"), "halo", "blocks.*.mixer")
    with pytest.raises(VisionattnError, match="is called with a map"):
        replace_attention(visionattn.create_model("test_flowformer"), "softmax", "stages.*.blocks.*.mixer")
    with pytest.raises(VisionattnError, match="ResNet has no module"):
        replace_attention(timm.create_model("test_resnet"), "flow")
