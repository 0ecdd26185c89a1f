"""Probes of frozen features by `validate.py --probe`: k nearest neighbours, a linear and an attentive classifier."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.images import ImageSet, load_datasets
from ..data.labels import labels_of
from ..data.loader import Stream, choose_workers, derive_seed, eval_loader, read_batches
from ..data.transforms import preprocessing
from ..errors import UnknownModelError, VisionattnError, user_input
from ..probes.features import Stored, fingerprint, frozen_features, has_class_token, key_of, stored
from ..probes.files import save_apart
from ..probes.heads import AttentiveProbe, LinearProbe
from ..probes.knn import neighbours, votes
from ..probes.protocol import fit
from ..progress import track
from ..tasks import make_task
from ..tasks.classification import ClassificationMetrics
from ..tasks.task import Task, autocast, image_mode
from ..weights import load_checkpoint
from ..weights.description import is_place, read_described
from .config import ProbingConfig, ValidateConfig
from .evaluation import (
    ResultFile,
    Stopwatch,
    make_accelerator,
    peak_memory,
    print_record,
    read_checked,
    reset_peak_memory,
    weights_of,
)

TIMM = "timm/"
"""What the names of timm's models begin with, which may also be given without it where we have no such model."""
TOKENS = {"knn": ("class", "mean"), "linear": ("class", "mean"), "attentive": ("patches", "all")}
"""The features that each probe takes."""
Found = tuple[dict[str, Any], list[tuple[str, str]], dict[str, dict]]
"""What a probe found: entries of the record, lines to print, and figures of each class."""


def probe(config: ValidateConfig, output: ResultFile | None = None, read: Callable = read_described) -> dict[str, Any]:
    """Judge the features of one model by a probe: print and write the results, and save what was trained.

    Args:
        config: the options, with those that the checkpoint brings.
        output: file to write to; None for what the options name.
        read: as for `validate`.

    Returns:
        what is written to the file of results.

    Raises:
        VisionattnError: if the options name no images to learn from, no such features, or what `validate` refuses.
    """
    _, content = read_checked(config, read)
    if output is None and config.output:
        output = ResultFile(config.output)
    accelerator = make_accelerator("no")
    if accelerator.num_processes > 1:
        raise VisionattnError("a probe runs in one process: start validate.py without accelerate launch")
    config = replace(config, data=_with_training_images(config.data))
    train_images, val_images = load_datasets(config.data)
    name, kwargs, task, model = _make_model(config, content)
    kind = _kind(config, name, model)
    data, classes = task.resolve(model).data, train_images.classes
    config = replace(config, data=data)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.eval().to(accelerator.device, memory_format=layout)
    reset_peak_memory(accelerator.device)
    sides, watch = {"train": train_images, "validation": val_images}, Stopwatch()
    about = {"model": name, "model_kwargs": kwargs, "features": kind, "precision": config.precision}
    about |= {"preprocessing": preprocessing(data), "root": data.root and str(Path(data.root).resolve())}
    digest = key_of(model, about)
    keys = {split: f"{digest}-{fingerprint(images)[:16]}" for split, images in sides.items()}
    with user_input(f"features of {name}", AssertionError):  # timm's models of one size
        train, val = (
            _stored(config, task, model, kind, keys[split], images, about | {"split": split}, watch)
            for split, images in sides.items()
        )
    record = {
        "model": name,
        "probe": config.probe,
        "features": kind,
        "dim": train.features.shape[-1],
        "weights": weights_of(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": val_images.name,
        "train_images": len(train_images),
        "images": len(val_images),
        "classes": len(classes),
        "input_size": task.input_size(),
        "crop_pct": data.crop_pct,
        "precision": config.precision,
    }
    if config.probe == "knn":
        figures, lines, per_class = _nearest(config.probing, train, val, classes, accelerator.device)
    else:
        figures, lines, per_class = _trained(config, train, val, classes, about | {"stored": keys}, accelerator.device)
    record |= figures | {
        "images_per_second": watch.speed,
        "peak_memory_mib": peak_memory(accelerator.device),
        "per_class": per_class,
    }
    taken = {"class": "class token", "mean": "mean", "patches": "patches", "all": "class token and patches"}[kind]
    told = f"{config.probe}, on the {taken} of the last block ({record['dim']} channels)"
    is_part = len(val_images) < len(val_images.source) and train_images.source is val_images.source
    held_out = f" of {len(val_images.source)} (data.val_fraction)" if is_part else ""
    print_record(record, held_out, [("probe", told), ("trained on", f"{len(train_images)} images"), *lines])
    if output:
        output.add(record)
    return record


def _with_training_images(data: DataConfig) -> DataConfig:
    """Hold images out as train.py does, where all would be validated on."""
    if labels := labels_of(data):
        raise VisionattnError(f"a probe tells one class of each image, and these have several ({labels})")
    return data if data.val_fraction < 1 else replace(data, val_fraction=DataConfig.val_fraction)


def _make_model(config: ValidateConfig, content: dict[str, Any]) -> tuple[str, dict[str, Any], Task, nn.Module]:
    """Name, all arguments, task and model, with its weights."""
    kwargs = dict(config.model_kwargs)
    prefix = kwargs.pop("checkpoint_prefix", "") if config.checkpoint else ""
    task = make_task(replace(config, checkpoint="", model_kwargs=kwargs))
    name = config.model.removeprefix(TIMM)
    torch.manual_seed(derive_seed(0, Stream.MODEL))  # so that features of random weights are found again
    try:
        if name != config.model:
            raise UnknownModelError(f"timm has no model {name}: timm.list_models() names them")
        model, (name, made) = task.create_model(None), task.made
        kwargs = made | kwargs  # a file says some itself
    except UnknownModelError:
        if not timm.is_model(name):
            raise
        name = TIMM + name
        with user_input(f"model {name}", Exception):  # timm raises whatever it meets on the way
            model = timm.create_model(name.removeprefix(TIMM), pretrained=config.pretrained, **kwargs)
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint, prefix, content)
    return name, kwargs, task, model


