"""Options of annotated images, and of what becomes of images together with their annotations."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt

from ..errors import VisionattnError

BoxFormat = Literal["xywh", "xyxy", "cxcywh", "relative_xywh", "relative_xyxy", "relative_cxcywh"]


@dataclass
class AnnotationConfig:
    """Annotations of detection and segmentation, and the scenes that are made for both"""

    classes: str = ""
    """Text file that names a class in each line, where neither the data nor its layout does. For segmentation the first
    line names value 0 of the masks; values of empty lines are ignored."""
    box_format: BoxFormat | None = None
    """Boxes: corner and size, two corners, or centre and size, in pixels, or relative to the image, from 0 to 1; null:
    as such annotations have them (COCO and Hugging Face datasets xywh, YOLO relative_cxcywh, VOC corners counted from
    1), but an error names the format that fits where many boxes would leave their images."""
    scene_size: PositiveInt = 96
    """Height and width of the scenes, in pixels."""
    scene_objects: PositiveInt = 4
    """Most objects in a scene; it has at least one."""
    scene_count: PositiveInt = 2000
    """Scenes to train on; a tenth as many are validated on."""
    fashion: str = ""
    """Folder of Fashion-MNIST's files, such as /usr/share/datasets/fashion-mnist, to put its items into the scenes too;
    empty: digits alone."""


@dataclass
class JointConfig:
    """Augmentation of images together with their boxes and masks (detection and segmentation), and their size"""

    min_size: tuple[PositiveInt, ...] | None = None
    """Length of the shorter side, drawn from these for every image in training, such as [480, 512, 544]; null: images
    keep their size."""
    max_size: PositiveInt = 1333
    """Most that min_size may make of the longer side; images keep their aspect ratio."""
    eval_size: PositiveInt | None = None
    """Length of the shorter side in validation; null: the largest of min_size."""
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Range of a factor on that size, drawn for every image in training: 0.1 to 2.0 for large-scale jitter."""
    crop: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Crop a random part of this height and width, with borders filled up where the image is smaller; null: do not."""
    max_class_share: ClosedUnitInterval = 1.0
    """Segmentation: draw crops again, up to ten times, while one class fills more than this share."""
    detr_crop: ClosedUnitInterval = 0.0
    """Detection: probability of first cropping 384 to 600 pixels of the image at a shorter side of 400, 500 or 600."""
    hflip: ClosedUnitInterval = 0.0
    """Probability of a horizontal flip."""
    photometric: ClosedUnitInterval = 0.0
    """Probability of a change of brightness, of contrast, of saturation and of hue, each drawn for itself."""

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise VisionattnError(f"joint.scale: expected a range from low to high, got {list(self.scale)}")
