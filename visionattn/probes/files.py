"""Probes on the disk."""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from ..errors import user_input
from ..weights import convert_state_dict
from ..weights.files import read_checkpoint, write_checkpoint
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
