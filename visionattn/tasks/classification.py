"""Image classification: targets, loss and metrics."""

from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.config import AugmentConfig
from ..data.loader import Stream, seeded
from .config import LossConfig


class Classification:
    """Loss on mixed or plain targets.

    Args:
        loss: Options of the loss.
        augment: Options of the augmentation, for mixup and cutmix.
        num_classes: Number of classes.
        seed: Seed of the mixtures.
        training_loss: What the model makes of the loss, from (loss, images, logits); see `Backbone.training_loss`.
    """

    metric = "top1"

    def __init__(
        self,
        loss: LossConfig,
        augment: AugmentConfig,
        num_classes: int,
        seed: int,
        training_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        self.seed, self.training_loss = seed, training_loss
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                mode=augment.mix_mode,
                label_smoothing=loss.smoothing,
                num_classes=num_classes,
            )
        if loss.bce:
            self.criterion: nn.Module = BinaryCrossEntropy(loss.smoothing)
        elif self.mixup:
            self.criterion = SoftTargetCrossEntropy()
        elif loss.smoothing:
            self.criterion = LabelSmoothingCrossEntropy(loss.smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss()

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, update: int) -> Tensor:
        """Loss of a batch; mixtures are drawn by (seed, update), the same in every process and part of an update."""
        if self.mixup:
            with seeded(self.seed, Stream.MIX, update):
                images, targets = self.mixup(images, targets)
        logits = model(images).float()
        return self.training_loss(self.criterion(logits, targets), images, logits)


class ClassificationMetrics:
    """Sums for top-1, top-5 and loss over any number of batches and processes."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # correct, correct in five, loss, images

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        self.sums += torch.tensor([ranked[:, 0].sum(), ranked.sum(), loss, len(targets)], dtype=torch.float64)

    @staticmethod
    def compute(sums: Tensor) -> dict[str, float]:
        """Metrics from the sums, added over the processes."""
        top1, top5, loss, images = sums.tolist()
        return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}
