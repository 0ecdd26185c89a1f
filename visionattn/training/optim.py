"""Optimizer and learning-rate schedule: timm's, by name, and what a run changes of the rates as it goes."""

import difflib
import math
from fnmatch import fnmatch

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..errors import VisionattnError, user_input
from .config import OptimConfig, TrainConfig

UNFIT = {
    "adahessian": "needs second derivatives, which train.py does not compute",
    "kron": "compiles for minutes at each shape of a weight, and draws what a resumed run cannot draw again",
}
"""What the loop cannot serve, by the beginning of the name, and why."""


UNFIT_OPTIONS = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, ImportError, AssertionError)
"""What optimizers raise for want of a GPU or a package, or of betas in their number and range."""


def make_optimizer(
    config: OptimConfig, model: nn.Module, rates: dict[str, float] | None = None
) -> torch.optim.Optimizer:
    """timm's optimizer by name, with its groups for weight decay and layer-wise rates.

    Args:
        config: options of the optimizer.
        model: what it optimizes.
        rates: factors on the peak learning rate by pattern of names; see `Mechanics.learning_rates`.

    Raises:
        VisionattnError: if the optimizer is unknown or refuses the options.
    """
    if config.name.lower() not in list_optimizers():
        near = difflib.get_close_matches(config.name.lower(), list_optimizers(), 3, 0.5)
        raise VisionattnError(
            f"unknown optimizer {config.name}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    name = config.name.lower()
    for prefix, why in UNFIT.items():
        if name.startswith(prefix):
            raise VisionattnError(f"optimizer {config.name} {why}: give another --optim.name")
    takes = get_optimizer_info(name)
    if config.betas is not None and takes.has_betas and len(config.betas) != takes.num_betas:
        raise VisionattnError(f"optimizer {name} takes {takes.num_betas} betas: optim.betas has {len(config.betas)}")
    options = {"betas": config.betas, "eps": config.eps, "layer_decay": config.layer_decay}
    with user_input(f"optimizer {config.name}", *UNFIT_OPTIONS):
        optimizer = create_optimizer_v2(
            model,
            config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **{key: value for key, value in options.items() if value is not None},
        )
    for pattern, factor in (rates or {}).items():
        _set_rate(optimizer, {p for name, p in model.named_parameters() if fnmatch(name, pattern)}, factor)
    return optimizer


def _set_rate(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter], factor: float) -> None:
    """Move parameters to groups of their own, with another peak rate and the same rate at either end of the run."""
    for group in list(optimizer.param_groups):
        if moved := [p for p in group["params"] if p in parameters]:
            group["params"] = [p for p in group["params"] if p not in parameters]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * factor})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class OneCycle(Scheduler):
    """Up along a cosine in the warm-up, down along another after it (https://arxiv.org/abs/1708.07120).

    Args:
        optimizer: whose rates it sets.
        length: updates of the cycle.
        warmup: updates of its rise.
        start: rate of the first update.
        end: rate after the last one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, length: int, warmup: float, start: float, end: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.length, self.warmup, self.start, self.end = length, warmup, start, end

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup:
            return [_cosine(self.start, peak, t / self.warmup) for peak in self.base_values]
        share = min(1.0, (t - self.warmup) / (self.length - self.warmup))
        return [_cosine(peak, self.end, share) for peak in self.base_values]


def _cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


class Schedule:
    """Learning rate of every update: a function of its number, times what plateaus and rollbacks have left of it.

    Args:
        config: options of the run.
        optimizer: whose rates it sets.
        updates: updates of an epoch.

    Attributes:
        factor: what rollbacks have left of the rate.
    """

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer, updates: int) -> None:
        self.optimizer, self.config = optimizer, config.schedule
        self.shape = make_schedule(config, optimizer, updates)
        self.factor = self.plateau = 1.0
        self.best: float | None = None
        self.waited = 0

    def step(self, update: int) -> None:
        """Set the rates of an update."""
        self.shape.step_update(update)
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            group["lr"] = max(lr * self.plateau, min(lr, self.config.min_lr)) * self.factor

    def observe(self, epoch: int, score: float) -> None:
        """Take the metric of an epoch, for plateau; those of the warm-up do not count."""
        if self.config.name != "plateau" or epoch < self.config.warmup_epochs:
            return
        if self.best is None or score > self.best:
            self.best, self.waited = score, 0
        else:
            self.waited += 1
            if self.waited > self.config.patience_epochs:
                self.plateau, self.waited = self.plateau * self.config.decay_rate, 0

    def state_dict(self) -> dict[str, float | int | None]:
        """What does not follow from the number of the update."""
        return {key: getattr(self, key) for key in ("factor", "plateau", "best", "waited")}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Go on from what `state_dict` returned."""
        vars(self).update(state)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, updates: int) -> Scheduler:
    """timm's schedule by name, a function of the number of the update.

    Args:
        config: options of the run.
        optimizer: whose rates it sets.
        updates: updates of an epoch.
    """
    schedule = config.schedule
    if schedule.cooldown_epochs and schedule.name in ("step", "multistep", "plateau", "constant"):
        raise VisionattnError(f"schedule {schedule.name} has no cool-down: leave schedule.cooldown_epochs at 0")
    warmup = min(schedule.warmup_epochs, config.epochs)
    length = config.epochs - schedule.cooldown_epochs - (warmup if schedule.warmup_prefix else 0)
    if length <= 0 or (schedule.name in ("wsd", "onecycle") and config.epochs - schedule.cooldown_epochs <= warmup):
        raise VisionattnError(
            f"schedule {schedule.name}: {warmup:g} epochs of warm-up and {schedule.cooldown_epochs} of cool-down "
            f"leave none of {config.epochs}"
        )
    if schedule.name == "onecycle":
        cycle = (config.epochs - schedule.cooldown_epochs) * updates
        return OneCycle(optimizer, cycle, warmup * updates, schedule.warmup_lr, schedule.min_lr)
    decay = schedule.decay_epochs or (90 if schedule.name == "step" else None)
    with user_input(f"schedule {schedule.name}", ValueError, AssertionError):
        return create_scheduler_v2(
            optimizer,
            sched="constant" if schedule.name == "plateau" else schedule.name,
            num_epochs=round(length * updates),
            warmup_epochs=warmup * updates,
            warmup_prefix=schedule.warmup_prefix,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            decay_epochs=decay and max(1, round(decay * updates)),
            decay_milestones=[m * updates + 1 for m in schedule.decay_milestones],  # timm decays one step before
            decay_rate=schedule.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=1,  # timm's epochs are our updates
        )[0]
