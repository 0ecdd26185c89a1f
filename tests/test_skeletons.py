"""Every mixer in both skeletons: it learns, at any size if its own is free; blocks are of equal size; states travel."""

from copy import deepcopy
from inspect import signature
from pathlib import Path

import pytest
import torch
from test_open_sizes import DYNAMIC, agrees
from test_resume import images as images
from test_resume import resumes_with_the_same_bits
from test_trainer_overfit import fits_digits

import visionattn
from visionattn.arguments import fits
from visionattn.errors import UnknownArgumentError, UnknownModelError, VisionattnError
from visionattn.models.mixers import MIXERS, Place
from visionattn.models.skeletons import MixerBlock

EVERY = visionattn.list_mixers()
SIZES = {  # the XS models, tiny; heads of few channels, as some mixers want an even number of them
    "isotropic_xsmall": {"embed_dim": 48, "depth": 4, "head_dim": 8},
    "pyramid_xsmall": {"embed_dims": (16, 16, 48, 64), "depths": (1, 1, 2, 1), "head_dim": 8},
}
CONTROLS = ("activator", "none")
"""Mixers that mix nothing."""
FROZEN = ".predictor."
PLACES = {384: Place(6), 320: Place(10), 512: Place(16, (7, 7), 7), 96: Place(6, (8, 8), 8)}
"""Channels of the table of hidden widths, and where there."""
HIDDEN = {
    **dict.fromkeys(("softmax", "flow", "cog", "selective", "log_normal", "gpsa"), (1536, 1280, 2048, 384)),
    "norm_aware": (1328, 1104, 1776, 320),
    "mixer_gate": (952, 728, 1688, 208),
    "activator": (1152, 960, 1536, 288),
    "reversed": (1440, 1192, 1912, 360),
    "optimised": (1728, 1440, 2304, 432),
    "efficient": (1920, 1600, 2560, 480),
    "super": (1872, 1544, 2560, 456),
    "kdgqa": (1728, 1440, 2304, 432),
    "dw7": (2088, 1736, 2792, 504),
    "polarized_parallel": (1704, 1416, 2280, 408),
    "polarized_sequential": (1760, 1464, 2360, 424),
    "subspace": (2088, 1736, 2792, 504),
    "lka": (1688, 1400, 2264, 392),
    "focal": (1520, 1264, 2032, 368),
    "atconv": (1728, 1440, 2304, 432),
    "hilo": (1632, 1360, 2176, 408),
    "gnconv": (1552, 1288, 2088, 352),  # the design says 1560, of 1008 parameters less than HorNet's layer has
}


def tiny(model, mixer, **kwargs):
    torch.manual_seed(0)
    return visionattn.create_model(model, num_classes=10, mixer=mixer, **SIZES[model] | kwargs)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, MixerBlock)]


