"""Sparsifiner: what the predictor chooses, token pruning, the two heads of LV-ViT, and learning from a teacher."""

import copy
import math
from pathlib import Path
from unittest.mock import Mock

import golden
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.errors import VisionattnError
from visionattn.layers import ConnectivityPredictor, SparseAttention
from visionattn.macs import counted_flops
from visionattn.models.sparsifiner import SparsifinerLV
from visionattn.weights import convert_state_dict, load_checkpoint

DOUBLE = {"dtype": torch.float64}
GOLDENS = sorted((Path(__file__).parent / "goldens" / "sparsifiner").glob("*-96x96*.npz"))
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "reduce_n_factor": 3}


def randomised(module, std=0.5):
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.double()


def chosen_keys(p, q, k, alive):
    """Rows of the mask by the definition, one query at a time; pruned tokens are masked, not left out."""
    B, heads, N, _ = q.shape
    token = F.pad(alive, (1, 0), value=True)
    mask = torch.zeros(B, heads, N, N, dtype=torch.bool)
    mask[:, :, 0] = True
    for b in range(B):
        for h in range(heads):
            live = token[b, :, None]
            qc, kc = p.proj_c_q(q[b, h]) * live, p.proj_c_k(k[b, h]) * live
            coefficients = (qc @ (kc.T @ p.proj_n) * heads**-0.5).softmax(-1)
            basis = p.proj_back_n.T.abs()
            basis = torch.where(basis <= p.basis_threshold, 0.0, basis)
            for i in range(1, N):
                row = coefficients[i]
                if p.basis_coef_topk is not None:
                    row = torch.where(row >= row.sort(descending=True).values[p.basis_coef_topk - 1], row, 0.0)
                else:
                    row = torch.where(row <= p.basis_coef_threshold, 0.0, row)
                scores = (row @ basis).masked_fill(~token[b], -math.inf)
                if p.attn_score_topk:
                    budget = math.ceil(p.attn_keep_rate * N)
                    budget = budget if alive[b].all() else min(budget, int(alive[b].sum()))
                    mask[b, h, i, scores.argsort(descending=True)[:budget]] = True
                else:
                    mask[b, h, i] = scores > p.attn_score_threshold
    return mask


def definition(layer, x, alive=None):
    """The published computation: dense, with a mask; queries without keys give 0."""
    (B, N, C), heads = x.shape, layer.num_heads
    alive = torch.ones(B, N - 1, dtype=torch.bool) if alive is None else alive
    q, k, v = layer.qkv(x).view(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    token = F.pad(alive, (1, 0), value=True)[:, None, :, None]
    q, k, v = q * token, k * token, v * token
    mask = chosen_keys(layer.predictor, q, k, alive)
    logits = (q @ k.transpose(-2, -1) * layer.scale).masked_fill(~mask, -math.inf)
    attention = logits.softmax(-1).nan_to_num(0)
    return layer.proj((attention @ v).transpose(1, 2).flatten(2)), attention[:, :, 0, 1:].mean(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_keep_rate": 0.1, "basis_coef_topk": 3, "qkv_bias": True, "qk_scale": 0.4},
        {"basis_coef_topk": None, "basis_coef_threshold": 0.15, "basis_threshold": 0.2, "share_inout_proj": True},
        {"attn_score_topk": False, "attn_score_threshold": 0.9, "reduce_c_factor": 4},
        {"attn_keep_rate": 1.0},
    ],
)
def test_attention_is_its_definition(options):
    options = {"basis_coef_topk": 4, "reduce_n_factor": 3} | options
    layer = randomised(SparseAttention(24, 17, 3, **options))
    x = torch.randn(2, 17, 24, **DOUBLE)
    expected = definition(layer, x)[0]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, (4, 4)), expected, rtol=0, atol=1e-12)
    if not layer.predictor.attn_score_topk:
        mask = chosen_keys(layer.predictor, *layer.heads(x)[:2], torch.ones(2, 16, dtype=torch.bool))
        assert not mask.any(-1).all() and mask.any()  # some queries have no key
        gradients = torch.autograd.grad(layer(x).sum(), [layer.qkv.weight, layer.proj.weight])
        assert all(g.isfinite().all() for g in gradients)


def test_pruned_tokens_are_as_good_as_absent():
    layer = randomised(SparseAttention(24, 17, 3, reduce_n_factor=3, basis_coef_topk=4, attn_keep_rate=0.5))
    x = torch.randn(2, 17, 24, **DOUBLE)
    kept = torch.stack([torch.randperm(16)[:7].sort().values for _ in range(2)])
    alive = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    expected, weights = definition(layer, x, alive)
    rows = F.pad(kept + 1, (1, 0))
    present = x.gather(1, rows[:, :, None].expand(-1, -1, 24))
    out, of_class = layer(present, (4, 4), kept, return_weights=True)
    torch.testing.assert_close(out, expected.gather(1, rows[:, :, None].expand(-1, -1, 24)), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_class, weights.gather(1, kept), rtol=0, atol=1e-12)


