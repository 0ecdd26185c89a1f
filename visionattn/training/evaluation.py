"""Validation: during training, and of any checkpoint."""

import fnmatch
import glob
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader

from ..backbone import Backbone
from ..create import describe_place, is_place
from ..data.loader import eval_loader, read_batches
from ..errors import VisionattnError, all_lines, printable, user_input
from ..registry import list_models
from ..tasks import TASKS, make_task
from ..tasks.task import Metrics
from ..tasks.useless import refuse, useless
from ..weights import load_checkpoint
from ..weights.description import read_described, read_description
from .config import ValidateConfig, parse_validate
from .results import ResultFile


@torch.no_grad()
def evaluate(
    predict: Callable[[Any], Any],
    loader: DataLoader,
    accelerator: Accelerator,
    metrics: Metrics,
    after_batch: Callable[[Any, Any, Any], None] = lambda images, targets, outputs: None,
) -> dict[str, float]:
    """Metrics of a model over the loaders of all processes, which fail together if one of them does.

    Args:
        predict: Makes of images what the metrics count.
        loader: This process's images.
        accelerator: The run's accelerator.
        metrics: What counts, new.
        after_batch: Called with images, targets and outputs after each batch.
    """
    try:
        for batch in read_batches(loader):
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


def image_mode(model: nn.Module) -> str:
    """What images are converted to for the model."""
    channels = getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise VisionattnError(
            f"images have 3 channels, or 1 in grey: a model with in_chans {channels} cannot take them"
        )
    return "L" if channels == 1 else "RGB"


def options_of(checkpoint: str) -> dict[str, Any]:
    """The options of validate.py that a checkpoint brings."""
    return options_in(read_description(checkpoint))


def options_in(description: Mapping[str, Any]) -> dict[str, Any]:
    """The options of validate.py in what a checkpoint's header says."""
    known = ("task", "model", "model_kwargs", "head", "head_kwargs", "precision", "data", "annotations", "joint")
    return {key: description[key] for key in known if key in description}


def validate_all(config: ValidateConfig, argv: list[str]) -> None:
    """Run validate.py: for each model that the options name; one that fails does not stop the others.

    Args:
        config: The options without those that checkpoints bring.
        argv: The command line.

    Raises:
        VisionattnError: if there is nothing to validate, or at the end if a model failed.
    """
    choices = _choices(config)
    if choices is None:
        _validate(argv)
        return
    output = ResultFile(config.output, many=True) if config.output else None
    main, failed = make_accelerator("no").is_main_process, 0
    for choice in choices:
        try:
            _validate([*argv, f"--{choice}"], output)
            if main:
                print(flush=True)
        except Exception as error:  # whatever a model, a file or the device raises is the failure of that model
            failed += 1
            if main:
                print(f"error: {printable(choice.partition('=')[2])}: {all_lines(error)}", file=sys.stderr, flush=True)
    if failed:
        raise VisionattnError(f"{failed} of {len(choices)} models failed")


def _validate(argv: list[str], output: ResultFile | None = None) -> None:
    """Validate the model of a command line, whose checkpoint is read once."""
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def options_of_held(checkpoint: str) -> dict[str, Any]:
        held.append(read_described(checkpoint))
        return options_in(held[0][0])

    config = parse_validate(argv, options_of_held)
    validate(config, output, *held)


def validate(
    config: ValidateConfig,
    output: ResultFile | None = None,
    held: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Validate one model: build what the options and the checkpoint say, print and write the results.

    Args:
        config: The options, with those that the checkpoint brings.
        output: File to write to; None for what the options name.
        held: What the header of the checkpoint says and what it holds, where it has been read already.

    Returns:
        The metrics that training records.
    """
    if not config.model:
        told = f"{config.checkpoint} does not say which model it belongs to: add" if config.checkpoint else "give"
        raise VisionattnError(
            f"nothing to validate: {told} --model" + ("" if config.checkpoint else " or --checkpoint")
        )
    description, content = held or (read_described(config.checkpoint) if config.checkpoint else ({}, {}))
    own = [f"--checkpoint={config.checkpoint}"] if config.checkpoint else []
    refuse(useless(config, parse_validate(own, lambda _: options_in(description))))
    if output is None and config.output:
        output = ResultFile(config.output)
    classes = description.get("classes")
    named = not config.checkpoint and is_place(config.model)
    if named and (of := describe_place(config.model, weights=False).task) != "classification":
        raise VisionattnError(f"{config.model} is of {of}: give it as --checkpoint")
    kwargs = dict(config.model_kwargs)
    prefix = kwargs.pop("checkpoint_prefix", "") if config.checkpoint else ""
    task = make_task(replace(config, checkpoint="", model_kwargs=kwargs))
    images = task.load_validation(classes)
    of_images = TASKS[config.task].sample == "class"  # whose models have classes of their own, and perhaps further ones
    model = task.create_model(None if of_images else len(images.classes))
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint, prefix, content)
    elif named:
        classes = model.pretrained_cfg.get("label_names")
    parameters = sum(p.numel() for p in model.parameters())
    data, mode = task.resolve(model).data, image_mode(model)
    accelerator = make_accelerator("no")  # the predictor sees to the precision, which differs from model to model
    device = accelerator.device
    validation = task.make_validation(_as_run(model, config, device), images, classes)
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = data.eval_batch_size, mode, data.num_workers, rank, processes
    loader = eval_loader(images, validation.transform, *share, task.collate(False))
    reset_peak_memory(device)
    watch = Stopwatch()
    results = evaluate(
        validation.predict, loader, accelerator, validation.metrics, lambda batch, *_: watch.lap(len(batch))
    )
    speeds, memory = accelerator.gather(torch.tensor([[watch.speed, peak_memory(device)]], device=device)).T
    if not accelerator.is_main_process:
        return results

    figures = results | validation.metrics.details()
    per_class = dict(zip(images.classes, validation.metrics.per_class(), strict=False))  # the data has no further ones
    record = {
        "model": task.made[0],
        **({"head": config.head} if config.head else {}),
        "weights": config.checkpoint or _weights(config),
        "parameters": parameters,
        "data": images.name,
        "images": len(images),
        **validation.facts,
        **{option: getattr(config, option) for option in ("precision", "compile", "channels_last", "fuse")},
        **figures,
        "images_per_second": speeds.sum().item(),
        "peak_memory_mib": memory.max().item(),
        "per_class": per_class,
    }
    is_part = of_images and len(images) < len(images.source)
    _print(
        record, f" of {len(images.source)} (data.val_fraction)" if is_part else "", validation.lines(figures, per_class)
    )
    if output:
        output.add(record)
    return results


def _weights(config: ValidateConfig) -> str:
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


def _print(record: dict[str, Any], held_out: str, figures: list[tuple[str, str]]) -> None:
    views = f", {record['views']} views of each" if record.get("views", 1) > 1 else ""
    head = f" with {record['head']}" if "head" in record else ""
    lines = [
        ("model", f"{record['model']}{head} ({record['parameters'] / 1e6:.2f} M parameters)"),
        ("weights", record["weights"]),
        ("images", f"{record['images']}{held_out} from {record['data']}{views}"),
        *figures,
        ("images/s", f"{record['images_per_second']:.1f}"),
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
