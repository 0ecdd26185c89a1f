"""Direct paths together with what else people do: nothing differs from the plain path, nor breaks."""

import copy
import re
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils import parametrizations

import visionattn
from visionattn.layers import (
    AgentAttention,
    CausalSelfAttention,
    ChannelAttention,
    CogAttention,
    HaloAttention2d,
    NeighborhoodAttention2d,
    ShiftedWindowAttention2d,
    StripeAttention2d,
    direct,
)
from visionattn.layers.covariance_norm import normed_sum
from visionattn.layers.depthwise_mlp import DepthwiseMlp
from visionattn.layers.gated_mlp import GatedMlp
from visionattn.layers.pointwise import Mlp, Pointwise2d
from visionattn.layers.rms_norm import RmsNorm

TESTS = visionattn.list_models("test_*")
LAYERS = {
    "mlp": (lambda: Mlp(8, 16), (2, 5, 8)),
    "depthwise mlp": (lambda: DepthwiseMlp(8, 16), (2, 8, 5, 4)),
    "gated mlp": (lambda: GatedMlp(8, 16), (2, 8, 5, 4)),
    "norm": (lambda: RmsNorm(8), (2, 5, 8)),
    "cog attention": (lambda: CogAttention(8, 2), (2, 5, 8)),
    "channel attention": (lambda: ChannelAttention(8, 2), (2, 5, 4, 8)),
    "neighbourhood attention": (lambda: NeighborhoodAttention2d(8, 2, 3), (2, 5, 4, 8)),
    "causal attention": (lambda: CausalSelfAttention(8, 2), (2, 5, 8)),
    "agent attention": (lambda: AgentAttention(8, 2, (5, 4), 4), (2, 5, 4, 8)),
    "agent attention with a class token": (lambda: AgentAttention(8, 2, (3, 3), 4, class_token=True), (2, 10, 8)),
    "attention with biases": (lambda: ShiftedWindowAttention2d(8, 2, (8, 8), 8), (2, 8, 8, 8)),
    "stripe attention": (lambda: StripeAttention2d(8, 2, 2), (2, 6, 4, 8)),
    "halo attention": (lambda: HaloAttention2d(8, num_heads=2, block_size=4, halo_size=1), (2, 8, 5, 4)),
}


def made(name: str, **kwargs) -> nn.Module:
    """A model in training whose norms do something."""
    torch.manual_seed(0)
    model = visionattn.create_model(name, num_classes=3, **kwargs).train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def gradients(model: nn.Module, x: Tensor, **kwargs) -> list[Tensor]:
    out, learned = model(x).logsumexp(1).sum(), [p for p in model.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(out, learned, allow_unused=True, **kwargs) if g is not None]