def test_other_sizes_resample_the_predictor():
    predictor = ConnectivityPredictor(8, 17, 2, reduce_n_factor=3)
    q, k = torch.randn(2, 1, 2, 36, 8)
    mask = predictor(q, k, (5, 7))
    assert mask.shape == (1, 2, 35, 36) and (mask.sum(-1) == 9).all()
    down, up = predictor._matrices((8, 8))
    assert torch.equal(up[0], predictor.proj_back_n[0])
    torch.testing.assert_close(down.sum(0), predictor.proj_n.sum(0), rtol=0.2, atol=0.05)
    with pytest.raises(ValueError, match="expected a class token and the 16 patches of the grid, got 36 tokens"):
        SparseAttention(16, 17, 2, reduce_n_factor=3)(torch.randn(1, 36, 16))


def test_attention_gradients():
    layer = randomised(SparseAttention(8, 10, 2, reduce_n_factor=2, basis_coef_topk=3))
    names = dict(layer.named_parameters())
    x = torch.randn(1, 10, 8, **DOUBLE, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    trained = [p.detach().requires_grad_(".predictor." not in f".{n}") for n, p in names.items()]
    assert gradcheck(call, (x, *trained))
    scores, q, k = Scores(layer.predictor), *torch.randn(2, 1, 2, 10, 4, **DOUBLE)
    names = dict(scores.named_parameters())

    def predict(*values):
        return torch.func.functional_call(scores, dict(zip(names, values, strict=True)), (q, k))

    assert gradcheck(predict, tuple(names.values()))


class Scores(nn.Module):
    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, q, k):
        return self.predictor.scores(q, k)


