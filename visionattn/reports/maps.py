"""Segmenters: IoU of each class, confusions of pixels, and images with maps of the errors."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from ..data.annotations import IGNORED
from ..data.drawing import palette
from ..data.images import ImageSet
from ..tasks.segmentation import Segmentation, to_full_size
from .classes import class_table, draw_confusion
from .findings import Findings, Look, View, with_evidence
from .page import Card, Picture, Section, Table, drawn, shown

WRONG, UNCOUNTED = (220, 30, 30), (70, 110, 200)
"""Colours of error maps."""


class Maps(Findings):
    """Of a class for every pixel."""

    def __init__(self, task: Segmentation, images: ImageSet) -> None:
        super().__init__(task, images)
        self.errors: list[float] = []

    def add(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.metrics.update(outputs, targets)
        self.errors += [share_wrong(output, target) for output, target in zip(outputs, targets, strict=True)]

    def sections(self, look: Look) -> list[Section]:
        confusion = self.metrics.confusion
        table = class_table(self.classes, confusion, "pixels")
        ious = [figures["IoU"] for figures in self.metrics.per_class()]
        rows = [[row[0], iou, *row[1:]] for row, iou in zip(table.rows, ious, strict=True)]
        figure, told = draw_confusion(confusion, self.classes, "pixels")
        worst = "The worst are those with the largest share of wrong pixels. Errors are red, pixels that do not count "
        worst += "are blue. What counted is Grad-CAM of the class that is found on most pixels, the background aside."
        images = self.worst_and_random(torch.tensor(self.errors), look, self._card, worst)
        return [
            Section(
                "Classes", "Sorted by a click on a head.", tables=[Table(["class", "IoU %", *table.heads[1:]], rows)]
            ),
            Section("Confusions", f"{told} Numbers are percent.", [figure]),
            Section(images.title, images.text, [legend(self.classes)], cards=images.cards),
        ]

    def _card(self, view: View) -> Card:
        pictures = self.task.draw(view.image, view.target, view.output, self.classes)
        plain = self.task.picture(view.image, view.target)
        named = [shown(picture, name) for picture, name in zip(pictures, ("there", "found"), strict=True)]
        errors = shown(
            error_map(plain, to_full_size(view.output, view.target.shape).cpu(), view.target.cpu()), "errors"
        )
        wrong = share_wrong(view.output, view.target)
        return Card(
            [*named, errors, *with_evidence(plain, view, 320)], [f"{100 * wrong:.1f} % wrong"], None, view.place
        )


def share_wrong(output: Tensor, target: Tensor) -> float:
    """Share of the pixels that count whose class is another; 0 where none counts.

    Args:
        output: logits (classes, h, w).
        target: (H, W).
    """
    counted = target != IGNORED
    wrong = (to_full_size(output, target.shape) != target) & counted
    return (wrong.sum() / counted.sum().clamp(min=1)).item()


def error_map(picture: Image.Image, found: Tensor, target: Tensor) -> Image.Image:
    """The picture in pale grey, with the pixels of a wrong class.

    Args:
        picture: the image.
        found: (H, W), the class of each pixel.
        target: (H, W), the right one.
    """
    pixels = np.asarray(picture.convert("L").convert("RGB")) // 2 + 127
    pixels[((found != target) & (target != IGNORED)).numpy()] = WRONG
    pixels[(target == IGNORED).numpy()] = UNCOUNTED
    return Image.fromarray(pixels)


def legend(classes: Sequence[str]) -> Picture:
    """The colours of the classes; the background has none."""
    named = [
        (name, colour) for name, colour in zip(classes, palette(len(classes)), strict=True) if name != "background"
    ]
    columns = min(len(named), 8)
    figure = Figure(figsize=(11, 0.4 + 0.25 * -(-len(named) // max(columns, 1))))
    patches = [Patch(color=[part / 255 for part in colour], label=name[:20]) for name, colour in named]
    rows = [patch for start in range(columns) for patch in patches[start::columns]]  # which it fills column by column
    figure.legend(handles=rows, loc="center left", ncols=max(columns, 1), frameon=False, fontsize=9)
    return drawn(figure)
