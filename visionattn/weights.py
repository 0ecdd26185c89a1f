"""Converting published layouts to ours, and fitting weights to other models of their family."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .errors import VisionattnError
from .files import read_checkpoint

_logger = logging.getLogger("visionattn")

Rule = (
    tuple[str, str | Callable[[re.Match], str]]
    | tuple[str, str | Callable[[re.Match], str], Callable[[Tensor], Tensor]]
)
"""One line of a layout: (pattern, replacement) or (pattern, replacement, transform).

The rules of a layout are applied to every key in order, each as `re.sub(pattern, replacement, key)`; a transform is
applied to the tensor where its pattern matched. In the resulting key
    ""           drops the entry,
    "...#0"      is part 0 of a concatenation along the first dimension with "...#1" and so on,
    "{a|b}"      unbinds the first dimension into the entries with "a" and with "b" in that place.
"""

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict"),
    *("state_dict", "model_state_dict", "model", "module", "net", "teacher"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.")
PARTS = ("vision_tower.", "visual.", "backbone.maps.backbone.", "encoder.backbone.", "backbone.")
"""Prefixes under which checkpoints of larger models hold a backbone; what is not under them is dropped."""
MISFITS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What rules raise for tensors of a shape that their layout does not have."""
TABLES = ("pos_embed.weight", ".proj_n", ".proj_back_n")
"""Ends of the names of tables with a row for every patch, which may be resampled without a change of shape."""
TRAINING_STATE = "training_state."
"""Prefix of what a training checkpoint holds besides the model."""


def renumber(template: str, offset: int) -> Callable[[re.Match], str]:
    """Replacement that adds `offset` to the number in the pattern's first group.

    Args:
        template: the new text, with "{0}" for the number and "{1}", "{2}", ... for the pattern's further groups.
        offset: what to add.
    """
    return lambda m: template.format(int(m[1]) + offset, *m.groups()[1:])


def unwrap(state_dict: Mapping, averaged: bool = True) -> dict[str, Tensor]:
    """The flat state dict inside wrapper keys (`model`, `state_dict`, ...).

    Args:
        state_dict: tensors by name, possibly wrapped.
        averaged: take averaged weights rather than others, where there are both.

    Raises:
        VisionattnError: if there are no tensors, or some that are not plain.
    """
    wrappers = sorted(WRAPPERS, key=lambda k: ("ema" in k) != averaged)
    for _ in WRAPPERS:  # deeper than any file, and an end to one that holds itself
        inner = next((state_dict[k] for k in wrappers if isinstance(state_dict.get(k), Mapping)), None)
        state_dict = state_dict if inner is None else inner
    tensors = {
        k: v
        for k, v in state_dict.items()
        if isinstance(k, str) and isinstance(v, Tensor) and not k.startswith(TRAINING_STATE)
    }
    if not tensors:
        raise VisionattnError(f"expected a state dict, got a dictionary with {_some(list(map(str, state_dict)))}")
    for key, value in tensors.items():
        plain = value.layout == torch.strided and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes() and not value.is_meta:
            raise VisionattnError(f"expected plain tensors, got {key} as {value.layout} of {tuple(value.shape)}")
    return tensors


@dataclass
class _Conversion:
    """A state dict in our layout.

    Args:
        tensors: fitted to the model's configuration by its `adapt_state_dict`.
        found: what the file held, before that.
        left_out: other tensors of the file, which belong to a larger model.
    """

    tensors: dict[str, Tensor]
    found: dict[str, Tensor]
    left_out: list[str]


def _convert(state_dict: Mapping, model: nn.Module, made_for: Mapping[str, Any] | None = None) -> _Conversion:
    """The layout that fits the model's names best."""
    expected = model.state_dict().keys()
    source = unwrap(state_dict, getattr(model, "averaged_weights", True))
    candidates = [(source, [])]
    for part in PARTS:
        if inside := {k.removeprefix(part): v for k, v in source.items() if k.startswith(part)}:
            candidates.append((inside, [k for k in source if not k.startswith(part)]))
            source = inside
    while source and (prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in source)), None)):
        source = {k.removeprefix(prefix): v for k, v in source.items()}
        candidates.append((source, candidates[-1][1]))
    layouts = [[], *getattr(model, "layouts", {}).values()]
    adapt = partial(model.adapt_state_dict, made_for=made_for or {}) if hasattr(model, "adapt_state_dict") else dict
    conversions = []
    for (candidate, left_out), rules in product(reversed(candidates), layouts):
        with suppress(*MISFITS):
            found = _apply(rules, candidate)
            conversions.append(_Conversion(adapt(found), found, left_out))
    if not conversions:
        raise VisionattnError(f"state dict does not fit {_name(model)}: its tensors have shapes of no layout")
    return min(conversions, key=lambda c: len(expected ^ c.tensors.keys()))


