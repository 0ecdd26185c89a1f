"""OverLoCK: what its specification states beyond the common tests."""

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visionattn
from visionattn.layers import ContMix2d, ContMixBlock, DilatedReparamConv2d, dynamic_conv2d
from visionattn.layers.dilated_reparam import BRANCHES
from visionattn.models.overlock import RULES
from visionattn.weights import convert_state_dict, fit_state_dict
from visionattn.weights.inverse import published_name

# Published arguments; input, parameters, first values, last values, mean of absolute values.
ALONE = [
    (
        {"dim": 32}, (2, 32, 10, 12), 25516, [1.470221, -1.136615, 0.851963, 1.626593],
        [-1.836435, 0.991389, 0.280896], 1.615788,
    ),
    (
        {"dim": 32, "res_scale": True, "ls_init_value": 1}, (2, 32, 10, 12), 25644,
        [0.760640, -0.581548, 1.224424, 0.378503], [-0.290464, -2.277821, -1.022427], 1.193136,
    ),
    (
        {"dim": 32, "ls_init_value": 1}, (2, 32, 10, 12), 25644, [1.655469, -0.898159, 1.097838, 0.596658],
        [0.791484, 3.289846, -0.839617], 1.591503,
    ),
    (
        {"dim": 48, "kernel_size": 13, "num_heads": 3, "mlp_ratio": 3}, (2, 48, 5, 9), 60560,
        [0.848894, -1.511224, -1.324058, 1.129829], [2.383523, 1.054120, 2.587514], 1.664070,
    ),
]  # fmt: skip


class Alone(nn.Module):
    """The stand-alone block where the network has its own, for whose names there are rules."""

    layouts = {"official": RULES}

    def __init__(self, block):
        super().__init__()
        self.stages = nn.ModuleDict({"2": nn.ModuleDict({"blocks": nn.ModuleList([block])})})


def published_state(block):
    """The tensors of the goldens' rule for the published names of a block: those of the network's, but for two."""
    state = {}
    for name, value in Alone(block).state_dict().items():
        theirs = published_name(RULES, name)
        shape = tuple(value.shape)
        if name.endswith(FLAT) and ".se." not in name:
            shape += (1, 1)
        alone = theirs.removeprefix("sub_blocks3.0.").replace("dyconv_proj", "fusion_proj")
        filled = golden.fill_state_dict([[alone, shape, str(value.dtype).removeprefix("torch.")]])[alone]
        state[theirs] = filled
    return state


FLAT = tuple(f".{part}.weight" for part in (
    "q.proj", "k.proj", "v.proj", "taps", "gate.proj", "mix_proj.proj", "mixer.proj", "fc1", "fc2"
))  # fmt: skip


