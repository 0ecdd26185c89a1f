"""What is watched of attention as a model trains: figures that are right, and a run that is none the different."""

import csv
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import visionattn
from visionattn.errors import VisionattnError
from visionattn.explain import attention_maps
from visionattn.explain.maps import LAYERS
from visionattn.monitoring import CHANNELS_FIRST, AttentionMonitor, attention_entropy, entropy, entropy_bound
from visionattn.training.config import parse_train
from visionattn.training.trainer import Trainer

QUICK = ["--data.num_workers", "0", "--epochs", "1", "--data.batch_size", "4", "--schedule.warmup_epochs", "0"]
QUICK += ["--model", "test_convit", "--report", "false", "--trackers", "[]"]


@pytest.fixture
def images(tmp_path: Path) -> str:
    """A folder of two classes."""
    for i, name in enumerate(("train/a", "train/b", "val/a", "val/b")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for j in range(6):
            pixels = np.random.default_rng([i, j]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{j}.png")
    return str(tmp_path / "images")


def test_entropy():
    q, k = torch.randn(2, 3, 17, 8).double(), torch.randn(2, 3, 11, 8).double()
    weights = (q @ k.mT * 0.5).softmax(-1)
    torch.testing.assert_close(attention_entropy(q, k, 0.5, rows=4), -(weights * weights.log()).sum(-1))
    # As fused attention gives it: with keys for values, and the sums of its softmax.
    attended = nn.functional.scaled_dot_product_attention(q, k, k, scale=0.5)
    fused = (q @ k.mT * 0.5).logsumexp(-1) - 0.5 * (q * attended).sum(-1)
    torch.testing.assert_close(attention_entropy(q, k, 0.5), fused)
    assert math.isclose(entropy(torch.full((11,), 3.0)).item(), math.log(11), rel_tol=1e-6)
    assert entropy(torch.tensor([0.0, 0.0, -math.inf])).item() == pytest.approx(math.log(2))


def test_bound():
    for keys in (2, 5, 100):
        logits = torch.randn(1000, keys).double() * torch.rand(1000, 1) * 20
        norms = (logits - logits.mean(-1, keepdim=True)).norm(dim=-1)
        assert (entropy(logits) >= entropy_bound(norms, keys) - 1e-12).all()
        sticking = torch.tensor([5.0] + [0.0] * (keys - 1)).double()
        norm = (sticking - sticking.mean()).norm()
        torch.testing.assert_close(entropy(sticking), entropy_bound(norm, keys))


@pytest.mark.parametrize("name", ["test_convit", "test_davit", "test_halonet", "test_patnet", "test_sparsifiner"])
def test_a_model_is_watched(name):
    model, x = visionattn.create_model(name, num_classes=3), torch.randn(4, 3, 64, 64)
    monitor, learned = AttentionMonitor(model.train()), [p for p in model.parameters() if p.requires_grad]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        return torch.autograd.grad(model(x).square().sum(), learned, allow_unused=True)

    expected, buffers = gradients(), [buffer.clone() for buffer in model.buffers()]
    model.load_state_dict(state)
    with monitor.watching():
        found = gradients()
    figures, same = monitor.take(), zip([*found, *model.buffers()], [*expected, *buffers], strict=True)
    assert all(one is other or torch.equal(one, other) for one, other in same)
    assert all(map(math.isfinite, figures.values())) and not monitor.take()
    assert not any(module._forward_hooks for module in monitor.layers.values())

    model.eval()
    with monitor.watching(), torch.no_grad():
        model(x)
    figures = monitor.take()
    attention = [each for each in attention_maps(model, x[:2]) if each.kind in ("attention", "content")]
    told = 0
    for each in attention:
        label = each.title.replace(" ", "/")
        if f"attention/{label}/entropy/0" not in figures:
            continue
        heads = each.values.flatten(-2) if each.axes[-2:] == ("key_row", "key_col") else each.values
        wanted = torch.special.entr(heads).sum(-1).transpose(0, 1).flatten(1).mean(1)
        found = [figures[f"attention/{label}/entropy/{h}"] for h in range(len(wanted))]
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-3, atol=1e-4)
        told += 1
    assert told


def test_compiled_models_and_checkpoints():
    model, x = visionattn.create_model("test_convit").train(), torch.randn(2, 3, 32, 32)
    monitor = AttentionMonitor(model)
    with monitor.watching():
        model(x)
    expected = monitor.take()
    model.set_grad_checkpointing()
    model.compile(backend="eager")
    model(x)
    with monitor.watching():
        out = model(x)
    out.sum().backward()
    assert monitor.take() == expected


def test_large_maps_are_cut(monkeypatch):
    monkeypatch.setattr("visionattn.monitoring.SIDE", 8)
    model = visionattn.create_model("test_agent_attention").eval()
    monitor = AttentionMonitor(model)
    with monitor.watching():
        model(torch.randn(1, 3, 64, 96))
    assert all(map(math.isfinite, monitor.take().values()))


def test_a_run_is_none_the_different(tmp_path: Path, images: str):
    rows = {}
    for name, options in {"plain": [], "watched": ["--monitor", "attention", "--monitor_every", "2"]}.items():
        folder = Trainer(
            *parse_train([*QUICK, *options, "--data.root", images, "--output", str(tmp_path), "--name", name])
        ).fit()
        with open(folder / "metrics.csv") as file:
            (rows[name],) = csv.DictReader(file)
    one, other = (load_file(tmp_path / name / "checkpoints" / "best.safetensors") for name in rows)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    new = rows["watched"].keys() - rows["plain"].keys()
    assert {f"attention/blocks.3.mixer/{each}" for each in ("entropy/0", "max_logit/3", "kurtosis", "max_abs")} <= new
    assert 0 < float(rows["watched"]["attention/blocks.3.mixer/entropy/0"]) <= math.log(17)


def test_what_cannot_be_watched():
    with pytest.raises(VisionattnError, match="monitor_every is of no use without monitor"):
        parse_train(["--monitor_every", "3"])
    with pytest.raises(VisionattnError, match="nothing to monitor"):
        AttentionMonitor(nn.Linear(2, 2))


def test_layers_on_maps_whose_channels_come_first_are_known():
    """Kurtosis is of channels."""
    for each in LAYERS:
        shape = (each.__doc__ or "").partition("Shape:")[2].partition("Example:")[0]
        assert "(B, C, H, W)" not in shape or each in CHANNELS_FIRST, each


def test_what_a_layer_draws_is_what_it_would_draw():
    model = visionattn.create_model("test_isotropic", mixer="pgqa")
    monitor, x, found = AttentionMonitor(model), torch.randn(2, 3, 32, 32), []
    for watching in (nullcontext, monitor.watching):
        torch.manual_seed(0)
        with watching():
            found.append(model(x))
    assert torch.equal(*found)
