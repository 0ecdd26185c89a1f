"""Agent Attention: its layers against their definitions, options, and what goldens and common tests cannot see."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import AgentAttention, SelfAttention, ShiftedWindowAttention2d, StripeAttention2d
from visionattn.weights import convert_state_dict, read_checkpoint

TINY = {
    "agent_pvt_tiny": {"embed_dims": (8, 16, 24, 32), "depths": (1,) * 4, "num_heads": (1, 2, 3, 4)},
    "agent_cswin_tiny": {"embed_dim": 8, "depths": (1,) * 4, "num_heads": (2, 2, 4, 4)},
    "agent_swin_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 2, 2)},
    "agent_deit_tiny": {"embed_dim": 12, "depth": 2},
}


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double().eval()


def tiny(name, **kwargs):
    return visionattn.create_model(name, num_classes=4, **TINY[name] | kwargs).eval()


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def line(length, new):
    """(new, length) weights of linear interpolation with half-pixel centres."""
    source = ((torch.arange(new, dtype=torch.float64) + 0.5) * length / new - 0.5).clamp(0, length - 1)
    return (1 - (source[:, None] - torch.arange(length)).abs()).clamp(min=0)


def bias(layer, kind, H, W, shape):
    """(heads, agents, H, W) of one of the two, by its parts."""
    names = {"to keys": ("an", "ah", "aw"), "to agents": ("na", "ha", "wa")}[kind]
    table, rows, cols = (getattr(layer, f"{name}_bias") for name in names)
    table = line(7, H) @ table @ line(7, W).T
    out = table + (rows @ line(rows.shape[2], H).T)[..., None] + (cols @ line(cols.shape[2], W).T)[:, :, None]
    p = int(layer.agent_num**0.5)
    grid = out.unflatten(1, (p, p)).permute(0, 3, 4, 1, 2)
    return (line(p, shape[0]) @ grid @ line(p, shape[1]).T).flatten(3).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size, shape", [((4, 6), None), ((7, 5), None), ((5, 9), (2, 4)), ((1, 2), None)])
def test_agent_attention_is_its_definition(size, shape):
    layer, (H, W) = randomised(AgentAttention(8, 2, (4, 6), 9, agent_shape=shape)), size
    x, shape = torch.randn(2, H, W, 8, dtype=torch.float64), shape or (3, 3)
    q, k, v = layer.qkv(x).chunk(3, -1)
    bins = [
        [slice(i * n // p, -(-(i + 1) * n // p)) for i in range(p)] for n, p in zip((H, W), shape, strict=True)
    ]  # fmt: skip
    agents = torch.stack([q[:, rows, cols].mean((1, 2)) for rows in bins[0] for cols in bins[1]], 1)
    out = torch.empty_like(x).flatten(1, 2)
    P, R = (bias(layer, kind, H, W, shape).flatten(2) for kind in ("to keys", "to agents"))
    for h in range(2):
        a, b, c, d = (each.flatten(1, -2)[..., 4 * h : 4 * h + 4] for each in (agents, q, k, v))
        collected = (a @ c.mT / 2 + P[h]).softmax(-1) @ d
        out[..., 4 * h : 4 * h + 4] = (b @ a.mT / 2 + R[h].T).softmax(-1) @ collected
    local = layer.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    close(layer(x), layer.proj(out.view_as(x) + local))


def test_class_token_takes_part_but_in_the_pooling_and_the_convolution():
    layer = randomised(AgentAttention(8, 2, (4, 4), 4, class_token=True))
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    out = layer(x)
    close(layer(x, (4, 4)), out)
    layer.ac_bias.data.fill_(-1e4)  # nobody sees it
    patches = layer(x)[:, 1:]
    assert not torch.allclose(patches, out[:, 1:])
    x[:, 0] = 7
    close(layer(x)[:, 1:], patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x, grid", [((2, 3, 8), None), ((2, 12, 8), (1, 1)), ((2, 12, 8), (3, 3))])
def test_sequences_that_are_no_grid(x, grid, dtype):
    layer = AgentAttention(8, 2, (4, 6), 9, dtype=dtype)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(RuntimeError):
            layer(torch.randn(x, dtype=dtype), grid)


def test_tables_that_somebody_else_makes():
    """They are parametrised, or leave agents out."""
    layer, x = randomised(AgentAttention(8, 2, (4, 6), 4)), torch.randn(2, 5, 9, 8, dtype=torch.float64)
    layer.na_bias.data[:, 0] = -torch.inf
    assert layer(x).isfinite().all()
    nn.utils.parametrize.register_parametrization(layer, "an_bias", nn.Tanh())
    with torch.no_grad():
        before = layer(x)
        layer.parametrizations.an_bias.original.sub_(1.0)
        after = layer(x)
    close(after, layer(x))
    assert not torch.allclose(before, after)


def test_projections_that_are_not_contiguous():
    layer, x = randomised(AgentAttention(8, 2, (3, 3), 4)), torch.randn(2, 9, 8, dtype=torch.float64)
    layer.qkv.register_forward_hook(lambda module, args, out: out.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.autograd.gradgradcheck(layer, x.requires_grad_(), fast_mode=True)


def test_arguments_of_layers():
    assert isinstance(AgentAttention(8, 2, proj=False).proj, nn.Identity)
    with pytest.raises(ValueError, match="expected a square number as agent_num, got 8"):
        AgentAttention(8, 2, agent_num=8)
    with pytest.raises(ValueError, match="an even num_heads, got stripe 7 and num_heads 3"):
        StripeAttention2d(12, 3)


def shifted_windows(layer, x, shift):
    """By rolling the padded map, with the regions of the published mask."""
    (H, W), w, heads = x.shape[1:3], layer.window_size, layer.num_heads
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w)).roll((-shift, -shift), (1, 2))
    h, out = torch.arange(w), torch.empty_like(x)
    rows, cols = ((torch.arange(n) >= n - shift).long() for n in x.shape[1:3])
    offset = h[:, None] - h + w - 1
    table = layer.rpb[:, offset[:, None, :, None], offset[None, :, None]].flatten(1, 2).flatten(2)
    for i in range(0, x.shape[1], w):
        for j in range(0, x.shape[2], w):
            region = (rows[i : i + w, None] * 2 + cols[j : j + w]).flatten()
            q, k, v = (
                each.unflatten(-1, (heads, -1)).movedim(2, 1)
                for each in layer.qkv(x[:, i : i + w, j : j + w].flatten(1, 2)).chunk(3, -1)
            )
            logits = q @ k.mT * q.shape[-1] ** -0.5 + table
            logits = logits.masked_fill(region[:, None] != region, -100)
            out[:, i : i + w, j : j + w] = (logits.softmax(-1) @ v).movedim(1, 2).flatten(2).unflatten(1, (w, w))
    return layer.proj(out.roll((shift, shift), (1, 2))[:, :H, :W])


@pytest.mark.parametrize("size", [(8, 12), (9, 6), (4, 4), (1, 2), (3, 17)])
def test_shifted_windows_are_their_definition(size):
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    for shifted in (False, True):
        layer = randomised(ShiftedWindowAttention2d(8, 2, (8, 12), 4, shifted))
        close(layer(x), shifted_windows(layer, x, 2 if shifted else 0))
    layer = randomised(ShiftedWindowAttention2d(8, 2, (4, 4), 7, True))  # one window, where it is made for
    close(layer(x), shifted_windows(layer, x, 0 if size == (4, 4) else 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shifted_window_that_is_the_map(dtype):
    """Its halves do not see each other; here they are of different lengths."""
    layer, x = (
        randomised(ShiftedWindowAttention2d(8, 2, (10, 15), 5, True)).to(dtype),
        torch.randn(2, 5, 5, 8).to(dtype),
    )
    found, expected = layer(x), shifted_windows(layer, x, 2)
    close(found, expected, 1e-4 if dtype == torch.float32 else 1e-10)
    gradients = (torch.autograd.grad(y.square().sum(), [layer.rpb, layer.qkv.weight]) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("size", [(6, 9), (7, 10), (2, 2)])
def test_stripes_are_their_definition(size):
    layer, (H, W) = randomised(StripeAttention2d(8, 4, 3)), size
    x, outs = torch.randn(2, H, W, 8, dtype=torch.float64), []
    for i, (h, w) in enumerate(((H, 3), (3, W))):
        out = torch.empty(2, H, W, 4, dtype=torch.float64)
        for y, z in torch.cartesian_prod(torch.arange(0, H, h), torch.arange(0, W, w)).tolist():
            part = slice(None), slice(y, y + h), slice(z, z + w)
            q, k, v = (each[part][..., 4 * i : 4 * i + 4] for each in layer.qkv(x).chunk(3, -1))
            heads = [each.flatten(1, 2).unflatten(2, (2, 2)).transpose(1, 2) for each in (q, k, v)]
            attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).view_as(v)
            out[part] = attended + layer.lepe[i](v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        outs.append(out)
    close(layer(x), layer.proj(torch.cat(outs, -1)))


@pytest.mark.parametrize("name", TINY)
def test_odd_sizes_and_gradients(name):
    model = tiny(name)
    for size in ((97, 61), (64, 131)):
        x = torch.randn(2, 3, *size)
        out = model(x)
        assert out.shape == (2, 4) and out.isfinite().all()
        close(torch.cat([model(each[None]) for each in x]), out, 1e-5)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_weights_of_another_size_are_resized(name):
    small, large = tiny(name, img_size=64), tiny(name, img_size=(96, 128))
    fitted = convert_state_dict(small.state_dict(), large)
    large.load_state_dict(fitted)
    if name == "agent_pvt_tiny":  # whose positions are interpolated otherwise while it runs
        return
    x = torch.randn(1, 3, 96, 128)
    if name == "agent_deit_tiny":
        close(large(x), small(x), 1e-4)
    kept = [key for key in fitted if key.endswith(("an_bias", "na_bias", "dwc.weight"))]
    assert kept and all(torch.equal(fitted[key], small.state_dict()[key]) for key in kept)


def test_layers_with_agents():
    model = tiny("agent_deit_tiny", depth=6, agent_layer=2, agent_num=(4, 9, 16, 25))
    assert [type(block.mixer) for block in model.blocks] == [AgentAttention] * 2 + [SelfAttention] * 4
    model = tiny("agent_deit_tiny", depth=12, agent_num=(4, 9, 16, 25))
    assert [block.mixer.agent_num for block in model.blocks] == [4, 4, 9, 9, 16, 16, 16, 16, 16, 16, 25, 25]
    model = tiny("agent_swin_tiny", attn_type="AAMB1", agent_shapes=[[9, 9], [4, 8], [3, 3], [7, 7]])
    assert [type(block.mixer) for block in model.stages[2].blocks] == [AgentAttention, ShiftedWindowAttention2d]
    assert model.stages[1].blocks[0].mixer.agent_shape == (4, 8)
    for wrong in ("AAB", "AAMB", "AAAB2", "AACB"):
        with pytest.raises(VisionattnError, match="expected attn_type of four letters"):
            tiny("agent_swin_tiny", attn_type=wrong)


def test_windows_and_stripes_follow_the_size():
    for size, window in ((64, 7), (288, 9)):
        with torch.device("meta"):
            swin, cswin = tiny("agent_swin_tiny", img_size=size), tiny("agent_cswin_tiny", img_size=size)
        assert swin.stages[3].blocks[1].mixer.window_size == min(window, size // 32)
        assert cswin.stages[2].blocks[0].mixer.stripe == size // 32 and cswin.stages[3].blocks[0].mixer.stripe is None


class CfgNode(dict):
    """As training files hold one."""

    def __setstate__(self, state):
        raise AssertionError("the reader has run a file's code")


def test_training_files(tmp_path, monkeypatch):
    """Averaged weights of CSwin and the others' plain ones, past a configuration whose class is not made."""
    module = types.ModuleType("yacs.config")
    module.CfgNode, CfgNode.__module__ = CfgNode, "yacs.config"
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    config = CfgNode(MODEL=CfgNode(NAME="agent"), LR=1e-3)
    config.__dict__["__immutable__"] = True
    for name in ("agent_cswin_tiny", "agent_deit_tiny"):
        plain, averaged, other = tiny(name), tiny(name), {"epoch": 299, "max_accuracy": 74.9, "config": config}
        for model in (plain, averaged):
            nn.init.normal_(model.head.weight)
        states = {"model": plain.state_dict(), "state_dict_ema": averaged.state_dict()}
        torch.save(states | other, tmp_path / "checkpoint.pth")
        content = read_checkpoint(tmp_path / "checkpoint.pth")[0]
        found = convert_state_dict(content, tiny(name))
        assert torch.equal(found["head.weight"], (averaged if "cswin" in name else plain).head.weight)


def test_weight_decay_and_initialisation():
    swin, deit, pvt = (tiny(f"agent_{kind}_tiny") for kind in ("swin", "deit", "pvt"))
    assert swin.no_weight_decay() == {n for n, _ in swin.named_parameters() if n.endswith("rpb")} != set()
    assert deit.no_weight_decay() == {"cls_token", "pos_embed.weight"} and not pvt.no_weight_decay()
    for model in (swin, deit, pvt):
        for name, p in model.named_parameters():
            if name.endswith(("_bias", "rpb", "pos_embed.weight")):
                assert 0.01 < p.std() < 0.03, name
    assert {m.eps for n, m in pvt.named_modules() if isinstance(m, nn.LayerNorm) and "blocks" in n} == {1e-6}
    assert pvt.stem.norm.eps == 1e-5 and isinstance(pvt.norm, nn.Identity)
