"""Nearest neighbours."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VisionattnError

MOST = 2**24
"""Similarities that are held at once."""
MOST_EXPONENT = 600.0
"""Of a vote."""


def knn_classifier(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Votes of the nearest training images for the classes of others: exp(cosine / temperature) each.

    Cost: C multiply-adds for each pair of images.

    Args:
        train: features of the training images (N, C).
        train_labels: their classes (N,).
        test: features of the others (M, C).
        k: neighbours that vote.
        temperature: of the weight of a vote.
        num_classes: classes.

    Raises:
        VisionattnError: if `k` or the temperature is not above 0, or the tensors do not fit each other.

    Returns:
        votes (M, num_classes) in float64; where the largest of an image would be infinite, all of its are smaller.
    """
    if k < 1 or not 0 < temperature < math.inf:
        raise VisionattnError(f"expected k from 1 up and a temperature above 0, got {k} and {temperature}")
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or not len(train):
        raise VisionattnError(f"expected features (N, C) and (M, C), got {tuple(train.shape)} and {tuple(test.shape)}")
    if train_labels.shape != train.shape[:1]:
        raise VisionattnError(f"expected {len(train)} classes, got {tuple(train_labels.shape)}")
    low, high = train_labels.min().item(), train_labels.max().item()
    if low < 0 or high >= num_classes:
        raise VisionattnError(f"expected classes from 0 to {num_classes - 1}, got {low if low < 0 else high}")
    return votes(*neighbours(train, test, k), train_labels, temperature, num_classes)


def neighbours(train: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines of the nearest training images and which they are, the nearest first.

    Args:
        train: features (N, C).
        test: features (M, C).
        k: how many; all if there are no more.

    Returns:
        (M, k) each.
    """
    train, test = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (train, test))
    parts: Iterable[Tensor] = test.split(max(1, MOST // len(train)))
    found = [(part @ train.T).topk(min(k, len(train)), dim=1) for part in parts]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def votes(cosines: Tensor, nearest: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Votes (M, num_classes) of what `neighbours` found.

    Args:
        cosines: (M, k).
        nearest: (M, k).
        labels: classes of the training images (N,).
        temperature: of the weight of a vote.
        num_classes: classes.
    """
    exponents = cosines.double() / temperature
    exponents = exponents - (exponents.amax(1, keepdim=True) - MOST_EXPONENT).clamp(min=0)  # none is infinite
    total = exponents.new_zeros(len(cosines), num_classes)
    return total.scatter_add_(1, labels[nearest], exponents.exp())
