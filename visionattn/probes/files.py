"""Probes on the disk."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import VisionattnError, user_input
from ..weights import convert_state_dict
from ..weights.files import locked, read_checkpoint, write_checkpoint
from .heads import AttentiveProbe, LinearProbe

ENTRY = "probe"
"""Of the header: what the probe is of."""


def save_probe(path: str | PathLike, probe: LinearProbe, about: Mapping[str, Any]) -> None:
    """Write a probe as safetensors, whole or not at all.

    Args:
        path: of the file.
        probe: the head.
        about: what it is of, JSON's types alone.
    """
    write_checkpoint(path, probe.state_dict(), {"format": "pt", ENTRY: json.dumps(dict(about))})


def save_apart(path: Path, probe: LinearProbe, made_from: Mapping[str, Any], found: Mapping[str, Any]) -> Path:
    """Write a probe under another name where a file made from something else has its own.

    Args:
        path: of the file.
        probe: the head.
        made_from: all that it depends on, JSON's types alone.
        found: what came of it.

    Returns:
        the path that it is at: with a hash of what it is made from at its end, if another probe is at `path`.
    """
    text = json.dumps(dict(made_from), sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    with locked(path):
        if path.exists() and _key_of(path) != key:
            path = path.with_name(f"{path.stem}-{key}{path.suffix}")
        save_probe(path, probe, {**made_from, **found, "key": key})
    return path


def _key_of(path: Path) -> str | None:
    """The hash of what a probe is made from; None if the file is no such probe."""
    with suppress(VisionattnError):
        return load_probe(path)[1].get("key")
    return None


def load_probe(path: str | PathLike) -> tuple[LinearProbe, dict[str, Any]]:
    """A probe in eval mode, and what it is of: the model, its features, the classes.

    Args:
        path: what `save_probe` wrote, or the state dict of a published probe, which says nothing of the latter.

    Raises:
        VisionattnError: if the file cannot be read or is of no probe.
    """
    content, metadata = read_checkpoint(path)
    with user_input(f"{path} holds no probe", LookupError, ValueError, TypeError, AttributeError, RecursionError):
        probe = _made(content)
        if not any(name.endswith("running_mean") for name in content):
            probe.fuse()
        probe.load_state_dict(convert_state_dict(content, probe))
        about = dict(json.loads(metadata.get(ENTRY, "{}")))
    return probe.eval(), about


def _made(content: Mapping[str, Tensor]) -> LinearProbe:
    """The head whose tensors these are."""
    shapes = {name: tuple(tensor.shape) for name, tensor in content.items()}
    if {"queries", "0.cls_token"} & shapes.keys():
        queries, value, head = ("queries", "v", "head") if "queries" in shapes else ("0.cls_token", "0.v", "2")
        (_, count, dim), (out, _), (classes, _) = shapes[queries], shapes[f"{value}.weight"], shapes[f"{head}.weight"]
        return AttentiveProbe(dim, classes, count, dim // out, f"{value}.bias" in shapes)
    classes, dim = shapes["head.weight"]
    return LinearProbe(dim, classes)
