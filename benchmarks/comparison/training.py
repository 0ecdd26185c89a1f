"""One run of the comparison: a mixer in a scaffold, trained and tested. It goes on where a killed one ended."""

import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import visionattn
from visionattn.data.loader import Stream, derive_seed
from visionattn.explain.capture import capture, maps_of
from visionattn.explain.maps import entry_of
from visionattn.models.mixers import MIXERS

from .tasks import Classify, SameOrDifferent, load_items

REFERENCE_RATES = {"0": 1e-3 / 1024, "1a": 1e-3 / 1024, "1b": 1e-3 / 32, "2": 1e-3 / 1024}
"""Peak learning rate by images of a batch, of each tier."""
SCHEDULE = 300
"""Epochs that mixers with a schedule count by, which is stretched to those of the run."""
DISTANCES = (16, 22, 28, 36, 68)
"""Pixels between two items, in bins."""
EXAMPLES = 1000
"""Of the images to test on, for what is not the accuracy itself."""


@dataclass(frozen=True)
class Row:
    """What is compared.

    Args:
        scaffold: "isotropic" or "pyramid".
        mixer: its name.
        variant: one of its further rows, "" for its own.
        rule: "equal" for equal parameters, "mlp 4" for the same MLP.
        head_dim: channels of an attention head.
    """

    scaffold: str
    mixer: str
    variant: str = ""
    rule: str = "equal"
    head_dim: int = 16

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.mixer}, {self.variant}" if self.variant else self.mixer

    def make(self, **kwargs: Any) -> nn.Module:
        """The network.

        Args:
            **kwargs: further arguments of `create_model`.
        """
        if self.variant:
            kwargs["mixer_kwargs"] = dict(MIXERS[self.mixer].variants[self.variant])
        if self.rule == "mlp 4":
            kwargs["mlp_ratio"] = 4.0
        name = f"{self.scaffold}_xsmall"
        return visionattn.create_model(name, mixer=self.mixer, head_dim=self.head_dim, in_chans=1, **kwargs)


@cache
def settled(row: Row) -> Row:
    """The row, or that of equal parameters where the other rule makes the same network."""
    equal = replace(row, rule="equal")
    with torch.device("meta"):
        sizes = {sum(p.numel() for p in each.make().parameters()) for each in (row, equal)}
    return equal if len(sizes) == 1 else row


@dataclass(frozen=True)
class Run:
    """A row that is trained once.

    Args:
        row: what is trained.
        tier: "0", "1a" or "1b".
        rate: factor on the reference learning rate.
        seed: of initialisation and order.
        epochs: of training.
        images: of an epoch.
        batch: images of an update.
        data: see `load_items`.
    """

    row: Row
    tier: str
    rate: float
    seed: int
    epochs: int
    images: int
    batch: int
    data: str

    @classmethod
    def of(cls, known: dict[str, Any]) -> "Run":
        """The run that `asdict` made this of."""
        return cls(**known | {"row": Row(**known["row"])})

    @property
    def key(self) -> str:
        """All that it depends on."""
        known = asdict(self) | {"data": "digits" if self.data == "digits" else "fashion-mnist"}
        return json.dumps(known, sort_keys=True)

    def task(self) -> Classify | SameOrDifferent:
        """What it is trained on."""
        items = load_items(self.data)
        if self.tier == "1b":
            return SameOrDifferent(*items, self.images, self.epochs)
        return Classify(*items, self.images, augment=self.tier == "1a")

    def make(self, task: Classify | SameOrDifferent, scale: float = 1.0) -> nn.Module:
        """Its network.

        Args:
            task: what it is for.
            scale: of the images.
        """
        kwargs = {"patch_size": task.patch_size} if self.row.scaffold == "isotropic" else {}
        return self.row.make(num_classes=task.num_classes, img_size=int(scale * task.img_size), **kwargs)


