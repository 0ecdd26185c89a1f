"""What the parts of a report have in common: they count outputs, and then look at some images again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.images import ImageSet
from ..errors import VisionattnError
from ..explain import grad_cam
from ..tasks.task import Task
from .page import Card, Section, overlay, shown

PAGE = 24
"""Images of a page of cards."""


@dataclass(frozen=True)
class View:
    """An image, looked at again.

    Args:
        image: prepared for the model, (C, H, W).
        target: what the data say of it.
        output: what `Task.predict` makes of it.
        heat: (H, W), from 0 to 1, what speaks for that; None where nothing does or there is no way to tell.
        place: where it comes from.
    """

    image: Tensor
    target: Any
    output: Any
    heat: Tensor | None
    place: str


Look = Callable[[Sequence[int]], list[View]]
"""Gives the images of these numbers."""


class Findings(ABC):
    """What a task's report tells.

    Args:
        task: the task, resolved.
        images: the images that are counted.
    """

    def __init__(self, task: Task, images: ImageSet) -> None:
        self.task, self.images, self.classes = task, images, images.classes
        self.metrics = task.metrics(images, 0, 1)

    @abstractmethod
    def add(self, outputs: Any, targets: Any) -> None:
        """Count a batch, the images being in their order: what `Task.predict` made of them, and their targets."""

    @abstractmethod
    def sections(self, look: Look) -> list[Section]:
        """The parts of the page, once all images have been counted."""

    def worst_and_random(self, errors: Tensor, look: Look, card: Callable[[View], Card], told: str) -> Section:
        """The images with the largest errors, and as many that are drawn by chance.

        Args:
            errors: of the images.
            look: see `Look`.
            card: made of each.
            told: what is the worst.
        """
        drawn = torch.randperm(len(errors), generator=torch.Generator().manual_seed(0))[:PAGE].tolist()
        pages = {"The worst": errors.argsort(descending=True, stable=True)[:PAGE].tolist(), "Drawn by chance": drawn}
        cards = {title: [card(view) for view in look(indices)] for title, indices in pages.items()}
        return Section("Validation images", told, cards=cards)


def evidence(model: nn.Module, images: Tensor, outputs: Sequence[Any], classes: Sequence[str]) -> list[Tensor | None]:
    """What in images speaks for what the model says: Grad-CAM of its answer.

    Args:
        model: in eval mode.
        images: (B, C, H, W).
        outputs: what `Task.predict` makes of them.
        classes: names of the classes.

    Returns:
        (H, W) of each, from 0 to 1; None where there is nothing to explain, or no way to.
    """
    try:
        targets = [_asked(output, classes) for output in outputs]
        target = None if None in targets else targets
        return list(grad_cam(model, images, target)[0].values.detach().cpu())
    except VisionattnError:  # no object was found, or the model is not one of ours
        return [None] * len(images)


def _asked(output: Any, classes: Sequence[str]) -> int | None:
    """The class to explain of a semantic map: what is on most pixels, the background aside. None for what the model
    itself puts first."""
    if not isinstance(output, Tensor) or output.ndim != 3:
        return None
    pixels = output.argmax(0).flatten().bincount(minlength=len(classes))
    for number, name in enumerate(classes):
        pixels[number] *= name != "background"
    return int(pixels.argmax()) if pixels.any() else None


def with_evidence(picture: Image.Image, view: View, side: int) -> list:
    """The explanation of an image as a picture of the page, if there is one."""
    return [] if view.heat is None else [shown(overlay(picture, view.heat), "what counted", side)]


class Others(Findings):
    """Findings of any task: its figures, and pictures if it draws some."""

    def add(self, outputs: Any, targets: Any) -> None:
        self.metrics.update(outputs, targets)

    def sections(self, look: Look) -> list[Section]:
        return []
