"""Distillation from any model, for students whose paper does not say how they learn from a teacher."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbone.mechanics import Mechanics
from ..create import create_model
from ..errors import UnknownModelError, VisionattnError, user_input
from ..tasks.useless import given, refuse
from ..weights import load_checkpoint
from ..weights.description import read_description
from .config import DistillConfig, TrainConfig


def make_teacher(config: DistillConfig, num_classes: int) -> nn.Module:
    """The teacher with its weights, in eval mode.

    Args:
        config: options of the distillation.
        num_classes: classes of the data, those of a teacher whose weights are in a file that does not say otherwise.
    """
    kwargs: dict[str, Any] = dict(config.kwargs)
    if config.checkpoint:
        kwargs = {"num_classes": num_classes} | read_description(config.checkpoint).get("model_kwargs", {}) | kwargs
    try:
        teacher = create_model(config.model, pretrained=not config.checkpoint, **kwargs)
    except UnknownModelError:
        if not timm.is_model(config.model):
            raise
        with user_input(f"distill.model {config.model}", Exception):  # timm raises whatever it meets on the way
            teacher = timm.create_model(config.model, pretrained=not config.checkpoint, **kwargs)
    if config.checkpoint:
        load_checkpoint(teacher, config.checkpoint)
    return teacher.eval().requires_grad_(False)


def check_own(config: TrainConfig) -> None:
    """Refuse options of the distillation to a model that learns from a teacher as its paper says.

    Raises:
        VisionattnError: if one is given.
    """
    names = {*given(config, TrainConfig(), "distill")} - {
        f"distill.{name}" for name in ("model", "kwargs", "checkpoint")
    }
    refuse(dict.fromkeys(sorted(names), f"to {config.model}, which learns from a teacher as its paper says"))


class Student(nn.Module):
    """A model that keeps its pooled features, projected to the width of the teacher's, for the loss.

    Args:
        model: the model that learns.
        width: channels of the teacher's pooled features.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.projection = nn.Linear(model.head_hidden_size, width, bias=False)
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.forward_features(x)
        self.features = self.projection(self.model.forward_head(x, pre_logits=True))
        return self.model.forward_head(x)


class Distillation:
    """The loss of the labels, of the teacher's logits and of its features.

    Args:
        options: of the run; its images are normalised for the student.
        teacher: on the device of the student.
        num_classes: classes of the data.
        model: the model that learns, on its device.
        accelerator: for the precision of the teacher.

    Attributes:
        student: the model with the projection of its features; None if they do not matter.
    """

    def __init__(
        self, options: TrainConfig, teacher: nn.Module, num_classes: int, model: nn.Module, accelerator: Accelerator
    ) -> None:
        self.config, self.teacher, self.autocast = options.distill, teacher, accelerator.autocast
        self.own_terms = (model if isinstance(model, Mechanics) else Mechanics()).training_loss
        config, data = options.distill, options.data
        if config.alpha and teacher.num_classes != num_classes:
            raise VisionattnError(
                f"teacher {config.model} tells {teacher.num_classes} classes apart, the data has {num_classes}: "
                "give distill.checkpoint, or distill.alpha 0 to learn from its features alone"
            )
        placement = next(teacher.parameters())
        cfg = timm.data.resolve_model_data_config(teacher)
        as_map = (placement.new_tensor(x).view(1, -1, 1, 1) for x in (data.mean, data.std, cfg["mean"], cfg["std"]))
        self.mean, self.std, self.teacher_mean, self.teacher_std = as_map
        if self.mean.shape != self.teacher_mean.shape:
            raise VisionattnError(
                f"teacher {config.model} takes images of {self.teacher_mean.numel()} channels, "
                f"the student of {self.mean.numel()}"
            )
        width = teacher.head_hidden_size
        self.student = Student(model, width).to(placement.device) if config.features else None

    def loss(self, loss: Tensor, images: Tensor, logits: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss to minimise, from that of the labels, what the model was called with and what it returned.

        What the model's paper adds to the loss is added to this one.
        """
        config = self.config
        with torch.no_grad(), self.autocast():
            shown = (images * self.std + self.mean - self.teacher_mean) / self.teacher_std
            taught = self.teacher.forward_features(shown)
            features = self.teacher.forward_head(taught, pre_logits=True).float()
            targets = self.teacher.forward_head(taught).float()
        if config.alpha:
            if config.hard:
                learned = F.cross_entropy(logits, targets.argmax(1))
            else:
                ours, theirs = (F.log_softmax(x / config.temperature, 1) for x in (logits, targets))
                learned = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * config.temperature**2
            loss = (1 - config.alpha) * loss + config.alpha * learned
        if self.student is not None:
            projected, self.student.features = self.student.features.float(), None
            if config.feature_loss == "cosine":
                error = 1 - F.cosine_similarity(projected, features).mean()
            else:
                error = F.mse_loss(*(F.layer_norm(x, x.shape[-1:]) for x in (projected, features)))
            loss = loss + config.features * error
        return self.own_terms(loss, images, logits, criterion)