def _kind(config: ValidateConfig, name: str, model: nn.Module) -> str:
    """The features that the probe takes."""
    known, tokens = TOKENS[config.probe], config.probing.tokens
    if tokens == "auto":
        return known[0] if config.probe == "attentive" or has_class_token(model) else known[1]
    if tokens not in known:
        raise VisionattnError(f"option probing.tokens: --probe {config.probe} takes {' or '.join(known)}, got {tokens}")
    if tokens in ("class", "all") and not has_class_token(model):
        other = "mean" if tokens == "class" else "patches"
        raise VisionattnError(f"option probing.tokens: {name} has no class token for {tokens}: take {other}")
    return tokens


def _stored(
    config: ValidateConfig,
    task: Task,
    model: nn.Module,
    kind: str,
    key: str,
    images: ImageSet,
    about: dict[str, Any],
    watch: Stopwatch,
) -> Stored:
    """Features of images, of the disk if they are there."""
    data, device = config.data, next(model.parameters()).device
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    loader = eval_loader(
        images,
        task.transform(False),
        data.eval_batch_size,
        image_mode(model),
        choose_workers(data.num_workers, device),
        folder=data.root if data.name == "folder" else None,
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in track(read_batches(loader), f"features of {about['split']}", len(loader)):
            x = batch.images.to(device, non_blocking=True).contiguous(memory_format=layout)
            with autocast(device, config.precision):
                made = frozen_features(model, x, kind)
            yield made.float() if config.precision == "no" else made.half(), batch.targets
            watch.lap(len(batch.images))

    path = Path(config.probing.folder, "features", key)
    return stored(path, len(images), batches(), about | {"images": images.name})


def _nearest(options: ProbingConfig, train: Stored, val: Stored, classes: list[str], device: torch.device) -> Found:
    """What the nearest neighbours vote for, by every number and temperature; the first of the best ones is told."""
    counts = sorted(k for k in set(options.k) if k <= len(train.labels))
    if not counts:
        raise VisionattnError(f"option probing.k: {min(options.k)} neighbours of {len(train.labels)} training images")
    sides = (side.features.to(device).float() for side in (train, val))
    cosines, nearest = (each.cpu() for each in neighbours(*sides, counts[-1]))
    found, grid = [], {}
    for k in counts:
        for temperature in options.temperature:
            given = votes(cosines[:, :k], nearest[:, :k], train.labels, temperature, len(classes))
            hits = given.topk(min(5, len(classes))).indices == val.labels[:, None]
            top1, top5 = (100 * each.double().mean().item() for each in (hits[:, 0], hits.any(1)))
            found.append((top1, top5, k, temperature, hits[:, 0].double()))
            grid.setdefault(f"k {k}", {})[f"T {temperature:g}"] = top1
    top1, top5, k, temperature, hits = max(found, key=lambda each: each[0])
    per_class = {}
    for label, name in enumerate(classes):
        own = hits[val.labels == label]
        per_class[name] = {"images": len(own), "top1": 100 * own.mean().item() if len(own) else None}
    rows = [(name, ", ".join(f"{of:.2f} ({t})" for t, of in row.items())) for name, row in grid.items()]
    lines = [*rows, ("top-1", f"{top1:.4f} % (k {k}, T {temperature:g})"), ("top-5", f"{top5:.4f} %")]
    return {"k": k, "temperature": temperature, "top1": top1, "top5": top5, "grid": grid}, lines, per_class


def _trained(
    config: ValidateConfig,
    train: Stored,
    val: Stored,
    classes: list[str],
    about: dict[str, Any],
    device: torch.device,
) -> Found:
    """What a classifier recognises that is trained and saved."""
    options = config.probing
    make, queries = LinearProbe, ""
    if config.probe == "attentive":
        make, queries = partial(AttentiveProbe, num_queries=options.queries), f", {options.queries} queries"
    torch.manual_seed(derive_seed(0, Stream.MODEL))
    head = make(train.features.shape[-1], len(classes)).to(device)
    found = fit(head, train, val, options.epochs, options.lr, options.batch_size)
    metrics = ClassificationMetrics(len(classes))
    metrics.update(found.logits, val.labels)
    figures = metrics.compute() | metrics.details()
    about = about | {"probe": config.probe, "classes": classes, "epochs": options.epochs, "lr": options.lr}
    about |= {"batch_size": options.batch_size, "weights": weights_of(config)}
    about |= {"queries": options.queries} if config.probe == "attentive" else {}
    path = Path(options.folder, f"{_file_name(config, about['model'])}-{config.probe}.safetensors")
    path = save_apart(path, head, about, {"epoch": found.epoch} | figures)
    parameters = sum(p.numel() for p in head.parameters())
    lines = [
        ("parameters", f"{parameters} of the probe{queries}"),
        ("epoch", f"{found.epoch} of {options.epochs}, the best"),
        ("top-1", f"{figures['top1']:.4f} %"),
        ("top-5", f"{figures['top5']:.4f} %"),
        ("loss", f"{figures['loss']:.6f}"),
        ("ECE", f"{figures['ece']:.4f} %"),
        ("saved as", str(path)),
    ]
    own = {"epoch": found.epoch, "probe_parameters": parameters, "probe_file": str(path)}
    return own | figures, lines, dict(zip(classes, metrics.per_class(), strict=True))


def _file_name(config: ValidateConfig, model: str) -> str:
    """Model, run and name of its weights, and images, as run folders are called."""
    images = config.data.root if config.data.root is not None else config.data.name or "digits"
    place = config.checkpoint or (config.model if is_place(config.model) else "")
    if place:
        path = Path(place)
        run = path.resolve().parent.parent.name if path.parent.name == "checkpoints" else ""
        weights = f"-{run}" * bool(run) + f"-{path.stem}"
    else:
        weights = "" if config.pretrained else "-random"
    return f"{model.replace('/', '-')}{weights}-{Path(images).resolve().name}".replace(":", "-")
