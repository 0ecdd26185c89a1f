"""Segmenters: segmentation_models_pytorch's decoders over any backbone."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from ..arguments import check_arguments, hints, made_with
from ..errors import VisionattnError, optional
from ..layers.norm import allow_single_values
from .pyramid import STRIDES, FeatureMaps, OverBackbone

with optional():
    from segmentation_models_pytorch.base import SegmentationHead
    from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder


@dataclass(frozen=True)
class _Head:
    """How a head is set up: its decoder, the channels and stride of what it returns, and options we have other defaults
    for."""

    decoder: type[nn.Module]
    channels: Callable[[dict[str, Any]], int]
    stride: int = 4
    options: dict[str, Any] = field(default_factory=dict)


SEGMENTERS = {
    "upernet": _Head(UPerNetDecoder, lambda o: o["decoder_channels"], options={"decoder_channels": 512}),  # the papers'
    "fpn": _Head(FPNDecoder, lambda o: o["segmentation_channels"] * (4 if o["merge_policy"] == "cat" else 1)),
    "segformer": _Head(SegformerDecoder, lambda o: o["segmentation_channels"]),
    "unet": _Head(UnetDecoder, lambda o: o["decoder_channels"][-1], 1, {"decoder_channels": (256, 128, 64, 32, 16)}),
}


class Segmenter(OverBackbone, nn.Module):
    """Logits for every pixel.

    Images are padded with zeros at the bottom and right to multiples of 32, and the logits cropped.

    Args:
        encoder: the backbone.
        decoder: from a list that starts with the image and an empty map of half its resolution, as in
            segmentation_models_pytorch.
        channels: channels of the decoder's output.
        stride: stride of the decoder's output.
        num_classes: number of classes.
        auxiliary: add a second head on the map of stride 16, for training.

    Shape:
        (B, C, H, W) to (B, num_classes, H, W); to a pair of these in training with `auxiliary`.
    """

    backbone_name = "encoder.backbone"
    classifier = ("segmentation_head", "auxiliary_head")

    def __init__(
        self, encoder: FeatureMaps, decoder: nn.Module, channels: int, stride: int, num_classes: int, auxiliary: bool
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder, self.decoder, self.auxiliary_head = encoder, decoder, None
        kernel_size = 3 if stride == 1 else 1
        self.segmentation_head = SegmentationHead(channels, num_classes, kernel_size, upsampling=stride)
        initialize_decoder(decoder)
        initialize_head(self.segmentation_head)
        if auxiliary:
            self.auxiliary_head = nn.Sequential(
                Conv2dNormActivation(encoder.channels[2], 256), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1)
            )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % 32, 0, -H % 32))
        maps = self.encoder(x)
        half = x.new_empty(x.shape[0], 0, x.shape[2] // 2, x.shape[3] // 2)  # what no backbone of ours has
        logits = self.segmentation_head(self.decoder([x, half, *maps]))[..., :H, :W]
        if not self.training or self.auxiliary_head is None:
            return logits
        auxiliary = F.interpolate(self.auxiliary_head(maps[2]), x.shape[-2:], mode="bilinear")
        return logits, auxiliary[..., :H, :W]


def make_segmenter(
    make_maps: Callable[[Sequence[int]], FeatureMaps], head: str, num_classes: int, auxiliary: bool = False, **kwargs
) -> Segmenter:
    """What `create_segmenter` gives.

    Args:
        make_maps: makes the backbone's maps of some strides, once the other arguments are known to be good.
        head: one of `SEGMENTERS`; this and the others are as there.
    """
    if head not in SEGMENTERS:
        raise VisionattnError(f"expected head one of {', '.join(SEGMENTERS)}, got {head!r}")
    spec = SEGMENTERS[head]
    parameters = inspect.signature(spec.decoder).parameters
    accepted = parameters.keys() - {"encoder_channels", "encoder_depth", "n_blocks"}
    own = {"num_classes": num_classes, "auxiliary": auxiliary}
    check_arguments(head, kwargs | own, accepted | own.keys(), hints(spec.decoder) | hints(make_segmenter))
    encoder = make_maps(STRIDES)
    options = {name: parameters[name].default for name in accepted} | spec.options | kwargs
    with made_with(head, kwargs):
        decoder = spec.decoder([encoder.backbone.in_chans, 0, *encoder.channels], **options)
    if head == "upernet":
        decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in STRIDES)  # the backbone has those of its paper
    model = Segmenter(encoder, decoder, spec.channels(options), spec.stride, num_classes, auxiliary)
    allow_single_values(model)  # as the maps that UPerNet pools
    return model
