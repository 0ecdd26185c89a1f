"""What detection and segmentation share: a head over a backbone, and images of any size."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from ..data.annotations import kind_of
from ..data.drawing import to_image
from ..data.joint import MapTransform, ObjectTransform
from ..data.preprocessing import model_preprocessing
from ..weights.description import load_described
from .config import TaskConfig
from .task import Task


class DenseTask(Task):
    """A task whose models are a head over a backbone.

    Attributes:
        create: `create_detector` or `create_segmenter`.
        transform_class: class of the transform.
    """

    otherwise = {name: what for name, what in Task.otherwise.items() if name != "checkpoint_path"}  # of the backbone
    create: ClassVar[Callable[..., nn.Module]]
    transform_class: ClassVar[type[ObjectTransform | MapTransform]]

    def create_model(self, num_classes: int | None) -> nn.Module:
        config = self.config
        model = type(self).create(
            config.model,
            config.head,
            num_classes,
            pretrained_backbone=config.pretrained or None,  # files and repositories bring theirs
            backbone_kwargs=config.model_kwargs,
            **config.head_kwargs,
        )
        if config.checkpoint:
            load_described(model, config.checkpoint, config.model_kwargs.get("checkpoint_prefix", ""))
        return model

    def describe(self, num_classes: int) -> dict[str, Any]:
        config, (model, kwargs) = self.config, self.made
        options = {"task": config.task, "model": model, "model_kwargs": kwargs}
        options |= {"head": config.head, "head_kwargs": config.head_kwargs}
        return options | {"annotations": asdict(config.annotations), "joint": asdict(config.joint)}

    def resolve(self, model: nn.Module) -> TaskConfig:
        data, own = self.config.data, model_preprocessing(model)
        data = replace(data, mean=data.mean or own["mean"], std=data.std or own["std"], name=kind_of(data))
        self.config = replace(self.config, data=data)
        return self.config

    def transform(self, training: bool) -> Callable[[Image.Image, Any], tuple[Tensor, Any]]:
        return self.transform_class(self.config.joint, self.config.data.mean, self.config.data.std, training)

    def input_size(self) -> str:
        joint = self.config.joint
        side = joint.eval_size or max(joint.min_size or [0])
        return f"shorter side {side}" if side else "as they are"

    def picture(self, image: Tensor, target: Any) -> Image.Image:
        """An image that was prepared for the model, in the size that it has itself."""
        height, width = self.size_of(target)
        return to_image(image, self.config.data.mean, self.config.data.std).resize((width, height))

    def draw(self, image: Tensor, target: Any, output: Any, classes: list[str]) -> list[Image.Image]:
        picture, size = self.picture(image, target), self.size_of(target)
        return [self.draw_on(picture, found, classes) for found in (target, self.to_full_size(output, size))]

    @abstractmethod
    def size_of(self, target: Any) -> tuple[int, int]:
        """Height and width of an image itself, from its target."""

    @abstractmethod
    def to_full_size(self, output: Any, size: tuple[int, int]) -> Any:
        """What `predict` found in a resized image, for the image itself, of this height and width."""

    @abstractmethod
    def draw_on(self, picture: Image.Image, found: Any, classes: list[str], threshold: float = 0.5) -> Image.Image:
        """The picture with a target, or with what `to_full_size` gave, drawn over it.

        Args:
            picture: the image itself.
            found: what to draw.
            classes: names of the classes.
            threshold: least score of the objects that are drawn.
        """
