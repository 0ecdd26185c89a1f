"""Options of the tasks."""

from dataclasses import dataclass

from jsonargparse.typing import ClosedUnitInterval


@dataclass
class LossConfig:
    """Loss"""

    smoothing: ClosedUnitInterval = 0.1
    """Label smoothing."""
    bce: bool = False
    """Binary cross-entropy for each class in place of softmax cross-entropy."""
