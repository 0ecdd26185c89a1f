"""A model with what it is of: its task, its weights and the names of its classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ..errors import VisionattnError
from ..tasks import make_task
from ..tasks.task import Task
from ..weights import load_checkpoint
from ..weights.description import Described, check_made, describe_place, is_place, read_described
from .config import parse_validate
from .evaluation import options_of


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


def open_model(checkpoint: str = "", model: str = "", pretrained: bool = False) -> Opened:
    """Make a model and load its weights.

    Args:
        checkpoint: of train.py, of any task; or weights of `model`.
        model: name of a classifier, a file, hf-hub:... or local-dir:...
        pretrained: take its published weights.

    Raises:
        VisionattnError: if they name none, or one without weights.
    """
    if not checkpoint and not model:
        raise VisionattnError("give a checkpoint, or --model NAME --pretrained")
    held: tuple[dict[str, Any], dict[str, Any]] = read_described(checkpoint) if checkpoint else ({}, {})
    description, content = held
    if model and description.get("model"):
        raise VisionattnError(f"{checkpoint} says itself which model it is of: leave out --model")
    if pretrained and (checkpoint or is_place(model)):
        raise VisionattnError("option --pretrained is for --model NAME alone: leave it out")
    if model and not (checkpoint or pretrained or is_place(model)):
        raise VisionattnError(f"{model} would have random weights: add --pretrained or a checkpoint")
    trained = all(description.get(entry) is not None for entry in ("model", "classes", "data"))
    if checkpoint and not model and not trained:
        if not description.get("model"):
            raise VisionattnError(f"{checkpoint} does not say which model it is of: add --model NAME")
        checkpoint, model, held = "", checkpoint, ({}, {})  # of `visionattn convert`
        description, content = held
    if is_place(model) and (of := describe_place(model, weights=False).task) != "classification":
        raise VisionattnError(f"{model} is of {of}: give it as the checkpoint")
    given = [f"--{key}={value}" for key, value in (("checkpoint", checkpoint), ("model", model)) if value]
    config = parse_validate(given + ["--pretrained"] * pretrained, partial(options_of, read=lambda _: held))
    task = make_task(replace(config, checkpoint=""))
    count = len(description["classes"]) if trained else None
    if trained:
        name, kwargs = task.made
        described = Described(f"checkpoint {checkpoint}", name, kwargs, {}, description, Path(checkpoint), content)
        check_made(described, lambda: task.create_model(count))
    made = task.create_model(count).eval()
    if checkpoint:
        load_checkpoint(made, checkpoint, content=content)
    task.resolve(made)
    several = bool(description.get("multi_label"))
    return Opened(task, made.to(PartialState().device), description.get("classes") or _names(made), several)


def _names(model: nn.Module) -> Sequence[str]:
    """Names of a classifier's classes: its own, ImageNet's if it has as many, or numbers."""
    own = getattr(model, "pretrained_cfg", {}).get("label_names")
    if own and len(own) == model.num_classes:
        return own
    if subset := infer_imagenet_subset(model):
        return ImageNetInfo(subset).label_descriptions()
    return [str(number) for number in range(model.num_classes)]
