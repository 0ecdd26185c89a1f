"""Validation: during training, and of any checkpoint."""

import csv
import fnmatch
import glob
import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader

from ..backbone import Backbone
from ..data.loader import choose_workers, eval_loader, read_batches
from ..errors import VisionattnError, all_lines, printable, user_input
from ..progress import track
from ..quantize import quantize
from ..registry import list_models
from ..tasks import TASKS, make_task
from ..tasks.task import Metrics, image_mode
from ..tasks.useless import refuse, useless
from ..weights import load_checkpoint
from ..weights.description import describe_place, is_place, read_described
from ..weights.files import locked, write_file
from .checkpoint import without_nan
from .config import ValidateConfig, options_of, parse_validate


@torch.no_grad()
def evaluate(
    predict: Callable[[Any], Any],
    loader: DataLoader,
    accelerator: Accelerator,
    metrics: Metrics,
    after_batch: Callable[[Any, Any, Any], None] = lambda images, targets, outputs: None,
    what: str = "",
) -> dict[str, float]:
    """Metrics of a model over the loaders of all processes, which fail together if one of them does.

    Args:
        predict: makes of images what the metrics count.
        loader: this process's images.
        accelerator: the run's accelerator.
        metrics: what counts, new.
        after_batch: called with images, targets and outputs after each batch.
        what: is being done, to show how far it is; empty where something else tells.
    """
    try:
        batches = read_batches(loader)
        for batch in track(batches, what, len(loader)) if what and accelerator.is_main_process else batches:
            images, targets = send_to_device((batch.images, batch.targets), accelerator.device, non_blocking=True)
            with accelerator.autocast():
                outputs = predict(images)
            metrics.update(outputs, targets)
            after_batch(images, targets, outputs)
    except Exception as error:
        gather_object([all_lines(error)])  # the others would wait for this process's share
        raise
    if told := gather_object([]):
        raise VisionattnError(told[0])
    if accelerator.num_processes > 1:
        metrics.share(gather_object)
    return metrics.compute()


def make_accelerator(precision: str, **kwargs: Any) -> Accelerator:
    """accelerate's front for devices and processes; refuses a precision the device lacks."""
    with user_input("cannot start", ValueError):
        return Accelerator(mixed_precision=precision, **kwargs)


def validate_all(config: ValidateConfig, argv: list[str], one: Callable | None = None) -> None:
    """Run validate.py: for each model that the options name; one that fails does not stop the others.

    Args:
        config: the options without those that checkpoints bring.
        argv: the command line.
        one: does it for one model, called as `validate`, which is the default.

    Raises:
        VisionattnError: if there is nothing to validate, or at the end if a model failed.
    """
    one, choices, held = one or validate, _choices(config), {}
    options_held = partial(options_of, read=lambda path: held.setdefault(path, read_described(path)))
    if choices is None:
        one(parse_validate(argv, options_held), None, held.pop)
        return
    output = ResultFile(config.output, many=True) if config.output else None
    main, failed = make_accelerator("no").is_main_process, 0
    for choice in choices:
        try:
            one(parse_validate([*argv, f"--{choice}"], options_held), output, held.pop)
            if main:
                print(flush=True)
        except Exception as error:  # whatever a model, a file or the device raises is the failure of that model
            failed += 1
            if main:
                print(f"error: {printable(choice.partition('=')[2])}: {all_lines(error)}", file=sys.stderr, flush=True)
    if failed:
        raise VisionattnError(f"{failed} of {len(choices)} models failed")


