"""Semantic segmentation: loss and metrics."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..create import create_segmenter
from ..data.annotations import IGNORED, collate_crops, collate_lists, tight_boxes
from ..data.drawing import draw_map
from ..data.images import ImageSet
from ..data.joint import MapTransform
from ..data.loader import Collate
from ..data.maps import load_segmentation, load_segmentation_validation
from ..data.masks import encode
from ..errors import VisionattnError
from ..heads.pyramid import by_size
from .config import LossConfig, TtaConfig
from .dense import DenseTask
from .task import Metrics, finite


class Segmentation(DenseTask):
    """A class for every pixel."""

    create = staticmethod(create_segmenter)
    transform_class = MapTransform
    metric = "mIoU"
    shown = ("mIoU", "pixel_accuracy", "mean_accuracy")

    def load(self) -> tuple[ImageSet, ImageSet]:
        return load_segmentation(self.config.data, self.config.annotations)

    def load_validation(self, classes: list[str] | None) -> ImageSet:
        return load_segmentation_validation(self.config.data, self.config.annotations, classes)

    def collate(self, training: bool) -> Collate:
        return collate_crops if training else collate_lists

    def make_loss(self, images: ImageSet, training_loss: Callable[..., Tensor]) -> nn.Module:
        return PixelLoss(self.config.loss, len(images.classes))

    def predict(self, model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits (classes, H, W) of each image; of several views, the logarithm of their mean probabilities."""
        logits: dict[int, Tensor] = {}
        for indices in by_size(images):
            logits |= zip(indices, self._logits(model, torch.stack([images[i] for i in indices])), strict=True)
        return [logits[i] for i in range(len(images))]

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        tta = getattr(self.config, "tta", TtaConfig())
        if tta == TtaConfig():
            return model(images).float()
        size, logs = images.shape[-2:], []
        for scale in tta.scales:
            view = images
            if scale != 1:
                factors = [max(scale, 1 / side) for side in size]
                view = F.interpolate(view, scale_factor=factors, mode="bilinear", antialias=True)
            logits = [model(view)] + ([model(view.flip(-1)).flip(-1)] if tta.flip else [])
            logs += [F.interpolate(finite(each.float()), size, mode="bilinear").log_softmax(1) for each in logits]
        return reduce(torch.logaddexp, logs) - math.log(len(logs))  # never of 0, which resizing would make nan of

    def metrics(self, images: ImageSet, rank: int, processes: int) -> "SegmentationMetrics":
        return SegmentationMetrics(len(images.classes))

    def size_of(self, target: Tensor) -> tuple[int, int]:
        return tuple(target.shape)

    def to_full_size(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        return to_full_size(output, size).cpu()

    def draw_on(self, picture: Image.Image, found: Tensor, classes: list[str], threshold: float = 0.5) -> Image.Image:
        return draw_map(picture, found, classes)

    def summarise(self, found: Tensor, classes: list[str], threshold: float | None) -> str:
        shares = found.flatten().bincount(minlength=len(classes)) / found.numel()
        ranked = sorted(zip(shares.tolist(), classes, strict=True), reverse=True)
        return ", ".join(f"{name} {100 * share:.1f} %" for share, name in ranked if share >= 0.001)

    def listed(self, found: Tensor, classes: list[str], threshold: float | None) -> list[dict[str, Any]]:
        """The pixels of each class as an annotation of COCO, the largest first, as run-length codes."""
        labels, counts = found.unique(return_counts=True)
        entries = []
        for number in counts.argsort(descending=True, stable=True).tolist():
            label, area = labels[number].item(), counts[number].item()
            mask = (found == label).numpy()
            x1, y1, x2, y2 = tight_boxes(mask[None])[0].tolist()
            entry = {"category_id": label, "class": classes[label], "share": area / found.numel()}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(area), "iscrowd": 0}
            entries.append(entry | {"segmentation": encode(mask)})
        return entries


class PixelLoss(nn.Module):
    """Cross-entropy of the pixels that count and, if asked for, Dice loss.

    Args:
        options: of the loss.
        num_classes: number of classes.

    Raises:
        VisionattnError: if the class weights do not fit the classes.
    """

    def __init__(self, options: LossConfig, num_classes: int) -> None:
        super().__init__()
        weights = options.class_weights
        if weights == "balanced" or (weights and len(weights) != num_classes):
            given = "balanced" if weights == "balanced" else f"{len(weights)} values"
            raise VisionattnError(f"loss.class_weights of segmentation: expected {num_classes} values, got {given}")
        self.register_buffer("weight", torch.tensor(weights) if weights else None)
        self.dice_weight, self.auxiliary_weight = options.dice, options.auxiliary

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor, update: int) -> Tensor:
        """Loss of a batch; that of an auxiliary head, if there is one, is added with its weight."""
        outputs = model(images)
        if isinstance(outputs, Tensor):
            return self.of(outputs, targets)
        logits, auxiliary = outputs
        return self.of(logits, targets) + self.auxiliary_weight * self.of(auxiliary, targets)

    def of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of logits (B, classes, H, W) for classes (B, H, W); 0 if no pixel counts."""
        logits = logits.float()
        total = F.cross_entropy(logits, targets, self.weight, ignore_index=IGNORED, reduction="sum")
        loss = total / (targets != IGNORED).sum().clamp(min=1)
        return loss + self.dice_weight * dice_loss(logits, targets) if self.dice_weight else loss


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss over the pixels that count, the mean of the classes that occur; 0 if none does.

    "V-Net", arXiv 1606.04797, without its squares. That of segmentation_models_pytorch took a quarter of the training
    of a small model.

    Shape:
        (B, classes, H, W) and (B, H, W) to a scalar.
    """
    counted = (targets != IGNORED)[:, None].to(logits.dtype)
    truth = torch.zeros_like(logits).scatter_(1, targets[:, None] * counted.long(), counted)
    probabilities, pixels = logits.softmax(1) * counted, truth.sum((0, 2, 3))
    dice = 2 * (probabilities * truth).sum((0, 2, 3)) / (probabilities.sum((0, 2, 3)) + pixels).clamp(min=1e-6)
    occurs = pixels > 0
    return ((1 - dice) * occurs).sum() / occurs.sum().clamp(min=1)


class SegmentationMetrics(Metrics):
    """Confusion matrix over any number of batches and processes.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.float64)  # counts, by class and prediction

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Count the pixels of images (classes, h, w) with these maps (H, W); logits are resized, not maps."""
        classes = len(self.confusion)
        for logits, target in zip(outputs, targets, strict=True):
            predicted = to_full_size(logits, target.shape)
            counted = target != IGNORED
            pairs = target[counted] * classes + predicted[counted]
            self.confusion += pairs.bincount(minlength=classes**2).view(classes, classes).cpu()

    def share(self, gather: Callable[[list], list]) -> None:
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

    def per_class(self) -> list[dict[str, float | None]]:
        """IoU in percent of each class; None for one that is neither there nor predicted."""
        return [{"IoU": None if iou != iou else 100 * iou} for iou in self._ious().tolist()]

    def _ious(self) -> Tensor:
        hits = self.confusion.diagonal()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)


def to_full_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The class of each pixel (H, W) of the image itself.

    Args:
        logits: (classes, h, w) of the resized image.
        size: the image's own height and width.
    """
    if logits.shape[-2:] != tuple(size):
        logits = F.interpolate(finite(logits)[None], tuple(size), mode="bilinear")[0]
    return logits.argmax(0)
