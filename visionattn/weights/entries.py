"""The entries that a header or a config.json may have, and what may stand in them."""

import json
from collections.abc import Collection, Mapping, Sequence
from reprlib import repr as shown
from typing import Any, Literal

from timm.models import PretrainedCfg

from ..arguments import check_types, hints
from ..errors import VisionattnError, one_line, told_of
from ..registry import BUILDER_ARGUMENTS, FEATURE_ARGUMENTS, MODEL_ARGUMENTS, find
from .unwrap import flatten

EXECUTION = {
    *("device", "dtype", "pretrained", "checkpoint_path", "checkpoint_prefix"),
    *BUILDER_ARGUMENTS,
    *FEATURE_ARGUMENTS,
}
"""Arguments that say how a model is made and run, and no file's business."""
NO_HEADS = ("num_classes", "pretrained_backbone", "backbone_kwargs", "backbone", "head")
"""Arguments of `create_detector` and `create_segmenter` that other entries stand for."""
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
"""Entries of timm's configuration that say where weights are, and no repository's business."""
LARGEST = 2**14
"""Anything that is counted, where the tensors of a file allow no more."""
LONGEST_SIDE = 2**13
"""Pixels of an image's side: Pillow takes the square of twice that for a bomb."""
MOST, MOST_ROWS = 2**33, 2**20
"""Elements of the parameters of a model, and of a side of one of these, where no tensors tell."""
DEEPEST = 32
"""Lists and mappings within each other."""
HEADED = ("detection", "segmentation")
"""Tasks whose models are a head over a backbone, made by `create_detector` and `create_segmenter`."""
HEADER = {
    "task": str,
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


def parse(text: str, place: str) -> dict[str, Any]:
    """A description, which is JSON.

    Args:
        text: of the description.
        place: what errors call it, as `place` is below.

    Raises:
        VisionattnError: if it is no mapping, or nested more deeply than any description.
    """
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
    check_entries(entries, f"{place}: entry ", HEADER, known=HEADER)
    check_preparation(entries.get("preprocessing", {}), f"{place}: entry preprocessing.", PREPARATION)
    classes, kwargs = entries.get("classes"), entries.get("model_kwargs", {})
    if "model" in entries:
        check_model(entries["model"], kwargs, place, "model_kwargs", longest)
    for count in {kwargs.get("num_classes"), entries.get("num_classes")} - {None} if classes is not None else ():
        if count != len(classes):
            raise VisionattnError(f"{place}: entry classes names {len(classes)}, and num_classes says {count}")
    if entries.get("task") in HEADED:
        for entry in ("model", "head", "head_kwargs", "classes", "data"):
            if entries.get(entry) is None:
                raise VisionattnError(f"{place} is of {entries['task']}, but has no entry {entry}")
    check_entries(entries.get("head_kwargs", {}), f"{place}: entry head_kwargs.", {}, NO_HEADS, longest=longest)
    _check_options(entries, place)


def _check_options(entries: Mapping[str, Any], place: str) -> None:
    """Refuse what cannot be options of train.py, where these are installed."""
    try:
        from ..data.config import AnnotationConfig, DataConfig, JointConfig
    except ModuleNotFoundError:  # what cannot be read is not used either
        return
    for group, options in (("data", DataConfig), ("annotations", AnnotationConfig), ("joint", JointConfig)):
        given, what = entries.get(group, {}), f"{place}: entry {group}."
        check_entries(given, what, hints(options), known=hints(options))
        for key, value in given.items():
            if "size" in key and "batch" not in key or key == "crop":
                check_sizes(value, f"{what}{key}", LONGEST_SIDE)


def check_entries(
    entries: Mapping[str, Any],
    what: str,
    types: Mapping[str, Any],
    refused: Collection[str] = (),
    known: Collection[str] | None = None,
    longest: int | None = None,
) -> None:
    """Refuse entries that are not a file's to say, unknown, too large, or of another type than they should be.

    Args:
        entries: by name.
        what: the beginning of errors, before the name.
        types: by name; those that have none are numbers, texts, or lists of such.
        refused: names that no file may have.
        known: names that it may have, None for any.
        longest: the most that whole numbers may be, None for any.

    Raises:
        VisionattnError: says which entry it is, and what is expected.
    """
    for key, value in entries.items():
        if key in refused:
            raise VisionattnError(f"{what}{key} is not a file's to say")
        if known is not None and key not in known:
            raise VisionattnError(f"{what}{key} is none of this version of visionattn: {', '.join(sorted(known))}")
        if longest is not None:
            check_sizes(value, f"{what}{key}", longest)
        if key not in types and not _is_plain(value):
            raise VisionattnError(f"{what}{key}: expected numbers or texts, got {shown(value)}")
    check_types(entries, types, what, ": expected")


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, nothing, or a list of such."""
    return all(map(_is_plain, value)) if isinstance(value, list) else not isinstance(value, dict)


def check_preparation(entries: Mapping[str, Any], what: str, known: Collection[str] | None) -> None:
    """Refuse entries of timm's configuration that are ill-typed, out of range, or say where weights are.

    Args:
        entries: by name.
        what: the beginning of errors, before the name.
        known: names that it may have, None for any.
    """
    stated = {key: value for key, value in entries.items() if value is not None}
    timms = {key: value for key, value in stated.items() if known or key in PREPARATION}
    check_entries(timms, what, PREPARATION, SOURCES, known)
    for key, value in stated.items():
        if key == "custom_load" and value:
            raise VisionattnError(f"{what}{key} is not a file's to say")
        if key.endswith(("_size", "num_classes")):
            check_sizes(value, f"{what}{key}", LONGEST_SIDE if key.endswith("_size") else MOST_ROWS)
        if (key.endswith("_pct") and value <= 0) or (key == "std" and min(value, default=0) <= 0):
            raise VisionattnError(f"{what}{key}: expected what is above 0, got {shown(value)}")
        if key == "input_size" and min(value) < 1:
            raise VisionattnError(f"{what}{key}: expected sizes from 1 up, got {shown(value)}")
    if len({len(stated[key]) for key in ("mean", "std") if key in stated}) > 1:
        raise VisionattnError(f"{what}mean has another length than std")


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
        entry = find(name)[2]
    types = hints(entry.takes)
    known = None if entry.variant is None else (types.keys() | MODEL_ARGUMENTS) - EXECUTION
    check_entries(kwargs, f"{place}: entry {group}.", types, EXECUTION, known, longest)


def check_sizes(value: Any, what: str, longest: int) -> None:
    """Refuse whole numbers that are negative or larger than anything in the file, anywhere in a value.

    Args:
        value: a number, or lists of such; anything else is passed over.
        what: the beginning of the error.
        longest: the most that it may be.
    """
    if isinstance(value, (list, tuple)):
        for each in value:
            check_sizes(each, what, longest)
    elif isinstance(value, int) and not 0 <= value <= longest:
        told = "below 0" if value < 0 else f"more than its tensors allow, {longest} at most"
        raise VisionattnError(f"{what} is {shown(value)}, {told}")


def longest_side(content: Mapping[str, Any]) -> int:
    """The longest side of a tensor of a file, or of an image.

    Args:
        content: of the file.
    """
    return max([LARGEST, *(side for tensor in flatten(content).values() for side in tensor.shape)])
