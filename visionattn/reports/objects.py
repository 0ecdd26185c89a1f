"""Detectors: precision over recall by class and by size, figures of each class, and images with their boxes."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from ..data.images import ImageSet
from ..errors import shortened
from ..tasks.detection import Detection, to_full_size
from .curves import colours
from .findings import Findings, Look, View, with_evidence
from .page import Card, Section, Table, drawn, shown

LINES = 20
"""Classes that a picture has room for."""
SIZES = {"all": "all sizes", "small": "below 32²", "medium": "32² to 96²", "large": "from 96² on"}
"""COCO's, in pixels of a box, in the order of its evaluation."""
THRESHOLD = 0.5
"""Least score of what is drawn and counted in images, and overlap of what belongs together."""


class Objects(Findings):
    """Of boxes and masks."""

    def __init__(self, task: Detection, images: ImageSet) -> None:
        super().__init__(task, images)
        self.mistakes: list[int] = []
        self.counts = torch.zeros(len(self.classes), dtype=torch.int64)

    def add(self, outputs: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        self.metrics.update(outputs, targets)
        for output, target in zip(outputs, targets, strict=True):
            boxes = {key: value for key, value in output.items() if key != "masks"}  # which are large
            self.mistakes.append(sum(mistakes(to_full_size(boxes, target["size"].tolist()), target)))
            counted = target["labels"].cpu()[~target["iscrowd"].cpu().bool()]
            self.counts += (counted - 1).bincount(minlength=len(self.classes))

    def sections(self, look: Look) -> list[Section]:
        self.metrics.compute()
        kind = list(self.metrics.kinds)[-1]
        precision = self.metrics.precision(kind)[..., -1]  # (IoU, recall, class, size)
        labels = [int(label) - 1 for label in self.metrics.computed["classes"].flatten().tolist()]
        told = f"Of {kind}{'es' if kind == 'box' else 's'}, by COCO's evaluation. An object counts as found from an "
        told += (
            "overlap (IoU) of 0.5 on; sizes are areas in pixels, over the mean of the classes that have such objects."
        )
        rows = [
            [self.classes[label], int(self.counts[label]), *_row(precision[:, :, i])] for i, label in enumerate(labels)
        ]
        heads = ["class", "objects", "AP %", "AP50 %", "AP75 %", *(f"AP {name} %" for name in list(SIZES)[1:])]
        worst = "The worst are those with most mistakes: objects that were not found and finds that are no object, "
        worst += (
            f"of those with a score from {THRESHOLD:g} on. What counted is Grad-CAM of the class of the most certain "
        )
        worst += "find, whatever its score."
        return [
            Section("Precision and recall", told, [draw_precision(precision, [self.classes[i] for i in labels])]),
            Section("Classes", "Sorted by a click on a head.", tables=[Table(heads, rows)]),
            self.worst_and_random(torch.tensor(self.mistakes), look, self._card, worst),
        ]

    def _card(self, view: View) -> Card:
        pictures = self.task.draw(view.image, view.target, view.output, self.classes)
        found = to_full_size(view.output, view.target["size"].tolist())
        missed, false = mistakes(found, view.target)
        lines = [self.task.summarise(found, self.classes, THRESHOLD), f"{missed} missed, {false} false"]
        named = [shown(picture, name) for picture, name in zip(pictures, ("there", "found"), strict=True)]
        plain = self.task.picture(view.image, view.target)
        return Card([*named, *with_evidence(plain, view, 320)], lines, not missed + false, view.place)


def _row(precision: Tensor) -> list[float | None]:
    """AP, at overlaps of 0.5 and 0.75, and by size, in percent, of (IoU, recall, size)."""
    return [_mean(precision[..., 0]), _mean(precision[0, :, 0]), _mean(precision[5, :, 0])] + [
        _mean(precision[..., size]) for size in (1, 2, 3)
    ]


def _mean(precision: Tensor) -> float | None:
    known = precision[precision > -1]
    return 100 * known.mean().item() if len(known) else None


def draw_precision(precision: Tensor, classes: Sequence[str]):
    """Precision over recall at an overlap of 0.5, by class and by size.

    Args:
        precision: (IoU, recall, class, size), -1 where there is nothing to count.
        classes: their names.
    """
    recall = torch.linspace(0, 1, precision.shape[1])
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_class, by_size = figure.subplots(1, 2)
    known = [i for i in range(len(classes)) if (precision[0, :, i, 0] > -1).any()]
    known.sort(key=lambda i: -precision[0, :, i, 0].mean())
    title = "by class"
    if len(known) > LINES:
        known, title = known[: LINES // 2] + known[-LINES // 2 :], f"by class: the best and the worst {LINES // 2}"
    for colour, i in zip(colours(len(known)), known, strict=True):
        values = precision[0, :, i, 0]
        by_class.plot(recall, values, color=colour, label=f"{shortened(classes[i], 24)}: {100 * values.mean():.1f}")
    for size, name in enumerate(SIZES.values()):
        values = precision[0, :, :, size]
        there = (values > -1).all(0)
        if there.any():
            mean = values[:, there].mean(1)
            by_size.plot(recall, mean, label=f"{name}: {100 * mean.mean():.1f}")
    for axes, told in ((by_class, title), (by_size, "by size")):
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=told)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(title="AP50 %", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return drawn(figure)


def mistakes(found: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[int, int]:
    """How many objects were not found, and how many finds are no object, boxes and classes considered.

    Args:
        found: "boxes", "labels" and "scores", in the pixels of the image itself.
        target: "boxes", "labels" and "iscrowd"; what lies in a crowd counts for neither.
    """
    kept = found["scores"] >= THRESHOLD
    order = found["scores"][kept].argsort(descending=True, stable=True)
    boxes, labels = found["boxes"][kept][order], found["labels"][kept][order]
    crowd, there = target["iscrowd"].cpu().bool(), {key: target[key].cpu() for key in ("boxes", "labels")}
    overlaps = box_iou(boxes, there["boxes"].to(boxes.dtype))
    overlaps[labels[:, None] != there["labels"]] = 0
    free, false = ~crowd, 0
    for row in overlaps:
        best = (row * free).argmax() if len(row) else None
        if best is not None and free[best] and row[best] >= THRESHOLD:
            free[best] = False
        elif not (row[crowd] > 0).any():
            false += 1
    return int(free.sum()), false