def file_of(run: Run, folder: Path) -> Path:
    """Where a run that is not finished leaves how far it has come."""
    return folder / (hashlib.sha256(run.key.encode()).hexdigest()[:16] + ".pt")


@contextmanager
def claimed(run: Run, folder: Path) -> Iterator[bool]:
    """Whether this process alone trains a run: it holds a file of the run's locked, which ends with the process.

    Args:
        run: which one.
        folder: of `file_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(run, folder).with_suffix(".lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def train(run: Run, folder: Path, device: torch.device, saved: Callable[[int], None] = lambda epoch: None) -> dict:
    """What a run finds.

    Args:
        run: which one.
        folder: where it leaves how far it has come, at the end of every epoch.
        device: to train on, in bfloat16 if it is a GPU.
        saved: is called after that.

    Returns:
        parameters, mean training losses after 10, 50 and 100 % of the updates, seconds of the training's process, and
        what `examine` finds; or the update at which the loss was no number any more.
    """
    task = run.task()
    torch.manual_seed(derive_seed(run.seed, Stream.MODEL))
    model = run.make(task).to(device)
    groups = param_groups_weight_decay(model, 0.05, model.no_weight_decay())
    peak = run.rate * REFERENCE_RATES[run.tier] * run.batch
    optimizer = torch.optim.AdamW(groups, peak, betas=(0.9, 0.999), fused=True)
    updates = len(task) // run.batch
    total = updates * run.epochs
    schedule = CosineLRScheduler(
        optimizer, total, lr_min=1e-6 * peak, warmup_t=math.ceil(0.05 * total),
        warmup_lr_init=0.0, warmup_prefix=False, t_in_epochs=False,
    )  # fmt: skip
    done, losses, seconds = 0, [], 0.0
    path = file_of(run, folder)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, losses, seconds = state["done"], state["losses"], state["seconds"]
    found = {"parameters": sum(p.numel() for p in model.parameters())}
    for epoch in range(done, run.epochs):
        begin = time.process_time()
        order = np.random.default_rng(derive_seed(run.seed, Stream.ORDER, epoch)).permutation(len(task))
        torch.manual_seed(derive_seed(run.seed, Stream.AUGMENT, epoch))  # what mixers draw
        model.train()
        for i in range(updates):
            stop_if_alone()
            model.advance(SCHEDULE * (epoch + i / updates) / run.epochs)
            images, labels = task.batch(run.seed, epoch, order[i * run.batch : (i + 1) * run.batch])
            schedule.step_update(epoch * updates + i + 1)
            loss = update(model, optimizer, images.to(device), labels.to(device), task.outputs(epoch))
            if not math.isfinite(loss):
                return found | {"diverged": epoch * updates + i, "seconds": seconds + time.process_time() - begin}
            losses.append(loss)
        seconds += time.process_time() - begin
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": epoch + 1}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"losses": losses, "seconds": seconds}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        saved(epoch)
    window = max(1, total // 20)
    means = [
        float(np.mean(losses[max(0, end - window) : end])) for end in (max(1, total // 10), max(1, total // 2), total)
    ]
    torch.manual_seed(derive_seed(run.seed, Stream.AUGMENT, run.epochs))
    return found | {"losses": means, "seconds": seconds} | examine(run, task, model.eval(), device)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, outputs: slice) -> float:
    """One step of training; its loss, of these outputs."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        logits = model(images)
    loss = cross_entropy(logits[:, outputs].float(), labels, label_smoothing=0.1)
    model.training_loss(loss, images, logits).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def stop_if_alone() -> None:
    """End this process if the one that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


@torch.no_grad()
def credit(
    model: nn.Module, task: Classify | SameOrDifferent, device: torch.device, count: int, scale: float = 1.0
) -> np.ndarray:
    """What a model's answers on the images to test on are worth, 1 if they are right.

    Args:
        model: in evaluation mode.
        task: whose images.
        device: where it is.
        count: of images.
        scale: to which they are resized, bilinearly.
    """
    found = []
    for first in range(0, min(count, task.test_count), 250):
        images, labels = task.tests(np.arange(first, min(first + 250, count, task.test_count)))
        if scale != 1:
            images = interpolate(images, scale_factor=scale, mode="bilinear")
        found.append(task.credit(model(images.to(device))[:, task.outputs()].cpu().float(), labels))
    return torch.cat(found).numpy()


def examine(run: Run, task: Classify | SameOrDifferent, model: nn.Module, device: torch.device) -> dict:
    """Accuracy on the images to test on, by distance for pairs, and which share of those is decided; on the first of
    them at 1.5 and 2 times their size, and how much of it bfloat16 costs; the largest change of an output, relative to
    the largest output, between a batch of 64 and one of 1; the entropy of weights by layer, in nats; and how far the
    receptive field reaches."""
    each = credit(model, task, device, task.test_count)
    found: dict[str, Any] = {"accuracy": float(each.mean())}
    few = float(each[:EXAMPLES].mean())
    with torch.autocast(device.type, torch.bfloat16):
        found["bfloat16"] = float(credit(model, task, device, EXAMPLES).mean()) - few
    if isinstance(task, SameOrDifferent):
        found["decided"] = float((each != 0.5).mean())
        bins = np.digitize(task.distances(), DISTANCES[1:-1])
        found["by_distance"] = [float(each[bins == i].mean()) for i in range(len(DISTANCES) - 1)]
    images = task.tests(np.arange(64))[0].to(device)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    found["batch"] = float((together - alone).abs().max() / together.abs().max())
    found["entropy"] = entropies(model, images)
    if MIXERS[run.row.mixer].fixed and MIXERS[run.row.mixer].resize is None:
        return found
    for scale in (1.5, 2.0):
        large = run.make(task, scale).to(device).eval()
        large.load_state_dict(large.adapt_state_dict(model.state_dict(), {"img_size": task.img_size}))
        if isinstance(task, Classify):
            found[f"x{scale:g}"] = float(credit(large, task, device, EXAMPLES, scale).mean()) - few
    found["reach"] = reach(large, interpolate(images[:16], scale_factor=2, mode="bilinear"), task.patch_size)
    return found


@torch.no_grad()
def entropies(model: nn.Module, images: Tensor) -> list[float]:
    """Mean entropy in nats of what the tokens weigh by, for each layer that weighs by probabilities."""
    if not any(entry_of(module) for module in model.modules()):
        return []
    with capture(model) as seen:
        model(images)
    found = []
    for each in itertools.chain.from_iterable(maps_of(model, seen)):
        keys = [i for i, axis in enumerate(each.axes) if axis.startswith("key")]
        if each.kind != "attention" or not keys:
            continue
        weights = each.values.flatten(keys[0])
        if (weights >= 0).all() and (weights.sum(-1) - 1).abs().max() < 1e-3:
            found.append(float(torch.special.entr(weights).sum(-1).mean()))
    return found


def reach(model: nn.Module, images: Tensor, patch: int) -> float:
    """Share of the energy of a feature's gradient, in the middle of the map, that lies outside 7 x 7 patches around it.

    Args:
        model: the feature is of its last block, in the pyramid of its third stage.
        images: (B, 1, H, W).
        patch: side of a patch in pixels.
    """
    images = images.clone().requires_grad_()
    which = [2] if hasattr(model, "stages") else [-1]
    features = model.forward_intermediates(images, indices=which, intermediates_only=True)[0]
    middle = features.shape[-1] // 2
    features[..., middle, middle].sum().backward()
    energy = images.grad.square().sum((0, 1))
    side = energy.shape[-1] // features.shape[-1]
    low, high = (middle - 3) * side, (middle + 4) * side
    return 1 - float(energy[low:high, low:high].sum() / energy.sum())