def validate(
    config: ValidateConfig, output: "ResultFile | None" = None, read: Callable = read_described
) -> dict[str, float]:
    """Validate one model: build what the options and the checkpoint say, print and write the results.

    Args:
        config: the options, with those that the checkpoint brings.
        output: file to write to; None for what the options name.
        read: gives what the header of the checkpoint says and what it holds, which is let go once it is loaded.

    Returns:
        the metrics that training records.
    """
    description, content = read_checked(config, read)
    if output is None and config.output:
        output = ResultFile(config.output)
    classes = description.get("classes")
    named = not config.checkpoint and is_place(config.model)
    kwargs = dict(config.model_kwargs)
    prefix = kwargs.pop("checkpoint_prefix", "") if config.checkpoint else ""
    task = make_task(replace(config, checkpoint="", model_kwargs=kwargs))
    images = task.load_validation(classes)
    of_images = TASKS[config.task].sample == "class"  # whose models have classes of their own, and perhaps further ones
    model = task.create_model(None if of_images else len(images.classes))
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint, prefix, content)
        del content
    elif named:
        classes = model.pretrained_cfg.get("label_names")
    parameters = sum(p.numel() for p in model.parameters())
    data, mode = task.resolve(model).data, image_mode(model)
    accelerator = make_accelerator("no")  # the predictor sees to the precision, which differs from model to model
    device = accelerator.device
    validation = task.make_validation(_as_run(model, config, device), images, classes)
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = data.eval_batch_size, mode, choose_workers(data.num_workers, device, processes), rank, processes
    folder = data.root if data.name == "folder" else None
    loader = eval_loader(images, validation.transform, *share, task.collate(False), folder)
    reset_peak_memory(device)
    watch = Stopwatch()
    results = evaluate(
        validation.predict,
        loader,
        accelerator,
        validation.metrics,
        lambda batch, *_: watch.lap(len(batch)),
        "validating",
    )
    speeds, memory = accelerator.gather(torch.tensor([[watch.speed, peak_memory(device)]], device=device)).T
    if not accelerator.is_main_process:
        return results

    figures = results | validation.metrics.details()
    per_class = dict(zip(images.classes, validation.metrics.per_class(), strict=False))  # the data has no further ones
    record = {
        "model": task.made[0],
        **({"head": config.head} if config.head else {}),
        "weights": weights_of(config),
        "parameters": parameters,
        "data": images.name,
        "images": len(images),
        **validation.facts,
        **{option: getattr(config, option) for option in ("precision", "compile", "channels_last", "fuse", "int8")},
        **figures,
        "images_per_second": speeds.sum().item(),
        "peak_memory_mib": memory.max().item(),
        "per_class": per_class,
    }
    is_part = of_images and len(images) < len(images.source)
    print_record(
        record, f" of {len(images.source)} (data.val_fraction)" if is_part else "", validation.lines(figures, per_class)
    )
    if output:
        output.add(record)
    return results


def read_checked(config: ValidateConfig, read: Callable) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the checkpoint says of its model and what it holds.

    Args:
        config: the options, with those that the checkpoint brings.
        read: as for `validate`.

    Raises:
        VisionattnError: if options name no model, or have no effect.
    """
    if not config.model:
        told = f"{config.checkpoint} does not say which model it belongs to: add" if config.checkpoint else "give"
        raise VisionattnError(
            f"nothing to validate: {told} --model" + ("" if config.checkpoint else " or --checkpoint")
        )
    description, content = read(config.checkpoint) if config.checkpoint else ({}, {})
    own = [f"--checkpoint={config.checkpoint}"] if config.checkpoint else []
    refuse(useless(config, parse_validate(own, partial(options_of, read=lambda _: (description, {})))))
    named = not config.checkpoint and is_place(config.model)
    if named and (of := describe_place(config.model, weights=False).task) != "classification":
        raise VisionattnError(f"{config.model} is of {of}: give it as --checkpoint")
    return description, content


def weights_of(config: ValidateConfig) -> str:
    """Where the weights of the model are from, in words."""
    if config.checkpoint:
        return config.checkpoint
    if is_place(config.model):
        return config.model
    return "published weights" if config.pretrained else "random weights"


def _as_run(model: nn.Module, config: ValidateConfig, device: torch.device) -> nn.Module:
    """The model as the options want it run."""
    model.eval()
    if config.fuse:
        if not isinstance(model, Backbone):
            raise VisionattnError(f"{config.model} has no fuse method: leave out --fuse")
        model.fuse()
    if config.int8:
        if device.type != "cpu" or config.compile or config.precision != "no":
            raise VisionattnError("int8 weights are for CPUs, without --compile and --precision: leave out --int8")
        quantize(model)
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    if config.compile:
        torch.compiler.reset()  # graphs of other models of the class count against its limit
        model.compile()
    return model


def _choices(config: ValidateConfig) -> list[str] | None:
    """`option=value` for each model that patterns and commas stand for; None without any."""
    several = [option for option in ("model", "checkpoint") if _is_several(getattr(config, option))]
    if not several:
        return None
    if len(several) == 2:
        raise VisionattnError("give several models or several checkpoints, not both")
    (option,) = several
    choices = []
    for part in getattr(config, option).split(","):
        if not (found := _matches(option, part, config.pretrained)):
            raise VisionattnError(f"no {option} matches {part}")
        choices += [f"{option}={name}" for name in found]
    return list(dict.fromkeys(choices))


def _is_several(value: str) -> bool:
    return ("," in value or _is_pattern(value)) and not Path(value).exists()


def _is_pattern(value: str) -> bool:
    return any(sign in value for sign in "*?[")


def _matches(option: str, part: str, pretrained: bool) -> list[str]:
    """The names that a part of a list stands for."""
    if not _is_pattern(part):
        return [part]
    if option == "checkpoint":
        return sorted(glob.glob(part, recursive=True))
    if "." in part:  # with the tag of published weights; without it, a model's default ones
        return fnmatch.filter(list_models(pretrained=True), part)
    return sorted({name.partition(".")[0] for name in list_models(part, pretrained)})


def print_record(record: dict[str, Any], held_out: str, figures: list[tuple[str, str]]) -> None:
    """Print what was found of a model.

    Args:
        record: the results.
        held_out: what follows the number of images.
        figures: labels and texts of the lines that are the task's own.
    """
    views = f", {record['views']} views of each" if record.get("views", 1) > 1 else ""
    head = f" with {record['head']}" if "head" in record else ""
    lines = [
        ("model", f"{record['model']}{head} ({record['parameters'] / 1e6:.2f} M parameters)"),
        ("weights", record["weights"]),
        ("images", f"{record['images']}{held_out} from {record['data']}{views}"),
        *figures,
        *([("images/s", f"{record['images_per_second']:.1f}")] if record["images_per_second"] else []),
        ("memory", f"{record['peak_memory_mib']:.0f} MiB"),
    ]
    width = max(len(label) for label, _ in lines)
    print("\n".join(f"{label:{max(width, 10)}} {printable(text)}" for label, text in lines))


class Stopwatch:
    """Images per second, over the full batches after the first, whose time goes to warming up."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.batch_size = self.images = 0
        self.speed = 0.0

    def lap(self, images: int) -> None:
        """Note that a batch of so many images is done."""
        now = time.perf_counter()
        if not self.batch_size:
            self.batch_size, self.speed = images, images / (now - self.start)  # unless another one comes
            self.start = now
        elif images == self.batch_size:
            self.images += images
            self.speed = self.images / (now - self.start)


