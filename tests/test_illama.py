"""iLLaMA: attention masked after the softmax, its schedule, and what the goldens cannot see."""

from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import visionattn
from visionattn.layers import CausalSelfAttention
from visionattn.layers.causal_attention import causal_halves, rotary_table
from visionattn.macs import counted_flops
from visionattn.weights import load_checkpoint

DOUBLE = {"dtype": torch.float64}


def definition(layer, x, rate, angles=None):
    """All pairs, rotated as complex numbers."""
    (B, N, C), heads = x.shape, layer.num_heads
    q, k, v = layer.qkv(x).view(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    if angles is None:
        t = torch.arange(0, C // heads, 2, dtype=x.dtype)
        angles = torch.outer(torch.arange(N, dtype=x.dtype), 10000.0 ** (-t / (C // heads)))
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (
        torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(3)
        for y in (q, k)
    )
    attention = (q @ k.transpose(-2, -1) * layer.scale).softmax(-1)
    lower = torch.ones(N, N, dtype=x.dtype).tril()
    attention = attention * (rate + (1 - rate) * lower)
    return layer.proj((attention @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "qk_scale": 0.7}])
def test_attention_is_its_definition(rate, options):
    layer = CausalSelfAttention(24, 3, **options, **DOUBLE)
    x = torch.randn(2, 11, 24, **DOUBLE)
    expected = definition(layer, x, rate)
    torch.testing.assert_close(layer(x, soft_mask_rate=rate), expected, rtol=0, atol=1e-12)
    cos, sin = rotary_table(11, 8, x.device, x.dtype)
    shared = layer(x, (cos, sin), torch.tensor(rate, **DOUBLE), causal_halves(11, x.device))
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-12)
    angles = torch.rand(11, 4, **DOUBLE)
    torch.testing.assert_close(layer(x, angles, rate), definition(layer, x, rate, angles), rtol=0, atol=1e-12)


def test_only_differences_of_positions_matter():
    layer = CausalSelfAttention(16, 2, **DOUBLE)
    x = torch.randn(1, 5, 16, **DOUBLE)
    cos, sin = rotary_table(9, 8, x.device, x.dtype)
    torch.testing.assert_close(layer(x, (cos[4:], sin[4:])), layer(x), rtol=0, atol=1e-12)


def test_later_tokens_are_weighed_but_not_seen():
    """Weights are not renormalised: a later key takes weight away, its value comes in at the soft mask's rate alone."""
    layer = CausalSelfAttention(8, 1, **DOUBLE)
    nn.init.eye_(layer.proj.weight)
    nn.init.zeros_(layer.proj.bias)
    nn.init.zeros_(layer.qkv.weight)
    nn.init.eye_(layer.qkv.weight[16:])
    x = torch.ones(1, 4, 8, **DOUBLE)
    for rate in (0.0, 0.5, 1.0):
        expected = torch.tensor([1, 2, 3, 4], **DOUBLE) / 4
        expected = expected + rate * (1 - expected)
        torch.testing.assert_close(layer(x, soft_mask_rate=rate)[0, :, 0], expected)


def test_attention_gradients():
    layer = CausalSelfAttention(8, 2, qkv_bias=True, **DOUBLE)
    names = dict(layer.named_parameters())
    x = torch.randn(1, 5, 8, **DOUBLE, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, None, 0.3))

    assert gradcheck(call, (x, *names.values()))


def test_attention_cost():
    B, N, C = 2, 37, 48
    with counted_flops() as counter, torch.no_grad():
        CausalSelfAttention(C, 3)(torch.randn(B, N, C))
    assert counter.get_total_flops() == 2 * B * (4 * N * C**2 + 4 * N**2 * C)


@pytest.mark.parametrize("heads, message", [(5, "not divisible"), (8, "even number of channels per head, got 24 / 8")])
def test_bad_arguments(heads, message):
    with pytest.raises(ValueError, match=message):
        CausalSelfAttention(24, heads)


def model_on_meta(name, **kwargs):
    with torch.device("meta"):
        return visionattn.create_model(name, **kwargs)


def test_details_that_the_goldens_cannot_see():
    hidden = {"illama_tiny": 512, "illama_small": 1024, "illama_base": 2048, "illama_large": 2816}
    for name, width in hidden.items():
        model = model_on_meta(name)
        assert {block.mlp.fc1.out_features for block in model.blocks} == {width}
        assert {m.eps for m in model.modules() if isinstance(m, nn.RMSNorm)} == {1e-6}
        assert model.soft_mask_rate == 0 and "soft_mask" not in str(list(model.state_dict()))
    model = visionattn.create_model("test_illama", drop_rate=0.3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p] == [0.3]  # of the positions
    assert model.blocks[0].mlp.fc2.bias is None and model.blocks[0].mixer.qkv.bias.eq(0).all()
    for weight in (model.blocks[1].mlp.fc1.weight, model.pos_embed.weight, model.cls_token):
        assert weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert visionattn.model_info("illama_base.in21k_ft_in1k").top1 == 83.6
    assert model_on_meta("illama_base_384").pretrained_cfg["crop_mode"] == "squash"


def test_the_class_token_comes_last():
    model = visionattn.create_model("test_illama").double().eval()
    x = torch.randn(2, 3, 24, 40, **DOUBLE)
    with torch.no_grad():
        tokens = model.forward_tokens(x)
        assert tokens.shape[1] == 3 * 5 + 1
        torch.testing.assert_close(model(x), model.head(model.norm(tokens[:, -1])))
        patches = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(patches.flatten(2).transpose(1, 2), model.norm(tokens)[:, :-1])
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(x), model.norm(tokens)[:, :-1].mean(1))
        embedded = model._embed(x)[0]
        table = model.pos_embed.weight[:, :-1].transpose(1, 2).unflatten(2, (4, 4))
        table = F.interpolate(table, (3, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        torch.testing.assert_close(embedded[:, :-1], model.stem(x) + table)
        torch.testing.assert_close(embedded[:, -1], (model.cls_token + model.pos_embed.weight[:, -1:])[0].expand(2, -1))


def test_checkpoints_load_at_another_size(tmp_path):
    source = visionattn.create_model("test_illama")
    published = {
        k.replace("pos_embed.weight", "pos_embed").replace("stem.", "patch_embed.").replace(".mixer.", ".attn."): v
        for k, v in source.state_dict().items()
    }
    torch.save({"model": published, "args": Namespace(lr=1.0), "epoch": 3}, tmp_path / "illama.pth")
    model = visionattn.create_model("test_illama", img_size=(48, 64))
    load_checkpoint(model, tmp_path / "illama.pth")
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), source.eval()(x))
    load_checkpoint(source, tmp_path / "illama.pth")


def test_soft_mask_and_other_rates():
    model = visionattn.create_model("test_illama", drop_path_rate=0.1).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        causal = model(x)
        model.update_soft_mask(0.5)
        assert not torch.allclose(model(x), causal)
        model.update_soft_mask(0.0)
        assert torch.equal(model(x), causal)
    model.update_drop_path(0.3)
    drops = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert drops == pytest.approx([0, 0.1, 0.2, 0.3])
    model.update_dropout(0.2)
    assert model.pos_drop.p == 0.2


@pytest.mark.parametrize("schedule, rates", [("linear", [1, 0.75, 0.5, 0.25, 0, 0]), ("constant", [1, 1, 1, 1, 0, 0])])
def test_soft_mask_schedule(schedule, rates):
    model = visionattn.create_model("test_illama", soft_mask_epochs=2, soft_mask_schedule=schedule)
    x = torch.randn(1, 3, 32, 32)
    twin = visionattn.create_model("test_illama").eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        causal = twin(x)
        for i, rate in enumerate(rates):
            model.advance(i / 2)
            twin.update_soft_mask(rate)
            assert torch.equal(model.train()(x), twin(x))
            assert torch.equal(model.eval()(x), causal)  # what is validated is what is saved


def test_trainer_advances_the_schedule(tmp_path):
    from visionattn.training.config import parse_train
    from visionattn.training.trainer import Trainer

    options = "--model test_illama --data.val_fraction 0.95 --data.num_workers 0 --data.batch_size 16 --epochs 4"
    options += f" --model_kwargs.soft_mask_epochs 2 --optim.accumulation 2 --output {tmp_path}"
    trainer = Trainer(*parse_train(options.split()))
    trainer.log, rates, step = Mock(), [], trainer.optimizer.step
    trainer.optimizer.step = lambda: rates.append(trainer.bare_model.scheduled_rate) or step()
    trainer.epoch = 1
    trainer._train_epoch()
    n = trainer.updates
    expected = [0.5 - update / n / 2 for update in range(n)]
    assert rates == pytest.approx(expected) and n > 1
    assert not list(tmp_path.iterdir())
