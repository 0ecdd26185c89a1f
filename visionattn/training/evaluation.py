"""Validation: during training, and of any checkpoint."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from ..data.config import user_input
from ..data.datasets import load_validation
from ..data.loader import eval_loader, read_batches
from ..data.transforms import eval_transform, resolve_preprocessing
from ..errors import VisionattnError
from ..registry import create_model
from ..tasks.classification import ClassificationMetrics
from ..weights import load_checkpoint
from .checkpoint import read_description, write_text
from .config import ValidateConfig


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Metrics of the model over the loaders of all processes."""
    model.eval()
    metrics = ClassificationMetrics()
    for images, targets in read_batches(loader):
        images, targets = (x.to(accelerator.device, non_blocking=True) for x in (images, targets))
        with accelerator.autocast():
            logits = model(images)
        metrics.update(logits.float(), targets)
    sums = metrics.sums
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device))
    return metrics.compute(sums)


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


def validate(config: ValidateConfig) -> dict[str, float]:
    """Run validate.py: build what the options and the checkpoint say, print and return the results."""
    if not config.model:
        told = f"{config.checkpoint} does not say which model it belongs to: add" if config.checkpoint else "give"
        raise VisionattnError(
            f"nothing to validate: {told} --model" + ("" if config.checkpoint else " or --checkpoint")
        )
    classes = read_description(config.checkpoint).get("classes") if config.checkpoint else None
    images = load_validation(config.data, classes)
    model = create_model(config.model, pretrained=config.pretrained, **config.model_kwargs)
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint)
    expected = len(classes or images.classes)
    if model.num_classes != expected:
        raise VisionattnError(f"{config.model} tells {model.num_classes} classes apart, {images.name} has {expected}")
    data, mode = resolve_preprocessing(config.data, model), image_mode(model)
    accelerator = make_accelerator(config.precision)
    model.to(accelerator.device)
    loader = eval_loader(
        images,
        eval_transform(data),
        data.eval_batch_size,
        mode,
        data.num_workers,
        accelerator.process_index,
        accelerator.num_processes,
    )
    start = time.time()
    results = evaluate(model, loader, accelerator)
    seconds = time.time() - start
    if accelerator.is_main_process:
        origin = config.checkpoint or ("published weights" if config.pretrained else "random weights")
        print(f"model      {config.model} ({sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters)")
        print(f"weights    {origin}\nimages     {len(images)} from {images.name}")
        print(
            f"top-1      {results['top1']:.4f} %\ntop-5      {results['top5']:.4f} %\nloss       {results['loss']:.6f}"
        )
        print(f"images/s   {len(images) / seconds:.1f}")
        if config.output:
            record = {"model": config.model, "weights": origin, "data": images.name, "images": len(images)}
            record |= results | {"images_per_second": len(images) / seconds}
            with user_input(f"cannot write {config.output}", OSError):
                write_text(Path(config.output), json.dumps(record, indent=2) + "\n")
    return results
