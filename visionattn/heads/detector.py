"""Detectors: torchvision's heads over any backbone."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from ..arguments import check_arguments, hints, made_with
from ..errors import VisionattnError
from ..layers.norm import allow_single_values
from ..layers.precision import has_autocast
from .pyramid import STRIDES, FeatureMaps, OverBackbone, by_size


class PyramidBackbone(nn.Module):
    """A backbone and a feature pyramid network, as torchvision's detectors take them.

    Args:
        maps: the backbone.
        out_channels: channels of the pyramid.
        extra: makes the pyramid's levels above the backbone's.

    Shape:
        (B, C, H, W) to a dictionary of (B, out_channels, H_i, W_i), the finest first.
    """

    def __init__(self, maps: FeatureMaps, out_channels: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.maps = maps
        self.fpn = FeaturePyramidNetwork(maps.channels, out_channels, extra)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.maps(x))))


class PadOnly(GeneralizedRCNNTransform):
    """Normalises and pads images, and leaves them at their size."""

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return image, target


class Anchors(AnchorGenerator):
    """Anchors in float32 under autocast: half precision cannot tell neighbouring pixels apart. They do not depend on
    precision and mode of earlier passes."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        dtype = torch.float32 if has_autocast(device) else dtype
        if all(anchors.dtype == dtype and anchors.device == device for anchors in self.cell_anchors):
            return
        with torch.inference_mode(False):  # or training could not use them
            made = map(self.generate_anchors, self.sizes, self.aspect_ratios)
            self.cell_anchors = [anchors.to(device, dtype) for anchors in made]


def _in_float(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook: what a head predicts, in float32 under autocast, as boxes take the precision of their offsets."""
    if isinstance(output, Tensor):
        return output.float() if has_autocast(output.device) else output
    if isinstance(output, dict):
        return {name: _in_float(module, args, value) for name, value in output.items()}
    return [_in_float(module, args, value) for value in output]


class Detector(OverBackbone):
    """What our detectors have beyond torchvision's.

    In evaluation only images of one size share a batch, so that each is padded to the stride alone and what is found in
    it does not depend on the others.

    Attributes:
        offset: label of the first class in torchvision's head; ours is 1.
        classifier: names of the parts whose shapes follow from the classes.
    """

    backbone_name = "backbone.maps.backbone"
    classifier: ClassVar[tuple[str, ...]] = ("roi_heads.box_predictor",)
    offset: ClassVar[int] = 1

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name in training; in evaluation what was found in each image, the surest first.

        Args:
            images: (C, H, W) each, of any sizes.
            targets: for training, for each image "boxes" (N, 4) as x1, y1, x2, y2 in pixels, "labels" (N,) from 1 to
                the number of classes and, for masks, "masks" (N, H, W).
        """
        if self.training:
            targets = targets and [{**t, "labels": t["labels"] - 1 + self.offset} for t in targets]
            return super().forward(list(images), targets)
        results: list[dict[str, Tensor]] = [{} for _ in images]
        for indices in by_size(images):
            for i, found in zip(indices, super().forward([images[i] for i in indices]), strict=True):
                results[i] = {**found, "labels": found["labels"] + 1 - self.offset}
        return results

    def compile(self, *args, **kwargs) -> None:
        """Compile backbone and pyramid. The shapes in the heads depend on what they find."""
        self.backbone.compile(*args, **kwargs)


class FasterRCNN(Detector, detection.FasterRCNN):
    """torchvision's Faster R-CNN; see `Detector`."""


class MaskRCNN(Detector, detection.MaskRCNN):
    """torchvision's Mask R-CNN; see `Detector`."""

    classifier = ("roi_heads.box_predictor", "roi_heads.mask_predictor")


class RetinaNet(Detector, detection.RetinaNet):
    """torchvision's RetinaNet; see `Detector`."""

    classifier = ("head.classification_head.cls_logits",)
    offset = 0


class FCOS(Detector, detection.FCOS):
    """torchvision's FCOS; see `Detector`."""

    classifier = ("head.classification_head.cls_logits",)
    offset = 0


def _set_scales(pool: MultiScaleRoIAlign) -> None:
    """Tell RoIAlign the strides of the maps. torchvision guesses them from the size of the first image that it sees,
    and guesses wrong where that is much smaller than with its padding."""
    strides = dict(zip(("0", "1", "2", "3", "pool"), (*STRIDES, 2 * STRIDES[-1]), strict=True))
    chosen = [strides[name] for name in pool.featmap_names]
    levels = int(math.log2(chosen[0])), int(math.log2(chosen[-1]))
    pool.scales = [1 / stride for stride in chosen]
    pool.map_levels = initLevelMapper(*levels, pool.canonical_scale, pool.canonical_level)


@dataclass(frozen=True)
class _Head:
    """How a head is set up: the backbone's strides, and anchors of every level."""

    model: type[Detector]
    strides: tuple[int, ...]
    anchor_argument: str
    anchor_sizes: tuple[int, ...]
    octaves: tuple[float, ...] = (1,)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)