def test_cost():
    B, N, C, heads, K, c = 2, 26, 48, 3, 8, 8
    layer = SparseAttention(C, N, heads, reduce_n_factor=3)
    flops = []
    for module, inputs in (
        (layer, (torch.randn(B, N, C),)),
        (layer.predictor, torch.randn(2, B, heads, N, C // heads)),
    ):
        with counted_flops() as counter, torch.no_grad():
            module(*inputs)
        flops.append(counter.get_total_flops() / 2 / B)
    predictor = 2 * N * C * c + (2 * c + N) * heads * N * K
    assert predictor * (1 - 1.5 / N) < flops[1] < predictor
    assert flops[0] - flops[1] == 4 * N * C**2 + 2 * N**2 * C


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_tokens": 5}, "expected at least 8 tokens and 2 channels per head, got 5 and 8"),
        ({"num_heads": 5}, "dim 24 is not divisible by num_heads 5"),
        ({"num_tokens": 22}, r"expected grid_size of 21 patches, got \(4, 4\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseAttention(24, **{"num_heads": 3} | arguments)
    if "num_tokens" not in arguments:
        return
    with pytest.raises(VisionattnError, match="expected an attn_keep_rate for each of 4 blocks, got 2"):
        visionattn.create_model("test_sparsifiner", attn_keep_rate=[0.5, 0.2])
    with pytest.raises(VisionattnError, match="takes phase as 'distill' or 'recon', got 'joint'"):
        visionattn.create_model("test_sparsifiner", phase="joint")


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_recorded_selections(path):
    meta, arrays = golden.load(path)
    model = visionattn.create_model(meta["create"]["name"], **meta["create"]["kwargs"]).double().eval()
    model.load_state_dict(convert_state_dict(golden.fill_state_dict(meta["keys"]), model))
    counts, alive = [], []

    def count(module, args, mask):
        kept = args[3]
        seen = mask.sum(2) + 1  # by the class token too
        if kept is not None:
            rows = F.pad(kept + 1, (1, 0))[:, None].expand(-1, seen.shape[1], -1)
            seen = torch.ones(*seen.shape[:2], 37, dtype=seen.dtype).scatter(2, rows, seen)
        counts.append(seen)

    for block in model.blocks:
        block.mixer.predictor.register_forward_hook(count)
        block.register_forward_hook(lambda module, args, x: alive.append(x[:, 1:].ne(0).any(-1)))
    with torch.no_grad():
        model(torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"]))))
    assert np.array_equal(torch.stack(counts), arrays["extra_mask_col_counts"])
    if "extra_token_mask" in arrays:
        assert np.array_equal(torch.stack(alive), arrays["extra_token_mask"])


def test_token_pruning_runs_in_every_mode():
    model = visionattn.create_model("test_sparsifiner", depth=8, token_keep_rate=0.5, token_pruning_loc=(3, 6)).eval()
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    alive = [int(m[0].ne(0).any(0).sum()) for m in maps]
    assert alive == [35, 35, 35, 18, 18, 18, 9, 9]
    model.train()
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing()
    gradients = [torch.autograd.grad(m(x).sum(), m.blocks[3].mlp.fc1.weight)[0] for m in (model, saving)]
    torch.testing.assert_close(*gradients)
    model.eval()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    assert model.forward_features(x)[0, 1:][alive[-1] :].isfinite().all()


def test_details_that_the_goldens_cannot_see():
    with torch.device("meta"):
        deit, lvvit = (visionattn.create_model(f"sparsifiner_{n}") for n in ("deit_small", "lvvit_m"))
    assert {m.eps for m in deit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in lvvit.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)} == {1e-5}
    assert deit.blocks[0].mixer.qkv.bias is not None and lvvit.blocks[0].mixer.qkv.bias is None
    assert deit.no_weight_decay() == {"cls_token", "pos_embed.weight"}
    predictor = visionattn.create_model("sparsifiner_deit_small").blocks[0].mixer.predictor
    assert predictor.budget(197) == 50 and predictor.scale == 6**-0.5
    for weight in (predictor.proj_n, predictor.proj_back_n, predictor.proj_c_q.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    shared = visionattn.create_model("test_sparsifiner", share_inout_proj=True)
    assert shared.blocks[0].mixer.predictor.proj_n is shared.blocks[0].mixer.predictor.proj_back_n
    assert "blocks.0.mixer.predictor.proj_back_n" in shared.state_dict()


def lvvit(**kwargs):
    return SparsifinerLV(**TINY, mlp_ratio=3.0, qkv_bias=False, skip_lam=2.0, **kwargs)


def test_lvvit_form():
    model = lvvit(num_classes=5).eval()
    x = torch.randn(2, 3, 40, 29)
    tokens = model.forward_features(x)
    expected = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).max(1).values
    torch.testing.assert_close(model(x), expected)
    block = model.blocks[0]
    y = torch.randn(1, 17, 32)
    z = y + block.mixer(block.norm1(y)) / 2
    torch.testing.assert_close(block(y, (4, 4)), z + block.mlp(block.norm2(z)) / 2)
    model.train()(x).sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    expected = model(x)
    torch.testing.assert_close(model.fuse()(x), expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32) and not any("head" in n for n, _ in model.named_parameters())


def test_dense_weights_load(tmp_path):
    """Published weights are those of the dense backbone: the predictors stay as they are."""
    deit = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    model = visionattn.create_model("test_sparsifiner", **TINY, num_classes=5, attn_keep_rate=1).eval()
    before = model.blocks[1].mixer.predictor.proj_n.clone()
    load_checkpoint(model, tmp_path / "deit.pth")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), deit(x))
    assert torch.equal(model.blocks[1].mixer.predictor.proj_n, before)
    overlay = {"file": str(tmp_path / "deit.pth"), "num_classes": 5}
    small = visionattn.create_model("test_sparsifiner", True, **TINY, num_classes=3, pretrained_cfg_overlay=overlay)
    assert torch.equal(small.blocks[0].mlp.fc1.weight, deit.blocks[0].mlp.fc1.weight)
    with pytest.raises(VisionattnError, match="left over .*aux_head"):
        convert_state_dict(lvvit(num_classes=5).state_dict(), model)
    headless = lvvit(num_classes=0)
    headless.load_state_dict(convert_state_dict(lvvit().state_dict(), headless))


def taught(model, x, target):
    """(loss, logits, tokens) of a forward pass in training mode."""
    logits = model.train()(x)
    tokens = model._learned[0].detach()
    return model.training_loss(F.cross_entropy(logits, target), x, logits), logits.detach(), tokens


def test_first_phase_teaches_the_predictors_alone():
    teacher = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = visionattn.create_model(
        "test_sparsifiner", **TINY, phase="recon", token_keep_rate=0.5, token_pruning_loc=[0]
    )
    x, target = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    with pytest.raises(VisionattnError, match="test_sparsifiner in phase 'recon' learns from a teacher; it has none"):
        model.training_loss(model(x).sum(), x, model(x))
    dense = visionattn.create_model("test_sparsifiner", **TINY, attn_keep_rate=1)
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.train()(x), dense(x))  # all keys
    assert not torch.allclose(model.eval()(x), dense(x), rtol=0, atol=1e-7)

    model.learn_from(teacher)
    inputs = {}
    for name, network in (("ours", model), ("theirs", teacher)):
        for i, block in enumerate(network.blocks):
            block.norm1.register_forward_hook(lambda m, a, y, key=(name, i): inputs.__setitem__(key, y))
    loss, *_ = taught(model, x, target)
    expected = 0
    for i, (block, other) in enumerate(zip(model.blocks, teacher.blocks, strict=True)):
        q, k, _ = other.attn.qkv(inputs["theirs", i]).view(3, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / 4).softmax(-1)[:, :, 1:]
        p = block.mixer.predictor
        q, k, _ = block.mixer.heads(inputs["ours", i])
        z = p.proj_c_q(q) @ (p.proj_c_k(k).transpose(-2, -1) @ p.proj_n) * 2**-0.5
        expected = expected + (z.softmax(-1)[:, :, 1:] @ p.proj_back_n.T - attention).square().sum()
    torch.testing.assert_close(loss, 0.01 * expected / 2)
    loss.backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learned == {n for n, _ in model.named_parameters() if ".predictor." in n}
    assert not any("teacher" in n for n, _ in model.named_modules()) and not teacher.training


