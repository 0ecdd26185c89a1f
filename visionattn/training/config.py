"""The options of train.py and validate.py: typed dataclasses, filled from YAML files and the command line."""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..data.config import AugmentConfig, DataConfig, user_input
from ..errors import VisionattnError
from ..tasks.config import LossConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the text under each field
Config = TypeVar("Config")


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
    """Learning-rate schedule, stepped at every update"""

    name: Literal["cosine", "tanh", "poly", "step", "multistep", "wsd", "constant"] = "cosine"
    """Shape of the schedule after the warm-up."""
    warmup_epochs: NonNegativeFloat = 2
    """Epochs of linear warm-up, the first of the run."""
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at the start of the warm-up."""
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate at the end."""
    decay_epochs: PositiveFloat | None = None
    """Epochs between decays (step), or of the decay at the end (wsd); null: 90 (step), a fifth (wsd)."""
    decay_milestones: tuple[PositiveInt, ...] = (30, 60, 90)
    """Epochs at which the rate decays (multistep)."""
    decay_rate: PositiveFloat = 0.1
    """Factor of a decay (step, multistep), or the power (poly)."""


@dataclass
class EmaConfig:
    """Moving average of the weights, which is then what is validated and kept"""

    decay: ClosedUnitInterval = 0.0
    """Decay at every update, such as 0.9998; 0: off."""
    warmup: bool = True
    """Let the decay grow from 0, so that early weights are soon forgotten."""


@dataclass
class TrainConfig:
    """Model and run"""

    model: str = "test_dinat"
    """Model to train; `visionattn list` names them."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of create_model, such as model_kwargs.drop_path_rate 0.1."""
    pretrained: bool = False
    """Start from the published weights."""
    checkpoint: str = ""
    """Start from the weights in this file."""
    teacher: str = ""
    """Model to learn from, for a model whose paper has it learn from one."""
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of create_model for the teacher."""
    teacher_checkpoint: str = ""
    """Weights of the teacher; empty: its published ones."""
    epochs: PositiveInt = 40
    """Passes over the training images."""
    seed: NonNegativeInt = 0
    """Sample order, augmentation and initial weights follow from it."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    output: str = "runs"
    """Folder that holds the run folders."""
    name: str = ""
    """Name of the run folder, numbered if it is taken; empty: <model>-<data>."""
    save_every: NonNegativeInt = 0
    """Save the last checkpoint every so many updates too; 0: at the end of each epoch only."""
    log_every: PositiveInt = 10
    """Updates between loss values sent to the progress bar and the trackers."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics are sent besides metrics.csv: any trackers of accelerate, such as tensorboard, wandb, mlflow."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)

    def __post_init__(self) -> None:
        if (self.augment.mixup or self.augment.cutmix) and self.data.batch_size % 2:
            raise VisionattnError(f"mixup and cutmix pair images: data.batch_size {self.data.batch_size} is odd")


@dataclass
class ValidateConfig:
    """Model and output"""

    checkpoint: str = ""
    """Weights to validate. What train.py saved also says which model, data and preparation it belongs to."""
    model: str = ""
    """Model to validate; empty: the checkpoint's."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of create_model; empty: the checkpoint's."""
    pretrained: bool = False
    """Validate the published weights of the model."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; a checkpoint of train.py brings its own."""
    output: str = ""
    """Also write the results to this JSON file."""
    data: DataConfig = field(default_factory=DataConfig)


def parse_train(argv: list[str]) -> tuple[TrainConfig, Path | None]:
    """Read train.py's command line into the options and the run folder to resume, if any."""
    parser = _parser(TrainConfig, "train.py", "Train a vision backbone; without arguments, on handwritten digits.")
    parser.add_argument("--resume", type=str, help="Continue the run in this folder, with the options it began with.")
    argv = _arrange(parser, argv)
    if resume := next(reversed(_values_of("--resume", argv)), None):
        run_config = Path(resume) / "config.yaml"
        if not run_config.is_file():
            raise VisionattnError(f"cannot resume {resume}: not a run folder of train.py (it has no config.yaml)")
        argv = ["--config", str(run_config), *argv]
    return _parse(parser, TrainConfig, argv), Path(resume) if resume else None


