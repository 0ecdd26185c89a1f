"""Options of the tasks."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, PositiveFloat


@dataclass
class LossConfig:
    """Loss"""

    smoothing: ClosedUnitInterval = 0.1
    """Label smoothing."""
    bce: bool = False
    """Binary cross-entropy for each class in place of softmax cross-entropy."""
    bce_threshold: ClosedUnitInterval | None = None
    """With bce, make targets above it 1 and others 0; null: keep soft targets."""
    bce_sum: bool = False
    """With bce, sum over the classes before averaging over the images, rather than average over both."""
    class_weights: Literal["balanced"] | tuple[PositiveFloat, ...] | None = None
    """Weight of each class in the loss; balanced: one over its share of the training images."""
    multi_label: bool = False
    """Targets are vectors of 0 and 1, for data that has several labels for each image; implies bce."""
