"""The options of train.py and validate.py: typed dataclasses, filled from YAML files and the command line."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from ..arguments import differing
from ..data.config import AugmentConfig
from ..errors import VisionattnError
from ..tasks.config import LossConfig, TaskConfig, TtaConfig
from ..tasks.table import TASKS
from ..tasks.useless import given, refuse, useless
from ..weights.description import read_described
from .command_line import make_parser, parse, values_of
from .yaml_text import read_file


@dataclass
class OptimConfig:
    """Optimizer"""

    name: str = "adamw"
    """Any optimizer of timm: adamw, lamb, sgd, lion, muon, ..."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; biases, norms and what the model names are exempt."""
    momentum: NonNegativeFloat = 0.9
    """Momentum, for optimizers that have it."""
    betas: tuple[float, ...] | None = None
    """The optimizer's betas; null: its own defaults."""
    eps: PositiveFloat | None = None
    """The optimizer's epsilon; null: its own default."""
    layer_decay: PositiveFloat | None = None
    """Factor on the learning rate for each layer further from the head, such as 0.75; null: one rate for all."""
    clip_grad: NonNegativeFloat = 1.0
    """Gradient clipping; 0: off."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Clip the gradient's norm, each value, or adaptively by the norm of each weight."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are averaged for one update."""


@dataclass
class ScheduleConfig:
    """Learning-rate schedule, stepped at every update; the epochs of the run include warm-up and cool-down"""

    name: Literal["cosine", "tanh", "poly", "step", "multistep", "plateau", "onecycle", "wsd", "constant"] = "cosine"
    """Shape of the schedule. plateau decays when the validated metric stops rising, onecycle warms up along a cosine
    too."""
    warmup_epochs: NonNegativeFloat = 2
    """Epochs of linear warm-up, the first of the run."""
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at the start of the warm-up."""
    warmup_prefix: bool = False
    """Start the shape after the warm-up, not with the run: the first update at the peak is then the shape's first. wsd
    and onecycle always do."""
    cooldown_epochs: NonNegativeInt = 0
    """Last epochs of the run, held at min_lr; the shape ends before them (not for step, multistep, plateau,
    constant)."""
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate at the end, and the least one of plateau."""
    decay_epochs: PositiveFloat | None = None
    """Epochs between decays (step), or of the decay at the end (wsd); null: 90 (step), a fifth (wsd)."""
    decay_milestones: tuple[PositiveInt, ...] = (30, 60, 90)
    """Epochs at which the rate decays (multistep)."""
    decay_rate: PositiveFloat = 0.1
    """Factor of a decay (step, multistep, plateau), or the power (poly)."""
    patience_epochs: NonNegativeInt = 10
    """Epochs without gain that plateau waits before it decays."""


@dataclass
class EmaConfig:
    """Moving average of the weights, which is then what is validated and kept"""

    decay: ClosedUnitInterval = 0.0
    """Decay at every update, such as 0.9998; 0: off."""
    warmup: bool = True
    """Let the decay grow from 0, so that early weights are soon forgotten."""


@dataclass
class DistillConfig:
    """Distillation from a teacher"""

    model: str = ""
    """Teacher, a model of this package or else of timm; empty: none. A model whose paper says how it learns from a
    teacher does that, and takes no more than the next two options."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of create_model for the teacher."""
    checkpoint: str = ""
    """Weights of the teacher; empty: its published ones."""
    alpha: ClosedUnitInterval = 0.5
    """Share of the teacher's logits in the loss; the labels have the rest."""
    temperature: PositiveFloat = 1.0
    """Temperature of both softmaxes of the soft distillation."""
    hard: bool = False
    """Learn the teacher's top class in place of its probabilities."""
    features: NonNegativeFloat = 0.0
    """Weight of a term that draws the pooled features, through a learned linear map, to the teacher's; 0: off."""
    feature_loss: Literal["cosine", "mse"] = "cosine"
    """Distance of the features: one minus their cosine, or mean squared error of normalised features."""


@dataclass
class GuardConfig:
    """What happens when loss or gradients are not finite: such an update is skipped, counted and logged"""

    max_bad_steps: PositiveInt = 10
    """Skipped updates in a row after which the run has diverged."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """Stop a run that has diverged, or go on from its last checkpoint with a lower learning rate."""
    rollback_lr_factor: OpenUnitInterval = 0.5
    """Factor on the learning rate at every rollback."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks after which the run stops."""


