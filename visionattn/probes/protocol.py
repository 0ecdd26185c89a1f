"""How probes learn: the protocol of "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
arXiv 2506.10178."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from ..data.loader import Stream, derive_seed
from ..errors import VisionattnError
from ..progress import track
from .features import Stored

WARMUP = 10
"""Epochs, or a ninth of them where there are less than 90."""


def lars(
    params: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> Lars:
    """LARS as probes want it, "Large Batch Training of Convolutional Networks", arXiv 1708.03888.

    The gradient of a tensor with more than one dimension, decayed, is scaled to a share of the tensor's norm; that of
    others is taken as it is:

        g <- (g + weight_decay p) trust_coefficient |p| / |g + weight_decay p|
        m <- momentum m + g                             p <- p - lr m

    Args:
        params: what learns.
        lr: learning rate.
        weight_decay: of the tensors that are scaled.
        momentum: of the scaled gradients.
        trust_coefficient: the share.
    """
    params = list(params)
    scaled, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    groups = [{"params": scaled, "always_adapt": True}, {"params": others}]
    optimizer = Lars(groups, lr, momentum, trust_coeff=trust_coefficient, eps=0.0)

    @torch.no_grad()
    def decay(*_) -> None:  # here, since timm's own is no part of the norm that it scales by
        for p in scaled:
            if p.grad is not None:
                p.grad.add_(p, alpha=weight_decay)

    if weight_decay:
        optimizer.register_step_pre_hook(decay)
    return optimizer


def learning_rate(epoch: float, epochs: int) -> float:
    """Share of the peak: up from 0 along a line, then to 0 along a cosine.

    Args:
        epoch: what has passed, in parts of epochs.
        epochs: in all.
    """
    warmup = min(WARMUP, epochs / 9)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


class Fitted(NamedTuple):
    """What came of training a probe.

    Args:
        epoch: the best one, the first being 1; the probe has its weights.
        top1: share of the validation images that are recognised then, from 0 to 1.
        logits: of the validation images then (M, classes).
    """

    epoch: int
    top1: float
    logits: Tensor


def fit(
    probe: nn.Module,
    train: Stored,
    val: Stored,
    epochs: int = 90,
    lr: float = 0.1,
    batch_size: int = 256,
    seed: int = 0,
) -> Fitted:
    """Train a probe on stored features, and keep its best epoch.

    The order of the images follows from the seed and the epoch; those that do not fill a batch wait for another epoch.

    Args:
        probe: the head, on its device.
        train: features and classes to learn from.
        val: features and classes that say which epoch is best.
        epochs: passes over the features.
        lr: peak learning rate for 256 images, to which that of a batch is in proportion.
        batch_size: features of an update; all where there are less.
        seed: of the order.

    Raises:
        VisionattnError: if there is but one image, or one in a batch, or no epoch.
    """
    if epochs < 1:
        raise VisionattnError(f"expected epochs from 1 up, got {epochs}")
    device = next(probe.parameters()).device
    count = len(train.labels)
    batch_size = min(batch_size, count)
    if batch_size < 2:  # of which batch norm makes nothing
        raise VisionattnError(f"expected two images or more in a batch, got {batch_size} of {count} training images")
    updates, peak = count // batch_size, lr * batch_size / 256
    optimizer, best, weights = lars(probe.parameters(), peak), None, {}
    for epoch in track(range(epochs), "probing", epochs):
        probe.train()
        generator = torch.Generator().manual_seed(derive_seed(seed, Stream.ORDER, epoch))
        order = torch.randperm(count, generator=generator)
        for update, part in enumerate(order.split(batch_size)[:updates]):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(epoch + update / updates, epochs)
            loss = F.cross_entropy(probe(train.features[part].to(device).float()), train.labels[part].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = predict(probe, val.features)
        top1 = (logits.argmax(1) == val.labels).float().mean().item()
        if best is None or top1 > best.top1:
            best, weights = Fitted(epoch + 1, top1, logits), copy.deepcopy(probe.state_dict())
    probe.load_state_dict(weights)
    probe.eval()
    return best


@torch.no_grad()
def predict(probe: nn.Module, features: Tensor, batch_size: int = 1024) -> Tensor:
    """Logits (M, classes) of a probe, in eval mode from now on, on the CPU.

    Args:
        probe: the head, on its device.
        features: as it takes them.
        batch_size: how many at once.
    """
    probe.eval()
    device = next(probe.parameters()).device
    return torch.cat([probe(part.to(device).float()).cpu() for part in features.split(batch_size)])
