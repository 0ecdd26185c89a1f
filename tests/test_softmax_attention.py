"""Options of softmax attention: weights that reach 0, gates of heads, normalised queries and keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visionattn
from visionattn import sigma_reparam
from visionattn.errors import VisionattnError
from visionattn.layers import HeadGate, SelfAttention, clipped_softmax
from visionattn.layers.fuse import fuse_modules
from visionattn.macs import count_macs

OPTIONS = {
    "norm": {"qk_norm": True},
    "clip": {"clip": (-0.03, 1.003)},
    "alpha": {"clip_alpha": 3.0, "clip_length": 10},
    **{gate: {"gate": gate, "gate_opening": 0.25} for gate in ("constant", "token", "token_mlp", "token_all", "head")},
}


def made(**options) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(16, 4, True, **options).double().eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def direct(layer: SelfAttention, x: torch.Tensor) -> torch.Tensor:
    """The equations, head by head."""
    q, k, v = layer.qkv(x).chunk(3, -1)
    outs = []
    for h in range(4):
        one = slice(4 * h, 4 * h + 4)
        q_h, k_h, x_h = q[..., one], k[..., one], x[..., one]
        if layer.q_norm is not None:
            norms = (q_h, layer.q_norm), (k_h, layer.k_norm)
            q_h, k_h = (F.layer_norm(t, (4,), norm.weight, norm.bias, 1e-5) for t, norm in norms)
        p = (q_h @ k_h.mT / 2).softmax(-1)
        if layer.clip is not None:
            gamma, zeta = layer.clip
            p = ((zeta - gamma) * p + gamma).clip(0, 1)
        out, gate = p @ v[..., one], layer.gate
        if gate is not None:
            w, b = gate.weight, gate.bias[h]
            if gate.kind == "constant":
                a = b
            elif gate.kind == "token_all":
                a = x @ w[h] + b
            elif gate.kind == "token_mlp":
                a = (x_h @ gate.hidden_weight[h].T + gate.hidden_bias[h]).relu() @ w[h] + b
            else:
                a = x_h @ w[h] + b
            a = a.mean(1, keepdim=True) if gate.kind == "head" else a
            out = out * (a.sigmoid() if gate.kind == "constant" else a.sigmoid()[..., None])
        outs.append(out)
    return layer.proj(torch.cat(outs, -1))


@pytest.mark.parametrize("name", OPTIONS)
def test_equations(name):
    layer, x = made(**OPTIONS[name]), tokens(2, 7, 16)
    nn.init.uniform_(layer.gate.bias if layer.gate else layer.proj.bias)
    torch.testing.assert_close(layer(x), direct(layer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [("norm", "alpha", "token_mlp"), ("clip", "head"), ("token_all",)], ids="-".join)
def test_graphs_precision_and_gradients(names):
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    layer, x = made(**options), tokens(2, 9, 16)
    layer.clip = layer.clip and (-0.02, 1.0)  # some weights are left, and some not
    out = layer(x)
    grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    assert all(grad.any() for grad in grads)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, out, rtol=0, atol=1e-12)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(layer, (x,), dynamic_shapes=({**sizes},)).module()
    other = tokens(3, 11, 16)
    torch.testing.assert_close(program(other), layer(other), rtol=0, atol=1e-12)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.float())
    assert half.dtype == torch.bfloat16 and (half - out).abs().max() < 0.05 * out.abs().max()
    assert SelfAttention(16, 4, **options, device="meta")(torch.empty(1, 3, 16, device="meta")).is_meta


def test_rows_at_once(monkeypatch):
    layer, x = made(clip=(-0.05, 1.0)), tokens(2, 23, 16)
    whole = layer(x)
    monkeypatch.setattr("visionattn.layers.clipping.PAIRS", 2 * 4 * 23 * 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole, rtol=0, atol=1e-14)


def test_options_that_change_nothing():
    x, plain = tokens(2, 7, 16), made()
    assert torch.equal(made(qk_norm=False, clip=None, gate=None)(x), plain(x))
    torch.testing.assert_close(made(clip=(0.0, 1.0))(x), plain(x), rtol=0, atol=1e-14)
    for gate in ("constant", "token", "token_mlp", "token_all", "head"):
        layer = made(gate=gate)
        layer.load_state_dict(plain.state_dict(), strict=False)
        for parameter in layer.gate.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(layer.gate.bias, 30.0)
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)
        begun = made(gate=gate, gate_opening=0.25, gate_rescale=True)
        begun.load_state_dict(plain.state_dict(), strict=False)
        assert (begun(x) - plain(x)).abs().max() < 0.01 * plain(x).abs().max()


def test_no_gradient_passes_where_it_is_clipped():
    logits = torch.tensor([8.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    weights = clipped_softmax(logits, -0.1, 1.1)
    assert weights.tolist() == [1.0, 0.0, 0.0]
    assert not torch.autograd.grad(weights @ torch.arange(3.0).double(), logits)[0].any()


def test_training_length_counts_at_any_other():
    assert made(**OPTIONS["alpha"]).clip == (-0.3, 1.0)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_gate_that_follows_nothing_is_merged(rescale):
    layer, x = made(gate="constant", gate_opening=0.3, gate_rescale=rescale), tokens(2, 7, 16)
    nn.init.normal_(layer.gate.bias)
    out, keys = layer(x), made().state_dict().keys()
    fuse_modules(nn.Sequential(layer))
    assert layer.state_dict().keys() == keys
    torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-14)
    layer = made(gate="token")
    fuse_modules(nn.Sequential(layer))
    assert isinstance(layer.gate, HeadGate)


def test_in_a_model():
    options = {"gate": "token", "gate_opening": 0.25, "clip": [-0.02, 1.0]}  # as files have it
    model = visionattn.create_model("test_agent_deit", agent_layer=0, attn_kwargs=options)
    gates = [module for module in model.modules() if isinstance(module, HeadGate)]
    assert len(gates) == 4 and all((gate.bias + math.log(3)).abs().max() < 1e-6 for gate in gates)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(VisionattnError, match="gates"):
        visionattn.create_model("test_agent_deit", agent_layer=0, attn_kwargs={"gates": "token"})


@pytest.mark.parametrize("gate, more", [("token", 3 * 16), ("token_mlp", 3 * 16 + 3 * 4), ("token_all", 3 * 4 * 16)])
def test_multiply_adds(gate, more):
    def macs(**options) -> int:
        layer = nn.Sequential(nn.Flatten(2), SelfAttention(16, 4, **options)).to("meta")
        return count_macs(layer, (3, 4, 4))[""]

    assert macs(gate=gate) - macs() == more


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gate": "tokens"}, "expected gate one of constant, token, token_mlp, token_all, head, got 'tokens'"),
        ({"gate": "token", "gate_opening": 1.0}, "gate_opening between 0 and 1, got 1.0"),
        ({"clip": (0.1, 1.0)}, "gamma <= 0 and zeta >= 1"),
        ({"clip": (-0.1, 1.0), "clip_alpha": 3.0}, "got both"),
        ({"clip_alpha": 3.0}, "clip_alpha and clip_length, or none of them, got 3.0 and None"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention(16, 4, **options)


def test_a_gate_goes_into_a_projection_whose_norm_is_learned():
    layer, x = sigma_reparam(SelfAttention(16, 2, gate="constant", gate_opening=0.3)).eval(), torch.randn(2, 5, 16)
    expected = layer(x)
    layer.fuse()
    assert layer.gate is None
    torch.testing.assert_close(layer(x), expected)