@dataclass
class TrainConfig(TaskConfig):
    """Model and run"""

    freeze: tuple[str, ...] = ()
    """Parts of the model that do not learn, such as [stem, stages.0, blocks.0-5]; backbone: all but the head. They run
    as in validation: batch norms keep their statistics and nothing is dropped, before the head alone by drop_rate."""
    epochs: PositiveInt = 40
    """Passes over the training images."""
    seed: NonNegativeInt = 0
    """Sample order, augmentation and initial weights follow from it."""
    sync_bn: bool = False
    """Share the statistics of batch norms between processes."""
    sigma_reparam: bool = False
    """Learn the spectral norm of each weight of linear maps and ungrouped convolutions apart from the rest of it, which
    keeps attention from collapsing at high rates. Checkpoints load into plain models."""
    sigma_gamma: Literal["norm", "one"] = "norm"
    """Where sigma_reparam's norms start; norm: at those of the weights that it starts from."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    early_stopping: NonNegativeInt = 0
    """Stop after so many epochs without gain in the validated metric; 0: never."""
    output: str = "runs"
    """Folder that holds the run folders."""
    name: str = ""
    """Name of the run folder, numbered if it is taken; empty: <model>-<data>, or <model>-<head>-<data>."""
    save_every: NonNegativeInt = 0
    """Save the last checkpoint every so many updates too; 0: at the end of each epoch only."""
    keep_best: PositiveInt = 1
    """Epochs whose weights are kept, by the validated metric: as best, and if more than one, each as epoch-<number>."""
    pointwise: Literal["auto", "linear", "conv"] = "auto"
    """How products over channels are computed in float32 on CPUs, see set_pointwise; auto: the faster way, measured
    when the run begins, and kept for the whole of it as the two round differently."""
    log_every: PositiveInt = 10
    """Updates between loss values sent to the progress bar and the trackers."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics are sent besides metrics.csv: any trackers of accelerate, such as tensorboard, wandb, mlflow."""
    monitor: Literal["none", "attention"] = "none"
    """What of the model is watched as it trains; attention: entropy and largest logit of every head, and how large and
    how peaked what its layers return is, for the trackers and metrics.csv."""
    monitor_every: PositiveInt = 100
    """Updates between looks at what is watched; the last update of each epoch, which metrics.csv tells of, is one."""
    profile: str = ""
    """Window of updates, such as 10-20, whose trace by torch.profiler is written to the run folder."""
    report: bool = True
    """Write report.html at the end: curves, and what the best weights make of the validation images, read once
    more. A failure of it is none of the run; `visionattn report` writes it later."""
    dry_run: bool = False
    """Tell parameters, GMACs, peak memory, images/s and the time the run would take, and leave nothing on disk."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            raise VisionattnError(f"option name: expected that of a folder in {self.output}, got {self.name!r}")
        window = re.fullmatch(r"(\d+)-(\d+)", self.profile)
        if self.profile and (window is None or int(window[1]) >= int(window[2])):
            raise VisionattnError(f"option profile: expected a window of updates such as 10-20, got {self.profile!r}")
        if self.loss.multi_label and self.distill.model:
            raise VisionattnError(
                "loss.multi_label goes without distillation, whose teachers choose one class: leave out distill.model"
            )


@dataclass
class ProbingConfig:
    """Probe of frozen features"""

    epochs: PositiveInt = 90
    """Passes over the features, of linear and attentive; what is told is of the best one."""
    lr: PositiveFloat = 0.1
    """Peak learning rate for 256 images, to which that of a batch is in proportion; small data wants more."""
    batch_size: PositiveInt = 256
    """Features of an update."""
    queries: PositiveInt = 32
    """Queries of attentive; must divide the channels."""
    tokens: Literal["auto", "class", "mean", "patches", "all"] = "auto"
    """Features of the last block: the class token or the mean, for knn and linear; the patches, or all with the class
    token, for attentive. auto: the class token where there is one, else the mean; the patches."""
    k: tuple[PositiveInt, ...] = (5, 10, 15, 20, 50, 100, 200)
    """Neighbours that vote in knn; each is tried, with each temperature."""
    temperature: tuple[PositiveFloat, ...] = (0.07, 0.1, 0.2)
    """Temperatures of the weight of a vote in knn."""
    folder: str = "runs/probes"
    """Where features are kept, for the next probe of the same weights and images, and trained probes are saved."""

    def __post_init__(self) -> None:
        for name in ("k", "temperature"):
            if not getattr(self, name):
                raise VisionattnError(f"probing.{name} is empty: give at least one")


@dataclass
class ValidateConfig(TaskConfig):
    """Model and output"""

    checkpoint: str = ""
    """Weights to validate; several as a pattern or with commas, such as 'runs/*/checkpoints/best.safetensors'. What
    train.py saved also says which task, model, data and preparation it belongs to."""
    model: str = ""
    """Model to validate; several as a pattern or with commas, such as 'van_*'; empty: the checkpoint's."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of create_model; empty: the checkpoint's."""
    pretrained: bool = False
    """Validate the published weights of the model."""
    fuse: bool = False
    """Merge batch norms into their neighbours first."""
    int8: bool = False
    """Run with int8 weights, on a CPU, see quantize."""
    probe: Literal["knn", "linear", "attentive"] | None = None
    """Judge the features of the model, whose own classifier is left out, by a probe that learns from the training
    images: k nearest neighbours, a linear classifier, or one of attentive pooling. Takes models of timm too, as
    timm/<name>. Where data bring no images to validate on, data.val_fraction 1 counts as 0.2."""
    output: str = ""
    """Also write the results to this file: .json holds those of this command, with each class's accuracy; to a .csv
    every model adds a row."""
    tta: TtaConfig = field(default_factory=TtaConfig)
    probing: ProbingConfig = field(default_factory=ProbingConfig)


FIXED = (
    *("task", "model", "head", "pretrained", "checkpoint", "loss.multi_label", "output", "name"),
    *("sigma_reparam", "sigma_gamma"),
)
"""Options of which a run that is resumed can make no other use."""


@cache
def _made_parser(config: type) -> ArgumentParser:
    if config is ValidateConfig:
        parser = make_parser(config, "validate.py", "Validate a checkpoint, or a model's published weights.")
        parser.set_defaults({"data.crop_pct": None, "data.val_fraction": 1.0})  # where nothing was trained on the rest
        return parser
    parser = make_parser(
        config,
        "train.py",
        "Train a vision backbone; without arguments, on handwritten digits. After SIGTERM or SIGINT the run is saved "
        "and the exit code 143 or 130; it is 2 where options, data or disk are at fault.",
    )
    parser.add_argument("--resume", type=str, help="Continue the run in this folder, with the options it began with.")
    return parser


def _parser(config: type) -> ArgumentParser:
    parser = _made_parser(config)
    (task,) = (action for action in parser._actions if action.dest == "task")
    task._typehint, task.metavar = Literal[tuple(TASKS)], f"{{{','.join(TASKS)}}}"  # those that are known by now
    return parser


def parse_train(argv: list[str]) -> tuple[TrainConfig, Path | None]:
    """Read train.py's command line into the options and the run folder to resume, if any."""
    parser = _parser(TrainConfig)
    resume = next((Path(folder) for folder in reversed(values_of("--resume", argv))), None)
    if resume:
        if not (resume / "config.yaml").is_file():
            raise VisionattnError(f"cannot resume {resume}: not a run folder of train.py (it has no config.yaml)")
        begun = ["--config", str(resume / "config.yaml")]
        config = brought = parse(parser, TrainConfig, begun)
        if any(argument.startswith("--") and not argument.startswith("--resume") for argument in argv):
            config = parse(parser, TrainConfig, [*begun, *argv])
        changed = [name for name in FIXED if any(given(config, brought, name))]
        for group in ("model_kwargs", "head_kwargs"):
            both = (getattr(each, group) for each in (config, brought))
            changed += [f"{group}.{name}" for name in differing(*both)]
        if changed:
            raise VisionattnError(f"option {changed[0]} cannot change when {resume} is resumed: leave it out")
        refuse(useless(config, brought))
        return config, resume
    config = parse(parser, TrainConfig, argv)
    in_all = useless(config, TrainConfig())
    if not in_all:
        return config, None
    files = values_of("--config", argv)
    in_files = parse(parser, TrainConfig, [f"--config={file}" for file in files])
    refuse(useless(config, in_files))
    # What a recipe sets may be of no use since a later one, or the command line, switches off what it belongs to.
    own = set().union(*map(_own_options, files)) & in_all.keys()
    refuse({name: why for name, why in useless(in_files, TrainConfig()).items() if name in own})
    return config, None


