"""The run folder and its checkpoints: safetensors only, written so that a crash leaves the last good file.

A checkpoint is the model's weights under its own keys, plus a description of the run in the header. `last.safetensors`
also holds what resuming needs: any nesting of dicts and lists, whose tensors lie under one prefix and whose shape and
scalars are JSON in the header.
"""

import errno
import itertools
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import VisionattnError, user_input
from ..weights.description import plain_name
from ..weights.files import DESCRIPTION, place, read_checkpoint, write_checkpoint, write_file
from ..weights.unwrap import TRAINING_STATE
from .config import TrainConfig
from .yaml_text import to_yaml


def save_checkpoint(
    path: Path, weights: dict[str, torch.Tensor], description: dict[str, Any], state: dict | None = None
) -> None:
    """Write weights, description and, for resuming, the training state."""
    tensors = dict(weights)
    metadata = {"format": "pt", DESCRIPTION: json.dumps(description)}
    if state is not None:
        state_tensors: dict[str, torch.Tensor] = {}
        metadata["training_state"] = json.dumps(_flatten(state, TRAINING_STATE, state_tensors))
        tensors |= state_tensors
    write_checkpoint(path, tensors, metadata)


def link(path: Path, name: Path) -> None:
    """Give a finished file a second name, in place of what has it."""
    if name.exists() and path.samefile(name):  # which a rename would leave alone, and the temporary name too
        return
    temporary = name.with_name(f".{name.name}.tmp")
    with user_input(f"cannot write {name}", OSError):
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        place(temporary, name)


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for nan and infinity, which JSON lacks."""
    bad = {key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in bad else value for key, value in record.items()}


class Saved(NamedTuple):
    """A checkpoint of a run as `read_checkpoint` reads it, once."""

    path: Path
    content: dict[str, Any]
    metadata: dict[str, str]


def read_saved(path: Path) -> Saved:
    """A checkpoint in a run folder.

    Raises:
        VisionattnError: if it is not there or cannot be read.
    """
    if not path.is_file():
        raise VisionattnError(f"cannot resume {path.parents[1]}: it has no checkpoints/{path.name}")
    return Saved(path, *read_checkpoint(path))


def training_state(saved: Saved) -> dict[str, Any]:
    """What `save_checkpoint` was given as state."""
    if "training_state" not in saved.metadata:
        raise VisionattnError(f"cannot resume from {saved.path}: it holds weights only")
    damaged = f"cannot resume from {saved.path}: its training state is not what train.py writes"
    with user_input(damaged, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return _unflatten(json.loads(saved.metadata["training_state"]), saved.content)


def _flatten(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors`; dicts as pairs, since their keys may be numbers."""
    if isinstance(value, torch.Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": [[name, _flatten(item, f"{key}{name}.", tensors)] for name, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{key}{i}.", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    return {name: _unflatten(item, tensors) for name, item in content}


def make_folder(config: TrainConfig, fill: Callable[[Path], None]) -> Path:
    """Make a run folder, which has options and whatever `fill` puts into it from the moment that it is there."""
    images = config.data.root if config.data.name == "folder" else config.data.name
    parts = [plain_name(config.model), config.head, Path(images).resolve().name]
    wanted = Path(config.output, config.name or "-".join(filter(None, parts)))
    hidden = wanted.with_name(f".{wanted.name}.{secrets.token_hex(4)}")  # until it is complete
    with user_input(f"cannot write to {config.output}", OSError):
        try:
            (hidden / "checkpoints").mkdir(parents=True)
            write_file(hidden / "config.yaml", to_yaml(config))
            fill(hidden)
            numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
            return next(filter(None, (_renamed(hidden, path) for path in itertools.chain([wanted], numbered))))
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def _renamed(folder: Path, path: Path) -> Path | None:
    """The folder by its new name, unless there is something of this name, which another run may just have made."""
    try:
        return None if path.exists() else folder.rename(path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return None
        raise


def remove_temporaries(folder: Path) -> None:
    """Remove what a run left that was killed as it wrote a file; safetensors has names of its own for that."""
    for within in (folder, folder / "checkpoints", folder / "predictions"):
        for stale in (*within.glob(".*.tmp"), *within.glob(".tmp??????")):
            if not stale.is_dir():
                stale.unlink()


def remove_unused(folder: Path) -> None:
    """Remove the folder of a run that has come to nothing, if it holds no more than runs begin with."""
    begun = re.compile(r"config\.yaml|metrics\.csv|checkpoints/last\.safetensors|(.*/)?events\.out\.tfevents\.[^/]*")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    if all(map(begun.fullmatch, files)):
        shutil.rmtree(folder)


def keep_best(folder: Path, epochs: list[int], several: bool) -> None:
    """Keep the checkpoints of these epochs and of no others.

    Args:
        folder: run folder.
        epochs: the best ones, in order; the first is kept as best too.
        several: whether they have files of their own; else there is best alone, which is left as it is.
    """
    checkpoints = folder / "checkpoints"
    best = checkpoints / "best.safetensors"
    kept = [checkpoints / f"epoch-{epoch}.safetensors" for epoch in epochs] if several else []
    for path in kept:
        if not path.exists():  # it was best alone, when one was kept
            link(best, path)
    if kept:
        link(kept[0], best)
    for path in set(checkpoints.glob("epoch-*.safetensors")) - set(kept):
        if re.fullmatch(r"epoch-\d+", path.stem):
            path.unlink()
