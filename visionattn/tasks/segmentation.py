"""Semantic segmentation: loss and metrics."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.annotations import IGNORED
from ..data.datasets import ImageSet

AUXILIARY = 0.4
"""Weight of the auxiliary head's loss, as UPerNet is published with."""


class Segmentation:
    """Cross-entropy of the pixels that count.

    Attributes:
        metric: Name of the metric that says which epoch is best.
    """

    metric = "mIoU"

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, update: int) -> Tensor:
        """Loss of a batch."""
        outputs = model(images)
        if isinstance(outputs, Tensor):
            return pixel_loss(outputs, targets)
        logits, auxiliary = outputs
        return pixel_loss(logits, targets) + AUXILIARY * pixel_loss(auxiliary, targets)

    def predict(self, model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits (classes, H, W) of each image.

        Only images of one size share a batch: none is padded for the sake of another.
        """
        by_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        logits: dict[int, Tensor] = {}
        for indices in by_size.values():
            logits |= zip(indices, model(torch.stack([images[i] for i in indices])).float(), strict=True)
        return [logits[i] for i in range(len(images))]

    def metrics(self, images: ImageSet, rank: int, processes: int) -> "SegmentationMetrics":
        """What counts in a validation on these images."""
        return SegmentationMetrics(len(images.classes))


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels that count, 0 if there are none.

    Shape:
        (B, classes, H, W) and (B, H, W) to a scalar.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


class SegmentationMetrics:
    """Confusion matrix over any number of batches and processes.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.float64)  # counts, by class and prediction

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Count the pixels of images (classes, h, w) with these maps (H, W); logits are resized, not maps."""
        classes = len(self.confusion)
        for logits, target in zip(outputs, targets, strict=True):
            predicted = restore(logits, target.shape)
            counted = target != IGNORED
            pairs = target[counted] * classes + predicted[counted]
            self.confusion += pairs.bincount(minlength=classes**2).view(classes, classes).cpu()

    def share(self, gather: Callable[[list], list]) -> None:
        """Take the counts of all processes; `gather` gives the lists of all of them, one after the other."""
        self.confusion = torch.stack(gather([self.confusion])).sum(0)

    def compute(self) -> dict[str, float]:
        """Mean IoU and mean accuracy of the classes that occur, and accuracy of the pixels, in percent."""
        hits, pixels = self.confusion.diagonal(), self.confusion.sum(1)
        metrics = {
            "mIoU": self._ious().nanmean(),
            "pixel_accuracy": hits.sum() / pixels.sum(),
            "mean_accuracy": (hits / pixels).nanmean(),
        }
        return {name: 100 * value.item() for name, value in metrics.items()}

    def per_class(self) -> list[float | None]:
        """IoU in percent of each class; None for one that is neither there nor predicted."""
        return [None if iou != iou else 100 * iou for iou in self._ious().tolist()]

    def _ious(self) -> Tensor:
        hits = self.confusion.diagonal()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)


def restore(logits: Tensor, size: torch.Size) -> Tensor:
    """The class of each pixel (H, W) of the image itself.

    Args:
        logits: (classes, h, w) of the resized image.
        size: The image's own height and width.
    """
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits[None], size, mode="bilinear")[0]
    return logits.argmax(0)