def alive(model):
    """With every branch alive: some mixers begin with zeros."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("mixer", EVERY)
def test_every_mixer_stands_in_both_skeletons(mixer, model):
    network = alive(tiny(model, mixer)).train()
    x = torch.randn(2, 3, 32, 32)
    logits = network(x)
    network.training_loss(logits.square().sum(), x, logits).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if FROZEN not in n] == []
    if MIXERS[mixer].fixed:
        for size in ((97, 61), (16, 64)):
            with pytest.raises(VisionattnError, match=r"made for images of 32 x 32 \(img_size\), got"):
                network.eval()(torch.randn(1, 3, *size))
    else:
        assert network.eval()(torch.randn(1, 3, 97, 61)).shape == (1, 10)


@pytest.mark.parametrize("mixer", HIDDEN)
def test_hidden_widths_are_those_of_the_design(mixer):
    made = [MixerBlock(dim, mixer, place, device="meta") for dim, place in PLACES.items()]
    assert tuple(block.mlp.fc1.out_features for block in made) == HIDDEN[mixer]


@pytest.mark.parametrize("model", SIZES)
def test_parameters_are_equal(model):
    """Within 3 % of softmax attention's in every block, which the block asserts, and in total."""
    with torch.device("meta"):
        totals = {
            m: sum(p.numel() for p in visionattn.create_model(model, mixer=m, head_dim=16).parameters()) for m in EVERY
        }
    assert max(totals.values()) < 1.03 * totals["softmax"] and min(totals.values()) > 0.97 * totals["softmax"]
    same_mlp = visionattn.create_model(model, mixer="none", mlp_ratio=4.0)
    assert sum(p.numel() for p in same_mlp.parameters()) < 0.8 * totals["softmax"]


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "told"),
    [
        ("isotropic_small", {"mixer": "flaw"}, UnknownModelError, "unknown mixer flaw; did you mean flow"),
        *(
            (
                "isotropic_small",
                {"mixer": mixer, "mixer_kwargs": {name: 1}},
                UnknownArgumentError,
                f"mixer {mixer} got unknown arguments {name}; it takes .*{known}",
            )
            for mixer, known in (
                ("softmax", "attn_drop, clip,"),
                ("cog", "attn_drop"),
                ("subspace", "num_subspaces"),
                ("none", "none"),
                ("activator", "hidden_dim"),
                ("moh", "attn_drop, balance"),
                ("mixer_gate", "channel_dim, drop, num_tokens, token_dim"),
                ("soft_causal", "soft_mask_epochs, soft_mask_rate"),
                ("sparsifiner", "attn_drop, attn_keep_rate, .*grid_size"),
            )
            for name in ("speed", "dim", "device")
        ),  # fmt: skip
        (
            "test_isotropic",
            {"mixer_kwargs": {"num_heads": "a"}},
            UnknownArgumentError,
            "num_heads as an integer, got 'a'",
        ),
        ("test_isotropic", {"mixer_kwargs": {"num_heads": -4}}, VisionattnError, "integer num_heads >= 1, got -4"),
        ("test_isotropic", {"img_size": 0}, UnknownArgumentError, "img_size in pixels, one number or .*got 0"),
        ("test_isotropic", {"depth": 0}, VisionattnError, "an integer depth >= 1, got 0"),
        ("test_isotropic", {"mlp_ratio": 0.0}, VisionattnError, "an integer hidden_dim >= 1, got 0"),
        ("test_pyramid", {"native_grid": 0}, VisionattnError, "an integer native_grid >= 1, got 0"),
        *(
            ("test_isotropic", {"mixer": mixer, "mixer_kwargs": kwargs, "img_size": 64}, VisionattnError, told)
            for mixer, kwargs, told in (
                ("super", {"num_tokens": 3}, "mixer super .*expected the 3 tokens that super attention was made for"),
                ("mixer_gate", {"num_tokens": 3}, "made for 3 tokens, got 64"),
                ("subspace", {"num_subspaces": 0}, "an integer num_subspaces >= 1, got 0"),
                ("subspace", {"host": "dw5"}, "expected host one of dw7, softmax, got 'dw5'"),
                ("halo", {"stride": 2}, "it makes .1, 4, 4, 48. of .1, 8, 8, 48. with these arguments"),
            )
        ),
        ("isotropic_small", {"mixer": "self_guided", "depth": 3}, VisionattnError, "mixer self_guided .* stage of 3"),
        ("isotropic_small", {"mixer": "self_guided", "head_dim": 128}, VisionattnError, "even num_heads"),
        ("isotropic_small", {"mixer": "kdgqa", "head_dim": 128}, VisionattnError, "mixer kdgqa .* 6 or more"),
        ("isotropic_small", {"head_dim": 50}, VisionattnError, "head_dim that divides the 384 channels, got 50"),
        ("isotropic_small", {"mixer": "gnconv", "mixer_kwargs": {"order": 9}}, VisionattnError, "mixer gnconv of 384"),
        ("pyramid_small", {"mixer": "gpsa", "everywhere": True}, VisionattnError, "gpsa .*last two stages"),
        (
            "pyramid_small",
            {"mixer": "activator", "mixer_kwargs": {"hidden_dim": 4096}},
            VisionattnError,
            "no MLP makes",
        ),
    ],
)
def test_what_cannot_stand_is_told_in_one_line(model, kwargs, error, told):
    with torch.device("meta"), pytest.raises(error, match=told) as caught:
        visionattn.create_model(model, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        (
            ("flow", "isotropic_small"),
            {"bogus": 1},
            "isotropic_small got unknown arguments bogus; it takes depth",
        ),
        (("flow", "isotropic_small"), {"mixer": "cog"}, "isotropic_small got unknown arguments mixer"),
        (("flow", "isotropic_small"), {"device": "cpu"}, "isotropic_small got unknown arguments device"),
        (("flow", "isotropic_small"), {"depth": "a"}, "isotropic_small takes depth as an integer, got 'a'"),
        (
            ("flow", "isotropic_small"),
            {"img_size": 0},
            r"made with img_size=0 .*integer img_size >= 1, got 0",
        ),
        (("flow", 3), {}, "mixer_info takes model as a text, got 3"),
        ((["flow"], "isotropic_small"), {}, "mixer_info takes name as a text, got"),
    ],
)
def test_what_is_asked_of_no_mixer(args, kwargs, told):
    with pytest.raises(VisionattnError, match=told):
        visionattn.mixer_info(*args, **kwargs)