THIRDS = (1, 2 ** (1 / 3), 2 ** (2 / 3))
DETECTORS = {
    "faster_rcnn": _Head(FasterRCNN, STRIDES, "rpn_anchor_generator", (32, 64, 128, 256, 512)),
    "mask_rcnn": _Head(MaskRCNN, STRIDES, "rpn_anchor_generator", (32, 64, 128, 256, 512)),
    "retinanet": _Head(RetinaNet, STRIDES[1:], "anchor_generator", (32, 64, 128, 256, 512), THIRDS),
    "fcos": _Head(FCOS, STRIDES[1:], "anchor_generator", (8, 16, 32, 64, 128), aspect_ratios=(1.0,)),
}


def make_detector(
    make_maps: Callable[[Sequence[int]], FeatureMaps],
    head: str,
    num_classes: int,
    fpn_channels: int = 256,
    anchor_sizes: Sequence[int] | None = None,
    **kwargs,
) -> Detector:
    """What `create_detector` gives.

    Args:
        make_maps: makes the backbone's maps of the head's strides, once the other arguments are known to be good.
        head: one of `DETECTORS`; this and the others are as there.
    """
    if head not in DETECTORS:
        raise VisionattnError(f"expected head one of {', '.join(DETECTORS)}, got {head!r}")
    spec = DETECTORS[head]
    accepted = {*inspect.signature(spec.model).parameters, "size_divisible", "fixed_size"}
    accepted -= {"backbone", "num_classes", "kwargs", "box_predictor", "mask_head", "mask_predictor"}
    own = {"num_classes": num_classes, "fpn_channels": fpn_channels, "anchor_sizes": anchor_sizes}
    check_arguments(head, kwargs | own, accepted | own.keys(), hints(spec.model) | hints(make_detector))
    sizes = tuple(anchor_sizes or spec.anchor_sizes)
    if len(sizes) != len(spec.anchor_sizes):
        raise VisionattnError(f"expected anchor_sizes of {len(spec.anchor_sizes)} levels, got {len(sizes)}")
    if fpn_channels < 1:
        raise VisionattnError(f"expected fpn_channels from 1 up, got {fpn_channels}")
    if head == "fcos" and (fpn_channels % 32 or fpn_channels == 32):  # its norms have 32 groups
        raise VisionattnError(f"expected fpn_channels of 64, 96, 128, ... for fcos, got {fpn_channels}")
    anchors = Anchors(
        tuple(tuple(int(size * octave) for octave in spec.octaves) for size in sizes),
        (spec.aspect_ratios,) * len(sizes),
    )
    maps = make_maps(spec.strides)
    options = {spec.anchor_argument: anchors, "image_mean": [0.0], "image_std": [1.0]} | kwargs
    classes = num_classes + spec.model.offset
    with made_with(head, own | kwargs):
        if head == "retinanet":
            extra: ExtraFPNBlock = LastLevelP6P7(maps.channels[-1], fpn_channels)  # from the backbone, as published
        elif head == "fcos":
            extra = LastLevelP6P7(fpn_channels, fpn_channels)
        else:
            extra = LastLevelMaxPool()
        model = spec.model(PyramidBackbone(maps, fpn_channels, extra), classes, **options)
        if head == "mask_rcnn":  # torchvision's has 256 channels whatever the pyramid's
            model.roi_heads.mask_head = MaskRCNNHeads(fpn_channels, (fpn_channels,) * 4, dilation=1)
            model.roi_heads.mask_predictor = MaskRCNNPredictor(fpn_channels, fpn_channels, classes)
    for name, module in model.named_modules():
        if isinstance(module, MultiScaleRoIAlign):
            _set_scales(module)
        if name in ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor"):
            module.register_forward_hook(_in_float)
    allow_single_values(model)
    if not {"min_size", "max_size", "fixed_size"} & kwargs.keys():
        transform = model.transform
        model.transform = PadOnly(0, 0, transform.image_mean, transform.image_std, transform.size_divisible)
    return model
