"""Key-driven grouped-query attention: its layer against its equation, ties, few key heads, and what it keeps."""

import copy

import pytest
import torch
from timm.layers import Attention
from torch import nn

from visionattn.backbone.base import recomputed
from visionattn.errors import VisionattnError
from visionattn.layers import KeyDrivenGQA, SelfAttention
from visionattn.layers.key_driven_gqa import owners, shared_out
from visionattn.weights import convert_state_dict


def lively(layer):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.double()


def repaired(shares, heads):
    """Python's own rounding, half to even, and its own first of equals."""
    n = [round(heads * share / sum(shares)) for share in shares]
    while sum(n) > heads:
        n[n.index(max(n))] -= 1
    while sum(n) < heads:
        n[n.index(min(n))] += 1
    return n


def weighed(layer, x):
    """What the keys of each head weigh, in all samples."""
    keys = layer.k(x).view(*x.shape[:2], layer.num_kv_heads, -1)
    return [sum(keys[b, :, head].square().sum().sqrt().item() for b in range(len(x))) for head in range(keys.shape[2])]


def defined(layer, x, n, noise=None):
    """One key head after the other, each with its run of query heads."""
    (B, N, C), d = x.shape, layer.q.out_features // layer.num_heads
    q, k, v = (linear(x).view(B, N, -1, d).transpose(1, 2) for linear in (layer.q, layer.k, layer.v))
    outs, first = [], 0
    for head, length in enumerate(n):
        weights = (q[:, first : first + length] @ k[:, head : head + 1].mT * d**-0.5).softmax(-1)
        y = weights @ v[:, head : head + 1]
        if noise is not None:
            e = noise[head].clone()
            e.fill_diagonal_(0)
            e = (e - e.mean(1, keepdim=True)) / e.std(1, keepdim=True)
            rows = y.flatten(2)
            y = (rows - (e * rows.std(2, keepdim=True) + rows.mean(2, keepdim=True))).view(y.shape)
        outs.append(y)
        first += length
    return layer.proj(torch.cat(outs, 1).transpose(1, 2).reshape(B, N, C))


