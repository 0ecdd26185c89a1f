"""What the loop asks of a task."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..create import create_described, create_model
from ..data.images import ImageSet, dataset_name, load_datasets, load_validation
from ..data.loader import Collate, collate_tensors
from ..data.transforms import OnImage, eval_transform, input_size, preprocessing, resolve_preprocessing, train_transform
from ..errors import VisionattnError
from ..registry import find
from ..weights.description import describe_place, is_place
from ..weights.entries import EXECUTION
from .config import TaskConfig

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# Only COCO's figures are torchmetrics'. Its others are the same but for float32's rounding and classes without images,
# whose average precision is 0 there; they took 30 times as long on batches of 1,000 classes, 3 s and 100 MiB to import.
class Metrics(ABC):
    """Counts of a validation, over any number of batches and processes."""

    @abstractmethod
    def update(self, outputs: Any, targets: Any) -> None:
        """Count a batch: what `Task.predict` made of the images, and their targets."""

    @abstractmethod
    def share(self, gather: Callable[[list], list]) -> None:
        """Take the counts of all processes; `gather` gives the lists of all of them, one after the other."""

    def details(self) -> dict[str, float]:
        """Further figures, which validate.py tells."""
        return {}

    def per_class(self) -> list[dict[str, float | None]]:
        """Figures of each class, if there are some, once they are computed; None where there is nothing to count."""
        return []

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures by name; nan for one of which there is nothing to count."""


@dataclass
class Validation:
    """How validate.py validates a model.

    Args:
        predict: makes of images what `metrics` counts.
        transform: of an image and its target.
        metrics: what counts, new.
        facts: what to record of the way that it is done.
        lines: makes of the figures, and of those of each class by name, what to print of them: labels and texts.
    """

    predict: Callable[[Any], Any]
    transform: Callable
    metrics: Metrics
    facts: dict[str, Any]
    lines: Callable[[dict[str, float], dict[str, dict]], list[tuple[str, str]]]


