"""Validation: during training, and of any checkpoint."""

import fnmatch
import glob
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from ..backbone import Backbone
from ..data.class_maps import match_classes
from ..data.config import user_input
from ..data.datasets import load_validation
from ..data.loader import eval_loader, read_batches
from ..data.transforms import preprocessing, resolve_preprocessing
from ..errors import VisionattnError
from ..registry import create_model, list_models
from ..tasks.classification import ClassificationMetrics, MultiLabelMetrics
from ..weights import load_checkpoint
from .checkpoint import read_description
from .config import ValidateConfig, parse_validate
from .measure import Stopwatch, peak_memory, reset_peak_memory
from .results import ResultFile
from .views import Predictor, Views


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    metrics: ClassificationMetrics | MultiLabelMetrics,
    after_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Metrics of the model over the loaders of all processes, which fail together if one of them does.

    Args:
        model: The model.
        loader: This process's images.
        accelerator: The run's accelerator.
        metrics: What counts, new.
        after_batch: Called with the number of images after each batch.
    """
    model.eval()
    try:
        for images, targets, _ in read_batches(loader):
            images, targets = (x.to(accelerator.device, non_blocking=True) for x in (images, targets))
            with accelerator.autocast():
                logits = model(images)
            metrics.update(logits.float(), targets)
            after_batch(len(images))
    except Exception as error:
        gather_object([_one_line(error)])  # the others would wait for this process's share
        raise
    if told := gather_object([]):
        raise VisionattnError(told[0])
    if accelerator.num_processes > 1:
        metrics.share(lambda sums: accelerator.reduce(sums.to(accelerator.device)).cpu())
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
    description = read_description(checkpoint)
    options = {key: description[key] for key in ("model", "model_kwargs", "precision") if key in description}
    return options | {f"data.{key}": value for key, value in description.get("data", {}).items()}


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
        validate(parse_validate(argv, options_of))
        return
    output = ResultFile(config.output, many=True) if config.output else None
    main, failed = make_accelerator("no").is_main_process, 0
    for choice in choices:
        try:
            validate(parse_validate([*argv, f"--{choice}"], options_of), output)
            if main:
                print(flush=True)
        except Exception as error:  # whatever a model, a file or the device raises is the failure of that model
            failed += 1
            if main:
                print(f"error: {choice.partition('=')[2]}: {_one_line(error)}", file=sys.stderr, flush=True)
    if failed:
        raise VisionattnError(f"{failed} of {len(choices)} models failed")


def validate(config: ValidateConfig, output: ResultFile | None = None) -> dict[str, float]:
    """Validate one model: build what the options and the checkpoint say, print and write the results.

    Args:
        config: The options, with those that the checkpoint brings.
        output: File to write to; None for what the options name.

    Returns:
        The metrics that training records.
    """
    if not config.model:
        told = f"{config.checkpoint} does not say which model it belongs to: add" if config.checkpoint else "give"
        raise VisionattnError(
            f"nothing to validate: {told} --model" + ("" if config.checkpoint else " or --checkpoint")
        )
    if output is None and config.output:
        output = ResultFile(config.output)
    classes = read_description(config.checkpoint).get("classes") if config.checkpoint else None
    images = load_validation(config.data)
    model = create_model(config.model, pretrained=config.pretrained, **config.model_kwargs)
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint)
    parameters = sum(p.numel() for p in model.parameters())
    outputs = match_classes(images, classes, model.num_classes, config.model)
    data, mode = resolve_preprocessing(config.data, model), image_mode(model)
    accelerator = make_accelerator("no")  # the predictor sees to the precision, which differs from model to model
    device = accelerator.device
    loader = eval_loader(
        images,
        Views(data, config.tta),
        data.eval_batch_size,
        mode,
        data.num_workers,
        accelerator.process_index,
        accelerator.num_processes,
    )
    reset_peak_memory(device)
    predictor = _predictor(model, outputs, config).to(device)
    metrics, watch = ClassificationMetrics(len(outputs)), Stopwatch()
    results = evaluate(predictor, loader, accelerator, metrics, watch.lap)
    speeds, memory = accelerator.gather(torch.tensor([[watch.speed, peak_memory(device)]], device=device)).T
    if not accelerator.is_main_process:
        return results

    names = zip(images.classes, metrics.per_class(), strict=False)  # the data has no images of further classes
    record = {
        "model": config.model,
        "weights": config.checkpoint or ("published weights" if config.pretrained else "random weights"),
        "parameters": parameters,
        "data": images.name,
        "images": len(images),
        "classes": len(outputs),
        "input_size": "x".join(map(str, preprocessing(data)["input_size"])),
        "crop_pct": data.crop_pct,
        "views": config.tta.crop_count * (2 if config.tta.flip else 1),
        **{option: getattr(config, option) for option in ("precision", "compile", "channels_last", "fuse")},
        **results,
        "ece": metrics.calibration_error(),
        "images_per_second": speeds.sum().item(),
        "peak_memory_mib": memory.max().item(),
        "per_class": {name: {"images": n, "top1": top1} for name, (n, top1) in names},
    }
    held_out = f" of {len(images.source)} (data.val_fraction)" if len(images) < len(images.source) else ""
    _print(record, model.num_classes, held_out)
    if output:
        output.add(record)
    return results


def _predictor(model: nn.Module, outputs: list[int], config: ValidateConfig) -> Predictor:
    """The model as the options want it run."""
    model.eval()
    if config.fuse:
        if not isinstance(model, Backbone):
            raise VisionattnError(f"{config.model} has no fuse method: leave out --fuse")
        model.fuse()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    if config.compile:
        torch.compiler.reset()  # graphs of other models of the class count against its limit
        model = torch.compile(model)
    return Predictor(model, outputs, config.precision, config.tta.flip, memory_format)


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print(record: dict[str, Any], num_classes: int, held_out: str) -> None:
    views = f", {record['views']} views of each" if record["views"] > 1 else ""
    print(f"model      {record['model']} ({record['parameters'] / 1e6:.2f} M parameters)")
    print(f"weights    {record['weights']}\nimages     {record['images']}{held_out} from {record['data']}{views}")
    if record["classes"] < num_classes:
        print(f"classes    {record['classes']} of the model's {num_classes}, and no others ranked")
    print(f"top-1      {record['top1']:.4f} %\ntop-5      {record['top5']:.4f} %\nloss       {record['loss']:.6f}")
    print(f"ECE        {record['ece']:.4f} %")
    print(f"images/s   {record['images_per_second']:.1f}\nmemory     {record['peak_memory_mib']:.0f} MiB")
