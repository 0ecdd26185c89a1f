"""How images become tensors: timm's transforms, by the model's own preparation unless the options say otherwise."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torchvision.transforms import Compose, InterpolationMode, TrivialAugmentWide

from ..errors import VisionattnError, user_input
from .config import AugmentConfig, DataConfig
from .preprocessing import EXTREME, bounded, is_extreme, model_preprocessing


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's operation; its policies ask for 0 bits too, a black image, which Pillow 13 refuses."""
    return auto_augment.posterize(image, bits, **kwargs) if bits else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize)


def resolve_preprocessing(config: DataConfig, model: nn.Module) -> DataConfig:
    """The options with the model's own size, mean, std, interpolation and crop where they leave them open."""
    own = model_preprocessing(model)
    own["img_size"] = own["input_size"][1:]
    open_fields = ("img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return replace(config, **{key: own[key] for key in open_fields if getattr(config, key) is None})


class OnImage:
    """Transform of an image that leaves its target alone.

    Args:
        transform: of the image.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.image = transform

    def __call__(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        return self.image(image), target


def preprocessing(config: DataConfig) -> dict[str, Any]:
    """Resolved options of validation under the names of timm's data configuration."""
    return {
        "input_size": input_size(config),
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
    }


def eval_transform(config: DataConfig) -> Callable:
    """Resize, centre crop, normalise."""
    return bounded(create_transform(**preprocessing(config)))


def train_transform(config: DataConfig, augment: AugmentConfig) -> Callable:
    """Random crop, the augmentation asked for, normalise."""
    interpolation = augment.interpolation or config.interpolation
    if augment.auto_augment and interpolation not in ("random", "nearest", "bilinear", "bicubic"):
        raise VisionattnError(f"{interpolation} interpolation cannot rotate images: add augment.interpolation bicubic")
    trivial = augment.auto_augment == "trivial"
    with user_input(f"augment.auto_augment {augment.auto_augment}", AssertionError, KeyError, ValueError):
        crop, change, finish = create_transform(
            _size_of(config, config.img_size),
            is_training=True,
            mean=config.mean,
            std=config.std,
            interpolation=interpolation,
            train_crop_mode=augment.train_crop_mode,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=None if trivial else augment.color_jitter or None,
            color_jitter_prob=augment.color_jitter_prob,
            grayscale_prob=augment.grayscale_prob,
            gaussian_blur_prob=augment.gaussian_blur_prob,
            auto_augment=None if trivial else augment.auto_augment,
            re_prob=augment.re_prob,
            re_mode=augment.re_mode,
            re_count=augment.re_count,
            separate=True,
        )
    if trivial:
        resample = InterpolationMode.BILINEAR if interpolation == "random" else str_to_interp_mode(interpolation)
        fill = [min(255, round(255 * mean)) for mean in config.mean]  # as timm's policies
        change = Compose([TrivialAugmentWide(interpolation=resample, fill=fill), change])
    if augment.train_crop_mode != "rrc":  # which resize before they crop
        crop = Compose([Narrowed(at_random=augment.train_crop_mode == "rkrr"), crop])
    return Compose([crop, change, finish])


class Narrowed:
    """Takes a part of images of extreme shape alone, as long as is worth to be resized.

    Args:
        at_random: take it anywhere, not from the middle.
    """

    def __init__(self, at_random: bool) -> None:
        self.at_random = at_random

    def __call__(self, image: Image.Image) -> Image.Image:
        if not is_extreme(image):
            return image
        width, height = (min(side, EXTREME * min(image.size)) for side in image.size)
        place = random.random() if self.at_random else 0.5
        left, top = (round(place * rest) for rest in (image.width - width, image.height - height))
        return image.crop((left, top, left + width, top + height))


def input_size(config: DataConfig) -> tuple[int, int, int]:
    """Channels, height and width of validation's images."""
    return _size_of(config, config.eval_img_size or config.img_size)


def _size_of(config: DataConfig, size: int | tuple[int, int]) -> tuple[int, int, int]:
    return (len(config.mean), *((size, size) if isinstance(size, int) else size))
