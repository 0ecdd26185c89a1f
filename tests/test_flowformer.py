"""Flowformer: its layer against its definition, its position table, and what the golden of the block cannot see."""

from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from numerics import filled
from timm.layers import LayerScale
from torch import nn

import visionattn
from visionattn.layers import FlowAttention
from visionattn.layers.flow_attention import capacities, flows
from visionattn.macs import counted_flops
from visionattn.weights import convert_state_dict, fit_state_dict

GOLDEN = Path(__file__).parent / "goldens" / "mixers" / "flow_attention.npz"


def lively(layer):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def defined(layer, x):
    """One sum after the other, as the paper writes them, with eps where the published code has it."""
    (B, N, C), e = x.shape, layer.eps
    q, k, v = layer.qkv(x).view(B, N, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = q.sigmoid(), k.sigmoid()

    def meet(a, total):
        return ((a + e) * (total.unsqueeze(2) + e)).sum(3, keepdim=True) + e

    a, b = 1 / meet(q, k.sum(2)), 1 / meet(k, q.sum(2))
    allocation = meet(q, (b * k).sum(2)).sigmoid()
    competition = N * meet(k, (a * q).sum(2)).clip(-1, 1).softmax(2)
    pairs = a * allocation * (q @ k.mT) * competition.mT  # (B, heads, N, N)
    return layer.proj((pairs @ v).transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(dtype):
    meta, arrays = golden.load(GOLDEN)
    layer = FlowAttention(**meta["create"]["kwargs"]).eval()
    layer.load_state_dict(golden.fill_state_dict(meta["keys"]), strict=True)
    assert sum(p.numel() for p in layer.parameters()) == meta["num_params"]
    x = torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"]))).to(dtype)
    with torch.no_grad():
        found = layer.to(dtype)(x)
        on_map = layer(x.unflatten(1, (7, 7))).flatten(1, 2)
    bound = meta["tolerance"][str(dtype)[6:]] * np.abs(arrays["output"]).max()
    assert np.abs(found.numpy() - arrays["output"]).max() <= bound and torch.equal(found, on_map)


@pytest.mark.parametrize("tokens, heads, eps", [(35, 3, 1e-6), (64, 4, 0.1), (1, 2, 0.1), (7, 12, 0.1)])
def test_layer_is_its_definition(tokens, heads, eps):
    """An eps that can be seen: each of the four products has it, and none of the sums inside."""
    layer = lively(FlowAttention(12, heads, eps=eps)).double()
    x = torch.randn(2, tokens, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    found, expected = layer(x), defined(layer, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    if tokens == 7:
        assert torch.autograd.gradcheck(layer, x)


def test_flow_is_conserved():
    """All sources together give N, of which those above the mean are held back alike, and so half of them."""
    layer = lively(FlowAttention(64, 4)).double()
    q, k, _ = capacities(layer, layer.qkv(torch.randn(2, 200, 64, dtype=torch.float64)))
    taken, given = flows(q, k, layer.eps)
    torch.testing.assert_close(given.sum(2), torch.full((2, 4, 1), 200.0, dtype=torch.float64))
    strongest = (given == given.amax(2, keepdim=True)).double().mean()
    assert 0.3 < strongest < 0.7 and (taken > 0).all()


def test_layer():
    with pytest.raises(ValueError, match="dim 12 is not divisible by num_heads 5"):
        FlowAttention(12, 5)
    layer, (N, C) = FlowAttention(96), (15 * 22, 96)
    assert layer.num_heads == 12 and layer.eps == 1e-6
    with counted_flops() as counter, torch.no_grad():
        layer(torch.randn(1, 15, 22, 96))
    totals = 6 * N * C  # two sums over all tokens, and the four products with sums: not in the cost line
    assert counter.get_total_flops() == 2 * (4 * N * C**2 + 2 * N * C * 8 + totals)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(torch.randn(1, N, C)).dtype == torch.bfloat16


@torch.no_grad()
def test_sums_over_many_tokens_are_not_rounded():
    """A sum of 65,536 keys of a half: float16 holds none so large, bfloat16 every 128th number."""
    layer = FlowAttention(8, 2)
    x = torch.randn(1, 2**17, 8)
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert (layer(x) - expected).abs().max() < 0.02 * expected.abs().max()


def test_details():
    """Layer scale of the MLP alone, and what weight decay leaves."""
    with torch.device("meta"):
        model = visionattn.create_model("flowformer")
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert len(blocks) == 19 and all(isinstance(block.ls1, nn.Identity) for block in blocks)
    assert all(isinstance(block.ls2, LayerScale) and block.mixer.num_heads == 12 for block in blocks)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert model.no_weight_decay() == {"stem.pos_embed.weight"} and model.grid_size == (56, 56)
    model = visionattn.create_model("test_flowformer")
    assert all((block.ls2.gamma == 1e-5).all() for stage in model.stages for block in stage.blocks)
    assert not model.head.bias.any() and 0.01 < model.stages[3].blocks[0].mixer.qkv.weight.std() < 0.03


def published(model):
    """The model's tensors by the names of the published code, whose files nobody has."""
    found = {}
    for key, value in model.state_dict().items():
        key = key.replace("mixer", "attn").replace("ls2.gamma", "gamma")
        if key.startswith("stages"):
            _, i, part, rest = key.split(".", 3)
            key = f"patch_embed.{i}.{rest}" if part == "downsample" else f"blocks.{i}.{rest}"
        found[key.replace("stem.proj", "patch_embed.0.proj").replace("stem.pos_embed.weight", "pos_embed")] = value
    return found


def test_published_names():
    model, other = (visionattn.create_model("test_flowformer") for _ in range(2))
    found = convert_state_dict(published(other), model)
    assert all(torch.equal(found[key], value) for key, value in other.state_dict().items())


@torch.no_grad()
def test_positions_follow_the_size():
    model = visionattn.create_model("test_flowformer", img_size=(64, 48)).eval()
    assert model.grid_size == (16, 12) and model.stem.pos_embed.weight.shape == (1, 192, 16)
    own = visionattn.create_model("test_flowformer").eval()
    fitted, report = fit_state_dict(published(model), own, {"img_size": (64, 48)})
    own.load_state_dict(fitted, strict=True)
    assert any("pos_embed" in told for told in report["resized"])
    table = model.stem.pos_embed.weight.view(1, 16, 12, 16).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(table, (8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(own.stem.pos_embed.weight, wanted.flatten(2).mT)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), own(x))  # a table is resampled for an image as for a model


@torch.no_grad()
def test_no_patch_is_of_padding_alone():
    """One row and column over make a patch each, of the image and of zeros beside it."""
    model = filled(visionattn.create_model("test_flowformer"))
    x = torch.randn(1, 3, 33, 65)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 17), (5, 9), (3, 5), (2, 3)]
    padded = nn.functional.pad(x, (0, 3, 0, 3))
    torch.testing.assert_close(model(padded), model(x))
    assert not torch.allclose(model(nn.functional.pad(x, (0, 31, 0, 31))), model(x), atol=1e-3)