class Task(ABC):
    """What a task adds to training and validation. Unless it says otherwise, images have a class, which a registered
    model finds in images of one size.

    Args:
        config: options of the run, or of validate.py, which needs neither loss nor augmentation.

    Attributes:
        metric: name of the metric that says which epoch is best: the highest, none being below 0.
        shown: names of the metrics for which a line on the screen has room.
        unit: what follows figures where they are told.
        otherwise: arguments of `create_model` that options of other names stand for, or none, and what to do.
    """

    metric: str
    shown: tuple[str, ...]
    unit: ClassVar[str] = " %"
    otherwise: ClassVar[dict[str, str]] = {
        "name": "give --model",
        "pretrained": "give --pretrained",
        "checkpoint_path": "give --checkpoint",
        "features_only": "a task takes the whole model",
        "device": "accelerate says where it runs",
        "dtype": "give --precision",
    }

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        for key in config.model_kwargs.keys() & self.otherwise.keys():
            raise VisionattnError(f"model_kwargs.{key} is no way to say that: {self.otherwise[key]}")

    @cached_property
    def made(self) -> tuple[str, dict[str, Any]]:
        """Registered name and arguments of the model, or backbone: a file or repository that the options name says
        which it is, and how a model is run is not part of it."""
        name, kwargs = self.config.model, self.config.model_kwargs
        if is_place(name):
            described = describe_place(name, weights=False)
            name, kwargs = described.name, described.kwargs | kwargs
        base, tag, _ = find(name)
        return f"{base}.{tag}" if tag else base, {k: v for k, v in kwargs.items() if k not in EXECUTION}

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The images to train on and to validate on."""
        return load_datasets(self.config.data)

    def load_validation(self, classes: list[str] | None) -> ImageSet:
        """The images to validate a model on; `classes` are the model's, if they are known."""
        return load_validation(self.config.data)

    def create_model(self, num_classes: int | None) -> nn.Module:
        """The model, with the weights to start from; None for the classes that its options say."""
        config = self.config
        kwargs = config.model_kwargs | ({} if num_classes is None else {"num_classes": num_classes})
        if is_place(config.model):  # which brings its weights, be it a classifier or have its backbone
            return create_described(describe_place(config.model), None, config.checkpoint, **kwargs)
        return create_model(config.model, config.pretrained, config.checkpoint, **kwargs)

    def describe(self, num_classes: int) -> dict[str, Any]:
        """What a checkpoint tells of its model: the options that make it, and how its images are prepared."""
        model, kwargs = self.made
        return {
            "task": self.config.task,
            "model": model,
            "model_kwargs": kwargs | {"num_classes": num_classes},
            "preprocessing": preprocessing(self.config.data),
        }

    def resolve(self, model: nn.Module) -> TaskConfig:
        """The options, from now on the task's own, with what they left to model or data."""
        data = replace(resolve_preprocessing(self.config.data, model), name=dataset_name(self.config.data))
        self.config = replace(self.config, data=data)
        return self.config

    def transform(self, training: bool) -> Callable[[Image.Image, Any], tuple[Tensor, Any]]:
        """How an image and its target are prepared; its method `image` prepares one alone."""
        data = self.config.data
        return OnImage(train_transform(data, self.config.augment) if training else eval_transform(data))

    def input_size(self) -> str:
        """At which size images are validated, in words."""
        return "x".join(map(str, input_size(self.config.data)))

    def collate(self, training: bool) -> Collate:
        """How images and targets become those of a batch."""
        return collate_tensors

    @abstractmethod
    def make_loss(self, images: ImageSet, training_loss: Callable[..., Tensor]) -> nn.Module:
        """Module that gives the loss of a batch from (model, images, targets, number of the update).

        Args:
            images: to train on.
            training_loss: what a classifier makes of the loss, from (loss, images, logits, criterion);
                `Mechanics.training_loss`.
        """

    @abstractmethod
    def predict(self, model: nn.Module, images: Any) -> Any:
        """What the model says of a batch of images, as `metrics` counts it."""

    @abstractmethod
    def metrics(self, images: ImageSet, rank: int, processes: int) -> Metrics:
        """What counts in a validation on these images, of which this process has every `processes`-th."""

    def make_validation(self, model: nn.Module, images: ImageSet, classes: list[str] | None) -> Validation:
        """How validate.py is to validate a model, once `resolve` has been called.

        Args:
            model: in eval mode, on its device.
            images: to validate on.
            classes: the model's, if they are known.
        """

        def predict(batch: Sequence[Tensor]) -> Any:
            with autocast(batch[0].device, self.config.precision):
                return self.predict(model, batch)

        def lines(figures: dict[str, float], per_class: dict[str, dict]) -> list[tuple[str, str]]:
            told = [(name.replace("_", " "), self.told(value)) for name, value in figures.items()]
            each = {name: next(iter(values.values())) for name, values in per_class.items()}
            known = ", ".join(f"{name} {value:.1f}" for name, value in each.items() if value is not None)
            return [*told, *([("per class", known)] if per_class else [])]

        facts = {
            "classes": len(images.classes),
            "input_size": self.input_size(),
            "views": self.config.tta.view_count,
        }
        return Validation(predict, self.transform(False), self.metrics(images, 0, 1), facts, lines)

    def told(self, figure: float) -> str:
        """A figure in words; nan where there was nothing to count."""
        return "nothing to count" if math.isnan(figure) else f"{figure:.4f}{self.unit}"

    @abstractmethod
    def summarise(self, found: Any, classes: list[str], threshold: float | None) -> str:
        """What the model makes of an image, in a few words.

        Args:
            found: of `predict`, and of the size of the image itself.
            classes: names of the classes.
            threshold: least score of what is told; None for a model that finds one class in each image or pixel.
        """

    def listed(self, found: Any, classes: list[str], threshold: float | None) -> list[dict[str, Any]]:
        """What the model makes of an image, an entry for each thing, for programs: JSON's types alone.

        Args:
            found: as for `summarise`.
            classes: names of the classes.
            threshold: as for `summarise`.
        """
        return [{"summary": self.summarise(found, classes, threshold)}]

    def draw(self, image: Tensor, target: Any, output: Any, classes: list[str]) -> list[Image.Image]:
        """Pictures of an image's target and of what the model makes of it; none where there is nothing to be seen."""
        return []


def image_mode(model: nn.Module) -> str:
    """What images are converted to for the model."""
    channels = getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise VisionattnError(
            f"images have 3 channels, or 1 in grey: a model with in_chans {channels} cannot take them"
        )
    return "L" if channels == 1 else "RGB"


def finite(logits: Tensor) -> Tensor:
    """Logits with the largest numbers that sums and differences bear in place of infinity, which makes nan of them."""
    return logits.clamp(-1e30, 1e30)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision by its name in the options."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "no")
