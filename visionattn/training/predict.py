"""What a model makes of images: classes, or objects and maps as pictures and as COCO has them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..errors import VisionattnError, user_input
from ..progress import track
from ..tasks import TASKS
from ..tasks.task import image_mode
from ..weights.files import write_file
from .inputs import Input, find_inputs, refuse_namesakes
from .opened import find_wanted, open_wanted

BATCH = 16
"""Images that a classifier gets at once."""


class Read(NamedTuple):
    """An image that was read, and what the model gets of it."""

    input: Input
    image: Image.Image
    tensor: Tensor


@dataclass(frozen=True)
class Prediction:
    """What a model makes of an image.

    Args:
        name: of the image.
        size: its width and height.
        summary: in a few words.
        listed: gives a line for each thing that was found, as `Task.listed`.
        picture: where it is drawn, if it is.
    """

    name: str
    size: tuple[int, int]
    summary: str
    listed: Callable[[], list[dict[str, Any]]]
    picture: Path | None


class Predictions:
    """What a model makes of images, one after the other; boxes, masks and semantic maps are drawn on the way.

    Args:
        names: of the images, as `find_inputs` takes them.
        checkpoint: of train.py or `visionattn convert`, or weights of `model` in any published layout; "" for none.
        model: name of a registered model, or its place.
        pretrained: take its published weights.
        output: folder for a PNG of each image, named after it; None: predictions. Classifiers make none.
        threshold: least score of the objects that are drawn and told, and of the classes of a model that gives an
            image any number of them; None: 0.5. Others have no use for it.
        top_k: most classes that are told of an image; None: 5, or all that reach the threshold.
        overwrite: write over pictures that are there.

    Attributes:
        sample: what is found in an image: "class", "objects" or "map".
        classes: their names.
        failed: names of the images that could not be read, which are told on stderr.

    Raises:
        VisionattnError: if the model cannot be made, a picture would be written over, or an option is of no use to the
            task; in iteration, if the only image cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        checkpoint: str = "",
        model: str = "",
        pretrained: bool = False,
        output: str | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        overwrite: bool = False,
    ) -> None:
        wanted = find_wanted(checkpoint, model, pretrained)
        task = wanted.description.get("task", "classification")
        several, self.sample = bool(wanted.description.get("multi_label")), TASKS[task].sample
        self.draws, has_scores = self.sample != "class", self.sample == "objects" or several
        useless = {
            "--output": not self.draws and output is not None,
            "--threshold": not has_scores and threshold is not None,
            "--top_k": task != "classification" and top_k is not None,
        }
        if name := next((name for name, given in useless.items() if given), None):
            raise VisionattnError(f"option {name} is of no use to {task}: leave it out")
        self.inputs, self.overwrite = find_inputs(names), overwrite
        self.pictures = _pictures(self.inputs, Path(output or "predictions"), overwrite) if self.draws else {}
        opened = open_wanted(wanted)
        self.task, self.model, self.classes = opened.task, opened.model, opened.classes
        threshold = 0.5 if has_scores and threshold is None else threshold
        self.options = (self.classes, threshold, *([] if top_k is None else [top_k]))
        self.failed: list[str] = []

    def __iter__(self) -> Iterator[Prediction]:
        for batch in self._batches():
            outputs = self._outputs([each.tensor for each in batch])
            for (each, image, _), found in zip(batch, outputs, strict=True):
                if self.draws:
                    found = self.task.to_full_size(found, (image.height, image.width))
                    self._draw(image, found, self.pictures[each])
                summary = self.task.summarise(found, *self.options)
                listed = partial(self.task.listed, found, *self.options)
                yield Prediction(each.name, image.size, summary, listed, self.pictures.get(each))

    def _batches(self) -> Iterator[list[Read]]:
        """The images in their order, those that a classifier takes at once together; what is unreadable is left out."""
        mode, prepare = image_mode(self.model), self.task.transform(False).image
        most, batch = 1 if self.draws else BATCH, []
        for each in track(self.inputs, "predicting"):
            try:
                image = each.read(mode)
            except VisionattnError as error:
                if len(self.inputs) == 1:
                    raise
                self.failed.append(each.name)
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            read = Read(each, image, prepare(image))
            if len(batch) == most or (batch and batch[0].tensor.shape != read.tensor.shape):
                yield batch
                batch = []
            batch.append(read)
        if batch:
            yield batch

    @torch.no_grad()
    def _outputs(self, images: list[Tensor]) -> Sequence[Any]:
        device = next(self.model.parameters()).device
        images, _ = self.task.collate(False)(images, [0] * len(images))
        moved = images.to(device) if isinstance(images, Tensor) else [image.to(device) for image in images]
        return self.task.predict(self.model, moved)

    def _draw(self, image: Image.Image, found: Any, path: Path) -> None:
        classes, threshold, *_ = self.options
        with user_input(f"cannot write {path}", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        picture = self.task.draw_on(image, found, classes, threshold)
        write_file(path, partial(picture.save, format="png"), self.overwrite)


def _pictures(inputs: Sequence[Input], folder: Path, overwrite: bool) -> dict[Input, Path]:
    """Where the picture of each image goes."""
    refuse_namesakes(inputs)
    pictures = {each: folder / f"{each.picture}.png" for each in inputs}
    if not overwrite and (there := next((path for path in pictures.values() if path.exists()), None)):
        raise VisionattnError(f"{there} exists: give --output another folder, or --overwrite")
    return pictures
