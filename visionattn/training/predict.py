"""What a model makes of images: classes, or objects and maps as pictures and as COCO has them."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ..errors import VisionattnError, user_input
from ..progress import track
from ..tasks import TASKS, make_task
from ..tasks.task import Task, image_mode
from ..weights import load_checkpoint
from ..weights.description import Described, check_made, describe_place, is_place, read_described
from .checkpoint import write_file
from .config import options_of, parse_validate
from .inputs import Input, find_inputs

BATCH = 16
"""Images that a classifier gets at once."""


class Read(NamedTuple):
    """An image that was read, and what the model gets of it."""

    input: Input
    image: Image.Image
    tensor: Tensor


class Wanted(NamedTuple):
    """The model that options name, and what its file says.

    Args:
        checkpoint: a file of weights, or "".
        model: name or place of the model, where the checkpoint does not say it, or "".
        pretrained: whether the published weights are meant.
        description: of the checkpoint.
        content: of the checkpoint.
    """

    checkpoint: str
    model: str
    pretrained: bool
    description: dict[str, Any]
    content: dict[str, Any]

    @property
    def trained(self) -> bool:
        """Whether the checkpoint is train.py's."""
        return all(self.description.get(entry) is not None for entry in ("model", "classes", "data"))


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
        VisionattnError: if the model cannot be made, nothing is there of a name, a picture would be written over, or an
            option is of no use to the task; in iteration, if the only image cannot be read.
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
        wanted = _wanted(checkpoint, model, pretrained)
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
        self.inputs = find_inputs(names)
        self.pictures = _pictures(self.inputs, Path(output or "predictions"), overwrite) if self.draws else {}
        self.task, self.model, self.classes = _load(wanted)
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
        write_file(path, partial(picture.save, format="png"))


def _wanted(checkpoint: str, model: str, pretrained: bool) -> Wanted:
    """The model that options name.

    Raises:
        VisionattnError: if they name none, or one without weights.
    """
    description, content = read_described(checkpoint) if checkpoint else ({}, {})
    if not checkpoint and not model:
        raise VisionattnError("give --checkpoint FILE, or --model NAME --pretrained")
    if model and description.get("model"):
        raise VisionattnError(f"{checkpoint} says itself which model it is of: leave out --model")
    if pretrained and (checkpoint or is_place(model)):
        raise VisionattnError("option --pretrained is for --model NAME alone: leave it out")
    if model and not (checkpoint or pretrained or is_place(model)):
        raise VisionattnError(f"{model} would have random weights: add --pretrained or --checkpoint FILE")
    wanted = Wanted(checkpoint, model, pretrained, description, content)
    if checkpoint and not model and not wanted.trained:
        if not description.get("model"):
            raise VisionattnError(
                f"{checkpoint} was not saved by train.py: it does not say which model and classes it has: add --model"
            )
        wanted = Wanted("", checkpoint, False, {}, {})  # of `visionattn convert`
    if is_place(wanted.model) and (of := describe_place(wanted.model, weights=False).task) != "classification":
        raise VisionattnError(f"{wanted.model} is of {of}: give it as --checkpoint")
    return wanted


def _load(wanted: Wanted) -> tuple[Task, nn.Module, Sequence[str]]:
    """The task, the model in eval mode on its device, and the names of its classes."""
    checkpoint, name, pretrained, description, content = wanted
    argv = [f"--{key}={value}" for key, value in (("checkpoint", checkpoint), ("model", name)) if value]
    held = description, content
    config = parse_validate(argv + ["--pretrained"] * pretrained, partial(options_of, read=lambda _: held))
    task = make_task(replace(config, checkpoint=""))
    classes = description.get("classes")
    count = len(classes) if wanted.trained else None
    if wanted.trained:
        made, kwargs = task.made
        described = Described(f"checkpoint {checkpoint}", made, kwargs, {}, description, Path(checkpoint), content)
        check_made(described, lambda: task.create_model(count))
    model = task.create_model(count).eval()
    if checkpoint:
        load_checkpoint(model, checkpoint, content=content)
    task.resolve(model)
    return task, model.to(_device()), classes or class_names(model)


def class_names(model: nn.Module) -> Sequence[str]:
    """Names of a classifier's classes: those that its configuration tells, ImageNet's if it has as many, or numbers."""
    cfg = getattr(model, "pretrained_cfg", {})
    if (names := cfg.get("label_names")) and len(names) == model.num_classes:
        return [(cfg.get("label_descriptions") or {}).get(name, name) for name in names]
    if subset := infer_imagenet_subset(model):
        return ImageNetInfo(subset).label_descriptions()
    return [str(number) for number in range(model.num_classes)]


def _device() -> torch.device:
    """Where a model runs: as under accelerate, which is not needed for it."""
    only_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return (None if only_cpu else torch.accelerator.current_accelerator(check_available=True)) or torch.device("cpu")


def _pictures(inputs: Sequence[Input], folder: Path, overwrite: bool) -> dict[Input, Path]:
    """Where the picture of each image goes."""
    twice = [str(name) for name, count in Counter(each.picture for each in inputs).items() if count > 1]
    if twice:
        raise VisionattnError(f"several images are called {twice[0]}, and so would be their pictures")
    pictures = {each: folder / f"{each.picture}.png" for each in inputs}
    if not overwrite and (there := next((path for path in pictures.values() if path.exists()), None)):
        raise VisionattnError(f"{there} exists: give --output another folder, or --overwrite")
    return pictures