def _own_options(file: str) -> set[str]:
    """Names of the options in a file, without its bases; none of the files of run folders, which hold every option."""
    options = read_file(Path(file), f"cannot read {file}")
    if {each.name for each in fields(TrainConfig)} <= options.keys():
        return set()
    groups = {key: value for key, value in options.items() if isinstance(value, dict)}
    return options.keys() | {f"{group}.{key}" for group, values in groups.items() for key in values}


def options_of(checkpoint: str, read: Callable = read_described) -> dict[str, Any]:
    """The options of validate.py that a checkpoint brings, without what is the machine's it was trained on.

    Args:
        checkpoint: its file.
        read: gives what its header says and what it holds.
    """
    known = ("task", "model", "model_kwargs", "head", "head_kwargs", "precision", "data", "annotations", "joint")
    description, _ = read(checkpoint)
    options = {key: description[key] for key in known if key in description}
    if isinstance(data := options.get("data"), dict):
        options["data"] = {key: value for key, value in data.items() if key != "num_workers"}
    return options


def parse_validate(argv: list[str], describe: Callable[[str], dict[str, Any]]) -> ValidateConfig:
    """Read validate.py's command line; `describe(checkpoint)` gives the options a checkpoint brings as defaults."""
    parser = _parser(ValidateConfig)
    config = parse(parser, ValidateConfig, argv)
    if config.checkpoint and (brought := describe(config.checkpoint)):
        config = parse(parser, ValidateConfig, argv, (config.checkpoint, brought))
    return config
