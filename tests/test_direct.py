"""What is computed past modules and autograd on CPUs, for speed, is what the modules compute."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import visionattn
from visionattn import layers
from visionattn.backbone import base
from visionattn.errors import VisionattnError
from visionattn.layers import conv_norm, norm_act_product, pointwise, product
from visionattn.layers.direct import is_direct
from visionattn.layers.pointwise import Mlp, Pointwise, Pointwise2d

FAMILIES = sorted(visionattn.list_models("test_*"))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Pieces so small that tiny inputs have several."""
    monkeypatch.setattr(pointwise, "CHUNK", 2**12)
    monkeypatch.setattr(base, "SLICE", 2**12)
    monkeypatch.setattr(norm_act_product, "WORTH", 0)
    yield
    visionattn.set_pointwise("auto")


def plain(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(3, 7, 5, 24), (2, 11, 24), (24,), (0, 4, 24)])
@pytest.mark.parametrize("route", product.ROUTES)
def test_mlp_is_its_modules(shape, route):
    visionattn.set_pointwise(route)
    mlp, x = Mlp(24, 96), torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        close(mlp(x), plain(mlp, x))
    with torch.inference_mode():
        close(mlp(x.detach()), plain(mlp, x))
    inputs = [x, *mlp.parameters()]
    for a, b in zip(*(torch.autograd.grad(f.square().sum(), inputs) for f in (mlp(x), plain(mlp, x))), strict=True):
        close(a, b, 1e-4)


def test_mlp_has_all_derivatives():
    mlp, x = Mlp(8, 96).double(), torch.randn(5, 7, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, x) and torch.autograd.gradgradcheck(mlp, x[:1, :2])
    _, tangent = torch.func.jvp(mlp, (x,), (torch.ones_like(x),))
    close(tangent, torch.func.jvp(lambda x: plain(mlp, x), (x,), (torch.ones_like(x),))[1])
    each = torch.func.vmap(torch.func.grad(lambda x: mlp(x).square().sum()))(x.detach())
    close(each, torch.autograd.grad(plain(mlp, x).square().sum(), x)[0])


@pytest.mark.parametrize("frozen", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc", "x"])
def test_mlp_with_frozen_parts(frozen):
    mlp, x = Mlp(24, 96), torch.randn(3, 40, 24, requires_grad=frozen != "x")
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    expected = copy.deepcopy(mlp)
    mlp(x).sum().backward()
    found, x.grad = x.grad, None
    plain(expected, x).sum().backward()
    for a, b in [
        (found, x.grad),
        *((a.grad, b.grad) for a, b in zip(mlp.parameters(), expected.parameters(), strict=True)),
    ]:
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-4)


def test_mlp_recomputed():
    mlp, x = Mlp(24, 96), torch.randn(3, 40, 24, requires_grad=True)
    again = checkpoint(mlp, x, use_reentrant=False)
    again.sum().backward()
    close(x.grad, torch.autograd.grad(plain(mlp, x).sum(), x)[0], 1e-4)


def test_hooks_are_called():
    """Each once and with the whole batch, however deep it is in the model."""
    model = visionattn.create_model("test_davit").eval()
    x, seen = torch.randn(4, 3, 64, 64), []
    with torch.no_grad():
        expected = model(x)
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: seen.append((m, out)))
    with torch.no_grad():
        close(model(x), expected)
    found = {id(m) for m, _ in seen}
    assert all(len(out) == 4 for _, out in seen) and len(found) == len(seen)
    assert found >= {id(m) for m in model.modules() if isinstance(m, nn.GELU | nn.Linear | nn.Conv2d | nn.LayerNorm)}


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_are_the_batch(name, monkeypatch):
    torch.manual_seed(0)
    model, x = visionattn.create_model(name).double().eval(), torch.randn(5, 3, 64, 96).double()
    with torch.no_grad():
        sliced = model(x), *model.forward_intermediates(x, intermediates_only=True)
        monkeypatch.setattr(base, "SLICE", 2**40)
        whole = model(x), *model.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(sliced, whole, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_routes_agree(name):
    torch.manual_seed(0)
    fresh, x, out = visionattn.create_model(name).eval(), torch.randn(2, 3, 64, 96), []
    for route in ("linear", "conv"):
        model = copy.deepcopy(fresh)
        visionattn.set_pointwise(route)
        with torch.no_grad():
            out.append(model(x))
        model.train()
        out.append(torch.autograd.grad(model(x).square().sum(), next(model.parameters()))[0])
    if "sparsifiner" not in name:  # whose selections turn on ties
        close(out[0], out[2], 1e-4)
    assert out[1].shape == out[3].shape


def test_statistics_are_those_of_the_batch():
    """Batch norms that learn their statistics without gradients see all samples at once."""
    torch.manual_seed(0)
    model = visionattn.create_model("test_van").eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.train()
    other = copy.deepcopy(model)
    x = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        model(x)
    with torch.enable_grad():
        other(x)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.SiLU(), nn.Hardswish()])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Conv2d(6, 8, 3, 2, 1, bias=False), lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: Pointwise2d(6, 8)],
)
def test_norms_are_merged(make, affine, act):
    conv, norm = make(), nn.BatchNorm2d(8, affine=affine).eval()
    for tensor in norm.state_dict().values():
        if tensor.ndim:
            nn.init.uniform_(tensor, 0.5, 1.5)
    channels = 8 if getattr(conv, "groups", 1) == 8 else 6
    x = torch.randn(2, channels, 19, 23)
    with torch.no_grad():
        assert conv_norm._merges(x, conv, norm) == affine
        merged = conv_norm.product_norm(conv, norm, x, act)
        close(merged, norm(conv(x)) if act is None else act(norm(conv(x))))
        norm.train()
        assert not conv_norm._merges(x, conv, norm)
    norm.eval()
    close(conv_norm.product_norm(conv, norm, x, act), merged)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 8, 3, bias=False), lambda: Pointwise2d(6, 8)])
