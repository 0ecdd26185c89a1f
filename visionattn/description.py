"""What files and repositories say of their models, checked before anything is built by it.

A checkpoint of train.py or `visionattn convert` has it in its header, a repository in its config.json. Both may come
from anybody: every entry is checked by its type, and sizes by what the file holds. How a model is run, and where its
weights are, is not theirs to say.
"""

import json
import reprlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import PretrainedCfg
from timm.models._hub import _parse_model_cfg, download_from_hf
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .arguments import check_values, describe, fits, hints
from .download import HUB, fetch
from .errors import VisionattnError
from .files import DESCRIPTION, find_file, one_line, read_checkpoint
from .registry import BUILDER_ARGUMENTS, Entry, find
from .weights import check_held, load_pretrained

EXECUTION = {"device", "dtype", "pretrained", "checkpoint_path", "start", *BUILDER_ARGUMENTS}
"""Arguments that say how a model is made and run, and no file's business."""
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
"""Entries of timm's configuration that say where weights are, and no repository's business."""
LARGEST = 2**14
"""Pixels of an image's side, and anything else that is counted, where the tensors of a file allow no more."""
MOST, MOST_ROWS, MOST_TENSORS = 2**33, 2**20, 50_000
"""Elements of the parameters of a model, of a side of one of these, and such parameters, where no tensors tell."""
DEEPEST = 32
"""Lists and mappings within each other."""
HEADER = {
    "task": Literal["classification", "detection", "segmentation"],
    "model": str,
    "model_kwargs": Mapping,
    "head": str,
    "head_kwargs": Mapping,
    "classes": Sequence[str] | None,
    "num_classes": int,
    "preprocessing": Mapping,
    "data": Mapping,
    "annotations": Mapping,
    "joint": Mapping,
    "precision": Literal["no", "bf16", "fp16"],
    "multi_label": bool,
    "epoch": int,
    "metrics": Mapping | None,
    "source": str,
    "license": str,
    "sha256": str,
    "adapted": Mapping,
}
"""Entries of a header."""
CONFIG = {
    "architecture": str,
    "model_args": Mapping,
    "pretrained_cfg": Mapping,
    "num_classes": int,
    "label_names": Sequence[str] | Mapping | None,
    "label_descriptions": Mapping | None,
}
"""Entries of a config.json that are read; others are of no effect."""
PREPARATION = hints(PretrainedCfg) | {
    "label_names": CONFIG["label_names"],
    "label_descriptions": CONFIG["label_descriptions"],
    **dict.fromkeys(("first_conv", "classifier", "notes", "paper_ids"), str | Sequence[str] | None),
    "mean": Sequence[float],
    "std": Sequence[float],
    "crop_mode": Literal["center", "squash", "border"],
    "interpolation": Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random"],
}
"""Entries of timm's configuration, of which a header's preprocessing has some."""


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
    place = f"checkpoint {path}"
    entries = _parse(metadata.get(DESCRIPTION, "{}"), place)
    check_header(entries, place, longest_side(content))
    return entries, content


def load_described(model: nn.Module, path: str | PathLike) -> None:
    """Load weights to start from, as `load_pretrained`, with what the file's header says of what they were made for.

    Args:
        model: the model to load into.
        path: of the file.
    """
    entries, content = read_described(path)
    known = made_for(entries["model"], entries.get("model_kwargs", {})) if "model" in entries else {}
    load_pretrained(model, content, known, path)


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
        config = (
            Path(rest, "config.json")
            if kind == "local-dir"
            else download_from_hf(rest, "config.json", cache_dir=cache_dir)
        )
        text = Path(config).read_text(encoding="utf-8")
    except Exception as e:  # what the network, the hub and the disk raise is theirs
        raise VisionattnError(f"cannot read the configuration of {name}: {one_line(e)}") from e
    place = f"config.json of {name}"
    content = _parse(text, place)
    nested = content.get("pretrained_cfg", content)
    _check_types(content, CONFIG, place)
    _check_preparation(nested, place, "pretrained_cfg." if nested is not content else "")
    source = {"file": rest, "source": kind} if kind == "local-dir" else {"hf_hub_id": rest, "source": "hf-hub"}
    with told_of(place):
        cfg, architecture, kwargs = _parse_model_cfg(content, source)
    cfg = {k: v for k, v in cfg.items() if k in PREPARATION}
    path = state_dict = None
    if weights:
        path = find_file(rest) if kind == "local-dir" else fetch([], [HUB + rest], name, cache_dir=cache_dir)
        state_dict = read_checkpoint(path)[0]
    longest = MOST_ROWS if state_dict is None else longest_side(state_dict)
    check_model(architecture, kwargs, place, "model_args", longest)
    _check_sizes(cfg.get("num_classes", 0), f"{place}: entry num_classes", longest)
    return Described(place, architecture, dict(kwargs), cfg, {}, path, state_dict)


