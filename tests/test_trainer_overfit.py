"""Every family learns: its test variant fits 64 digits by heart with the default optimizer."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import visionattn
from visionattn.data.config import DataConfig
from visionattn.data.images import load_datasets
from visionattn.data.transforms import eval_transform, resolve_preprocessing
from visionattn.training.config import OptimConfig
from visionattn.training.optim import make_optimizer


def fits_digits(model: nn.Module) -> bool:
    """Whether 200 updates are enough for 64 digits."""
    digits, _ = load_datasets(DataConfig())
    transform = eval_transform(resolve_preprocessing(DataConfig(), model))
    images, labels = zip(*(digits.load(i) for i in range(64)), strict=True)
    images, labels = torch.stack([transform(image) for image in images]), torch.tensor(labels)
    options = OptimConfig()
    optimizer = make_optimizer(options, model, model.learning_rates())
    for _ in range(200):
        logits = model.train()(images)
        optimizer.zero_grad()
        cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        if (logits.argmax(1) == labels).all():
            with torch.no_grad():
                if (model.eval()(images).argmax(1) == labels).all():
                    return True
    return False


@pytest.mark.parametrize("name", visionattn.list_models("test_*"))
def test_family_overfits_64_digits_within_200_steps(name: str):
    assert fits_digits(visionattn.create_model(name, num_classes=10))
