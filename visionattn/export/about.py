"""What an exported file says of itself."""

import json
from typing import Any

from torch import nn

from ..data.preprocessing import class_names, model_preprocessing
from ..heads.pyramid import OverBackbone

DENSE = ("mean", "std", "input_size")
"""What holds of the preparation of images for dense prediction, which are not cropped."""


def about_model(model: nn.Module) -> dict[str, Any]:
    """What a file says of its model: plain values, to be written as JSON.

    Args:
        model: from `create_model`, `create_detector` or `create_segmenter`.

    Returns:
        "model", "task", "license", "origin", "classes" (names or None), "preprocessing" (timm's names: input_size,
        interpolation, mean, std, crop_pct, crop_mode; for dense prediction those that images keep) and "outputs".
    """
    cfg, task = model.pretrained_cfg, task_of(model)
    preparation = model_preprocessing(model)
    if isinstance(model, OverBackbone):
        preparation = {key: preparation[key] for key in DENSE}
    return {
        "model": cfg.get("architecture"),
        "task": task,
        "license": cfg.get("license"),
        "origin": cfg.get("origin_url"),
        "classes": _classes(model, task),
        "preprocessing": preparation,
        "outputs": output_names(model),
    }


def task_of(model: nn.Module) -> str:
    """ "classification", "features", "segmentation" or "detection"."""
    if isinstance(model, OverBackbone):
        return "detection" if hasattr(model, "transform") else "segmentation"
    return "classification" if hasattr(model, "forward_head") else "features"


def output_names(model: nn.Module) -> list[str]:
    """Names of what the file's model returns."""
    task = task_of(model)
    if task == "detection":
        masks = getattr(getattr(model, "roi_heads", None), "mask_head", None) is not None
        return ["boxes", "labels", "scores", *(["masks"] if masks else [])]
    if task == "features":
        return [f"map{i}" for i, _ in enumerate(model.feature_info.channels())]
    return ["logits"]


def as_text(about: dict[str, Any]) -> dict[str, str]:
    """Texts by name, as the metadata of files hold them: JSON where a value is not a text."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


def _classes(model: nn.Module, task: str) -> list[str] | None:
    if task == "classification":
        return class_names(model)
    names = model.pretrained_cfg.get("label_names") if task != "features" else None
    return None if names is None else list(names)