@pytest.mark.parametrize("name", TESTS)
def test_gradients_that_will_be_differentiated(name):
    model, x = made(name).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(1)
    expected = gradients(model, x)
    torch.manual_seed(1)
    for found, wanted in zip(gradients(model, x, create_graph=True), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * (1 + wanted.abs().max().item()))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_is_used_twice(layer):
    """Its input depends on its parameters."""
    make, shape = LAYERS[layer]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(module(module(x)).pow(2).sum(), list(module.parameters()), create_graph=create)
        for create in (True, False)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_images(layer):
    make, shape = LAYERS[layer]
    module, x = make(), torch.randn(0, *shape[1:], requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape and all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_second_derivatives(layer):
    make, shape = LAYERS[layer]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has none on CPUs
        assert gradgradcheck(make().double(), x, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_many_outputs_at_once(layer):
    make, shape = LAYERS[layer]
    module, x = make().double(), torch.randn(1, *shape[1:], dtype=torch.float64)
    found, expected = (torch.autograd.functional.jacobian(module, x, vectorize=many) for many in (True, False))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", TESTS)
def test_gradients_of_many_outputs_of_a_model_at_once(name, monkeypatch):
    model = made(name).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    y, sides = model(x), torch.randn(2, 1, 3, dtype=torch.float64)
    try:
        (found,) = torch.autograd.grad(y, x, sides, retain_graph=True, is_grads_batched=True)
    except RuntimeError as error:  # torch 2.11 knows fewer operations of many at once
        monkeypatch.setattr(direct, "_is_direct", lambda tensors: False)
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            torch.autograd.grad(model(x), x, sides, is_grads_batched=True)
        pytest.skip(f"nor does the plain path have them: {error}")
    for one, side in zip(found, sides, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, x, side, retain_graph=True)[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", TESTS)
def test_checkpoints_of_a_graph_that_is_kept(name):
    model = made(name)
    model.set_grad_checkpointing()
    out = model(torch.randn(2, 3, 64, 64)).logsumexp(1).sum()
    learned = [p for p in model.parameters() if p.requires_grad]
    one, two = (torch.autograd.grad(out, learned, allow_unused=True, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("name", TESTS)
def test_traced_without_gradients(name):
    model, x = made(name).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        expected = model(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TESTS)
def test_backward_inside_of_autocast(name):
    model, x = made(name), torch.randn(2, 3, 64, 64)
    out = model(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        out.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", TESTS)
def test_another_default_device(name):
    """What is made in a pass is made where its input is."""
    model, x = made(name), torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    expected = gradients(model, x)
    torch.manual_seed(1)
    with torch.device("meta"):
        found = gradients(copy.deepcopy(model), x)
        with torch.inference_mode():
            out = model.eval()(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(out, model(x))


@pytest.mark.parametrize("name", ["test_halonet", "test_patnet"])
def test_sizes_and_modes_in_one_loss(name):
    """What norms have learned since is no concern of a graph that is there."""
    model = made(name)
    loss = model(torch.randn(2, 3, 32, 32)).sum() + model(torch.randn(2, 3, 64, 64)).sum()
    loss = loss + model.eval()(torch.randn(2, 3, 64, 64)).sum()
    (loss + model.train()(torch.randn(2, 3, 64, 64)).sum()).backward()


@pytest.mark.parametrize("name", ["test_halonet", "test_patnet"])
def test_cumulative_statistics_with_checkpoints(name):
    model = made(name)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = None
    other, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    other.set_grad_checkpointing()
    for each in (model, other):
        each(x).logsumexp(1).sum().backward()
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", TESTS)
def test_what_is_no_number_stays_none(name):
    model, x = made(name), torch.randn(4, 3, 64, 64)
    x[0, 0, 0, 0] = torch.nan
    assert model(x)[0].isnan().any()


def test_wrapped_shortcuts_are_added():
    model = made("test_halonet")
    wrapped = copy.deepcopy(model)
    for module in list(wrapped.modules()):
        if isinstance(getattr(module, "shortcut", None), nn.Module):
            module.shortcut = nn.Sequential(module.shortcut)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(wrapped(x), model(x), rtol=1e-4, atol=1e-5)


def test_replaced_forwards_are_called():
    calls = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = made("test_halonet")
    module = model.stages[0].blocks[0].norm3
    add_hook_to_module(module, Count())
    model(torch.randn(2, 3, 64, 64))
    assert calls == [module]


@pytest.mark.parametrize("signal", [1.0, 100.0])
def test_norms_of_products_in_which_a_signal_cancels(signal, monkeypatch):
    """Their variance is not told by covariances: it is what rounding leaves of larger numbers."""
    x = torch.randn(4, 1, 32, 32) * signal + 0.01 * torch.randn(4, 16, 32, 32)
    product, norm = Pointwise2d(16, 64, bias=False), nn.BatchNorm2d(64)
    with torch.no_grad():
        product.weight -= product.weight.mean(1, keepdim=True)
    found = normed_sum([(product, copy.deepcopy(norm), x)], None, nn.ReLU())
    expected = norm(product(x)).relu()
    exact = copy.deepcopy(norm).double()(copy.deepcopy(product).double()(x.double())).relu()
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("name, options", [("test_dinat", {"layer_scale": 0.5}), ("test_van", {}), ("test_hornet", {})])
def test_fusing_what_has_no_weight_of_its_own(name, options, wrap):
    model, x = made(name, **options).eval(), torch.randn(2, 3, 64, 64)
    for module in model.modules():
        if hasattr(module, "mlp"):
            wrap(module.mlp.fc2)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.fuse()(x), expected, rtol=1e-4, atol=1e-5)


def test_the_direct_path_is_what_was_tested(monkeypatch):
    """Without it the gradients are the same, so that the tests above compare two ways."""
    model, x = made("test_halonet").double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found = gradients(model, x)
    monkeypatch.setattr(direct, "_is_direct", lambda tensors: False)
    for one, other in zip(found, gradients(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