def convert_state_dict(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """A state dict in any published layout of the model's family, in the model's own layout.

    The layout is detected by its keys; wrapper keys and prefixes (`model`, `state_dict`, `module.`, ...) are removed. A
    classifier in the state dict is dropped where the model has none. Our own layout is returned unchanged.

    Args:
        state_dict: tensors by name, possibly wrapped.
        model: the model to convert for.

    Returns:
        State dict with exactly the model's keys.

    Raises:
        VisionattnError: if no layout of the family fits; the message says which keys are missing and left over.
    """
    own, made_for = model.state_dict(), {}
    inner = getattr(model, "inner", model)
    if (grid := getattr(inner, "grid_size", None)) is not None:
        made_for["img_size"] = [length * inner.patch_size for length in grid]
    tensors = _convert(state_dict, model, made_for).tensors
    for prefix in _heads(model):
        if not any(k.startswith(prefix) for k in own):
            tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    _check(tensors, model)
    return tensors


def fit_state_dict(
    state_dict: Mapping, model: nn.Module, made_for: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """A state dict of any layout, number of classes, input channels, image size or window, for this model.

    Position tables and filters are resampled as the family does, the first convolution follows timm's rule for other
    channels. A head for other classes is replaced by the model's own; so are head and last norm where the file is of a
    model for dense prediction, and norms of features where it is not.

    Args:
        state_dict: tensors by name, possibly wrapped.
        model: the model to fit them to.
        made_for: arguments of the model that they were made for, as far as they are known. Without an `img_size`,
            tables of positions are those of square images.

    Returns:
        State dict with the model's keys and shapes, and names of what was "re-initialised", "dropped" and "resized".

    Raises:
        VisionattnError: if it does not fit otherwise.
    """
    return _fit(_convert(state_dict, model, made_for), model)


def check_held(state_dict: Mapping, model: nn.Module, made_for: Mapping[str, Any] | None = None) -> None:
    """Refuse a state dict that is not of this very model, which may be on the meta device and stay there.

    Args:
        state_dict: tensors by name, possibly wrapped.
        model: what the state dict is said to be of. It may have what models for dense prediction lack.
        made_for: its arguments.

    Raises:
        VisionattnError: says what differs.
    """
    tensors = unwrap(state_dict, getattr(model, "averaged_weights", True))
    conversion = _convert({k: v.to("meta") for k, v in tensors.items()}, model, made_for)
    own, found = _shapes(model.state_dict()), _shapes(conversion.found)
    if other := [f"{k} {found[k]} instead of {own[k]}" for k in found if k in own and found[k] != own[k]]:
        raise VisionattnError(f"the tensors are of another model: {_some(other)}")
    _fit(conversion, model)


def _fit(conversion: _Conversion, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    own = model.state_dict()
    tensors, found, heads = dict(conversion.tensors), conversion.found, _heads(model)
    for prefix in heads:
        theirs, ours = ({k: v for k, v in d.items() if k.startswith(prefix)} for d in (tensors, own))
        if _shapes(theirs) != _shapes(ours):
            tensors = {k: v for k, v in tensors.items() if k not in theirs} | ours
    optional = tuple(getattr(model, "optional", ()))
    tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(optional)}
    if not any(k.startswith(heads) for k in found):
        tensors = {k: v for k, v in tensors.items() if k in own or not re.match(r"norm\d", k)}
        tensors = {k: v for k, v in own.items() if k.startswith(optional)} | tensors
    tensors = {k: v for k, v in own.items() if k.startswith("feature_norms.")} | tensors
    weight = f"{getattr(model, 'first_conv', '')}.weight"
    if weight in tensors and weight in own and tensors[weight].ndim == 4:
        theirs, ours = tensors[weight].shape[1], own[weight].shape[1]
        tensors[weight] = adapt_input_conv(ours, tensors[weight], base_chans=theirs)
    _check(tensors, model)
    old = {k: f"{k} {tuple(found[k].shape)}" if k in found else k for k in tensors}
    fresh = [k for k, v in tensors.items() if v.numel() and v.data_ptr() == own[k].data_ptr()]
    return tensors, {
        "re-initialised": [f"{old[k]} as {tuple(own[k].shape)}" if k in found else k for k in fresh],
        "dropped": [k for k in found if k not in tensors] + conversion.left_out,
        "resized": [
            f"{old[k]} to {tuple(v.shape)}"
            for k, v in tensors.items()
            if k in found and k not in fresh and (v.shape != found[k].shape or k.endswith(TABLES) and v is not found[k])
        ],
    }


def find_widths(state_dict: Mapping, model: nn.Module) -> dict[str, int]:
    """The numbers of classes and input channels of a state dict, as arguments of a model, where they are not its own.

    Args:
        state_dict: tensors by name, possibly wrapped, in any layout of the model's family.
        model: a model that differs in nothing else.
    """
    own, found = model.state_dict(), _convert(state_dict, model).found
    widths, head, conv = {}, f"{_heads(model)[0]}weight", f"{getattr(model, 'first_conv', '')}.weight"
    if head in own and (classes := len(found.get(head, ()))) != len(own[head]):
        widths["num_classes"] = classes
    if conv in own and conv in found and found[conv].ndim == 4 and found[conv].shape[1] != own[conv].shape[1]:
        widths["in_chans"] = found[conv].shape[1]
    return widths


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifiers' names."""
    names = getattr(model, "classifier", "head")
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in tensors.items()}


def _check(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuses tensors that are not the model's by name, shape or kind."""
    own = model.state_dict()
    name = _name(model)
    if own.keys() != tensors.keys():
        missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise VisionattnError(f"state dict does not fit {name}: missing {_some(missing)}; left over {_some(left)}")
    wrong = [
        f"{k} {v.dtype} {tuple(v.shape)} instead of {own[k].dtype} {tuple(own[k].shape)}"
        for k, v in tensors.items()
        if v.shape != own[k].shape or _kind(v) != _kind(own[k])
    ]
    if wrong:
        raise VisionattnError(f"state dict does not fit {name}: {_some(wrong)}")


def _name(model: nn.Module) -> str:
    return getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else "none"


def _apply(rules: list[Rule], state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state_dict.items():
        for pattern, replacement, *transform in rules:
            key, count = re.subn(pattern, replacement, key)
            if count and transform:
                value = transform[0](value)
        if split := re.fullmatch(r"(.*)\{(.*)\|(.*)\}(.*)", key):
            before, first, second, after = split.groups()
            out[before + first + after], out[before + second + after] = value.unbind(0)
        elif part := re.fullmatch(r"(.*)#(\d+)", key):
            parts.setdefault(part[1], {})[int(part[2])] = value
        elif key:
            out[key] = value
    return out | {key: torch.cat([pieces[i] for i in sorted(pieces)]) for key, pieces in parts.items()}


def load_checkpoint(model: nn.Module, path: str | PathLike) -> None:
    """Load a checkpoint file of any published layout of the model's family, strictly: as the very model that it is of.

    Args:
        model: the model to load into.
        path: a file that `read_checkpoint` reads.

    Raises:
        VisionattnError: if the file cannot be read or does not fit the model; the model is then unchanged.
    """
    content = read_checkpoint(path)[0]
    with _named(path):
        model.load_state_dict(convert_state_dict(content, model), strict=True)


def load_pretrained(
    model: nn.Module,
    weights: str | PathLike | Mapping,
    made_for: Mapping[str, Any] | None = None,
    place: str | PathLike = "",
) -> None:
    """Load weights to start from, fitted to the model by `fit_state_dict`.

    What was re-initialised, dropped or resized is logged in one line, as a warning if a part of the model is new.

    Args:
        model: the model to load into.
        weights: a file that `read_checkpoint` reads, or a state dict.
        made_for: arguments of the model that they were made for, as for `fit_state_dict`.
        place: file that the state dict is from.

    Raises:
        VisionattnError: if the file cannot be read or does not fit the model; the model is then unchanged.
    """
    if not isinstance(weights, Mapping):
        weights, place = read_checkpoint(weights)[0], weights
    with _named(place) if place else nullcontext():
        tensors, report = fit_state_dict(weights, model, made_for)
        model.load_state_dict(tensors, strict=True)
    if told := "; ".join(f"{what} {_some(keys)}" for what, keys in report.items() if keys):
        level = logging.WARNING if report["re-initialised"] else logging.INFO
        _logger.log(level, "%s: %s", Path(place).name if place else "state dict", told)


@contextmanager
def _named(path: str | PathLike) -> Iterator[None]:
    try:
        yield
    except VisionattnError as e:
        raise VisionattnError(f"checkpoint {path}: {e}") from e
