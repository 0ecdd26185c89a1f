"""Options of the tasks."""

from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat

from ..data.config import AnnotationConfig, DataConfig, JointConfig
from ..errors import VisionattnError
from .table import TASKS


@dataclass
class TaskConfig:
    """Model and data"""

    task: str = "classification"
    """What the model learns."""
    model: str = "test_dinat"
    """Model; `visionattn list` names them. In detection and segmentation, the backbone. Or a checkpoint of ours,
    hf-hub:user/repository or local-dir:folder, which bring arguments and weights."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of create_model, such as model_kwargs.drop_path_rate 0.1."""
    head: str = ""
    """What is built on the backbone: fcos, retinanet, faster_rcnn or mask_rcnn in detection; fpn, upernet, segformer or
    unet in segmentation; empty: the first."""
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of create_detector or create_segmenter, such as head_kwargs.fpn_channels 128."""
    pretrained: bool = False
    """Start from the published weights of the model, or backbone."""
    checkpoint: str = ""
    """Start from the weights in this file, of the whole model or of its backbone."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision. Of validate.py: a checkpoint of train.py brings its own."""
    compile: bool = False
    """Compile the model with torch.compile. Images of many sizes may be compiled for each: after 8 times torch goes on
    uncompiled (torch._dynamo.config.recompile_limit)."""
    channels_last: bool = False
    """Keep images and weights in the channels_last layout."""
    data: DataConfig = field(default_factory=DataConfig)
    annotations: AnnotationConfig = field(default_factory=AnnotationConfig)
    joint: JointConfig = field(default_factory=JointConfig)

    def __post_init__(self) -> None:
        self.head = self.head or TASKS[self.task].head


@dataclass
class LossConfig:
    """Loss of classification and segmentation"""

    smoothing: ClosedUnitInterval = 0.1
    """Label smoothing (classification)."""
    bce: bool = False
    """Binary cross-entropy for each class in place of softmax cross-entropy (classification)."""
    bce_threshold: ClosedUnitInterval | None = None
    """With bce, make targets above it 1 and others 0; null: keep soft targets."""
    bce_sum: bool = False
    """With bce, sum over the classes before averaging over the images, rather than average over both."""
    class_weights: Literal["balanced"] | tuple[PositiveFloat, ...] | None = None
    """Weight of each class in the loss; balanced: one over its share of the training images (classification)."""
    multi_label: bool = False
    """Any number of labels for each image, from data.labels or lists of classes of a Hugging Face dataset; implies bce,
    and validation tells and ranks by mean average precision (mAP)."""
    dice: NonNegativeFloat = 0.0
    """Weight of a Dice loss beside the cross-entropy of the pixels (segmentation)."""
    auxiliary: NonNegativeFloat = 0.4
    """Weight of the auxiliary head's loss, if head_kwargs.auxiliary makes one (segmentation)."""


@dataclass
class TtaConfig:
    """Test-time augmentation: several views of each image, whose probabilities are averaged"""

    crops: Literal["center", "five"] = "center"
    """Crop the centre, or the four corners and the centre; five with tta.flip are the customary ten crops."""
    flip: bool = False
    """Take every view mirrored too."""
    scales: tuple[PositiveFloat, ...] = (1.0,)
    """Crop from the image resized by each of these factors more than usual, such as [1.0, 1.15, 1.3]; in segmentation,
    sizes of the whole image, such as [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]."""

    def __post_init__(self) -> None:
        if not self.scales:
            raise VisionattnError("tta.scales is empty: give at least one factor, such as [1.0]")

    @property
    def view_count(self) -> int:
        """Views of each image."""
        return len(self.scales) * (5 if self.crops == "five" else 1) * (2 if self.flip else 1)
