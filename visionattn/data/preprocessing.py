"""How a model's images are prepared: what its weights were evaluated with."""

import math
from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.data import create_transform as create_timm_transform
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import nn
from torchvision.transforms import CenterCrop, Compose, FiveCrop, Resize

EXTREME = 32
"""An image is not resized whole if that makes as many times the pixels that are used of it, or its sides are in such a
proportion."""
KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def model_preprocessing(model: nn.Module) -> dict[str, Any]:
    """The preparation that the model's weights were evaluated with, under the names of timm's data configuration.

    Args:
        model: from `create_model`; statistics of three channels are averaged for one with another number.
    """
    own = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", 3)
    own["input_size"] = (channels, *own["input_size"][1:])
    for key in ("mean", "std"):
        if len(own[key]) != channels:
            own[key] = (sum(own[key]) / len(own[key]),) * channels
    return {key: own[key] for key in KEYS}


def create_transform(model: nn.Module, is_training: bool = False, **kwargs: Any) -> Callable[..., Any]:
    """The transform of PIL images that the model's weights were evaluated with, or one to train with.

    Args:
        model: from `create_model`, from a repository or file too.
        is_training: random crop, flip and so on by timm's defaults instead of resize and centre crop.
        **kwargs: arguments of timm's `create_transform`, in place of the model's own.
    """
    transform = create_timm_transform(**model_preprocessing(model) | {"is_training": is_training} | kwargs)
    return transform if is_training else bounded(transform)


def bounded(transform: Compose) -> Compose:
    """timm's transform for validation, with a `ResizedCrop` in place of the two steps that do the same."""
    steps = getattr(transform, "transforms", [])
    if len(steps) < 2 or not isinstance(steps[0], (Resize, ResizeKeepRatio)) or not isinstance(steps[1], CROPS):
        return transform
    return Compose([ResizedCrop(*steps[:2]), *steps[2:]])


CROPS = (CenterCrop, CenterCropOrPad, FiveCrop)


def is_extreme(image: Image.Image) -> bool:
    """Whether one side of an image is so much longer than the other that it is not to be resized whole."""
    return max(image.size) >= EXTREME * min(image.size)


class ResizedCrop:
    """Resizes an image and crops it; of images of extreme shape only what is cropped is resized.

    Args:
        resize: torchvision's or timm's step.
        crop: crops the centre, or five parts.
    """

    def __init__(self, resize: Resize | ResizeKeepRatio, crop: CenterCrop | CenterCropOrPad | FiveCrop) -> None:
        self.resize, self.crop = resize, crop

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.resize}, {self.crop})"

    def __call__(self, image: Image.Image) -> Image.Image | tuple[Image.Image, ...]:
        size = self._resized(image)
        if 0 < math.prod(size) <= EXTREME * math.prod(self.crop.size):
            return self.crop(self.resize(image))
        size = tuple(max(1, side) for side in size)
        # Where a crop begins, at either end or in the middle, and how long it is: first down, then across.
        begin, end = (0, 0), tuple(max(full - part, 0) for full, part in zip(size, self.crop.size, strict=True))
        middle = tuple(round(rest / 2) for rest in end)
        if not isinstance(self.crop, FiveCrop):
            return self.crop(self._part(image, size, middle))
        corners = (begin, (0, end[1]), (end[0], 0), end)
        return tuple(self._part(image, size, corner) for corner in (*corners, middle))

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of the image once it is resized; timm's step may come to 0."""
        if isinstance(self.resize, ResizeKeepRatio):
            return tuple(self.resize.get_params(image, self.resize.size, self.resize.longest))
        if not isinstance(self.resize.size, int):
            return tuple(self.resize.size)
        short, long = self.resize.size, int(self.resize.size * max(image.size) / min(image.size))
        return (short, long) if image.width > image.height else (long, short)

    def _part(self, image: Image.Image, size: tuple[int, int], start: tuple[int, int]) -> Image.Image:
        """What begins at `start` of the resized image, of the crop's size or as much as there is."""
        (height, width), (top, left) = size, start
        down, across = (min(part, full) for part, full in zip(self.crop.size, size, strict=True))
        x, y = image.width / width, image.height / height
        box = left * x, top * y, min((left + across) * x, image.width), min((top + down) * y, image.height)
        resample = Image.Resampling[self.resize.interpolation.name]
        return image.resize((across, down), resample, box)


def class_names(model: nn.Module) -> list[str] | None:
    """Names of a classifier's classes: those that its configuration tells, or ImageNet's if it has as many.

    Args:
        model: from `create_model`.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    if (names := cfg.get("label_names")) and len(names) == model.num_classes:
        return [(cfg.get("label_descriptions") or {}).get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_descriptions() if subset else None
