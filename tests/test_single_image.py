"""Batches of one image, whose batch norms may have a single value for each channel."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

import visionattn
from visionattn import create_detector, create_segmenter
from visionattn.training.config import parse_train
from visionattn.training.trainer import Trainer

NAMES = [
    n
    for n in visionattn.list_models("test_*")
    if any(isinstance(m, BatchNorm) for m in visionattn.create_model(n).modules())
]
HEADS = {"upernet": {"decoder_channels": 32}, "fpn": {"pyramid_channels": 64, "segmentation_channels": 64}}


def lvvit():
    return visionattn.create_model("sparsifiner_lvvit_s", embed_dim=24, depth=2, num_heads=2, img_size=32)


def trained(model: nn.Module, *inputs) -> dict[str, bool]:
    """Update a model once; for each batch norm, by name, whether its statistics have changed."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    before = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items()}
    out = model.train()(*inputs)
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else [out]
    sum(value.square().sum() for value in values).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(module.training for module in model.modules())
    changed = {}
    for name, norm in norms.items():
        equal = {
            k: torch.equal(v, before[name][k]) for k, v in norm.state_dict().items() if k not in ("weight", "bias")
        }
        assert len(set(equal.values())) == 1, (name, equal)
        changed[name] = not equal["running_mean"]
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_classifiers_and_extractors_train_on_one_small_image(name: str):
    for model in (visionattn.create_model(name, num_classes=3), visionattn.create_model(name, features_only=True)):
        changed = trained(model, torch.randn(1, 3, 32, 32))
        assert any(changed.values()) and not all(changed.values())  # all but the last maps have many values


def test_a_norm_without_statistics_of_its_batch_does_as_in_evaluation():
    model = visionattn.create_model("test_patnet", num_classes=3)
    gates = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)]
    changed = trained(model, torch.randn(1, 3, 96, 96))
    assert gates and {name for name, value in changed.items() if not value} == set(gates)
    norm = model.get_submodule(gates[0])
    x = torch.randn(1, norm.num_features)
    found = norm.train()(x)
    assert torch.equal(found, norm.eval()(x))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not all(trained(copied, torch.randn(1, 3, 64, 64)).values())
    pairs = torch.randn(2, 3, 32, 32)
    plain = nn.BatchNorm1d(4)
    assert all(trained(model, pairs).values())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain(torch.randn(1, 4))  # torch's own is left as it is


@pytest.mark.parametrize("name", ["test_patnet", "test_van", "test_halonet"])
def test_detectors_train_on_one_image(name: str):
    model = create_detector(name, "fcos", 3, fpn_channels=64)
    target = [{"boxes": torch.tensor([[3.0, 4, 20, 25]]), "labels": torch.tensor([1])}]
    changed = trained(model, [torch.randn(3, 32, 32)], target)
    assert any(changed.values()) and not all(changed.values())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["test_patnet", "test_dinat"])
def test_segmenters_train_on_one_image(name: str, head: str):
    model = create_segmenter(name, head, 3, auxiliary=True, **HEADS[head])
    assert any(trained(model, torch.randn(1, 3, 32, 32)).values())


@pytest.mark.parametrize(
    "options", [[], ["--grad_checkpointing"], ["--optim.accumulation", "3"], ["--freeze", "[stem]"]]
)
def test_runs_with_batches_of_one(tmp_path: Path, options: list[str]):
    options += ["--model", "test_patnet", "--data.batch_size", "1", "--data.num_workers", "0", "--augment.mixup", "0"]
    run = Trainer(*parse_train([*options, "--output", str(tmp_path), "--ema.decay", "0.9"]))
    updates = run.run_updates()
    losses = [next(updates) for _ in range(2)]
    assert all(torch.tensor(losses).isfinite()) and run.guard.skipped == 0
