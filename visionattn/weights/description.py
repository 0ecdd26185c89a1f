"""What files and repositories say of their models, checked before anything is built by it.

A checkpoint of train.py or `visionattn convert` has it in its header, a repository in its config.json. Both may come
from anybody: every entry is checked by its type, and sizes by what the file holds. How a model is run, and where its
weights are, is not theirs to say.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.models._hub import _parse_model_cfg
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..arguments import check_types, differing
from ..errors import UnknownModelError, VisionattnError, one_line, told_of
from ..registry import Entry, find
from .download import HUB, fetch, from_hub
from .entries import (
    CONFIG,
    MOST,
    MOST_ROWS,
    PREPARATION,
    check_header,
    check_model,
    check_preparation,
    check_sizes,
    longest_side,
    parse,
)
from .files import DESCRIPTION, find_file, read_checkpoint
from .layouts import check_held, load_pretrained
from .pickled import MOST_TENSORS
from .unwrap import flatten

_logger = logging.getLogger("visionattn")
REPOSITORIES = ("hf-hub", "hf_hub", "local-dir")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")


@dataclass(frozen=True)
class Described:
    """A model as a file or a repository says it is, checked.

    Args:
        place: where it says so, for errors.
        name: of the model, or of the backbone of a detector or segmenter; registered, with or without a tag.
        kwargs: its arguments.
        cfg: entries of timm's configuration.
        entries: the header as a whole; empty for a repository.
        path: of the weights, None for a repository that they have not been fetched from.
        state_dict: the weights.
    """

    place: str
    name: str
    kwargs: dict[str, Any]
    cfg: dict[str, Any]
    entries: dict[str, Any]
    path: Path | None
    state_dict: dict[str, Any] | None

    @property
    def task(self) -> str:
        """Of the model."""
        return self.entries.get("task", "classification")

    @property
    def made_for(self) -> dict[str, Any]:
        """Arguments of the model, with those that its name stands for."""
        return made_for(self.name, self.kwargs)

    def load(self, model: nn.Module) -> None:
        """Load the weights, fitted to the model as `load_pretrained` does."""
        tell_differences(getattr(model, "inner", model), self.made_for, self.path or self.place)
        load_pretrained(model, self.state_dict, self.made_for, self.path)


def made_for(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model, with those that its name stands for.

    Args:
        name: of the model.
        kwargs: given besides.
    """
    variant = find(name)[2].variant
    return (variant.kwargs if variant else {}) | dict(kwargs)


def read_description(path: str | PathLike) -> dict[str, Any]:
    """What the header of a file of ours says of its model; empty for other files.

    Args:
        path: of the file, which is read whole, so that what it says is known to be undamaged.

    Raises:
        VisionattnError: if the file cannot be read, or says what cannot be; says which entry.
    """
    return read_described(path)[0]


