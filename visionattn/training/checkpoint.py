"""Checkpoints: safetensors only, written so that a crash at any moment leaves the last good file.

A checkpoint is the model's weights under its own keys, plus a description of the run in the header. `last.safetensors`
also holds what resuming needs: any nesting of dicts and lists, whose tensors lie under one prefix and whose shape and
scalars are JSON in the header.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import VisionattnError, user_input
from ..weights.files import DESCRIPTION, place, read_checkpoint, write_checkpoint
from ..weights.unwrap import TRAINING_STATE


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


def write_file(path: Path, content: str | Callable[[BinaryIO], Any]) -> None:
    """Write a small file, whole or not at all: a text, or what a function writes to it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with user_input(f"cannot write {path}", OSError):
        try:
            if isinstance(content, str):
                temporary.write_text(content, errors="backslashreplace")  # names of files need not be text
            else:
                with temporary.open("wb") as file:
                    content(file)
            place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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


def read_training_state(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as state."""
    tensors, metadata = read_checkpoint(path)
    if "training_state" not in metadata:
        raise VisionattnError(f"cannot resume from {path}: it holds weights only")
    damaged = f"cannot resume from {path}: its training state is not what train.py writes"
    with user_input(damaged, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return _unflatten(json.loads(metadata["training_state"]), tensors)


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
