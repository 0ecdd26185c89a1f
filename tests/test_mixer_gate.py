"""Gates in place of attention, of NiNformer and Activator: each against its equation, and what goldens cannot see."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.layers import ActivatorBlock, ActivatorGate, MixerGate, NiNBlock
from visionattn.layers.mixer_gate import resize_token_mlps
from visionattn.macs import ATTENTION, counted_flops
from visionattn.weights import convert_state_dict

LAYERS = {
    "mixer": lambda **dd: MixerGate(8, 15, 12, 20, **dd),
    "nin": lambda **dd: NiNBlock(8, 15, 12, 20, 24, **dd),
    "activator": lambda **dd: ActivatorGate(8, 12, **dd),
    "activator block": lambda **dd: ActivatorBlock(8, 12, 24, **dd),
}


def lively(layer):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.double()


def norm(layer, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * layer.weight + layer.bias


def mlp(layer, x):
    hidden = F.gelu(x @ layer.fc1.weight.T + layer.fc1.bias)
    return hidden @ layer.fc2.weight.T + layer.fc2.bias


def mixer_gate(layer, x):
    t = x + mlp(layer.token_mlp, norm(layer.norm1, x).mT).mT
    m = t + mlp(layer.channel_mlp, norm(layer.norm2, t))
    return (x @ layer.proj.weight.T + layer.proj.bias) * m


def activator_gate(layer, x):
    gate, value = x @ layer.proj_1.weight.T + layer.proj_1.bias, x @ layer.proj_2.weight.T + layer.proj_2.bias
    return (norm(layer.norm, F.gelu(gate)) * norm(layer.norm, value)) @ layer.proj_3.weight.T + layer.proj_3.bias


def block(gate):
    def defined(layer, x):
        x = x + gate(layer.gate, norm(layer.norm, x))
        return x + mlp(layer.mlp, norm(layer.norm, x))

    return defined


DEFINITIONS = dict(zip(LAYERS, (mixer_gate, block(mixer_gate), activator_gate, block(activator_gate)), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_definition(name):
    layer = lively(LAYERS[name]())
    x = (0.1 * torch.randn(2, 15, 8, dtype=torch.float64)).requires_grad_()  # where eps counts
    inputs = [x, *layer.parameters()]
    found, expected = layer(x, (3, 5)), DEFINITIONS[name](layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(a.any() for a in ours)


@pytest.mark.parametrize("name", ["nin", "activator block"])
def test_graphs_and_precision(name):
    layer, x = LAYERS[name](), torch.randn(2, 15, 8)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=batch).module()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(exported(x[:1]), layer(x[:1]))
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (layer(x) - expected).abs().max() < 0.03 * expected.abs().max()
    assert LAYERS[name](device="meta", dtype=torch.float16)(x.half().to("meta")).shape == x.shape


def test_tokens_never_meet_in_an_activator():
    layer, x = lively(LAYERS["activator block"]()), torch.randn(2, 15, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[:, 4].sum(), x)
    assert grad[:, 4].all() and not grad[:, :4].any() and not grad[:, 5:].any()
    torch.testing.assert_close(layer(x.unflatten(1, (3, 5))), layer(x).unflatten(1, (3, 5)))
    assert ActivatorBlock(8, 12).mlp is None


def test_costs():
    """The cost lines, less the gate's product; what is no linear map of channels is told to the count of models."""
    with torch.no_grad():
        for layer, macs in (
            (MixerGate(8, 15, 12, 20), 15 * 8**2 + 2 * 15 * 8 * 12 + 2 * 15 * 8 * 20),
            (ActivatorGate(8, 12), 3 * 15 * 8 * 12),
        ):
            with counted_flops() as counter:
                layer(torch.randn(1, 15, 8))
            assert counter.get_total_flops() == 2 * macs
    first = MixerGate(8, 15, 12, 20).token_mlp.fc1
    assert ATTENTION[type(first)](first, (torch.empty(2, 15, 8),)) == 15 * 8 * 12


def test_dropout_is_in_the_mlps():
    layer = MixerGate(8, 15, 12, 20, drop=1.0)
    x = torch.randn(2, 15, 8)
    torch.testing.assert_close(layer(x), layer.proj(x) * x)
    assert not torch.equal(layer.eval()(x), layer.proj(x) * x)


def test_another_count_of_tokens():
    with pytest.raises(ValueError, match="MixerGate is made for 15 tokens, got 12"):
        MixerGate(8, 15, 12, 20)(torch.randn(2, 12, 8))


def test_resizing_for_another_grid():
    """A map of one value is seen and returned as on the old grid, beside a token of no position; a ramp is one."""
    old, new = NiNBlock(8, 1 + 12, 12, 20, 24), NiNBlock(8, 1 + 48, 12, 20, 24)
    with torch.no_grad():
        old.gate.token_mlp.fc2.weight[1:], old.gate.token_mlp.fc2.bias[1:] = torch.randn(12), 0.5
    new.load_state_dict(resize_token_mlps(old.state_dict(), (3, 4), (6, 8), prefix=1), strict=True)
    token, rest = torch.randn(2, 2, 1, 8)
    with torch.no_grad():
        few, many = (block(torch.cat([token, rest.expand(-1, n, -1)], 1)) for block, n in ((old, 12), (new, 48)))
    torch.testing.assert_close(many[:, :2], few[:, :2])
    old.gate.token_mlp.fc2.bias.data[1:] = torch.arange(12.0)
    bias = resize_token_mlps(old.state_dict(), (3, 4), (6, 8), prefix=1)["gate.token_mlp.fc2.bias"][1:].view(6, 8)
    torch.testing.assert_close(bias[1:-1, 1:-1].diff(dim=1), torch.full((4, 5), 0.5))
    same = resize_token_mlps(old.state_dict(), (3, 4), (3, 4), prefix=1)
    torch.testing.assert_close(same, dict(old.state_dict()))


def test_published_names_of_the_gate_alone():
    layer, published = MixerGate(8, 15, 12, 20), {}
    for key, value in layer.state_dict().items():
        for ours, theirs in {
            "norm1": "Mixer.token_mix.0", "token_mlp": "Mixer.token_mix.2.net", "fc1": "0", "fc2": "3",
            "norm2": "Mixer.channel_mix.0", "channel_mlp": "Mixer.channel_mix.1.net",
        }.items():  # fmt: skip
            key = key.replace(ours, theirs)
        published[key] = value
    torch.testing.assert_close(convert_state_dict(published, layer), dict(layer.state_dict()), rtol=0, atol=0)