def parse_validate(argv: list[str], describe: Callable[[str], dict[str, Any]]) -> ValidateConfig:
    """Read validate.py's command line; `describe(checkpoint)` gives the options a checkpoint brings as defaults."""
    parser = _parser(ValidateConfig, "validate.py", "Validate a checkpoint, or a model's published weights.")
    parser.set_defaults({"data.crop_pct": None})
    argv = _arrange(parser, argv)
    config = _parse(parser, ValidateConfig, argv)
    if config.checkpoint:
        parser.set_defaults(describe(config.checkpoint))
        config = _parse(parser, ValidateConfig, argv)
    return config


def to_yaml(config: Any) -> str:
    """Every option with its value, as a file that --config reads."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts of JSON's types."""
    return json.loads(json.dumps(asdict(config)))


def _parser(config: type, prog: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of options; later files and options win.")
    parser.add_class_arguments(config)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--pretrained` alone means true
            action.nargs, action.const = "?", True
    return parser


def _parse(parser: ArgumentParser, config: type[Config], argv: list[str]) -> Config:
    for file in filter(os.path.isfile, _values_of("--config", argv)):  # whose names the parser's errors leave out
        with user_input(f"cannot read {file}", OSError, ValueError, yaml.YAMLError):
            yaml.safe_load(Path(file).read_text())
    try:
        options = parser.parse_args(argv)
        del options["config"]
        options.pop("resume", None)
        return config(**vars(parser.instantiate(options)))
    except argparse.ArgumentError as error:
        raise VisionattnError(_explain(error, parser)) from error


def _arrange(parser: ArgumentParser, argv: list[str]) -> list[str]:
    """Accept dashes for underscores in names, and put files first so that the command line overrides them."""
    files, options = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
        if argument == "--config":
            files += [argument, *([following] if (following := next(arguments, None)) is not None else [])]
        elif argument.startswith("--config="):
            files.append(argument)
        else:
            options.append(argument)
    return files + options


def _values_of(option: str, argv: list[str]) -> list[str]:
    values = []
    for argument, following in pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name == option:
            values.append(value if equals else following)
    return values


def _explain(error: Exception, parser: ArgumentParser) -> str:
    """One line for what the parser refused, with the nearest option that exists."""
    message = " ".join(str(error).split())
    unknown = re.search(
        r"unrecognized arguments: (?P<option>\S+)|Option '(?P<key>[^']+)' is not accepted"
        r"|Group '(?P<group>[^']+)' does not accept option '(?P<member>[^']+)'",
        message,
    )
    if unknown is None:
        message = re.sub(r'^Parser key "([^"]+)": ', r"option \1: ", message)
        return re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.(?=\w)", r"\1", message)
    given = unknown["option"] or unknown["key"] or f"{unknown['group']}.{unknown['member']}"
    if unknown["option"] and not given.startswith("--"):
        return f"unexpected argument {given!r}: options are given as --name value (see --help)"
    key = given.lstrip("-").partition("=")[0]
    known = [a.dest for a in parser._actions if a.option_strings and a.dest not in ("help", "print_config")]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(key, known, 1, 0.7) or difflib.get_close_matches(key, known, 1, 0.5)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, 1, 0.7)
    nearest = by_leaf[leaf[0]] if leaf else near[0] if near else None
    return f"unknown option {given}" + (f"; did you mean --{nearest}?" if nearest else " (see --help)")


def run(main: Callable[[list[str]], None]) -> int:
    """Call a script's main; the exit code, with one line on stderr for what the user can mend."""
    try:
        main(sys.argv[1:])
    except VisionattnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