def test_norms_in_place(make, monkeypatch):
    monkeypatch.setattr(norm_act_product, "WORTH", 2**40)
    monkeypatch.setattr(norm_act_product, "IN_PLACE", 0)
    product, norm = make(), nn.BatchNorm2d(8).eval()
    for tensor in norm.state_dict().values():
        if tensor.ndim:
            nn.init.uniform_(tensor, 0.5, 1.5)
    for memory_format in torch.channels_last, torch.contiguous_format:
        x = torch.randn(2, 6, 19, 23).to(memory_format=memory_format)
        with torch.no_grad():
            close(conv_norm.product_norm(product, norm, x, nn.ReLU()), norm(product(x)).relu())
            seen = []
            handle = product.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
            conv_norm.product_norm(product, norm, x)
            handle.remove()
            close(seen[0], product(x))


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Hardswish()])
@pytest.mark.parametrize("in_place", [0, 2**40])
def test_small_mlps(act, in_place, monkeypatch):
    monkeypatch.setattr(norm_act_product, "IN_PLACE", in_place)
    fc1, norm, fc2 = Pointwise2d(6, 8, bias=False), nn.BatchNorm2d(8).eval(), Pointwise2d(8, 6, bias=False)
    for tensor in norm.state_dict().values():
        if tensor.ndim:
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 6, 5, 7)
    with torch.no_grad():
        y = norm_act_product.small_mlp(fc1, norm, act, fc2, x)
        assert (y is None) == isinstance(act, nn.Hardswish)
        if y is not None:
            close(y, fc2(act(norm(fc1(x)))))
        visionattn.set_pointwise("conv")
        assert norm_act_product.small_mlp(fc1, norm, act, fc2, x) is None
    visionattn.set_pointwise("auto")
    assert norm_act_product.small_mlp(fc1, norm, act, fc2, x) is None


def test_what_is_not_direct():
    x = torch.randn(2, 3)
    assert is_direct(x)
    assert not is_direct(x.half()) and not is_direct(x.to("meta"))
    with torch.autocast("cpu"):
        assert not is_direct(x)
    with torch.autograd.forward_ad.dual_level():
        assert not is_direct(x)
    torch.func.vmap(lambda y: [y, bool(is_direct(y)) and pytest.fail("inside of vmap")][0])(x)
    with FlopCounterMode(display=False):
        assert not is_direct(x)


def assert_nothing_spare_is_kept(layer: Pointwise, x: torch.Tensor) -> None:
    """Of a product whose input is changed, whose bias is stepped, or that is frozen, no gradient wants these."""
    layer.weight.requires_grad_(False)
    y = layer(z := x * 1)
    with torch.no_grad():
        z.add_(1)
        layer.bias.add_(1)
    close(torch.autograd.grad(y.sum(), x)[0], layer.weight.sum(0).expand_as(x), 1e-4)
    with torch.inference_mode():
        z = x.clone()
    assert torch.autograd.grad(layer(z).sum(), layer.bias)[0].shape == layer.bias.shape
    layer.weight.requires_grad_()
    y = layer(x.detach())
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.autograd.grad(y.sum(), layer.weight)[0].shape == layer.weight.shape


