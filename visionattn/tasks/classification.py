"""Image classification: targets, loss and metrics."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.class_maps import match_classes
from ..data.config import AugmentConfig
from ..data.images import ImageSet, dataset_name, load_datasets, load_validation
from ..data.labels import labels_of, load_labelled, load_labelled_validation
from ..data.loader import Stream, seeded
from ..data.transforms import OnImage
from ..errors import VisionattnError
from .config import LossConfig, TaskConfig
from .task import Metrics, Task, Validation
from .views import Predictor, Views


class Classification(Task):
    """One class for each image, or several."""

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.multi_label = getattr(config, "loss", LossConfig()).multi_label
        augment = getattr(config, "augment", None)  # which validate.py has not
        if augment and (augment.mixup or augment.cutmix) and config.data.batch_size % 2:
            raise VisionattnError(f"mixup and cutmix pair images: data.batch_size {config.data.batch_size} is odd")
        self.metric = "mAP" if self.multi_label else "top1"
        self.shown = ("mAP", "loss") if self.multi_label else ("top1", "top5", "loss")

    def load(self) -> tuple[ImageSet, ImageSet]:
        data = replace(self.config.data, labels=labels_of(self.config.data, self.multi_label))
        if data.labels and not self.multi_label:
            raise VisionattnError(f"images have several labels each ({data.labels}): add --loss.multi_label")
        if self.multi_label and not data.labels:
            raise VisionattnError(
                f"loss.multi_label needs images with several labels, which {dataset_name(data)} does not have: give "
                "data.labels, or a Hugging Face dataset with lists of classes"
            )
        self.config = replace(self.config, data=data)
        return load_labelled(data) if data.labels else load_datasets(data)

    def load_validation(self, classes: list[str] | None) -> ImageSet:
        data = replace(self.config.data, labels=labels_of(self.config.data))
        return load_labelled_validation(data) if data.labels else load_validation(data)

    def describe(self, num_classes: int) -> dict[str, Any]:
        return super().describe(num_classes) | ({"multi_label": True} if self.multi_label else {})

    def make_loss(self, images: ImageSet, training_loss: Callable[..., Tensor]) -> nn.Module:
        return ClassificationLoss(self.config.loss, self.config.augment, images, self.config.seed, training_loss)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images).float()

    def metrics(self, images: ImageSet, rank: int, processes: int) -> Metrics:
        if images.several:
            return MultiLabelMetrics()
        return ClassificationMetrics(len(images.classes))

    def make_validation(self, model: nn.Module, images: ImageSet, classes: list[str] | None) -> Validation:
        config = self.config
        outputs = match_classes(images, classes, model.num_classes, config.model)
        if images.several:  # each of whose classes is judged for itself
            outputs = outputs[: len(images.classes)]
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        predictor = Predictor(model, outputs, config.precision, config.tta.flip, layout, images.several)
        facts = {
            "classes": len(outputs),
            "input_size": self.input_size(),
            "crop_pct": config.data.crop_pct,
            "views": config.tta.view_count,
        }

        def lines(figures: dict[str, float], per_class: dict[str, dict]) -> list[tuple[str, str]]:
            some = f"{len(outputs)} of the model's {model.num_classes}, and no others ranked"
            told = {"mAP": "mAP"} if images.several else {"top1": "top-1", "top5": "top-5"}
            return [
                *([("classes", some)] if len(outputs) < model.num_classes else []),
                *((label, f"{figures[name]:.4f} %") for name, label in told.items()),
                ("loss", f"{figures['loss']:.6f}"),
                *([] if images.several else [("ECE", f"{figures['ece']:.4f} %")]),
            ]

        views = Views(config.data, config.tta)
        metrics = MultiLabelMetrics() if images.several else ClassificationMetrics(len(outputs))
        device = next(model.parameters()).device
        return Validation(predictor.to(device), OnImage(views), metrics, facts, lines)

    def summarise(self, found: Tensor, classes: list[str], threshold: float | None, top_k: int | None = None) -> str:
        """The likeliest classes with their probabilities, see `listed`."""
        told = [f"{i['class']} {100 * i['probability']:.1f} %" for i in self.listed(found, classes, threshold, top_k)]
        return ", ".join(told) or f"no class at {100 * threshold:g} %"

    def listed(
        self, found: Tensor, classes: list[str], threshold: float | None, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """The `top_k` likeliest classes, the likeliest first: of all, or of those that reach the threshold. None: five,
        or as many as reach it."""
        shares = found.float().softmax(0) if threshold is None else found.float().sigmoid()
        ranked = shares.argsort(descending=True).tolist()
        told = ranked[: top_k or 5] if threshold is None else [i for i in ranked if shares[i] >= threshold][:top_k]
        return [{"class": classes[i], "index": i, "probability": shares[i].item()} for i in told]


class ClassificationLoss(nn.Module):
    """Loss on mixed or plain targets.

    Args:
        loss: options of the loss.
        augment: options of the augmentation, for mixup and cutmix.
        images: the images to train on, for their classes and, if these are to be balanced, their labels.
        seed: seed of the mixtures.
        training_loss: what the model makes of the loss, from (loss, images, logits, criterion); see
            `Mechanics.training_loss`.

    Raises:
        VisionattnError: if the class weights do not fit the classes.
    """

    def __init__(
        self,
        loss: LossConfig,
        augment: AugmentConfig,
        images: ImageSet,
        seed: int,
        training_loss: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.seed, self.training_loss, self.multi_label = seed, training_loss, loss.multi_label
        num_classes = len(images.classes)
        weight = _class_weights(loss, images)
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                mode=augment.mix_mode,
                label_smoothing=0.0 if loss.multi_label else loss.smoothing,  # which the criterion does to vectors
                num_classes=num_classes,
                multi_label=loss.multi_label,
            )
        if loss.bce or loss.multi_label:
            self.criterion: nn.Module = BinaryCrossEntropy(
                loss.smoothing, loss.bce_threshold, weight, sum_classes=loss.bce_sum, smooth_dense=loss.multi_label
            )
        elif weight is not None:
            self.criterion = WeightedCrossEntropy(weight, 0.0 if self.mixup else loss.smoothing)
        elif self.mixup:
            self.criterion = SoftTargetCrossEntropy()
        elif loss.smoothing:
            self.criterion = LabelSmoothingCrossEntropy(loss.smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss()

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor, update: int) -> Tensor:
        """Loss of a batch; mixtures are drawn by (seed, update), the same in every process and part of an update."""
        if self.mixup:
            with seeded(self.seed, Stream.MIX, update):
                images, targets = self.mixup(images, targets)
        logits = model(images).float()
        if self.multi_label:
            targets = targets.float()
        return self.training_loss(
            self.criterion(logits, targets), images, logits, lambda others: self.criterion(others, targets)
        )


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight for each class, averaged over the images as it is without weights.

    Args:
        weight: of each class.
        smoothing: label smoothing of targets that are numbers of classes.
    """

    def __init__(self, weight: Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            targets = mixup_target(targets, len(self.weight), smoothing=self.smoothing)
        return F.cross_entropy(logits, targets, self.weight)


def _class_weights(loss: LossConfig, images: ImageSet) -> Tensor | None:
    """The weight of each class; balanced ones are 1 on average over the images."""
    classes = len(images.classes)
    if loss.class_weights == "balanced":
        if images.several:
            labels = torch.tensor([label for i in images.indices for label in images.source.labels[i]])
        else:
            samples = getattr(images.source, "samples", images.source)
            labels = torch.tensor([int(samples[i][1]) for i in images.indices])
        counts = labels.bincount(minlength=classes)
        return counts.sum() / (classes * counts.clamp(min=1))
    if loss.class_weights and len(loss.class_weights) != classes:
        raise VisionattnError(f"loss.class_weights has {len(loss.class_weights)} values for {classes} classes")
    return torch.tensor(loss.class_weights) if loss.class_weights else None


class MultiLabelMetrics(Metrics):
    """Average precision of each class, their mean, and loss, of images with any number of labels."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []  # (scores and targets, images, classes) of each batch
        self.average = torch.zeros(0)
        self.positives = torch.zeros(0)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.parts.append(torch.stack([logits[:, : targets.shape[1]].float(), targets.float()]).cpu())

    def share(self, gather: Callable[[list], list]) -> None:
        mine = torch.cat(self.parts, 1) if self.parts else None
        shares = [share for share in gather([mine]) if share is not None]
        whole = shares[0].new_empty(2, sum(share.shape[1] for share in shares), shares[0].shape[2])
        for rank, share in enumerate(shares):  # each process has every so many-th image
            whole[:, rank :: len(shares)] = share
        self.parts = [whole]

    def compute(self) -> dict[str, float]:
        """Mean over the classes with positives of their average precision in percent, and loss."""
        scores, targets = torch.cat(self.parts, 1)
        self.positives = targets.sum(0)
        self.average = torch.stack([average_precision(*columns) for columns in zip(scores.T, targets.T, strict=True)])
        loss = F.binary_cross_entropy_with_logits(scores, targets)
        return {"mAP": 100 * self.average.nanmean().item(), "loss": loss.item()}

    def per_class(self) -> list[dict[str, float | None]]:
        """Number of images and average precision in percent of each class; None for one without images."""
        pairs = zip(self.positives.tolist(), self.average.tolist(), strict=True)
        return [{"images": int(n), "AP": 100 * average if n else None} for n, average in pairs]


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean precision at the images that have the label, by falling score; equal scores count as one.

    Args:
        scores: of the images for a class.
        targets: 1 for the images that have the label, else 0.

    Returns:
        the figure, nan if no image has the label.
    """
    scores, order = scores.sort(descending=True)
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])  # of those with an equal score
    seen = last.nonzero()[:, 0] + 1
    hits = targets[order].cumsum(0)[last]
    return (hits.diff(prepend=hits.new_zeros(1)) * hits / seen).sum() / hits[-1]