def assert_same(layer, x, found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight, inputs = torch.randn_like(found), [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("heads, groups", [(6, 3), (8, 2), (4, 1), (12, 5), (3, 3)])
def test_runs_of_key_driven_attention(heads, groups):
    layer = lively(KeyDrivenGQA(24, heads, groups, "kdgqa", qkv_bias=True))
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    m = weighed(layer, x)
    n = repaired([each - min(m) for each in m], heads) if groups > 1 else [heads]
    assert_same(layer, x, layer(x), defined(layer, x, n))
    if groups == 2:
        assert sorted(n) == [0, heads]


def test_equal_runs_and_noise():
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    layer = lively(KeyDrivenGQA(24, 6, qkv_bias=True))
    assert layer.num_kv_heads == 3
    assert_same(layer, x, layer(x), defined(layer, x, [2, 2, 2]))
    layer = lively(KeyDrivenGQA(24, 6, 2, "pgqa")).eval()
    noise = torch.rand(2, 3, 28, dtype=torch.float64)
    assert_same(layer, x, layer(x, noise=noise), defined(layer, x, [3, 3], noise))
    assert not torch.equal(layer(x), layer(x))  # in evaluation too
    for shape, other in (((2, 3, 27), layer), ((2, 3, 28), KeyDrivenGQA(24, 6))):
        with pytest.raises(ValueError, match=r"expected noise of shape \(2, 3, 28\), got \(2, 3, 27\)|of use to kind"):
            other(x.to(other.q.weight.dtype), noise=torch.rand(shape))


def test_repair():
    """Of all that are in proportion, ties among them: the first of the longest, or of the shortest."""
    for shares in (
        [1, 1, 1, 1, 1],
        [3, 3, 1, 1],
        [0, 2, 2, 2, 1, 1, 1],
        [1, 1, 1],
        [5, 0, 5, 2],
        [1, 1, 3, 3, 2, 2, 1],
    ):
        for heads in range(len(shares), 18):
            n = shared_out(torch.tensor(shares, dtype=torch.float64), heads)
            assert n.tolist() == repaired(shares, heads) and n.sum() == heads, (shares, heads)
    both = shared_out(torch.tensor([[1.0, 1, 1], [0, 0, 1]]), 8)
    assert both.tolist() == [[2, 3, 3], [0, 0, 8]]
    assert owners(torch.tensor([[0, 3, 0, 1]]), 4).tolist() == [[1, 1, 1, 3]]


@torch.no_grad()
def test_keys_that_weigh_the_same():
    """No share is larger than 0: all are alike, where dividing by their sum would be no number."""
    for groups, expected in ((1, [8]), (2, [4, 4]), (4, [2, 2, 2, 2])):
        for kind in ("kdgqa", "dgqa_diff"):
            layer = KeyDrivenGQA(16, 8, groups, kind)
            layer.k.weight.zero_()
            x = torch.randn(2, 5, 16)
            assert layer.allocate(layer.heads(x)[1]).tolist() == [expected] and layer(x).isfinite().all()
            x[0, 0, 0] = torch.nan
            out = layer(x)
            assert out[0].isnan().all() and out[1].isfinite().all()


@torch.no_grad()
def test_samples_by_themselves():
    layer = lively(KeyDrivenGQA(24, 12, 4, "kdgqa", per_sample=True))
    x = torch.randn(5, 3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.cat([layer(one) for one in x.split(1)]), rtol=0, atol=1e-13)
    assert len({tuple(n) for n in layer.allocate(layer.heads(x)[1]).tolist()}) > 1
    with pytest.raises(ValueError, match="per_sample is of use to kind 'kdgqa', not to 'dgqa_ema'"):
        KeyDrivenGQA(24, kind="dgqa_ema", per_sample=True)


@pytest.mark.parametrize("kind", ["dgqa_diff", "dgqa_ema"])
@torch.no_grad()
def test_what_is_kept(kind):
    """Training allots every third step, evaluation always, and a run goes on from its state dict."""
    layer = lively(KeyDrivenGQA(24, 12, 4, kind, window_size=3))
    cache, n = [0.0] * 4, None
    for step in range(8):
        if step == 4:
            state = copy.deepcopy(layer.state_dict())
            layer = KeyDrivenGQA(24, 12, 4, kind, window_size=3).double()
            layer.load_state_dict(state)
        layer.train(step != 5)
        x = torch.randn(2, 6, 24, dtype=torch.float64) * (step + 1)
        m = weighed(layer, x)
        due = not layer.training or layer.step % 3 == 0
        if due:
            pairs = list(zip(cache, m, strict=True))
            n = repaired([abs(c - w) if kind == "dgqa_diff" else 0.9 * w + 0.1 * c for c, w in pairs], 12)
            cache = [(c + w) / 3 for c, w in pairs] if layer.training else m
        torch.testing.assert_close(layer(x), defined(layer, x, n), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.cache, torch.tensor(cache, dtype=torch.float64))
    layer.frozen = True
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer(x[:1] * 9), defined(layer, x[:1] * 9, n), rtol=0, atol=1e-12)
    assert layer.step == 7 and all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert KeyDrivenGQA(24, 12, 5, kind, frozen=True).allocation.tolist() == [2, 2, 3, 2, 3]


def test_recomputed_activations_count_once():
    layer, other = (lively(KeyDrivenGQA(24, 12, 4, "dgqa_diff")) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    for _ in range(2):
        x = torch.randn(2, 6, 24, dtype=torch.float64)
        layer(x).square().sum().backward()
        recomputed(other, x).square().sum().backward()
    for one, two in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)
    assert not other.frozen and all(torch.equal(a, b) for a, b in zip(layer.buffers(), other.buffers(), strict=True))


@torch.no_grad()
def test_weights_of_a_vit():
    """Heads that are alike where they will be shared lose nothing; of others there is the mean."""
    vit, layer = lively(SelfAttention(24, 6, qkv_bias=True)), KeyDrivenGQA(24, 6, 2, qkv_bias=True).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for p in (vit.qkv.weight, vit.qkv.bias):
        runs = p[24:].unflatten(0, (2, 2, 3, 4))
        runs.copy_(runs[:, :, :1].clone().expand_as(runs))
    layer.load_state_dict(convert_state_dict(vit.state_dict(), layer))
    torch.testing.assert_close(layer(x), vit(x), rtol=0, atol=1e-12)
    found = convert_state_dict(Attention(24, 6).state_dict(), KeyDrivenGQA(24, 6, 3, "dgqa_ema"))
    assert found["v.weight"].shape == (12, 24) and found["allocation"].tolist() == [2, 2, 2]
    with pytest.raises(VisionattnError, match="does not fit KeyDrivenGQA"):
        convert_state_dict(Attention(24, 6).state_dict(), KeyDrivenGQA(24, 6, 4, "kdgqa"))


def test_bad_arguments():
    for arguments, told in (({"kind": "mqa"}, "one of gqa, kdgqa, dgqa_diff, dgqa_ema, pgqa, got 'mqa'"),
                            ({"num_kv_heads": 4}, "6 heads of queries cannot share 4 heads of keys with kind 'gqa'"),
                            ({"num_kv_heads": 7, "kind": "kdgqa"}, "cannot share 7 heads of keys with kind 'kdgqa'"),
                            ({"window_size": 0}, "window_size >= 1, got 0")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            KeyDrivenGQA(24, 6, **arguments)
