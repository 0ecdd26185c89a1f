"""Options of the images, of their annotations, and of how both are augmented."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..errors import VisionattnError


@dataclass
class DataConfig:
    """Images and their preparation"""

    name: str = ""
    """digits (1,797 handwritten digits that ship with scikit-learn), folder, torch/<torchvision dataset> or
    hfds/<Hugging Face dataset>; empty: folder where data.root is given, else digits. In detection and segmentation
    scenes (composed of these digits), folder or hfds/...; empty: folder or scenes."""
    root: str | None = None
    """Folder of the images: train/ and val/ that hold a folder per class, or a folder per class at once. In detection
    and segmentation, laid out as COCO, YOLO, Pascal VOC, ADE20K or Cityscapes."""
    labels: str = ""
    """CSV file of the labels of images that have several, for loss.multi_label (classification): in data.root, or one
    in the folder of each split. Its first column has the names of the files, and its others are either one with names
    of classes, separated by ; or |, or one of 0 and 1 for each class. A column split says train or validation; without
    it data.val_fraction is held out. Of a Hugging Face dataset, its column of lists of classes; empty: the first."""
    train_split: str = "train"
    """Name of the split to train on."""
    val_split: str = "validation"
    """Name of the split to validate on; folders may also call it val, valid, eval or evaluation."""
    val_fraction: ClosedUnitInterval = 0.2
    """Share of every class held out, always the same images, where the data brings no validation split
    (classification); in detection, share of the images where a single file or folder annotates all of them."""
    download: bool = False
    """Let torchvision download a dataset that data.root lacks."""
    img_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Input size in pixels, or height and width; null: the model's own."""
    eval_img_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Input size in validation, where it differs; null: data.img_size."""
    mean: tuple[float, ...] | None = None
    """Channel means for normalisation; null: the model's own."""
    std: tuple[PositiveFloat, ...] | None = None
    """Channel standard deviations for normalisation; null: the model's own."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    """How images are resized; null: the model's own."""
    crop_pct: PositiveFloat | None = 1.0
    """Share of the resized image that the centre crop keeps in validation; null: the model's own."""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """How validation fits other aspect ratios; null: the model's own."""
    batch_size: PositiveInt = 64
    """Images per step and process."""
    eval_batch_size: PositiveInt = 256
    """Images per validation step and process."""
    max_bad_fraction: ClosedUnitInterval = 0.01
    """Share of an epoch's images that may be unreadable: the next readable image stands in for each. One more ends the
    run, and so does any unreadable image in validation."""
    num_workers: NonNegativeInt | None = None
    """Processes that load images, for each training process; 0: load in the training process itself; null: by the cores
    that there are. What a run computes does not depend on it."""


@dataclass
class AugmentConfig:
    """Augmentation in training"""

    scale: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.0)
    """Range of the random crop's area, as shares of the image."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.85, 1.18)
    """Range of the random crop's aspect ratio."""
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] = "rrc"
    """How images are cropped: rrc takes a random part of scale and ratio, rkrc the centre and rkrr a random place of
    the image resized at random by scale and ratio, with reflected borders where it has become too small."""
    hflip: ClosedUnitInterval = 0.0
    """Probability of a horizontal flip."""
    vflip: ClosedUnitInterval = 0.0
    """Probability of a vertical flip."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of brightness, contrast and saturation changes; with auto_augment, only 3a has them."""
    color_jitter_prob: ClosedUnitInterval | None = None
    """Probability of these changes; null: always."""
    grayscale_prob: ClosedUnitInterval = 0.0
    """Probability of removing the colours."""
    gaussian_blur_prob: ClosedUnitInterval = 0.0
    """Probability of a Gaussian blur."""
    auto_augment: str | None = None
    """RandAugment as rand-m9-mstd0.5-inc1, AutoAugment as original or v0, AugMix as augmix-m3, 3-Augment as 3a, in
    timm's notation; or trivial for TrivialAugment."""
    interpolation: Literal["random", "bilinear", "bicubic"] | None = None
    """How random crops are resized; null: as data.interpolation."""
    re_prob: ClosedUnitInterval = 0.0
    """Probability of erasing a random rectangle."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What an erased rectangle is filled with: zeros, one random colour, or random pixels."""
    re_count: PositiveInt = 1
    """Most rectangles erased in an image; they share the erased area."""
    repeats: PositiveInt = 1
    """Repeated augmentation: each image an epoch takes is taken so many times in a row, augmented differently. The
    length of an epoch stays, so it sees a part of the images only."""
    mixup: NonNegativeFloat = 0.4
    """Strength of mixup, its alpha; 0: off."""
    cutmix: NonNegativeFloat = 0.0
    """Strength of CutMix, its alpha; 0: off."""
    mix_prob: ClosedUnitInterval = 1.0
    """Probability that a batch is mixed, where mixup or cutmix is on."""
    mix_switch_prob: ClosedUnitInterval = 0.5
    """Probability of CutMix rather than mixup, where both are on."""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """Draw the mixture once for each batch, pair or image."""


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
