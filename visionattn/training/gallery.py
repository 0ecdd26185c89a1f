"""A picture of what a model makes of a few images."""

from itertools import islice
from typing import Any

from PIL import Image

from ..data.drawing import grid
from ..tasks.task import Task


class Gallery:
    """The first images of a validation: beside each target, what the model makes of the image.

    Args:
        task: Which draws.
        classes: Names of the classes.
    """

    count = 8
    side = 320
    """Most pixels of a picture's longer side."""

    def __init__(self, task: Task, classes: list[str]) -> None:
        self.task, self.classes = task, classes
        self.pictures: list[Image.Image] = []

    def add(self, images: Any, targets: Any, outputs: Any) -> None:
        """Draw those of a batch that there is room for."""
        for sample in islice(zip(images, targets, outputs, strict=True), self.count - len(self.pictures)):
            if drawn := self.task.draw(*sample, self.classes):
                for picture in drawn:
                    picture.thumbnail((self.side, self.side))
                self.pictures.append(grid(drawn))

    def picture(self) -> Image.Image | None:
        """All of them; None if there are none."""
        return grid(self.pictures) if self.pictures else None
