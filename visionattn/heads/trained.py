"""Detectors and segmenters that train.py saved."""

from os import PathLike
from typing import Any

from torch import nn

from ..create import check_described
from ..errors import VisionattnError
from ..weights.description import Described, made_for, read_described
from ..weights.layouts import load_pretrained
from .detector import create_detector
from .pyramid import OverBackbone
from .segmenter import create_segmenter

CREATE = {"detection": create_detector, "segmentation": create_segmenter}


def create_trained(
    described: Described, pretrained: bool = True, checkpoint_path: str = "", checkpoint_prefix: str = "", **kwargs
) -> nn.Module:
    """The model of a checkpoint of train.py.

    Args:
        described: what its header says of it.
        pretrained: load its weights; under another head, those of the backbone.
        checkpoint_path: file to load after those, of a whole model of this kind or of its backbone.
        checkpoint_prefix: where in that file the weights are, as for `create_model`.
        **kwargs: arguments of `create_detector` or `create_segmenter`, in place of those that it was trained with. The
            classifier of other `num_classes` is new, and so is another `head`.
    """
    check_described(described)
    entries, model = described.entries, make_trained(described, **kwargs)
    if pretrained:
        described.load(model if kwargs.get("head") in (None, entries["head"]) else model.inner)
    if checkpoint_path:
        load_over(model, checkpoint_path, checkpoint_prefix)
    own = {key: entries["data"][key] for key in ("mean", "std") if entries["data"].get(key)}
    if kwargs.get("num_classes") in (None, len(entries["classes"])):
        own["label_names"] = entries["classes"]
    model.inner.pretrained_cfg = model.inner.pretrained_cfg | own
    return model


def make_trained(
    described: Described,
    head: str | None = None,
    num_classes: int | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs,
) -> nn.Module:
    """The detector or segmenter that a checkpoint describes, without its weights.

    Args:
        described: what the header says of it.
        head: in place of its own.
        num_classes: in place of its own.
        backbone_kwargs: in place of its own, those that are given.
        **kwargs: further arguments of `create_detector` or `create_segmenter`; its own hold under its own head.
    """
    entries = described.entries
    options = entries["head_kwargs"] if head in (None, entries["head"]) else {}
    return CREATE[described.task](
        described.name,
        head or entries["head"],
        len(entries["classes"]) if num_classes is None else num_classes,
        backbone_kwargs=described.kwargs | (backbone_kwargs or {}),
        **options | kwargs,
    )


def load_over(model: OverBackbone, path: str | PathLike, checkpoint_prefix: str = "") -> None:
    """Load weights to start from: of the whole model if they are of one like it, or else of its backbone.

    Args:
        model: detector or segmenter to load into.
        path: of the file.
        checkpoint_prefix: where in the file the weights are, if there are several that fit equally well.

    Raises:
        VisionattnError: if the file cannot be read or fits neither; the model is then unchanged.
    """
    entries, content = read_described(path)
    known = made_for(entries["model"], entries.get("model_kwargs", {})) if "model" in entries else {}
    try:
        load_pretrained(model, content, known, path, checkpoint_prefix)
    except VisionattnError:
        load_pretrained(model.inner, content, known, path, checkpoint_prefix)