@pytest.mark.parametrize("form", ["deit", "lvvit"])
def test_second_phase_learns_from_teacher_and_labels(form):
    if form == "deit":
        make = lambda **kwargs: visionattn.create_model("test_sparsifiner", **TINY, num_classes=5, **kwargs)  # noqa: E731
        student = make(token_keep_rate=0.5, token_pruning_loc=[1], attn_keep_rate=0.5)
        student.blocks[1].leaving = 0.5  # a model this shallow would not prune yet
    else:
        make = lambda **kwargs: lvvit(num_classes=5, **kwargs)  # noqa: E731
        student = make()
    teacher = make(attn_keep_rate=1).eval()
    x, target = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    assert student.training_loss(torch.tensor(2.0), x, x) == 2  # without a teacher, the task's
    student.learn_from(teacher)
    loss, logits, tokens = taught(student, x, target)
    with torch.no_grad():
        theirs = teacher.forward_features(x)
        t = teacher.head(theirs[:, 0]).softmax(-1)
        ce, s = F.cross_entropy(logits, target), logits.log_softmax(-1)
        kl = (t * (t.log() - s)).sum() / 3
        torch.testing.assert_close(logits, student.head(tokens[:, 0]))  # the class token alone
        ours, theirs = tokens[:, 1:], theirs[:, 1:]
        if form == "lvvit":
            ours, theirs = student.aux_head(ours), teacher.aux_head(theirs)
        else:
            alive = student.forward_tokens(x)[:, 1:].ne(0).any(-1)
            assert alive.sum() == 3 * 8
            ours, theirs = ours[alive], theirs[alive]
        torch.testing.assert_close(loss, ce + 0.5 * kl + 0.5 * F.mse_loss(ours, theirs))
    loss.backward()
    for n, p in student.named_parameters():
        assert (p.grad is None) == (".predictor." in n), n
    assert all(p.grad is None for p in teacher.parameters())


def test_unfit_teachers_are_refused():
    model = visionattn.create_model("test_sparsifiner")
    with pytest.raises(VisionattnError, match="test_sparsifiner learns from a teacher of 1000 classes, got 5"):
        model.learn_from(visionattn.create_model("test_sparsifiner", num_classes=5))
    model = visionattn.create_model("test_sparsifiner", phase="recon")
    with pytest.raises(VisionattnError, match="learns from a teacher with 4 attention layers, got 0"):
        model.learn_from(visionattn.create_model("test_van"))
    with pytest.raises(VisionattnError, match="VAN learns from no teacher"):
        visionattn.create_model("test_van").learn_from(model)


def test_trainer_gives_the_teacher(tmp_path):
    from visionattn.training.config import parse_train
    from visionattn.training.trainer import Trainer

    teacher = visionattn.create_model("test_sparsifiner", num_classes=10, attn_keep_rate=1)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    options = "--model test_sparsifiner --data.val_fraction 0.95 --data.num_workers 0 --data.batch_size 16"
    options += (
        f" --distill.model test_sparsifiner --distill.kwargs.num_classes 10 --distill.checkpoint {tmp_path}/teacher.pth"
    )
    options += (
        f" --model_kwargs.phase recon --checkpoint {tmp_path}/teacher.pth --ema.decay 0.9 --output {tmp_path}/runs"
    )
    trainer = Trainer(*parse_train(options.split()))
    trainer.log = Mock()
    trainer._train_epoch()
    assert trainer.train_loss > 0
    for name, value in trainer.bare_model.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]) == (".predictor." not in name), name
