"""A model with what it is of: its task, its weights and the names of its classes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.preprocessing import class_names
from ..errors import VisionattnError
from ..tasks import make_task
from ..tasks.task import Task
from ..weights import load_checkpoint
from ..weights.description import Described, check_made, describe_place, is_place, read_described
from .config import options_of, parse_validate


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
class Opened:
    """A model that is ready.

    Args:
        task: the task, resolved.
        model: in eval mode, on its device.
        classes: names of its classes.
        several: whether images have any number of classes.
    """

    task: Task
    model: nn.Module
    classes: Sequence[str]
    several: bool


def find_wanted(checkpoint: str, model: str, pretrained: bool) -> Wanted:
    """The model that options name.

    Args:
        checkpoint: of train.py, of any task; or weights of `model`.
        model: name of a classifier, a file, hf-hub:... or local-dir:...
        pretrained: take its published weights.

    Raises:
        VisionattnError: if they name none, or one without weights.
    """
    description, content = read_described(checkpoint) if checkpoint else ({}, {})
    if not checkpoint and not model:
        raise VisionattnError("give a checkpoint, or --model NAME --pretrained")
    if model and description.get("model"):
        raise VisionattnError(f"{checkpoint} says itself which model it is of: leave out --model")
    if pretrained and (checkpoint or is_place(model)):
        raise VisionattnError("option --pretrained is for --model NAME alone: leave it out")
    if model and not (checkpoint or pretrained or is_place(model)):
        raise VisionattnError(f"{model} would have random weights: add --pretrained or a checkpoint")
    wanted = Wanted(checkpoint, model, pretrained, description, content)
    if checkpoint and not model and not wanted.trained:
        if not description.get("model"):
            raise VisionattnError(
                f"{checkpoint} was not saved by train.py: it does not say which model and classes it has: add --model"
            )
        wanted = Wanted("", checkpoint, False, {}, {})  # of `visionattn convert`
    if is_place(wanted.model) and (of := describe_place(wanted.model, weights=False).task) != "classification":
        raise VisionattnError(f"{wanted.model} is of {of}: give it as the checkpoint")
    return wanted


def open_wanted(wanted: Wanted) -> Opened:
    """Make a model and load its weights.

    Args:
        wanted: from `find_wanted`.

    Raises:
        VisionattnError: if its file is not what it says.
    """
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
    several = bool(description.get("multi_label"))
    return Opened(task, model.to(_device()), classes or names_of_classes(model), several)


def open_model(checkpoint: str = "", model: str = "", pretrained: bool = False) -> Opened:
    """`open_wanted` of `find_wanted`, whose arguments these are."""
    return open_wanted(find_wanted(checkpoint, model, pretrained))


def names_of_classes(model: nn.Module) -> Sequence[str]:
    """Names of a classifier's classes, or their numbers."""
    return class_names(model) or [str(number) for number in range(model.num_classes)]


def _device() -> torch.device:
    """Where a model runs: as under accelerate, which is not needed for it."""
    only_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return (None if only_cpu else torch.accelerator.current_accelerator(check_available=True)) or torch.device("cpu")
