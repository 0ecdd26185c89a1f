"""Options that would be taken without any effect: they are refused, since whoever gives one expects something of it.

Only what was given counts: options that a checkpoint or the run to resume brings along may be of no use now.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import VisionattnError
from .config import TaskConfig
from .table import AUGMENTATION, TASKS

FOR_ALL = ("augment.repeats",)
"""What is of use to all tasks nevertheless."""


class Rule(NamedTuple):
    """When options are of no use, and why; the names of other options in `why` are those to set."""

    options: tuple[str, ...]
    applies: Callable[[Any], bool]
    why: str


def _trains(config: TaskConfig) -> bool:
    return hasattr(config, "optim")


def _probe(config: TaskConfig) -> str | None:
    return getattr(config, "probe", None)


def _kind(config: TaskConfig) -> str:
    made = "digits" if TASKS[config.task].sample == "class" else "scenes"
    return (config.data.name or ("folder" if config.data.root is not None else made)).partition("/")[0].lower()


def _lacks_folder(config: TaskConfig, split: str) -> bool:
    """Whether the folder of the data, if it is there, has none of the split."""
    from ..data.annotations import split_names

    is_folder = TASKS[config.task].sample == "class" and _kind(config) == "folder" and not config.data.labels
    is_folder = is_folder and os.path.isdir(config.data.root or "")  # one that is not there is told where it is opened
    return is_folder and not any(Path(config.data.root or "", name).is_dir() for name in split_names(split))


def _brings_validation(config: TaskConfig) -> bool:
    """Whether the data say themselves which images are validated on."""
    kind = _kind(config)
    if kind != "folder":
        return kind in ("torch", "hfds", "scenes")
    if not os.path.isdir(config.data.root or ""):
        return False
    if TASKS[config.task].sample == "objects":
        from ..data.boxes import find_layout

        found = find_layout(config.data, config.data.val_split)
        return found is not None and not found.whole
    if config.data.labels:
        return not any(Path(folder, config.data.labels).is_file() for folder in (config.data.root or "", ""))
    return not _lacks_folder(config, config.data.val_split)


def _is_coco(config: TaskConfig) -> bool:
    files, root = ("annotations/*.json", "*/_annotations.coco.json"), Path(config.data.root or "")
    is_folder = TASKS[config.task].sample == "objects" and _kind(config) == "folder"
    return is_folder and any(any(root.glob(pattern)) for pattern in files)


def _optimizer_lacks(what: str) -> Callable[[Any], bool]:
    def lacks(config: Any) -> bool:
        from timm.optim import get_optimizer_info, list_optimizers

        name = config.optim.name.lower()
        return name in list_optimizers() and not getattr(get_optimizer_info(name), what)

    return lacks


SCHEDULES = {
    "min_lr": ("cosine", "tanh", "poly", "plateau", "onecycle", "wsd"),
    "decay_epochs": ("step", "wsd"),
    "decay_milestones": ("multistep",),
    "decay_rate": ("step", "multistep", "plateau", "poly"),
    "patience_epochs": ("plateau",),
}
"""Options of the schedule, and the schedules that have them."""
RULES = (
    Rule(("pretrained",), lambda c: bool(c.checkpoint), "beside checkpoint"),
    Rule(("data.train_split", "data.val_split"), lambda c: _kind(c) in ("digits", "scenes"), "without data.root"),
    Rule(("data.train_split",), lambda c: _lacks_folder(c, c.data.train_split), "to a data.root without that folder"),
    Rule(("data.val_split",), lambda c: _lacks_folder(c, c.data.val_split), "to a data.root without that folder"),
    Rule(("data.val_fraction",), _brings_validation, "to data with a split to validate on"),
    Rule(("data.download",), lambda c: _kind(c) != "torch", "without a data.name of torch/"),
    Rule(
        tuple(f"annotations.{name}" for name in ("scene_size", "scene_objects", "scene_count", "fashion")),
        lambda c: _kind(c) != "scenes",
        "to other data than scenes",
    ),
    Rule(("annotations.classes", "annotations.box_format"), lambda c: _kind(c) == "scenes", "to scenes"),
    Rule(("annotations.classes",), _is_coco, "to COCO's JSON, which names its classes"),
    Rule(("joint.max_size",), lambda c: not (c.joint.min_size or c.joint.eval_size), "without joint.min_size"),
    Rule(("joint.max_class_share",), lambda c: not c.joint.crop, "without joint.crop"),
    # Of validate.py.
    Rule(
        (
            *("data.batch_size", "data.max_bad_fraction", "joint.scale", "joint.crop", "joint.max_class_share"),
            *("joint.detr_crop", "joint.hflip", "joint.photometric"),
        ),
        lambda c: not _trains(c),
        "to validation",
    ),
    Rule(("data.img_size",), lambda c: not _trains(c) and bool(c.data.eval_img_size), "beside data.eval_img_size"),
    Rule(("joint.min_size",), lambda c: not _trains(c) and bool(c.joint.eval_size), "beside joint.eval_size"),
    Rule(("tta", "compile", "fuse", "int8"), lambda c: _probe(c) is not None, "to a probe"),
    Rule(("probing",), lambda c: not _probe(c), "without probe"),
    Rule(("probing.queries",), lambda c: _probe(c) != "attentive", "to this probe"),
    Rule(("probing.epochs", "probing.lr", "probing.batch_size"), lambda c: _probe(c) == "knn", "to nearest neighbours"),
    Rule(("probing.k", "probing.temperature"), lambda c: _probe(c) != "knn", "to this probe"),
    # Of train.py.
    Rule(
        ("augment.color_jitter", "augment.color_jitter_prob"),
        lambda c: bool(c.augment.auto_augment) and "3a" not in c.augment.auto_augment,
        "with augment.auto_augment other than 3a",
    ),
    Rule(("augment.color_jitter_prob",), lambda c: not c.augment.color_jitter, "without augment.color_jitter"),
    Rule(("augment.re_mode", "augment.re_count"), lambda c: not c.augment.re_prob, "without augment.re_prob"),
    Rule(
        ("augment.mix_prob", "augment.mix_mode"),
        lambda c: not (c.augment.mixup or c.augment.cutmix),
        "without augment.mixup or augment.cutmix",
    ),
    Rule(
        ("augment.mix_switch_prob",),
        lambda c: not (c.augment.mixup and c.augment.cutmix),
        "without both augment.mixup and augment.cutmix",
    ),
    Rule(("loss.bce_threshold", "loss.bce_sum"), lambda c: not (c.loss.bce or c.loss.multi_label), "without loss.bce"),
    Rule(("loss.auxiliary",), lambda c: not c.head_kwargs.get("auxiliary"), "without head_kwargs.auxiliary"),
    *(
        Rule((f"optim.{name}",), _optimizer_lacks(f"has_{name}"), "to this optim.name")
        for name in ("betas", "eps", "momentum")
    ),
    Rule(("optim.clip_mode",), lambda c: not c.optim.clip_grad, "without optim.clip_grad"),
    Rule(
        ("schedule.warmup_lr", "schedule.warmup_prefix"),
        lambda c: not c.schedule.warmup_epochs,
        "without schedule.warmup_epochs",
    ),
    *(
        Rule((f"schedule.{name}",), lambda c, users=users: c.schedule.name not in users, "to this schedule.name")
        for name, users in SCHEDULES.items()
    ),
    Rule(("sigma_gamma",), lambda c: not c.sigma_reparam, "without sigma_reparam"),
    Rule(("monitor_every",), lambda c: c.monitor == "none", "without monitor"),
    Rule(("ema.warmup",), lambda c: not c.ema.decay, "without ema.decay"),
    Rule(
        tuple(
            f"distill.{name}"
            for name in ("kwargs", "checkpoint", "alpha", "temperature", "hard", "features", "feature_loss")
        ),
        lambda c: not c.distill.model,
        "without distill.model",
    ),
    Rule(("distill.temperature", "distill.hard"), lambda c: not c.distill.alpha, "with distill.alpha 0"),
    Rule(("distill.temperature",), lambda c: c.distill.hard, "with distill.hard"),
    Rule(("distill.feature_loss",), lambda c: not c.distill.features, "without distill.features"),
    Rule(
        ("guard.rollback_lr_factor", "guard.max_rollbacks"),
        lambda c: c.guard.on_divergence != "rollback",
        "without guard.on_divergence rollback",
    ),
)
"""Options that others make useless. Those that a script does not have are never given to it."""


def useless(config: TaskConfig, brought: TaskConfig) -> dict[str, str]:
    """Options that are given but have no effect, and why.

    Args:
        config: options of a script.
        brought: those that it would have without being given any, or only the ones before these.
    """
    found = {}
    for name in TASKS[config.task].of_no_use:
        hint = " (sizes and augmentation are options of joint)" if name in AUGMENTATION else ""
        found |= {each: f"to {config.task}{hint}" for each in given(config, brought, name) if each not in FOR_ALL}
    for rule in RULES:
        for name in rule.options:
            for each in given(config, brought, name):
                if rule.applies(config):
                    found.setdefault(each, rule.why)
    return found


def refuse(found: dict[str, str]) -> None:
    """Raise an error that names the first of the options that `useless` found."""
    for name, why in found.items():
        raise VisionattnError(f"option {name} is of no use {why}: leave it out")


def given(config: Any, brought: Any, name: str) -> Iterator[str]:
    """The option of this name, or those in this group, whose values are not the ones brought along."""
    first, _, rest = name.partition(".")
    if not hasattr(config, first):
        return
    value, other = getattr(config, first), getattr(brought, first)
    if is_dataclass(value):
        for key in [rest] if rest else [each.name for each in fields(value)]:
            yield from (f"{first}.{found}" for found in given(value, other, key))
    elif value != other:
        yield first