class ClassificationMetrics(Metrics):
    """Sums for accuracy, loss and calibration over any number of batches and processes.

    Args:
        num_classes: number of classes.
    """

    bins = 15

    def __init__(self, num_classes: int) -> None:
        sizes = [4, 3 * self.bins, 2 * num_classes]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64)
        totals, by_confidence, by_class = self.sums.split(sizes)  # views, so that processes share one tensor
        self.totals = totals  # images, correct, correct in five, loss
        self.by_confidence = by_confidence.view(3, -1)  # images, correct, confidence
        self.by_class = by_class.view(2, -1)  # images, correct

    def update(self, logits: Tensor, targets: Tensor) -> None:
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none")
        confidence = logits.softmax(1).amax(1)
        columns = torch.ones_like(loss), ranked[:, 0], ranked.any(1), loss, confidence
        images, correct, in_five, loss, confidence = torch.stack([column.float() for column in columns]).cpu().double()
        targets = targets.cpu()
        self.totals += torch.stack([images, correct, in_five, loss]).sum(1)
        bins = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1  # a bin holds its upper bound
        self.by_confidence.index_add_(1, bins, torch.stack([images, correct, confidence]))
        self.by_class.index_add_(1, targets, torch.stack([images, correct]))

    def share(self, gather: Callable[[list], list]) -> None:
        self.sums.copy_(torch.stack(gather([self.sums])).sum(0))

    def compute(self) -> dict[str, float]:
        """Accuracy in percent, and loss."""
        images, top1, top5, loss = self.totals.tolist()
        return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}

    def details(self) -> dict[str, float]:
        return {"ece": self.calibration_error()}

    def calibration_error(self) -> float:
        """Expected calibration error in percent: the mean distance of confidence and accuracy, over equal bins."""
        _, correct, confidence = self.by_confidence
        return 100 * (correct - confidence).abs().sum().item() / self.totals[0].item()

    def per_class(self) -> list[dict[str, float | None]]:
        """Number of images and accuracy in percent of each class; None for one without images."""
        return [{"images": int(n), "top1": 100 * hits / n if n else None} for n, hits in self.by_class.T.tolist()]
