"""Detectors and segmenters that train.py saved."""

from typing import Any

from torch import nn

from ..weights import load_checkpoint
from .detection import create_detector
from .segmentation import create_segmenter

CREATE = {"detection": create_detector, "segmentation": create_segmenter}


def create_trained(path: str, description: dict[str, Any], pretrained: bool = True, **kwargs) -> nn.Module:
    """The model of a checkpoint of train.py.

    Args:
        path: of the checkpoint.
        description: what its header says of it.
        pretrained: load its weights.
        **kwargs: options of the head, in place of those that it was trained with.
    """
    model = CREATE[description["task"]](
        description["model"],
        description["head"],
        len(description["classes"]),
        pretrained_backbone=False,
        backbone_kwargs=description["model_kwargs"],
        **description["head_kwargs"] | kwargs,
    )
    if pretrained:
        load_checkpoint(model, path)
    own = {key: description["data"][key] for key in ("mean", "std")} | {"label_names": description["classes"]}
    model.inner.pretrained_cfg = model.inner.pretrained_cfg | own
    return model