def _parse(text: str, place: str) -> dict[str, Any]:
    """A description, which is JSON."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise VisionattnError(f"{place} describes its model in a way that cannot be read ({one_line(e)})") from e
    if not isinstance(content, dict):
        raise VisionattnError(f"{place} describes its model as a {type(content).__name__}, expected a mapping")
    level = [content]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise VisionattnError(f"{place} describes its model with more than {DEEPEST} lists in each other")
    return content


def check_header(entries: Mapping[str, Any], place: str, longest: int = LARGEST) -> None:
    """Refuse a header with entries that are unknown, ill-typed, or not a file's to say.

    Args:
        entries: of the header.
        place: what errors call the file.
        longest: the longest side of a tensor in the file.

    Raises:
        VisionattnError: says which entry it is, and what is expected.
    """
    if unknown := entries.keys() - HEADER.keys():
        raise VisionattnError(f"{place} has an entry {min(unknown)}, which this version of visionattn does not know")
    _check_types(entries, HEADER, place)
    _check_preparation(entries.get("preprocessing", {}), place, "preprocessing.")
    classes, kwargs = entries.get("classes"), entries.get("model_kwargs", {})
    if "model" in entries:
        check_model(entries["model"], kwargs, place, "model_kwargs", longest)
    for count in {kwargs.get("num_classes"), entries.get("num_classes")} - {None} if classes is not None else ():
        if count != len(classes):
            raise VisionattnError(f"{place}: entry classes names {len(classes)}, and num_classes says {count}")
    if entries.get("task", "classification") != "classification":
        _check_dense(entries, place, longest)
    _check_options(entries, place)


def _check_dense(entries: Mapping[str, Any], place: str, longest: int) -> None:
    """Refuse what cannot be of a detector or segmenter."""
    for entry in ("model", "head", "head_kwargs", "classes", "data"):
        if entries.get(entry) is None:
            raise VisionattnError(f"{place} is of {entries['task']}, but has no entry {entry}")
    for key, value in entries["head_kwargs"].items():
        if key in ("num_classes", "pretrained_backbone", "backbone_kwargs", "backbone", "head"):
            raise VisionattnError(f"{place}: entry head_kwargs.{key} is not a file's to say")
        _check_sizes(value, f"{place}: entry head_kwargs.{key}", longest)
        if not _is_plain(value):
            raise VisionattnError(f"{place}: entry head_kwargs.{key}: expected numbers or texts, got {_shown(value)}")


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, nothing, or a list of such."""
    return all(map(_is_plain, value)) if isinstance(value, list) else not isinstance(value, dict)


def _check_options(entries: Mapping[str, Any], place: str) -> None:
    """Refuse what cannot be options of train.py, where these are installed."""
    try:
        from .data.config import DataConfig
        from .data.dense_config import AnnotationConfig, JointConfig
    except ModuleNotFoundError:  # what cannot be read is not used either
        return
    for group, options in (("data", DataConfig), ("annotations", AnnotationConfig), ("joint", JointConfig)):
        types = hints(options)
        for key, value in entries.get(group, {}).items():
            if key not in types:
                told = f"{place}: entry {group}.{key} is no option of this version of visionattn"
                raise VisionattnError(told)
            if not fits(value, types[key]):
                expected = describe(types[key])
                raise VisionattnError(f"{place}: entry {group}.{key}: expected {expected}, got {_shown(value)}")
            if "size" in key and "batch" not in key or key == "crop":
                _check_sizes(value, f"{place}: entry {group}.{key}", LARGEST)


def _check_types(entries: Mapping[str, Any], types: Mapping[str, Any], place: str, prefix: str = "") -> None:
    for key, value in entries.items():
        if key in types and not fits(value, types[key]):
            told = f"{place}: entry {prefix}{key}: expected {describe(types[key])}, got {_shown(value)}"
            raise VisionattnError(told)


