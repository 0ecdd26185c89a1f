"""Selective attention: its layer against its equation, and weights of published language models."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.layers import (
    CogAttention,
    KeyDrivenGQA,
    LinearLogNormalAttention,
    SelectiveSelfAttention,
    SelfAttention,
)
from visionattn.macs import count_macs
from visionattn.weights import convert_state_dict


def lively(layer):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.double()


def defined(layer, x):
    """One token and head at a time."""
    B, N, C = x.shape
    parts = dict(zip("qkv", layer.qkv(x).view(B, N, 3, layer.num_heads, -1).unbind(2), strict=True))
    scaled = {part: r.clone() for part, r in parts.items()}
    for part in layer.on:
        for token in range(N):
            for head in range(layer.num_heads):
                tau = torch.ones(B, dtype=x.dtype)
                if layer.position:
                    alpha = getattr(layer, f"alpha_{part}")
                    tau = tau + alpha.sigmoid() * math.log(N if layer.position == "length" else token + 1)
                if layer.token == "shared":
                    tau = tau + (F.gelu(parts[part][:, token, head]) @ getattr(layer, f"temp_{part}")[head]).tanh()
                elif layer.token == "mlp":
                    tau = tau + getattr(layer, f"temp_{part}")(x[:, token])[:, head].tanh()
                scaled[part][:, token, head] = tau[:, None] * parts[part][:, token, head]
    q, k, v = (r.transpose(1, 2) for r in scaled.values())
    weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize("token", ["shared", "mlp", None])
@pytest.mark.parametrize(
    "position, on, tokens", [("length", "qv", 7), ("index", "q", 5), (None, "kqv", 6), ("index", "kv", 1)]
)
def test_layer_is_its_equation(token, position, on, tokens):
    layer = lively(SelectiveSelfAttention(12, 3, token=token, position=position, on=on, hidden_ratio=0.5))
    x = torch.randn(2, tokens, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    found, expected = layer(x), defined(layer, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("token", ["shared", "mlp"])
@torch.no_grad()
def test_a_fresh_layer_is_plain_attention(token):
    layer, plain, x = SelectiveSelfAttention(12, 3, token=token), SelfAttention(12, 3, True), torch.randn(2, 9, 12)
    plain.load_state_dict({key: layer.state_dict()[key] for key in plain.state_dict()})
    assert layer(x).sub(plain(x)).abs().max() < 0.05 * plain(x).abs().max()
    lively(layer).reset_parameters()
    assert not layer.float().temperature("q", layer.heads(x)[0], x).sub(1).abs().gt(0.03).any()
    bare = SelectiveSelfAttention(12, 3, token=None, position=None)
    bare.load_state_dict(plain.state_dict())
    assert torch.equal(bare(x), plain(x))


@pytest.mark.parametrize("conv", [False, True])
@torch.no_grad()
def test_weights_of_language_models(conv):
    """What its last token returns is what the causal layer does, which scales the logits of query n."""
    C, heads, N = 12, 3, 7
    published = {"c_attn.weight": (3 * C, C), "c_attn.bias": (3 * C,), "c_proj.weight": (C, C), "c_proj.bias": (C,)}
    published = {key: torch.randn(shape, dtype=torch.float64) for key, shape in published.items()}
    published["beta"] = beta = torch.tensor([0.3], dtype=torch.float64)
    x = torch.randn(1, N, C, dtype=torch.float64)
    qkv = F.linear(x, published["c_attn.weight"], published["c_attn.bias"])
    q, k, v = qkv.view(1, N, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scale = 1 + torch.exp(-torch.exp(beta)) * torch.arange(1, N + 1, dtype=torch.float64).log()[:, None]
    logits = q @ k.mT / 2 * scale
    weights = logits.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
    expected = F.linear((weights @ v).transpose(1, 2).flatten(2), published["c_proj.weight"], published["c_proj.bias"])
    layer = SelectiveSelfAttention(C, heads, token=None, position="index", on="q").double()
    if conv:
        published = {key: value.t() if value.ndim == 2 else value for key, value in published.items()}
    layer.load_state_dict(convert_state_dict(published, layer))
    torch.testing.assert_close(layer(x)[:, -1], expected[:, -1], rtol=0, atol=1e-12)


N, C = 15, 16


@pytest.mark.parametrize(
    "make, macs",
    [
        (lambda: SelectiveSelfAttention(C, 2), 4 * N * C**2 + 2 * N**2 * C + 2 * N * C),
        (lambda: SelectiveSelfAttention(C, 2, token="mlp"), 4 * N * C**2 + 2 * N**2 * C + 2 * N * (C * 4 + 4 * 2)),
        (lambda: CogAttention(C, 2), 4 * N * C**2 + 2 * N**2 * C),
        (lambda: KeyDrivenGQA(C, 8, 2, "dgqa_ema"), 2.5 * N * C**2 + 2 * N**2 * C),
        (lambda: LinearLogNormalAttention(C, 2), 4 * N * C**2 + 4 * N * C * 8),
        (lambda: LinearLogNormalAttention(C, 2, window_size=3), 4 * N * C**2 + 2 * N * C * (8 + 9)),
        (lambda: LinearLogNormalAttention(C, 2, block_diagonal=False), 4 * N * C**2 + 2 * N * C * 8),
    ],
)
def test_multiply_adds_of_blocks_of_no_family(make, macs):
    with torch.device("meta"):
        layer = make()
    assert count_macs(Flat(layer), (C, 3, 5))[""] == macs


def test_details():
    for arguments, told in (({"token": "one"}, "token one of shared, mlp, None, got 'one'"),
                            ({"position": 3}, "position one of length, index, None, got 3"),
                            ({"on": "qx"}, "letters q, k and v, got 'qx'")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            SelectiveSelfAttention(12, 3, **arguments)
    layer, x = SelectiveSelfAttention(C, 2), torch.randn(2, N, C)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


class Flat(nn.Module):
    """A layer of tokens on a map."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(2).mT, x.shape[2:])
