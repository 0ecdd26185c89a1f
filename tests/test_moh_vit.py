"""MoH-ViT: what the common tests cannot see."""

import copy
import logging
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import AggregatedAttention, CosineAttention, HeadRouter, MixtureOfHeadAttention
from visionattn.models.moh_vit import RoutedStage
from visionattn.weights import convert_state_dict, load_checkpoint
from visionattn.weights.layouts import fit_state_dict

create = partial(visionattn.create_model, "test_moh_vit")
CASES = [(8, 2, 3), (8, 1, 4), (8, 0, 3), (8, 8, 0), (4, 2, 2)]


def lively(layer):
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer.double()


@pytest.mark.parametrize("heads, shared, top_k", CASES)
def test_gates_are_those_of_the_equation(heads, shared, top_k):
    torch.manual_seed(0)
    router, x = lively(HeadRouter(12, heads, shared, top_k)), torch.randn(2, 5, 12, dtype=torch.double)
    names = ["wg"] * (top_k > 0) + ["wg_0"] * (top_k * shared > 0) + ["wg_1"] * (shared > 1)
    assert [name for name, _ in router.named_children()] == names
    for token, gates in zip(x.flatten(0, 1), router(x).flatten(0, 1), strict=True):
        wanted = torch.zeros(heads, dtype=torch.double)
        wanted[:shared] = shared * (router.wg_1.weight @ token).softmax(0) if shared > 1 else 1
        if top_k:
            p = (router.wg.weight @ token).softmax(0)
            best = p.topk(top_k)
            wanted[shared + best.indices] = top_k * best.values / best.values.sum()
        if top_k and shared:
            w = 2 * (router.wg_0.weight @ token).softmax(0)
            wanted *= torch.cat([w[:1].expand(shared), w[1:].expand(heads - shared)])
        torch.testing.assert_close(gates, wanted)