def _check_preparation(entries: Mapping[str, Any], place: str, prefix: str) -> None:
    """Refuse entries of timm's configuration that are ill-typed, out of range, or say where weights are."""
    stated = {key: value for key, value in entries.items() if value is not None}
    for key, value in stated.items():
        if prefix and key not in PREPARATION:
            raise VisionattnError(f"{place} has an entry {prefix}{key}, which this version of visionattn does not know")
        if key in SOURCES or (key == "custom_load" and value):
            raise VisionattnError(f"{place}: entry {prefix}{key} is not a file's to say")
    _check_types(stated, PREPARATION, place, prefix)
    for key, value in stated.items():
        if key.endswith(("_size", "num_classes")):
            _check_sizes(value, f"{place}: entry {prefix}{key}", LARGEST if key.endswith("_size") else MOST_ROWS)
        if (key.endswith("_pct") and value <= 0) or (key == "std" and min(value, default=0) <= 0):
            raise VisionattnError(f"{place}: entry {prefix}{key}: expected what is above 0, got {_shown(value)}")
        if key == "input_size" and min(value) < 1:
            raise VisionattnError(f"{place}: entry {prefix}{key}: expected sizes from 1 up, got {_shown(value)}")
    if len({len(stated[key]) for key in ("mean", "std") if key in stated}) > 1:
        raise VisionattnError(f"{place}: entries {prefix}mean and {prefix}std differ in length")


def check_model(name: str, kwargs: Mapping[str, Any], place: str, group: str, longest: int) -> None:
    """Refuse a name that is not registered, and arguments that its model does not take.

    Args:
        name: of the model.
        kwargs: its arguments.
        place: what errors call who says so.
        group: what that calls the arguments.
        longest: the longest side of a tensor that is held.

    Raises:
        VisionattnError: says which it is.
    """
    with told_of(place):
        takes = find(name)[2].takes
    types = hints(takes)
    for key, value in kwargs.items():
        if key in EXECUTION:
            raise VisionattnError(f"{place}: entry {group}.{key} is not a file's to say")
        if key not in types and takes is not find(name)[2].build and key != "img_size":
            raise VisionattnError(
                f"{place}: {name} takes no {group}.{key}; it takes {', '.join(sorted(types.keys() - EXECUTION))}"
            )
        _check_sizes(value, f"{place}: entry {group}.{key}", longest)
        if key not in types and isinstance(value, dict):
            raise VisionattnError(f"{place}: entry {group}.{key}: expected numbers or texts, got {_shown(value)}")
    check_values(kwargs, takes, lambda key: f"{place}: {name} takes {group}.{key}")


def _check_sizes(value: Any, what: str, longest: int) -> None:
    """Refuse whole numbers that are negative or larger than anything in the file, anywhere in a value."""
    if isinstance(value, (list, tuple)):
        for each in value:
            _check_sizes(each, what, longest)
    elif isinstance(value, int) and not 0 <= value <= longest:
        told = "below 0" if value < 0 else f"more than its tensors allow, {longest} at most"
        raise VisionattnError(f"{what} is {_shown(value)}, {told}")


def longest_side(content: Mapping[str, Any]) -> int:
    """The longest side of a tensor of a file, or of an image.

    Args:
        content: of the file.
    """
    return max([LARGEST, *(side for tensor in _tensors(content) for side in tensor.shape)])


def _shown(value: Any) -> str:
    return reprlib.repr(value)


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
    most = MOST_TENSORS if tensors is None else 256 + 4 * sum(1 for _ in _tensors(tensors))
    with told_of(what), torch.random.fork_rng(devices=[]), torch.device("meta"), _at_most(most):
        model = make()
    if tensors is not None:
        with told_of(what):
            check_held(tensors, model, described.made_for)
    elif (size := sum(p.numel() for p in model.parameters())) > MOST:
        raise VisionattnError(f"{what}: a model of {size} parameters")


def _tensors(content: Mapping[str, Any], depth: int = 0) -> Iterator[Tensor]:
    for value in content.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping) and depth < DEEPEST:
            yield from _tensors(value, depth + 1)


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


@contextmanager
def told_of(place: str) -> Iterator[None]:
    """Names the place in errors, and makes one line of whatever its description raises as a model is made by it.

    Args:
        place: what errors call it.
    """
    try:
        yield
    except VisionattnError as e:
        raise type(e)(f"{place}: {e}") from e
    except Exception as e:  # what layers raise that are asked for what cannot be
        raise VisionattnError(f"{place} cannot be met ({one_line(e)})") from e