@pytest.mark.parametrize("layer", [Pointwise(0, 4), Pointwise(4, 0), Pointwise(4, 8).double(), Pointwise(5, 8)])
def test_products_that_onednn_refuses(layer, monkeypatch):
    """What they return, or what is wrong with them, is for torch's own to say."""
    monkeypatch.setattr(product, "LARGE", 0)
    visionattn.set_pointwise("linear")
    x, told = torch.randn(3, layer.in_features if layer.out_features < 5 else 4), []
    for compute in (layer, partial(F.linear, weight=layer.weight, bias=layer.bias)):
        try:
            y = compute(x)
            y.sum().backward()
            told.append(y.shape)
        except RuntimeError as error:
            told.append(str(error))
    assert told[0] == told[1]


@pytest.mark.parametrize("shape", [(3, 7, 5, 24), (2, 11, 24), (24,), (0, 4, 24)])
def test_products_of_few_channels(shape, monkeypatch):
    monkeypatch.setattr(product, "LARGE", 0)
    visionattn.set_pointwise("linear")
    layer, x = Pointwise(24, 40), torch.randn(shape, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def derivatives(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        firsts = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return *firsts, *torch.autograd.grad(sum(each.square().sum() for each in firsts), inputs)

    out = layer(x)
    assert "FewChannels" in type(out.grad_fn).__name__ or not product.FUSED
    with torch.no_grad():
        close(layer(x), out)
    expected = F.linear(x, layer.weight, layer.bias)
    close(out, expected)
    for a, b in zip(derivatives(out), derivatives(expected), strict=True):
        close(a, b, 1e-4 * (1 + b.abs().sum().item()))
    assert_nothing_spare_is_kept(layer, x)
    for frozen in inputs:
        frozen.requires_grad_(False)
        y, wanted = layer(x).sum(), [each for each in inputs if each is not frozen]
        for a, b in zip(
            torch.autograd.grad(y, wanted), torch.autograd.grad(F.linear(*inputs).sum(), wanted), strict=True
        ):
            close(a, b, 1e-4)
        frozen.requires_grad_()


def test_unknown_route():
    with pytest.raises(VisionattnError, match="^expected a route .* auto, linear, conv, got 'fast'$"):
        visionattn.set_pointwise("fast")


@pytest.mark.parametrize("text", [None, "", "[1]", '{"a": 3', "{}"])
def test_route_is_measured_once_and_kept(text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file, measured = tmp_path / "visionattn" / "pointwise.json", []
    if text is not None:
        file.parent.mkdir()
        file.write_text(text)
    monkeypatch.setattr(product, "_measure", lambda: measured.append(1) or "conv")
    for _ in range(2):
        product._measured.cache_clear()
        assert product.get_pointwise() == "conv"
    assert measured == [1] and list(json.loads(file.read_text()).values()) == ["conv"]
    assert [path.name for path in file.parent.iterdir()] == ["pointwise.json"]
    product._measured.cache_clear()


def test_route_without_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "file" / "hub"))
    product._measured.cache_clear()
    assert product.get_pointwise() in ("linear", "conv")
    product._measured.cache_clear()


def test_centre_of_a_kernel_adds_the_map():
    layer, x = layers.ConvPosEnc(6), torch.randn(2, 9, 7, 6, requires_grad=True)
    expected = x + layer.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    inputs = [x, *layer.parameters()]
    close(layer(x), expected)
    for a, b in zip(*(torch.autograd.grad(f.square().sum(), inputs) for f in (layer(x), expected)), strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_channel_attention_has_all_derivatives(version):
    layer = layers.ChannelAttention(8, 2, version=version).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


TAKEN = {
    "test_attnet": "_GatedMlp",
    "test_davit": "GeluMlp",
    "test_hornet": "GeluMlp",
    "test_illama": "RmsNorm",
    "test_van": "_DepthwiseMlp",
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_direct_path_is_taken(name):
    """A class that a block's module has no more would end it in silence."""
    out, seen = visionattn.create_model(name)(torch.randn(2, 3, 64, 64)), set()
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert any(TAKEN[name] in node.name() for node in seen), {node.name() for node in seen}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_gradients_through_checkpoints(name):
    """Checkpoints give what a backward pass saved once, in the pass that is differentiated too."""
    torch.manual_seed(0)
    model = visionattn.create_model(name)
    model.eval().set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    assert grad.isfinite().all()
