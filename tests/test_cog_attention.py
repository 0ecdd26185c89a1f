"""Attention with negative weights: its layer against its equation, zero logits and masks."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.layers import CogAttention, cog_attention
from visionattn.macs import counted_flops


def lively(layer):
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer.double()


def defined(layer, x, mask=None):
    """One pair at a time."""
    B, N, C = x.shape
    q, k, v = layer.qkv(x).view(B, N, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    rows = []
    for i in range(N):
        s = (q[:, :, i, None] * k).sum(3) * layer.scale
        share = s.abs().exp() if mask is None else s.abs().exp() * mask[i]
        rows.append(torch.einsum("bhj,bhjd->bhd", torch.sign(s) * share / share.sum(2, keepdim=True), v))
    return layer.proj(torch.stack(rows, 1).flatten(2))


@pytest.mark.parametrize("tokens, heads, scale", [(9, 3, None), (1, 2, None), (50, 4, 1.5)])
def test_layer_is_its_equation(tokens, heads, scale, monkeypatch):
    layer = lively(CogAttention(12, heads, qkv_bias=True, qk_scale=scale))
    x = torch.randn(3, tokens, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    found, expected = layer(x), defined(layer, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    for pairs in (1, 8 * tokens, 3 * tokens**2, 2**18):  # some queries of a head, or some heads, at a time
        monkeypatch.setattr(cog_attention, "PAIRS", pairs)
        for out in (layer(x), torch.no_grad()(layer)(x)):
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad((layer(x) * weight).sum(), inputs), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_tokens_of_zeros_have_no_weight_but_a_share():
    """The logits with them are 0: they take e^0 each from what others get, and get nothing themselves."""
    layer = lively(CogAttention(8, 2))
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, (0, 0, 0, 3))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = layer(padded)
        torch.testing.assert_close(out, defined(layer, padded), rtol=0, atol=1e-12)
        torch.testing.assert_close(out[0, 6:], layer.proj.bias.expand(3, -1), rtol=0, atol=0)
        assert not torch.allclose(out[:, :6], layer(x))
    (grad,) = torch.autograd.grad(layer(padded).square().sum(), x)
    assert grad.isfinite().all()


def test_what_is_masked_has_no_share():
    layer, x = lively(CogAttention(8, 2)), torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, mask=mask), defined(layer, x, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, mask=mask)[:, :4], layer(x[:, :4], mask=mask[:4, :4]), rtol=0, atol=1e-12)


def test_details():
    layer, (N, C) = CogAttention(16, 2, attn_drop=0.5), (30, 16)
    assert 0.01 < layer.qkv.weight.std() < 0.03 and not layer.proj.bias.any()
    x = torch.randn(1, N, C)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    with counted_flops() as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * (4 * N * C**2 + 2 * N**2 * C)
