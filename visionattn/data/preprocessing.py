"""How a model's images are prepared: what its weights were evaluated with."""

from collections.abc import Callable
from typing import Any

from timm.data import create_transform as create_timm_transform
from timm.data import resolve_model_data_config
from torch import nn

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


def create_transform(model: nn.Module, is_training: bool = False, **kwargs) -> Callable:
    """The transform of PIL images that the model's weights were evaluated with, or one to train with.

    Args:
        model: from `create_model`, from a repository or file too.
        is_training: random crop, flip and so on by timm's defaults instead of resize and centre crop.
        **kwargs: arguments of timm's `create_transform`, in place of the model's own.
    """
    return create_timm_transform(**model_preprocessing(model) | {"is_training": is_training} | kwargs)