@pytest.mark.parametrize("mixer", EVERY)
def test_every_mixer_takes_the_arguments_that_it_names(mixer):
    """Those that a class has a default for, at that."""
    layer = MIXERS[mixer].make(48, Place(6, (4, 4), 4, outermost=True), device="meta")
    defaults = {name: p.default for name, p in signature(type(layer)).parameters.items() if p.default is not p.empty}
    kwargs = {name: value for name, value in defaults.items() if name in MIXERS[mixer].options and name != "num_heads"}
    MIXERS[mixer].make(48, Place(6, (4, 4), 4, outermost=True), device="meta", **kwargs)
    assert all(fits(value, MIXERS[mixer].options[name]) for name, value in kwargs.items())


def test_the_head_weighs_tokens_by_the_message_of_reversed_attention():
    network, x = alive(tiny("isotropic_xsmall", "reversed")).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, grid = network._embed(x)
        message = None
        for block in network.blocks:
            tokens, message = block((tokens, message), grid)
        expected = network.head((network.norm(tokens) * message[..., None]).mean(1))
        torch.testing.assert_close(network(x), expected)
        features = network.forward_intermediates(x, norm=True, intermediates_only=True)
        torch.testing.assert_close(features[-1], network.norm(tokens).mT.unflatten(2, grid))
        stages = alive(tiny("pyramid_xsmall", "reversed")).eval().stages
        late = stages[2](torch.randn(2, 16, 16, 16))
        assert late.shape[1] == 48 and stages[3](late).shape[1] == 64 + 1  # the message of a stage is its own


@pytest.mark.parametrize("model", SIZES)
def test_the_second_of_a_pair_is_told_what_is_significant(model):
    network, heard = tiny(model, "self_guided").eval(), []
    for module in network.modules():
        if type(module).__name__ == "SelfGuidedAttention":
            module.register_forward_pre_hook(lambda module, args: heard.append(args[1].shape))
    network(torch.randn(2, 3, 32, 32))
    assert heard == [(2, 8, 8)] * (2 if model.startswith("iso") else 1)


@pytest.mark.parametrize("model", SIZES)
def test_the_loss_of_routed_heads_is_off_unless_it_is_asked_for(model):
    x, nothing = torch.randn(2, 3, 32, 32), torch.zeros(())
    for kwargs, added in (({}, False), (MIXERS["moh"].variants["with load balance"], True)):
        network = tiny(model, "moh", mixer_kwargs=kwargs).train()
        loss = network.training_loss(nothing, x, network(x))
        assert (loss > 0) == added and network.training_loss(nothing, x, x) == 0
        network.set_grad_checkpointing()
        torch.testing.assert_close(network.training_loss(nothing, x, network(x)), loss)
        network.eval()(x)
        assert network.training_loss(nothing, x, x) == 0


def test_the_soft_mask_follows_its_schedule():
    network, x = (
        tiny("isotropic_xsmall", "soft_causal", mixer_kwargs={"soft_mask_epochs": 2}),
        torch.randn(1, 3, 32, 32),
    )
    outs = []
    for epoch in (0, 1, 2, 9):
        network.train().advance(epoch)
        outs.append(network(x))
    assert not torch.allclose(outs[0], outs[1]) and torch.equal(outs[2], outs[3])
    torch.testing.assert_close(network.eval()(x), outs[3])


def test_layers_that_take_turns_take_what_is_their_own():
    network = tiny("pyramid_xsmall", "window_channel", mixer_kwargs={"window_size": 3, "version": 2}, everywhere=True)
    facts = [(m.mixer.window_size if hasattr(m.mixer, "window_size") else m.mixer.version) for m in blocks(network)]
    assert facts == [3, 3, 3, 2, 3]


