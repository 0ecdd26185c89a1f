"""On an NVIDIA GPU: what the CPU computes, in every precision, compiled and between devices. Left out without one."""

from copy import deepcopy

import pytest
import torch
from test_skeletons import EVERY, FROZEN, SIZES, alive, tiny

import visionattn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = [name for name in visionattn.list_models("test_*") if name not in ("test_isotropic", "test_pyramid")]
MADE = [*((name, None) for name in FAMILIES), *((model, mixer) for model in SIZES for mixer in EVERY)]
HALF = {torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""How far logits may be off, in parts of the largest one: some tens of roundings of small models."""
IN_THE_PYRAMID = ("softmax", "halo", "window_channel", "neighborhood", "moh")
"""Mixers whose graphs are others there."""
CHOOSERS = ("kdgqa", "dgqa_diff", "dgqa_ema", "pgqa")
"""Mixers that group heads by the rank of numbers, and change what they keep in evaluation, or draw."""


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products of float32 in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()


def make(name, mixer, **kwargs):
    torch.manual_seed(0)
    model = tiny(name, mixer, **kwargs) if mixer else visionattn.create_model(name, num_classes=10, **kwargs)
    return alive(model).eval()


def squares(logits):
    return logits.float().square().mean()


def gradients(model, x):
    """Logits, and the gradients of the parameters."""
    logits = model(x)
    named = [(n, p) for n, p in model.named_parameters() if FROZEN not in n]
    grads = torch.autograd.grad(squares(logits), [p for _, p in named])
    return logits, {n: g for (n, _), g in zip(named, grads, strict=True)}


def close(found, expected, part):
    """Within a part of the largest number."""
    assert found.shape == expected.shape
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.detach().cpu().to(expected.dtype), expected, rtol=0, atol=part * max(scale, 1e-6))


@pytest.mark.parametrize("name, mixer", MADE)
def test_what_the_cpu_computes(name, mixer):
    """In float32, there and back, and in channels_last."""
    model, x = make(name, mixer), torch.randn(3, 3, 32, 32)
    if not comparable(mixer, model):
        pytest.skip("a rounding may choose otherwise")
    logits, grads = gradients(model, x)
    model.cuda()
    for layout in (torch.contiguous_format, torch.channels_last):
        found, found_grads = gradients(model, x.cuda().to(memory_format=layout))
        close(found, logits.detach(), 1e-4)
        for key, grad in found_grads.items():
            close(grad, grads[key], 2e-3)
        model.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        close(model.cpu()(x), logits.detach(), 1e-5)


@pytest.mark.parametrize("name, mixer", MADE)
def test_half_precision(name, mixer):
    """By autocast, with gradients that are numbers, and with weights that are so."""
    model, x = make(name, mixer), torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
    model, x = model.cuda(), x.cuda()
    for dtype, part in HALF.items():
        with torch.autocast("cuda", dtype):
            trained = deepcopy(model).train()
            logits = trained(x)
            trained.training_loss(squares(logits), x, logits, squares).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in trained.parameters())
            with torch.inference_mode():
                found = model(x)
        if comparable(mixer, model):
            close(found.float(), expected, part)
            with torch.inference_mode():
                close(deepcopy(model).to(dtype)(x.to(dtype)).float(), expected, part)
        assert found.isfinite().all()


def comparable(mixer, model):
    """Whether roundings stay roundings, and evaluation is the same again."""
    return mixer not in CHOOSERS and not any(getattr(m, "by_rank", False) for m in model.modules())


@pytest.mark.parametrize(
    "name, mixer", [each for each in MADE if each[0] != "pyramid_xsmall" or each[1] in IN_THE_PYRAMID]
)
def test_graphs_of_kernels(name, mixer):
    """`reduce-overhead` captures the kernels: nothing that the model keeps may be made, or overwritten, inside."""
    model = make(name, mixer).cuda()
    compiled = torch.compile(deepcopy(model), mode="reduce-overhead")
    with torch.inference_mode():
        for batch in (2, 2, 2, 1, 2):
            x = torch.randn(batch, 3, 32, 32, device="cuda")
            found, expected = compiled(x).clone(), model(x)
            assert found.isfinite().all()
            if comparable(mixer, model):
                close(found, expected.cpu(), 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_factory_arguments_fusing_and_checkpoints(name):
    made = visionattn.create_model(name, num_classes=10, device="cuda", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("cuda", torch.bfloat16)}
    x = torch.randn(2, 3, 40, 56, device="cuda")
    assert made(x.bfloat16()).isfinite().all()
    model = make(name, None).cuda()
    with torch.inference_mode():
        close(deepcopy(model).fuse()(x), model(x).cpu(), 1e-4)
    _, grads = gradients(model, x)
    model.set_grad_checkpointing(True)
    for key, grad in gradients(model, x)[1].items():
        close(grad, grads[key].cpu(), 1e-3)
    maps = visionattn.create_model(name, features_only=True, device="cuda")(x)
    assert all(each.is_cuda for each in maps)