def read_described(path: str | PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the header of a file says of its model, as `read_description`, and what the file holds.

    Args:
        path: of the file.
    """
    content, metadata = read_checkpoint(path)
    return entries_of(content, metadata, path), content


def entries_of(content: dict[str, Any], metadata: dict[str, str], path: str | PathLike) -> dict[str, Any]:
    """What a file's header says of its model, checked.

    Args:
        content: what `read_checkpoint` finds in the file.
        metadata: likewise.
        path: of the file.
    """
    place = f"checkpoint {path}"
    entries = parse(metadata.get(DESCRIPTION, "{}"), place)
    check_header(entries, place, longest_side(content))
    return entries


def load_described(model: nn.Module, path: str | PathLike, checkpoint_prefix: str = "") -> None:
    """Load weights to start from, as `load_pretrained`, with what the file's header says of what they were made for.

    Args:
        model: the model to load into; one that is over a backbone takes those of a backbone too.
        path: of the file.
        checkpoint_prefix: where in the file the weights are, if there are several that fit equally well.
    """
    entries, content = read_described(path)
    known = made_for(entries["model"], entries.get("model_kwargs", {})) if "model" in entries else {}
    tell_differences(getattr(model, "inner", model), known, path)
    try:
        load_pretrained(model, content, known, path, checkpoint_prefix)
    except VisionattnError:
        if not hasattr(model, "inner"):
            raise
        load_pretrained(model.inner, content, known, path, checkpoint_prefix)


def tell_differences(model: nn.Module, made_for: Mapping[str, Any], path: str | PathLike) -> None:
    """Log which arguments of a model its weights were made for with others, and which change what is computed.

    Args:
        model: a classifier or backbone.
        made_for: those arguments; empty if they are not known.
        path: of the weights.
    """
    if not made_for or not hasattr(model, "made_as"):
        return
    for name, (own, theirs) in differing(model.made_as, made_for, type(model)).items():
        _logger.warning("%s: made with %s=%r, loaded into a model with %r", Path(path).name, name, theirs, own)


def is_place(name: str) -> bool:
    """Whether a name is that of a file or a repository, which say themselves which model they are of.

    Args:
        name: what `create_model` takes.
    """
    return ":" in name or name.endswith(FILE_SUFFIXES)


def describe_place(name: str, cache_dir: str | None = None, weights: bool = True) -> Described:
    """What a file or a repository says of its model.

    Args:
        name: of the file or repository.
        cache_dir: folder for downloads; None for the usual ones.
        weights: read the weights of a repository too.

    Raises:
        UnknownModelError: if it is neither.
        VisionattnError: if it cannot be read, or what it says cannot be.
    """
    kind = name.partition(":")[0]
    if kind in REPOSITORIES:
        return describe_repository(name, cache_dir, weights)
    if name.endswith(FILE_SUFFIXES):
        return describe_file(name)
    raise UnknownModelError(f"unknown model {name}: expected a name, a file, hf-hub:... or local-dir:...")


def plain_name(name: str) -> str:
    """The registered name of a model that a file or a repository is of; other names as they are.

    Args:
        name: what `create_model` takes.
    """
    return describe_place(name, weights=False).name if is_place(name) else name


def describe_file(path: str | PathLike) -> Described:
    """The model of a file, whose header says which it is.

    Args:
        path: of the file.

    Raises:
        VisionattnError: if the file cannot be read or does not say which model it is of, or what it says cannot be.
    """
    entries, content = read_described(path)
    if "model" not in entries:
        raise VisionattnError(f"{path} does not say which model it is of: give it as checkpoint_path of a name")
    kwargs, classes = dict(entries.get("model_kwargs", {})), entries.get("classes")
    cfg = dict(entries.get("preprocessing", {})) | {"file": str(path), "label_names": classes}
    if "num_classes" in kwargs:
        cfg["num_classes"] = kwargs["num_classes"]
    return Described(f"checkpoint {path}", entries["model"], kwargs, cfg, entries, Path(path), content)


def describe_repository(name: str, cache_dir: str | None = None, weights: bool = True) -> Described:
    """The model of a repository, whose config.json says which it is.

    Args:
        name: `hf-hub:user/repository` or `local-dir:folder`.
        cache_dir: folder for downloads; None for the usual ones.
        weights: fetch and read the weights.

    Raises:
        VisionattnError: if it cannot be read, or says what cannot be; says which entry.
    """
    kind, _, rest = name.partition(":")
    try:
        local = kind == "local-dir"
        config = Path(rest, "config.json") if local else from_hub(f"{rest}:config.json", cache_dir)
        text = config.read_text(encoding="utf-8")
    except Exception as e:  # what the network, the hub and the disk raise is theirs
        raise VisionattnError(f"cannot read the configuration of {name}: {one_line(e)}") from e
    place = f"config.json of {name}"
    content = parse(text, place)
    nested = content.get("pretrained_cfg", content)
    check_types(content, CONFIG, f"{place}: entry ", ": expected")
    group, known = ("", None) if nested is content else ("pretrained_cfg.", PREPARATION)
    check_preparation(nested, f"{place}: entry {group}", known)
    source = {"file": rest, "source": kind} if local else {"hf_hub_id": rest, "source": "hf-hub"}
    with told_of(place, Exception):
        cfg, architecture, kwargs = _parse_model_cfg(content, source)
    cfg = {k: v for k, v in cfg.items() if k in PREPARATION}
    path = state_dict = None
    if weights:
        path = find_file(rest) if local else fetch([], [HUB + rest], name, cache_dir=cache_dir)
        state_dict = read_checkpoint(path)[0]
    longest = MOST_ROWS if state_dict is None else longest_side(state_dict)
    check_model(architecture, kwargs, place, "model_args", longest)
    check_sizes(cfg.get("num_classes", 0), f"{place}: entry num_classes", longest)
    return Described(place, architecture, dict(kwargs), cfg, {}, path, state_dict)


def check_made(described: Described, make: Callable[[], nn.Module]) -> None:
    """Refuse a description that does not make the model whose tensors the file holds, without making it.

    Args:
        described: what the file or repository says.
        make: makes the model without weights; called on the meta device.

    Raises:
        VisionattnError: says what is not as it is said to be.
    """
    entry: Entry = find(described.name)[2]
    if entry.variant is None and described.task == "classification":  # code of the user's, who may do as they like
        return
    tensors = described.state_dict
    groups = [group for group in ("model_kwargs", "head_kwargs") if group in described.entries] or ["model_args"]
    what = f"{described.place}: what entry {' or '.join(groups)} asks for"
    most = MOST_TENSORS if tensors is None else 256 + 4 * len(flatten(tensors))
    with told_of(what, Exception), torch.random.fork_rng(devices=[]), torch.device("meta"), _at_most(most):
        model = make()
    if tensors is not None:
        with told_of(what, Exception):
            check_held(tensors, model, described.made_for)
    elif (size := sum(p.numel() for p in model.parameters())) > MOST:
        raise VisionattnError(f"{what}: a model of {size} parameters")


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Ends the making of a model that has more parameters."""
    made, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > parameters:
            raise VisionattnError(f"a model of more than {parameters} tensors, far from what is held")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