def reset_peak_memory(device: torch.device) -> None:
    """Start to look for the peak afresh."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux only; elsewhere the peak is that of the process since its start
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory held at once in MiB: tensors on a GPU, else all that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class ResultFile:
    """Results of one or many models, on the disk as soon as they are there.

    JSON holds one object, or with `many` a list, of this command alone. CSV has a row for each model, after the rows
    that the file holds already, and leaves out what is nested.

    Args:
        path: file to write; its suffix says which.
        many: whether there may be several models.
    """

    def __init__(self, path: str | Path, many: bool = False) -> None:
        self.path, self.many = Path(path), many
        self.records: list[dict[str, Any]] = []
        if self.path.suffix not in (".json", ".csv"):
            raise VisionattnError(f"cannot write {path}: expected a name that ends in .json or .csv")
        if not self.path.parent.is_dir():
            raise VisionattnError(f"cannot write {path}: there is no folder {self.path.parent}")
        if self.path.suffix == ".csv":
            self._rows()  # refuses a file of another kind before anything is computed

    def add(self, record: dict[str, Any]) -> None:
        """Write the results of one more model."""
        self.records.append(without_nan(record))
        with locked(self.path):  # other processes may add their rows
            if self.path.suffix == ".json":
                text = json.dumps(self.records if self.many else self.records[-1], indent=2) + "\n"
            else:
                rows = [*self._rows(), {key: value for key, value in record.items() if not isinstance(value, dict)}]
                table = io.StringIO()
                columns = dict.fromkeys(key for row in rows for key in row)  # another version's may be others
                writer = csv.DictWriter(table, list(columns), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                text = table.getvalue()
            write_file(self.path, text)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with user_input(f"cannot read {self.path}", OSError, ValueError, csv.Error):
            table = csv.DictReader(io.StringIO(self.path.read_text(), newline=""), strict=True)
            rows = list(table)
        if "model" not in (table.fieldnames or ["model"]) or any(None in row or None in row.values() for row in rows):
            raise VisionattnError(f"cannot add to {self.path}: it is not a table of results")
        return rows
