"""Detection and instance segmentation: loss and metrics."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..create import create_detector
from ..data.annotations import collate_lists
from ..data.boxes import load_detection, load_detection_validation
from ..data.drawing import draw_objects
from ..data.images import ImageSet
from ..data.joint import ObjectTransform
from ..data.loader import Collate
from ..data.masks import encode
from ..errors import require
from .config import TaskConfig
from .dense import DenseTask
from .task import Metrics

SUMMARY = {
    **{"AP": "map", "AP50": "map_50", "AP75": "map_75", "APs": "map_small", "APm": "map_medium", "APl": "map_large"},
    **{"AR1": "mar_1", "AR10": "mar_10", "AR100": "mar_100"},
    **{"ARs": "mar_small", "ARm": "mar_medium", "ARl": "mar_large"},
}
"""COCO's twelve figures, and what torchmetrics calls them."""


class Detection(DenseTask):
    """Boxes of objects and, if the head finds them, their masks."""

    create = staticmethod(create_detector)
    transform_class = ObjectTransform
    draw_on = staticmethod(draw_objects)

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        require("torchmetrics", "faster_coco_eval")  # which the metrics import after the first epoch
        self.masks = config.head == "mask_rcnn"
        kinds = ("mask", "box") if self.masks else ("box",)
        self.metric = f"{kinds[0]}_AP"
        self.shown = tuple(f"{kind}_{name}" for kind in kinds for name in ("AP", "AP50"))

    def load(self) -> tuple[ImageSet, ImageSet]:
        return load_detection(self.config.data, self.config.annotations, self.masks)

    def load_validation(self, classes: list[str] | None) -> ImageSet:
        return load_detection_validation(self.config.data, self.config.annotations, self.masks, classes)

    def collate(self, training: bool) -> Collate:
        return collate_lists

    def make_loss(self, images: ImageSet, training_loss: Callable[..., Tensor]) -> nn.Module:
        return DetectionLoss()

    def predict(self, model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What the model finds in each image, and the size of the image in which it does."""
        found = model(images)
        return [
            {**each, "input_size": torch.tensor(image.shape[-2:])} for each, image in zip(found, images, strict=True)
        ]

    def metrics(self, images: ImageSet, rank: int, processes: int) -> "DetectionMetrics":
        return DetectionMetrics(self.masks, len(images.classes))

    def size_of(self, target: dict[str, Tensor]) -> tuple[int, int]:
        return tuple(target["size"].tolist())

    def to_full_size(self, output: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        return to_full_size(output, size)

    def summarise(self, found: dict[str, Tensor], classes: list[str], threshold: float | None) -> str:
        counts = Counter(found["labels"][found["scores"] >= threshold].tolist())
        return ", ".join(f"{count} x {classes[label - 1]}" for label, count in counts.most_common()) or "nothing found"

    def listed(self, found: dict[str, Tensor], classes: list[str], threshold: float | None) -> list[dict[str, Any]]:
        """Objects as annotations of COCO, the most certain first, their masks as run-length codes."""
        entries = []
        for number in found["scores"].argsort(descending=True).tolist():
            score, label = found["scores"][number].item(), found["labels"][number].item()
            if score < threshold:
                break
            x1, y1, x2, y2 = found["boxes"][number].tolist()
            entry = {"category_id": label, "class": classes[label - 1], "score": score}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            if "masks" in found:
                mask = found["masks"][number].numpy()
                entry |= {"area": float(mask.sum()), "segmentation": encode(mask)}
            entries.append(entry)
        return entries


class DetectionLoss(nn.Module):
    """Sum of a detector's losses."""

    def forward(self, model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], update: int) -> Tensor:
        return torch.stack([loss.float() for loss in model(images, targets).values()]).sum()


class DetectionMetrics(Metrics):
    """COCO's metrics of boxes and masks over any number of batches and processes.

    Args:
        masks: whether masks count too.
        num_classes: number of classes.
    """

    def __init__(self, masks: bool, num_classes: int) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self.num_classes = num_classes
        self.kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
        self.metric = MeanAveragePrecision(
            iou_type=tuple(self.kinds.values()),
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),  # torchmetrics rounds its own to float32, which moves
            rec_thresholds=np.linspace(0, 1, 101).tolist(),  # recalls of exactly a threshold past it
            extended_summary=True,
            backend="faster_coco_eval",
        )
        self.metric.warn_on_many_detections = False
        self.computed: dict[str, Any] = {}

    def update(self, outputs: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        found = [to_full_size(output, target["size"].tolist()) for output, target in zip(outputs, targets, strict=True)]
        kept = ("boxes", "labels", "iscrowd", "area", *(["masks"] if "mask" in self.kinds else []))
        self.metric.update(found, [{key: target[key].cpu() for key in kept} for target in targets])

    def share(self, gather: Callable[[list], list]) -> None:
        """Take the images of all processes, in their order, which decides between detections of one score."""
        for name, mine in self.metric.metric_state.items():
            rounds = zip_longest(*gather([mine]))  # each process had every `processes`-th image
            setattr(self.metric, name, [item for each in rounds for item in each if item is not None])

    def compute(self) -> dict[str, float]:
        """COCO's figures in percent, with "box_" or "mask_" before their names; nan where there is nothing to count."""
        self.computed = self.metric.compute()
        return {
            f"{kind}_{name}": _percent(self.computed[self._prefix(kind) + key].item())
            for kind in self.kinds
            for name, key in SUMMARY.items()
        }

    def per_class(self) -> list[dict[str, float | None]]:
        """AP in percent of each class, of masks if they count; None for one without objects."""
        kind = list(self.kinds)[-1]
        precision = self.precision(kind)[:, :, :, 0, -1]  # (IoU, recall, class)
        means: list[dict[str, float | None]] = [{"AP": None} for _ in range(self.num_classes)]
        for label, values in zip(self.computed["classes"].flatten().tolist(), precision.unbind(2), strict=True):
            if (values > -1).any():
                means[label - 1]["AP"] = 100 * values[values > -1].mean().item()
        return means

    def precision(self, kind: str) -> Tensor:
        """Precision (IoU, recall, class, size, detections), once computed; -1 where there is nothing to count.

        Args:
            kind: "box" or "mask".
        """
        return self.computed[self._prefix(kind) + "precision"]

    def _prefix(self, kind: str) -> str:
        return f"{self.kinds[kind]}_" if len(self.kinds) > 1 else ""


def to_full_size(output: dict[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """What was found in a resized image, in the pixels of the image itself.

    Args:
        output: of `Detection.predict`.
        size: the image's own height and width.

    Returns:
        boxes, scores, labels and, if there are any, masks (N, H, W) of true and false, in the main memory.
    """
    found = {key: value.detach().cpu() for key, value in output.items()}
    (height, width), (input_height, input_width) = size, found.pop("input_size").tolist()
    ratio = torch.tensor([width / input_width, height / input_height]).repeat(2)
    found["boxes"] = found["boxes"].float() * ratio
    found["scores"] = found["scores"].float()
    if "masks" in found:
        masks = found["masks"].float()  # (N, 1, H, W), probabilities
        if (height, width) != (input_height, input_width) and len(masks):
            masks = F.interpolate(masks, (height, width), mode="bilinear", antialias=True)
        found["masks"] = masks.reshape(-1, height, width) > 0.5
    return found


def _percent(value: float) -> float:
    return 100 * value if value >= 0 else float("nan")
