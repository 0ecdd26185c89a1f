"""How images become tensors: timm's transforms, by the model's own preparation unless the options say otherwise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.data import create_transform, resolve_model_data_config
from torch import nn

from .config import AugmentConfig, DataConfig, user_input


def resolve_preprocessing(config: DataConfig, model: nn.Module) -> DataConfig:
    """The options with the model's own size, mean, std, interpolation and crop where they leave them open."""
    own = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", 3)
    mean, std = (own[key] if len(own[key]) == channels else (sum(own[key]) / 3,) * channels for key in ("mean", "std"))
    own |= {"mean": mean, "std": std, "img_size": own["input_size"][1:]}
    open_fields = ("img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return replace(config, **{key: own[key] for key in open_fields if getattr(config, key) is None})


def preprocessing(config: DataConfig) -> dict[str, Any]:
    """Resolved options under the names of timm's data configuration."""
    height, width = (config.img_size,) * 2 if isinstance(config.img_size, int) else config.img_size
    return {
        "input_size": (len(config.mean), height, width),
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
    }


def eval_transform(config: DataConfig) -> Callable:
    """Resize, centre crop, normalise."""
    return create_transform(**preprocessing(config))


def train_transform(config: DataConfig, augment: AugmentConfig) -> Callable:
    """Random crop, the augmentation asked for, normalise."""
    prepare = preprocessing(config)
    with user_input(f"augment.auto_augment {augment.auto_augment}", AssertionError, KeyError, ValueError):
        return create_transform(
            prepare["input_size"],
            is_training=True,
            mean=prepare["mean"],
            std=prepare["std"],
            interpolation=augment.interpolation or prepare["interpolation"],
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment,
            re_prob=augment.re_prob,
            re_mode=augment.re_mode,
        )