@pytest.mark.parametrize("model", SIZES)
def test_first_and_last_layer_of_cog_attention_are_softmax(model):
    kinds = [type(block.mixer).__name__ for block in blocks(tiny(model, "cog"))]
    kinds = kinds if model.startswith("iso") else kinds[2:]
    assert kinds == ["SelfAttention", *["CogAttention"] * (len(kinds) - 2), "SelfAttention"]


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("mixer", [name for name in EVERY if MIXERS[name].resize])
def test_weights_of_another_image_size(mixer, model):
    """What is made for a number of tokens is resized; what was smooth stays about what it was."""
    old, new = tiny(model, mixer), tiny(model, mixer, img_size=(48, 40))
    state = new.adapt_state_dict(old.state_dict(), {"img_size": 32})
    new.load_state_dict(state)
    assert new(torch.randn(1, 3, 48, 40)).shape == (1, 10)
    again = old.adapt_state_dict(old.state_dict(), {})
    assert all(torch.equal(again[key], value) for key, value in old.state_dict().items())


@pytest.mark.parametrize("mixer", EVERY)
def test_samples_do_not_depend_on_their_batch(mixer):
    network, x = alive(tiny("isotropic_xsmall", mixer)).eval(), torch.randn(3, 3, 32, 32)
    if mixer in ("dgqa_diff", "dgqa_ema", "pgqa"):
        pytest.skip("by its paper it depends on what was seen before, or draws noise")
    with torch.no_grad():
        torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", CONTROLS)
def test_controls_mix_nothing(mixer):
    network, x = alive(tiny("isotropic_xsmall", mixer)).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = network.forward_tokens(x)
        x[..., :4, :4] += 1
        changed = (network.forward_tokens(x) != before).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(("model", "size"), [("test_isotropic", 8), ("test_pyramid", 32)])
def test_a_single_place_is_refused_where_it_has_no_deviation(model, size):
    network = visionattn.create_model(model, mixer="pat_ch", num_classes=3).eval()
    with pytest.raises(VisionattnError, match=f"{model} expects at least {size + 1} x {size + 1} input"):
        network(torch.randn(2, 3, size, size))
    assert network(torch.randn(2, 3, size + 1, size + 1)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("mixer", EVERY)
def test_compiled(mixer, model):
    torch._dynamo.reset()
    network, x = alive(tiny(model, mixer)).eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(deepcopy(network), fullgraph=True, backend="aot_eager")  # some keep what they saw
    torch.manual_seed(1)
    expected = network(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    compiled.train()(x).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("mixer", EVERY)
def test_exported(mixer, model):
    # A graph of several tiles or windows does not take a map of one, as that of several images may not take one.
    scale = 4 if mixer == "window_channel" else 2 if mixer in ("halo", "neighborhood") else 1
    network, x = alive(tiny(model, mixer)).eval(), torch.randn(2, 3, 48 * scale, 48 * scale)
    if MIXERS[mixer].fixed:
        sizes, sample, others = {0: torch.export.Dim("batch")}, x[..., :32, :32], [(1, 3, 32, 32), (3, 3, 32, 32)]
    else:
        sizes, sample, others = (
            {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},
            x,
            [(1, 3, 40 * scale, 48 * scale), (3, 3, 61 * scale, 97 * scale)],
        )
    if mixer == "pgqa":
        others = []  # it draws noise
    if mixer in ("self_guided", "norm_aware"):
        others = others[1:]
    exported = torch.export.export(deepcopy(network), (sample,), dynamic_shapes=(sizes,)).module()
    with torch.no_grad():
        agrees(exported, network, others)


@pytest.mark.slow
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("mixer", EVERY)
def test_resumed_with_the_same_bits(images: str, tmp_path: Path, mixer: str, model: str):  # noqa: F811
    argv = [f"--model_kwargs.{key}={value}" for key, value in (SIZES[model] | {"mixer": mixer}).items()]
    argv += ["--model_kwargs.drop_path_rate", "0.1", "--data.root", images]
    resumes_with_the_same_bits(tmp_path, "--model", model, *[arg.replace("(", "[").replace(")", "]") for arg in argv])


@pytest.mark.slow
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("mixer", [name for name in EVERY if name not in CONTROLS])
def test_64_digits_are_fitted(mixer, model):
    """Controls that mix nothing are not asked to."""
    torch.manual_seed(0)
    assert fits_digits(visionattn.create_model(model, num_classes=10, mixer=mixer, head_dim=16))