@pytest.mark.parametrize("kwargs, shape, params, first, last, mean", ALONE)
def test_block_alone(kwargs, shape, params, first, last, mean):
    block = ContMixBlock(**kwargs).eval()
    assert sum(p.numel() for p in block.parameters()) == params
    holder = Alone(block)
    holder.load_state_dict(convert_state_dict(published_state(block), holder))
    with torch.no_grad():
        out = block.double()(torch.from_numpy(golden.fixed_input(shape)))
    torch.testing.assert_close(out[0, 0, 0, :4], torch.tensor(first, dtype=out.dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[1, -1, -1, -3:], torch.tensor(last, dtype=out.dtype), rtol=0, atol=1e-6)
    assert abs(out.abs().mean().item() - mean) < 1e-6


def gathered(weights, value, K):
    """`dynamic_conv2d` by its definition."""
    B, G, H, W, c = value.shape
    out = torch.zeros_like(value)
    for y in range(H):
        for x in range(W):
            top, left = (min(max(at - K // 2, 0), n - K) for at, n in ((y, H), (x, W)))
            window = value[:, :, top : top + K, left : left + K].flatten(2, 3)
            out[:, :, y, x] = (weights[:, :, y, x, :, None] * window).sum(2)
    return out


@pytest.mark.parametrize("K, size", [(5, (5, 5)), (5, (6, 9)), (7, (8, 23)), (3, (13, 40)), (13, (14, 14))])
def test_dynamic_conv(K, size):
    weights = torch.randn(2, 3, *size, K * K, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 3, *size, 2, dtype=torch.float64, requires_grad=True)
    out, expected = dynamic_conv2d(weights, value, K), gathered(weights, value, K)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dynamic_conv2d(weights.detach(), value.detach(), K), expected.detach())
    direction = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, (weights, value), direction, retain_graph=True) for y in (out, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu"):  # not computed with its own gradients
        plain = torch.autograd.grad(dynamic_conv2d(weights, value, K), (weights, value), direction)
    torch.testing.assert_close(plain, ours)


def test_second_gradients_and_small_maps():
    weights = torch.randn(1, 1, 3, 4, 9, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 1, 3, 4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w, v: dynamic_conv2d(w, v, 3), (weights, value))
    with pytest.raises(ValueError, match="expected a map of at least 5 x 5, got 3 x 4"):
        dynamic_conv2d(torch.randn(1, 1, 3, 4, 25), value, 5)


@pytest.mark.parametrize("kernel_size", BRANCHES)
def test_large_kernels_fold_exactly(kernel_size):
    conv, x = DilatedReparamConv2d(6, kernel_size).double(), torch.randn(2, 6, 9, 14, dtype=torch.float64)
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    conv(x)
    expected, trained = conv.eval()(x), conv.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected.detach())  # as one convolution
    conv.fuse()
    torch.testing.assert_close(conv(x), expected)
    deployed = DilatedReparamConv2d(6, kernel_size, deploy=True).double()
    deployed.load_state_dict(DilatedReparamConv2d.fold(trained))
    torch.testing.assert_close(deployed(x), expected)
    with pytest.raises(ValueError, match="expected kernel_size one of 5, 7, .* got 6"):
        DilatedReparamConv2d(6, 6)


def test_trained_files_load_into_folded_models():
    trained = visionattn.create_model("test_overlock", use_ds=True, num_classes=5)
    x = torch.randn(2, 3, 40, 64)
    trained(x)
    trained.eval()
    folded = visionattn.create_model("test_overlock", use_ds=True, deploy=True, num_classes=5).eval()
    assert len(folded.state_dict()) < len(trained.state_dict())
    folded.load_state_dict(convert_state_dict(trained.state_dict(), folded))
    torch.testing.assert_close(folded(x), trained(x), rtol=0, atol=1e-5)
    _, report = fit_state_dict(trained.state_dict(), folded)
    assert not any(report.values())  # all of it is in there
    without = {k: v for k, v in trained.state_dict().items() if not k.startswith("aux_")}
    for use_ds in (True, False):
        model = visionattn.create_model("test_overlock", use_ds=use_ds, num_classes=5)
        for state in (trained.state_dict(), without):
            model.load_state_dict(convert_state_dict(state, model))


def test_second_head():
    """Learns by 0.4 of the task's loss, is no part of the logits, and follows the classifier."""
    model = visionattn.create_model("test_overlock", use_ds=True, num_classes=5).train()
    x, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    seen = []
    handle = model.aux_head.register_forward_hook(lambda *args: seen.append(args[2]))
    logits = model(x)
    criterion = lambda y: F.cross_entropy(y, target)  # noqa: E731
    loss = model.training_loss(criterion(logits), x, logits, criterion)
    torch.testing.assert_close(loss, criterion(logits) + 0.4 * criterion(seen[0]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters()) and model.aux_head.weight.grad.any()
    handle.remove()
    model.zero_grad()
    model(x).sum().backward()  # without that loss
    assert not model.aux_head.weight.grad.any()
    model.training_loss(torch.tensor(2.0), x, logits, criterion)
    assert model.training_loss(torch.tensor(2.0), x, logits, criterion) == 2
    model(x)
    model.eval()(x)
    assert model.training_loss(torch.tensor(2.0), x, logits, criterion) == 2
    model.train()(x)
    norm = model.aux_norm
    model.reset_classifier(7)
    assert model.training_loss(torch.tensor(2.0), x, logits, criterion) == 2  # of the heads that are gone
    assert model.aux_head.out_features == 7 and model.aux_norm is norm
    assert model.get_classifier() == (model.head, model.aux_head)
    model.reset_classifier(0)
    assert not any(n.startswith("aux") for n, _ in model.named_parameters())


def test_overview_in_the_last_feature():
    """As in the published detectors, whose files are loaded."""
    model = visionattn.create_model("test_overlock", overview_feature=True, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 96)
    overview = []
    model.stages[2].context_proj.register_forward_hook(lambda *args: overview.append(args[1][0]))
    plain = model.forward_intermediates(x, intermediates_only=True)[-1]
    model.add_feature_norms([1, 2, 3])
    scale = model.feature_norms[3].overview.scale
    assert scale.weight.eq(1e-5).all() and not scale.bias.any()
    nn.init.ones_(scale.weight)
    found = model.forward_intermediates(x, intermediates_only=True)[-1]
    norm, proj = model.feature_norms[3].overview.norm, model.feature_norms[3].overview.proj
    expected = F.layer_norm(plain.movedim(1, -1), plain.shape[1:2], eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(found, expected + proj(norm(overview[0])))
    names = {published_name(RULES, k) for k in model.state_dict() if "feature_norms.3" in k}
    parts = ("extra_norm.3", "extra_norm.4", "h_proj.0", "h_proj.1")
    assert names == {f"{part}.{each}" for part in parts for each in ("weight", "bias")}


def test_what_is_decayed():
    """Scales, response norms and bias tables are, having several dimensions."""
    model = visionattn.create_model("test_overlock")
    assert model.no_weight_decay() == set()
    dims = {n.rsplit(".", 2)[-2] + n[n.rindex(".") :]: p.ndim for n, p in model.named_parameters()}
    assert dims["ls1.weight"] == dims["grn.gamma"] == dims["grn.beta"] == 4 and dims["contmix.large_rpb"] == 3


def test_context_and_values():
    """Queries are of the map, keys of the context; the halves of the values have kernels of their own."""
    layer = ContMix2d(16, 2, 5, small_kernel_size=3, context_dim=4, value_proj=False).eval()
    x, context, value = torch.randn(2, 16, 8, 9), torch.randn(2, 4, 8, 9), torch.randn(2, 16, 8, 9)
    out = layer(x, context, value)
    torch.testing.assert_close(layer(x, context, value * 2), out * 2)
    assert not torch.allclose(layer(x, context.flip(2), value), out)
    torch.testing.assert_close(layer(x, context), layer(x, context, x))
    value[:, :8] = 0
    assert not layer(x, context, value)[:, :8].any() and torch.equal(layer(x, context, value)[:, 8:], out[:, 8:])
    for kwargs, message in (({"kernel_size": 6}, "odd"), ({"num_heads": 3}, "divisible")):
        with pytest.raises(ValueError, match=message):
            ContMix2d(**{"dim": 16, "num_heads": 2} | kwargs)
