"""Graphs of models: what is traced, at which sizes, and what detectors need to be traced at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.models.detection import transform
from torchvision.ops import boxes as box_ops
from torchvision.ops import poolers, roi_align

from ..data.preprocessing import model_preprocessing
from ..errors import VisionattnError, one_line
from .about import output_names, task_of

NAMES = {0: "batch", 2: "height", 3: "width"}
"""Axes that are left open, of images (B, C, H, W)."""
LEAST = 64
"""Side of the images that graphs of open sizes are made with, and are compared at, at least: maps of a single position
would be taken for that, and torch.export's graphs refuse what they were not made for."""


class Traced(nn.Module):
    """A model as files have it: of images (B, C, H, W), with a tuple as its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        out = self.model(image)
        return tuple(out) if isinstance(out, (list, tuple)) else (out,)


class TracedDetector(nn.Module):
    """A detector of one image (1, C, H, W), with its boxes, labels, scores and, of Mask R-CNN, masks as its output.

    Masks are those of the boxes, (N, 1, 28, 28): pasting them into the image is left to who wants that.
    """

    by_rank = True  # of scores

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.names = model, output_names(model)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        with patch.object(transform, "paste_masks_in_image", lambda masks, boxes, size: masks):
            found = self.model([image[0]])[0]
        return tuple(found[name] for name in self.names)


def traced(model: nn.Module) -> nn.Module:
    """The module that a file's graph is made of.

    Raises:
        VisionattnError: if the model is in training mode.
    """
    if model.training:
        raise VisionattnError("expected a model in eval mode to export, got one in training mode: call eval() first")
    return (TracedDetector if task_of(model) == "detection" else Traced)(model).eval()


def sizes_of(model: nn.Module, size: tuple[int, int] | None) -> list[tuple[int, int, int, int]]:
    """Shapes of the images that a file is compared at: three sizes and two batches, or one where they are fixed.

    Args:
        model: what the file is of.
        size: fixed height and width; None: they are left open.
    """
    channels, height, width = model_preprocessing(model)["input_size"]
    if task_of(model) == "detection":
        return [(1, channels, *(size or (height, width)))]
    height, width = max(height, LEAST), max(width, LEAST)
    sizes = [size] if size else [(height, width), (height + 13, width + 40), (max(LEAST, height // 2), width + 9)]
    return [(batch, channels, *each) for each in sizes for batch in (1, 2)]


def make_program(
    model: nn.Module, size: tuple[int, int] | None = None, module: nn.Module | None = None
) -> ExportedProgram:
    """The graph of a model, with batch, height and width left open.

    Args:
        model: in eval mode.
        size: fixed height and width; None: both are left open. Detectors have a fixed size, and one image.
        module: trace this in place of the model, to the same outputs.

    Raises:
        VisionattnError: if there is no such graph; says why.
    """
    shape = sizes_of(model, size)[0]
    detects = task_of(model) == "detection"
    image = torch.randn(1 if detects else 2, *shape[1:])
    axes = {} if detects else {axis: Dim.DYNAMIC for axis in ([0] if size else NAMES)}
    with torch.no_grad(), graphs_of(model), traceable():
        return torch.export.export(module or traced(model), (image,), dynamic_shapes=(axes,), strict=False)


@contextmanager
def graphs_of(model: nn.Module) -> Iterator[None]:
    """Around what makes graphs, and raises whatever it likes.

    Raises:
        VisionattnError: in place of that, in one line; or what the model itself says of it.
    """
    try:
        yield
    except VisionattnError:
        raise
    except Exception as error:
        own: BaseException | None = error
        while own is not None and not isinstance(own, VisionattnError):
            own = own.__cause__ or own.__context__
        name = model.pretrained_cfg.get("architecture")
        raise own or VisionattnError(f"cannot make a graph of {name}: {one_line(error)}") from error


@contextmanager
def traceable() -> Iterator[None]:
    """What torchvision's detectors do by looking at how much was found, in operations that do not ask."""
    with (
        patch.object(box_ops, "batched_nms", _batched_nms),
        patch.object(poolers, "_multiscale_roi_align", _multiscale_roi_align),
    ):
        yield


def _batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Suppression among the boxes of a class: classes are moved apart."""
    far = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).amax(0) + 1
    return box_ops.nms(boxes + (classes.to(boxes) * far)[:, None], scores, threshold)


def _multiscale_roi_align(x_filtered, boxes, output_size, sampling_ratio, scales, mapper) -> Tensor:
    """Every box at every level, of which its own is taken."""
    rois, levels, out = poolers._convert_to_roi_format(boxes), mapper(boxes)[:, None, None, None], None
    for level, (features, scale) in enumerate(zip(x_filtered, scales, strict=True)):
        part = roi_align(features, rois, output_size, scale, sampling_ratio)
        out = part if out is None else torch.where(levels == level, part, out)
    return out