def test_equal_logits_keep_the_first_heads_with_gates_of_one():
    router = HeadRouter(4, 7, 2, 3)
    for p in router.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randn(1, 3, 4)
    assert router(x).tolist() == [[[1.0] * 5 + [0.0] * 2] * 3]
    assert router.aux_loss(x).item() == pytest.approx(3)  # K, as the means are equal
    for p in router.parameters():
        torch.nn.init.normal_(p, std=300.0)  # softmaxes that underflow
    assert (router(x)[..., 2:] > 0).sum() <= 9 and router(x).isfinite().all()
    half = router.bfloat16()(x.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("shared, top_k", [(3, 2), (5, -1), (1, 0), (2, 0)])
def test_heads_that_there_are_not(shared, top_k):
    with pytest.raises(ValueError, match=f"got shared {shared} and top_k {top_k} of 4 heads"):
        HeadRouter(8, 4, shared, top_k)


def test_load_balance_loss_is_the_published_one():
    torch.manual_seed(0)
    router, x = lively(HeadRouter(12, 8, 2, 3)), torch.randn(2, 4, 5, 12, dtype=torch.double)
    p = (x @ router.wg.weight.T).softmax(-1).flatten(0, 2)
    m = torch.zeros_like(p).scatter_(1, p.topk(3).indices, 1.0)
    loss = router.aux_loss(x)
    torch.testing.assert_close(loss, (p.mean(0) * m.mean(0)).mean() * 6**2)
    (grad,) = torch.autograd.grad(loss, router.wg.weight)
    (wanted,) = torch.autograd.grad(6 * (p.mean(0) * m.mean(0)).sum(), router.wg.weight)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_adds_a_hundredth_of_the_mean_loss_once(checkpointing):
    torch.manual_seed(0)
    model, x = create(num_classes=4).train(), torch.randn(2, 3, 64, 48)
    inputs = []
    routed = [m for stage in model.stages if isinstance(stage, RoutedStage) for m in stage.blocks]
    for block in routed:
        block.mixer.register_forward_pre_hook(lambda module, args: inputs.append((module.router, args[0].detach())))
    model.set_grad_checkpointing(checkpointing)
    logits = model(x)
    wanted = 0.01 * torch.stack([router.aux_loss(each) for router, each in inputs]).mean()
    copy.deepcopy(model)  # which tensors of a graph would refuse
    loss = model.training_loss(logits.sum() * 0, x, logits)
    torch.testing.assert_close(loss, wanted)
    assert len(inputs) == len(routed) == 3
    loss.backward()
    assert all(block.mixer.router.wg.weight.grad.any() for block in routed)
    assert model.stages[0].blocks[0].norm1.weight.grad.any()  # through what the routers see
    logits = model.eval()(x)
    assert model.training_loss(logits.sum() * 0, x, logits) == 0


def test_recomputed_gradients_are_the_same():
    torch.manual_seed(0)
    model, x, found = create(num_classes=4).train(), torch.randn(2, 3, 64, 48), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        logits = model(x)
        model.training_loss(logits.square().mean(), x, logits).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_step_has_the_loss(checkpointing):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, found = create(num_classes=4, depths=(0, 0, 0, 1)).train(), torch.randn(2, 3, 32, 32), []
    model.set_grad_checkpointing(checkpointing)
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        logits = run(x)
        model.training_loss(logits.square().mean(), x, logits).backward()
        found.append(model.stages[3].blocks[0].mixer.router.wg.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert found[0].any()


def test_routed_heads_of_equal_gates_are_plain_attention():
    layer, x = MixtureOfHeadAttention(16, 4, 1, 3), torch.randn(2, 6, 16)
    for p in layer.router.parameters():
        torch.nn.init.zeros_(p)
    q, k, v = layer.heads(x)
    torch.testing.assert_close(layer(x), layer.merge(F.scaled_dot_product_attention(q, k, v)))


def position_bias(layer, size, key_size, pretrain):
    """By the specification's words, one pair after the other."""
    bias = torch.empty(layer.num_heads, math.prod(size), math.prod(key_size), dtype=torch.double)
    keys = [F.adaptive_avg_pool1d(torch.arange(n).double()[None], m)[0] for n, m in zip(size, key_size, strict=True)]
    for i in range(math.prod(size)):
        for j in range(math.prod(key_size)):
            pair = []
            for axis in (0, 1):
                place, key = divmod(i, size[1])[axis], keys[axis][divmod(j, key_size[1])[axis]]
                delta = 8 * (place - key) / (pretrain - 1)
                pair.append(delta.sign() * torch.log2(delta.abs() + 1) / math.log2(8))
            hidden = F.relu(layer.cpb_fc1(torch.stack(pair)))
            bias[:, i, j] = layer.cpb_fc2(hidden)
    return bias


@torch.no_grad()
@pytest.mark.parametrize("size, key_size", [((4, 6), (2, 3)), ((5, 3), (2, 1)), ((7, 4), (3, 3))])
def test_position_bias(size, key_size):
    layer = lively(AggregatedAttention(8, 2, pretrain_size=6))
    found = layer.position_bias(size, key_size, torch.double)
    torch.testing.assert_close(found, position_bias(layer, size, key_size, 6), rtol=0, atol=1e-12)


@torch.no_grad()
def test_position_bias_follows_the_weights_and_the_size():
    layer, x = lively(CosineAttention(8, 2, router=None)), torch.randn(1, 3, 5, 8, dtype=torch.double)
    first = layer(x)
    layer.cpb_fc2.weight *= 2
    assert not torch.allclose(layer(x), first)
    assert layer(x[:, :2]).shape == (1, 2, 5, 8)


def test_pooled_sizes():
    assert AggregatedAttention(8, 2, pool_ratio=8).pooled_size(25, 7) == (3, 1)
    assert AggregatedAttention(8, 2, pool_size=7).pooled_size(25, 5) == (7, 5)
    model = create(fixed_pool_size=2)
    assert [stage.blocks[0].mixer.pool_size for stage in model.stages[:3]] == [(2, 2)] * 3
    assert model(torch.randn(1, 3, 97, 61)).shape == (1, 1000)


def test_sizes_that_the_bias_is_measured_by():
    def grids(**kwargs):
        return [stage.blocks[0].mixer.pretrain_size[0] for stage in create(**kwargs).stages]

    assert grids() == grids(img_size=384) == [56, 28, 14, 7]
    model = visionattn.create_model("moh_vit_small_75", img_size=(160, 256), depths=(1, 1, 1, 1))
    assert [stage.blocks[0].mixer.pretrain_size for stage in model.stages] == [(40, 64), (20, 32), (10, 16), (5, 8)]
    x = torch.randn(1, 3, 64, 64)
    one, other = create().eval(), create(img_size=64, pretrain_size=64).eval()
    other.load_state_dict(one.state_dict())
    assert (one(x) - other(x)).abs().max() > 1e-6


def without_routers(model):
    """As TransNeXt publishes it."""
    names = {"stem.": "patch_embed1.", ".mixer.": ".attn.", ".mlp.dwconv.": ".mlp.dwconv.dwconv."}
    state = {}
    for key, value in model.state_dict().items():
        if ".router." in key:
            continue
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if key.startswith("stages."):
            _, stage, part, rest = key.split(".", 3)
            number = int(stage) + 1
            parts = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}
            key = f"{parts[part]}{number}.{rest}"
        state[key] = value[:, :, None, None] if key.endswith(".sr.weight") else value
    return state


def test_transnext_files_leave_the_routers_fresh(caplog, tmp_path):
    published = without_routers(create())
    assert "block1.0.attn.sr.weight" in published and "norm4.bias" in published
    torch.save(published, tmp_path / "transnext.pth")
    with caplog.at_level(logging.WARNING, "visionattn"):
        model = create(checkpoint_path=str(tmp_path / "transnext.pth"))
        load_checkpoint(create(), tmp_path / "transnext.pth")
    fitted, strict = (record.getMessage() for record in caplog.records)
    assert "re-initialised 10 keys (stages.0.blocks.0.mixer.router.wg_1.weight, " in fitted
    assert "left as they were 10 keys (stages.0.blocks.0.mixer.router.wg_1.weight, " in strict
    torch.testing.assert_close(model.state_dict()["stages.2.norm.bias"], published["norm3.bias"])
    plain = create(shared=None)
    assert not any("router" in key for key in plain.state_dict())
    assert fit_state_dict(published, plain)[1] == {"re-initialised": [], "dropped": [], "resized": []}
    plain.load_state_dict(convert_state_dict(published, plain))
    x = torch.randn(1, 3, 64, 64)
    assert plain.eval()(x).isfinite().all() and plain.training_loss(torch.zeros(()), x, x) == 0


def test_variants_differ_in_what_the_file_tells():
    with torch.device("meta"):
        small, other = (visionattn.create_model(f"moh_transnext_small_{n}", depths=(0, 0, 0, 1)) for n in (75, 80))
    one, two = ({k: v.shape for k, v in model.state_dict().items()} for model in (small, other))
    assert one.keys() == two.keys()
    assert {k for k in one if one[k] != two[k]} == {
        f"stages.3.blocks.0.mixer.router.{name}.weight" for name in ("wg", "wg_1")
    }
    assert visionattn.model_info("moh_vit_base_50").weights["in1k"].hf_hub_id == "Chat-UniVi/MoH-ViT-B-50"


def test_initialisation_and_decay():
    torch.manual_seed(0)
    model = create()
    mixer = model.stages[2].blocks[0].mixer
    torch.testing.assert_close(F.softplus(mixer.temperature), torch.full_like(mixer.temperature, 1 / 0.24))
    assert mixer.relative_pos_bias_local.abs().max() < 0.001 and not mixer.learnable_bias.any()
    assert mixer.sr.weight.std().item() == pytest.approx(math.sqrt(2 / 48), rel=0.1)
    assert mixer.q.weight.std().item() == pytest.approx(0.02, rel=0.1) and mixer.router.wg.weight.std() < 0.03
    conv = model.stages[2].blocks[0].mlp.dwconv.weight
    assert conv.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    undecayed = {name.rpartition("mixer.")[2] for name in model.no_weight_decay()}
    assert undecayed == {
        "query_embedding", "temperature", "relative_pos_bias_local",
        *(f"cpb_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }  # fmt: skip
    eps = {(n.rpartition(".")[2], m.eps) for n, m in model.named_modules() if hasattr(m, "eps")}
    assert eps == {("norm", 1e-5), ("norm", 1e-6), ("norm1", 1e-6), ("norm2", 1e-6)}


def test_half_precision_keeps_the_neighbours_share():
    torch.manual_seed(0)
    layer, x = AggregatedAttention(48, 2, pool_ratio=4, router=None), torch.randn(1, 12, 9, 48)
    torch.nn.init.normal_(layer.relative_pos_bias_local, 20.0)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    assert (rounded.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_stages_of_several_lengths():
    with pytest.raises(VisionattnError, match="shared, top_k of one length, got 4, 4, 4, 4, 4, 4, 3"):
        create(top_k=(0, 0, 2))
