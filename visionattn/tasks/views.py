"""Test-time augmentation: several views of an image, whose probabilities are averaged."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose, FiveCrop

from ..data.config import DataConfig
from ..data.preprocessing import ResizedCrop
from ..data.transforms import eval_transform
from ..errors import VisionattnError
from .config import TtaConfig
from .task import autocast, finite


class Views:
    """Transform of an image to its crops, which `Predictor` mirrors.

    Args:
        data: resolved preparation.
        tta: which crops to take.

    Shape:
        PIL image to (V, C, H, W).
    """

    def __init__(self, data: DataConfig, tta: TtaConfig) -> None:
        self.pipelines = []
        for scale in tta.scales:
            crop_pct = data.crop_pct / scale
            if tta.crops == "five" and (data.crop_mode == "border" or crop_pct > 1):
                raise VisionattnError(
                    "tta.crops five needs images larger than the crop: data.crop_mode center or squash and "
                    f"data.crop_pct at most the least of tta.scales, got {data.crop_mode} and {data.crop_pct} / {scale}"
                )
            first, *finish = eval_transform(replace(data, crop_pct=crop_pct)).transforms
            if tta.crops == "five":
                first = ResizedCrop(first.resize, FiveCrop(first.crop.size))
            self.pipelines.append((first, Compose(finish)))

    def __call__(self, image: Image.Image) -> Tensor:
        views = []
        for first, finish in self.pipelines:
            crops = first(image)
            views += [finish(view) for view in (crops if isinstance(crops, tuple) else (crops,))]
        return torch.stack(views)


class Predictor(nn.Module):
    """Logits of a model for the classes of a data set; of several views, those of their mean probabilities.

    Args:
        model: the model.
        outputs: those of its outputs to take, in this order.
        precision: "bf16" or "fp16" for mixed precision.
        flip: add the mirror image of each view.
        memory_format: layout of the images.
        several: images have any number of labels, so that each class has a probability of its own.

    Shape:
        (B, V, C, H, W) to (B, len(outputs)).
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Sequence[int],
        precision: str = "no",
        flip: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        several: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.precision, self.flip, self.memory_format = model, precision, flip, memory_format
        self.several = several
        self.register_buffer("outputs", torch.tensor(outputs), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        views = images.unbind(1)
        if self.flip:
            views += tuple(view.flip(-1) for view in views)
        views = [view.contiguous(memory_format=self.memory_format) for view in views]
        with autocast(images.device, self.precision):
            logits = [self.model(view) for view in views]
        logits = [finite(part.float()[:, self.outputs]) for part in logits]
        if len(logits) == 1:
            return logits[0]
        if self.several:
            yes, no = (F.logsigmoid(sign * torch.stack(logits)).logsumexp(0) for sign in (1, -1))
            return yes - no
        return torch.stack(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))
